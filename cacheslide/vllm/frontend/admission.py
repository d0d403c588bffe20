"""Checks annotations when vLLM receives a request (`hooks.py`), and turns all their forms into token spans."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from cacheslide.errors import CacheSlideError, PolicyError, PromptError
from cacheslide.vllm import CONNECTOR
from cacheslide.vllm.frontend.chat import message_roles, spans_of
from cacheslide.vllm.frontend.misplaced import check_places
from cacheslide.vllm.frontend.separators import cut
from cacheslide.vllm.limits import NOTE, check_depth, check_sendable, check_text, sayable, shown
from cacheslide.vllm.options import DOOR_KEYS, FIELD, Annotations, ServerOptions, raw_annotations
from cacheslide.vllm.systems import check_served
from cacheslide.vllm.tenants import ambiguous, salted

CHAT = "cacheslide_chat"  # beside a rendered prompt: its messages and rendering options
_REFUSALS = 4096  # maximum number remembered
_REFUSED: dict[int, str] = {}  # hash of a template with settings and messages that it does not render -> error
_ENGINES = 8  # maximum number of engines whose options are cached
# Of the latest engines: configuration, its content, parsed options.
_OPTIONS: list[tuple[Any, dict, ServerOptions]] = []


class Resolved(dict):
    """Annotations that were checked and turned into spans. Clients cannot send one: parsers make plain dicts."""


@dataclass(frozen=True)
class Limits:
    """Limits of an engine: maximum tokens of prompt plus output, number of layers; None where unknown."""

    max_model_len: int | None = None
    layers: int | None = None

    @classmethod
    def of(cls, vllm_config) -> "Limits":
        """The limits of an engine with this configuration."""
        model = vllm_config.model_config
        return cls(model.max_model_len, model.get_num_layers(vllm_config.parallel_config))


def resolved(params) -> bool:
    """Whether a request's sampling parameters carry annotations that were resolved already."""
    given = (getattr(params, "extra_args", None) or {}).get("kv_transfer_params")
    return isinstance(given, Mapping) and isinstance(given.get(FIELD), Resolved)


def serves(vllm_config) -> bool:
    """Whether an engine has this connector."""
    transfer = vllm_config.kv_transfer_config
    return transfer is not None and transfer.kv_connector == CONNECTOR


def options_of(extra_config: Mapping[str, Any]) -> ServerOptions:
    """The connector's options, cached per engine: a store's configuration may have to be read from a file."""
    for given, content, options in _OPTIONS:
        if given is extra_config and content == extra_config:
            return options
    options = ServerOptions.from_extra_config(extra_config)
    _OPTIONS[:] = [(extra_config, dict(extra_config), options), *_OPTIONS[: _ENGINES - 1]]
    return options


def admit(request, prompt, renderer, extra_config: Mapping[str, Any], limits: Limits | None = None) -> None:
    """Resolve and check a request's annotations; VLLMValidationError (HTTP 400) for invalid ones.

    `request` is vLLM's EngineCoreRequest, or an object with the attributes used here; `prompt` is its source.
    Separators are removed from its token ids, a namespace is added to its `cache_salt`, and its `kv_transfer_params`
    then hold token spans (`Resolved`).
    """
    from vllm.exceptions import VLLMValidationError

    if resolved(request.sampling_params):
        return
    extra = getattr(request.sampling_params, "extra_args", None) or {}
    params, limits = extra.get("kv_transfer_params"), limits or Limits()
    salt = getattr(request, "cache_salt", None) or ""
    try:
        raw, annotations = _asked(params, extra), None
        if raw is not None:
            annotations, spans = _annotations(raw, request, prompt, renderer, options_of(extra_config), limits)
            check_sendable(params)
    except CacheSlideError as wrong:
        raise VLLMValidationError(sayable(str(wrong)), parameter="kv_transfer_params") from None
    namespace = annotations.namespace if annotations is not None else ""
    if namespace or ambiguous(salt):
        request.cache_salt = salted(namespace, salt)
    if annotations is not None:  # a new dict: requests of one batch may share the client's
        request.sampling_params.extra_args = {**extra, "kv_transfer_params": {**params, FIELD: spans}}


def _annotations(
    raw, request, prompt, renderer, options: ServerOptions, limits: Limits
) -> tuple[Annotations, Resolved]:
    """A request's annotations as spans, parsed and raw; removes separators from the request."""
    if getattr(request, "resumable", False):
        raise PromptError("a prompt that is streamed in pieces cannot be annotated: its end is not known")
    if "family" in raw:
        raise PromptError(f"{FIELD}: family is set by beam search alone; a request cannot send it")
    before = request.prompt_token_ids
    spans = Resolved(_resolve(raw, request, prompt, renderer, options))
    annotations = Annotations.parse({FIELD: spans})
    if request.prompt_token_ids is not before:  # vLLM uses the original ids elsewhere
        _check_length(len(before), len(request.prompt_token_ids), limits)
    policy = annotations.system(options)
    check_served(policy, limits.layers)
    annotated = annotations.prompt(request.prompt_token_ids or ())
    if policy.transform(annotated) != annotated:
        raise PolicyError(f"{policy.name} rewrites prompts: apply its transform before sending")
    return annotations, spans


