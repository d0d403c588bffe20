"""The result file of every figure: made-up records, and committed results where a figure has no other source."""

from pathlib import Path

from harness.inventory import AGENT_FIGURES
from harness.results.records import write_json
from harness.results.reproduction import summarise
from harness.results.summary import summarize
from tests.helpers import made_run
from tests.helpers.made_agents import make_agents
from tests.helpers.made_frontier import frontier_result
from tests.helpers.made_reproduction import make_records, short_plan
from tests.helpers.places import ROOT

SYSTEMS = ["recompute", "context_cache", "cacheblend", "cacheblend_stale", "naive_reuse", "cacheslide"]


def figure_sources(root: Path) -> dict[str, str | Path]:
    """Figure name -> its result file; made-up ones are written under `root`."""
    cfg, paths = made_run.make_run(root, {"systems": SYSTEMS}, prompts_each=5)
    agents = make_agents(root / "agents")
    summarize(cfg, root / "summary.json", **paths, agents=list(agents.values()))
    prompts = paths["prompts"]
    return {
        **{figure: agents[section] for section, figure in AGENT_FIGURES.items()},
        "fig03": prompts,
        "fig04a": paths["cksim"],
        "fig05": prompts,
        "fig10": str(root / "summary.json"),
        "throughput": paths["throughput"],
        "real": str(ROOT / "results/real/summary.json"),
        "fig03_real": str(ROOT / "results/real/sessions.json"),
        "serving": str(ROOT / "results/h200/serving.json"),
        "wca": made_run.wca_summary(root / "wca.json"),
        "reproduction": _reproduction(root),
        "frontier": _written(root / "frontier.json"),
        **{f"fig12{part}": ROOT / "results/slide/summary.json" for part in "abcd"},
    }


def _written(path: Path) -> Path:
    write_json(path, frontier_result())
    return path


def _reproduction(root: Path) -> Path:
    names = ("h200", "h200-x2")
    folders = [make_records(root / "gpu" / n, short_plan(n)) for n in names]
    made = summarise(folders, *(ROOT / f"results/real/{name}.json" for name in ("summary", "confirm")))
    write_json(root / "reproduction.json", made)
    return root / "reproduction.json"
