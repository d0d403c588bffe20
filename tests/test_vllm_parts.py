"""The connector's parts without an engine: options and marks, index, block hashes, refusals, the scheduler's plans."""

import argparse
import json
from types import SimpleNamespace
from typing import ClassVar

import prometheus_client
import pytest
import torch

pytest.importorskip("vllm")

from vllm.v1.request import RequestStatus

from cacheslide.errors import ConfigError, ModelError, PolicyError, PromptError, StoreError
from cacheslide.model.adapter import RowGroup
from cacheslide.policy import check_policy, load_policy
from cacheslide.positions.rope import inverse_frequencies
from cacheslide.prompt import Prompt
from cacheslide.store.base import ChunkKV
from cacheslide.vllm import serve
from cacheslide.vllm.attention import RowKernel, choose, gathered
from cacheslide.vllm.connector import CacheSlideConnector
from cacheslide.vllm.cope_setting import overrides
from cacheslide.vllm.geometry import Geometry, weights_id
from cacheslide.vllm.index import ChunkIndex
from cacheslide.vllm.kv_layout import PagedKV, PagedLayer
from cacheslide.vllm.metrics import ReuseStats
from cacheslide.vllm.model_adapter import rotary_of
from cacheslide.vllm.params import Marks, ServerOptions, marks_of, policy_of
from cacheslide.vllm.plans import WorkerReport
from cacheslide.vllm.prefix_cache import key_apart
from cacheslide.vllm.receipts import forecast
from cacheslide.vllm.scheduler_side import SchedulerSide
from cacheslide.vllm.store import WorkerStore
from cacheslide.vllm.support import check
from tests.conftest import save_random_adapter
from tests.late_copies import LateCopies
from tests.test_prefill import prompt

GEOMETRY = Geometry("model", "torch.float32", 5, 2, 32, 64, 4, 1024)
TURN = prompt(20, 3)  # system 6 | updated 20 | fixed 23, 31, 17 | question 5
FIXED_END = len(TURN) - 5


# --- the store -------------------------------------------------------------------------------------------------------


def chunk_of(seed: int, rows: int = 5) -> ChunkKV:
    g = torch.Generator().manual_seed(seed)
    k, v = torch.randn(2, 3, rows, 2, 4, generator=g)
    return ChunkKV(k, v, torch.arange(rows), {1: torch.randn(rows, 7, generator=g)}, generation=2)


def test_a_chunk_is_read_only_once_its_copy_is_done():
    late, wanted = LateCopies(), chunk_of(0)
    store = WorkerStore(torch.device("cpu"), late)
    store.put("a", wanted)
    store.put("a", chunk_of(1))  # a key names its content: nothing is copied again
    assert len(late.sent) == 1 and store.contains("a")
    waits = []
    streams = [SimpleNamespace(wait_event=waits.append) for _ in range(2)]
    lent = store.lend("a", streams)
    assert waits == 2 * late.sent and lent.k.isnan().all()  # the streams wait, the host does not
    got = store.get("a")
    for name in ("k", "v", "positions"):
        assert torch.equal(getattr(got, name), getattr(wanted, name))
    assert torch.equal(got.layer_inputs[1], wanted.layer_inputs[1]) and got.generation == 2
    assert store.lend("a", streams) is got and len(waits) == 2  # over: nobody waits any more


def test_chunks_on_their_way_can_be_dropped_and_handed_over():
    store, to = WorkerStore(torch.device("cpu"), LateCopies()), WorkerStore(torch.device("cpu"))
    for i, key in enumerate("abc"):
        store.put(key, chunk_of(i))
    store.drop("b")
    assert store.get("b") is None and len(store) == 2
    store.hand_over(to)
    assert not len(store) and not store.nbytes
    assert all(torch.equal(to.get(key).v, chunk_of(i).v) for key, i in (("a", 0), ("c", 2)))


# --- options and marks -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"chunksize": 16}, "unknown connector option chunksize"),
        ({"chunk_size": 0}, "chunk_size must be"),
        ({"rows_per_step": True}, "rows_per_step must be"),
        ({"store_gib": -1}, "store_gib"),
        ({"store_device": "disk"}, "store_device"),
        ({"encode": "never"}, "encode must be one of"),
    ],
)
def test_wrong_options_stop_the_server(options, reason):
    with pytest.raises(ConfigError, match=reason):
        ServerOptions.from_extra_config(options)


