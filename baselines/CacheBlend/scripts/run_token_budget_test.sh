#!/usr/bin/env bash
# Quality and cost by token budget: RESULTS/analysis/token_budget.json. docs/rag.md lists the variables.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
samples_of_retrieval
model_and_system
option --budgets "${BUDGETS:-}"
option --budgets-mib "${BUDGETS_MIB:-}"
option --max-new-tokens "${MAX_NEW_TOKENS:-}"
exec "$PYTHON" -m harness.rag.run_token_budget_test "${options[@]}" "$@"
