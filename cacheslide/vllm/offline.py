"""An offline vLLM engine with or without the connector, and requests whose time to first token is known."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm import LLM, SamplingParams
from vllm.distributed.kv_transfer import get_kv_transfer_group

from cacheslide.vllm import CONNECTOR
from cacheslide.vllm.cope_setting import overrides
from cacheslide.vllm.params import FIELD


@dataclass(frozen=True)
class Answered:
    """One request: seconds from its arrival to its first token, its output ids, and its receipt if it was marked.

    `step` is seconds a token after the first, 0 where there is none.
    """

    ttft: float
    token_ids: list[int]
    receipt: dict[str, Any] | None
    cached_tokens: int
    step: float = 0.0


def open_engine(model: str, connector: Mapping[str, Any] | None, cope: str | Path | None = None, **options: Any) -> LLM:
    """A vLLM engine over `model`; `connector` holds the connector's options, None leaves it out.

    With `cope`, the folder of a CoPE adapter, `model` is its base. `options` are `vllm.LLM`'s. Statistics are on: they
    hold the time of the first token.
    """
    if cope is not None:
        options["hf_overrides"] = overrides(cope, others=options.get("hf_overrides"))
    transfer = {"kv_connector": CONNECTOR, "kv_role": "kv_both", "kv_connector_extra_config": dict(connector or {})}
    return LLM(model, kv_transfer_config=None if connector is None else transfer, disable_log_stats=False, **options)


def close_engine(engine: LLM) -> None:
    """Stop it and give its memory back."""
    engine.llm_engine.engine_core.shutdown()


def move_store(engine: LLM, where: str) -> None:
    """Move the chunks of all workers to "cpu" or "model", to compare both homes in one engine.

    The call travels as a pickled function: set VLLM_ALLOW_INSECURE_SERIALIZATION=1 before opening the engine.
    """
    engine.collective_rpc(_move_store, args=(where,))


def _move_store(_worker, where: str) -> None:
    worker_of().move_store(where)


def worker_of():
    """The connector's worker half, for looking into an engine that lives in this process."""
    return get_kv_transfer_group().worker


def ask(
    engine: LLM,
    prompts: Sequence[Sequence[int]],
    marks: Sequence[Mapping[str, Any] | None] | None = None,
    tokens: int = 1,
    **sampling: Any,
) -> list[Answered]:
    """Greedy continuations of `tokens` ids of all prompts, which arrive together. `marks` as in `marks_of`."""
    settings = {"max_tokens": tokens, "temperature": 0.0, "detokenize": False, "ignore_eos": True} | sampling
    params = [
        SamplingParams(**settings, extra_args=None if m is None else {"kv_transfer_params": dict(m)})
        for m in marks or [None] * len(prompts)
    ]
    outputs = engine.generate([{"prompt_token_ids": list(p)} for p in prompts], params, use_tqdm=False)
    return [
        Answered(
            o.metrics.first_token_latency,
            list(o.outputs[0].token_ids),
            (o.kv_transfer_params or {}).get(FIELD),
            o.num_cached_tokens or 0,
            (o.metrics.last_token_ts - o.metrics.first_token_ts) / max(1, len(o.outputs[0].token_ids) - 1),
        )
        for o in outputs
    ]