def test_marks_round_trip():
    marks = Marks.parse(marks_of(TURN, policy="epic", share=0.5, namespace="a"))
    assert marks.prompt(TURN.token_ids).chunks(16) == TURN.chunks(16)
    assert marks.system("cacheslide") == load_policy("epic").at_share(0.5)
    assert marks.namespace == "a" and Marks.parse(None) is None and Marks.parse({"other": 1}) is None


@pytest.mark.parametrize(
    ("marks", "reason"),
    [
        ({"segments": [[0, 5.0]]}, "pair of integers"),
        ({"segments": [[0, True]]}, "pair of integers"),
        ({"segments": [[0]]}, "pair of integers"),
        ({"segments": {"0": 5}}, "list of"),
        ({"segments": [], "share": "0.1"}, "share must be a number"),
        ({"segments": [], "layer": 1.5}, "layer must be an integer"),
        ({"segments": [], "policy": 3}, "policy must be a string"),
        ({"segments": [], "namespace": None}, "namespace must be a string"),
        ({"segments": [], "encode": "soon"}, "encode must be one of"),
        ({"segments": [], "family": "search"}, "family must be an object"),
        ({"segments": [], "family": {"name": "a", "rows": 0}}, "family must be an object"),
        ({"segments": [], "family": {"name": "a", "rows": 4}, "history": 2}, "give no history"),
    ],
)
def test_malformed_marks_say_what_is_wrong(marks, reason):
    with pytest.raises(PromptError, match=reason):
        Marks.parse({"cacheslide": marks})
    with pytest.raises(PromptError, match="kv_transfer_params must be an object"):
        Marks.parse([marks])


# --- index and block hashes ------------------------------------------------------------------------------------------


def test_the_index_evicts_the_least_recently_used_and_never_what_it_was_asked_for():
    index = ChunkIndex(100)
    assert index.reserve({"a": 40, "b": 40}) == []
    index.touch(["a"])
    assert index.reserve({"c": 30}) == ["b"] and index.nbytes == 70
    assert index.reserve({"a": 40, "d": 60}) == ["c"] and index.nbytes == 100
    with pytest.raises(StoreError, match="cannot fit"):
        index.reserve({"e": 60, "f": 60})
    assert "a" in index and "e" not in index
    index.discard("a")
    assert index.nbytes == 60 and len(index) == 1


