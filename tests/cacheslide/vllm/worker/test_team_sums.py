"""A sum over two ranks is done on both or raises on both, whichever rank fails and wherever."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm")

from cacheslide.vllm.worker.ranks import PeerFault, Team

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

CASES = ("none", "before the sum", "behind the sum", "no sum at all")


class Group(SimpleNamespace):
    """The part of vLLM's GroupCoordinator that a team uses, over gloo."""

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        out = x.clone()
        torch.distributed.all_reduce(out, group=self.cpu_group)
        return out


def outcome(team: Team, rank: int, case: str) -> str | list[float]:
    """What rank `rank` gets of a sum of its number in which rank 0 fails as `case` says."""

    def reduce(x: torch.Tensor) -> torch.Tensor:
        if rank == 0 and case == "before the sum":
            raise RuntimeError(case)
        out = team.group.all_reduce(x)
        if rank == 0 and case == "behind the sum":
            raise RuntimeError(case)
        return out

    summed = team.summing(reduce)
    try:
        with team.unit():
            if rank == 0 and case == "no sum at all":
                raise RuntimeError(case)
            return summed(torch.full((2,), float(rank + 1))).tolist()
    except PeerFault:
        return "peer"
    except RuntimeError as error:
        return str(error)


def sums(rank: int, path: str, out) -> None:
    """In a process of its own: every case, each followed by a sum that must be right."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    team = Team(Group(world_size=2, cpu_group=torch.distributed.group.WORLD))
    out.put((rank, [(outcome(team, rank, case), outcome(team, rank, "none")) for case in CASES]))
    torch.distributed.destroy_process_group()


def test_a_rank_that_fails_at_a_sum_leaves_no_other_waiting(tmp_path):
    context = torch.multiprocessing.get_context("spawn")
    out = context.Queue()
    ranks = [context.Process(target=sums, args=(i, str(tmp_path / "met"), out), daemon=True) for i in range(2)]
    for rank in ranks:
        rank.start()
    try:
        found = dict(out.get(timeout=300) for _ in ranks)
    finally:
        for rank in ranks:
            rank.join(5)
            rank.kill()
    right = [3.0, 3.0]
    assert found[0] == [(right, right), *((case, right) for case in CASES[1:])]
    assert found[1] == [(right, right), *[("peer", right)] * 3]


def test_alone_a_sum_is_the_rule_itself():
    assert Team().summing(lambda x: x + 1)(torch.zeros(1)).tolist() == [1.0]
