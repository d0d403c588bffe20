"""What a run left out: its skipped tests by reason, counted, and the one command that brings each group."""

import re
import subprocess
from collections import Counter
from collections.abc import Iterable

import pytest

from tests.helpers.places import ROOT

SERVERS = ROOT / "scripts/servers.sh"
BRINGS = {  # a pattern in the reason, and what makes those tests run
    r"valkey-server|redis-server|library of the system|openssl": "make test-servers",
    r"CACHESLIDE_SLOW": "CACHESLIDE_SLOW=1 make test",
    r"TRITON_INTERPRET": "a CUDA device, or TRITON_INTERPRET=1 make test PYTEST='-k triton'",
    r"CACHESLIDE_REAL_DATA": "CACHESLIDE_REAL_DATA=FOLDER make test (docs/real.md)",
    r"needs (a )?CUDA": "a CUDA device, and make install-gpu",
    r"no index": "a package index, or wheels in UV_FIND_LINKS",
    r"not installed|could not import": "make install",
}


def brings(reason: str) -> str:
    """The command that makes a test skipped for `reason` run; empty where none is known."""
    return next((command for pattern, command in BRINGS.items() if re.search(pattern, reason)), "")


def lines(reasons: Iterable[str], left_out: int = 0) -> list[str]:
    """The summary: a line a reason, the most frequent first.

    Parameters
    ----------
    reasons : iterable of str
        Why each skipped test (or module, which counts once) was skipped.
    left_out : int
        Tests with the mark `server` that the run's selection left out.
    """
    counted = Counter(re.sub(r"^Skipped: ", "", reason).strip() for reason in reasons)
    out = [
        f"{n} skipped: {reason}" + (f"  -> {command}" if (command := brings(reason)) else "")
        for reason, n in counted.most_common()
    ]
    if any("make test-servers" in line for line in out) and (packages := missing()):
        out.append(f"make test-servers installs {packages} with apt-get, as root or through sudo, and runs those tests")
    if left_out:
        out.append(f"{left_out} not selected, which start servers  -> make test PYTEST='-m server'")
    return out


def missing() -> str:
    """The system's packages that scripts/servers.sh would install, on one line."""
    asked = subprocess.run(["bash", str(SERVERS), "--missing"], capture_output=True, text=True, check=False)
    return asked.stdout.strip()


class Deselected:
    """Counts the deselected tests that start servers; under xdist a worker process counts and sends the number."""

    def __init__(self) -> None:
        self.servers = 0

    def pytest_deselected(self, items) -> None:
        self.servers += sum(item.get_closest_marker("server") is not None for item in items)

    def pytest_sessionfinish(self, session) -> None:
        if hasattr(session.config, "workeroutput"):
            session.config.workeroutput["deselected_servers"] = self.servers

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node, error) -> None:
        """Every worker collects all tests, so their numbers are equal."""
        self.servers = max(self.servers, getattr(node, "workeroutput", {}).get("deselected_servers", 0))


def pytest_configure(config) -> None:
    config.pluginmanager.register(Deselected(), "deselected_servers")


def pytest_terminal_summary(terminalreporter) -> None:
    """Print the summary behind pytest's own."""
    skipped = [r.longrepr[2] for r in terminalreporter.stats.get("skipped", []) if isinstance(r.longrepr, tuple)]
    left_out = terminalreporter.config.pluginmanager.get_plugin("deselected_servers").servers
    summary = lines(skipped, left_out)
    if summary:
        terminalreporter.section("left out")
        for line in summary:
            terminalreporter.line(line)
