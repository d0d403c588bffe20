"""What code in the sandbox leaves in a worktree: reading it, the diff and the removal end, run nothing, see nothing."""

import os
import sys
import tempfile
from contextlib import closing, suppress

import pytest

from harness.agents import git as git_module
from harness.agents.calls import ToolError
from harness.agents.sandbox import Limits, missing
from harness.agents.workspace import Repository, Workspace

pytestmark = [
    pytest.mark.skipif(bool(missing()), reason=missing()),
    pytest.mark.fault("sandbox_exit"),
    pytest.mark.slow,
]
FILES = {"a.py": "x = 1\n", "tests/test a.py": "def test(): pass\n"}
DRIVERS = """
[core]
    fsmonitor = "touch {mark}"
    hooksPath = hooks
    pager = "touch {mark}"
[filter "e"]
    clean = "touch {mark}"
[diff "e"]
    textconv = "touch {mark}"
    command = "touch {mark}"
"""


@pytest.fixture
def workspace(tmp_path, monkeypatch):
    """A worktree; all of it, and of its repository, is gone at the end."""
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    with closing(Repository(FILES)) as repository, closing(Workspace(repository, Limits(seconds=60.0))) as made:
        yield made
    assert os.listdir(tmp_path / "temporary") == []


def run(workspace, code):
    result = workspace.run(sys.executable, "-c", "import os, shutil\n" + code)
    assert result.passed, result.output


def test_names_with_blanks_are_tracked(workspace):
    assert workspace.files() == ["a.py", "tests/test a.py"]


# What is left behind: the program, and a part of the diff or of the reason that there is none.
LEFT = {
    "a pipe as a file": ("os.unlink('a.py'); os.mkfifo('a.py')", "no diff"),
    "a pipe as attributes": (
        "os.mkfifo('.gitattributes'); open('a.py', 'a').write('y')",
        "'.gitattributes' is no file",
    ),
    "a pipe as inner attributes": ("os.mkfifo('tests/.gitattributes')", "'tests/.gitattributes' is no file"),
    "a pipe behind a link": (
        "os.mkdir('d'); os.mkfifo('d/.gitattributes'); shutil.rmtree('tests'); os.symlink('d', 'tests')",
        "'tests/.gitattributes' is no file",
    ),
    "a pipe as modules": ("os.mkfifo('.gitmodules'); open('a.py', 'a').write('y')", "+y"),
    "a link to itself": ("os.unlink('a.py'); os.symlink('a.py', 'a.py')", "new file mode 120000"),
    "a folder as a file": ("os.unlink('a.py'); os.mkdir('a.py')", "deleted file"),
    "a huge file": ("open('a.py', 'w').write('y\\n' * (2 << 20))", "Binary files a/a.py and b/a.py differ"),
    "no text": ("open('a.py', 'wb').write(b'\\xff\\n')", "+\ufffd"),
    "deep folders": ("for _ in range(2000): os.mkdir('d'); os.chdir('d')", ""),
    "closed folders": ("os.makedirs('d/e'); os.chmod('d/e', 0); os.chmod('d', 0); os.chmod('tests', 0o500)", ""),
    "names that are no text": ("open(b'\\xff\\n', 'w').close(); open('a.py', 'a').write('y')", "+y"),
}


@pytest.mark.parametrize("name", LEFT)
def test_the_diff_ends_and_all_of_it_goes(name, workspace, monkeypatch):
    monkeypatch.setattr(git_module, "SECONDS", 20.0)
    code, part = LEFT[name]
    run(workspace, code)
    try:
        said = workspace.diff()
    except ToolError as refused:
        said = str(refused)
    assert part in said and "took longer" not in said
    for file in ("a.py", "d/x", "tests/test a.py", "d" * 600, "d/" * 200, "\udcff"):
        with suppress(ToolError):
            assert len(workspace.read(file)) <= 1 << 20


def test_a_nested_repository_runs_nothing(workspace, tmp_path):
    """As the worktree's own `.git`, as a folder in place of a tracked file and beside one."""
    mark = tmp_path / "ran"
    run(
        workspace,
        f"""
os.unlink('.git'); os.unlink('a.py')
for at in ('.git', 'a.py/.git', 'tests/.git'):
    for inner in ('hooks', 'objects', 'refs/heads'): os.makedirs(f'{{at}}/{{inner}}')
    open(f'{{at}}/HEAD', 'w').write('ref: refs/heads/x')
    open(f'{{at}}/refs/heads/x', 'w').write('1' * 40)
    open(f'{{at}}/config', 'w').write({DRIVERS.format(mark=mark)!r})
open('.gitattributes', 'w').write('* filter=e diff=e\\n')
open('tests/test a.py', 'a').write('y = 2\\n')
""",
    )
    try:
        assert "+y = 2" in workspace.diff()
    except ToolError as refused:
        assert "no diff" in str(refused)
    assert not mark.exists()


def test_git_is_bounded_in_output_and_time(workspace, monkeypatch):
    run(workspace, "open('a.py', 'w').write('y' * 200_000)")
    monkeypatch.setattr(git_module, "OUTPUT_BYTES", 1000)
    with pytest.raises(ToolError, match="more than 1000 bytes"):
        workspace.diff()
    monkeypatch.setattr(git_module, "OUTPUT_BYTES", 1 << 20)
    assert len(workspace.diff()) > 200_000
    monkeypatch.setattr(git_module, "SECONDS", 0.2)
    done = git_module.git("-c", "alias.wait=!sleep 60", "wait", git_dir=workspace.git_dir, tree=workspace.root)
    assert done.returncode == 124 and "longer than" in done.stderr


def test_a_worktree_that_is_gone_is_a_result(workspace):
    os.rename(workspace.root, workspace.root.parent / "away")
    with pytest.raises(ToolError, match="no diff"):
        workspace.diff()
    assert workspace.run("/bin/true").stopped == "start"
