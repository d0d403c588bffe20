"""The `cacheslide` command: answers prompts with cached chunks, shows what that saves, and serves.

Only the command that was asked for is imported, so that help and version take no longer than Python's own start.
"""

import os
import sys
from importlib import import_module

from cacheslide import __version__
from cacheslide.cli.parsing import Parser
from cacheslide.errors import CacheSlideError

DESCRIPTION = "Reuse of the KV cache of prompt segments that keep their order but not their position."
COMMANDS = {  # name: its line in the help; each is a module of this package with `add_arguments`
    "run": "answer a prompt with cached chunks, beside its plain recomputation",
    "demo": "two turns of one agent on the shipped model, recomputed and with reuse",
    "serve": "an OpenAI server: vLLM with the connector",
    "systems": "list the registered reuse systems",
    "analyse": "say of recorded requests what caching would save",
    "precompute": "encode a template's fixed chunks ahead of the first request",
    "store": "look at, check and clean a chunk store; serve one",
}


def parser_for(command: str | None) -> Parser:
    """The parser, with the options of `command` alone: other commands are names with a line of help."""
    parser = Parser(prog="cacheslide", description=DESCRIPTION, epilog="`cacheslide COMMAND --help` has its options.")
    parser.add_argument("--version", action="version", version=f"cacheslide {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, line in COMMANDS.items():
        added = commands.add_parser(name, help=line)
        if name == command:
            import_module(f"cacheslide.cli.{name}").add_arguments(added)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Entry point. A user's error is printed in one line on stderr, with exit status 2."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        if argv[:1] == ["serve"]:  # it shares options with vLLM, so its own parser handles them
            from cacheslide.cli import serve

            return serve.main(argv[1:])
        args = parser_for(argv[0] if argv else None).parse_args(argv)
        status = args.run(args)
        sys.stdout.flush()
        return status
    except CacheSlideError as error:
        print(f"cacheslide: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader of the output closed the pipe (`| head`); the interpreter flushes once more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
