"""Engines with CoPE models on a CUDA device."""

from random import Random

import pytest
import torch

pytest.importorskip("vllm")
from cacheslide.core.prompt import Prompt, Role, Segment
from cacheslide.training.load import load_cope
from tests.helpers.checkpoints import save_random
from tests.helpers.served import logprobs, tokens
from tests.helpers.vllm_cope import SHAPE, Cope, exact, save_setup

# Largest difference of KV relative to the layer's norm, and of log-probabilities.
# (In bfloat16 the reference's own log-probabilities are up to 0.52 off its values in float32, over the 120 tokens of
# the padded batch on an H200. The engine's are up to 0.65 off those and 0.53 off the reference's, padded or not.)
BOUNDS = {"bfloat16": (0.15, 0.8), "float32": (1e-4, 1e-3)}

LARGER = {"hidden_size": 256, "head_dim": 64, "num_attention_heads": 8, "intermediate_size": 384}
LARGER |= {"max_position_embeddings": 4096, "initializer_range": 0.05}


def ids(count: int, seed: int) -> tuple[int, ...]:
    random = Random(seed)
    return tuple(random.randrange(3, 97) for _ in range(count))


def turn(number: int, notes: int, documents: int = 300) -> Prompt:
    """System text, notes that change, a document, a remark that changes, a second document, a question."""
    fixed = [ids(n, 20 + i) for i, n in enumerate((70, documents, documents + 41))]
    changing = [ids(n, 100 * number + i) for i, n in enumerate((notes, 9 + number, 6))]
    parts = [x for a, b in zip(fixed, changing, strict=True) for x in ((a, Role.REUSE), (b, Role.RECOMPUTE))]
    return Prompt(tuple(Segment(text, role) for text, role in parts))


class CudaCope(Cope):
    """The engine in one dtype with compilation and graphs, and the reference models on the same device."""

    def __init__(self, folder, dtype: str) -> None:
        path = save_random(folder / "base", "mistral", **SHAPE | LARGER, sliding_window=None)
        adapter = save_setup(folder / "adapter", path)
        engine = {"dtype": dtype, "max_model_len": 2048, "max_num_batched_tokens": 512, "enforce_eager": False}
        super().__init__(path, adapter, **engine, gpu_memory_utilization=0.2)
        self.kv_bound, self.logprob_bound = BOUNDS[dtype]
        self.live = load_cope(path, adapter, getattr(torch, dtype), "cuda", live=True)
        self.calibrated = load_cope(path, adapter, getattr(torch, dtype), "cuda")

    def poison(self) -> None:
        """No shared blocks, and garbage in all of them."""
        assert self.llm.reset_prefix_cache()
        for paged in self.worker.model.paged:
            paged.cache.normal_()

    def assert_kv(self, want, rows: int, bound: float | None = None) -> None:
        for mine, right in zip(self.left(rows), want, strict=True):
            for layer, (x, y) in enumerate(zip(mine.float(), right[:, :rows].float(), strict=True)):
                off = float((x - y).norm() / y.norm())
                assert off < (bound or self.kv_bound), f"layer {layer}: {off}"

    def assert_follows(self, output, model, prompt: Prompt, slots=None, check_kv: bool = True) -> None:
        """Every token's log-probabilities are the model's over the tokens that were generated before it."""
        said = list(prompt.token_ids)
        if check_kv:
            self.assert_kv(cuda_exact(model, said, slots)[:2], len(said))
        for i, token in enumerate(tokens(output)):
            off = float((logprobs(output, i) - cuda_exact(model, said, slots)[2].cpu()).abs().max())
            assert off < self.logprob_bound, f"token {i}: {off}"
            said.append(token)


def cuda_exact(model, said, slots=None):
    with torch.device("cuda"):
        k, v, last = exact(model, said, slots)
    return k, v, last.float()
