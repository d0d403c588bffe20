"""A CoPE model inside an engine, and the reference model that it is held to.

`python -m tests.helpers.vllm_cope MODEL ADAPTER` prints what two ranks say, as JSON.
"""

import json
import sys
from shutil import copy

import torch
from vllm import LLM

from cacheslide.core.prompt import Prompt, Role, Segment
from cacheslide.training.calibration import Calibration, save_calibration
from cacheslide.training.load import find_cope
from cacheslide.vllm.cope.setting import overrides
from cacheslide.vllm.offline import close_engine
from cacheslide.vllm.options import annotations_of
from harness.results.provenance import ROOT
from tests.helpers.checkpoints import save_random, save_random_adapter
from tests.helpers.dense_cope import dense
from tests.helpers.served import BLOCK, Served, assert_same, engine_settings, logprobs, receipt, tokens
from tests.helpers.served import SHAPE as ENGINE_SHAPE
from tests.helpers.token_ids import random_ids

# Weights small enough that float32 keeps to 1e-5: with larger ones sums of gates pass on rounding, layer by layer.
SHAPE = ENGINE_SHAPE | {"initializer_range": 0.1}
SLOTS, CLOSE = 2, {"atol": 1e-4, "rtol": 1e-5}


def turn(number: int, notes: int, remark: int = 9, tail: int = 6) -> Prompt:
    """System text, notes that change, a document, a remark that changes, a second document, a question."""
    fixed = [random_ids(n, 20 + i) for i, n in enumerate((40, 90, 70))]
    changing = [random_ids(n, 100 * number + i) for i, n in enumerate((notes, remark, tail))]
    parts = [x for a, b in zip(fixed, changing, strict=True) for x in ((a, Role.REUSE), (b, Role.RECOMPUTE))]
    return Prompt(tuple(Segment(ids, role) for ids, role in parts if ids))


FIRST, SECOND = turn(1, 37), turn(2, 53, 12)


def save_base(folder):
    """A random Mistral without sliding windows, with the study's tokenizer: beam search asks for one."""
    save_random(folder, "mistral", **SHAPE, sliding_window=None)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        copy(ROOT / "models/tiny-llama-12m" / name, folder)
    return folder


def save_setup(folder, checkpoint):
    """A random adapter of `checkpoint` with random offsets of two slots."""
    save_random_adapter(folder, checkpoint, p_max=12)
    config = json.loads((checkpoint / "config.json").read_text())
    g = torch.Generator().manual_seed(8)
    offsets = torch.rand(config["num_hidden_layers"], SLOTS, config["num_attention_heads"], generator=g) * 4
    save_calibration(Calibration(offsets, find_cope(folder).adapter.digest, "template", 0.5), folder)
    return folder


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


def said(engine) -> list:
    """Plain and annotated requests, in one batch and in turns: tokens and first log-probabilities."""
    one = engine.ask([FIRST, turn(4, 20)], [annotations_of(FIRST), None], 5)
    two = engine.ask([SECOND, SECOND], [annotations_of(SECOND, layer=2, recompute_ratio=0.4), None], 5)
    assert receipt(two[0])["tokens_reused"] > 0
    return [[tokens(o), logprobs(o, i).tolist()] for o in (*one, *two) for i in (0, 4)]


if __name__ == "__main__":
    engine = object.__new__(Served)
    engine.llm = LLM(sys.argv[1], hf_overrides=overrides(sys.argv[2]), tensor_parallel_size=2, **engine_settings())
    print(json.dumps(said(engine)))
    close_engine(engine.llm)
