"""Two ranks whose chunks remember different things recompute the same tokens: what differs, neither of them reads."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm")

from cacheslide.policies.none import NoCorrection
from cacheslide.policies.remembered import RememberedDeviation
from cacheslide.vllm.worker.loading import Loading
from cacheslide.vllm.worker.ranks import Team
from tests.helpers.chunks import chunk

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

SAME, OTHER = torch.arange(40.0), torch.arange(40.0).flip(0)
# of each rank, the scores of its chunks: equal, of another prompt, of one rank alone, of none, not there on one
HELD = ((SAME, SAME, SAME, None, SAME), (SAME.clone(), OTHER, None, None, "gone"))


def lent(rank: int, path: str, out) -> None:
    """In a process of its own: the scores that a load on this rank reads under each rule, None where it reads none."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    team = Team(SimpleNamespace(world_size=2, cpu_group=torch.distributed.group.WORLD))
    chunks = {i: replace(chunk(i), scores=s) for i, s in enumerate(HELD[rank]) if not isinstance(s, str)}
    store = SimpleNamespace(lend=lambda key, streams: chunks.get(key))
    worker = SimpleNamespace(model=None, stream=None, unsure=set(), team=team, store=store, joined=False)
    reuse = [(i, SimpleNamespace(start=40 * i, end=40 * i + 40)) for i in range(len(HELD[rank]))]
    found = []
    for correction in (RememberedDeviation(), NoCorrection()):
        load = SimpleNamespace(req_id="a", reuse=reuse, start=0, limit=1000, correction=correction)
        held = Loading(worker, [load])._lend()
        found.append({number: None if c.scores is None else c.scores.tolist() for (_, number), c in held.items()})
    out.put((rank, found))
    torch.distributed.destroy_process_group()


def test_scores_that_differ_between_ranks_are_read_on_neither(tmp_path):
    context = torch.multiprocessing.get_context("spawn")
    out = context.Queue()
    ranks = [context.Process(target=lent, args=(i, str(tmp_path / "met"), out)) for i in range(2)]
    for rank in ranks:
        rank.start()
    found = dict(out.get(timeout=300) for _ in ranks)
    for rank in ranks:
        rank.join(60)
    (remembering, plain), (remembering_too, plain_too) = found[0], found[1]
    assert remembering == remembering_too and remembering.keys() == plain.keys() == plain_too.keys() == {0, 1, 2, 3}
    assert {number for number, scores in remembering.items() if scores is not None} == {0}
    assert plain != plain_too  # a rule that reads no scores does not meet for them
