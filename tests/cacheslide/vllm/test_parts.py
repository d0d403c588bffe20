"""The connector's parts without an engine: options, annotations, store and index, block hashes, attention, `serve`."""

import argparse
import hashlib
import json
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm")

from cacheslide.cli import serve
from cacheslide.errors import ConfigError, ModelError, PolicyError, PromptError, StoreError
from cacheslide.models.adapter import RowGroup
from cacheslide.policies.registry import load_policy
from cacheslide.store.base import ChunkKV
from cacheslide.vllm.cope.setting import overrides
from cacheslide.vllm.options import Annotations, ServerOptions, annotations_of
from cacheslide.vllm.scheduler.chunk_index import ChunkIndex
from cacheslide.vllm.scheduler.prefix_cache import key_apart
from cacheslide.vllm.worker.attention import RowKernel, gathered
from cacheslide.vllm.worker.attentions import choose
from cacheslide.vllm.worker.chunk_store import WorkerStore
from cacheslide.vllm.worker.kv_layout import PagedKV, PagedLayer
from tests.helpers.checkpoints import save_random_adapter
from tests.helpers.late_copies import LateCopies
from tests.helpers.scheduling import TURN

pytestmark = pytest.mark.slow

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


# --- options and annotations ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"chunksize": 16}, "unknown connector option chunksize"),
        ({"chunk_size": 0}, "chunk_size must be"),
        ({"tokens_per_step": True}, "tokens_per_step must be"),
        ({"computed_tokens_per_step": 0}, "computed_tokens_per_step must be"),
        ({"store_gib": -1}, "store_gib"),
        ({"store_device": "disk"}, "store_device"),
        ({"encode": "never"}, "encode must be one of"),
        ({"store_gib": float("nan")}, "store_gib: nan is no number"),
        ({"store_gib": 1e308}, "store_gib must be"),
        ({"store_gib": True}, "store_gib must be"),
        ({"namespace": 5}, "namespace must be"),
        ({"namespace": None}, "namespace must be"),
        ({"namespace": "a\nb"}, "namespace must be"),
        ({"policy": []}, "policy must be"),
        ({"store": 3}, "a store configuration is a JSON object"),
        ({"span_tokens": 10**30}, "span_tokens"),
        ({"span_tokens": 2**40}, "span_tokens must be"),
        ({3: 4}, "connector options"),
        ({"n" * 5000: 1}, "unknown connector option n{60,90}"),
        ({"store": {"Basic": {"ChunkSize": float("inf")}}}, "ChunkSize|inf"),
        ({"cache.server.port": float("inf")}, "port|inf"),
    ],
)
def test_wrong_options_stop_the_server(options, reason):
    with pytest.raises(ConfigError, match=reason):
        ServerOptions.from_extra_config(options)
    with pytest.raises(ConfigError) as wrong:
        ServerOptions.from_extra_config(options)
    assert len(str(wrong.value)) < 600 and "\n" not in str(wrong.value)


def test_a_separator_that_is_no_json_is_a_text():
    deep = "[" * 99_999
    assert ServerOptions.from_extra_config({"separator": deep}).own_separator == deep
    assert ServerOptions.from_extra_config({"separator": "[7, 8]"}).own_separator == [7, 8]


def test_annotations_round_trip():
    annotations = Annotations.parse(annotations_of(TURN, policy="epic", recompute_ratio=0.5, namespace="a"))
    assert annotations.prompt(TURN.token_ids).chunks(16) == TURN.chunks(16)
    assert annotations.system(ServerOptions(policy="cacheslide")) == load_policy("epic").at_ratio(0.5)
    assert annotations.namespace == "a" and Annotations.parse(None) is None and Annotations.parse({"other": 1}) is None


@pytest.mark.parametrize(
    ("annotations", "reason"),
    [
        ({"segments": [[0, 5.0]]}, "pair of integers"),
        ({"segments": [[0, True]]}, "pair of integers"),
        ({"segments": [[0]]}, "pair of integers"),
        ({"segments": {"0": 5}}, "list of"),
        ({"segments": [], "recompute_ratio": "0.1"}, "recompute_ratio must be a number"),
        ({"segments": [], "layer": 1.5}, "layer must be an integer"),
        ({"segments": [], "policy": 3}, "policy must be a string"),
        ({"segments": [], "namespace": None}, "namespace must be a string"),
        ({"segments": [], "encode": "soon"}, "encode must be one of"),
        ({"segments": [], "family": "search"}, "family must be an object"),
        ({"segments": [], "family": {"name": "a", "rows": 0}}, "family must be an object"),
        ({"segments": [], "family": {"name": "a", "rows": 4}, "history": 2}, "give no history"),
    ],
)
def test_malformed_annotations_say_what_is_wrong(annotations, reason):
    with pytest.raises(PromptError, match=reason):
        Annotations.parse({"cacheslide": annotations})
    with pytest.raises(PromptError, match="kv_transfer_params must be an object"):
        Annotations.parse([annotations])


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


