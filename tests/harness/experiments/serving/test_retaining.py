"""The measurement of a retaining turn, on a tiny model in vLLM's CPU build, and its table."""

import json

import pytest

pytest.importorskip("vllm")

from cacheslide.errors import CacheSlideError
from harness.experiments.serving import retaining
from harness.experiments.serving.retaining import ENCODES, SCORED, UNSCORED, arm, main, table
from harness.results.undisturbed import FEW
from tests.helpers.checkpoints import save_random
from tests.helpers.readings import BUSY, CALM
from tests.helpers.served import SHAPE

pytestmark = pytest.mark.slow

ENGINE = {"dtype": "float32", "enforce_eager": True, "block_size": 32, "kv_cache_memory_bytes": 2**26}
TOKENS = 240


@pytest.fixture(scope="module")
def made(vllm_environment, tmp_path_factory):
    folder = tmp_path_factory.mktemp("retaining")
    model, out = save_random(folder / "model", **SHAPE | {"max_position_embeddings": 512}), folder / "out.json"
    given = ["--out", str(out), "--model", str(model), "--tokens", str(TOKENS), "--repeats", "2", "--warmups", "1"]
    main([*given, "--vocabulary", "97", "--engine", json.dumps(ENGINE), "--commit", "abc"])
    return json.loads(out.read_text())


@pytest.mark.vllm
@pytest.mark.slow
def test_every_turn_is_measured_and_scoring_prefills_the_fixed_text(made):
    assert made["complete"] and made["provenance"]["git_commit"] == "abc" and len(made["quiet"]) == 2
    fixed = 8 * int(TOKENS * 0.9 / 8)
    for encode in ENCODES:
        for system, rows in ((SCORED, fixed), (UNSCORED, 0)):
            runs = made["runs"][arm(system, encode)]
            assert [run["scored_rows"] for run in runs] == [rows] * 2
            assert all(0 < run["ttft_ms"] <= run["idle_ms"] for run in runs)
        row = made["table"][encode]
        assert row["scored_rows_of_prompt"] == fixed / TOKENS


@pytest.mark.vllm
@pytest.mark.slow
def test_a_turn_without_the_scores_that_it_is_about_stops_the_measurement(made, monkeypatch, tmp_path):
    """The control: a system that scores nothing in the place of one that does."""
    from cacheslide.vllm.offline import close_engine, open_engine

    model = save_random(tmp_path / "model", **SHAPE | {"max_position_embeddings": 512})
    options = {"skip_tokenizer_init": True, "max_model_len": 304, "max_num_batched_tokens": 512} | ENGINE
    engine = open_engine(str(model), {"store_gib": 1, "chunk_size": TOKENS, "store_device": "model"}, **options)
    try:
        turns = retaining.Turns(engine, TOKENS, 97)
        assert turns.run(SCORED, "now")["scored_rows"] > 0
        monkeypatch.setattr(retaining, "SCORED", "naive_reuse")
        with pytest.raises(CacheSlideError, match="naive_reuse: 0 of 8 chunks with scores"):
            turns.run("naive_reuse", "now")
    finally:
        close_engine(engine)


def runs_of(scored, plain):
    both = {SCORED: scored, UNSCORED: plain}
    return {
        arm(s, e): [{"ttft_ms": x, "idle_ms": 2 * x, "scored_rows": 90 * (s == SCORED)} for x in both[s]]
        for s in both
        for e in ENCODES
    }


def test_ratios_are_of_undisturbed_rounds():
    runs = runs_of([103.0, 900.0, 103.0, 103.0], [100.0, 50.0, 100.0, 100.0])
    row = table(runs, [CALM, BUSY, CALM, CALM], 100)["later"]
    assert row["ttft_ms"]["ratio"]["value"] == row["idle_ms"]["ratio"]["value"] == pytest.approx(1.03)
    assert (
        row["ttft_ms"]["ratio"]["low"] <= 1.03 <= row["ttft_ms"]["ratio"]["high"] and row["ttft_ms"]["ratio"]["n"] == 3
    )
    assert row["ttft_ms"][SCORED]["value"] == 103 and row["scored_rows_of_prompt"] == 0.9 and not row["disturbed"]
    busy = table(runs, [BUSY, BUSY, CALM, BUSY], 100)["now"]
    assert busy["ttft_ms"]["ratio"] is None and busy["disturbed"].startswith(FEW)
