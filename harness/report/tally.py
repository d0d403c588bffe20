"""Number of the paper's figures that a run reproduces, each counted once whatever its number of rows."""

from collections.abc import Iterable, Sequence

from harness.report.verdicts import JUDGED, Claim, Finding, Verdict

WITHOUT = (Verdict.NOT_JUDGED, Verdict.NOT_TESTABLE, Verdict.NOT_RUN)  # by precedence


def by_figure(claims: Iterable[Claim], findings: Iterable[Finding]) -> dict[str, Verdict]:
    """The verdict on each of the paper's figures; this study's own rows are omitted."""
    rows: dict[str, list[Verdict]] = {}
    for claim, finding in zip(claims, findings, strict=True):
        if claim.counts_as:
            rows.setdefault(claim.counts_as, []).append(finding.verdict)
    return {figure: together(verdicts) for figure, verdicts in rows.items()}


def together(verdicts: Sequence[Verdict]) -> Verdict:
    """One verdict of a figure's rows.

    Rows with a verdict: all reproduced gives reproduced, or partly where another row has none; all not reproduced gives
    not reproduced; else partly. Without any verdict: not judged before not testable before not run.
    """
    judged = {v for v in verdicts if v in JUDGED}
    if not judged:
        return next(v for v in WITHOUT if v in verdicts)
    if judged == {Verdict.NOT_REPRODUCED}:
        return Verdict.NOT_REPRODUCED
    complete = all(v in JUDGED for v in verdicts)
    return Verdict.REPRODUCED if complete and judged == {Verdict.REPRODUCED} else Verdict.PARTLY


def counts(verdicts: Iterable[Verdict]) -> dict[str, int]:
    """Number of figures by verdict, every verdict named."""
    each = list(verdicts)
    return {v.value: each.count(v) for v in Verdict}


def sentence(claims: Sequence[Claim], findings: Sequence[Finding]) -> str:
    """The counts in words with their figures; the study's own rows separately."""
    figures = by_figure(claims, findings)
    parts = []
    for verdict in Verdict:
        named = [figure for figure, v in figures.items() if v is verdict]
        if named or verdict in JUDGED:
            parts.append(f"{len(named)} {verdict.value}" + (f" ({', '.join(named)})" if named else ""))
    own = counts(f.verdict for c, f in zip(claims, findings, strict=True) if not c.counts_as)
    rest = ", ".join(f"{n} {name}" for name, n in own.items() if n)
    return (
        f"Of {len(figures)} figures and headline numbers of the paper, each counted once over its rows below: "
        f"{', '.join(parts)}. Of {sum(own.values())} questions of this study's own: {rest}."
    )
