"""Batches for the agents' model: one part per source of rows, all parts in one optimiser step."""

from collections.abc import Iterator
from random import Random

from tokenizers import Tokenizer
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from cacheslide.errors import ConfigError
from harness.agents.tasks.qa import DEPTH
from harness.training.agent_rows import STATES, STEPS, Encoder, RowsOf, rows
from harness.training.agent_tasks import Difficulty
from harness.training.data import collate


def sources(stage: dict, depth: int = DEPTH) -> list[list[RowsOf]]:
    """A stage's parts. A part is a list of sources, of which each batch takes one by weight. `depth` caps chains."""
    parts = []
    for part in stage["parts"]:
        parts.append([])
        for raw in part:
            given = {k: tuple(v) if isinstance(v, list) else v for k, v in raw.items() if k != "difficulty"}
            harder = {k: tuple(v) if isinstance(v, list) else v for k, v in raw.get("difficulty", {}).items()}
            if unknown := set(given["agents"]) - {*STATES, *STEPS}:
                raise ConfigError(f"unknown agents {', '.join(sorted(unknown))}")
            harder["depth"] = min(depth, harder.get("depth", Difficulty.depth))
            parts[-1].append(RowsOf(**given, difficulty=Difficulty(**harder)))
    return parts


class AgentStream(IterableDataset):
    """Endless lists of batches, one for each of a stage's parts."""

    def __init__(self, parts: list[list[RowsOf]], tokenizer: Tokenizer, pad: int, seed: str) -> None:
        self.parts, self.tokenizer, self.pad, self.seed = parts, tokenizer, pad, seed

    def __iter__(self) -> Iterator[list[dict[str, Tensor]]]:
        worker = get_worker_info()
        rng = Random(f"{self.seed}-{worker.id if worker else 0}")
        encoder = Encoder(self.tokenizer)
        streams = [[(spec, rows(rng, spec, encoder)) for spec in part] for part in self.parts]
        while True:
            out = []
            for part in streams:
                spec, source = rng.choices(part, [s.weight for s, _ in part])[0]
                out.append(collate([next(source) for _ in range(spec.batch)], spec.length, self.pad))
            yield out
