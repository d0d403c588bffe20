"""Held-out score of a ledger model in training: share of right answer words, each given the correct words before it.

It steers training; reported figures are greedy answers through the engine (`harness.experiments.rules.static_choices`).
"""

from collections import defaultdict
from random import Random

import torch

from harness.tasks.ledger.prompts import documents_for
from harness.tasks.ledger.sentences import STYLES
from harness.tasks.ledger.world import Shape
from harness.training.ledger.data import ASK, RowSpec, collate, prompt_rows
from harness.training.ledger.model import Block, LedgerModel


@torch.no_grad()
def words_right(
    model: LedgerModel, tokens: int, prompts: int, shape: Shape | None = None, documents: int | None = None
) -> dict:
    """Share of right words on validation prompts of about `tokens` tokens, in all and by depth."""
    documents = documents_for(tokens) if documents is None else documents
    spec = RowSpec(shape or Shape(), (documents, documents), 2 * tokens + 1024, 1)
    device = model.embedding.device
    compiled, model.run = model.run, [lambda x, c, s, b=b: Block.forward(b, x, c, s) for b in model.blocks]
    cells: dict[int, list[bool]] = defaultdict(list)
    try:
        for n in range(prompts):
            rng = Random(f"validation-{tokens}-{n}")
            for row in prompt_rows(rng, spec, "validation", STYLES[n % 2], turns=1):
                batch = {k: v.to(device) for k, v in collate([row], len(row.ids)).items()}
                with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                    states, _ = model(batch["ids"], frozenset())
                    told = model.logits(states[-1][0, batch["at"][0].clamp_min(0)]).argmax(-1)
                hits = told == batch["held"][0]
                asked = (batch["kind"][0] == ASK).nonzero()[:, 0]
                for i in asked.tolist():
                    cells[int(batch["depth"][0, i])].append(bool(hits[i]))
    finally:
        model.run = compiled
    n = sum(map(len, cells.values()))
    depth = {d: [round(sum(c) / len(c), 3), len(c)] for d, c in sorted(cells.items())}
    return {"right": sum(map(sum, cells.values())) / max(n, 1), "n": n, "depth": depth}
