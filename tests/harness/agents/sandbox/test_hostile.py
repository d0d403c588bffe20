"""The sandbox against hostile code. Where the kernel gives none, these are skipped with its reason."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from harness.agents import sandbox
from harness.agents.sandbox import Limits, Sandbox, SandboxError, confine, missing
from tests.helpers.waiting import eventually, released

pytestmark = pytest.mark.slow

needs = pytest.mark.skipif(bool(missing()), reason=missing())


@pytest.fixture
def root(tmp_path) -> Path:
    (tmp_path / "tree").mkdir()
    return tmp_path / "tree"


def python(root: Path, code: str, **limits):
    return Sandbox(root, Limits(**limits)).run([sys.executable, "-c", code])


def test_a_kernel_that_has_the_parts_gives_a_sandbox():
    """Else every test below would be skipped by a mistake in the sandbox itself."""
    try:
        landlock = confine.landlock_abi() >= 1
    except OSError:
        landlock = False
    if not landlock or subprocess.run(["unshare", "-Urpfn", "true"], check=False).returncode:
        pytest.skip("this kernel has no Landlock or no user namespaces for us")
    assert missing() == ""


@needs
def test_no_capability_is_left(root):
    code = """
import ctypes, struct
header, data = struct.pack('Ii', 0x20080522, 0), ctypes.create_string_buffer(24)
assert ctypes.CDLL(None).capget(header, data) == 0
print(any(data.raw))
"""
    assert python(root, code).output == "False\n"


@needs
def test_code_runs_reads_and_writes_in_its_folder(root):
    result = python(root, "import json; open('out.txt', 'w').write('kept'); print(json.dumps(1 + 1))")
    assert result.passed and result.output == "2\n"
    assert (root / "out.txt").read_text() == "kept"


@needs
def test_the_exit_status_comes_back(root):
    assert python(root, "raise SystemExit(3)").code == 3


@needs
def test_nothing_outside_the_folder_is_written_or_read(root, tmp_path):
    secret = tmp_path / "secret.txt"
    secret.write_text("hidden")
    os.symlink(secret, root / "link")
    code = f"""
import os, subprocess
def tried(what, f):
    try: f(); print('escaped', what)
    except Exception: print('refused', what)
tried('read', lambda: open({str(secret)!r}).read())
tried('link', lambda: open('link').read())
tried('write', lambda: open({str(tmp_path / "new")!r}, 'w'))
tried('up', lambda: open('../new', 'w'))
tried('unlink', lambda: os.unlink({str(secret)!r}))
tried('rename', lambda: os.rename({str(secret)!r}, 'mine'))
tried('shadow', lambda: open('/etc/shadow').read())
tried('environ', lambda: open('/proc/1/environ').read())
tried('chroot', lambda: os.chroot('.'))
tried('setuid', lambda: os.setgroups([0]))
tried('shell', lambda: subprocess.run(['/bin/sh', '-c', 'echo x > ../new'], check=True, stderr=-3))
"""
    result = python(root, code)
    assert "escaped" not in result.output and result.output.count("refused") == 11, result.output
    assert secret.read_text() == "hidden" and not (tmp_path / "new").exists()


@needs
def test_there_is_no_network(root):
    code = """
import socket
for family in (socket.AF_INET, socket.AF_INET6, socket.AF_UNIX):
    for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
        try: socket.socket(family, kind); print('escaped')
        except OSError: print('refused')
"""
    assert python(root, code).output.split() == ["refused"] * 6


@needs
def test_the_environment_is_not_handed_on(root, monkeypatch):
    monkeypatch.setenv("A_SECRET_TOKEN", "hidden")
    assert "hidden" not in python(root, "import os; print(os.environ)").output


@needs
def test_an_endless_loop_ends(root):
    result = python(root, "while True: pass", seconds=1.0)
    assert result.stopped == "time" and not result.passed


@needs
def test_a_background_process_does_not_outlive_the_run(root):
    code = """
import fcntl, os, time
held = open('held', 'w')
fcntl.flock(held, fcntl.LOCK_EX)
if os.fork() == 0:
    os.setsid()
    time.sleep(600)
"""
    assert python(root, code).code == 0
    assert eventually(lambda: released(root / "held"))


@needs
def test_a_fork_bomb_ends(root):
    code = "import os\nwhile True:\n  try: os.fork()\n  except OSError: pass"
    result = python(root, code, seconds=5.0, processes=16)
    assert result.stopped in ("processes", "time")
    assert Sandbox(root).run(["/bin/echo", "alive"]).output == "alive\n"


@needs
def test_memory_is_bounded(root):
    result = python(root, "x = bytearray(1 << 30); print('escaped')", memory=512 << 20)
    assert not result.passed and "escaped" not in result.output


@needs
def test_huge_output_and_huge_files_end(root):
    result = python(root, "while True: print('x' * 9999)", output_bytes=10_000)
    assert result.stopped == "output" and len(result.output) == 10_000
    result = python(root, "open('big', 'wb').write(b'x' * 2_000_000)", file_bytes=1_000_000)
    assert not result.passed and (root / "big").stat().st_size <= 1_000_000


@needs
def test_many_files_end(root):
    code = "import itertools\nfor i in itertools.count(): open(f'f{i}', 'wb').write(bytes(4096))"
    assert python(root, code, files=2000).stopped == "disk"
    for left in root.iterdir():
        left.unlink()
    assert python(root, code, disk_bytes=4 << 20).stopped == "disk"


@needs
def test_the_parent_cannot_be_signalled(root):
    code = f"import os\ntry: os.kill({os.getpid()}, 0); print('escaped')\nexcept OSError: print('refused')"
    assert python(root, code).output == "refused\n"


def test_without_a_sandbox_code_must_be_trusted(root, monkeypatch):
    monkeypatch.setattr(sandbox.run, "missing", lambda: "this kernel has no Landlock")
    with pytest.raises(SandboxError, match=r"no Landlock.*trust_code=True"):
        Sandbox(root)
    trusted = Sandbox(root, trust_code=True)
    assert not trusted.confined
    assert trusted.run([sys.executable, "-c", "print(1)"]).output == "1\n"
    hasty = Sandbox(root, Limits(seconds=1.0), trust_code=True)
    assert hasty.run([sys.executable, "-c", "while True: pass"]).stopped == "time"
