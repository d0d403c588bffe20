"""A request in its final form: its prompt without separators, and parameters that depend on the prompt."""

import copy
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from vllm.exceptions import VLLMValidationError

from cacheslide.vllm.frontend.admission import Limits, admit, resolved
from cacheslide.vllm.frontend.separators import text_after
from cacheslide.vllm.tenants import ambiguous


def taken(vllm_config, renderer, prompt: Any, params: Any, in_place: bool = False) -> tuple[Any, Any]:
    """A rendered prompt and its parameters in final form; VLLMValidationError for invalid annotations.

    `in_place` modifies the prompt itself, since a server may return its text (echo). Anything but a rendered prompt of
    tokens is returned unchanged.
    """
    if not isinstance(prompt, dict) or "type" not in prompt or not hasattr(params, "extra_args"):
        return prompt, params
    if resolved(params):  # a beam search step, or a request resolved by the server already
        return prompt, params
    if not params.extra_args and not ambiguous(prompt.get("cache_salt") or ""):  # most requests
        return prompt, params
    changed: dict[str, Any] = {}
    ids, salt, limits = prompt.get("prompt_token_ids"), prompt.get("cache_salt"), Limits.of(vllm_config)
    sampling = SimpleNamespace(extra_args=params.extra_args)
    request = SimpleNamespace(
        prompt_token_ids=ids, mm_features=prompt.get("mm_placeholders"), sampling_params=sampling, cache_salt=salt
    )
    admit(request, prompt, renderer, vllm_config.kv_transfer_config.kv_connector_extra_config, limits)
    if sampling.extra_args is not params.extra_args:
        params = copy.copy(params)
        params.extra_args = sampling.extra_args
    if request.cache_salt != salt:
        changed["cache_salt"] = request.cache_salt
    if request.prompt_token_ids is not ids:
        params.max_tokens = fitted(params.max_tokens, len(ids), len(request.prompt_token_ids), limits.max_model_len)
        changed |= retold(prompt, request.prompt_token_ids, renderer.tokenizer)
    if in_place:
        prompt.update(changed)
    return (prompt if in_place or not changed else {**prompt, **changed}), params


def fitted(max_tokens: int | None, came: int, runs: int, most: int) -> int | None:
    """`max_tokens` of a request whose prompt had `came` tokens and now has `runs`, where `most` fit the model.

    A value that filled the model's length, as vLLM's default does, fills it again. Larger values are left to vLLM,
    which stops there. VLLMValidationError for a value that fitted before and no longer does.
    """
    if max_tokens is None or came + max_tokens > most or runs + max_tokens <= most:
        return max_tokens
    if came + max_tokens == most:
        return most - runs
    raise VLLMValidationError(
        f"the prompt came with {came} tokens and runs with {runs}, cut at its separators: with the {max_tokens} asked "
        f"for that is more than the {most} that this model takes",
        parameter="max_tokens",
    )


def retold(prompt: Mapping[str, Any], ids: list[int], tokenizer: Any) -> dict[str, Any]:
    """Changed fields of vLLM's rendered `prompt` when it runs with `ids`: its text is that of these tokens."""
    changed: dict[str, Any] = {"prompt_token_ids": ids}
    if prompt.get("prompt") and tokenizer is not None:
        changed["prompt"] = text_after(prompt["prompt"], prompt["prompt_token_ids"], ids, tokenizer)
    return changed | {name: None for name in ("prompt_token_offsets", "assistant_tokens_mask") if name in prompt}
