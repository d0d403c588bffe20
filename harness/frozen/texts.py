"""The texts of the fixed request set: three turns of a conversation whose notes change while its documents stay."""

from transformers import PreTrainedTokenizerBase

from cacheslide.core.prompt import Prompt, Role, Segment

SYSTEM = "Answer each question with the value that the name stands for ."
DOCUMENTS = (
    "\nGarden report\n brave ibex follows amber falcon . the painter found the new door ." * 4,
    "\nWorkshop report\n silver otter is bone ten . the baker sold the old lamp ." * 3,
)
NOTES = (
    "\nSession notes\n amber falcon is copper seven .",
    "\nNotes of today\n tall heron is tin three . red fox is wool nine . amber falcon is glass one .",
    "\nNotes of a guest\n old raven is silk four .",
)
QUESTIONS = ("\nQuestion: what is brave ibex ?\nAnswer:", "\nQuestion: what is silver otter ?\nAnswer:")
TURNS = len(NOTES)


def parts(turn: int, question: int = 0) -> list[tuple[Role, str]]:
    """Role and text of every segment of a turn."""
    fixed = [(Role.REUSE, text) for text in DOCUMENTS]
    return [
        (Role.REUSE, SYSTEM),
        (Role.RECOMPUTE, NOTES[turn]),
        *fixed,
        (Role.RECOMPUTE, QUESTIONS[question]),
    ]


def prompt(tokenizer: PreTrainedTokenizerBase, turn: int, question: int = 0) -> Prompt:
    """A turn as segments, tokenised one by one after the tokenizer's special first tokens."""
    begin = tuple(tokenizer.encode(""))
    segments = []
    for role, text in parts(turn, question):
        ids = tuple(tokenizer.encode(text, add_special_tokens=False))
        segments.append(Segment(begin + ids if not segments else ids, role))
    return Prompt(tuple(segments))
