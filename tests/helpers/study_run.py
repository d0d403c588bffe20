"""The study's accuracy steps on the shipped model and a few short prompts."""

from pathlib import Path

from harness.experiments.study import steps as study
from harness.tasks.data import write_dataset

CONFIG = {
    "run": "test",
    "seed": 0,
    "model": "models/tiny-llama-12m",
    "device": "cpu",
    "dtype": "float32",
    "store_dtype": "bfloat16",
    "chunk_size": 1024,
    "suffix_len": 1,
    "recompute_ratio": 0.26,
}


def deep_prompts(folder: Path, count: int) -> str:
    """Path of a file of `count` prompts of the deep mix, of about 700 tokens."""
    path = folder / "hotpotqa-deep.jsonl"
    write_dataset(path, "hotpotqa-deep", "test", 3, count, 700)
    return str(path)


def accuracy_of(config: dict, data: str, folder: Path) -> dict[str, str]:
    """Run the steps for the configuration's systems, selecting at layer 3; path of each system's records."""
    study.step_chunks(config, data, 3, str(folder / "chunks"), 2)
    outputs = {name: str(folder / f"{name}.jsonl") for name in config["systems"]}
    study.step_accuracy(config, data, str(folder / "chunks"), 3, list(outputs.values()), 2)
    return outputs
