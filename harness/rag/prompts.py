"""Prompts of the pipeline: `[head][passage] ... [passage][question and what was generated]`.

Head and passages are fixed text, one segment each, and each is one chunk; the rest is updated text. A passage's token
ids do not depend on what stands before it, so a chunk encoded alone serves every prompt with that passage.
"""

from collections.abc import Sequence

from cacheslide.core.prompt import Prompt, Role, Segment
from cacheslide.core.tokenizing import opening
from harness.backends.tokens import Tokens
from harness.tasks.passages import PassageRow

HEADS = {
    "f1": "Read the passages and answer the question at the end with the shortest answer.\n\n",
    "rouge_l": "Read the dialogues with their summaries and write a summary of the last dialogue.\n\n",
}
QUESTIONS = {"f1": "Question: {}\nAnswer:", "rouge_l": "{}"}


class SamplePrompts:
    """The prompts of one sample.

    Parameters
    ----------
    tokens : Tokens
        The model's tokenizer.
    row : PassageRow
    metric : str
        See `SampleFile.metric`; it chooses the wording.
    """

    def __init__(self, tokens: Tokens, row: PassageRow, metric: str) -> None:
        head = opening(tokens.tokenizer) + tokens.encode(HEADS[metric])
        self.head = Segment(head, Role.REUSE, "head")
        self.passages = [
            Segment(tokens.encode(text.strip() + "\n\n"), Role.REUSE, f"passage {i}")
            for i, text in enumerate(row.passages)
        ]
        self.question = tokens.encode(QUESTIONS[metric].format(row.question.strip()))

    def prompt(self, context: Sequence[int], generated: Sequence[int] = ()) -> Prompt:
        """The prompt with the passages `context`, in that order, and `generated` token ids behind the question."""
        last = Segment((*self.question, *generated), Role.RECOMPUTE, "question")
        return Prompt((self.head, *(self.passages[i] for i in context), last))

    def length(self, context: Sequence[int]) -> int:
        """Tokens of the prompt with the passages `context`."""
        return len(self.head.token_ids) + len(self.question) + sum(len(self.passages[i].token_ids) for i in context)
