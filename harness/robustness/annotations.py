"""Hostile annotations for the campaigns: plausible objects, and values of every type in every place."""

import random
from typing import Any

WAYS = ("segments", "separator", "messages", "find")
OTHERS = (
    "policy",
    "recompute_ratio",
    "share",
    "layer",
    "namespace",
    "encode",
    "history",
    "release",
    "note",
    "roles",
    "family",
    "cacheslide",
    "ü",
    "",
)
POLICIES = (
    "cacheslide",
    "cacheslide_promotion",
    "cacheblend",
    "epic",
    "promptcache",
    "recompute",
    "naive_reuse",
    "nobody",
)
VALUES = (
    *(None, True, False, 0, 1, -1, 7, 2**31, 2**31 - 1, 2**63, 2**64, -(2**63) - 1, 10**30, 10**400, -(10**30)),
    *(0.0, 0.26, -0.5, 1.5, 1e308, 5e-324, float("nan"), float("inf"), -float("inf")),
    *(
        "",
        "cacheslide",
        "auto",
        "reuse",
        "\ud800",
        "ünï\0",
        "\0",
        "x" * 5000,
        "[7]",
        "{}",
        [],
        {},
        [[]],
        [{}],
        {"": {}},
    ),
)


class Annotations:
    """Generates annotations for a prompt of `rows` tokens from a seed.

    `separators` are separators that may occur in the prompt, as text or ids.
    """

    def __init__(self, seed: int, rows: int, separators: tuple[Any, ...]) -> None:
        self.random, self.rows, self.separators = random.Random(seed), rows, separators

    def value(self, depth: int = 0) -> Any:
        """Any value of JSON as Python parses it (NaN, lone surrogates and integers of any size included)."""
        r = self.random
        kind = r.random()
        if kind < 0.8 or depth > 3:
            return r.choice(VALUES)
        if kind < 0.805:
            return self.deep(r.choice((40, 200, 400)))
        if kind < 0.9:
            return [self.value(depth + 1) for _ in range(r.randrange(4))]
        return {r.choice((*OTHERS, *WAYS)): self.value(depth + 1) for _ in range(r.randrange(3))}

    def deep(self, levels: int) -> list[Any]:
        """A list nested `levels` deep."""
        out: list[Any] = []
        for _ in range(levels):
            out = [out]
        return out

    def row(self) -> int:
        """A row of the prompt, at its edge, or far outside."""
        r = self.random
        if r.random() < 0.8:
            return r.randrange(self.rows + 1)
        return r.choice((-1, self.rows + 1, 10**6, 2**31, 2**40, 2**63, 2**64))

    def spans(self) -> Any:
        """Spans in order, spans in any order, too many, or no spans at all."""
        r = self.random
        kind = r.random()
        if kind < 0.15:
            return [[0, 32]]  # the same chunks for many tenants
        if kind < 0.5:
            cuts = sorted(r.sample(range(self.rows + 1), 2 * r.randint(1, 6)))
            return [list(pair) for pair in zip(cuts[::2], cuts[1::2], strict=True)]
        if kind < 0.8:
            return [[self.row(), self.row()] for _ in range(r.randrange(5))]
        if kind < 0.802:
            return [[i % self.rows, i % self.rows + 1] for i in range(r.choice((4097, 20_000)))]
        return [[self.value(), self.value()]] if kind < 0.9 else self.value()

    def of(self, name: str) -> Any:
        """A plausible value for the key `name`."""
        r = self.random
        given = {
            "segments": self.spans,
            "separator": lambda: r.choice((*self.separators, True, False, [7, 7], [10**9], "@@", ["a"])),
            "roles": lambda: r.choice((["reuse", "recompute", "reuse"], ["reuse"], ["reuse"] * 9, "reuse", {"a": 1})),
            "messages": lambda: r.choice(
                [
                    *("auto", ["reuse"] * 4, {"updated": [self.row()]}, {"fixed": [r.randrange(-5, 5)]}),
                    *({"roles": self.value()}, {"roles": {"user": "recompute"}, "fixed": self.value()}),
                    {"updated": self.value()},
                ]
            ),
            "find": lambda: r.random() < 0.8,
            "policy": lambda: r.choice(POLICIES),
            "recompute_ratio": lambda: r.choice((r.random(), 0, 1, 1.0)),
            "share": lambda: r.choice((r.random(), 0, 1, 1.0)),
            "layer": lambda: r.randrange(12),
            "namespace": lambda: r.choice(("a", "a\0b", "\0", "b")),
            "encode": lambda: r.choice(("now", "later", "off", "never")),
            "history": self.row,
            "release": lambda: r.random() < 0.8,
            "note": lambda: "n" * r.choice((1, 30, 1024, 1025, 30_000)),
            "family": lambda: {"name": r.choice("fg"), "rows": self.row()},
        }
        return given[name]() if name in given else self.value()

    def annotations(self) -> Any:
        """A value for the key `cacheslide`."""
        r = self.random
        if r.random() < 0.02:
            return self.value()
        names = [r.choice(WAYS)] + [name for name in OTHERS if r.random() < (0.25 if name == "namespace" else 0.1)]
        if r.random() < 0.05:
            names.append(r.choice(WAYS))
        return {name: self.value() if r.random() < 0.12 else self.of(name) for name in names}

    def params(self) -> Any:
        """A value for `kv_transfer_params`."""
        r = self.random
        kind = r.random()
        if kind < 0.92:
            return {"cacheslide": self.annotations()}
        if kind < 0.96:
            return {r.choice(("x", "CacheSlide", "cache_slide", "share", "segments", "do_remote_decode")): self.value()}
        return {"x": self.value(), "cacheslide": self.annotations()}

    def salt(self) -> str | None:
        """A request's `cache_salt`."""
        return self.random.choice((None, None, "s", "b\0c", "\0cacheslide:1:as", "c"))
