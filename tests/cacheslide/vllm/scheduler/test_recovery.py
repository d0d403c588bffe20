"""Failed loads: the requests that lose rows start over, and no request beside them loses what it sampled."""

from types import SimpleNamespace

import pytest

pytest.importorskip("vllm")
from vllm.v1.request import RequestStatus

from cacheslide.vllm.scheduler.recovery import start_over
from tests.helpers.scheduling import request, side

pytestmark = [pytest.mark.vllm, pytest.mark.slow]


class Queue(SimpleNamespace):
    """The parts of vLLM's scheduler that the recovery uses, with blocks by request."""

    def __init__(self, **blocks: list[int]) -> None:
        manager = SimpleNamespace(get_block_ids=lambda r: (blocks[r],), evict_blocks=lambda b: self.evicted.update(b))
        super().__init__(running=[], evicted=set(), kv_cache_manager=manager, prev_step_scheduled_req_ids=set(blocks))

    def _preempt_request(self, one, timestamp: float, drop_stale_output: bool) -> None:
        one.status, one.drop_stale_output = RequestStatus.PREEMPTED, drop_stale_output


def asked(req_id: str, status=RequestStatus.RUNNING):
    one = request(req_id)
    one.status, one.drop_stale_output = status, False
    one.is_finished = lambda: one.status > RequestStatus.PREEMPTED
    return one


def lose(blocks: dict[str, list[int]], claims: dict[str, list[int]], invalid: set[int], scheduled: set[str], **status):
    """What `start_over` does to requests with these blocks and claims; those with a `status` do not run."""
    queue, half = Queue(**blocks), side()
    ones = {name: asked(name, status.get(name, RequestStatus.RUNNING)) for name in {*blocks, *claims}}
    queue.running = [one for one in ones.values() if one.status == RequestStatus.RUNNING]
    half.claims.blocks = {name: (ones[name], held) for name, held in claims.items()}
    return start_over(queue, half, invalid, scheduled), ones, queue, half


def test_a_request_with_invalid_blocks_starts_over_and_claims_nothing():
    lost, ones, queue, half = lose({"a": [1, 2, 3], "b": [4]}, {"a": [2]}, {2}, {"a", "b"})
    assert lost == {"a"} and ones["a"].status == RequestStatus.PREEMPTED and queue.running == [ones["b"]]
    assert queue.evicted == {2, 3} and not half.claims.blocks
    assert half.tracked["a"].reason == "fault at start_load_kv" and "b" not in half.tracked


def test_a_running_request_keeps_its_tokens_whoever_got_the_blocks_of_its_earlier_load():
    """Its load was in blocks 1 and 2, before it was preempted; now another request's load into them fails."""
    lost, ones, queue, half = lose({"a": [7, 8], "b": [1, 2]}, {"a": [1, 2], "b": [1, 2]}, {1, 2}, {"a", "b"})
    assert lost == {"b"} and queue.running == [ones["a"]]
    assert not ones["a"].drop_stale_output and "a" not in half.tracked


@pytest.mark.parametrize(("scheduled", "expected"), [({"a", "b"}, {"a", "b"}), ({"b"}, {"b"})])
def test_tokens_of_a_request_preempted_in_the_step_itself_are_void(scheduled, expected):
    preempted = {"a": RequestStatus.PREEMPTED}
    lost, ones, queue, half = lose({"b": [2]}, {"a": [1, 2]}, {1, 2}, scheduled, **preempted)
    assert lost == expected and ones["a"].drop_stale_output == ("a" in scheduled)
    assert {1, 2} <= queue.evicted and ("a" in half.claims.blocks) == ("a" not in scheduled)


def test_a_finished_request_is_left_alone():
    lost, *_ = lose({}, {"a": [1]}, {1}, {"a"}, a=RequestStatus.FINISHED_STOPPED)
    assert lost == set()
