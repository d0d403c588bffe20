"""Options that the steps with a model share, and the manager that they open."""

import argparse
from functools import cache
from pathlib import Path
from typing import Any

from cacheslide.errors import ConfigError
from cacheslide.plain_values import at_least
from cacheslide.units import MIB
from harness.backends.reference import DTYPES, ReferenceBackend, device_of
from harness.rag.kv_cache_manager import KVCacheManager
from harness.systems import VANILLA, resolve

MODEL = "models/tiny-llama-12m"
SYSTEM = "cacheblend"


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Model, system and memory."""
    parser.add_argument("--model", default=MODEL, help=f"checkpoint folder or GGUF file (default: {MODEL})")
    parser.add_argument("--dtype", default="float32", choices=sorted(DTYPES))
    parser.add_argument("--device", default="cpu", help="cpu, or cuda (default: cpu)")
    parser.add_argument("--system", default=SYSTEM, help=f"encodes chunks alone (default: {SYSTEM})")
    parser.add_argument("--layer", type=at_least(0), help="layer at which tokens are selected (default: the system's)")
    parser.add_argument("--ratio", type=float, help="share of reused tokens recomputed (default: the system's)")
    parser.add_argument("--device-mib", type=at_least(1), help="KV on the device at most (default: no limit)")
    parser.add_argument("--require-kernels", action="store_true", help="refuse to run without the Triton kernels")


def add_retrieval_options(parser: argparse.ArgumentParser) -> None:
    """The result of the step before."""
    parser.add_argument("--retrieval-json", type=Path, required=True, help="result of the retrieval step")
    parser.add_argument("--data", type=Path, help="the samples' file (default: where the retrieval step read it)")
    parser.add_argument("--samples", type=at_least(1), help="the first ones (default: all)")
    parser.add_argument("--results", type=Path, default=Path("results"), help="folder of results (default: results)")


@cache
def open_backend(model: str, dtype: str, device: str) -> ReferenceBackend:
    """The model, once a process; ConfigError for a device that is not there."""
    return ReferenceBackend(model, dtype, device_of(device))


def open_manager(args: argparse.Namespace) -> KVCacheManager:
    """The manager that these options describe."""
    if args.system in VANILLA:
        raise ConfigError(f"{args.system} is no system of the engine")
    [policy] = resolve([args.system], args.layer, args.ratio)
    capacity = None if args.device_mib is None else args.device_mib * MIB
    backend = open_backend(args.model, args.dtype, args.device)
    return KVCacheManager(backend, policy, device_bytes=capacity, require_kernels=args.require_kernels)


def model_settings(args: argparse.Namespace, manager: KVCacheManager) -> dict[str, Any]:
    """What records depend on: the model by its id, the system, and where it ran."""
    return {
        "model_id": manager.backend.model.model_id,
        "dtype": args.dtype,
        "device": args.device,
        "system": args.system,
        "layer": args.layer,
        "ratio": args.ratio,
        "device_mib": args.device_mib,
    }
