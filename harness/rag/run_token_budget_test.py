"""Quality and cost by token budget: `python -m harness.rag.run_token_budget_test --retrieval-json FILE`.

For every budget a sample's prompt holds as many of its ranked passages as fit; it is prefilled by the system from their
chunks, and answered. Writes DIR/analysis/token_budget.json.
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from cacheslide.errors import ConfigError
from cacheslide.plain_values import at_least
from cacheslide.units import MIB
from harness.comma_lists import ints
from harness.rag.kv_cache_manager import KVCacheManager
from harness.rag.options import add_model_options, add_retrieval_options, model_settings, open_manager
from harness.rag.per_sample import Record, measured
from harness.rag.placing import place_sample
from harness.rag.prompts import SamplePrompts
from harness.rag.retrieval import Retrieved, read_retrieval
from harness.rag.samples import needed_passages
from harness.rag.token_budget import TokenBudgetCalculator, fitting
from harness.scoring import score
from harness.step import command
from harness.tasks.passages import PassageRow

SCHEMA = "cacheslide.rag.token_budget/1"
BUDGETS = (256, 512, 1024, 2048)
MEANS = ("passages", "tokens", "kv_bytes", "compute_fraction", "ttft_s", "score")


def budget_path(results: Path) -> Path:
    """Where the result is written."""
    return results / "analysis" / "token_budget.json"


def answer_under_budgets(
    manager: KVCacheManager,
    retrieved: Retrieved,
    budgets: Sequence[int],
    max_new_tokens: int,
    out: Path,
    settings: dict[str, Any],
) -> dict[str, Any]:
    """Answer every sample under every budget of tokens; writes the result to `out` and returns it."""
    samples, calculator = retrieved.samples, TokenBudgetCalculator.of(manager.backend.model)
    settings = settings | {
        "schema": SCHEMA,
        "data": samples.about(),
        "retriever": retrieved.retriever,
        "budgets": list(budgets),
        "max_new_tokens": max_new_tokens,
        "samples": len(samples.rows),
        "bytes_per_token": calculator.bytes_per_token,
    }

    def work(row: PassageRow) -> Record:
        manager.clear()
        prompts, ranked = SamplePrompts(manager.backend, row, samples.metric), retrieved.ranked[row.id]
        place_sample(manager, prompts, row, fitting(prompts, ranked, max(budgets)))
        own = [_under(manager, prompts, row, fitting(prompts, ranked, budget), max_new_tokens) for budget in budgets]
        for budget, record in zip(budgets, own, strict=True):
            record |= {"budget": budget, "score": record["scores"][samples.metric]}
            record["kv_bytes"] = calculator.bytes_of(record["tokens"])
        return {"sha256": row.sha256, "budgets": own}

    def summary(records: list[Record]) -> list[dict[str, Any]]:
        return [_summary(budget, records) for budget in budgets]

    return measured(out, settings, samples, work, "token budgets", summary, metric=samples.metric)


def _under(
    manager: KVCacheManager, prompts: SamplePrompts, row: PassageRow, chosen: Sequence[int], max_new_tokens: int
) -> dict[str, Any]:
    """One sample with the passages `chosen` in its prompt."""
    engine, backend = manager.engine, manager.backend
    began = time.perf_counter()
    state = engine.prefill(prompts.prompt(chosen), room=max_new_tokens)
    ttft = time.perf_counter() - began
    receipt = state.receipt
    answer = backend.decode(engine.generate(state, state.logits, max_new_tokens, backend.stop_ids()))
    needed = set(needed_passages(row)[0])
    return {
        "passages": len(chosen),
        "needed": len(needed & set(chosen)) / len(needed) if needed else None,
        "tokens": receipt.tokens,
        "chunks_hit": receipt.chunks_hit,
        "tokens_recomputed": receipt.tokens_recomputed,
        "compute_fraction": receipt.compute_fraction,
        "ttft_s": ttft,
        "answer": answer,
        "scores": score(answer, row.answers),
    }


def _summary(budget: int, records: Sequence[Record]) -> dict[str, Any]:
    """Means over the samples; `needed` over those of which some needed passage is known."""
    own = [b for r in records for b in r["budgets"] if b["budget"] == budget]
    needed = [b["needed"] for b in own if b["needed"] is not None]
    means = {name: fmean(b[name] for b in own) for name in MEANS}
    return {"budget": budget, **means, "needed": fmean(needed) if needed else None}


def run(args: argparse.Namespace) -> Path:
    """The step; returns the result's path."""
    manager, out = open_manager(args), budget_path(args.results)
    calculator = TokenBudgetCalculator.of(manager.backend.model)
    budgets = args.budgets
    if args.budgets_mib is not None:
        budgets = [calculator.tokens_in(n * MIB) for n in args.budgets_mib]
    if not budgets or min(budgets) < 1 or len(set(budgets)) < len(budgets):
        raise ConfigError(f"budgets must be different counts of at least 1 token, not {budgets}")
    retrieved = read_retrieval(args.retrieval_json, args.data, args.samples)
    settings = model_settings(args, manager)
    made = answer_under_budgets(manager, retrieved, sorted(budgets), args.max_new_tokens, out, settings)
    print(f"{len(made['samples'])} samples; {calculator.bytes_per_token} bytes of KV a token")
    for row in made["summary"]:
        needed = "" if row["needed"] is None else f", {row['needed']:.2f} of the needed ones"
        print(
            f"budget {row['budget']}: {row['passages']:.1f} passages{needed}, {row['tokens']:.0f} tokens, compute "
            f"fraction {row['compute_fraction']:.2f}, TTFT {row['ttft_s']:.3f} s, {made['metric']} {row['score']:.3f}"
        )
    print(out)
    return out


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_retrieval_options(parser)
    parser.add_argument("--budgets", type=ints, default=list(BUDGETS), help="tokens a prompt, comma-separated")
    parser.add_argument("--budgets-mib", type=ints, help="the same as MiB of KV")
    parser.add_argument("--max-new-tokens", type=at_least(1), default=32)
    add_model_options(parser)
    run(parser.parse_args(argv))


if __name__ == "__main__":
    command(main)
