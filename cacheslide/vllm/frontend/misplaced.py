"""Refuses annotations at a place where they would be ignored, naming the right place.

A request's annotations are the object `cacheslide` in `kv_transfer_params`. The search of an HTTP body skips user data:
schemas, arguments of tools, metadata.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from cacheslide.errors import PromptError
from cacheslide.renamed import REQUEST
from cacheslide.vllm.limits import DEPTH, check_depth, sayable
from cacheslide.vllm.options import DOOR_KEYS, FIELD, Annotations, raw_annotations

PARAMS = "kv_transfer_params"
_PLACES = ((PARAMS, FIELD), ("sampling_params", "extra_args", PARAMS, FIELD))
_OWN = frozenset(Annotations.__dataclass_fields__) | set(DOOR_KEYS) | REQUEST.keys()
_USERS = frozenset(  # keys whose objects hold user data
    "tools functions response_format structured_outputs guided_json json_schema schema input_schema parameters "
    "arguments input metadata documents chat_template_kwargs default properties".split()
)
_NO_ANNOTATIONS = frozenset(
    "/tokenize /detokenize /generative_scoring /v1/messages/count_tokens /v1/embeddings /v2/embed /pooling /classify "
    "/score /v1/score /rerank /v1/rerank /v2/rerank".split()
)


def check_places(params: Mapping[str, Any] | None, extra: Mapping[str, Any]) -> None:
    """Raise PromptError for annotations beside or below the place where they belong.

    `params` are a request's `kv_transfer_params`, of bounded depth; `extra` holds the keys beside them (`extra_args`).
    """
    for name in extra:
        if _alike(name):
            raise PromptError(_belongs(f"extra_args.{name}"))
    if params is None:
        return
    for name in params:
        if name != FIELD and (_alike(name) or name in _OWN):
            raise PromptError(_belongs(f"{PARAMS}.{name}"))
    for name, value in params.items():
        if name != FIELD:
            for way in _named(value, (PARAMS, name), frozenset()):
                raise PromptError(_belongs(".".join(map(str, way))))


def misplaced(path: str, body: Any) -> str:
    """The error in the places of annotations in a request's parsed JSON body to `path`; "" if there is none.

    Time is linear in the body. Levels below `DEPTH` are skipped here; annotations there are refused on reading.
    """
    for name in (PARAMS, "sampling_params"):
        try:
            check_depth({name: body.get(name)} if isinstance(body, Mapping) else {}, name)
        except PromptError as error:
            return str(error)
    ways = list(_named(body, (), _USERS))
    here = [way for way in ways if way in _PLACES]
    if len(here) > 1:
        return f"annotations are given twice, in {' and in '.join(map('.'.join, here))}: choose one place"
    for way in ways:
        if way in _PLACES:
            if path in _NO_ANNOTATIONS:
                return f"{path} takes no annotations: {'.'.join(way)} would not be read"
            if path.endswith("/render") and (wrong := _malformed(body, way)):
                return wrong
        elif not any(way[: len(place)] == place for place in _PLACES):
            return _belongs(".".join(map(str, way)))
    return ""


def _malformed(body: Mapping[str, Any], way: tuple[str, ...]) -> str:
    """The error in annotations that are only passed on, as far as it is visible without the text; "" for none."""
    annotations = body
    for name in way:
        annotations = annotations[name]
    try:
        raw = raw_annotations({FIELD: annotations})
        if raw is not None and any(name in raw for name in DOOR_KEYS):  # spans are made from these and the text
            raw = {name: value for name, value in raw.items() if name not in DOOR_KEYS} | {"segments": []}
        Annotations.parse({FIELD: raw})
    except PromptError as error:
        return str(error)
    return ""


def _belongs(place: str) -> str:
    return f"{sayable(place, 200)} is not where annotations are read: they belong in {PARAMS}.{FIELD}"


def _alike(name: Any) -> bool:
    if not isinstance(name, str) or len(name) > 64:
        return False
    return name.rpartition(".")[2].lower().replace("_", "").replace("-", "") == FIELD


def _named(value: Any, way: tuple, users: frozenset[str]) -> Iterator[tuple]:
    """Paths to keys like `cacheslide` inside `value`, which lies at `way`; skips objects of `users`."""
    level = [(way, value)]
    for _ in range(DEPTH):
        below: list[tuple[tuple, Any]] = []
        for at, outer in level:
            named = isinstance(outer, Mapping)
            for name, inner in outer.items() if named else enumerate(outer) if isinstance(outer, list | tuple) else ():
                if named and _alike(name):
                    yield (*at, name)
                users_own = named and name in users and (at or name != "input")  # a request's own input holds messages
                if isinstance(inner, dict | list | tuple) and not users_own:
                    below.append(((*at, name), inner))
        level = below
