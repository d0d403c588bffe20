"""CoPE models inside vLLM (CPU): parity with the reference model, reuse, batches, prefix cache, ranks, refusals."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from shutil import copy
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm")

from vllm import SamplingParams
from vllm.sampling_params import BeamSearchParams

from cacheslide.engine import ReuseEngine
from cacheslide.errors import ConfigError, ModelError
from cacheslide.positions.ccpe import slots_in
from cacheslide.prompt import Prompt, Role, Segment
from cacheslide.store import MemoryChunkStore
from cacheslide.training.calibration import Calibration, save_calibration
from cacheslide.training.load import find_cope, load_cope
from cacheslide.vllm.cope_setting import overrides
from cacheslide.vllm.offline import beam_search
from cacheslide.vllm.params import marks_of, policy_of
from cacheslide.vllm.support import check_cope, check_spans
from harness.results.provenance import ROOT
from tests.conftest import VLLM_ENVIRONMENT, random_ids, save_random, save_random_adapter
from tests.test_cope_model import dense
from tests.test_vllm_engine import BLOCK, CHUNK, Served, assert_same, logprobs, receipt, tokens
from tests.test_vllm_engine import SHAPE as ENGINE_SHAPE

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.usefixtures("vllm_environment")]

# Weights small enough that float32 keeps to 1e-5: with larger ones sums of gates pass on rounding, layer by layer.
SHAPE = ENGINE_SHAPE | {"initializer_range": 0.1}
SLOTS, CLOSE = 2, {"atol": 1e-4, "rtol": 1e-5}
SYSTEMS = {
    "cacheslide": {"layer": 2},
    "cacheslide_promote": {},
    "cacheblend": {},
    "prompt_cache": {},
    "epic": {"share": 0.26},
    "naive_reuse": {},
}


def turn(number: int, notes: int, remark: int = 9, tail: int = 6) -> Prompt:
    """System text, notes that change, a document, a remark that changes, a second document, a question."""
    fixed = [random_ids(n, 20 + i) for i, n in enumerate((40, 90, 70))]
    changing = [random_ids(n, 100 * number + i) for i, n in enumerate((notes, remark, tail))]
    parts = [x for a, b in zip(fixed, changing, strict=True) for x in ((a, Role.REUSE), (b, Role.RECOMPUTE))]
    return Prompt(tuple(Segment(ids, role) for ids, role in parts if ids))


FIRST, SECOND = turn(1, 37), turn(2, 53, 12)


def save_setup(folder, checkpoint):
    """A random adapter of `checkpoint` with random masses of two slots."""
    save_random_adapter(folder, checkpoint, p_max=12)
    config = json.loads((checkpoint / "config.json").read_text())
    g = torch.Generator().manual_seed(8)
    masses = torch.rand(config["num_hidden_layers"], SLOTS, config["num_attention_heads"], generator=g) * 4
    save_calibration(Calibration(masses, find_cope(folder).adapter.digest, "template", 0.5), folder)
    return folder


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    folder = save_random(tmp_path_factory.mktemp("base"), "mistral", **SHAPE, sliding_window=None)
    for name in ("tokenizer.json", "tokenizer_config.json"):  # beam search asks for one
        copy(ROOT / "models/tiny-llama-12m" / name, folder)
    return folder


@pytest.fixture(scope="module")
def adapter(path, tmp_path_factory):
    return save_setup(tmp_path_factory.mktemp("adapter"), path)


class Cope(Served):
    """An engine with an adapter that remembers which blocks every finished request had."""

    def __init__(self, path, adapter, **engine) -> None:
        tokenizer = {"skip_tokenizer_init": not (path / "tokenizer.json").is_file()}
        super().__init__(path, engine={"hf_overrides": overrides(adapter), **tokenizer, **engine})
        self.blocks = []
        finish = self.scheduler.finish
        self.scheduler.finish = lambda request, ids: (self.blocks.append(list(ids)), finish(request, ids))[1]

    def left(self, rows: int):
        """K and V [layers, rows, kv_heads, head_dim] in the blocks of the request that finished last."""
        kv = self.worker.model.paged_kv(self.blocks[-1], BLOCK)
        pairs = [kv.read(layer, torch.arange(rows)) for layer in range(self.worker.model.num_layers)]
        return torch.stack([k for k, _ in pairs]), torch.stack([v for _, v in pairs])


def test_llama_has_it_too(tmp_path):  # the first test: a process has one connector at a time
    path = save_random(tmp_path / "llama", **SHAPE)
    adapter = save_random_adapter(tmp_path / "adapter", path)
    engine = Cope(path, adapter)
    engine.poison()
    assert_follows(engine.plain(SECOND), load_cope(path, adapter), SECOND, served=engine)
    engine.core.shutdown()


@pytest.fixture(scope="module")
def served(path, adapter):
    engine = Cope(path, adapter)
    yield engine
    engine.core.shutdown()


@pytest.fixture(scope="module")
def live(path, adapter):
    return load_cope(path, adapter, live=True)


@pytest.fixture(scope="module")
def crossing(path, adapter):
    """The reference model with slot masses."""
    return load_cope(path, adapter)


def exact(model, ids, slots=None):
    """K, V [layers, rows, kv_heads, head_dim] and the last row's log-probabilities of a plain forward."""
    hidden, kv = dense(model, tuple(ids), slots)
    return kv.k[:, : len(ids)], kv.v[:, : len(ids)], model.logits(hidden[-1][-1:])[0].log_softmax(-1)


