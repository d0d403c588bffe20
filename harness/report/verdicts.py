"""What a claim of the paper is, and how a run's numbers become a verdict.

A claim about a factor is judged by `grade`: it holds when the measured value reaches the paper's lower end and the 95 %
interval leaves out "no effect"; it points the same way when only the latter is so. A system that is slower than the
rival it is compared with does not reproduce the claim, whatever else holds (`slower`). Verdicts hold for the run's
model and hardware, which are not the paper's.
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any

Summary = dict[str, Any]
Estimate = dict[str, Any]  # value, low, high (None without an interval), n

LEAST = 5  # rounds or runs below which an interval is little more than their range
RATIO = 0.26  # of the reused tokens: the paper's recommendation, Fig. 14
RATIO_TOLERANCE = 0.02


class Verdict(Enum):
    """What a run says about a claim."""

    REPRODUCED = "reproduced"
    PARTLY = "partly"
    NOT_REPRODUCED = "not reproduced"
    NOT_JUDGED = "not judged"
    NOT_RUN = "not run"
    NOT_TESTABLE = "not testable here"


JUDGED = (Verdict.REPRODUCED, Verdict.PARTLY, Verdict.NOT_REPRODUCED)


class Basis(Enum):
    """What the numbers behind a claim are measured on."""

    STRESS = "stress"  # generated tasks made so that reuse can spoil their answers, and models trained for them
    REAL = "real model"  # a pretrained model on real text
    SESSIONS = "recorded sessions"  # prompts of real agents, without a model
    SHAPES = "shapes"  # layers of a real model's shape with random weights
    NOTHING = "–"


@dataclass(frozen=True)
class Finding:
    """A verdict and the measured numbers (or the reason) behind it."""

    verdict: Verdict
    measured: str


@dataclass(frozen=True)
class Claim:
    """One row of the claims table.

    Attributes
    ----------
    key, figure, text, paper : str
        Name of the row, the paper's figure, the claim and the paper's number.
    rule : str
        The rule in words; it begins with "none" where nothing is judged.
    target : str
        The Snakemake target that makes the evidence; "" when none does yet.
    judge : callable
        The rule.
    basis : Basis
        What the evidence is measured on.
    counts_as : str
        The paper's figure (or number of its abstract) that this row is counted under; "" for a question or a prediction
        of this study, and for a rival that the paper does not have.
    """

    key: str
    figure: str
    text: str
    paper: str
    rule: str
    target: str
    judge: Callable[[Summary], Finding]
    basis: Basis
    counts_as: str

    @property
    def has_rule(self) -> bool:
        """Whether some record can give this claim a verdict."""
        return not self.rule.startswith("none")


class NotMeasured(Exception):
    """The run lacks what a rule needs; the message says what."""


class NotJudged(NotMeasured):
    """What a rule needs was measured under conditions that do not allow a verdict; the message says why."""


class Disturbed(NotJudged):
    """What a rule needs was timed beside other work, so that there is nothing to judge; the message says how much."""


class NotTestable(NotMeasured):
    """No record of this kind can speak for or against the claim; the message says why."""


class Grade(Enum):
    """How far one quantity goes along with its claim."""

    NONE, SOME, FULL = range(3)


def grade(estimate: Estimate, target: float, no_effect: float = 1.0) -> Grade:
    """FULL: value >= target and interval above `no_effect`; SOME: only the interval; NONE: otherwise."""
    if estimate["low"] is None or estimate["low"] <= no_effect:
        return Grade.NONE
    return Grade.FULL if estimate["value"] >= target else Grade.SOME


def at_most(estimate: Estimate, limit: float) -> Grade:
    """FULL: the interval ends at or below `limit`; SOME: only the value lies there; NONE: otherwise."""
    if estimate["value"] > limit:
        return Grade.NONE
    return Grade.FULL if estimate["high"] is not None and estimate["high"] <= limit else Grade.SOME


def slower(*factors: Estimate) -> bool:
    """Whether one of the factors by which CacheSlide is faster than a rival lies below 1."""
    return any(factor["value"] < 1 for factor in factors)


def joined(*grades: Grade) -> Verdict:
    """All FULL: reproduced; all NONE: not reproduced; anything between: partly."""
    if all(g is Grade.FULL for g in grades):
        return Verdict.REPRODUCED
    return Verdict.NOT_REPRODUCED if all(g is Grade.NONE for g in grades) else Verdict.PARTLY


def raced(factors: list[Estimate], grades: list[Grade]) -> Verdict:
    """`joined` of `grades`; not reproduced where CacheSlide is slower than a rival."""
    return Verdict.NOT_REPRODUCED if slower(*factors) else joined(*grades)


def judge(claim: Claim, summary: Summary) -> Finding:
    """The finding on `claim`; where there is no verdict, which of "not run", "not judged", "not testable", and why."""
    try:
        return claim.judge(summary)
    except NotJudged as reason:
        return Finding(Verdict.NOT_JUDGED, str(reason))
    except NotTestable as reason:
        return Finding(Verdict.NOT_TESTABLE, str(reason))
    except NotMeasured as reason:
        return Finding(Verdict.NOT_RUN, str(reason))


def not_run(why: str) -> Callable[[Summary], Finding]:
    """A judge for what this code cannot measure yet."""
    return lambda summary: Finding(Verdict.NOT_RUN, why)


def calm(row: dict[str, Any]) -> None:
    """Disturbed, if too few of the timed blocks behind a table's row were undisturbed."""
    if row.get("disturbed"):
        raise Disturbed(row["disturbed"])


def as_in_the_paper(row: dict[str, Any]) -> None:
    """NotJudged, if the row's system recomputed another share of the reused tokens than the paper's 26 %."""
    ratio = row.get("recomputed_share")
    if ratio is not None and abs(ratio - RATIO) > RATIO_TOLERANCE:
        raise NotJudged(
            f"{row['system']} recomputed {100 * ratio:.0f} % of the reused tokens here; the paper's rule is "
            f"{100 * RATIO:.0f} %"
        )
