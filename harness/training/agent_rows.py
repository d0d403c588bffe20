"""Training rows of the agents: prompts as their loops render them, and the right outputs, as ids with labels.

Two kinds. A *step* row is one prompt and its output. A *state* row (Reflexion, MemGPT) is a prompt up to its question,
followed by several questions with their outputs. Its statements are labelled with the values they resolve to, as in
`harness.training.data`.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from random import Random

from tokenizers import Tokenizer

from harness.agents.agent import Agent
from harness.agents.memgpt import message
from harness.agents.oracle import resolve, statements
from harness.agents.reflexion import asked, judged_wrong
from harness.agents.tasks.chat import ChatTurn
from harness.tasks.example import TextSegment
from harness.tasks.synthetic import render, words
from harness.tasks.synthetic.world import pick
from harness.training.agent_tasks import Difficulty, between, episode
from harness.training.data import IGNORE, LINK, OUTPUT, QUESTION, SETTLED, Row

STATES = ("reflexion", "memgpt")
STEPS = ("swe_agent", "function_calling")
# in order: a later statement overrides an earlier one
SOURCES = {"reflexion": ("documents", "notes", "reflections"), "memgpt": ("sessions", "recalled", "memory")}
ASKING = {"reflexion": "question", "memgpt": "message"}
NONE = 99


@dataclass(frozen=True)
class RowsOf:
    """A source of rows: `agents` with their weights, the difficulty, and the layout of rows.

    `questions` bounds the questions of a state row, `hint` is the chance of hints (`harness.training.model`), `slips`
    the chance that a step follows a malformed call; `length` and `batch` are a batch's shape in tokens and rows.
    """

    agents: dict[str, float]
    length: int
    batch: int
    difficulty: Difficulty = field(default_factory=Difficulty)
    questions: tuple[int, int] = (1, 10)
    hint: float = 0.0
    slips: float = 0.03
    weight: float = 1.0


class Encoder:
    """Texts to ids, with a cache, since an episode's segments recur at every step."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.bos, self.eos = tokenizer.token_to_id("<s>"), tokenizer.token_to_id("</s>")
        self.ids: Callable[[str], tuple[int, ...]] = lru_cache(4096)(
            lambda text: tuple(tokenizer.encode(text, add_special_tokens=False).ids)
        )
        one = {w: self.ids(f" {w}")[0] for w in (*words.FIRST, *words.SECOND, *words.MATERIAL, *words.MARK)}
        self.word = {i: w for w, i in one.items()}
        self.token = one
        self.verbs = {self.ids(v)[0] for v in (*render._CONSTANT_VERBS, *render._LINK_VERBS)}
        self.stop = self.ids(" .")[0]

    def bound(self, ids: tuple[int, ...]) -> list[int]:
        """Ends of statements: the offsets of the " ." of `name name verb word word .`."""
        out = []
        for i, token in enumerate(ids):
            if token not in self.verbs or not 2 <= i < len(ids) - 3 or ids[i + 3] != self.stop:
                continue
            if all(ids[j] in self.word for j in (i - 2, i - 1, i + 1, i + 2)):
                out.append(i + 3)
        return out


def rows(rng: Random, spec: RowsOf, encoder: Encoder, split: str = "train") -> Iterator[Row]:
    """Endless rows; those longer than `spec.length` are skipped."""
    agents, total = list(spec.agents.items()), sum(spec.agents.values())
    while True:
        at, name = rng.random() * total, agents[-1][0]
        for each, weight in agents:
            at -= weight
            if at < 0:
                name = each
                break
        shown = episode(rng, name, split, spec.difficulty, spec.slips)
        if name in STEPS:
            made = (step_row(encoder, s.agent.prompt(), s.output) for s in shown)
        else:
            made = (state_row(rng, encoder, s.agent, spec) for s in shown if rng.random() < 0.4)
        yield from (row for row in made if row is not None and len(row.ids) <= spec.length)


def step_row(encoder: Encoder, segments: tuple[TextSegment, ...], output: str) -> Row:
    """One prompt and its output."""
    ids = [encoder.bos, *(t for s in segments for t in encoder.ids(s.text))]
    labels: list[tuple[int, ...]] = []
    _say(encoder, ids, labels, output)
    return Row(ids, [], [], labels, 0)


