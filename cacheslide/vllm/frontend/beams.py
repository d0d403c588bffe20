"""Annotations in beam search, which vLLM runs as one request for every beam and token, each with its own prompt.

The annotations are resolved once, for the prompt. Every step then carries token spans and the name of the search's
family (`scheduler/beam_groups.py`): the first step completes the prompt by reuse, the others find its KV in vLLM's
prefix cache. A search has one receipt, that of its first step, with counts of the others.
"""

import copy
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any
from uuid import uuid4

from cacheslide.vllm.frontend.admission import Limits, Resolved, admit, serves
from cacheslide.vllm.frontend.intake import fitted, retold
from cacheslide.vllm.options import FIELD

_NO_HISTORY = "a beam search retains no history"


def start_search(
    vllm_config, renderer, prompt: Mapping[str, Any], params: Any, max_tokens: int | None = None
) -> "Search | None":
    """The search of a rendered `prompt` with these `kv_transfer_params`; None without annotations.

    `max_tokens` is the number of tokens to generate; with the resolved prompt they must fit the model.
    VLLMValidationError for invalid annotations.
    """
    if not serves(vllm_config) or "prompt_token_ids" not in prompt:
        return None
    extra = vllm_config.kv_transfer_config.kv_connector_extra_config
    if extra.get("find_spans") and FIELD not in (params or {}):
        params = {**(params or {}), FIELD: {"find": True}}
    draft = SimpleNamespace(
        prompt_token_ids=prompt["prompt_token_ids"],
        mm_features=prompt.get("mm_placeholders"),
        sampling_params=SimpleNamespace(extra_args={"kv_transfer_params": params}),
        cache_salt=prompt.get("cache_salt"),
    )
    admit(draft, prompt, renderer, extra, Limits.of(vllm_config))
    annotations = (draft.sampling_params.extra_args["kv_transfer_params"] or {}).get(FIELD)
    if annotations is None or (annotations.get("find") is False and not annotations.get("segments")):
        return None
    if draft.prompt_token_ids is not prompt["prompt_token_ids"]:
        lengths = len(prompt["prompt_token_ids"]), len(draft.prompt_token_ids)
        max_tokens = fitted(max_tokens, *lengths, vllm_config.model_config.max_model_len)
        prompt = {**prompt, **retold(prompt, draft.prompt_token_ids, renderer.tokenizer)}
    if draft.cache_salt is not None:
        prompt = {**prompt, "cache_salt": draft.cache_salt}
    return Search(prompt, params, annotations, max_tokens)


class Search:
    """One beam search.

    Parameters
    ----------
    prompt : mapping
        The prompt for vLLM's beam search; `annotations` refer to its token ids.
    params : mapping
        The request's `kv_transfer_params`.
    annotations : mapping
        The resolved annotations in them.
    max_tokens : int, optional
        Tokens to generate, if known: no more than fit behind the prompt.
    """

    def __init__(
        self,
        prompt: Mapping[str, Any],
        params: Mapping[str, Any],
        annotations: Mapping[str, Any],
        max_tokens: int | None = None,
    ) -> None:
        self.prompt, self.max_tokens, self.requests, self.completed = prompt, max_tokens, 0, 0
        self.receipt: dict[str, Any] | None = None
        self._retains_history = annotations.get("history") is not None
        family = {"name": uuid4().hex, "rows": len(prompt["prompt_token_ids"])}
        self._params = {**params, FIELD: Resolved({**annotations, "history": None, "release": False, "family": family})}

    def step(self, sampling):
        """The sampling parameters, with annotations, of one of the search's requests."""
        sampling = copy.copy(sampling)
        sampling.extra_args = {**(sampling.extra_args or {}), "kv_transfer_params": self._params}
        return sampling

    def on_output(self, output) -> None:
        """Take the output of one of the search's requests."""
        if not output.finished:
            return
        self.requests += 1
        receipt = (output.kv_transfer_params or {}).get(FIELD)
        if receipt is not None:
            self.completed += receipt["chunks_hit"] > 0
            self.receipt = self.receipt or receipt

    @property
    def kv_transfer_params(self) -> dict[str, Any] | None:
        """For the response: the first step's receipt, with counts of requests and of reuse."""
        if self.receipt is None:
            return None
        receipt = self.receipt | {"beams": {"requests": self.requests, "completed_by_reuse": self.completed}}
        if self._retains_history:
            receipt |= {"history": None, "note": "; ".join(x for x in (receipt.get("note"), _NO_HISTORY) if x)}
        return {FIELD: receipt}
