"""A request as it will run: its prompt without separators, and what depends on that."""

import copy
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from vllm.exceptions import VLLMValidationError

from cacheslide.vllm.frontend.admission import Limits, admit, resolved
from cacheslide.vllm.frontend.separators import text_after
from cacheslide.vllm.tenants import ambiguous


def taken(vllm_config, renderer, prompt: Any, params: Any, in_place: bool = False) -> tuple[Any, Any]:
    """A rendered prompt and its parameters as they will run; VLLMValidationError names a fault of the annotations.

    `in_place` changes the prompt itself: a server tells its text again (echo). Anything but a rendered prompt of tokens
    comes back as it is.
    """
    if not isinstance(prompt, dict) or "type" not in prompt or not hasattr(params, "extra_args"):
        return prompt, params
    if resolved(params):  # a step of a beam search, or a request on its way from a server's door to the engine's
        return prompt, params
    if not params.extra_args and not ambiguous(prompt.get("cache_salt") or ""):  # like most requests of most servers
        return prompt, params
    changed: dict[str, Any] = {}
    ids, salt, limits = prompt.get("prompt_token_ids"), prompt.get("cache_salt"), Limits.of(vllm_config)
    asked = SimpleNamespace(extra_args=params.extra_args)
    request = SimpleNamespace(
        prompt_token_ids=ids, mm_features=prompt.get("mm_placeholders"), sampling_params=asked, cache_salt=salt
    )
    admit(request, prompt, renderer, vllm_config.kv_transfer_config.kv_connector_extra_config, limits)
    if asked.extra_args is not params.extra_args:
        params = copy.copy(params)
        params.extra_args = asked.extra_args
    if request.cache_salt != salt:
        changed["cache_salt"] = request.cache_salt
    if request.prompt_token_ids is not ids:
        params.max_tokens = fitted(params.max_tokens, len(ids), len(request.prompt_token_ids), limits.max_model_len)
        changed |= retold(prompt, request.prompt_token_ids, renderer.tokenizer)
    if in_place:
        prompt.update(changed)
    return (prompt if in_place or not changed else {**prompt, **changed}), params


def fitted(max_tokens: int | None, came: int, runs: int, most: int) -> int | None:
    """`max_tokens` of a request whose prompt came with `came` tokens and runs with `runs`, where `most` fit the model.

    What filled the model's length, as vLLM's default does, fills it again. What was more is left to vLLM, which stops
    there. VLLMValidationError for what fitted and does not any more.
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
    """What changes in vLLM's rendered `prompt` when it runs with `ids`: its text is that of the tokens that run."""
    changed: dict[str, Any] = {"prompt_token_ids": ids}
    if prompt.get("prompt") and tokenizer is not None:
        changed["prompt"] = text_after(prompt["prompt"], prompt["prompt_token_ids"], ids, tokenizer)
    return changed | {name: None for name in ("prompt_token_offsets", "assistant_tokens_mask") if name in prompt}