def state_row(rng: Random, encoder: Encoder, agent: Agent, spec: RowsOf) -> Row | None:
    """The agent's prompt up to its question, and several questions; None when no question fits."""
    order, texts, ids, scratch, labels = SOURCES[agent.name], {}, [encoder.bos], [], []
    prompt = agent.prompt()
    at = next(i for i, s in enumerate(prompt) if s.name == ASKING[agent.name])
    ends: list[int] = []
    for segment in prompt[:at]:
        slot, tokens = segment.name.split("[")[0], encoder.ids(segment.text)
        if slot in order:
            texts[slot] = texts.get(slot, "") + segment.text
            ends += [len(ids) + e for e in encoder.bound(tokens)]
        ids.extend(tokens)
    values, links = statements(*(texts.get(slot, "") for slot in order))
    for end in ends:
        scratch.append(end)
        labels.append(_statement(encoder, ids, end, values, links))
    names = [*statements(texts[order[0]])[0], *links]
    roots = list(statements(texts["notes"])[0]) if agent.name == "reflexion" else [n for n, _ in agent.task.persona]
    count, count_asked = between(rng, spec.questions), 0
    cue = encoder.ids(prompt[-1].text)
    for asking, output, name in _tails(rng, agent, names, roots, values, links, count):
        text = encoder.ids(asking)
        if len(ids) + len(text) + len(cue) + len(encoder.ids(output)) + 2 > spec.length:
            break
        if name:
            end = len(ids) + text.index(encoder.token[name.split()[1]]) + 1
            labels.append(_asked(encoder, end, name, values, links))
            scratch.append(end)
            count_asked += 1
        ids.extend((*text, *cue))
        _say(encoder, ids, labels, output)
    if not any(x[4] == OUTPUT for x in labels):
        return None
    rate = spec.hint if rng.random() < 0.5 else float(rng.random() < spec.hint)
    return Row(ids, scratch, [rng.random() < rate for _ in scratch], labels, count_asked)


def _tails(rng, agent, names, roots, values, links, count) -> Iterator[tuple[str, str, str]]:
    """(text from state to cue, output, name that is asked or ""); new facts come last, as they would alter others."""
    told = sum(rng.random() < 0.2 for _ in range(count))
    for name in _chosen(rng, names, values, links, count - told):
        value, unknown = resolve(name, values, links)
        if agent.name == "reflexion":
            again = (
                judged_wrong(" ".join(pick(rng, words.values(agent.task.split))), "", "") if rng.random() < 0.03 else ""
            )
            yield asked(name) + again, f" answer {value}", name
        else:
            output = f" reply {value}" if value else f" recall {unknown}"
            yield message(ChatTurn("ask", name, "")), output, name
    for _ in range(told):
        root, now = pick(rng, roots), " ".join(pick(rng, words.values(agent.task.split)))
        if agent.name == "reflexion":
            name = pick(rng, names)
            given = resolve(name, values, links)[0]
            yield asked(name) + judged_wrong(given, root, now), f" reflect {root} {now}", ""
        else:
            yield message(ChatTurn("tell", root, now)), f" remember {root} {now}", ""


def _chosen(rng: Random, names: list[str], values, links, count: int) -> list[str]:
    """Up to `count` names to ask about: a quarter without a known value, a quarter at least three hops from it."""
    hops = {name: _hops(name, values, links) for name in names}
    kinds = [[n for n in names if not resolve(n, values, links)[0]], [n for n in names if hops[n] > 2], names]
    out: list[str] = []
    for _ in range(min(max(0, count), len(names))):
        free = [n for n in kinds[min(2, int(rng.random() * 4))] if n not in out] or [n for n in names if n not in out]
        out.append(pick(rng, free))
    return out


def _hops(name: str, values, links) -> int:
    hops = 1
    while name not in values and name in links:
        name, hops = links[name], hops + 1
    return hops


def _statement(encoder: Encoder, ids, end: int, values, links) -> tuple[int, ...]:
    subject, right = (" ".join(encoder.word[ids[end - k]] for k in pair) for pair in ((5, 4), (2, 1)))
    if links.get(subject) != right:
        return _label(encoder, end, right, 0, SETTLED, [])
    chain = [right]
    while chain[-1] not in values and chain[-1] in links:
        chain.append(links[chain[-1]])
    value = values.get(chain[-1], "")
    return _label(encoder, end, value or chain[-1], len(chain) - (not value), LINK, [subject, *chain])


def _asked(encoder: Encoder, end: int, name: str, values, links) -> tuple[int, ...]:
    value, unknown = resolve(name, values, links)
    return _label(encoder, end, value or unknown, _hops(name, values, links), QUESTION, [])


def _label(encoder: Encoder, position: int, said: str, hops: int, kind: int, chain: list[str]) -> tuple[int, ...]:
    first, second = (encoder.token[w] for w in said.split())
    pointers = [encoder.token[chain[k].split()[1]] if len(chain) > k else IGNORE for k in (2, 4)]
    return (position, first, second, hops, kind, min(max(hops, 1), 4), 0, *pointers)


def _say(encoder: Encoder, ids: list[int], labels: list, output: str) -> None:
    """Append an output and its end to `ids`, and a label at the place before each of its tokens."""
    for token in (*encoder.ids(output), encoder.eos):
        labels.append((len(ids) - 1, token, IGNORE, NONE, OUTPUT, 0, 0, IGNORE, IGNORE))
        ids.append(token)
