"""The vocabulary of the agents' model: every piece of their prompts, calls and commonest error messages."""

from random import Random

from tokenizers import Tokenizer

from harness.agents.calls import MalformedCall
from harness.agents.registry import AGENTS
from harness.tasks.synthetic import words
from harness.training.agent_tasks import episode
from harness.training.tokenizer import task_pieces, word_tokenizer, words_of

_SLIPS = ("", "say", "answer", "get", "edit", "remember", "reply", "recall", "add 1", "finish", "open")


def agent_pieces() -> list[str]:
    """Every piece, sorted: the synthetic family's, words without a blank before them (in names of code), the rest."""
    found = set(task_pieces())
    found |= {*words.FIRST, *words.SECOND, *words.MATERIAL, *words.MARK, " "}
    for agent in AGENTS:
        for seed in range(40):
            rng = Random(f"vocabulary-{agent}-{seed}")
            for step in episode(rng, agent, "train"):
                for text in (*(s.text for s in step.agent.prompt()), step.output):
                    found.update(words_of(text))
                for slip in _SLIPS:
                    try:
                        step.agent.parse(slip)
                    except MalformedCall as wrong:
                        found.update(words_of(f"\nError: {wrong}"))
    return sorted(found)


def agent_tokenizer() -> Tokenizer:
    """The tokenizer of `agent_pieces`."""
    return word_tokenizer(agent_pieces())
