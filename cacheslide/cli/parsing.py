"""The parser of all commands: a wrong option is one line, not the usage."""

import argparse
from typing import NoReturn


class Parser(argparse.ArgumentParser):
    """argparse with errors of one line; the options are in the command's help. Subcommands inherit it."""

    def error(self, message: str) -> NoReturn:
        """Print one line on stderr and exit with status 2."""
        self.exit(2, f"{self.prog}: {' '.join(message.split())} (see `{self.prog} --help`)\n")
