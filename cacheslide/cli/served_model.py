"""Checks a model's folder before a server starts, which takes a minute to fail by itself."""

import os
import re
from pathlib import Path
from typing import Any

from cacheslide.errors import ModelError
from cacheslide.models.weights import weight_files
from cacheslide.plain_values import read_json, shown
from cacheslide.policies.base import ReusePolicy
from cacheslide.vllm.support import FAMILIES
from cacheslide.vllm.systems import check_served

TOKENIZERS = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "tekken.json", "vocab.json")
OTHER_WEIGHTS = ("*.bin", "*.pt", "*.gguf")  # vLLM reads them too; what is in them is its to check
_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")  # a model of the hub
# Options of vLLM that name a file or a kind of file elsewhere, and so take a check's place.
_CONFIG = {"--hf-overrides", "--hf-config-path", "--config-format", "--config"}
_WEIGHTS = {"--load-format", "--model-loader-extra-config", "--config"}
_TOKENIZER = {"--tokenizer", "--skip-tokenizer-init", "--tokenizer-mode", "--config"}


def check_model(model: str, policy: ReusePolicy, vllm_args: list[str]) -> None:
    """Raise ModelError for a folder that is missing or incomplete, PolicyError for a system that it cannot run.

    A name of the Hugging Face hub is left to vLLM, unless the hub is switched off and the name is not in its cache.
    """
    given = {word.split("=")[0].replace("_", "-") for word in vllm_args if word.startswith("--")}
    folder = Path(model).expanduser()
    if not folder.is_dir():
        _check_name(model, folder, given)
        check_served(policy)
        return
    if not given & _CONFIG:
        check_served(policy, _layers(folder))
    if not given & _WEIGHTS and not any(next(folder.glob(kind), None) for kind in OTHER_WEIGHTS):
        weight_files(folder)
    if not given & _TOKENIZER and not any((folder / name).is_file() for name in TOKENIZERS):
        raise ModelError(f"no tokenizer in {folder}: one of {', '.join(TOKENIZERS)} belongs there (or --tokenizer)")


def _layers(folder: Path) -> int | None:
    """Layers of the model by its config.json, None where this does not say; ModelError for other families."""
    if not (folder / "config.json").is_file():
        raise ModelError(f"no model at {folder}: config.json is missing")
    config: Any = read_json(folder / "config.json", ModelError)
    names = config.get("architectures") if isinstance(config, dict) else None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ModelError(f"{folder / 'config.json'}: architectures must be a list of names, not {shown(names)}")
    if not set(names) & set(FAMILIES):
        raise ModelError(f"{folder} is a {', '.join(names)[:200]}; served with reuse are {', '.join(FAMILIES[:-1])}")
    layers = config.get("num_hidden_layers")
    return layers if isinstance(layers, int) else None


def _check_name(model: str, folder: Path, given: set[str]) -> None:
    if folder.is_file():
        return  # a GGUF file: vLLM's to check
    beside = folder.parent != Path(".") and folder.parent.is_dir()  # models/typo looks like a name of the hub
    if beside or folder.is_absolute() or not _NAME.fullmatch(model):
        raise ModelError(f"no model at {model}: there is no such folder")
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE") and "--download-dir" not in given:
        from huggingface_hub import try_to_load_from_cache

        if not isinstance(try_to_load_from_cache(model, "config.json"), str):
            raise ModelError(f"no folder {model}, and the hub's cache has no such model (HF_HUB_OFFLINE is set)")
