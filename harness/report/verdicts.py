"""Claims of the paper, and the grading of a run's numbers into verdicts.

A claim about a factor is judged by `grade`: it holds when the measured value reaches the paper's lower end and the 95 %
interval excludes "no effect"; it has the same sign when only the latter is so. A system slower than the rival it is
compared with does not reproduce the claim (`slower`). Verdicts hold for the run's
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
    """Verdict of a run on a claim."""

    REPRODUCED = "reproduced"
    PARTLY = "partly"
    NOT_REPRODUCED = "not reproduced"
    NOT_JUDGED = "not judged"
    NOT_RUN = "not run"
    NOT_TESTABLE = "not testable here"


JUDGED = (Verdict.REPRODUCED, Verdict.PARTLY, Verdict.NOT_REPRODUCED)


class Basis(Enum):
    """Kind of data behind a claim's numbers."""

    STRESS = "stress"  # generated tasks whose answers depend on reuse, and models trained for them
    REAL = "real model"  # a pretrained model on real text
    SESSIONS = "recorded sessions"  # prompts of real agents, without a model
    SHAPES = "shapes"  # layers of a real model's shape with random weights
    NOTHING = "–"


@dataclass(frozen=True)
class Finding:
    """A verdict with its measured numbers, or its reason."""

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
        The rule in words; begins with "none" where nothing is judged.
    target : str
        The Snakemake target of the evidence; "" without one.
    judge : callable
        The rule.
    basis : Basis
        Kind of data behind the evidence.
    counts_as : str
        The paper's figure (or abstract number) under which this row is counted; "" for this study's own questions and
        predictions, and for a rival absent from the paper.
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
        """Whether a rule can give this claim a verdict."""
        return not self.rule.startswith("none")


class NotMeasured(Exception):
    """The run lacks a measurement that a rule needs; the message names it."""


class NotJudged(NotMeasured):
    """The measurement's conditions do not allow a verdict; the message gives the reason."""


class Disturbed(NotJudged):
    """The timings were disturbed by other work and allow no verdict; the message gives the extent."""


class NotTestable(NotMeasured):
    """Records of this kind are no evidence for or against the claim; the message gives the reason."""


class Grade(Enum):
    """Agreement of one quantity with its claim."""

    NONE, SOME, FULL = range(3)


def grade(estimate: Estimate, target: float, no_effect: float = 1.0) -> Grade:
    """FULL: value >= target and interval above `no_effect`; SOME: only the latter; NONE: otherwise."""
    if estimate["low"] is None or estimate["low"] <= no_effect:
        return Grade.NONE
    return Grade.FULL if estimate["value"] >= target else Grade.SOME


def at_most(estimate: Estimate, limit: float) -> Grade:
    """FULL: the interval ends at or below `limit`; SOME: only the value does; NONE: otherwise."""
    if estimate["value"] > limit:
        return Grade.NONE
    return Grade.FULL if estimate["high"] is not None and estimate["high"] <= limit else Grade.SOME


def slower(*factors: Estimate) -> bool:
    """Whether any of CacheSlide's speedup factors over rivals is below 1."""
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
    """The finding on `claim`; without a verdict, one of "not run", "not judged", "not testable" with its reason."""
    try:
        return claim.judge(summary)
    except NotJudged as reason:
        return Finding(Verdict.NOT_JUDGED, str(reason))
    except NotTestable as reason:
        return Finding(Verdict.NOT_TESTABLE, str(reason))
    except NotMeasured as reason:
        return Finding(Verdict.NOT_RUN, str(reason))


def not_run(why: str) -> Callable[[Summary], Finding]:
    """A rule that always gives "not run" with the reason `why`."""
    return lambda summary: Finding(Verdict.NOT_RUN, why)


def calm(row: dict[str, Any]) -> None:
    """Raises Disturbed if too few of the timed blocks of a table's row were undisturbed."""
    if row.get("disturbed"):
        raise Disturbed(row["disturbed"])


def as_in_the_paper(row: dict[str, Any]) -> None:
    """Raises NotJudged if the row's system recomputed a share of the reused tokens other than the paper's 26 %."""
    ratio = row.get("recomputed_share")
    if ratio is not None and abs(ratio - RATIO) > RATIO_TOLERANCE:
        raise NotJudged(
            f"{row['system']} recomputed {100 * ratio:.0f} % of the reused tokens here; the paper's rule is "
            f"{100 * RATIO:.0f} %"
        )
