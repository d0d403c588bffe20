"""The scheduler's half of the connector without an engine: requests, blocks, steps."""

from types import SimpleNamespace

import pytest

pytest.importorskip("vllm")
from vllm.v1.request import RequestStatus

from cacheslide.vllm.geometry import Geometry
from cacheslide.vllm.options import ServerOptions, annotations_of
from cacheslide.vllm.scheduler.side import SchedulerSide
from tests.helpers.prompts import prompt

GEOMETRY = Geometry("model", "torch.float32", 5, 2, 32, 64, 4, 1024)
TURN = prompt(20, 3)  # system 6 | updated 20 | fixed 23, 31, 17 | question 5
FIXED_END = len(TURN) - 5


def side(**options) -> SchedulerSide:
    """A scheduler's half; without `policy` under the paper's own rule: canonical chunks and a selection layer."""
    config = SimpleNamespace(
        cache_config=SimpleNamespace(block_size=16), kv_transfer_config=SimpleNamespace(engine_id="test")
    )
    return SchedulerSide(config, ServerOptions(**{"policy": "cacheslide", "chunk_size": 16, **options}), GEOMETRY)


def request(req_id: str = "r", turn=TURN, **annotations):
    return SimpleNamespace(
        request_id=req_id,
        num_prompt_tokens=len(turn),
        prompt_token_ids=list(turn.token_ids),
        kv_transfer_params=annotations_of(turn, **annotations),
        cache_salt=None,
        sampling_params=SimpleNamespace(prompt_logprobs=None, max_tokens=8, detokenize=True),
        _block_hasher=None,
        block_hashes=[],
        num_computed_tokens=0,
        status=RequestStatus.RUNNING,
    )


def know(scheduler: SchedulerSide, req_id: str = "r") -> None:
    """Pretend that every chunk of a tracked request is stored."""
    keys = scheduler.tracked[req_id].plan.keys
    scheduler.index.reserve(dict.fromkeys(keys, 1))


def step_output(scheduled: dict[str, int], computed: dict[str, int], blocks=None):
    return SimpleNamespace(
        num_scheduled_tokens=scheduled,
        scheduled_new_reqs=[SimpleNamespace(req_id=r, num_computed_tokens=n) for r, n in computed.items()],
        scheduled_cached_reqs=SimpleNamespace(req_ids=[], num_computed_tokens=[]),
        kv_connector_block_state=SimpleNamespace(block_ids={r: ([1, 2, 3],) for r in scheduled}),
    )


def finished(asked, generated: int):
    """The request as vLLM hands it over at its end."""
    asked.all_token_ids = [*asked.prompt_token_ids, *range(3, 3 + generated)]
    asked.num_computed_tokens = len(asked.all_token_ids) - 1
    return asked
