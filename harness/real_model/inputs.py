"""Inputs of the study on a real model, and the source of missing ones."""

from collections.abc import Iterable
from pathlib import Path

from cacheslide.errors import DataError


def required(model: str, data: Iterable[str], recordings: str = "") -> list[Path]:
    """The files and folders that a stage reads, except a model named on the hub.

    Parameters
    ----------
    model : str
        A checkpoint folder, a GGUF file, or a name on the hub.
    data : iterable of str
        Files of questions with passages.
    recordings : str
        Folder of recorded sessions; "" where the stage reads none.

    Raises
    ------
    DataError
        One line that tells how to get the missing input.
    """
    named = Path(model)
    on_hub = not named.exists() and model.count("/") == 1 and model[0] not in "./~"
    if not on_hub and not named.exists():
        raise DataError(f"model: {model} is not there: `make real-model` brings the model (docs/real.md)")
    files = [Path(path) for path in data]
    for path in files:
        if not path.is_file():
            raise DataError(f"data: {path} is not there: docs/real.md says where the data sets come from")
    if recordings and not Path(recordings).is_dir():
        raise DataError(f"recordings: {recordings} is no folder: docs/real.md says where recorded sessions come from")
    return [*([] if on_hub else [named]), *files, *([Path(recordings)] if recordings else [])]
