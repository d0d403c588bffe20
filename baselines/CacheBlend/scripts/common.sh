# Sourced by the scripts beside it: paths, defaults, and `option`. Every default gives way to an environment variable of
# its name; docs/rag.md lists them. Relative paths are the caller's.
set -euo pipefail
pipeline=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
root=$(cd "$pipeline/../.." && pwd)

PYTHON=${PYTHON:-$root/.venv/bin/python}
command -v "$PYTHON" >/dev/null || { echo "no Python at $PYTHON: run 'make install', or name one in PYTHON" >&2; exit 2; }
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"

RESULTS=${RESULTS:-$pipeline/results}
K=${K:-5}
if [ -z "${DATA:-}" ]; then
  DATA=$pipeline/inputs/musique_s.json
  if [ ! -f "$DATA" ]; then
    DATA=$root/datasets/synthetic/hotpotqa-deep-test.jsonl
    echo "inputs/musique_s.json is not there (docs/rag.md says where to get it): using the shipped synthetic set" >&2
  fi
fi
dataset=$(basename "$DATA")
dataset=${dataset%.*}
RETRIEVAL_JSON=${RETRIEVAL_JSON:-$RESULTS/retrieval/${dataset}_rag_both_k$K.json}
if [ -z "${MODEL:-}" ]; then  # the shipped model keeps its answers if tokens are selected at layer 4
  MODEL=$root/models/tiny-llama-12m
  LAYER=${LAYER:-4}
fi

options=()
# option NAME VALUE: adds it unless the value is empty.
option() { if [ -n "$2" ]; then options+=("$1" "$2"); fi; }
# flag NAME VALUE: adds NAME if the value is 1.
flag() { if [ "$2" = 1 ]; then options+=("$1"); fi; }

samples_of_retrieval() {
  option --retrieval-json "$RETRIEVAL_JSON"
  option --data "$DATA"
  option --samples "${SAMPLES:-}"
  option --results "$RESULTS"
}

model_and_system() {
  option --model "$MODEL"
  option --dtype "${DTYPE:-}"
  option --device "${DEVICE:-}"
  option --system "${SYSTEM:-}"
  option --layer "${LAYER:-}"
  option --ratio "${RATIO:-}"
  option --device-mib "${DEVICE_MIB:-}"
  flag --require-kernels "${REQUIRE_KERNELS:-0}"
}
