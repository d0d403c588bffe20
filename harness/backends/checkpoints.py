"""Finds a model's files: a folder, a GGUF file, or a name on the Hugging Face hub."""

import re
from pathlib import Path

from huggingface_hub import snapshot_download

from cacheslide.errors import ModelError

_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_NEEDED = ["*.json", "*.safetensors", "tokenizer.model", "*.jinja"]


def find_checkpoint(model: str | Path) -> Path:
    """The folder (or GGUF file) of `model`: the path itself if it exists, otherwise the hub's snapshot of that name.

    The hub's local cache is used first; one-line ModelError if neither has it.
    """
    path = Path(model)
    if path.exists() or not _NAME.fullmatch(str(model)):
        return path  # the reader reports a missing path
    try:
        return Path(snapshot_download(str(model), allow_patterns=_NEEDED))
    except Exception as error:  # the hub client's errors share no base class
        why = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(f"no model at {model}: no folder, and the Hugging Face hub does not give it ({why})") from None
