"""Marks are checked where vLLM takes requests in (`door.py`), and every way to mark becomes token spans there."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from cacheslide.errors import CacheSlideError, PolicyError, PromptError
from cacheslide.vllm import CONNECTOR
from cacheslide.vllm.chat import message_roles, spans_of
from cacheslide.vllm.params import FIELD, Marks, ServerOptions, raw_marks
from cacheslide.vllm.separators import cut

CHAT = "cacheslide_chat"  # beside a rendered prompt: the messages it was rendered from, and how
_REFUSALS = 4096  # remembered at most
_REFUSED: dict[tuple, str] = {}  # template and senders of messages that it does not render alone, and why


def serves(vllm_config) -> bool:
    """Whether this engine runs with our connector."""
    transfer = vllm_config.kv_transfer_config
    return transfer is not None and transfer.kv_connector == CONNECTOR


def admit(request, prompt, renderer, extra_config: Mapping[str, Any]) -> None:
    """Resolve and check a request's marks; VLLMValidationError (HTTP 400) says what is wrong with them.

    `request` is vLLM's EngineCoreRequest, `prompt` what it was made from. Separators leave its token ids, and its
    `kv_transfer_params` name token spans afterwards.
    """
    from vllm.exceptions import VLLMValidationError

    extra = getattr(request.sampling_params, "extra_args", None) or {}
    params = extra.get("kv_transfer_params")
    try:
        raw = raw_marks(params)
        if raw is None:
            return
        if getattr(request, "resumable", False):
            raise PromptError("a prompt that is streamed in pieces cannot be marked: its end is not known")
        options = ServerOptions.from_extra_config(extra_config)
        resolved = _resolve(raw, request, prompt, renderer, options)
        marks = Marks.parse({FIELD: resolved})
        policy = marks.system(options.policy)
        marked = marks.prompt(request.prompt_token_ids or ())
        if policy.transform(marked) != marked:
            raise PolicyError(f"{policy.name} rewrites prompts: apply its transform before sending")
    except CacheSlideError as wrong:
        raise VLLMValidationError(str(wrong), parameter="kv_transfer_params") from None
    if resolved is not raw:  # a dictionary of its own: requests of one batch may share the client's
        request.sampling_params.extra_args = {**extra, "kv_transfer_params": {**params, FIELD: resolved}}


def _resolve(raw: Mapping[str, Any], request, prompt, renderer, options: ServerOptions) -> Mapping[str, Any]:
    """The marks with spans in place of a separator or messages; takes separators out of the request."""
    separator = raw.get("separator") or (True if "roles" in raw else None)
    ways = {"segments": "segments" in raw, "separator": separator, "messages": raw.get("messages")}
    ways["find"] = raw.get("find")
    asked = [name for name, value in ways.items() if value is not None and value is not False]
    if len(asked) > 1:
        raise PromptError(f"{FIELD}: {' and '.join(asked)} are two ways to mark a request: choose one")
    rest = {key: value for key, value in raw.items() if key not in ("separator", "roles", "messages")}
    if asked == ["separator"]:
        separator = _separator(separator, options)
        if not request.prompt_token_ids or request.mm_features:
            raise PromptError("a separator needs a prompt of text or token ids alone")
        tokenizer = renderer.tokenizer
        ids, spans = cut(separator, raw.get("roles"), _text(prompt), request.prompt_token_ids, tokenizer)
        request.prompt_token_ids = ids
        return rest | {"segments": spans}
    if asked == ["messages"]:
        spans, note = _chat_spans(raw["messages"], request, prompt, renderer)
        return rest | {"segments": spans, "note": note}
    return raw


def _separator(asked: Any, options: ServerOptions) -> str | Sequence[int]:
    separator = options.own_separator if asked is True else asked
    if asked is True and not separator:
        raise PromptError("this server has no separator of its own (option separator): name one")
    ids = isinstance(separator, list | tuple) and all(type(t) is int and t >= 0 for t in separator)
    if not isinstance(separator, str) and not ids:
        raise PromptError(f"{FIELD}: separator must be a text, a list of token ids or true, not {separator!r}")
    return separator


def _text(prompt: Any) -> str | None:
    """The text a prompt came as, if it did."""
    return prompt if isinstance(prompt, str) else prompt.get("prompt") if isinstance(prompt, Mapping) else None


def _chat_spans(marks: Any, request, prompt, renderer) -> tuple[list[tuple[int, int]], str]:
    chat = prompt.get(CHAT) if isinstance(prompt, Mapping) else None
    if chat is None:
        raise PromptError("messages can be marked in a chat request only")
    if request.mm_features or not request.prompt_token_ids:
        raise PromptError("messages can be marked in text-only chats")
    messages, chat_params = chat
    roles = message_roles(marks, messages)
    settings = {**chat_params.chat_template_kwargs, "add_generation_prompt": False, "continue_final_message": False}
    alone = replace(chat_params, chat_template_kwargs=settings, return_assistant_tokens_mask=False)

    def prefix(k: int, special: bool) -> list[int]:
        shape = (chat_params.chat_template, tuple(m.get("role") for m in messages[:k]))
        if shape in _REFUSED:  # asked again, vLLM would write the template's error into its log for every request
            raise PromptError(_REFUSED[shape])
        try:
            _, rendered = renderer.render_messages(list(messages[:k]), alone)
        except Exception as error:
            if len(_REFUSED) < _REFUSALS:
                _REFUSED[shape] = str(error)
            raise
        if "prompt_token_ids" in rendered:
            return rendered["prompt_token_ids"]
        return renderer.tokenizer.encode(rendered["prompt"], add_special_tokens=special)

    ids = request.prompt_token_ids
    spans, why = spans_of(roles, ids, lambda k: prefix(k, False))
    if not spans:  # a request may ask for special tokens that the template has not written
        spans, why = spans_of(roles, ids, lambda k: prefix(k, True))
    return spans, why if why or spans else "no message of this chat is fixed"
