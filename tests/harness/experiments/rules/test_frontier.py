"""The frontier of the ledger task: its settings, the choice of layers on prompts of their own, resuming, early ends."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cacheslide.errors import ConfigError, PromptError
from cacheslide.policies.base import ReusePolicy, unchanged
from cacheslide.policies.question_aware import QuestionAware
from harness.experiments.real.arms import frontier as real_frontier
from harness.experiments.rules import frontier, frontier_work
from harness.experiments.rules.frontier_cells import ASKED, LAYERS, RATIOS, RECOMPUTE, batches, settings
from harness.experiments.rules.frontier_work import Task, Waiting
from harness.results.records import read_file
from harness.results.runs import read_json
from harness.tasks.data import draw_examples
from harness.training.ledger.checkpoint import export
from harness.training.ledger.model import LedgerModel, Size
from harness.training.ledger.tokens import ledger_tokenizer

pytestmark = pytest.mark.slow
TINY = Size(layers=6, hidden=32, heads=2, kv_heads=1, head_dim=16, ff=48, positions=4096)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """An untrained ledger model."""
    torch.manual_seed(1)
    out = tmp_path_factory.mktemp("models") / "seed-0"
    export(LedgerModel(TINY), ledger_tokenizer()[0], out)
    return out


def command(model: Path, out: Path, *more: str) -> None:
    given = ["--models", str(model), "--out", str(out), "--datasets", "hotpotqa-ledger", "--tokens", "800"]
    frontier.main([*given, "--prompts", "1", "--layer-prompts", "1", "--jobs", "0", *more])


def bare(policy: ReusePolicy) -> ReusePolicy:
    """The policy without its transform, of which equal ones are not equal."""
    return replace(policy, transform=unchanged)


@pytest.mark.parametrize("layers", [2, 6, 24])
def test_settings_fit_the_model_and_have_the_rules_of_the_real_study(layers):
    found = settings(layers)
    cells = [c for s in found for c in s.cells.values()]
    assert len({s.name for s in found}) == len(found) and len({c.name for c in cells}) == len(cells)
    for s in found:
        for layer, cell in s.cells.items():
            cell.policy.check(layers)
            assert cell.policy.correction.selection_layer in (None, layer) and cell.option == s.name
            assert s.ratio is None or cell.policy.correction.total_ratio == pytest.approx(s.ratio)
            assert cell.asks is (isinstance(cell.policy.correction, QuestionAware) or s.line == "ProphetKV")
    same = {a.name: bare(a.policy) for a in real_frontier() if a.policy is not None}
    shared = [c for c in cells if c.name in same]
    assert len(shared) > 30 and all(bare(c.policy) == same[c.name] for c in shared)
    if layers == 24:
        assert {tuple(s.cells) for s in found if s.layered} == {LAYERS, ASKED}
        assert {s.line for s in found} >= set(RATIOS) | {"KVComm", "Cache-Craft", "Reordered", "Window padding"}


def test_batches_hold_every_cell_once_and_share_caches():
    cells = [c for s in settings(24) for c in s.cells.values()]
    made = batches(cells, 4)
    assert Counter(c.name for group in made for c in group) == Counter(c.name for c in cells)
    assert max(map(len, made)) == 4 and all(len(group) == 1 for group in made if group[0].asks)
    assert all(len({(c.policy.recipe, c.policy.needs_scores) for c in group}) == 1 for group in made)


def test_the_most_urgent_task_is_first_also_when_added_late():
    [example] = draw_examples("hotpotqa-ledger", "test", 0, 1, 800)
    waiting = Waiting()
    for urgency, part in ((3, "d"), (0, "b"), (0, "c"), (-1, "a")):
        waiting.add(urgency, Task("m", part, example, ()))
    assert [waiting.pop().part for _ in range(len(waiting))] == ["a", "b", "c", "d"]


def test_a_run_chooses_layers_apart_reports_the_rest_and_measures_nothing_twice(model, tmp_path, capsys):
    out = tmp_path / "frontier.json"
    command(model, out)
    records = read_file(tmp_path / "frontier" / "seed-0.jsonl").records
    parts = {part: [r for r in records if r["part"] == part] for part in ("layers", "reported")}
    assert all("validation" in r["example"] for r in parts["layers"])
    assert all("test" in r["example"] for r in parts["reported"])
    found = settings(TINY.layers)
    assert len(parts["layers"]) == sum(len(s.cells) for s in found if s.layered)
    assert len(parts["reported"]) == len(found)  # each setting at one layer
    result = read_json(out)
    [told] = result["models"]
    assert told["complete"] and told["prompts"] == told["layer_prompts"] == 1 and not result["not_measured"]
    rows = {r["setting"]: r for r in result["rows"]}
    assert list(rows) == [s.name for s in found] and rows[RECOMPUTE]["loss_points"]["value"] == 0
    for s in found:
        layer = rows[s.name]["by_model"]["seed-0"]["layer"]
        assert (layer in s.cells) if s.layered else layer is None
        assert any(r["cell"] == s.cells[layer].name for r in parts["reported"])
    assert f"{RECOMPUTE:46s} compute 1.00" in capsys.readouterr().out
    monkey = pytest.MonkeyPatch()
    with monkey.context() as patch:
        patch.setattr(frontier_work, "measure_task", None)
        command(model, out)
    again = read_json(out)
    assert again["rows"] == result["rows"]


def test_a_run_cut_short_says_so_and_goes_on(model, tmp_path, monkeypatch, capsys):
    out = tmp_path / "frontier.json"
    with pytest.raises(SystemExit):
        monkeypatch.setattr("sys.argv", ["frontier"])
        frontier.command(lambda: command(model, out, "--minutes", "0"))
    assert "nothing was measured on the reported prompts" in capsys.readouterr().err and not out.exists()
    passed = iter(range(10_000))
    monkeypatch.setattr(frontier_work, "monotonic", lambda: next(passed))  # the clock steps once a task
    monkeypatch.setattr(frontier, "monotonic", lambda: 0)
    candidates = len(batches([c for s in settings(TINY.layers) if s.layered for c in s.cells.values()]))
    command(model, out, "--minutes", str((candidates + 3) / 60))
    short = read_json(out)
    assert not short["models"][0]["complete"] and short["not_measured"] and short["rows"]
    assert "INCOMPLETE" in capsys.readouterr().out
    command(model, out)
    assert read_json(out)["models"][0]["complete"]


def test_a_cell_that_cannot_run_leaves_its_reason(model, tmp_path, monkeypatch):
    whole = frontier_work.measure_cell

    def refusing(caches, cell):
        if cell.name == "KVComm":
            raise PromptError("no anchors")
        return whole(caches, cell)

    monkeypatch.setattr(frontier_work, "measure_cell", refusing)
    [example] = draw_examples("hotpotqa-ledger", "test", 0, 1, 800)
    task = Task(str(model), "reported", example, (RECOMPUTE, "KVComm"))
    exact, refused = frontier_work.measure_task("cpu", task)
    assert len(exact["f1"]) == len(example.questions) and refused["failure"] == "no anchors" and "f1" not in refused


def test_models_of_one_name_are_refused(model, tmp_path):
    with pytest.raises(ConfigError, match="different names"):
        frontier.main(["--models", str(model), str(model), "--out", str(tmp_path / "x.json")])