def _asked(params: Any, extra: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """A request's raw annotations; PromptError if they, or keys beside them, are misplaced or cannot be sent."""
    raw = raw_annotations(params)
    if params is not None:
        # The depth of our own object is checked elsewhere.
        check_depth({name: value for name, value in params.items() if name != FIELD})
    check_places(params, extra)
    if raw is None and params is not None:
        check_sendable(params)
    return raw


def _check_length(came: int, runs: int, limits: Limits) -> None:
    if limits.max_model_len is not None and runs + 1 > limits.max_model_len:
        raise PromptError(
            f"the prompt came with {came} tokens and runs with {runs}, cut at its separators and tokenised part by "
            f"part; with at least one more to generate this model takes at most {limits.max_model_len}"
        )


def _resolve(raw: Mapping[str, Any], request, prompt, renderer, options: ServerOptions) -> Mapping[str, Any]:
    """The annotations with spans in place of a separator or messages; removes separators from the request."""
    separator = raw.get("separator") or (True if "roles" in raw else None)
    ways = {"segments": "segments" in raw, "separator": separator, "messages": raw.get("messages")}
    ways["find"] = raw.get("find")
    given = [name for name, value in ways.items() if value is not None and value is not False]
    if len(given) > 1:
        raise PromptError(f"{FIELD}: {' and '.join(given)} are two ways to annotate a request: choose one")
    rest = {key: value for key, value in raw.items() if key not in ("separator", "roles", "messages")}
    for name in DOOR_KEYS:
        if name in raw and (raw[name] is None or raw[name] is False):
            raise PromptError(f"{FIELD}: {name} cannot be {shown(raw[name])}: leave it out")
    if given == ["separator"]:
        separator = _separator(separator, options)
        if not request.prompt_token_ids or request.mm_features:
            raise PromptError("a separator needs a prompt of text or token ids alone")
        tokenizer = renderer.tokenizer
        ids, spans = cut(separator, raw.get("roles"), text_of(prompt), request.prompt_token_ids, tokenizer)
        request.prompt_token_ids = ids
        return rest | {"segments": spans}
    if given == ["messages"]:
        if "note" in raw:
            check_text(f"{FIELD}: note", raw["note"], NOTE)
        spans, note = _chat_spans(raw["messages"], request, prompt, renderer)
        return rest | {"segments": spans, "note": sayable("; ".join(x for x in (raw.get("note"), note) if x), NOTE)}
    return raw


def _separator(value: Any, options: ServerOptions) -> str | Sequence[int]:
    separator = options.own_separator if value is True else value
    if value is True and not separator:
        raise PromptError("this server has no separator of its own (option separator): name one")
    ids = isinstance(separator, list | tuple) and all(type(t) is int and t >= 0 for t in separator)
    if not isinstance(separator, str) and not ids:
        raise PromptError(f"{FIELD}: separator must be a text, a list of token ids or true, not {shown(separator)}")
    return separator


def text_of(prompt: Any) -> str | None:
    """The prompt's text, None if it was given as tokens."""
    return prompt if isinstance(prompt, str) else prompt.get("prompt") if isinstance(prompt, Mapping) else None


def _chat_spans(annotations: Any, request, prompt, renderer) -> tuple[list[tuple[int, int]], str]:
    rendered_from = prompt.get(CHAT) if isinstance(prompt, Mapping) else None
    if rendered_from is None:
        raise PromptError("messages can be annotated in a chat request only")
    if request.mm_features or not request.prompt_token_ids:
        raise PromptError("messages can be annotated in text-only chats")
    messages, chat_params = rendered_from
    roles = message_roles(annotations, messages)
    settings = {**chat_params.chat_template_kwargs, "add_generation_prompt": False, "continue_final_message": False}
    alone = replace(chat_params, chat_template_kwargs=settings, return_assistant_tokens_mask=False)

    def chat(k: int) -> int:
        return hash((chat_params.chat_template, repr(settings), repr(messages[:k])))

    def prefix(k: int, special: bool) -> list[int]:
        # A template's error may depend on and quote anything in the chat, so it is cached for the identical chat only.
        # Without the cache vLLM would log it for every request.
        if _REFUSED and (known := _REFUSED.get(chat(k))) is not None:
            raise PromptError(known)
        try:
            _, rendered = renderer.render_messages(list(messages[:k]), alone)
        except Exception as error:
            if len(_REFUSED) < _REFUSALS:
                _REFUSED[chat(k)] = sayable(str(error), 200)
            raise
        if "prompt_token_ids" in rendered:
            return rendered["prompt_token_ids"]
        return renderer.tokenizer.encode(rendered["prompt"], add_special_tokens=special)

    ids = request.prompt_token_ids
    spans, why = spans_of(roles, ids, lambda k: prefix(k, False))
    if not spans:  # the request may ask for special tokens that the template does not write
        spans, why = spans_of(roles, ids, lambda k: prefix(k, True))
    return spans, why if why or spans else "no message of this chat is fixed"
