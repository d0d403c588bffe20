"""What `cacheslide serve --help` says of the connector's options, and the refusal of misspelt ones."""

from collections.abc import Iterable
from dataclasses import fields
from difflib import get_close_matches

from cacheslide.errors import ConfigError
from cacheslide.vllm.options import ServerOptions

HELP = {  # field of `ServerOptions`: its value's name in the help ("" for switches), and what it does
    "policy": ("SYSTEM", "rule of requests that name none; a name from `cacheslide systems`"),
    "recompute_ratio": ("RATIO", "share of the reused tokens that this system recomputes, from 0 to 1"),
    "layer": ("LAYER", "selection layer of this system, if it has one"),
    "chunk_size": ("TOKENS", "fixed segments are cached in pieces of at most this many tokens"),
    "suffix_len": ("TOKENS", "tokens at a prompt's end that are always recomputed"),
    "namespace": ("NAME", "part of every chunk key: servers of other namespaces share no chunk"),
    "store_gib": ("GIB", "chunk KV in memory per worker; the least recently used chunks are evicted first"),
    "store_device": ("DEVICE", "where it lies: cpu (host memory, pinned beside a GPU) or model (the model's device)"),
    "encode": ("WHEN", "when chunks that need a prefill of their own get it: later (two steps on), now or off"),
    "encode_tokens_per_step": ("TOKENS", "such prefills in a step, at most; one chain of chunks may exceed it"),
    "tokens_per_step": ("TOKENS", "tokens completed by reuse in a step, at most: bounds memory"),
    "computed_tokens_per_step": ("TOKENS", "of these, tokens that are computed, at most: bounds a step's time"),
    "separator": ("TEXT", "separator of requests that ask for the server's; a text, or token ids as JSON"),
    "find_spans": ("", "also look for spans seen before in requests without annotations"),
    "span_tokens": ("TOKENS", "average size of such a span"),
    "spans_known": ("COUNT", "such spans remembered, hashes only"),
    "max_generation": ("COUNT", "corrected KV of generated text is retained up to this generation; 0: never"),
    "executor_graphs": ("", "on a GPU, replay the layers of reuse from CUDA graphs"),
    "store": ("FILE", "storage tiers under the workers' memory: a JSON file, see docs/store.md"),
}
UNSET = {"recompute_ratio": "the system's own", "layer": "the system's own"}
TYPES = {"recompute_ratio": float, "layer": int}  # of options whose default is None


def help_of(name: str) -> str:
    """The line of an option, with its default."""
    [default] = [f.default for f in fields(ServerOptions) if f.name == name]
    shown = UNSET.get(name) or ("off" if default is False else "on" if default is True else default or "none")
    return f"{HELP[name][1]} (default: {shown})"


def check_spelling(vllm_args: Iterable[str], known: Iterable[str]) -> None:
    """Raise ConfigError for an option that resembles one of `known`: vLLM would refuse it, a minute later."""
    known = list(known)
    for word in vllm_args:
        name = word.split("=")[0]
        if word.startswith("--") and (close := get_close_matches(name.replace("_", "-"), known, 1, 0.88)):
            raise ConfigError(f"unknown option {name[:80]}: did you mean {close[0]}?")