class HashedRequest:
    """As much of a vLLM request as block hashing needs: a chain over blocks of two tokens."""

    def __init__(self, tokens: list[int]) -> None:
        self.tokens, self.block_hashes = list(tokens), []
        self._block_hasher = self.chain
        self.update_block_hashes()

    @staticmethod
    def chain(request) -> list[bytes]:
        out, parent = [], request.block_hashes[-1] if request.block_hashes else b"root"
        for i in range(len(request.block_hashes), len(request.tokens) // 2):
            parent = repr((parent, request.tokens[2 * i : 2 * i + 2])).encode()
            out.append(parent)
        return out

    def update_block_hashes(self) -> None:
        self.block_hashes.extend(self._block_hasher(self))

    def grow(self, *tokens: int) -> None:
        self.tokens += tokens
        self.update_block_hashes()


def test_blocks_are_keyed_apart_from_the_first_approximate_one_on():
    plain, apart, other = (HashedRequest(range(9)) for _ in range(3))
    key_apart(apart, 2)
    key_apart(other, 2)
    for request in (plain, apart, other):
        request.grow(9, 10, 11)
    assert len(plain.block_hashes) == len(apart.block_hashes) == 6
    assert apart.block_hashes[:2] == plain.block_hashes[:2]
    everything = plain.block_hashes[2:] + apart.block_hashes[2:] + other.block_hashes[2:]
    assert len(set(everything)) == len(everything)


def test_keying_apart_again_keeps_own_blocks_and_only_moves_down():
    request = HashedRequest(range(12))
    key_apart(request, 3)
    before = list(request.block_hashes)
    key_apart(request, 4)
    assert request.block_hashes == before
    key_apart(request, 1, b"shared")
    plain = HashedRequest(range(12)).block_hashes
    assert request.block_hashes[0] == plain[0] and not set(request.block_hashes[1:]) & set(plain + before)
    later = HashedRequest(range(15))  # longer, and keyed apart at once: the blocks of both are the same
    key_apart(later, 1, b"shared")
    assert later.block_hashes[:6] == request.block_hashes and len(later.block_hashes) == 7


# --- paged rows in the open layout of GPU backends ---------------------------------------------------------------


class OpenAttention:
    """An attention layer whose cache keeps key and value of a slot beside each other, as GPU backends do."""

    def __init__(self, blocks: int, heads: int, size: int, dim: int) -> None:
        # physically [block, slot, head, key and value], seen as [block, head, slot, key and value]
        self.kv_cache = torch.full((blocks, size, heads, 2 * dim), float("nan")).transpose(1, 2)
        self.attn_backend = SimpleNamespace(get_name=lambda: "FLASH_ATTN")
        self.impl = self

    def do_kv_cache_update(self, layer, k, v, cache, slots) -> None:
        assert layer is self and len(slots)
        cache[slots // cache.shape[2], :, slots % cache.shape[2]] = torch.cat((k, v), dim=-1)


@pytest.mark.parametrize("manager_block", [4, 8])
def test_rows_of_two_requests_in_the_open_layout(manager_block):
    layer = PagedLayer(OpenAttention(blocks=24, heads=2, size=4, dim=6))
    attend = choose([layer])
    assert isinstance(attend, RowKernel)
    pieces = manager_block // 4
    first, second = (PagedKV([layer], ids, manager_block) for ids in ([3, 0], [2, 1]))
    assert first.blocks.tolist() == [b * pieces + i for b in (3, 0) for i in range(pieces)]
    length, g = 2 * manager_block - 1, torch.Generator().manual_seed(3)
    kept = []
    for kv in (first, second):
        k, v = (torch.randn(length, 2, 6, generator=g) for _ in range(2))
        order = torch.randperm(length, generator=g)
        kv.write(0, order, k[order], v[order])
        kv.write(0, order[:0], k[:0], v[:0])
        kept.append((k, v))
    for kv, (k, v) in zip((first, second), kept, strict=True):
        rows = torch.tensor([length - 1, 0, 4])
        assert all(torch.equal(x, y[rows]) for x, y in zip(kv.read(0, rows), (k, v), strict=True))
    for mine, theirs in (([0, 2, 6], [1, 5]), ([1, 3, 5], [0, 6]), ([4], [0, 1, 2, 3]), ([], [2])):
        groups = [RowGroup(kv, torch.tensor(r, dtype=torch.int64)) for kv, r in ((first, mine), (second, theirs))]
        q = torch.randn(len(mine) + len(theirs), 4, 6, generator=g)
        want = gathered(0, q, groups, 6**-0.5)
        torch.testing.assert_close(attend(0, q, groups, 6**-0.5), want, atol=1e-6, rtol=1e-6)


# --- refusals --------------------------------------------------------------------------------------------------------


def engine_config(**changes):
    """A configuration that is served, with some of its parts changed by dotted name."""
    config = SimpleNamespace(
        model_config=SimpleNamespace(
            architectures=["LlamaForCausalLM"],
            hf_text_config=SimpleNamespace(rope_parameters={"rope_type": "default", "rope_theta": 1e4}),
            uses_mrope=False,
            runner_type="generate",
        ),
        parallel_config=SimpleNamespace(pipeline_parallel_size=1, decode_context_parallel_size=1),
        cache_config=SimpleNamespace(cache_dtype="auto"),
        kv_transfer_config=SimpleNamespace(kv_role="kv_both"),
        lora_config=None,
        speculative_config=None,
    )
    for name, value in changes.items():
        *way, last = name.split("__")
        part = config
        for step in way:
            part = getattr(part, step)
        setattr(part, last, value)
    return config


def cache_config(kind: str = "FullAttentionSpec", groups: int = 1, window=None):
    spec = type(kind, (), {"sliding_window": window, "attention_chunk_size": None})()
    return SimpleNamespace(kv_cache_groups=[SimpleNamespace(kv_cache_spec=spec)] * groups)


def test_a_plain_configuration_is_served():
    check(engine_config(), cache_config())


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model_config__architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel"),
        ({"parallel_config__pipeline_parallel_size": 2}, "pipeline parallelism"),
        ({"parallel_config__decode_context_parallel_size": 2}, "decode context"),
        ({"cache_config__cache_dtype": "fp8"}, "cache type fp8"),
        ({"lora_config": object()}, "LoRA"),
        ({"speculative_config": object()}, "speculative decoding"),
        ({"model_config__uses_mrope": True}, "M-RoPE"),
        ({"model_config__runner_type": "pooling"}, "pooling"),
        ({"kv_transfer_config__kv_role": "kv_producer"}, "kv_role"),
        ({"model_config__hf_text_config__rope_parameters": {"rope_type": "yarn"}}, "yarn"),
        ({"model_config__hf_text_config__rope_parameters": {"partial_rotary_factor": 0.5}}, "partial rotary"),
        ({"model_config__hf_text_config__is_causal": False}, "bidirectional"),
        ({"model_config__hf_text_config__llama_4_scaling": {"beta": 1}}, "llama_4_scaling"),
    ],
)
def test_what_cannot_be_served_is_refused_by_name(changes, reason):
    with pytest.raises((ModelError, ConfigError), match=reason):
        check(engine_config(**changes), cache_config())


