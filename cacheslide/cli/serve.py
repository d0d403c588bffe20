"""`cacheslide serve MODEL`: vLLM's OpenAI server with the connector enabled.

Options unknown to this command are passed to vLLM.
"""

import argparse
import json
import os
import sys
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from cacheslide import renamed
from cacheslide.cli.parsing import Parser
from cacheslide.cli.serve_options import HELP, TYPES, check_spelling, help_of
from cacheslide.cli.served_model import check_model
from cacheslide.errors import ConfigError
from cacheslide.vllm import CONNECTOR
from cacheslide.vllm.cope.setting import overrides
from cacheslide.vllm.options import CPU_BLOCK, CPU_CACHE_GIB, ServerOptions
from cacheslide.vllm.support import FAMILIES


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the model and one flag per option of the connector."""
    parser.add_argument("model", help=f"folder or name of a checkpoint of {', '.join(FAMILIES[:-1])}")
    parser.add_argument("--cope", metavar="ADAPTER", help="folder of a CoPE adapter; the model is its base")
    parser.add_argument("--cope-live", action="store_true", help="leave its calibrated slot offsets aside")
    for option in fields(ServerOptions):
        old = [old for old, new in renamed.SERVER.items() if new == option.name]
        names = [option.name, *(["system"] if option.name == "policy" else []), *old]
        flags = [f"--{name.replace('_', '-')}" for name in names]
        kind = TYPES.get(option.name, type(option.default))
        known = (
            {"action": argparse.BooleanOptionalAction}
            if kind is bool
            else {"type": kind, "metavar": HELP[option.name][0]}
        )
        # Unset options are left out: a store's configuration may set them.
        parser.add_argument(*flags, default=argparse.SUPPRESS, help=help_of(option.name), **known)


def _given(args: argparse.Namespace) -> dict[str, Any]:
    """The connector's options on the command line."""
    options = {f.name: getattr(args, f.name) for f in fields(ServerOptions) if hasattr(args, f.name)}
    if options.get("store"):
        options["store"] = str(Path(options["store"]).resolve())
    return options


def check_effect(options: ServerOptions) -> None:
    """Raise ConfigError for a recompute ratio or a layer that the server's system does not have."""
    policy = options.system
    if options.layer is not None and policy.at_layer(1) == policy.at_layer(2):
        raise ConfigError(f"--layer {options.layer} has no effect: {policy.name} has no selection layer")
    if options.recompute_ratio is not None and policy.at_ratio(0.25) == policy.at_ratio(0.5):
        raise ConfigError(f"--recompute-ratio {options.recompute_ratio:g} has no effect under {policy.name}")


def command(args: argparse.Namespace, vllm_args: list[str]) -> list[str]:
    """The server's command line; ConfigError for options out of range."""
    options = _given(args)
    check_effect(ServerOptions.from_extra_config(options))  # fails here, not minutes later
    transfer = {"kv_connector": CONNECTOR, "kv_role": "kv_both", "kv_connector_extra_config": options}
    # The server module, since vLLM's own command needs a distribution named vllm, which the CPU build is not.
    line = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", args.model]
    line += ["--kv-transfer-config", json.dumps(transfer)]
    if args.cope is not None:
        overrides_text, vllm_args = _take(vllm_args, "--hf-overrides")
        try:
            own_overrides = json.loads(overrides_text or "{}")
        except ValueError as error:
            raise ConfigError(f"--hf-overrides is not valid JSON: {error}") from None
        wanted = overrides(args.cope, args.cope_live, others=own_overrides)
        line += ["--hf-overrides", json.dumps(wanted)]
    if not any(x.split("=")[0] == "--block-size" for x in vllm_args) and _on_cpu():
        line += ["--block-size", str(CPU_BLOCK)]
    return line + vllm_args


def _take(vllm_args: list[str], flag: str) -> tuple[str | None, list[str]]:
    """The value of `flag` among vLLM's options, and the options without it."""
    for i, word in enumerate(vllm_args):
        if word.startswith(f"{flag}="):
            return word.split("=", 1)[1], vllm_args[:i] + vllm_args[i + 1 :]
        if word == flag and i + 1 < len(vllm_args):
            return vllm_args[i + 1], vllm_args[:i] + vllm_args[i + 2 :]
    return None, vllm_args


def _on_cpu() -> bool:
    from vllm.platforms import current_platform

    return current_platform.is_cpu()


def main(argv: list[str] | None = None) -> None:
    """Replace this process by the server: does not return. ConfigError if vLLM is not installed."""
    parser = Parser(prog="cacheslide serve", description=__doc__, allow_abbrev=False)
    add_arguments(parser)
    args, vllm_args = parser.parse_known_args(argv)
    if find_spec("vllm") is None:
        raise ConfigError("serving needs vLLM: install this package with its extra `cpu` or `gpu`")
    check_spelling(vllm_args, (flag for action in parser._actions for flag in action.option_strings))
    check_model(args.model, ServerOptions.from_extra_config(_given(args)).system, vllm_args)
    line = command(args, vllm_args)
    if _on_cpu() and not any(x.split("=")[0] == "--gpu-memory-utilization" for x in vllm_args):
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", CPU_CACHE_GIB)
    os.execv(line[0], line)


if __name__ == "__main__":
    main()
