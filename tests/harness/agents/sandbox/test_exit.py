"""However a program in the sandbox ends, a result comes back, the scratch folder goes, nothing of it runs on."""

import os
import subprocess
import sys
import tempfile

import pytest

from harness.agents import sandbox
from harness.agents.sandbox import Limits, Sandbox, SandboxError, missing, seccomp
from tests.helpers import attacks
from tests.helpers.waiting import eventually, released

pytestmark = pytest.mark.slow

needs = pytest.mark.skipif(bool(missing()), reason=missing())
fault = pytest.mark.fault("sandbox_exit")


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    """The folder in which scratch folders are made; empty again at the end."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield folder
    assert list(folder.iterdir()) == []


@pytest.fixture
def root(tmp_path):
    (tmp_path / "tree").mkdir()
    return tmp_path / "tree"


def python(root, code, **limits):
    return Sandbox(root, Limits(**limits)).run([sys.executable, "-c", attacks.PRELUDE + code])


# program: what it prints, the status that comes back
ENDS = {
    "imitates a failed start": ("os.write(1, b'confine: no\\n'); os._exit(125)", "confine: no\n", 125),
    "imitates the report": (
        """
for fd in range(3, 256):
    try: os.write(fd, b'{"error": "no", "command": false}')
    except OSError: pass
print('end')
""",
        "end\n",
        0,
    ),
    "nests folders": (
        "os.chdir(os.environ['TMPDIR'])\nfor _ in range(3000): os.mkdir('a'); os.chdir('a')\nprint('end')",
        "end\n",
        0,
    ),
    "closes its scratch folder": ("os.chmod(os.environ['TMPDIR'], 0); print('end')", "end\n", 0),
    "kills itself": ("os.kill(os.getpid(), 9)", "", 137),
    "kills its group": ("os.kill(0, 9)", "", 137),
    "kills everyone": ("tried('kill', os.kill, -1, 9); os.kill(0, 9)", "", 137),
    "signals the first process": (
        "for n in (1, 2, 3, 9, 15, 19): os.kill(1, n)\ntime.sleep(0.1); print('end')",
        "end\n",
        0,
    ),
    "writes no text": ("os.write(1, b'\\xff\\xfe\\0end\\n')", "\ufffd\ufffd\0end\n", 0),
    "leaves a daemon": (
        """
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        for fd in range(3): os.close(fd)
        time.sleep(600)
    os._exit(0)
os.wait(); print('end')
""",
        "end\n",
        0,
    ),
    "calls by another architecture": (
        """
if not X86: os.kill(os.getpid(), 31)
page = mmap.mmap(-1, 4096, flags=0x22, prot=7)
page.write(bytes.fromhex('b814000000cd80c3'))
ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(page)))()
print('did call')
""",
        "",
        159,
    ),
}


@needs
@fault
@pytest.mark.parametrize("name", ENDS)
def test_every_end_is_a_result(name, root, temporary):
    code, output, status = ENDS[name]
    result = python(root, code)
    assert (result.output, result.code, result.stopped) == (output, status, "")


@needs
@fault
def test_what_stops_itself_ends_by_time(root, temporary):
    assert python(root, "os.kill(0, signal.SIGSTOP)", seconds=2.0).stopped == "time"


@needs
@fault
@pytest.mark.parametrize("stays_open", [True, False])
def test_nothing_runs_on_after_a_bound(stays_open, root, temporary):
    close = "" if stays_open else "for fd in range(3): os.close(fd)"
    code = f"""