@pytest.mark.parametrize("cache", [cache_config("SlidingWindowSpec"), cache_config(groups=2), cache_config(window=64)])
def test_caches_of_other_attention_are_refused(cache):
    with pytest.raises(ModelError, match=r"full-attention|sliding-window"):
        check(engine_config(), cache)


def test_systems_that_a_model_cannot_run():
    with pytest.raises(PolicyError, match="layer 5, but the model has layers 0 to 4"):
        check_policy(policy_of("cacheslide", None, 5), 5)
    check_policy(policy_of("cacheslide", None, 4), 5)


def test_chunks_are_named_by_the_files_the_weights_came_from(tmp_path):
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"1")
    first = weights_id(str(tmp_path), None, "{}")
    assert first == weights_id(str(tmp_path), None, "{}") != weights_id(str(tmp_path), "main", "{}")
    file.write_bytes(b"12")
    assert weights_id(str(tmp_path), None, "{}") != first


def rotating_model(rope: dict, dtype: torch.dtype, positions: int = 131072):
    """A model whose rotation tables are made as vLLM makes them: angles in float32, rounded to `dtype`."""
    inv = inverse_frequencies(64, rope["rope_theta"], {k: v for k, v in rope.items() if k != "rope_theta"}).float()
    angles = torch.arange(positions, dtype=torch.float32)[:, None] * inv
    table = torch.cat((angles.cos(), angles.sin()), dim=-1).to(dtype)
    rotary = SimpleNamespace(head_size=64, cos_sin_cache=table, is_neox_style=True)
    layer = SimpleNamespace(self_attn=SimpleNamespace(rotary_emb=rotary))
    return SimpleNamespace(model=SimpleNamespace(layers=[layer]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rotations_are_compared_before_they_are_trusted(dtype):
    llama3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "original_max_position_embeddings": 8192}
    llama3 |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    plain = {"rope_type": "default", "rope_theta": 5e5}
    model = rotating_model(llama3, dtype)
    assert rotary_of(model, SimpleNamespace(rope_parameters=llama3)).max_positions == 131072
    with pytest.raises(ModelError, match="rotates differently"):
        rotary_of(model, SimpleNamespace(rope_parameters=plain))
    model.model.layers[0].self_attn.rotary_emb.is_neox_style = False
    with pytest.raises(ModelError, match="half-split"):
        rotary_of(model, SimpleNamespace(rope_parameters=llama3))


# --- the scheduler's plans -------------------------------------------------------------------------------------------


def side(**options) -> SchedulerSide:
    config = SimpleNamespace(
        cache_config=SimpleNamespace(block_size=16), kv_transfer_config=SimpleNamespace(engine_id="test")
    )
    return SchedulerSide(config, ServerOptions(chunk_size=16, **options), GEOMETRY)


def request(req_id: str = "r", turn=TURN, **marks):
    return SimpleNamespace(
        request_id=req_id,
        num_prompt_tokens=len(turn),
        prompt_token_ids=list(turn.token_ids),
        kv_transfer_params=marks_of(turn, **marks),
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


@pytest.mark.parametrize(("computed", "hits"), [(0, 7), (16, 6), (49, 4), (80, 2)])
def test_claims_start_behind_the_prefix_cache_and_end_with_the_last_chunk(computed, hits):
    scheduler, asked = side(), request()
    scheduler.arrive(asked)
    assert scheduler.claim(asked, computed) == 0  # nothing is stored yet
    know(scheduler)
    assert scheduler.claim(asked, computed) == FIXED_END - computed
    assert len(scheduler.tracked["r"].reuse) == hits
    scheduler.allocated(asked, FIXED_END - computed)
    [load] = scheduler.step(step_output({"r": 5}, {"r": FIXED_END})).loads
    assert (load.start, load.end, load.limit) == (computed, FIXED_END, len(TURN) - 1)
    assert load.positions is None and load.block_ids == [1, 2, 3]


def test_nothing_is_claimed_when_the_prefix_cache_covers_the_chunks():
    scheduler, asked = side(), request()
    scheduler.arrive(asked)
    know(scheduler)
    assert scheduler.claim(asked, 97) == 0  # only the question is left
    assert "beyond vLLM's prefix cache" in scheduler.finish(asked)["fallback"]


def test_a_step_takes_no_more_rows_than_allowed():
    scheduler = side(rows_per_step=150)
    asked = [request(str(i)) for i in range(3)]
    for r in asked:
        scheduler.arrive(r)
    know(scheduler, "0")
    assert [scheduler.claim(r, 0) for r in asked] == [FIXED_END, None, None]
    scheduler.allocated(asked[0], FIXED_END)
    scheduler.step(step_output({"0": 5}, {"0": FIXED_END}))
    assert scheduler.claim(asked[1], 0) == FIXED_END


def test_the_last_row_is_vllms_own_where_the_prompt_ends_with_a_chunk():
    ends_fixed = Prompt(TURN.segments[:-1])
    scheduler, asked = side(), request(turn=ends_fixed)
    scheduler.arrive(asked)
    know(scheduler)
    assert scheduler.claim(asked, 0) == len(ends_fixed) - 1


def test_blocks_that_another_request_fills_in_this_step_are_waited_for():
    scheduler, asked, plain = side(), request(), request("plain")
    reused = TURN.chunks(16)[-1].end
    scheduler.arrive(asked)
    know(scheduler)
    plain.kv_transfer_params, plain.block_hashes = None, [b"0", b"1", b"2", b"3"]
    asked.block_hashes = [b"0", b"1", b"x", b"y"]
    scheduler.allocated(plain, 0)
    assert scheduler.claim(asked, 32) is None  # both blocks are shared and not computed yet
    plain.num_computed_tokens = 20
    assert scheduler.claim(asked, 32) is None and scheduler.claim(asked, 16) == reused - 16
    plain.num_computed_tokens = 40
    assert scheduler.claim(asked, 32) == reused - 32
    plain.num_computed_tokens, plain.status = 0, RequestStatus.PREEMPTED  # it computes nothing now
    assert scheduler.claim(asked, 32) == reused - 32
    plain.status = RequestStatus.RUNNING
    assert scheduler.finish(plain) is None and scheduler.claim(asked, 32) == reused - 32


def finished(asked, generated: int):
    """The request as vLLM hands it over at its end."""
    asked.all_token_ids = [*asked.prompt_token_ids, *range(3, 3 + generated)]
    asked.num_computed_tokens = len(asked.all_token_ids) - 1
    return asked


def test_history_leaves_with_the_next_step_that_is_planned():
    """Async scheduling plans a step before the one it follows has ended: the copy rides with the one after."""
    scheduler, asked = side(), request(policy="naive_reuse", history=len(TURN) - 5)
    scheduler.arrive(asked)
    scheduler.claim(asked, 0)
    scheduler.allocated(asked, 0)
    scheduler.step(step_output({"r": len(TURN)}, {"r": 0}))
    assert not scheduler.step(step_output({"r": 1}, {"r": len(TURN)})).keeps
    receipt = scheduler.finish(finished(asked, 30), [7, 8, 9])
    assert receipt["history"] == {
        "start": len(TURN) - 5,
        "end": len(TURN) + 29,
        "generation": 0,
        "from": "blocks",
    }
    assert all(key in scheduler.index for plan in scheduler.keeper.keeps for key, _ in plan.chunks)
    [keep] = scheduler.step(step_output({}, {})).keeps
    rows = [(chunk.start, chunk.end) for _, chunk in keep.chunks]
    assert keep.block_ids == [7, 8, 9] and rows[0][0] == len(TURN) - 5 and rows[-1][1] == len(TURN) + 29
    assert not scheduler.step(step_output({}, {})).keeps


def test_a_prompt_that_spans_were_found_in_is_planned_with_them():
    scheduler = side(find_spans=True, span_tokens=8)
    first, again, beam = (request(str(i)) for i in range(3))
    for asked in (first, again, beam):
        asked.kv_transfer_params = None
    beam.sampling_params = SimpleNamespace(prompt_logprobs=None, max_tokens=1, detokenize=False)
    scheduler.arrive(beam)
    assert not scheduler.tracked and not scheduler.memory.held
    scheduler.arrive(first)
    assert "seen before" in scheduler.finish(first)["fallback"]
    scheduler.arrive(again)
    assert sum(len(c) for c in scheduler.tracked["1"].plan.chunks) == len(TURN)


def member(scheduler, req_id: str, generated: int, name: str = "search", salt=None, **marks):
    """A request of a family, `generated` tokens behind its prompt, as it arrives."""
    asked = request(req_id, **marks, family={"name": name, "rows": len(TURN)})
    asked.prompt_token_ids += range(3, 3 + generated)
    asked.num_prompt_tokens, asked.cache_salt = len(asked.prompt_token_ids), salt
    scheduler.arrive(asked)
    return asked


def test_a_family_decides_once_and_later_members_follow():
    scheduler = side()
    first = member(scheduler, "first", 0)
    know(scheduler, "first")
    assert scheduler.claim(first, 16) == FIXED_END - 16
    scheduler.finish(first)
    follower = member(scheduler, "follower", 3)
    tracked = scheduler.tracked["follower"]
    assert tracked.follows and not tracked.exact and tracked.kept and tracked.rows == len(TURN)
    assert scheduler.claim(follower, len(TURN) // 16 * 16) == 0  # its rows are there
    assert scheduler.finish(follower)["chunks_hit"] == 0 and scheduler.stats.data["requests"] == 1
    lost = member(scheduler, "lost", 5)
    assert scheduler.claim(lost, 32) == FIXED_END - 32  # its rows were given away
    scheduler.index.clear()
    assert scheduler.claim(lost, 32) == 0 and "no chunk" in scheduler.finish(lost)["fallback"]
    assert scheduler.stats.data["requests"] == 2


def test_a_family_that_started_exactly_stays_exact_and_tenants_have_their_own():
    scheduler = side()
    first = member(scheduler, "first", 0)
    assert scheduler.claim(first, 0) == 0
    know(scheduler, "first")
    assert "no chunk" in scheduler.finish(first)["fallback"]
    assert member(scheduler, "later", 1).request_id not in scheduler.tracked
    for other in ({"salt": "tenant"}, {"name": "other"}):
        asked = member(scheduler, "other", 1, **other)
        assert not scheduler.tracked["other"].follows
        scheduler.finish(asked)
    for n in range(300):
        scheduler.finish(member(scheduler, "one", 0, name=str(n)))
    member(scheduler, "forgotten", 1)
    assert not scheduler.tracked["forgotten"].follows


def test_a_request_that_cannot_be_planned_is_computed_exactly():
    scheduler, asked = side(), request(layer=9)
    scheduler.arrive(asked)
    assert scheduler.claim(asked, 0) == 0
    assert "layer 9" in scheduler.finish(asked)["fallback"] and not scheduler.tracked
    unmarked = request()
    unmarked.kv_transfer_params = None
    scheduler.arrive(unmarked)
    assert scheduler.claim(unmarked, 0) == 0 and scheduler.finish(unmarked) is None


def test_own_prefills_are_saved_and_other_encodings_become_jobs():
    for name, saves, encodes in (("naive_reuse", 1, 0), ("cacheslide", 0, 1), ("epic", 0, 1), ("recompute", 0, 0)):
        scheduler, asked = side(encode="now"), request(policy=name)
        scheduler.arrive(asked)
        assert scheduler.claim(asked, 0) == 0
        scheduler.allocated(asked, 0)
        first = scheduler.step(step_output({"r": 60}, {"r": 0}))
        assert not first.saves and not first.encodes  # the prompt is not complete yet
        last = scheduler.step(step_output({"r": len(TURN) - 60}, {"r": 60}))
        assert (len(last.saves), len(last.encodes)) == (saves, encodes), name
        assert len(scheduler.index) == (0 if name == "recompute" else len(TURN.chunks(16)))


def test_jobs_wait_for_a_later_step_keep_the_budget_and_are_not_doubled():
    scheduler = side(encode_tokens_per_step=60)  # less than one chain: one job a step
    asked = [request(str(i), policy=name) for i, name in enumerate(("cacheslide", "cacheslide", "epic"))]
    for r in asked:
        scheduler.arrive(r)
        scheduler.claim(r, 0)
    rows = {r.request_id: len(TURN) for r in asked}
    assert not scheduler.step(step_output(rows, dict.fromkeys(rows, 0))).encodes
    assert len(scheduler.keeper.jobs) == 2
    kinds = []
    while scheduler.keeper.jobs:
        [job] = scheduler.step(step_output({}, {})).encodes
        kinds.append(job.encoding.kind)
    assert kinds == ["fixed_chain", "isolated"] and len(scheduler.index) == 2 * len(TURN.chunks(16))


# --- counters and the command line ---------------------------------------------------------------------------------


class Counter:
    """As much of a Prometheus counter as the metrics use."""

    made: ClassVar[dict] = {}

    def __init__(self, name, documentation, labelnames) -> None:
        self.name, self.labelnames = name, labelnames

    def labels(self, *values):
        assert len(values) == len(self.labelnames)
        return self.made.setdefault((self.name, *values), SimpleNamespace(total=0, inc=self._inc((self.name, *values))))

    def _inc(self, key):
        def inc(by):
            self.made[key].total += by

        return inc


def test_receipts_become_counters():
    Counter.made.clear()
    scheduler = side()
    for i, (marks, heard) in enumerate([({}, None), ({"layer": 9}, None), ({}, 40)]):
        asked = request(str(i), **marks)
        scheduler.arrive(asked)
        scheduler.claim(asked, 0)
        if heard:
            receipt = forecast(scheduler.tracked[str(i)]) | {"rows_reused": heard, "fallback": ""}
            scheduler.heard(WorkerReport({str(i): receipt}))
        scheduler.finish(asked)
    stats = scheduler.take_stats()
    assert scheduler.take_stats().is_empty() and not stats.is_empty()
    total = CacheSlideConnector.build_kv_connector_stats(None).aggregate(stats).aggregate(ReuseStats())
    metrics = CacheSlideConnector.build_prom_metrics(
        SimpleNamespace(kv_transfer_config=None),
        {prometheus_client.Counter: Counter, prometheus_client.Gauge: None, prometheus_client.Histogram: None},
        ["model"],
        {0: ["m"]},
    )
    metrics.observe(total.data)
    found = {key: counter.total for key, counter in Counter.made.items() if counter.total}
    assert found == {
        ("cacheslide:requests", "m"): 3,
        ("cacheslide:rows", "m"): 3 * len(TURN),
        ("cacheslide:rows_reused", "m"): 40,
        ("cacheslide:chunks", "m"): 2 * len(TURN.chunks(16)),
        ("cacheslide:fallbacks", "m", "not_stored"): 1,
        ("cacheslide:fallbacks", "m", "refused"): 1,
    }


def test_the_serve_command_passes_options_on():
    parser = argparse.ArgumentParser()
    serve.add_arguments(parser)
    args, rest = parser.parse_known_args(["model", "--policy", "epic", "--store-gib", "2.5", "--port", "1"])
    line = serve.command(args, rest)
    transfer = json.loads(line[line.index("--kv-transfer-config") + 1])
    options = ServerOptions.from_extra_config(transfer["kv_connector_extra_config"])
    assert options == ServerOptions(policy="epic", store_gib=2.5)
    assert line[line.index("--model") + 1] == "model" and line[-2:] == ["--port", "1"]
    assert "--hf-overrides" not in line
    args, _ = parser.parse_known_args(["model", "--policy", "magic"])
    with pytest.raises(PolicyError, match="magic"):
        serve.command(args, [])


def test_the_serve_command_puts_an_adapter_on(checkpoint, tmp_path):
    parser = argparse.ArgumentParser()
    serve.add_arguments(parser)
    save_random_adapter(tmp_path, checkpoint)
    for given in (["--hf-overrides", '{"a": 1}'], ['--hf-overrides={"a": 1}']):
        args, rest = parser.parse_known_args(["model", "--cope", str(tmp_path), *given, "--port", "1"])
        line = serve.command(args, rest)
        assert [w for w in line if w.startswith("--hf-overrides")] == ["--hf-overrides"]
        wanted = overrides(tmp_path, others={"a": 1})
        assert json.loads(line[line.index("--hf-overrides") + 1]) == wanted and wanted["a"] == 1
        assert line[-2:] == ["--port", "1"]
    args, rest = parser.parse_known_args(["model", "--cope", str(tmp_path / "none")])
    with pytest.raises(ModelError, match="no CoPE adapter"):
        serve.command(args, rest)
