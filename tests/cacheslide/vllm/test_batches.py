"""Requests that arrive together in a running vLLM (CPU): in order, and with the answers of one packed run."""

from contextlib import closing

import pytest
import torch

pytest.importorskip("vllm")

from vllm import SamplingParams

from cacheslide.vllm.options import annotations_of
from tests.helpers.checkpoints import save_random
from tests.helpers.idle_streams import idle_streams
from tests.helpers.prompts import prompt
from tests.helpers.served import FIRST, FIXED, SHAPE, Served, logprobs, receipt, tokens

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.usefixtures("vllm_environment")]

RATIO = 0.3
TURNS = {f"turn {n}": prompt(n, n, fixed=FIXED) for n in (53, 41, 29, 17)}  # longer ones first
PLAIN = prompt(33, 77, fixed=(20,))


@pytest.fixture(scope="module", params=["in turn", "async"])
def served(tmp_path_factory, request):
    path = save_random(tmp_path_factory.mktemp("batches"), **SHAPE)
    room = {"max_num_batched_tokens": 512}  # tails of all, and a plain prompt, fit into one step
    if request.param == "async":
        with idle_streams(), closing(Served(path, engine=room)) as engine:
            assert engine.core.batch_queue is not None
            yield engine
    else:
        with closing(Served(path, engine=room)) as engine:
            yield engine


class Batch:
    """Requests that arrive together; which step brought each its first token."""

    def __init__(self, served, computed_tokens: int) -> None:
        self.served, self.engine, self.first, self.done, self.steps = served, served.llm.llm_engine, {}, {}, 0
        served.scheduler.packing.computed_limit = computed_tokens
        served.poison()
        served.plans.clear()

    def add(self, name: str, p, annotated: bool = True) -> None:
        params = SamplingParams(
            max_tokens=6, temperature=0, logprobs=97, detokenize=False, ignore_eos=True,
            extra_args={"kv_transfer_params": annotations_of(p, recompute_ratio=RATIO)} if annotated else None,
        )  # fmt: skip
        self.engine.add_request(name, {"prompt_token_ids": list(p.token_ids)}, params)

    def step(self) -> None:
        self.steps += 1
        for output in self.engine.step():
            self.first.setdefault(output.request_id, self.steps)
            if output.finished:
                self.done[output.request_id] = output

    def run(self):
        """To the end, in which nothing of the requests is left."""
        while self.engine.has_unfinished_requests():
            self.step()
            assert self.steps < 200
        assert not self.served.scheduler.tracked and not self.served.scheduler.prefilling
        return self

    @property
    def loaded(self) -> list[int]:
        """Prompt lengths in the order of their loads: they differ, and names do not travel."""
        return [load.rows for load in self.served.plans]


def all_turns(served, computed_tokens: int, **others) -> Batch:
    batch = Batch(served, computed_tokens)
    for name, p in TURNS.items():
        batch.add(name, p)
    for name, p in others.items():
        batch.add(name, p, annotated=False)
    return batch


def test_requests_begin_in_order_and_say_what_one_packed_run_says(served):
    served.fresh()
    served.one(FIRST)
    packed = all_turns(served, 10**6).run()
    assert len(set(packed.first.values())) == 1 and len(packed.loaded) == 4
    single = all_turns(served, 1).run()
    assert single.loaded == [len(p) for p in TURNS.values()]
    steps = [single.first[name] for name in TURNS]
    assert steps == sorted(set(steps)), "each a step of its own, in order of arrival"
    assert steps[0] <= packed.first["turn 53"]
    for name in TURNS:
        alone, beside = single.done[name], packed.done[name]
        assert tokens(alone) == tokens(beside)
        for at in range(6):
            torch.testing.assert_close(logprobs(alone, at), logprobs(beside, at), atol=1e-4, rtol=1e-4)
        assert receipt(single.done[name])["tokens_reused"] > 0 and receipt(single.done[name])["measured"]


def test_plain_requests_behind_them_keep_their_place(served):
    served.fresh()
    served.one(FIRST)
    want = served.plain(PLAIN, 6)
    batch = all_turns(served, 1, plain=PLAIN).run()
    assert batch.first["plain"] >= batch.first["turn 17"] > batch.first["turn 53"]
    assert tokens(batch.done["plain"]) == tokens(want)


def test_what_is_aborted_or_preempted_in_line_holds_up_nobody(served):
    served.fresh()
    served.one(FIRST)
    want = all_turns(served, 10**6).run()
    batch = all_turns(served, 1)
    batch.step()
    batch.engine.abort_request(["turn 41"])
    if served.core.batch_queue is None:  # vLLM refuses it between the steps of asynchronous scheduling
        batch.step()
        assert served.core.scheduler.reset_prefix_cache(reset_running_requests=True)
    batch.run()
    rest = [name for name in TURNS if name != "turn 41"]
    assert set(batch.done) == set(rest)
    for name in rest:
        assert tokens(batch.done[name]) == tokens(want.done[name]) and receipt(batch.done[name])["tokens_reused"] > 0
