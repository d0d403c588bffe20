"""Scores one answer by every metric; the example's own metric selects its score."""

from collections.abc import Sequence

from harness.metrics.answers import exact_match, token_f1
from harness.metrics.patches import is_patch, same_patch
from harness.metrics.rouge import rouge_l
from harness.tasks.example import Question, TaskExample

PATCH, ANSWER = "patch", "answer"


def compared_as(answers: Sequence[str]) -> str:
    """How a prediction is compared with these gold answers: as a patch if one of them is a unified diff."""
    return PATCH if any(map(is_patch, answers)) else ANSWER


def score(prediction: str, answers: Sequence[str]) -> dict[str, float]:
    """F1 and EM with HotPotQA's normalisation, and Rouge-L recall, each in [0, 1].

    Patches have no partial score: all three are 1.0 when the prediction is the same change as a gold patch, else 0.0.
    """
    if compared_as(answers) == PATCH:
        return dict.fromkeys(("f1", "em", "rouge_l"), same_patch(prediction, answers))
    return {
        "f1": token_f1(prediction, answers),
        "em": exact_match(prediction, answers),
        "rouge_l": rouge_l(prediction, answers).recall,
    }


def question_record(example: TaskExample, question: Question, prediction: str) -> dict:
    """One question's part of a record. `success` is an exact match: an equal answer, or the change of a gold patch."""
    scores = score(prediction, question.answers)
    return {
        "id": question.id,
        "depth": question.depth,
        "volatile": question.volatile,
        "prediction": prediction,
        "answers": list(question.answers),
        "success": scores["em"],
        **scores,
    }


def question_records(example: TaskExample, predictions: Sequence[str]) -> list[dict]:
    """The records of all questions of an example, in order."""
    return [question_record(example, q, p) for q, p in zip(example.questions, predictions, strict=True)]
