"""A small agent in vLLM: retrieve, build chunk KV, use a tool, reuse KV; turns, scores and receipts as JSON.

Every turn the agent appends the document that retrieval likes best to its prompt, reads what its last command printed
(updated text, before the documents), and writes the next command; what it wrote becomes history. Its tools read the
example's own documents (`open NAME`, `search WORDS`); no code is run. The last turn answers the example's question.

    python scripts/run_agent.py --agent swe_style --model mistralai/Mistral-7B-Instruct-v0.2 --dataset swe_bench \
        --enable_cacheslide
"""

import argparse
import math
import re
import sys
from collections import Counter
from collections.abc import Sequence

from run_cacheslide import load_examples, summary, write

from cacheslide.errors import CacheSlideError
from cacheslide.vllm.runs import Engine, add_arguments, from_arguments
from cacheslide.vllm.turns import Turns
from harness.scoring import score
from harness.tasks.example import TaskExample

AGENTS = ("swe_style",)
COMMAND = re.compile(r"\b(open|search)\s+([^\n]+)")
ASK = "\nWrite the next command: open NAME or search WORDS.\nCommand: "
WINDOW = 40  # lines that `open` shows
WORD = re.compile(r"[A-Za-z0-9_]+")


def words(text: str) -> Counter[str]:
    """Lower-case words and how often they occur."""
    return Counter(w.lower() for w in WORD.findall(text))


class Library:
    """The documents of an example by name, ranked by BM25."""

    def __init__(self, documents: dict[str, str]) -> None:
        self.documents = documents
        self.counts = {name: words(text) for name, text in documents.items()}
        self.length = sum(c.total() for c in self.counts.values()) / max(1, len(documents))
        self.holding = Counter(word for count in self.counts.values() for word in count)

    def rank(self, query: str, without: Sequence[str] = ()) -> list[str]:
        """Names, best first; documents of equal score keep their order."""
        asked = words(query)
        return sorted((n for n in self.documents if n not in without), key=lambda n: -self._score(n, asked))

    def _score(self, name: str, asked: Counter[str], k: float = 1.2, b: float = 0.75) -> float:
        count, total = self.counts[name], len(self.documents)
        norm = k * (1 - b + b * count.total() / max(1.0, self.length))
        gain = {w: math.log(1 + (total - self.holding[w] + 0.5) / (self.holding[w] + 0.5)) for w in asked if w in count}
        return sum(idf * count[w] * (k + 1) / (count[w] + norm) for w, idf in gain.items())

    def use(self, said: str) -> tuple[str, str]:
        """The command in what the model wrote, and what it prints."""
        found = COMMAND.search(said)
        if found is None:
            return "", "no command understood"
        command, argument = found[1], found[2].strip()
        if command == "open":
            text = self.documents.get(argument)
            return found[0], f"no file {argument}" if text is None else "\n".join(text.splitlines()[:WINDOW])
        wanted = words(argument)
        lines = [f"{n}: {line}" for n, text in self.documents.items() for line in text.splitlines()]
        hits = [line for line in lines if wanted & words(line)]
        return found[0], "\n".join(hits[:WINDOW]) or f"nothing found for {argument}"


def run_example(engine: Engine, example: TaskExample, turns: int, max_new_tokens: int) -> list[dict]:
    """One example's records, a turn each; the last one holds the answer and its scores."""
    head, *rest = [s for s in example.segments if s.role == "reuse"]
    issue, documents = (rest[0], rest[1:]) if rest and rest[0].name == "issue" else (None, rest)
    library = Library({s.name or f"document {i}": s.text for i, s in enumerate(documents)})
    talk = Turns(engine.begin() + engine.encode(head.text))
    if issue is not None:
        talk.add(engine.encode(issue.text))
    query = issue.text if issue is not None else example.questions[0].text
    observation = "\n".join(s.text for s in example.segments if s.role == "recompute")
    question, shown, records = example.questions[0], [], []
    for turn in range(turns):
        retrieved = library.rank(query, without=shown)[:1]
        for name in retrieved:
            talk.add(engine.encode(f"\n{library.documents[name]}\n"))
            shown.append(name)
        last = turn + 1 == turns
        ids, marks = talk.prompt(engine.encode(f"{observation}\n"), engine.encode(question.text if last else ASK))
        got = engine.ask(ids, marks, max_new_tokens)
        talk.answered(got.token_ids)
        record = {"example": example.id, "turn": turn, "prompt_tokens": len(ids), "retrieved": retrieved}
        record |= {"ttft_s": got.ttft, "seconds": got.seconds, "said": got.text, "receipt": got.receipt}
        if last:
            record |= {"answers": list(question.answers), **score(got.text.strip(), question.answers)}
        else:
            command, observation = library.use(got.text)
            query = got.text or query
            record |= {"command": command, "observation": observation}
        records.append(record)
    return records


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; a wrong argument or missing data is one line and status 2."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--agent", choices=AGENTS, default=AGENTS[0])
    parser.add_argument("--dataset", default="swe_bench", help="swe_bench, hotpot_qa, or a name from harness/tasks")
    parser.add_argument("--max_turns", type=int, default=4)
    args = parser.parse_args(argv)
    try:
        examples = load_examples(args.dataset, args.split, args.data, args.max_examples)
        engine = from_arguments(args)
        try:
            records = [r for e in examples for r in run_example(engine, e, args.max_turns, args.max_new_tokens)]
        finally:
            engine.close()
    except CacheSlideError as error:
        print(f"run_agent: {error}", file=sys.stderr)
        return 2
    scored = summary([r for r in records if "f1" in r])
    turns = {"turns": len(records), "ttft_s_by_turn": [_mean(records, t) for t in range(args.max_turns)]}
    write({"arguments": vars(args), "summary": scored | turns, "records": records}, args.output)
    return 0


def _mean(records: Sequence[dict], turn: int) -> float:
    of_turn = [r["ttft_s"] for r in records if r["turn"] == turn]
    return sum(of_turn) / len(of_turn)


if __name__ == "__main__":
    sys.exit(main())