def assert_follows(output, model, prompt, slots=None, served=None) -> None:
    """Every generated token's log-probabilities are the model's; with `served` also all KV of the prompt."""
    ids = list(prompt.token_ids)
    k, v, want = exact(model, ids, slots)
    if served is not None:
        for got, right in zip(served.left(len(ids)), (k, v), strict=True):
            assert_same(got, right)
    for i, token in enumerate(tokens(output)):
        torch.testing.assert_close(logprobs(output, i), want, **CLOSE)
        assert token == int(want.argmax())
        ids.append(token)
        want = exact(model, ids, slots)[2]


def test_chunk_keys_cover_adapter_and_calibration(served, live, crossing):
    geometry = served.scheduler.planner.geometry
    digests = [model.model_id.split(" ", 1)[1] for model in (live, crossing)]  # without the base's part
    assert geometry.model_id.endswith(digests[1]) and digests[0] != digests[1] and geometry.slots == SLOTS


def test_a_plain_request_is_the_reference_model(served, live):
    served.fresh()
    assert_follows(served.plain(SECOND), live, SECOND, served=served)


@pytest.mark.parametrize("last_row_alone", [False, True])
def test_a_marked_request_crosses_its_slots_by_their_masses(served, crossing, live, last_row_alone):
    prompt = turn(3, 53)
    if last_row_alone:  # in steps of 128: the last one, of a fixed chunk near its slot, comes as a decoded one
        last = Segment(random_ids(4, 30), Role.REUSE)
        prompt = Prompt((*turn(3, 2 * 128 + 1 - (40 + 90 + 9 + 4)).segments[:4], last))
        assert len(prompt) == 2 * 128 + 1
    slots = slots_in(prompt)
    assert len(slots.bounds) == SLOTS
    served.fresh()
    output = served.one(prompt, policy="recompute")
    assert_follows(output, crossing, prompt, slots, served)
    assert (logprobs(output) - exact(live, prompt.token_ids)[2]).abs().max() > 1e-2


@pytest.mark.parametrize("system", SYSTEMS)
def test_every_system_leaves_the_kv_that_the_reference_engine_leaves(served, crossing, system):
    policy = policy_of(system, **SYSTEMS[system])
    engine = ReuseEngine(crossing, policy, MemoryChunkStore(), chunk_size=CHUNK)
    engine.build(FIRST)
    want = engine.prefill(SECOND)
    served.fresh()
    assert receipt(served.one(FIRST, policy=system, **SYSTEMS[system]))["chunks_hit"] == 0
    served.poison()
    output = served.one(SECOND, 1, policy=system, **SYSTEMS[system])
    got = receipt(output)
    for name in ("rows_reused", "rows_recomputed", "chunks_hit"):
        assert got[name] == getattr(want.receipt, name), name
    assert got["measured"] and not got["fallback"] and got["rows_reused"] > 0
    for mine, right in zip(served.left(len(SECOND)), (want.kv.k, want.kv.v), strict=True):
        assert_same(mine, right[:, : len(SECOND)])
    torch.testing.assert_close(logprobs(output), want.logits.log_softmax(-1), **CLOSE)


