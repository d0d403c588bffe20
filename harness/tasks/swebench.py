"""SWE-bench (Jimenez et al., 2024) as SWE-Agent sees it: the issue and the files are fixed, the observation changes.

The variants with a `text` column (SWE-bench_oracle and the like) carry the files to look at; the plain ones have the
issue only. The observation is generated from the row in SWE-Agent's format and never uses the patch, the tests or
the hints: with files, a window of one of them; without, a script made from the code quoted in the issue.
"""

import json
import random
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from datasets import Features, Value

from harness.tasks import hub, layout
from harness.tasks.example import Question, TaskExample
from harness.tasks.schema import Schema

SYSTEM = (
    "You are an autonomous programmer working in a terminal on the repository that the issue is about. "
    "The observation is the output of your latest command. Resolve the issue without breaking other behaviour."
)
WINDOW = (40, 100)  # least and most lines of a file that an observation shows; SWE-Agent's window is 100
REQUIRED = (
    "repo",
    "instance_id",
    "base_commit",
    "patch",
    "test_patch",
    "problem_statement",
    "hints_text",
    "created_at",
    "version",
    "FAIL_TO_PASS",
    "PASS_TO_PASS",
    "environment_setup_commit",
)
OPTIONAL = ("text", "difficulty", "image", "log_parser", "eval_type", "eval_script")
FEATURES = Features({name: Value("string") for name in (*REQUIRED, *OPTIONAL)})
SCHEMA = Schema(
    FEATURES,
    optional=frozenset(OPTIONAL),
    # empty in the training split, whose instances have no execution environment
    nullable=frozenset({"hints_text", "version", "FAIL_TO_PASS", "PASS_TO_PASS", "environment_setup_commit"}),
)
FILE = re.compile(r"\[start of ([^\]\n]+)\]\n(.*?)\n?\[end of \1\]", re.DOTALL)
FENCE = re.compile(r"```[a-zA-Z]*\n(.*?)```", re.DOTALL)


def adapt(row: dict[str, Any], where: str) -> dict[str, Any]:
    """Accept lists of test names beside the JSON text that the official files hold."""
    lists = {
        name: json.dumps(row[name]) for name in ("FAIL_TO_PASS", "PASS_TO_PASS") if isinstance(row.get(name), list)
    }
    return {**row, **lists}


def _source(name: str, repo: str, splits: str) -> hub.Source:
    return hub.Source(name, repo, {split: f"data/{split}-*.parquet" for split in splits.split()}, SCHEMA, adapt)


SOURCES = {
    source.name: source
    for source in (
        _source("swebench", "SWE-bench/SWE-bench", "train dev test"),
        _source("swebench_lite", "SWE-bench/SWE-bench_Lite", "dev test"),
        _source("swebench_verified", "SWE-bench/SWE-bench_Verified", "test"),
        _source("swebench_oracle", "princeton-nlp/SWE-bench_oracle", "train dev test validation"),
        _source("swebench_lite_oracle", "princeton-nlp/SWE-bench_Lite_oracle", "dev test"),
    )
}


def load(
    name: str, split: str, path: str | Path | None = None, limit: int | None = None, seed: int = 0
) -> Iterator[TaskExample]:
    """One of `SOURCES`; `seed` chooses the observations. See `registry.load` for the parameters.

    `answers` holds the gold patch for reference: success is decided by running the tests, for which `meta` carries
    the whole row except its long texts.
    """
    return hub.limited((_example(name, row, split, seed) for row in hub.rows(SOURCES[name], split, path)), limit)


LOADERS = {name: partial(load, name) for name in SOURCES}


def _example(name: str, row: hub.Row, split: str, seed: int) -> TaskExample:
    files = code_files(row.fields.get("text", ""))
    issue = row["problem_statement"]
    meta = {key: value for key, value in row.fields.items() if value is not None}
    for long_text in ("text", "problem_statement", "hints_text", "patch"):
        meta.pop(long_text, None)
    now, before = observations(hub.row_rng(seed, name, row["instance_id"]), row, files)
    return layout.example(
        id=row["instance_id"],
        task=name,
        system=SYSTEM,
        updated=("observation", now, before),
        fixed=[("issue", f"<issue>\n{issue.strip()}\n</issue>"), *((path, _block(path, text)) for path, text in files)],
        question=Question(
            id=row["instance_id"],
            text="Write one patch that `git apply` accepts and that resolves the issue.\nPatch:\n",
            answers=(row["patch"],),
            volatile=False,
        ),
        metric="success",
        meta={"file": row.file, "split": split, "files": str(len(files)), **meta},
    )


def code_files(text: str) -> list[tuple[str, str]]:
    """Path and content of every file in an oracle-style prompt, which lists them between <code> and </code>."""
    _, _, rest = text.partition("<code>\n")
    code, _, _ = rest.rpartition("\n</code>")
    return FILE.findall(code)


def observations(rng: random.Random, row: hub.Row, files: list[tuple[str, str]]) -> tuple[str, str]:
    """The observation now and the one before it, the output of the session's first command."""
    folder = "/" + row["repo"].replace("/", "__")
    before = f"Observation:\n{row['base_commit']}\n{_prompt(folder, 'n/a')}"
    if files:
        path, text = rng.choice(files)
        return f"Observation:\n{_window(rng, path, text)}\n{_prompt(folder, f'{folder}/{path}')}", before
    snippets = [snippet.strip("\n") for snippet in FENCE.findall(row["problem_statement"]) if snippet.strip()]
    if snippets:
        script = rng.choice(snippets).splitlines()
        shown = "\n".join(f"{i}:{line}" for i, line in enumerate(script, start=1))
        head = f"[File: {folder}/reproduce.py ({len(script)} lines total)]"
        return f"Observation:\n{head}\n{shown}\n{_prompt(folder, f'{folder}/reproduce.py')}", before
    status = f"HEAD detached at {row['base_commit'][:7]}\nnothing to commit, working tree clean"
    return f"Observation:\n{status}\n{_prompt(folder, 'n/a')}", before


def _window(rng: random.Random, path: str, text: str) -> str:
    lines = text.splitlines()
    size = min(len(lines), rng.randint(*WINDOW))
    first = rng.randint(0, len(lines) - size)
    above = [f"({first} more lines above)"] if first else []
    left = len(lines) - first - size
    below = [f"({left} more lines below)"] if left else []
    shown = [f"[File: {path} ({len(lines)} lines total)]", *above, *lines[first : first + size], *below]
    return "\n".join(shown)


def _prompt(folder: str, open_file: str) -> str:
    return f"(Open file: {open_file})\n(Current directory: {folder})\nbash-$"


def _block(path: str, text: str) -> str:
    return f"[start of {path}]\n{text}\n[end of {path}]"
