"""Arms timed by `engine_ttft` beside plain requests: a system at a recompute ratio, with or without CUDA graphs."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

from harness.comma_lists import floats, names

_LAUNCHED = "+launched"
_GRAPHS = {"on": True, "off": False}


@dataclass(frozen=True)
class Arm:
    """One way to serve the annotated prompts.

    Attributes
    ----------
    system : str
        A registered policy.
    ratio : float or None
        Its recompute ratio; None for the system's own.
    graphs : bool
        Whether layers may be replayed from CUDA graphs (`ServerOptions.executor_graphs`).
    """

    system: str
    ratio: float | None = None
    graphs: bool = True

    @property
    def name(self) -> str:
        """Its name in records: `cacheslide@0.26`, `cacheslide` at its own ratio, `…+launched` without graphs."""
        ratio = "" if self.ratio is None else f"@{self.ratio:g}"
        return f"{self.system}{ratio}{'' if self.graphs else _LAUNCHED}"

    @classmethod
    def parse(cls, name: str) -> "Arm":
        """The arm named `name` in records."""
        system, _, ratio = name.removesuffix(_LAUNCHED).partition("@")
        return cls(system, float(ratio) if ratio else None, not name.endswith(_LAUNCHED))


def add_arguments(parser: argparse.ArgumentParser, ratios: Sequence[float]) -> None:
    """Add the options that select the arms; `ratios` is the default."""
    parser.add_argument("--systems", type=names, default=["cacheslide"], help="policies, each at every ratio")
    parser.add_argument("--recompute-ratios", "--shares", type=floats, default=list(ratios))
    parser.add_argument("--graphs", type=_graphs, default=[True], help="on, off or on,off: replay layers of reuse")


def arms(args: argparse.Namespace) -> list[str]:
    """The names of the requested arms."""
    return [Arm(s, r, on).name for s in args.systems for r in args.recompute_ratios for on in args.graphs]


def _graphs(text: str) -> list[bool]:
    if wrong := set(text.split(",")) - set(_GRAPHS):
        raise argparse.ArgumentTypeError(f"on, off or on,off, not {min(wrong)!r}")
    return [_GRAPHS[x] for x in text.split(",")]