def test_a_mixed_batch_says_what_each_request_says_alone(served):
    served.fresh()
    served.one(FIRST)
    prompts = [SECOND, turn(4, 20), SECOND, turn(5, 70, 3), FIRST]
    marks = [marks_of(SECOND), None, None, marks_of(prompts[3], policy="recompute"), marks_of(FIRST, share=1.0)]
    alone = []
    for prompt, mark in zip(prompts, marks, strict=True):
        served.poison()
        alone.append(served.ask([prompt], [mark], 6)[0])
    served.poison()
    for got, want in zip(served.ask(prompts, marks, 6), alone, strict=True):
        assert tokens(got) == tokens(want)
        for i in range(6):
            torch.testing.assert_close(logprobs(got, i), logprobs(want, i), **CLOSE)
    assert receipt(alone[0])["rows_reused"] > 0 < receipt(alone[4])["rows_recomputed"]


def test_plain_requests_share_blocks_with_each_other_and_none_behind_a_slot(served, live, crossing):
    served.fresh()
    first = served.plain(SECOND)
    again = served.plain(SECOND)
    assert again.num_cached_tokens >= len(SECOND) - 2 * BLOCK
    torch.testing.assert_close(logprobs(again), logprobs(first), **CLOSE)
    marked = served.one(SECOND, policy="recompute")
    # what lies in front of the first slot's end is the same for both
    assert marked.num_cached_tokens == slots_in(SECOND).bounds[0][1] // BLOCK * BLOCK
    assert_follows(marked, crossing, SECOND, slots_in(SECOND))
    served.poison()
    served.one(SECOND, policy="recompute")
    plain = served.plain(SECOND)
    assert 0 < plain.num_cached_tokens <= slots_in(SECOND).bounds[0][1]
    assert_follows(plain, live, SECOND)


def test_what_masses_do_not_fit_is_computed_with_live_gates(served, live):
    served.fresh()
    longer = Prompt((*turn(6, 20).segments, Segment(random_ids(30, 9), Role.REUSE)))
    output = served.one(longer)
    assert "calibrated for 2" in receipt(output)["fallback"]
    assert_follows(output, live, longer)
    found = served.ask([SECOND], [{"cacheslide": {"find": True}}])[0]
    assert "template" in receipt(found)["fallback"]


def test_a_preempted_request_crosses_its_slots_again(served, crossing, live):
    served.fresh()
    served.one(FIRST)
    served.poison()
    engine, done = served.llm.llm_engine, []
    asked = {"exact": marks_of(SECOND, policy="recompute"), "reused": marks_of(SECOND, share=1.0), "plain": None}
    for name, marks in asked.items():
        extra = None if marks is None else {"kv_transfer_params": marks}
        params = SamplingParams(
            max_tokens=16, temperature=0, logprobs=97, detokenize=False, ignore_eos=True, extra_args=extra
        )
        engine.add_request(name, {"prompt_token_ids": list(SECOND.token_ids)}, params)
    for step in range(60):
        if step == 10:
            served.core.scheduler.reset_prefix_cache(reset_running_requests=True)
            served.poison()  # nothing is left of what was computed before
        done += [o for o in engine.step() if o.finished]
    outputs = {o.request_id: o for o in done}
    assert len(outputs) == 3
    for name, output in outputs.items():
        if name == "plain":
            assert_follows(output, live, SECOND)
        else:
            assert_follows(output, crossing, SECOND, slots_in(SECOND))


@pytest.mark.parametrize("share", [None, 1.0])
def test_beams_cross_their_slots(served, crossing, share):
    """Later requests of a search, whose prompts hold generated rows: all exact, or over reused rows."""
    served.fresh()
    marks = marks_of(SECOND, policy="recompute")
    if share is not None:
        served.one(FIRST)
        marks = marks_of(SECOND, share=share)
    served.poison()
    params = BeamSearchParams(beam_width=2, max_tokens=5, ignore_eos=True)
    [found] = beam_search(served.llm, [{"prompt_token_ids": list(SECOND.token_ids)}], params, [marks])
    best, total = found.sequences[0], 0.0
    prompt, slots = list(SECOND.token_ids), slots_in(SECOND)
    assert best.tokens[: len(prompt)] == prompt and len(best.tokens) == len(prompt) + 5
    for i in range(5):
        total += float(exact(crossing, best.tokens[: len(prompt) + i], slots)[2][best.tokens[len(prompt) + i]])
    assert best.cum_logprob == pytest.approx(total, abs=2e-4)
    assert not served.scheduler.tracked


