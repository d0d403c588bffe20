"""Deep supervision: a loss on the answer at every layer from which it should be resolved."""

import torch
import torch.nn.functional as F
from torch import Tensor

from harness.training.data import END, IGNORE, LINK, OUTPUT, QUESTION, SECOND_WORD, SETTLED
from harness.training.model import Trainee

SHARE = {SETTLED: 0.2, LINK: 1.0, QUESTION: 1.0, SECOND_WORD: 1.0, END: 0.1, OUTPUT: 2.0}


def needed_layer(hops: Tensor, schedule: str) -> Tensor:
    """The layer (from 0) after which `hops` hops should be resolved.

    "linear" takes one layer per hop. "double" is pointer doubling: a link learns its target's target in
    layer 1, that one's target's target in layer 2, and so reaches 1, 3, 7 hops after layers 1, 2, 3.
    """
    if schedule == "linear":
        return hops
    return (hops > 0).long() + (hops > 1).long() + (hops > 3).long() + 8 * (hops > 7).long()


def training_loss(
    model: Trainee, batch: dict[str, Tensor], aux: float, schedule: str, gather: float, pointers: float, depth: int = 5
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of a batch and, for the log, its parts and which labels are right."""
    states, gather_loss = model(batch["ids"], batch["scratch"], batch["asked"], batch["hinted"], batch["pos"])
    kind, final = batch["kind"], states[-1]
    weight = torch.zeros_like(kind, dtype=torch.float32)
    for k, share in SHARE.items():
        of_kind = kind == k
        weight = weight + of_kind * (share / of_kind.sum().clamp_min(1))
    logits = model.logits(final)
    answer = (F.cross_entropy(logits, batch["y1"], reduction="none") * weight).sum()
    loss = answer
    if len(batch["resolved"]):
        loss = loss + _supervised(model, states, batch, weight, aux, schedule, pointers, min(depth, len(states) - 2))
    right = logits.argmax(-1) == batch["y1"]
    return loss + gather * gather_loss, {"answer": answer.detach(), "gather": gather_loss.detach(), "right": right}


def _supervised(model, states, batch, weight, aux: float, schedule: str, pointers: float, last: int) -> Tensor:
    """Loss of layers 1 to `last` at statements and questions (`resolved`), and of the last state's second word."""
    at = batch["resolved"]
    kind, hops, y1, y2, w = (
        x.index_select(0, at) for x in (batch["kind"], batch["hops"], batch["y1"], batch["y2"], weight)
    )

    def words(state: Tensor, head: str, target: Tensor) -> Tensor:
        return F.cross_entropy(model.logits(state, head), target, reduction="none", ignore_index=IGNORE)

    loss = (words(states[-1].index_select(0, at), "second", y2) * w).sum()
    # a question reads resolved statements, so it is due only at the last layer and has no pointers
    need = torch.where(kind == QUESTION, last, needed_layer(hops, schedule))
    for layer in range(1, last + 1):
        state = states[layer].index_select(0, at)
        both = words(state, "first", y1) + words(state, "second", y2)
        loss = loss + aux / last * (both * w * (need <= layer)).sum()
    if pointers and schedule == "double":
        for layer, name in ((1, "ptr2"), (2, "ptr4")):
            if layer < len(states):
                target = batch[name].index_select(0, at)
                ce = words(states[layer].index_select(0, at), "pointer", target).sum()
                loss = loss + pointers * ce / (target != IGNORE).sum().clamp_min(1)
    return loss


def accuracy(batch: dict[str, Tensor], right: Tensor) -> dict[str, float]:
    """Share right by kind and depth; the `bare` figures are over rows without any hint."""
    kind, depth, bare = batch["kind"], batch["depth"], batch["bare"]
    cells = {}
    for name, mask in (("", torch.ones_like(bare)), ("bare ", bare)):
        cells[name + "question"] = mask & (kind == QUESTION)
        cells[name + "second"] = mask & (kind == SECOND_WORD)
        cells[name + "output"] = mask & (kind == OUTPUT)
        for d in range(1, 5):
            cells[f"{name}link{d}"] = mask & (kind == LINK) & (depth == d)
    return {k: (right & m).sum().item() / n for k, m in cells.items() if (n := m.sum().item())}
