"""All three steps in one go."""

import json

import pytest

from harness.rag.run_pipeline import main
from tests.helpers.made_passages import write_musique

pytestmark = pytest.mark.slow


def test_every_step_reads_what_the_one_before_wrote(tmp_path, capsys):
    data, results = write_musique(tmp_path / "made.jsonl", 2), tmp_path / "results"
    options = ["--data", str(data), "--results", str(results), "--k", "2", "--max-new-tokens", "5", "--stride", "2"]
    main([*options, "--ahead", "1"])
    printed = capsys.readouterr()
    made = [results / name for name in ("retrieval/made_rag_both_k2.json", "kv_caches/made_kv_top2.json",
                                        "decoding/speculative_trace.json")]  # fmt: skip
    assert printed.out.splitlines()[1::2] == [str(path) for path in made]
    trace = json.loads(made[2].read_text())
    assert trace["summary"]["loaded"] == 12 and trace["summary"]["unusable"] == 0
    assert {p.name for p in (results / "kv_caches/id-0_0").iterdir()} >= {"metadata.json", "valid_mask.safetensors"}