def said(engine) -> list:
    """Plain and marked requests, in one batch and in turns: tokens and first log-probabilities."""
    one = engine.ask([FIRST, turn(4, 20)], [marks_of(FIRST), None], 5)
    two = engine.ask([SECOND, SECOND], [marks_of(SECOND, layer=2, share=0.4), None], 5)
    assert receipt(two[0])["rows_reused"] > 0
    return [[tokens(o), logprobs(o, i).tolist()] for o in (*one, *two) for i in (0, 4)]


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="vLLM binds each rank to a core of its own")
def test_two_ranks_are_one(served, path, adapter):
    environment = {**os.environ, **VLLM_ENVIRONMENT, "VLLM_CPU_OMP_THREADS_BIND": "0|1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.test_vllm_cope", str(path), str(adapter)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    served.fresh()
    for (their_ids, theirs), (ids, mine) in zip(json.loads(done.stdout.splitlines()[-1]), said(served), strict=True):
        assert their_ids == ids
        torch.testing.assert_close(torch.tensor(theirs), torch.tensor(mine), **CLOSE)


def test_another_base_and_a_changed_adapter_are_refused(path, adapter, tmp_path):
    other = save_random(tmp_path / "other", "mistral", **SHAPE, sliding_window=None, tie_word_embeddings=True)
    with pytest.raises(ModelError, match="belongs to the base model"):
        Cope(other, adapter)
    found = find_cope(adapter).adapter
    changed = replace(found, base="0" * 64)
    (tmp_path / "changed").mkdir()
    for name in ("cope.safetensors", "cope.json"):
        (tmp_path / "changed" / name).write_bytes((adapter / name).read_bytes())
    text = (tmp_path / "changed/cope.json").read_text().replace(found.base, changed.base)
    (tmp_path / "changed/cope.json").write_text(text)
    with pytest.raises(ModelError, match="altered"):
        overrides(tmp_path / "changed")
    with pytest.raises(ModelError, match="no CoPE adapter"):
        overrides(tmp_path)
    with pytest.raises(ConfigError, match="architecture"):
        overrides(adapter, others={"architectures": ["X"]})


def settings(**changes) -> SimpleNamespace:
    """What `check_cope` reads of vLLM's configuration; `a__b` changes b of a."""
    parts = {
        "model_config": {"dtype": torch.bfloat16, "quantization": None, "get_sliding_window": lambda: None},
        "parallel_config": {"pipeline_parallel_size": 1, "decode_context_parallel_size": 1},
        "cache_config": {"cache_dtype": "auto", "sliding_window": None},
    }
    rest = {"quant_config": None, "speculative_config": None, "lora_config": None}
    config = SimpleNamespace(model_type="llama")
    for name, value in changes.items():
        where, _, what = name.rpartition("__")
        if where == "hf":
            setattr(config, what, value)
        else:
            (parts[where] if where else rest)[what] = value
    parts["model_config"]["hf_config"] = config
    return SimpleNamespace(**{k: SimpleNamespace(**v) for k, v in parts.items()}, **rest)


@pytest.mark.parametrize(
    ("change", "value", "said"),
    [
        ("cache_config__cache_dtype", "fp8", "KV cache type fp8"),
        ("cache_config__cache_dtype", "float16", "KV cache type float16"),
        ("cache_config__sliding_window", 4096, "sliding windows"),
        ("speculative_config", {}, "speculative decoding"),
        ("lora_config", {}, "LoRA"),
        ("quant_config", {}, "quantisation"),
        ("parallel_config__pipeline_parallel_size", 2, "pipeline parallelism"),
        ("hf__model_type", "qwen2", "qwen2"),
        ("hf__llama_4_scaling", {"beta": 1}, "llama_4_scaling"),
    ],
)
def test_what_does_not_work_is_named_at_the_start(change, value, said):
    check_spans(True, 0)
    with pytest.raises(ConfigError, match="template"):
        check_spans(True, SLOTS)
    check_cope(settings())
    check_cope(settings(cache_config__cache_dtype="bfloat16"))
    with pytest.raises((ConfigError, ModelError), match=said):
        check_cope(settings(**{change: value}))


if __name__ == "__main__":
    engine = object.__new__(Served)
    from vllm import LLM

    from cacheslide.vllm.offline import close_engine
    from tests.test_vllm_engine import engine_settings

    engine.llm = LLM(sys.argv[1], hf_overrides=overrides(sys.argv[2]), tensor_parallel_size=2, **engine_settings())
    print(json.dumps(said(engine)))
    close_engine(engine.llm)
