"""`cacheslide demo`: two turns of one agent on the shipped model, recomputed and with reuse."""

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cacheslide.errors import ConfigError, ModelError, PolicyError
from cacheslide.plain_values import at_least
from cacheslide.policies.default import DEFAULT_SYSTEM

SHIPPED = Path("models/tiny-llama-12m")
NEW_TOKENS = 4  # an answer is two tokens and the end
MAX_GENERATION = 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `demo`."""
    parser.description = (
        "Two turns of one agent on the shipped model: instructions and reports stay, notes between them change. Each "
        "turn is recomputed and answered with reuse; seconds on two cores."
    )
    parser.add_argument("--model", type=Path, help=f"folder of the shipped model (default: {SHIPPED} of the checkout)")
    parser.add_argument(
        "--system", default=DEFAULT_SYSTEM, help=f"a name from `cacheslide systems` (default: {DEFAULT_SYSTEM})"
    )
    parser.add_argument("--layer", type=int, help="selection layer, of systems that have one (default: the system's)")
    parser.add_argument(
        "--recompute-ratio", type=float, help="share of the reused tokens to recompute (default: the system's)"
    )
    parser.add_argument("--repeats", type=at_least(1), default=3, help="prefills a time is the median of (default: 3)")
    parser.add_argument(
        "--prompts", type=Path, metavar="FOLDER", help="only write the turns, before.json and now.json, for `run`"
    )
    parser.add_argument("--json", action="store_true", help="answers, times and receipts as one JSON object")
    parser.set_defaults(run=_run)


def shipped_model(given: Path | None) -> Path:
    """The folder of the shipped model: the given one, or the checkout's; ModelError where there is none."""
    checkout = Path(__file__).resolve().parents[2]
    places = [given] if given is not None else [SHIPPED, checkout / SHIPPED]
    for folder in places:
        if (folder / "config.json").is_file():
            return folder
    if given is not None:
        raise ModelError(f"no model at {given}: config.json is missing")
    raise ModelError(
        f"the shipped model is not here: it belongs to the checkout, not to the installed package; run this in the "
        f"checkout's folder, or give its {SHIPPED} with --model"
    )


def write_prompts(folder: Path) -> None:
    """Write both turns as prompt files; ConfigError where that fails."""
    from cacheslide.cli.demo_turns import prompt_file

    for number, name in enumerate(("before.json", "now.json")):
        try:
            (folder / name).write_text(json.dumps(prompt_file(number), indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"cannot write {folder / name}: {error.strerror}") from None


def _run(args: argparse.Namespace) -> int:
    if args.prompts is not None:
        write_prompts(args.prompts)
        return 0
    folder = shipped_model(args.model)
    turns = _turns(args, folder)
    if args.json:
        print(json.dumps({"model": str(folder), "turns": list(turns)}))
        return 0
    print(f"An agent's instructions and reports stay, its notes change; {folder}, float32 on the CPU.")
    for number, result in enumerate(turns):
        print(*_shown(number, result), sep="\n", flush=True)
    before, after = result["recompute"], result["reuse"]
    compute, ratio = after["receipt"]["compute_fraction"], after["ttft_ms"] / before["ttft_ms"]
    print(
        f"\nSecond turn: {100 * compute:.0f} % of the compute and {100 * ratio:.0f} % of the time to the first token."
    )
    return 0


def _turns(args: argparse.Namespace, folder: Path) -> Iterator[dict[str, Any]]:
    """Both turns as JSON-serialisable values; the chunks of the first are retained for the second."""
    from cacheslide.cli.answering import answer, recomputing, warm_up
    from cacheslide.cli.demo_turns import ANSWERS, QUESTION, turn
    from cacheslide.core.engine import ReuseEngine
    from cacheslide.core.prompt import Prompt
    from cacheslide.core.prompt_file import load_tokenizer
    from cacheslide.models.reference import ReferenceDecoder
    from cacheslide.policies.registry import load_policy
    from cacheslide.store import MemoryChunkStore

    policy = load_policy(args.system)
    if not policy.reuses:
        raise PolicyError(f"{policy.name} reuses nothing: recompute stands beside every system here")
    policy = policy if args.layer is None else policy.at_layer(args.layer)
    policy = policy if args.recompute_ratio is None else policy.at_ratio(args.recompute_ratio)
    model, tokenizer = ReferenceDecoder.from_pretrained(folder), load_tokenizer(folder)
    policy.check(model.num_layers)
    engine = ReuseEngine(model, policy, MemoryChunkStore())
    for number, expected in enumerate(ANSWERS):
        prompt = Prompt(tuple(turn(number, tokenizer)))
        if number == 0:
            warm_up(engine, prompt)
        beside, own = (answer(e, prompt, tokenizer, NEW_TOKENS, args.repeats) for e in (recomputing(engine), engine))
        result = {"question": QUESTION, "expected": expected, "recompute": beside.as_dict(), "reuse": own.as_dict()}
        start = time.perf_counter()
        retained = engine.retain(own.state, prompt, MAX_GENERATION)
        result |= {"retained": asdict(retained), "retain_ms": round(1e3 * (time.perf_counter() - start), 3)}
        yield result


def _shown(number: int, result: dict[str, Any]) -> list[str]:
    """The lines of a turn."""
    from cacheslide.cli.answering import lines, reuse_line

    answers = result["recompute"], result["reuse"]
    wrong = [a for a in answers if a["text"].strip() != result["expected"]]
    out = [
        f"\nturn {number + 1}: {result['question']} (the notes say: {result['expected']})",
        *(f"  {line}  answers: {a['text'].strip()}" for line, a in zip(lines(answers), answers, strict=True)),
        f"  {reuse_line(result['reuse']['receipt'])}",
    ]
    if wrong:
        out.append(f"  wrong: {', '.join(a['receipt']['system'] for a in wrong)}")
    new = result["retained"]["copied"] + result["retained"]["encoded"]
    if new:
        out.append(f"  retained {new} chunks for the next turn, after the answer: {result['retain_ms']:.0f} ms")
    return out
