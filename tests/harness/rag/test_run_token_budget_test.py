"""Answers under budgets: more tokens, more passages; and what cannot be asked for."""

import pytest

from cacheslide.errors import ConfigError
from harness.rag.run_token_budget_test import answer_under_budgets, budget_path, main
from tests.helpers.rag import SETTINGS, manager, retrieved

pytestmark = pytest.mark.slow


def test_larger_budgets_hold_more_and_all_of_it_is_reused(tmp_path):
    out = budget_path(tmp_path / "results")
    made = answer_under_budgets(manager(), retrieved(tmp_path), [1, 150, 4000], 3, out, SETTINGS)
    assert out == tmp_path / "results/analysis/token_budget.json" and out.is_file()
    passages = [row["passages"] for row in made["summary"]]
    assert passages[0] == 0 < passages[1] < passages[2] == 6
    assert [row["needed"] for row in made["summary"]][::2] == [0.0, 1.0]
    for record in made["samples"]:
        for row in record["budgets"]:
            assert row["chunks_hit"] == row["passages"] + 1
            assert row["tokens"] <= row["budget"] or not row["passages"]
            assert row["kv_bytes"] == row["tokens"] * made["bytes_per_token"]


def test_the_command_takes_bytes_as_well_and_refuses_nonsense(tmp_path, capsys):
    made = retrieved(tmp_path)
    options = ["--retrieval-json", str(made.path), "--results", str(tmp_path / "r"), "--samples", "1"]
    main([*options, "--budgets-mib", "3,1", "--max-new-tokens", "2"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "1 samples; 24576 bytes of KV a token"
    assert lines[1].startswith("budget 42: ") and lines[2].startswith("budget 128: ")
    for wrong in ("0", "5,5"):
        with pytest.raises(ConfigError, match=r"^budgets must be different counts"):
            main([*options, "--budgets", wrong])
