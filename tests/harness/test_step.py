"""Commands of the harness: what a user can act on is one line and status 2, a defect keeps its trace."""

from pathlib import Path

import pytest

from cacheslide.errors import DataError
from harness.step import command

HARNESS = Path("harness")


@pytest.mark.parametrize("wrong", [DataError("no rows in it"), FileNotFoundError(2, "No such file", "gone.json")])
def test_an_expected_error_is_one_line_and_status_2(capsys, monkeypatch, wrong):
    def main():
        raise wrong

    monkeypatch.setattr("sys.argv", ["/somewhere/tool.py"])
    with pytest.raises(SystemExit) as ended:
        command(main)
    said = capsys.readouterr().err
    assert ended.value.code == 2 and said == f"tool: {wrong}\n"


def test_success_is_status_0_and_a_defect_is_not_hidden():
    with pytest.raises(SystemExit) as ended:
        command(lambda: None)
    assert ended.value.code == 0
    with pytest.raises(ZeroDivisionError):
        command(lambda: 1 / 0)


def test_every_command_of_the_harness_ends_that_way():
    """Tools that code in a sandbox runs have no such errors; all others end with a status."""
    bare = [p for p in HARNESS.rglob("*.py") if p.read_text().endswith('if __name__ == "__main__":\n    main()\n')]
    assert {str(p) for p in bare} <= {"harness/agents/sandbox/confine.py", "harness/tasks/synthetic/__main__.py"}
