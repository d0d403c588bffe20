"""The `cacheslide` command."""

from cacheslide.cli.main import main

__all__ = ["main"]
