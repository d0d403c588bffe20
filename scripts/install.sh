#!/usr/bin/env bash
# Make or refresh an environment from its pinned list.
#
#   scripts/install.sh [cpu|gpu]   .venv: product and benchmark, with vLLM for that backend
#   scripts/install.sh rag         .venv-rag: RAGatouille, whose dependencies clash with ours
#   scripts/install.sh slurm       adds Snakemake's Slurm executor to .venv
#   scripts/install.sh LIST --dry-run   says what the list would bring into an empty environment; changes nothing
#
# Does nothing when the environment already matches its list. PYTHON=/path/to/python3.12 picks the interpreter, VENV
# another folder than .venv.
set -euo pipefail
cd "$(dirname "$0")/.."

list=${1:-cpu}
mode=${2:-}
pins="requirements/$list.txt"
absolute() { case "$1" in /*) echo "$1" ;; *) echo "$PWD/$1" ;; esac; }
case "$list" in
  cpu | gpu) venv=${VENV:-.venv}; editable=(--editable . --editable ./bench) ;;
  rag) venv=.venv-rag; editable=() ;;
  slurm) venv=${VENV:-.venv}; editable=() ;;
  *) echo "install: no list named '$list'; choose cpu, gpu, rag or slurm" >&2; exit 2 ;;
esac
case "$mode" in "" | --dry-run) ;; *) echo "install: no option '$mode'; the only one is --dry-run" >&2; exit 2 ;; esac

usable() { "$1" -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))' 2>/dev/null; }

find_python() {
  local candidate
  for candidate in ${PYTHON:-python3 python3.11 python3.12 python}; do
    if usable "$candidate"; then
      command -v "$candidate"
      return
    fi
  done
  echo "install: needs Python 3.11 or 3.12 with its venv module; found $("${PYTHON:-python3}" --version 2>&1 | head -n 1)." \
    "Install one (on Debian and Ubuntu with python3-venv), or name it: make install PYTHON=/path/to/python3.12" >&2
  exit 2
}

# What the environment was made from. The folder is part of it because scripts in bin/ hold its absolute path.
fingerprint() { { echo "$list $PWD"; cat "$pins" pyproject.toml bench/pyproject.toml scripts/install.sh; } | "$venv/bin/python" -c \
  'import hashlib, sys; print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest())'; }

# Make the environment ready for its list, or end here where it already matches.
prepare() {
  stamp="$venv/.installed-$list"
  if usable "$venv/bin/python" && [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$(fingerprint)" ]; then
    exit 0
  fi

  started=$SECONDS
  if [ "$list" = slurm ] && [ ! -x "$venv/bin/uv" ]; then
    echo "install: run 'make install' first; slurm is added to .venv" >&2
    exit 2
  fi

  # Start afresh where the old environment cannot be mended: other Python, moved folder, or the other backend's vLLM.
  if [ -e "$venv" ]; then
    moved=no; other=no
    grep -qsF "$(absolute "$venv")" "$venv/bin/activate" || moved=yes
    case "$list" in cpu) [ ! -f "$venv/.installed-gpu" ] || other=yes ;; gpu) [ ! -f "$venv/.installed-cpu" ] || other=yes ;; esac
    if ! usable "$venv/bin/python" || [ "$moved" = yes ] || [ "$other" = yes ]; then
      rm -rf "$venv"
    fi
  fi
  if [ ! -e "$venv" ]; then
    python=$(find_python)
    echo "install: $venv from $pins with $("$python" --version)"
    "$python" -m venv "$venv"
  else
    echo "install: refreshing $venv from $pins"
  fi
  rm -f "$stamp"
  venv_python="$venv/bin/python"

  uv_pin=$(grep '^uv==' requirements/cpu.txt)
  if [ "$("$venv/bin/uv" --version 2>/dev/null | cut -d ' ' -f 2)" != "${uv_pin#uv==}" ]; then
    "$venv_python" -m pip install --quiet --disable-pip-version-check "$uv_pin"
  fi
}

# --dry-run resolves into an environment of its own, with the uv and the settings of .venv.
if [ "$mode" = --dry-run ]; then
  tools=$(absolute "${VENV:-.venv}")/bin
  if [ ! -x "$tools/uv" ]; then
    echo "install: run 'make install' first; --dry-run asks the uv in .venv" >&2
    exit 2
  fi
  empty=$(mktemp -d)
  trap 'rm -rf "$empty"' EXIT
  target="$empty/venv"
  "$tools/uv" venv --quiet --no-config --python "$tools/python" "$target"
else
  prepare
  target=$(absolute "$venv")
  tools=$target/bin
fi

# uv does not read pip's settings, so a mirror or a wheel folder that pip was told about is passed on by hand.
pip_setting() { "$tools/python" -m pip config list 2>/dev/null | sed -n "s/^[^.=]*\.$1='\(.*\)'\$/\1/p" | sed 's/\\n/ /g' | tail -n 1; }
: "${UV_FIND_LINKS:=${PIP_FIND_LINKS:-$(pip_setting find-links)}}"
: "${UV_DEFAULT_INDEX:=${PIP_INDEX_URL:-$(pip_setting index-url)}}"
export UV_FIND_LINKS="${UV_FIND_LINKS// /,}" UV_DEFAULT_INDEX
[ -n "$UV_FIND_LINKS" ] || unset UV_FIND_LINKS
[ -n "$UV_DEFAULT_INDEX" ] || unset UV_DEFAULT_INDEX

# PyPI's torch is the CUDA build. Without a GPU it comes from PyTorch's own CPU index, unless a wheel folder holds one
# for this Python.
torch_source=()
if [ "$list" != gpu ] && [ "$list" != slurm ] && [ -z "${UV_TORCH_BACKEND:-}" ]; then
  torch_source=(--torch-backend cpu)
  tag=$("$tools/python" -c 'import sys; print("cp%d%d" % sys.version_info[:2])')
  for folder in ${UV_FIND_LINKS//,/ }; do
    if compgen -G "${folder#file://}/torch-*-$tag-*.whl" >/dev/null; then torch_source=(); fi
  done
fi

# The list alone says what comes: uv would put the overrides of pyproject.toml, which are for `make lock`, above its
# versions, and an override of the environment too. Naming a file, or none, keeps uv from looking for pyproject.toml;
# a user's own file (mirrors, certificates) is read as ever.
unset UV_OVERRIDE
own="${XDG_CONFIG_HOME:-${HOME:-}/.config}/uv/uv.toml"
if [ -z "${UV_CONFIG_FILE:-}" ]; then
  if [ -f "$own" ]; then export UV_CONFIG_FILE="$own"; else export UV_NO_CONFIG=1; fi
fi

# --no-deps: the list is complete, and vLLM also names torchvision and torchaudio, which text models never import.
install=("$tools/uv" pip install --no-deps ${torch_source[@]+"${torch_source[@]}"} --requirements "$pins")
export VIRTUAL_ENV="$target"
if [ "$mode" = --dry-run ]; then  # without ourselves: that has no versions to choose, but would be built
  "${install[@]}" --dry-run
  exit
fi
"${install[@]}" --quiet ${editable[@]+"${editable[@]}"} || {
  echo "install: not everything in $pins could be fetched (see above). Behind a mirror or offline, put the missing" \
    "wheels into a folder and name it: PIP_FIND_LINKS=/path/to/wheels make install" >&2
  exit 1
}
"$venv_python" - "$pins" <<'EOF'
import importlib.metadata
import sys

pins = (line.strip().split("==") for line in open(sys.argv[1]))
found = ((name, importlib.metadata.version(name).split("+")[0], version) for name, version in pins)
wrong = [f"{name} {got} instead of {version}" for name, got, version in found if got != version]
sys.exit(f"install: {sys.argv[1]} was not followed: {', '.join(wrong)}" if wrong else 0)
EOF

# Import what every run imports: it proves the environment and leaves bytecode behind, also where the shell says
# PYTHONDONTWRITEBYTECODE. Without it each of a run's processes would compile torch again, for 2 s.
case "$list" in
  cpu | gpu)
    HF_HUB_OFFLINE=1 env -u PYTHONDONTWRITEBYTECODE "$venv_python" -c \
      'import torch, datasets, matplotlib.pyplot, pandas, pytest, snakemake.cli; from transformers import AutoTokenizer, LlamaForCausalLM' ;;
esac
fingerprint >"$stamp"
echo "install: done in $((SECONDS - started)) s"
