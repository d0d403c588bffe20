#!/usr/bin/env bash
# Encode the first K passages of every sample and save them: RESULTS/kv_caches/<dataset>_kv_top<K>.json and a folder a
# chunk. SAVE_CACHE_DIR= saves none. docs/rag.md lists the variables.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
samples_of_retrieval
model_and_system
option --k "$K"
option --save-cache-dir "${SAVE_CACHE_DIR-$RESULTS/kv_caches}"
flag --encode-rest "${ENCODE_REST:-0}"
exec "$PYTHON" -m harness.rag.build_kv_cache "${options[@]}" "$@"
