"""The connector's options, and the annotations of a request in `kv_transfer_params`."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from cacheslide import renamed
from cacheslide.core.prompt import Prompt, Role
from cacheslide.errors import ConfigError, PromptError
from cacheslide.plain_values import check_plain, parse_json
from cacheslide.policies.base import ReusePolicy
from cacheslide.policies.default import DEFAULT_SYSTEM
from cacheslide.store.base import MAX_GENERATION
from cacheslide.store.config import StoreConfig
from cacheslide.vllm.limits import NAME, NOTE, ROW, SEGMENTS, check_text, sayable, shown
from cacheslide.vllm.systems import policy_of

FIELD = "cacheslide"
CPU_BLOCK = 32  # vLLM's CPU attention needs block sizes that are multiples of this
CPU_CACHE_GIB = "2"  # paged KV on a CPU; vLLM's default is nine tenths of the host's memory
MOST, MOST_GIB = 10**9, 10**6  # limits of any count and of the store's size in GiB
ENCODE = ("later", "now", "off")
SERVER_KEYS = ("cache.server.host", "cache.server.port")  # CrossCache's connector options
DOOR_KEYS = ("separator", "roles", "messages")  # become segments when vLLM receives a request (`frontend/hooks.py`)
_COUNTS = {
    "chunk_size": 1,
    "suffix_len": 1,
    "encode_tokens_per_step": 1,
    "tokens_per_step": 1,
    "computed_tokens_per_step": 1,
    "span_tokens": 4,
    "spans_known": 1,
    "max_generation": 0,
}


@dataclass(frozen=True)
class ServerOptions:
    """`kv_connector_extra_config` of the connector.

    Attributes
    ----------
    policy : str
        System of requests that name none.
    recompute_ratio : float, optional
        Share of the reused tokens that this system recomputes, in [0, 1]; the system's own if None.
    layer : int, optional
        Its selection layer, at least 0; the system's own if None.
    chunk_size, suffix_len : int
        As in `ReuseEngine`.
    namespace : str
        Part of every chunk key of this server.
    store_gib : float
        Chunk KV per worker in GiB; the least recently used chunks are evicted first.
    store_device : str
        "cpu" (host memory, pinned beside a GPU) or "model" (the model's own device).
    encode : str
        When chunks that need their own prefill get it: "later" (two steps on), "now" (in the step that completes the
        request's prefill) or "off".
    encode_tokens_per_step : int
        Maximum tokens of such prefills in a step (one chunk chain may exceed it).
    tokens_per_step : int
        Maximum rows completed by reuse in a step (one request may exceed it); further requests wait. Bounds memory.
    computed_tokens_per_step : int
        Maximum of these rows that are computed, as estimated by `scheduler/packing.py` (one request may exceed it);
        further requests wait. Bounds the duration of a step.
    separator : str or list of int
        Separator of requests that ask for the server's: a text, or token ids (as JSON in a string).
    find_spans : bool
        Also look for spans seen before in requests without annotations.
    span_tokens, spans_known : int
        Average size of such a span in tokens, and number of spans remembered.
    max_generation : int
        Corrected KV of generated text is stored up to this generation, and encoded exactly beyond it; 0: never stored.
    executor_graphs : bool
        On a GPU, replay layers of reuse from CUDA graphs where possible.
    store : str or dict
        Storage tiers under the workers' memory: a `StoreConfig` or CrossCache's configuration, as a JSON file's path or
        parsed. It also gives `chunk_size`, `store_gib` and `store_device` where these options are not set.
    """

    policy: str = DEFAULT_SYSTEM
    recompute_ratio: float | None = None
    layer: int | None = None
    chunk_size: int = 1024
    suffix_len: int = 1
    namespace: str = ""
    store_gib: float = 4.0
    store_device: str = "cpu"
    encode: str = "later"
    encode_tokens_per_step: int = 8192
    tokens_per_step: int = 65536
    computed_tokens_per_step: int = 1024
    separator: str | list[int] = ""
    find_spans: bool = False
    span_tokens: int = 256
    spans_known: int = 65536
    max_generation: int = MAX_GENERATION
    executor_graphs: bool = True
    store: str | dict[str, Any] = ""

    def __post_init__(self) -> None:
        for name, least in _COUNTS.items():
            value = getattr(self, name)
            if not _is_count(value) or not least <= value <= MOST:
                raise ConfigError(
                    f"{name} must be an integer of at least {least} and at most {MOST}, not {shown(value)}"
                )
        size = isinstance(self.store_gib, int | float) and not isinstance(self.store_gib, bool)
        if not size or not 0 <= self.store_gib <= MOST_GIB:
            raise ConfigError(
                f"store_gib must be a number of at least 0 and at most {MOST_GIB}, not {shown(self.store_gib)}"
            )
        for name in ("policy", "namespace"):
            value = getattr(self, name)
            if not isinstance(value, str) or not value.isprintable() or len(value) > NAME:
                raise ConfigError(f"{name} must be a line of at most {NAME} characters, not {shown(value)}")
        if why := _wrong_rule(self.recompute_ratio, self.layer):
            raise ConfigError(why)
        if self.store_device not in ("cpu", "model"):
            raise ConfigError(f"store_device must be 'cpu' or 'model', not {shown(self.store_device)}")
        if self.encode not in ENCODE:
            raise ConfigError(f"encode must be one of {', '.join(ENCODE)}, not {shown(self.encode)}")
        for name in ("find_spans", "executor_graphs"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} must be true or false, not {shown(getattr(self, name))}")
        if not isinstance(self.store, str | dict):
            raise ConfigError(f"store must be a file's path or an object, not {shown(self.store)}")
        if not (isinstance(self.own_separator, str) or _is_ids(self.own_separator)):
            raise ConfigError(f"separator must be a text or a list of token ids, not {shown(self.separator)}")

    @property
    def own_separator(self) -> str | list[int]:
        """The separator; a string that is a JSON list is parsed to ids, since a command line has strings only."""
        if isinstance(self.separator, str) and self.separator.startswith("["):
            try:
                return parse_json(self.separator)
            except ValueError:
                pass
        return self.separator

    @property
    def system(self) -> ReusePolicy:
        """The reuse policy of requests that name none."""
        return policy_of(self.policy, self.recompute_ratio, self.layer)

    @property
    def tiers(self) -> StoreConfig | None:
        """The storage tiers under the workers' memory; None without any."""
        config = _store_config(self.store) if self.store else None
        lower = config is not None and (config.device_gib or config.file_options or config.remote_host)
        return config if lower else None

    @classmethod
    def from_extra_config(cls, extra: Mapping[str, Any]) -> "ServerOptions":
        """The options from parsed JSON; ConfigError for unknown keys."""
        try:
            extra = renamed.options(extra, renamed.SERVER)
        except ValueError as wrong:
            raise ConfigError(f"connector options: {wrong}") from None
        known = {f.name for f in fields(cls)}
        check_plain(extra, ConfigError, "connector options", text=True)
        unknown = sorted(set(extra) - known - set(SERVER_KEYS))
        if unknown:
            raise ConfigError(f"unknown connector option {_names(unknown)} (known: {', '.join(sorted(known))})")
        given = {name: value for name, value in extra.items() if name in known}
        server = {name: value for name, value in extra.items() if name in SERVER_KEYS}
        if given.get("store") or server:
            config = _store_config(given.get("store") or {}).with_server(server)
            given["store"] = asdict(config)
            given.setdefault("chunk_size", config.chunk_tokens)
            given.setdefault("store_device", "model" if config.device_gib else "cpu")
            given.setdefault("store_gib", config.device_gib or config.host_gib)
        return cls(**given)


def _store_config(raw: str | Mapping[str, Any]) -> StoreConfig:
    return StoreConfig.from_file(raw) if isinstance(raw, str) else StoreConfig.from_dict(raw)


@dataclass(frozen=True)
class Annotations:
    """`kv_transfer_params["cacheslide"]` of one request, as the engine sees it.

    `segments` are the fixed spans, half-open in tokens; text between them is updated. With `find` they are spans seen
    before. Rows from `history` on, and generated text, are fixed text of the next turn. `release`: no turn follows, and
    corrected KV of this prompt's chunks is dropped when the request ends. `policy`, `recompute_ratio` and `layer`
    override the server's system, its share of recomputed reused tokens and its selection layer. `note` is copied into
    the receipt; without segments it is the reason of an exact computation. `family`, {"name", "rows"}, joins requests
    that continue one prompt, the first `rows` rows of each (`scheduler/beam_groups.py`): set by beam search, and
    refused from clients.
    """

    segments: tuple[tuple[int, int], ...] = ()
    find: bool | None = None
    history: int | None = None
    release: bool = False
    policy: str | None = None
    recompute_ratio: float | None = None
    layer: int | None = None
    namespace: str = ""
    encode: str | None = None
    note: str = ""
    family: Mapping[str, Any] | None = None

    @classmethod
    def parse(cls, params: Mapping[str, Any] | None) -> "Annotations | None":
        """The annotations in a request's `kv_transfer_params`; None if there are none; PromptError if invalid."""
        raw = raw_annotations(params)
        if raw is None:
            return None
        try:
            raw = renamed.options(raw, renamed.REQUEST)
        except ValueError as wrong:
            raise PromptError(f"{FIELD}: {wrong}") from None
        if unknown := [name for name in raw if name not in _ANNOTATIONS]:
            known = sorted((_ANNOTATIONS | set(DOOR_KEYS)) - {"family"})
            raise PromptError(f"{FIELD}: unknown key {_names(unknown)} (known: {', '.join(known)})")
        if "segments" not in raw and raw.get("find") is None:
            raise PromptError(
                f"{FIELD}: 'segments' is missing; give the fixed spans as [[start, end], ...], "
                "or annotate them by a separator, by messages, or with find"
            )
        annotations = cls(**{**raw, "segments": _spans(raw.get("segments", []))})
        annotations._check()
        return annotations

    def _check(self) -> None:
        for name, most in (("policy", NAME), ("encode", NAME), ("namespace", NAME), ("note", NOTE)):
            if getattr(self, name) is not None or name in ("namespace", "note"):
                check_text(f"{FIELD}: {name}", getattr(self, name), most)
        if self.policy == "":
            raise PromptError(f"{FIELD}: policy must name a system; leave it out for the server's own")
        if self.find is not None and not isinstance(self.find, bool):
            raise PromptError(f"{FIELD}: find must be true or false, not {shown(self.find)}")
        if not isinstance(self.release, bool):
            raise PromptError(f"{FIELD}: release must be true or false, not {shown(self.release)}")
        if self.release and self.history is not None:
            raise PromptError(f"{FIELD}: release ends a session, history goes on with it: give one of them")
        if self.find and (self.segments or self.history is not None):
            raise PromptError(f"{FIELD}: find looks for the fixed spans itself: give no segments and no history")
        if self.encode is not None and self.encode not in ENCODE:
            raise PromptError(f"{FIELD}: encode must be one of {', '.join(ENCODE)}, not {shown(self.encode)}")
        if why := _wrong_rule(self.recompute_ratio, self.layer):
            raise PromptError(f"{FIELD}: {why}")
        if self.history is not None and not _is_count(self.history):
            raise PromptError(f"{FIELD}: history must be the row it starts at, not {shown(self.history)}")
        if self.family is not None:
            self._check_family()

    def _check_family(self) -> None:
        family = self.family
        fits = isinstance(family, Mapping) and set(family) == {"name", "rows"} and isinstance(family["name"], str)
        if not fits or not _is_count(family["rows"]) or not 1 <= family["rows"] < ROW:
            raise PromptError(f"{FIELD}: family must be an object of name and rows, not {shown(family)}")
        if self.history is not None:
            raise PromptError(f"{FIELD}: what a family generates is not retained: give no history")

    def system(self, server: ServerOptions) -> ReusePolicy:
        """The requested reuse policy, or the server's; the server's ratio and layer are those of its own system."""
        name, own = self.policy or server.policy, self.policy in (None, server.policy)
        ratio = server.recompute_ratio if own and self.recompute_ratio is None else self.recompute_ratio
        return policy_of(name, ratio, server.layer if own and self.layer is None else self.layer)

    def prompt(self, token_ids) -> Prompt:
        """The annotated prompt; PromptError if a span, or the start of the history, does not fit it."""
        if self.family is not None:
            if self.family["rows"] > len(token_ids):
                raise PromptError(
                    f"{FIELD}: a family of {self.family['rows']} rows, but the prompt has {len(token_ids)}"
                )
            token_ids = token_ids[: self.family["rows"]]
        if self.history is not None:
            if not 0 <= self.history <= len(token_ids):
                raise PromptError(f"{FIELD}: history starts at row {shown(self.history)} of {len(token_ids)}")
            for start, end in self.segments:
                if start < self.history < end:
                    raise PromptError(f"{FIELD}: history starts inside the segment [{start}, {end})")
        return Prompt.from_spans(token_ids, self.segments)


def _wrong_rule(ratio: Any, layer: Any) -> str:
    """Why a recompute ratio or a selection layer is invalid; empty if both are valid or None."""
    if ratio is not None and (not isinstance(ratio, int | float) or isinstance(ratio, bool)):
        return f"recompute_ratio must be a number in [0, 1], not {shown(ratio)}"
    if ratio is not None and not 0 <= ratio <= 1:
        return f"recompute_ratio must lie in [0, 1], not {shown(ratio)}"
    if layer is not None and not (_is_count(layer) and 0 <= layer < ROW):
        return f"layer must be an integer of at least 0, not {shown(layer)}"
    return ""


def raw_annotations(params: Any) -> Mapping[str, Any] | None:
    """The raw annotations in a request's `kv_transfer_params`; None if there are none, PromptError for a non-object."""
    if params is not None and not isinstance(params, Mapping):
        raise PromptError(f"kv_transfer_params must be an object, not {type(params).__name__}")
    raw = (params or {}).get(FIELD)
    if raw is not None and not isinstance(raw, Mapping):
        raise PromptError(f"{FIELD} must be an object, not {type(raw).__name__}")
    return raw


def annotations_of(prompt: Prompt, **options: Any) -> dict[str, Any]:
    """`kv_transfer_params` for `prompt`, to send with `prompt.token_ids`."""
    spans = [
        [start, start + len(s.token_ids)]
        for s, start in zip(prompt.segments, prompt.starts, strict=True)
        if s.role is Role.REUSE
    ]
    return {FIELD: {"segments": spans, **options}}


def receipt_in(params: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The receipt in an answer's `kv_transfer_params`, under today's names; None if there is none."""
    return renamed.record((params or {}).get(FIELD))


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_ids(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(_is_count(t) and t >= 0 for t in value)


def _names(unknown: list[Any]) -> str:
    rest = f" and {len(unknown) - 8} more" if len(unknown) > 8 else ""
    return ", ".join(sorted(sayable(str(name), 80) for name in unknown[:8])) + rest


def _spans(raw: Any) -> tuple[tuple[int, int], ...]:
    if not isinstance(raw, list | tuple):
        raise PromptError(f"{FIELD}: segments must be a list of [start, end] pairs, not {type(raw).__name__}")
    if len(raw) > SEGMENTS:
        raise PromptError(f"{FIELD}: {len(raw)} segments, of at most {SEGMENTS}")
    for pair in raw:
        if not isinstance(pair, list | tuple) or len(pair) != 2 or not all(map(_is_count, pair)):
            raise PromptError(f"{FIELD}: a segment must be a pair of integers [start, end], not {shown(pair)}")
        if not (-ROW < pair[0] < ROW and -ROW < pair[1] < ROW):
            raise PromptError(f"{FIELD}: a segment lies outside of any prompt: {shown(pair)}")
    return tuple((a, b) for a, b in raw)


_ANNOTATIONS = frozenset(f.name for f in fields(Annotations))
