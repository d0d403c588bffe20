"""Chats and texts in parts, marked in every way."""

MODEL, SEPARATOR = "models/tiny-llama-12m", " ## "
SYSTEM = "Answer each question with the value that the name stands for ."
DOCUMENT = "\nGarden report\n brave ibex follows amber falcon . the painter found the new door ." * 4
HISTORY = "\nWorkshop report\n silver otter is bone ten . the baker sold the old lamp ." * 4
QUESTION = "\nQuestion: what is brave ibex ?\nAnswer:"
TURNS = [
    "\nSession notes\n amber falcon is copper seven .",
    "\nNotes of today\n tall heron is tin three . red fox is wool nine . amber falcon is glass one .",
    "\nNotes of a guest\n old raven is silk four . the tall heron follows red fox . late crane is iron two .",
]


def messages(turn: int) -> list[dict]:
    return [
        {"role": "system", "content": SYSTEM},
        {"role": "user", "content": TURNS[turn]},
        {"role": "assistant", "content": DOCUMENT},
        {"role": "tool", "content": HISTORY},
        {"role": "user", "content": QUESTION},
    ]


def joined(turn: int, by: str = SEPARATOR) -> str:
    return by.join([SYSTEM, TURNS[turn], DOCUMENT + HISTORY, QUESTION])


CHAT_ANNOTATIONS = {"messages": {"updated": [1]}}