def full_index(policy: str) -> ChunkIndex:
    """Two exact chunks around two corrected ones, in a full index."""
    index = ChunkIndex(100, policy)
    for key, generation in (("old", 1), ("exact", 0), ("new", 2), ("used", 0)):
        assert index.reserve({key: 25}, generation) == []
    return index


def test_chunks_leave_in_the_order_of_slides_policies():
    orders = {}
    for policy in ("clean-first", "lru", "fifo"):
        index = full_index(policy)
        index.touch(["old"])
        orders[policy] = [index.reserve({f"more {i}": 25})[0] for i in range(4)]
    assert orders == {
        "clean-first": ["exact", "used", "more 0", "more 1"],
        "lru": ["exact", "new", "used", "old"],
        "fifo": ["old", "exact", "new", "used"],
    }
    index = full_index("clean-first")
    index.set_exact(["old"])  # renewed just now: its exact copy is queued for storage
    assert [index.reserve({f"more {i}": 25})[0] for i in range(3)] == ["exact", "used", "old"]
    assert index.take_counts() == {"evictions.clean": 3, "evicted_bytes.clean": 75} and not index.take_counts()


def test_corrected_chunks_that_came_back_from_storage_are_clean():
    index = full_index("clean-first")
    assert index.reserve({"back": 25}, pending=True) == ["exact"]
    index.on_loaded("back", generation=1)
    assert index.generation("back") == 1 and index.reserve({"more": 25}) == ["used"]
    assert index.reserve({"even more": 25}) == ["back"]
    index.lease(["more", "even more"])
    assert index.reserve({"last": 25}) == ["old"]  # nothing clean may leave
    assert index.take_counts() == {
        "evictions.clean": 3, "evicted_bytes.clean": 75, "evictions.dirty": 1, "evicted_bytes.dirty": 25,
    }  # fmt: skip


def test_corrected_chunks_that_nobody_comes_back_for_leave_after_a_while():
    index, gone = full_index("clean-first"), []
    for turn in range(60):  # a quarter of memory makes room every turn, so eight times as much as fits in 32 turns
        index.touch(["new"])
        gone += index.reserve({f"more {turn}": 25})
    assert "new" in index and gone.index("old") in (32, 33) and index.take_counts()["evictions.dirty"] == 1
    index.clear()
    assert not index.nbytes and not len(index) and index.reserve({"a": 60}, generation=1) == []
    assert index.reserve({"b": 50}) == ["a"]


def test_a_read_chunk_that_is_stored_corrected_meanwhile_has_that_generation():
    index = ChunkIndex(100, "clean-first")
    index.reserve({"c": 60}, pending=True)
    index.reserve({"c": 60}, generation=2)
    assert "c" in index and index.generation("c") == 2 and not index.is_exact("c")
    assert index.reserve({"d": 50}) == ["c"] and index.take_counts()["evictions.dirty"] == 1


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
            parent = hashlib.sha256(repr((parent, request.tokens[2 * i : 2 * i + 2])).encode()).digest()
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


# --- the command line -------------------------------------------------------------------------------------------------


def test_the_serve_command_passes_options_on():
    parser = argparse.ArgumentParser()
    serve.add_arguments(parser)
    args, rest = parser.parse_known_args(["model", "--policy", "epic", "--store-gib", "2.5", "--port", "1"])
    line = serve.command(args, rest)
    transfer = json.loads(line[line.index("--kv-transfer-config") + 1])
    options = ServerOptions.from_extra_config(transfer["kv_connector_extra_config"])
    assert options == ServerOptions(policy="epic", store_gib=2.5)
    args, rest = parser.parse_known_args(["model", "--no-executor-graphs"])
    assert '"executor_graphs": false' in " ".join(serve.command(args, rest))
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
