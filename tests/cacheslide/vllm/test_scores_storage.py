"""Scores through a restart: a chunk is written to the storage tier when it has got its scores."""

from contextlib import closing

import pytest

pytest.importorskip("vllm")

from cacheslide.policies import registry
from tests.helpers.checkpoints import save_random
from tests.helpers.remembering import policy_of
from tests.helpers.served import FIRST, SECOND, SHAPE, Served, receipt
from tests.helpers.settling import settle

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.usefixtures("vllm_environment")]


def test_scores_outlive_the_engine(tmp_path, monkeypatch):
    monkeypatch.setattr(registry, "_own", registry._own | {"remembering": policy_of})
    path = save_random(tmp_path / "model", **SHAPE)
    tiers = {"path": str(tmp_path / "chunks"), "file_gib": 0.1, "shards": 2, "direct": False}
    with closing(Served(path, store=tiers)) as served:
        served.one(FIRST, policy="remembering")
        settle(served)
        before = {key: served.worker.store.get(key).scores for key in list(served.worker.store._chunks)}
    assert len(before) > 10 and all(scores is not None for scores in before.values())
    with closing(Served(path, store=tiers)) as served:
        said = receipt(served.one(SECOND, policy="remembering"))
        assert said["tiers"]["file"]["chunks"] == said["chunks_hit"] == len(before)
        assert said["tiers"]["file"]["bytes"] == said["bytes_loaded"]
        assert said["tokens_recomputed"] > 30
        settle(served)
        for key, scores in before.items():
            assert served.worker.store.get(key).scores.equal(scores)
        assert served.scheduler.index.scored == set(before)
