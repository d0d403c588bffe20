"""The scripts of the pipeline, run as printed: what they write where, their variables, and their one-line errors."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.places import ROOT
from tests.helpers.rag import retrieved

pytestmark = pytest.mark.slow

PIPELINE = ROOT / "baselines/CacheBlend"
SCRIPTS = {
    "retrieval": "scripts/retrieval/run_retrieval.sh",
    "caches": "scripts/build_kv_cache.sh",
    "decoding": "scripts/decoding/run_speculative_decode.sh",
    "budgets": "scripts/run_token_budget_test.sh",
}
WRITTEN = {
    "retrieval": "retrieval/made_rag_both_k2.json",
    "caches": "kv_caches/made_kv_top2.json",
    "decoding": "decoding/speculative_trace.json",
    "budgets": "analysis/token_budget.json",
}


@pytest.fixture(scope="module")
def variables(tmp_path_factory):
    """Variables of the scripts, and a retrieval result where they look for it."""
    folder = tmp_path_factory.mktemp("pipeline")
    made = {"RESULTS": str(folder / "results"), "K": "2", "MAX_NEW_TOKENS": "3", "BUDGETS": "150,300"}
    return made | {"DATA": str(retrieved(folder, 2).samples.path)}


def run(name, variables, **more):
    environment = os.environ | {"PYTHON": sys.executable} | variables | more
    command = ["bash", SCRIPTS[name]]
    return subprocess.run(command, cwd=PIPELINE, env=environment, capture_output=True, text=True)


def test_the_scripts_read_each_others_results(variables):
    results = Path(variables["RESULTS"])
    for name, written in WRITTEN.items():
        done = run(name, variables)
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[-1] == str(results / written)
    trace = json.loads((results / WRITTEN["decoding"]).read_text())
    assert trace["summary"]["loaded"] == 12 and trace["layer"] == 4 and trace["decoding"]["max_new_tokens"] == 3
    assert json.loads((results / WRITTEN["budgets"]).read_text())["budgets"] == [150, 300]


@pytest.mark.parametrize(
    ("name", "more", "why"),
    [
        ("retrieval", {"DATA": "no.json"}, "no.json: no such file"),
        ("retrieval", {"RETRIEVER": "nothing"}, "unknown retriever 'nothing'"),
        ("caches", {"K": "3"}, "run the retrieval step first"),
        ("caches", {"REQUIRE_KERNELS": "1"}, "kernels are required, but the model is on cpu"),
        ("decoding", {"LOAD_CACHE_DIR": "no"}, "no: no folder"),
        ("decoding", {"MODEL": "no-such-model"}, "no-such-model"),
        ("budgets", {"BUDGETS": "0"}, "budgets must be different counts"),
    ],
)
def test_what_cannot_run_says_so_in_one_line(variables, name, more, why):
    done = run(name, variables, **more)
    lines = [line for line in done.stderr.splitlines() if not line.startswith("retrievers installed")]
    assert done.returncode == 2 and len(lines) == 1 and why in lines[0], done.stderr


def test_a_missing_python_is_one_line(variables):
    done = run("retrieval", variables, PYTHON="/no/python")
    assert done.returncode == 2 and done.stderr.startswith("no Python at /no/python: run 'make install'")


def test_all_steps_at_once(variables, tmp_path):
    command = [sys.executable, "src/run_pipeline.py", "--data", variables["DATA"], "--results", str(tmp_path)]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [*command, "--k", "1", "--max-new-tokens", "2", "--model", str(ROOT / "models/tiny-llama-12m")],
        cwd=PIPELINE,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "decoding/speculative_trace.json").is_file()
