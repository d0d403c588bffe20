"""Runs tests as user 65534, as root can: what that user may not enter is laid bare in a mount namespace.

`python -m tests.helpers.as_user NAMES` is what then runs as that user: every program of `tests/helpers/attacks.py` in
the sandbox.
"""

import ctypes
import json
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.helpers.places import ROOT

NOBODY = 65534
_REPOSITORY = ROOT


def why_not() -> str:
    """Why tests cannot become another user; "" when they can."""
    return "" if os.getuid() == 0 and sys.platform == "linux" else "only user 0 can become another user"


def _mount(source: str, target: str, kind: str | None, flags: int, data: str = "") -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(source.encode(), target.encode(), kind and kind.encode(), ctypes.c_ulong(flags), data.encode()):
        raise OSError(ctypes.get_errno(), f"mount {source} at {target}")


def _lay_bare(paths: list[Path]) -> None:
    """Make `paths` reachable for everyone: a folder on the way that is closed shows `paths` below it, nothing else."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(0x20000):
        raise OSError(ctypes.get_errno(), "unshare")
    _mount("none", "/", None, 1 << 14 | 1 << 18)
    held = {path: os.open(path, os.O_PATH) for path in paths}
    closed = {}
    for path in paths:
        for parent in reversed(path.parents):
            if not stat.S_IMODE(parent.stat().st_mode) & stat.S_IXOTH:
                closed.setdefault(parent, []).append(path)
                break
    for parent, below in closed.items():
        _mount("bare", str(parent), "tmpfs", 0, "mode=755,size=1m")
        for path in below:
            path.mkdir(parents=True)
            _mount(f"/proc/self/fd/{held[path]}", str(path), None, 4096 | 16384)


def as_user(folder: Path, names: str) -> dict[str, dict[str, Any]]:
    """Run this module as `NOBODY`, with `folder` within reach; its last line is JSON."""
    venv = [Path(sys.prefix), Path(sys.prefix).resolve(), Path(sys.base_prefix).resolve()]

    def become() -> None:
        _lay_bare(list(dict.fromkeys([*venv, _REPOSITORY, folder.resolve()])))
        os.chdir(_REPOSITORY)
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)

    done = subprocess.run(
        [sys.executable, "-m", "tests.helpers.as_user", names],
        preexec_fn=become,
        env={"PATH": os.defpath, "PYTHONPATH": str(_REPOSITORY), "HOME": str(folder), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        timeout=540,
    )
    print(done.stderr)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


def main() -> None:
    """Every program in a folder of its own; one JSON object: name -> output, stopped, what the scratch folder left."""
    import logging
    import tempfile

    from harness.agents.sandbox import Limits, Sandbox, missing, remove
    from tests.helpers import attacks

    (names,) = sys.argv[1:]
    logging.basicConfig(level=logging.INFO)
    assert os.getuid() == NOBODY and missing() == "", missing()
    found = {}
    programs = {name: (code + "\nprint('end')", {}) for name, code in attacks.REFUSED.items()}
    programs |= {name: (hog.code, hog.limits) for name, hog in attacks.HOGS.items()}
    with tempfile.TemporaryDirectory() as temporary:
        tempfile.tempdir = temporary
        for name, (code, limits) in programs.items():
            tree = Path(tempfile.mkdtemp(dir="/var/tmp"))
            result = Sandbox(tree, Limits(**limits)).run([sys.executable, "-c", attacks.PRELUDE + names + code])
            remove(tree)
            left = os.listdir(temporary) + ([str(tree)] if tree.exists() else [])
            found[name] = {"output": result.output, "stopped": result.stopped, "code": result.code, "left": left}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
