"""report.html: one self-contained file made from summary.json and the figures."""

import base64
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from cacheslide.errors import DataError
from harness.report import claims_sessions, prose, table, words
from harness.report import real as real_model
from harness.results.headline import KEYS
from harness.results.provenance import ROOT
from harness.results.runs import read_json
from harness.results.summary import SCHEMA

HERE = Path(__file__).parent
# Committed results: SLIDE, the real-model study and recorded sessions are not part of a configuration's run.
SLIDE = ROOT / "results/slide/summary.json"
REAL = ROOT / "results/real/summary.json"
SESSIONS = ROOT / "results/real/sessions.json"
MEDIA = {".svg": "image/svg+xml", ".png": "image/png"}


def read_summary(
    path: str | Path, slide: str | Path | None = SLIDE, real: str | Path | None = REAL,
    sessions: str | Path | None = SESSIONS,
) -> dict[str, Any]:  # fmt: skip
    """A run's summary.json, with separately measured results under `slide`, `real` and `sessions`.

    Missing files are omitted. DataError for a file of another schema.
    """
    summary = read_json(path)
    if summary.get("schema") != SCHEMA:
        raise DataError(f"{path}: schema {summary.get('schema')!r}, expected {SCHEMA!r}")
    for name, file in (("slide", slide), ("real", real), ("sessions", sessions)):
        if file and Path(file).is_file():
            summary = summary | {name: read_json(file)}
    if "real" in summary:
        real_model.check(summary["real"], real)
    if "sessions" in summary:
        claims_sessions.check(summary["sessions"], sessions)
    return summary


def build_report(
    summary_path: str | Path,
    figures: Iterable[str | Path],
    output: str | Path,
    slide: str | Path | None = SLIDE,
    real: str | Path | None = REAL,
    sessions: str | Path | None = SESSIONS,
) -> None:
    """Write the report of a run.

    Parameters
    ----------
    summary_path : path
        summary.json, the source of every number except those of SLIDE, the real model and recorded sessions.
    figures : iterable of path
        Figure files; the vector form is embedded, or PNG where there is none.
    output : path
    slide : path
        Summary of SLIDE's experiments; without the file their claims are "not run".
    real : path
        Summary of the study on a real model, which leads the report; without the file there is no such section. Its
        figures lie in figures/real beside that results folder.
    sessions : path
        Summary of recorded sessions, on which figure 5 is judged.
    """
    summary = read_summary(summary_path, slide, real, sessions)
    own: dict[str, str] = {}
    if "real" in summary:
        folder = Path(real).parents[2] / "figures" / Path(real).parent.name
        own = embed(path for name in real_model.FIGURES if (path := folder / f"{name}.svg").is_file())
    html = render(summary, embed(figures), own)
    output = Path(output)
    part = output.with_name(f".{output.name}.part")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(html, encoding="utf-8")
        part.replace(output)
    except OSError as full:
        part.unlink(missing_ok=True)
        raise DataError(f"cannot write {output}: {full}") from None


def embed(figures: Iterable[str | Path]) -> dict[str, str]:
    """Figure name -> data URI. Images, not inline SVG, so that the figures' ids cannot clash."""
    best: dict[str, Path] = {}
    for path in map(Path, figures):
        if path.suffix in MEDIA and (path.stem not in best or path.suffix == ".svg"):
            best[path.stem] = path
    out = {}
    for name, path in best.items():
        if not path.is_file():
            raise DataError(f"figure {path} does not exist")
        out[name] = f"data:{MEDIA[path.suffix]};base64,{base64.b64encode(path.read_bytes()).decode()}"
    return out


def render(summary: Mapping[str, Any], images: Mapping[str, str], of_real: Mapping[str, str] | None = None) -> str:
    """The report as HTML; `of_real` holds the figures of the study on a real model."""
    of_real = of_real or {}
    images = {name: image for name, image in images.items() if name not in of_real}
    environment = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"cell": words.cell, "percent": words.percent, "number": words.number, "size": words.size}
    summary = dict(summary)
    claims = table.rows(summary)
    return environment.get_template("report.html.j2").render(
        s=summary,
        run=summary["run"],
        opening=prose.opening(summary, table.counted(claims)),
        tasks=table.tasks_of(summary) or "stress task",
        headline={key: summary["headline"][key] for key in KEYS},
        requirements=prose.requirements(summary),
        real=real_model.section(summary["real"]) if "real" in summary else None,
        real_figures=captioned(of_real),
        claims=[(r.claim, r.finding, command(r.claim.target, summary["run"]), r) for r in claims],
        figures=captioned(images),
        reruns=[(name, command(name, summary["run"])) for name in (*images, f"results/{summary['run']}/summary.json")],
        everything=command("reproduce-all", summary["run"]),
        accuracy=by_system(summary["accuracy"]),
        equal_share=by_system(summary["equal_share"]),
    )


def captioned(images: Mapping[str, str]) -> list[tuple[str, str, str]]:
    """Name, image and caption of each figure."""
    return [(name, image, prose.CAPTIONS.get(name, name)) for name, image in images.items()]


def command(target: str, run: str) -> str:
    """The shell command that makes `target`; options come last, since --configfile takes several values."""
    return f".venv/bin/snakemake {target.format(run=run)} --configfile config/{run}.yaml" if target else ""


def by_system(rows: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Accuracy rows as a table: scopes across, systems down; plus the depths and question kinds that occur."""
    rows = [r for r in rows if r["questions"]]
    table: dict[str, dict[str, Any]] = {}
    for row in rows:
        table.setdefault(row["system"], {"title": row["title"]})[f"{row['scope']}:{row['name']}"] = row
    mixes = [r for r in rows if r["scope"] == "mix"]
    return {
        "systems": list(table.values()),
        "mixes": list(dict.fromkeys(r["name"] for r in mixes)),
        "datasets": list(dict.fromkeys(r["name"] for r in rows if r["scope"] == "dataset")),
        "depths": sorted({d["depth"] for r in mixes for d in r["by_depth"]}),
        "cksim": any(r["cksim_by_layer"] for r in mixes),
        "layers": max((len(r["cksim_by_layer"]) for r in mixes if r["cksim_by_layer"]), default=0),
    }
