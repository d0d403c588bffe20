"""Runs code that a model wrote: confined by the kernel, or not at all."""

from harness.agents.sandbox.run import Limits, Sandbox, SandboxError, SandboxResult, missing

__all__ = ["Limits", "Sandbox", "SandboxError", "SandboxResult", "missing"]
