"""Losses of the ledger model's layers: attention targets, gathered words, an entry's content, answers."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from harness.training.ledger.data import ASK, COPY, NONE
from harness.training.ledger.model import LedgerModel


@dataclass(frozen=True)
class Plan:
    """Roles of the layers, counted from 0.

    Attributes
    ----------
    gather : layer in which an evidence attends to its entry's words: head 0 to the name that is set, the last head to
        source or value; the next layer to the field
    look : layers in which a copy attends to the latest entry of its source, one per hop
    ask : layer in which a question attends to the latest entry of the name's field
    """

    gather: int
    look: tuple[int, ...]
    ask: int

    @classmethod
    def of(cls, layers: int) -> "Plan":
        """For a model of `layers` layers: a quarter to gather, a quarter to copy, half of the rest to read."""
        gather = max(1, layers // 8)
        first, hops = gather + 2, min(4, max(1, (layers - gather - 3) // 2))
        step = max(1, (layers // 2 - first) // max(1, hops - 1)) if hops > 1 else 1
        look = tuple(first + step * i for i in range(hops))
        return cls(gather, look, min(layers - 2, max(look[-1] + 1, layers * 3 // 4)))

    @property
    def watched(self) -> frozenset[int]:
        """Layers whose queries and keys are read."""
        return frozenset({self.gather, self.gather + 1, *self.look, self.ask})


def attention_loss(q: Tensor, k: Tensor, at: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy of one head's attention against `target`, and where its maximum is at the target.

    Parameters
    ----------
    q, k : Tensor [batch, length, head_dim]
    at, target : Tensor [batch, m]
        Offsets of the queries, and of the keys to attend to; `NONE` without a target.

    Returns
    -------
    Tensor [] and Tensor [batch, m], bool
        Mean cross-entropy in nats, and which queries attend most to their target.
    """
    index = at.clamp_min(0)[..., None].expand(-1, -1, q.shape[-1])
    scores = (q.gather(1, index) @ k.transpose(1, 2)).float() * q.shape[-1] ** -0.5
    places = torch.arange(k.shape[1], device=k.device)
    scores = scores.masked_fill(places > at.clamp_min(0)[..., None], -1e9)
    return _mean_loss(scores, target), (scores.argmax(-1) == target) & (target != NONE)


def training_loss(model: LedgerModel, batch: dict[str, Tensor], plan: Plan, pointers: float) -> tuple[Tensor, dict]:
    """The loss of a batch, and for the log the shares of right attention, copies and answers."""
    states, looks = model(batch["ids"], plan.watched)
    at, kind = batch["at"], batch["kind"]
    last = model.size.heads - 1
    wanted = [(plan.gather, 0, "subject_at"), (plan.gather, last, "source_at"), (plan.gather + 1, 0, "field_at")]
    wanted += [(layer, 0, "look_at") for layer in (*plan.look, plan.ask)]
    loss, right = states[-1].new_zeros((), dtype=torch.float32), {}
    for layer, head, name in wanted:
        q, k = looks[layer]
        target = batch[name]
        if name == "look_at":
            target = target.masked_fill((kind == ASK) != (layer == plan.ask), NONE)
        own, hit = attention_loss(q[:, head], k[:, head * k.shape[1] // q.shape[1]], at, target)
        loss = loss + pointers * own
        right[f"{name} {layer}"] = hit.sum(), (target != NONE).sum()

    def at_labels(layer: int) -> Tensor:
        return states[layer].gather(1, at.clamp_min(0)[..., None].expand(-1, -1, states[layer].shape[-1]))

    gathered = at_labels(plan.gather + 1)
    loss = loss + _mean_loss(model.shown(gathered, "subject"), batch["subject"])
    loss = loss + _mean_loss(model.shown(gathered, "source"), batch["source"])
    for hops, layer in enumerate(plan.look, 1):
        due = (kind != ASK) & (batch["depth"] <= hops)
        held = model.shown(at_labels(layer + 1), "held")
        target = batch["held"].masked_fill(~due, NONE)
        loss = loss + _mean_loss(held, target) / len(plan.look)
        if layer == plan.look[-1]:
            for depth in range(1, 4):
                some = (kind == COPY) & (batch["depth"] == depth)
                right[f"copy{depth}"] = ((held.argmax(-1) == batch["held"]) & some).sum(), some.sum()
    final = model.logits(at_labels(-1))
    answer = batch["held"].masked_fill(kind != ASK, NONE)
    loss = loss + 2 * _mean_loss(final, answer)
    right["answer"] = ((final.argmax(-1) == answer) & (answer != NONE)).sum(), (answer != NONE).sum()
    return loss + 0.1 * _end_loss(model, states[-1], batch), right


def _end_loss(model: LedgerModel, state: Tensor, batch: dict[str, Tensor]) -> Tensor:
    """Loss of the end token after an answer's two words."""
    asked, ids = batch["asked"], batch["ids"]
    place = asked.clamp_min(0) + 2
    told = state.gather(1, place[..., None].expand(-1, -1, state.shape[-1]))
    target = ids.gather(1, (place + 1).clamp_max(ids.shape[1] - 1)).masked_fill(asked == NONE, NONE)
    return _mean_loss(model.logits(told), target)


def _mean_loss(scores: Tensor, target: Tensor) -> Tensor:
    total = F.cross_entropy(scores.flatten(0, 1), target.flatten(), reduction="sum", ignore_index=NONE)
    return total / (target != NONE).sum().clamp_min(1)
