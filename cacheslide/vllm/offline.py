"""Offline vLLM engines with or without the connector, and requests with their time to first token."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm import LLM, SamplingParams
from vllm.distributed.kv_transfer import get_kv_transfer_group
from vllm.exceptions import VLLMValidationError
from vllm.platforms import current_platform
from vllm.sampling_params import BeamSearchParams

from cacheslide.vllm import CONNECTOR
from cacheslide.vllm.cope.setting import overrides
from cacheslide.vllm.frontend.beams import Search, start_search
from cacheslide.vllm.options import receipt_in


@dataclass(frozen=True)
class Answered:
    """One request: seconds from its arrival to its first token, its output ids, and its receipt if it was annotated.

    `step` is seconds per token after the first, 0 if there is none.
    """

    ttft: float
    token_ids: list[int]
    receipt: dict[str, Any] | None
    cached_tokens: int
    step: float = 0.0


def open_engine(
    model: str,
    connector: Mapping[str, Any] | None,
    cope: str | Path | None = None,
    store: str | Path | Mapping[str, Any] | None = None,
    **options: Any,
) -> LLM:
    """A vLLM engine over `model`; `connector` holds the connector's options, None leaves it out.

    With `cope`, the folder of a CoPE adapter, `model` is its base. `store` configures storage tiers, as a JSON file or
    parsed (see `ServerOptions.store`). `options` are `vllm.LLM`'s. Statistics are on, since they hold the time of the
    first token.
    """
    if cope is not None:
        options["hf_overrides"] = overrides(cope, others=options.get("hf_overrides"))
    extra = dict(connector or {})
    if store is not None:
        extra["store"] = str(Path(store).resolve()) if isinstance(store, str | Path) else dict(store)
    transfer = {"kv_connector": CONNECTOR, "kv_role": "kv_both", "kv_connector_extra_config": extra}
    return LLM(model, kv_transfer_config=None if connector is None else transfer, disable_log_stats=False, **options)


def close_engine(engine: LLM) -> None:
    """Shut the engine down with its processes and threads, and free its memory; idempotent."""
    engine.renderer.shutdown()
    engine.llm_engine.engine_core.shutdown()
    # vLLM keeps one pool for the CUDA graphs of a process; captures into a pool whose graphs are gone fail
    # (vllm-project/vllm issue 28426), so the next engine of this process gets its own.
    type(current_platform)._global_graph_pool = None


def move_store(engine: LLM, where: str) -> None:
    """Move the chunks of all workers to "cpu" or "model", to compare both in one engine.

    The function is sent pickled: set VLLM_ALLOW_INSECURE_SERIALIZATION=1 before opening the engine.
    """
    engine.collective_rpc(_move_store, args=(where,))


def _move_store(_worker, where: str) -> None:
    worker_of().move_store(where)


def replays(engine: LLM, on: bool = True) -> int:
    """Number of the first worker's runs replayed from CUDA graphs so far; then switches replay on or off.

    Does nothing in an engine without graphs. Sent like `move_store`.
    """
    return engine.collective_rpc(_replays, args=(on,))[0]


def _replays(_worker, on: bool) -> int:
    graphs = worker_of().graphs
    if graphs is None:
        return 0
    graphs.enabled = on
    return graphs.replayed


def worker_of():
    """The worker side of an engine in this process, for inspection."""
    return get_kv_transfer_group().worker


def ask(
    engine: LLM,
    prompts: Sequence[Sequence[int]],
    annotations: Sequence[Mapping[str, Any] | None] | None = None,
    tokens: int = 1,
    **sampling: Any,
) -> list[Answered]:
    """Greedy continuations of `tokens` ids of prompts that arrive together. `annotations`: see `annotations_of`."""
    settings = {"max_tokens": tokens, "temperature": 0.0, "detokenize": False, "ignore_eos": True} | sampling
    params = [
        SamplingParams(**settings, extra_args=None if m is None else {"kv_transfer_params": dict(m)})
        for m in annotations or [None] * len(prompts)
    ]
    outputs = engine.generate([{"prompt_token_ids": list(p)} for p in prompts], params, use_tqdm=False)
    return [
        Answered(
            o.metrics.first_token_latency,
            list(o.outputs[0].token_ids),
            receipt_in(o.kv_transfer_params),
            o.num_cached_tokens or 0,
            (o.metrics.last_token_ts - o.metrics.first_token_ts) / max(1, len(o.outputs[0].token_ids) - 1),
        )
        for o in outputs
    ]


@dataclass(frozen=True)
class Searched:
    """One beam search: vLLM's sequences, best first, and its receipt if it was annotated."""

    sequences: list[Any]
    receipt: dict[str, Any] | None


def beam_search(
    engine: LLM,
    prompts: Sequence[Any],
    params: BeamSearchParams,
    annotations: Sequence[Mapping[str, Any] | None],
    **options: Any,
) -> list[Searched]:
    """`LLM.beam_search` with annotations, which it does not accept itself.

    `annotations` are the prompts' `kv_transfer_params`, `options` those of `LLM.beam_search`. VLLMValidationError for
    invalid annotations.
    """
    search = _AnnotatedSearch(engine, annotations, params.max_tokens)
    results = search.beam_search(prompts, params, **options)
    receipts = [None if s is None else receipt_in(s.kv_transfer_params) for s in search.searches]
    return [Searched(f.sequences, r) for f, r in zip(results, receipts, strict=True)]


class _AnnotatedSearch(LLM):
    """An engine's beam search with annotated steps; other methods are the engine's."""

    def __init__(self, engine: LLM, annotations: Sequence[Mapping[str, Any] | None], tokens: int) -> None:
        vars(self).update(vars(engine))
        self.annotations, self.searches, self.tokens, self._of = annotations, [], tokens, {}

    def _preprocess_cmpl(self, prompts: Sequence[Any], *args: Any, **kwargs: Any) -> list[Any]:
        config, rendered = self.llm_engine.vllm_config, super()._preprocess_cmpl(prompts, *args, **kwargs)
        pairs = zip(rendered, self.annotations, strict=True)
        self.searches = [start_search(config, self.renderer, p, m, self.tokens) for p, m in pairs]
        if short := [s.max_tokens for s in self.searches if s is not None and s.max_tokens != self.tokens]:
            raise VLLMValidationError(f"{self.tokens} tokens do not fit behind a prompt that runs: {min(short)} do")
        return [p if s is None else s.prompt for p, s in zip(rendered, self.searches, strict=True)]

    def _beam_search_step(self, instances_batch: Sequence[Any], *args: Any, **kwargs: Any) -> bool:
        by_prompt = {id(s.prompt): s for s in self.searches if s is not None}
        beams = [beam for instance in instances_batch for beam in instance.beams]
        self._of = {id(beam.tokens): by_prompt.get(id(beam.orig_prompt)) for beam in beams}
        return super()._beam_search_step(instances_batch, *args, **kwargs)

    def _render_and_run_requests(self, prompts: Iterable[Any], params: Sequence[Any], *args: Any, **kwargs: Any) -> Any:
        prompts = list(prompts)
        searches: list[Search | None] = [self._of[id(p["prompt_token_ids"])] for p in prompts]
        params = [p if s is None else s.step(p) for p, s in zip(params, searches, strict=True)]
        outputs = super()._render_and_run_requests(iter(prompts), params, *args, **kwargs)
        for search, output in zip(searches, outputs, strict=True):
            if search is not None:
                search.on_output(output)
        return outputs
