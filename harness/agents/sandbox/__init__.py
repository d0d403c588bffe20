"""Runs code written by a model, confined by the kernel."""

from harness.agents.sandbox.limits import Limits, SandboxError, SandboxResult
from harness.agents.sandbox.run import Sandbox, missing
from harness.agents.sandbox.tree import remove

__all__ = ["Limits", "Sandbox", "SandboxError", "SandboxResult", "missing", "remove"]
