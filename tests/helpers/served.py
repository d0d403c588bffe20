"""A running vLLM engine on the CPU with two turns of an agent, and what is compared."""

import pytest
import torch

pytest.importorskip("vllm")
from vllm import LLM, SamplingParams
from vllm.distributed.kv_transfer import get_kv_transfer_group

from cacheslide.models.reference import ReferenceDecoder
from cacheslide.vllm import CONNECTOR
from cacheslide.vllm.offline import close_engine
from cacheslide.vllm.options import annotations_of
from tests.helpers.prompts import prompt

CHUNK, BLOCK, FIXED = 16, 32, (60, 90, 45)
SHAPE = {"hidden_size": 64, "head_dim": 32, "intermediate_size": 96, "max_position_embeddings": 1024}
FIRST, SECOND = prompt(37, 3, fixed=FIXED), prompt(53, 5, fixed=FIXED)  # two turns: the fixed text has moved by 16


def engine_settings(connector: bool = True, **options) -> dict:
    """What the engines of these tests are opened with; `options` are the connector's.

    Requests that name no system run under the paper's own rule: canonical chunks and a selection layer.
    """
    transfer = {
        "kv_connector": CONNECTOR,
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"policy": "cacheslide", "chunk_size": CHUNK, "encode": "now", **options},
    }
    return {
        "dtype": "float32",
        "max_model_len": 512,
        "block_size": BLOCK,
        "enforce_eager": True,
        "skip_tokenizer_init": True,
        "max_logprobs": 97,
        "max_num_batched_tokens": 128,  # shorter than the prompts: exact prefills run in chunks
        "max_num_seqs": 16,
        "kv_transfer_config": transfer if connector else None,
    }


class Served:
    """A vLLM engine with the connector, and hands on its insides."""

    def __init__(self, path, connector: bool = True, engine: dict | None = None, **options) -> None:
        self.llm = LLM(str(path), **engine_settings(connector, **options) | (engine or {}))
        self.core = self.llm.llm_engine.engine_core.engine_core
        self.plans = []
        if connector:
            self.scheduler, self.worker = self.core.scheduler.connector.scheduler, get_kv_transfer_group().worker
            load = self.worker.load
            self.worker.load = lambda step: (self.plans.extend(step.loads), load(step))[1]

    def close(self) -> None:
        """Stop the engine."""
        close_engine(self.llm)

    def ask(self, prompts, annotations=None, tokens: int = 4, **sampling):
        """Outputs of a batch: greedy, all log-probabilities."""
        annotations = annotations or [None] * len(prompts)
        settings = {"max_tokens": tokens, "temperature": 0, "logprobs": 97, "detokenize": False, "ignore_eos": True}
        params = [
            SamplingParams(**settings | sampling, extra_args=None if m is None else {"kv_transfer_params": m})
            for m in annotations
        ]
        inputs = [{"prompt_token_ids": list(p.token_ids)} for p in prompts]
        return self.llm.generate(inputs, params, use_tqdm=False)

    def one(self, p, tokens: int = 4, **annotations):
        """One request under a system."""
        return self.ask([p], [annotations_of(p, **annotations)], tokens)[0]

    def plain(self, p, tokens: int = 4):
        """One request without annotations."""
        return self.ask([p], None, tokens)[0]

    def poison(self) -> None:
        """No shared blocks, and garbage in all of them: what a load leaves out cannot happen to be right."""
        assert self.llm.reset_prefix_cache()
        g = torch.Generator().manual_seed(0)
        for paged in self.worker.model.paged:
            paged.cache.copy_(torch.randn(paged.cache[:1].shape, generator=g).expand_as(paged.cache))

    def fresh(self) -> None:
        """As after a start: nothing stored, nothing shared."""
        self.scheduler.reset()
        self.poison()

    def kv(self, rows: int):
        """K and V [layers, rows, kv_heads, head_dim] of the last loaded request, read from its blocks."""
        kv = self.worker.model.paged_kv(self.plans[-1].block_ids, BLOCK)
        pairs = [kv.read(layer, torch.arange(rows)) for layer in range(self.worker.model.num_layers)]
        return torch.stack([k for k, _ in pairs]), torch.stack([v for _, v in pairs])


def tokens(output) -> list[int]:
    return list(output.outputs[0].token_ids)


def receipt(output) -> dict:
    return output.kv_transfer_params["cacheslide"]


def logprobs(output, at: int = 0) -> torch.Tensor:
    """All log-probabilities [vocab] of a generated token."""
    found = output.outputs[0].logprobs[at]
    return torch.tensor([found[t].logprob for t in sorted(found)])


def assert_same(got: torch.Tensor, want: torch.Tensor, tolerance: float = 1e-5) -> None:
    """Equal at every layer, to 1e-5 of the layer's largest value (about 7 in this model).

    Both sides compute the same sums of up to 96 float32 terms, in another order on each processor: 168 times 2^-24
    for five layers of them, of which about 70 were seen (AVX-512; AVX2 and SSE likewise).
    """
    for layer, (x, y) in enumerate(zip(got, want, strict=True)):
        assert (x - y).abs().max() <= tolerance * y.abs().max(), f"layer {layer}"


@pytest.fixture(scope="module")
def reference(path, served):
    """The reference engine's model with vLLM's rotation tables (made from float32 angles, ours from float64)."""
    model = ReferenceDecoder.from_pretrained(path)
    cos, sin = served.worker.model.layers[0].self_attn.rotary_emb.cos_sin_cache.chunk(2, dim=-1)
    # A float32 angle is off by up to 2^-24 of itself, and by as much as its frequency: two units in the last place.
    bound = len(cos) * (2**-24 + 2 * 2**-23)
    assert (model.rotaries[0].cos - cos).abs().max() < bound > (model.rotaries[0].sin - sin).abs().max()
    model.rotaries[0].cos, model.rotaries[0].sin = cos, sin
    return model
