"""WCA and CacheBlend: recompute the reused tokens whose KV deviates most at one layer, from that layer on.

WCA is the paper's section 4.3, Alg. 2. Its ambiguous points are options, so that they can be measured: the fusion rule,
the reading of "converged", the layer whose keys are compared, and the state from which a late token starts.
"""

from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor

from cacheslide.errors import PolicyError
from cacheslide.policies.deviation import Fusion, check_ratio
from cacheslide.policies.layer_selection import LayerSelection
from cacheslide.policies.top_deviation_run import TopDeviationRun


@dataclass(frozen=True)
class Swap:
    """Alg. 2, step 3: every `every` layers converged rows leave permanently and the next by deviation enter.

    `reading` "distance": converged if 1 - CKSim < tau (sensible, since CKSim is a similarity); "literal": if
    CKSim < tau, as the paper prints it. `start`, unspecified in the paper: an entering row continues from its state at
    the selection layer, where it "stopped", or from its cached "inputs" of this layer, which the chunks must hold.
    """

    tau: float = 0.12
    every: int = 4
    reading: Literal["distance", "literal"] = "distance"
    start: Literal["stopped", "inputs"] = "stopped"

    def __post_init__(self) -> None:
        if self.every < 1:
            raise PolicyError(f"swap.every must be at least 1, not {self.every}")

    def converged(self, similarity: Tensor) -> Tensor:
        """Bool [n] from the CKSim [n] of fresh and cached keys, over the heads of all ranks."""
        return (1 - similarity < self.tau) if self.reading == "distance" else (similarity < self.tau)


@dataclass(frozen=True)
class Promotion:
    """After `layer`, the `recompute_ratio` of reused rows that deviates most joins, from its cached layer input."""

    layer: int
    recompute_ratio: float

    def __post_init__(self) -> None:
        check_ratio("promotion share", self.recompute_ratio)


@dataclass(frozen=True)
class TopDeviation(LayerSelection):
    """WCA and CacheBlend: recompute the reused rows whose KV deviates most at layer `layer`.

    Layers below `layer` (0-based) are computed in full. `recompute_ratio` is of the reused rows. `constant` is the
    weight of the "constant" fusion. `promote` adds rows at later layers and needs cached layer inputs. A recomputed row
    `attends` to "all" rows before it or, as section 4.3 prints it, to "updated" text (and itself) alone.
    """

    recompute_ratio: float
    layer: int = 1
    metric: Literal["k", "v", "kv"] = "k"
    fusion: Fusion = "replace"
    constant: float = 1.0
    swap: Swap | None = None
    promote: tuple[Promotion, ...] = ()
    attends: Literal["all", "updated"] = "all"

    def __post_init__(self) -> None:
        check_ratio("recompute_ratio", self.recompute_ratio)
        check_ratio("constant", self.constant)
        if self.layer < 0:
            raise PolicyError(f"layer must be at least 0, not {self.layer}")
        layers = [p.layer for p in self.promote]
        if layers != sorted(set(layers)) or (layers and layers[0] < self.layer):
            raise PolicyError("promotion layers must be increasing and not lie below the selection layer")
        if self.swap and self.promote:
            raise PolicyError("swap and promotion are two answers to one question: choose one")
        if self.attends not in ("all", "updated"):
            raise PolicyError(f"attends must be 'all' or 'updated', not {self.attends!r}")
        if self.promote and self.attends == "updated":
            raise PolicyError("promoted rows attend to all text: attends='updated' goes without promotion")

    def at_ratio(self, ratio: float) -> "TopDeviation":
        """The same rule recomputing `ratio` of the reused rows in total, its promotions scaled in proportion."""
        total = self.total_ratio
        if not self.promote or not total:
            return replace(self, recompute_ratio=ratio)
        scale = ratio / total  # 1.0, exactly, at the rule's own share
        return replace(
            self,
            recompute_ratio=self.recompute_ratio * scale,
            promote=tuple(replace(p, recompute_ratio=p.recompute_ratio * scale) for p in self.promote),
        )

    @property
    def probe_layers(self) -> frozenset[int]:
        """See `Correction.probe_layers`: promotion restarts tokens from cached layer inputs."""
        return frozenset(p.layer for p in self.promote)

    @property
    def total_ratio(self) -> float:
        """See `Correction.total_ratio`: the selection and its promotions."""
        return self.recompute_ratio + sum(p.recompute_ratio for p in self.promote)

    def at_layer(self, layer: int) -> "TopDeviation":
        """The same rule selecting at `layer`; promotion layers below it move up to it."""
        first = self.promote[0].layer if self.promote else layer
        shift = max(0, layer - first)
        promote = tuple(Promotion(p.layer + shift, p.recompute_ratio) for p in self.promote)
        return replace(self, layer=layer, promote=promote)

    def begin(self, tokens) -> TopDeviationRun:
        """See `Correction.begin`."""
        return TopDeviationRun(self, tokens)
