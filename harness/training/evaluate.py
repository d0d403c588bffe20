"""Held-out score of a checkpoint: greedy answers to synthetic questions, one question after each prompt.

`python -m harness.training.evaluate --model models/tiny-llama-12m` prints a table by style, mix and length; the ledger
model has a mix of its own, `--model models/tiny-ledger-4m --mixes ledger`.
"""

import argparse
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer

from cacheslide.models.families import read_config
from harness.step import command
from harness.tasks.data import LEDGER, draw_examples
from harness.tasks.example import TaskExample
from harness.tasks.synthetic.render import STYLES
from harness.tasks.synthetic.world import MIXES


def f1(answer: list[int], gold: list[int]) -> float:
    """Overlap F1 of two answers as token ids (every word of the task is one token)."""
    common = sum((Counter(answer) & Counter(gold)).values())
    return 2 * common / (len(answer) + len(gold)) if common else 0.0


@torch.no_grad()
def answers(model, context: list[int], questions: list[list[int]], steps: int) -> list[list[int]]:
    """Greedy answers to questions about one context, which is run once; questions of one length go together."""
    out: dict[int, list[int]] = {}
    for length in sorted({len(q) for q in questions}):
        some = [i for i, q in enumerate(questions) if len(q) == length]
        cache = model(torch.tensor([context], device=model.device)).past_key_values
        cache.batch_repeat_interleave(len(some))
        ids, found = torch.tensor([questions[i] for i in some], device=model.device), []
        for _ in range(steps):
            ids = model(ids, past_key_values=cache).logits[:, -1:].argmax(-1)
            found.append(ids)
        out |= dict(zip(some, torch.cat(found, 1).tolist(), strict=True))
    return [out[i] for i in range(len(questions))]


def score(model, tokenizer: Tokenizer, tasks: Iterable[TaskExample], context: bool = True) -> dict:
    """F1 over all questions, and by depth of stable (s) and volatile (v) ones; `end` is the share followed by </s>."""

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False).ids

    bos, eos = (tokenizer.token_to_id(t) for t in ("<s>", "</s>"))
    got, golds, keys, groups, lengths = [], [], [], [], []
    for n, task in enumerate(tasks):
        shown = task.segments if context else task.segments[:1]
        head = [bos, *(t for s in shown for t in encode(s.text))]
        asked = [encode(q.text) for q in task.questions]
        gold = [encode(" " + q.answers[0]) for q in task.questions]
        got += answers(model, head, asked, max(map(len, gold)) + 1)
        golds += gold
        keys += [f"{'v' if q.volatile else 's'}{q.depth}" for q in task.questions]
        groups += [n] * len(asked)
        lengths += [len(head) + len(q) for q in asked]
    points = [f1(g[: len(gold)], gold) for g, gold in zip(got, golds, strict=True)]
    cells, by_prompt = defaultdict(list), defaultdict(list)
    for key, point, group in zip(keys, points, groups, strict=True):
        cells[key].append(point)
        by_prompt[group].append(point)
    return {
        "f1": sum(points) / len(points),
        "interval": bootstrap([sum(p) / len(p) for p in by_prompt.values()]),
        "end": sum(g[-1] == eos for g in got) / len(got),
        "n": len(points),
        "prompts": len(by_prompt),
        "tokens": round(sum(lengths) / len(lengths)),
        "by_depth": {k: [round(sum(c) / len(c), 4), len(c)] for k, c in sorted(cells.items())},
    }


def bootstrap(means: list[float], draws: int = 2000) -> list[float]:
    """95 % interval of the mean over prompts."""
    values, generator = torch.tensor(means), torch.Generator().manual_seed(0)
    picks = torch.randint(len(means), (draws, len(means)), generator=generator)
    low, high = values[picks].mean(1).quantile(torch.tensor([0.025, 0.975])).tolist()
    return [round(low, 4), round(high, 4)]


def table(
    model,
    tokenizer: Tokenizer,
    split: str,
    seed: int,
    prompts: int,
    lengths: Sequence[int],
    mixes: Sequence[str] = tuple(MIXES),
) -> dict:
    """Scores for every style, mix and length, and without the last mix's context."""
    out = {}
    for style in STYLES:
        for mix in mixes:
            for tokens in lengths:
                tasks = draw_examples(f"{style}-{mix}", split, seed, prompts, tokens)
                out[f"{style} {mix} {tokens}"] = score(model, tokenizer, tasks)
        tasks = draw_examples(f"{style}-{mixes[-1]}", split, seed, prompts, lengths[0])
        out[f"{style} no context"] = score(model, tokenizer, tasks, context=False)
    return out


def show(scores: dict) -> str:
    """The scores as lines of text."""
    lines = []
    for name, s in scores.items():
        cells = " ".join(f"{k}={v[0]:.2f}" for k, v in s["by_depth"].items())
        lines.append(f"{name:24s} f1 {s['f1']:.3f} {s['interval']} n {s['n']} end {s['end']:.2f} | {cells}")
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    from transformers import AutoModelForCausalLM

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--mixes", nargs="+", default=list(MIXES), choices=[*MIXES, LEDGER])
    parser.add_argument("--split", default="test")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    read_config(args.model)  # names missing files, where the hub's client would report a missing repository
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=getattr(torch, args.dtype)).eval()
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = Tokenizer.from_file(str(args.model / "tokenizer.json"))
    scores = table(model, tokenizer, args.split, args.seed, args.prompts, args.tokens, args.mixes)
    print(show(scores))
    if args.out:
        args.out.write_text(json.dumps(scores, indent=1) + "\n")


if __name__ == "__main__":
    command(main)
