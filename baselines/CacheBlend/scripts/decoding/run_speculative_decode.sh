#!/usr/bin/env bash
# Decode every sample with promotions: RESULTS/decoding/speculative_trace.json. KV is read from LOAD_CACHE_DIR, by default
# RESULTS/kv_caches where it is there; LOAD_CACHE_DIR= computes it. docs/rag.md lists the variables.
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
saved=$RESULTS/kv_caches
[ -d "$saved" ] || saved=
samples_of_retrieval
model_and_system
option --k "$K"
option --retriever-model "${RETRIEVER_MODEL:-}"
option --load-cache-dir "${LOAD_CACHE_DIR-$saved}"
flag --encode-rest "${ENCODE_REST:-0}"
option --max-new-tokens "${MAX_NEW_TOKENS:-}"
option --stride "${STRIDE:-}"
option --ahead "${AHEAD:-}"
option --promotions "${PROMOTIONS:-}"
exec "$PYTHON" -m harness.rag.run_speculative_decode "${options[@]}" "$@"