import fcntl, time
held = open('held', 'w'); fcntl.flock(held, fcntl.LOCK_EX)
if os.fork() == 0: os.setsid()
{close}
while True: open(f'f{{os.getpid()}}', 'a').write('x' * 4096); time.sleep(0.001)  # a fast disk's bound is not meant
"""
    assert python(root, code, seconds=2.0, file_bytes=1 << 30).stopped == "time"
    assert eventually(lambda: released(root / "held"))
    seen = sorted((f.name, f.stat().st_size) for f in root.iterdir())
    assert seen == sorted((f.name, f.stat().st_size) for f in root.iterdir()) and len(seen) == 3


@needs
@fault
def test_a_command_that_is_gone_is_a_result(root, temporary):
    (root / "text").write_text("no program")
    for command in (["./gone"], ["text/x"], ["./text"], ["nothing-of-this-name"], ["\0"]):
        result = Sandbox(root).run(command)
        assert result.stopped == "start" and not result.passed and result.output, command


@needs
@fault
def test_a_folder_that_is_gone_is_a_result(root, temporary):
    box = Sandbox(root)
    root.rmdir()
    assert box.run(["/bin/true"]).stopped == "start"
    root.write_text("a file")
    assert box.run(["/bin/true"]).stopped == "start"


@needs
@fault
def test_a_kernel_that_refuses_is_an_error_with_the_step(root, temporary, monkeypatch):
    monkeypatch.setattr(seccomp, "program", lambda machine: bytes(8))
    with pytest.raises(SandboxError, match=r"did not start \(seccomp filter: Invalid argument\)"):
        Sandbox(root).run(["/bin/true"])


@fault
def test_trusted_code_leaves_no_scratch_folder_either(root, temporary, monkeypatch):
    monkeypatch.setattr(sandbox.run, "missing", lambda: "this kernel has no Landlock")
    code = "import os\nos.chdir(os.environ['TMPDIR'])\nfor _ in range(3000): os.mkdir('a'); os.chdir('a')"
    assert Sandbox(root, trust_code=True).run([sys.executable, "-c", code]).passed


NORMAL = {
    "files and their times": """
import shutil, tempfile
with tempfile.TemporaryDirectory() as folder:
    os.makedirs('a/b'); open('a/b/c', 'w').write('x'); os.chmod('a/b/c', 0o640); os.utime('a/b/c', (5, 5))
    shutil.copytree('a', folder + '/copy'); shutil.copy2('a/b/c', 'd'); shutil.move('d', folder + '/e')
    assert os.stat(folder + '/copy/b/c').st_mtime == 5 and os.stat(folder + '/e').st_mode & 0o777 == 0o640
    os.link('a/b/c', 'f'); os.rename('f', 'g'); os.chmod('a', 0); os.chmod('a', 0o755); shutil.rmtree('a')
""",
    "a database": """
import sqlite3
with sqlite3.connect('x.db') as db: db.execute('create table t (a)'); db.execute('insert into t values (1)')
assert sqlite3.connect('x.db').execute('select a from t').fetchall() == [(1,)]
""",
    "an event loop": """
import asyncio
async def main():
    child = await asyncio.create_subprocess_exec('/bin/echo', 'x', stdout=asyncio.subprocess.PIPE)
    return (await child.communicate())[0], await asyncio.to_thread(sum, [1, 2])
assert asyncio.run(main()) == (b'x\\n', 3)
""",
    "processes and threads": """
import multiprocessing as mp
from concurrent.futures import ThreadPoolExecutor
here, there = mp.get_context('fork').Pipe()
child = mp.get_context('fork').Process(target=there.send, args=([1],))
child.start(); assert here.recv() == [1]; child.join()
assert list(ThreadPoolExecutor(4).map(abs, (-1, 2))) == [1, 2]
assert subprocess.run('yes | head -1', shell=True, capture_output=True, text=True).stdout == 'y\\n'
""",
    "a repository": """
def git(*args, **more): return subprocess.run(('git', *args), check=True, capture_output=True, text=True, **more).stdout
git('init', '-q', 'r'); os.chdir('r'); open('a', 'w').write('1\\n'); git('add', 'a')
git('-c', 'user.name=n', '-c', 'user.email=e', 'commit', '-qm', 'm'); open('a', 'w').write('2\\n')
patch = git('diff'); git('checkout', '-q', 'a'); git('apply', '-', input=patch); assert open('a').read() == '2\\n'
""",
    "tests": """
open('test_x.py', 'w').write('def test_x(tmp_path, capfd): (tmp_path / "x").write_text("x")\\n')
done = subprocess.run((sys.executable, '-m', 'pytest', '-q', 'test_x.py'), capture_output=True, text=True)
assert '1 passed' in done.stdout, done.stdout
""",
}


@needs
@pytest.mark.parametrize("name", NORMAL)
def test_normal_programs_run(name, root, temporary):
    result = python(root, NORMAL[name] + "\nprint('end')", seconds=120.0)
    assert result.output == "end\n" and result.passed


@needs
def test_many_runs_leave_nothing_behind(root, temporary):
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        assert Sandbox(root).run(["/bin/true"]).passed
    assert len(os.listdir("/proc/self/fd")) == before
    place = sandbox.group.place()
    if place is not None:
        left = [name for parent in place.parents for name in os.listdir(parent)]
        assert not [name for name in left if name.startswith(f"sandbox-{os.getpid()}-")]
    mounts = subprocess.run(["cat", "/proc/self/mountinfo"], capture_output=True, text=True).stdout
    assert str(temporary) not in mounts and str(root) not in mounts
