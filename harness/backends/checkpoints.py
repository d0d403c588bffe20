"""Where a model's files are: a folder, a GGUF file, or a name on the Hugging Face hub."""

import re
from pathlib import Path

from huggingface_hub import snapshot_download

from cacheslide.errors import ModelError

_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_NEEDED = ["*.json", "*.safetensors", "tokenizer.model", "*.jinja"]


def find_checkpoint(model: str | Path) -> Path:
    """The folder (or GGUF file) of `model`: itself where it exists, otherwise what the hub has under this name.

    The hub's cache is used first, as by all of its clients; ModelError, in one line, where neither has it.
    """
    path = Path(model)
    if path.exists() or not _NAME.fullmatch(str(model)):
        return path  # one that is missing is named by whoever reads it
    try:
        return Path(snapshot_download(str(model), allow_patterns=_NEEDED))
    except Exception as error:  # the hub client's errors share no base class
        why = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(f"no model at {model}: no folder, and the Hugging Face hub does not give it ({why})") from None
