"""The prompts of `cacheslide demo`: an agent's instructions and reports, which stay, and its notes, which change.

They are made here of a few words that the shipped model knows, in the form of its task (models/tiny-llama-12m): notes
give a value to a name, a report links another name to it, and the question asks for that one. So the answer stands in
no report, and KV of a report that was computed beside the old notes knows the old answer.
"""

from collections.abc import Iterator
from random import Random

from cacheslide.core.prompt import Role, Segment
from cacheslide.core.tokenizing import encode, opening

SYSTEM = "Answer each question with the value that the name stands for ."
ASKED, SOURCE = "keen fig", "light sheep"
QUESTION = f"what is {ASKED} ?"
NOTES = (  # of each turn: names and their values; the second turn has sentences more, which move the reports
    (("light sheep", "agate ten"), ("odd reed", "jet eleven"), ("sharp gull", "bone west")),
    (
        ("odd reed", "glass nine"),
        ("light sheep", "copper seven"),
        ("sharp gull", "lead april"),
        ("stout cub", "ink june"),
    ),
)
ANSWERS = ("agate ten", "copper seven")
LINKS = (
    ("quiet adder", "odd reed"),
    (ASKED, SOURCE),
    ("glad crab", "sharp gull"),
    ("proud camel", "odd reed"),
    ("free ram", "light sheep"),
    ("firm mule", "sharp gull"),
)
REPORTS, SENTENCES = 6, 24
_WHO = "clerk pilot porter miner farmer writer teacher painter doctor sailor".split()
_DID = "sold cleaned moved opened painted fixed closed carried found left".split()
_HOW = "narrow old busy small heavy broken wooden large round empty".split()
_WHAT = "road door table garden kitchen bridge market harbour basket wagon".split()


def turn(number: int, tokenizer) -> list[Segment]:
    """The segments of turn 0 or 1: about 1,600 tokens, of which the notes and the question are updated text."""
    texts = _texts(number)
    ids = [encode(tokenizer, text) for _, text, _ in texts]
    ids[0] = [*opening(tokenizer), *ids[0]]
    return [Segment(tuple(i), role, name) for i, (name, _, role) in zip(ids, texts, strict=True)]


def prompt_file(number: int) -> dict[str, list[dict[str, str]]]:
    """The same turn as a prompt file of `cacheslide run`."""
    return {"segments": [{"role": role.value, "name": name, "text": text} for name, text, role in _texts(number)]}


def _texts(number: int) -> list[tuple[str, str, Role]]:
    texts = [("system", SYSTEM, Role.REUSE), ("notes", _notes(number), Role.RECOMPUTE)]
    texts += [(f"report {i + 1}", text, Role.REUSE) for i, text in enumerate(_reports())]
    return [*texts, ("question", f"\nQuestion: {QUESTION}\nAnswer: {ASKED} is", Role.RECOMPUTE)]


def _notes(number: int) -> str:
    facts = [f" {name} is {value} ." for name, value in NOTES[number]]
    return "\nSession notes:" + "".join([*facts, *_filler(Random(f"notes {number}"), 1 + 3 * number)])


def _reports() -> Iterator[str]:
    for number in range(REPORTS):
        rng = Random(f"report {number}")
        sentences = list(_filler(rng, SENTENCES))
        name, source = LINKS[number]
        sentences.insert(rng.randrange(len(sentences)), f" {name} follows {source} .")
        yield f"\nReport {_HOW[number]} {_WHAT[number]}:" + "".join(sentences)


def _filler(rng: Random, count: int) -> Iterator[str]:
    for _ in range(count):
        how, what, place = rng.choice(_HOW), rng.choice(_WHAT), rng.choice(_WHAT)
        yield f" the {rng.choice(_WHO)} {rng.choice(_DID)} the {how} {what} beside the {place} ."
