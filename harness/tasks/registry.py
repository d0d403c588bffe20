"""Every data set by name."""

from collections.abc import Callable, Iterator
from pathlib import Path

from cacheslide.errors import DataError
from harness.tasks import hotpotqa, msc, musique, samsum, swebench, wikimqa
from harness.tasks.example import TaskExample

Loader = Callable[..., Iterator[TaskExample]]

TASKS: dict[str, Loader] = {
    "hotpotqa": hotpotqa.load,
    "musique": musique.load,
    "2wikimqa": wikimqa.load,
    "samsum": samsum.load,
    "msc": msc.load,
    "msc_self_instruct": msc.load_self_instruct,
    **swebench.LOADERS,
}


def load(
    name: str,
    split: str,
    path: str | Path | None = None,
    limit: int | None = None,
    seed: int = 0,
) -> Iterator[TaskExample]:
    """Iterate over the examples of a data set.

    Parameters
    ----------
    name : str
        A key of `TASKS`.
    split : str
        Split name, for example "validation".
    path : str or Path, optional
        A json, jsonl, csv or parquet file in the data set's schema, or a folder of them. When it is not given,
        files under `datasets/local/<name>/` are used, and where there are none, the Hugging Face hub.
    limit : int, optional
        Read no more than this many examples; they are the first ones of the split.
    seed : int
        Chooses what is generated around a row (scratchpads, observations, few-shot examples), not which rows.

    Yields
    ------
    TaskExample
        Rows in file order. The same arguments give the same examples.

    Raises
    ------
    DataError
        For an unknown name or split, a missing file or network, or (on iteration) a row that breaks the schema.
    """
    if name not in TASKS:
        raise DataError(f"unknown data set {name!r}; known: {', '.join(sorted(TASKS))}")
    return TASKS[name](split, path=path, limit=limit, seed=seed)
