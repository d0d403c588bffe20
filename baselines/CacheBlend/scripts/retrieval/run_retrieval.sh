#!/usr/bin/env bash
# Rank the passages of every sample: RESULTS/retrieval/<dataset>_rag_both_k<K>.json. docs/rag.md lists the variables.
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
option --data "$DATA"
option --k "$K"
option --retriever "${RETRIEVER:-}"
option --retriever-model "${RETRIEVER_MODEL:-}"
option --samples "${SAMPLES:-}"
option --results "$RESULTS"
exec "$PYTHON" -m harness.rag.run_retrieval "${options[@]}" "$@"
