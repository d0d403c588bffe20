"""Hostile programs against the sandbox's bounds: counted by control groups, by the watcher, as an ordinary user."""

import os
import socket
import sys
from contextlib import closing

import pytest

from harness.agents.sandbox import Limits, Sandbox, missing
from harness.agents.sandbox import run as sandbox_run
from harness.agents.sandbox.group import place
from tests.helpers import attacks
from tests.helpers.as_user import as_user, why_not

pytestmark = pytest.mark.slow

needs = pytest.mark.skipif(bool(missing()), reason=missing())
fault = pytest.mark.fault("sandbox_limits")


@pytest.fixture(params=["groups", "counted"])
def counting(request, monkeypatch):
    """Both ways of bounding memory and processes."""
    if request.param == "groups" and place() is None:
        pytest.skip("no control group can be made here")
    if request.param == "counted":
        monkeypatch.setattr(sandbox_run, "place", lambda: None)


def outside(tmp_path):
    """A file outside, a socket that receives, and the names that attacks know them by."""
    folder = tmp_path / "outside"
    folder.mkdir()
    (folder / "victim").write_text("kept")
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    listener.bind(str(folder / "s"))
    listener.setblocking(False)
    names = f"VICTIM, SOCKET, PARENT = {str(folder / 'victim')!r}, {str(folder / 's')!r}, {os.getpid()}\n"
    return folder / "victim", listener, names


@needs
@fault
@pytest.mark.parametrize("name", attacks.REFUSED)
def test_what_reaches_outside_is_refused(name, tmp_path):
    victim, listener, names = outside(tmp_path)
    (tmp_path / "tree").mkdir()
    seen = [os.stat(path) for path in (victim, victim.parent)]
    with closing(listener):
        code = attacks.PRELUDE + names + attacks.REFUSED[name] + "\nprint('end')"
        result = Sandbox(tmp_path / "tree").run([sys.executable, "-c", code])
        assert result.output == "end\n" and result.passed
        with pytest.raises(BlockingIOError):
            listener.recv(1)
    now = [os.stat(path) for path in (victim, victim.parent)]
    assert [(s.st_mode, s.st_uid, s.st_mtime, s.st_size) for s in seen] == [
        (s.st_mode, s.st_uid, s.st_mtime, s.st_size) for s in now
    ]
    assert os.listxattr(victim) == [] and sorted(os.listdir(victim.parent)) == ["s", "victim"]


def bounded(result) -> bool:
    return "held" not in result["output"] or bool(result["stopped"])


@needs
@fault
@pytest.mark.parametrize("name", attacks.HOGS)
def test_the_total_is_bounded(name, tmp_path, counting):
    hog = attacks.HOGS[name]
    result = Sandbox(tmp_path, Limits(**hog.limits)).run([sys.executable, "-c", attacks.PRELUDE + hog.code])
    assert bounded(vars(result)), result
    assert result.stopped != "time", "it waited for something that never came"


@needs
@fault
@pytest.mark.skipif(bool(why_not()), reason=why_not())
def test_an_ordinary_user_is_bounded_the_same(tmp_path):
    """All of the above as a user without privileges, in one process of that user."""
    victim, listener, names = outside(tmp_path)
    os.chmod(tmp_path, 0o755)
    for path in (victim, victim.parent):
        os.chown(path, 65534, 65534)
    with closing(listener):
        found = as_user(tmp_path, names)
        with pytest.raises(BlockingIOError):
            listener.recv(1)
    assert set(found) == {*attacks.REFUSED, *attacks.HOGS}
    assert {name: found[name] for name in attacks.REFUSED if found[name]["output"] != "end\n"} == {}
    assert {name: found[name] for name in attacks.HOGS if not bounded(found[name])} == {}
    assert {name: found[name] for name in attacks.HOGS if found[name]["stopped"] == "time"} == {}
    assert victim.read_text() == "kept" and oct(victim.stat().st_mode & 0o7777) == "0o644"
    assert found["closed folders"]["left"] == [] and found["deep folders"]["left"] == []
