"""Answer a data set's questions in vLLM, with reuse or without, and record F1, TTFT and receipts as JSON.

For every example the previous turn is prefilled first, which caches its fixed segments; then this turn's questions are
answered, with other updated text before the same fixed segments.

    python scripts/run_cacheslide.py --model mistralai/Mistral-7B-Instruct-v0.2 --dataset hotpot_qa --split validation \
        --max_examples 200 --max_new_tokens 64 --enable_cacheslide --chunk_size 1024 --suffix_len 256
"""

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

from cacheslide.errors import CacheSlideError, DataError
from harness.backends.scripted import Engine, add_arguments, from_arguments
from harness.scoring import compared_as, score
from harness.tasks import ledger, synthetic
from harness.tasks.data import LEDGER, synthetic_names
from harness.tasks.example import TaskExample, TextSegment

NAMES = {"hotpot_qa": "hotpotqa", "swe_bench": "swebench_oracle"}  # the data sets' names on the hub
SPLITS = {"hotpotqa": "validation", "musique": "validation", "2wikimqa": "validation"}  # "test" for the others


def load_examples(dataset: str, split: str | None, data: str | None, count: int) -> list[TaskExample]:
    """At most `count` examples of a data set, or of the file `data`: in its schema, or of a synthetic family."""
    if data is not None and not Path(data).is_file():
        raise DataError(f"no data at {data}")
    if data is not None and Path(data).stem.startswith(tuple(synthetic_names())):
        family = ledger if f"-{LEDGER}" in Path(data).stem else synthetic
        return list(islice(family.read_rows(Path(data)), count))
    from harness.tasks import registry  # imports Hugging Face's `datasets`, which takes seconds

    name = NAMES.get(dataset, dataset)
    return list(registry.load(name, split or SPLITS.get(name, "test"), path=data, limit=count))


def tokens(engine: Engine, segments: Sequence[TextSegment], question: str) -> tuple[list[int], dict]:
    """Token ids and annotations; segments are tokenised one by one, so that no token straddles a boundary."""
    ids, spans = engine.begin(), []
    for number, segment in enumerate(segments):
        start = len(ids) if number else 0
        ids += engine.encode(segment.text)
        if segment.role == "reuse" and len(ids) > start:
            spans.append([start, len(ids)])
    return ids + engine.encode(question), {"segments": spans}


def answer(engine: Engine, example: TaskExample, max_new_tokens: int) -> list[dict]:
    """Records of an example's questions."""
    engine.ask(*tokens(engine, example.previous, example.questions[0].text), 1)
    newline = engine.encode("\n")
    stops = newline if len(newline) == 1 and example.metric == "f1" else []  # answers are lines, patches are not
    records = []
    for question in example.questions:
        ids, annotations = tokens(engine, example.segments, question.text)
        got = engine.ask(ids, annotations, max_new_tokens, stops)
        scores = score(got.text, question.answers) | {"compared_as": compared_as(question.answers)}
        record = {"example": example.id, "question": question.id, "prompt_tokens": len(ids), "ttft_s": got.ttft}
        record |= {"seconds": got.seconds, "prediction": got.text.strip(), "answers": list(question.answers)}
        records.append(record | scores | {"receipt": got.receipt})
    return records


def summary(records: Sequence[dict]) -> dict:
    """Means over the questions; rows reused as a share of all rows."""
    receipts = [r["receipt"] for r in records if r["receipt"]]
    rows = sum(r["tokens"] for r in receipts)
    return {
        "questions": len(records),
        "f1": statistics.fmean(r["f1"] for r in records),
        "em": statistics.fmean(r["em"] for r in records),
        "ttft_s_mean": statistics.fmean(r["ttft_s"] for r in records),
        "ttft_s_median": statistics.median(r["ttft_s"] for r in records),
        "reused_share": sum(r["tokens_reused"] for r in receipts) / rows if rows else 0.0,
        "fallbacks": sum(bool(r["fallback"]) for r in receipts),
    }


def write(result: dict, output: str | None) -> None:
    """The result as JSON, to a file or standard output."""
    text = json.dumps(result, indent=1)
    if output is None:
        print(text)
    else:
        Path(output).parent.mkdir(parents=True, exist_ok=True)
        Path(output).write_text(text + "\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; a wrong argument or missing data is one line and status 2."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--dataset", default="hotpot_qa", help="hotpot_qa, swe_bench, or a name from harness/tasks")
    args = parser.parse_args(argv)
    try:
        examples = load_examples(args.dataset, args.split, args.data, args.max_examples)
        engine = from_arguments(args)
        try:
            records = [r for e in examples for r in answer(engine, e, args.max_new_tokens)]
        finally:
            engine.close()
    except CacheSlideError as error:
        print(f"run_cacheslide: {error}", file=sys.stderr)
        return 2
    write({"arguments": vars(args), "summary": summary(records), "records": records}, args.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
