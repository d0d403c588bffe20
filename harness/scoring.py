"""Scores one answer by every metric; an example's own metric decides what counts as its score."""

from collections.abc import Sequence

from harness.metrics.answers import exact_match, token_f1
from harness.metrics.patches import changed_line_f1, is_patch, same_patch
from harness.metrics.rouge import rouge_l
from harness.tasks.example import Question, TaskExample


def score(prediction: str, answers: Sequence[str]) -> dict[str, float]:
    """F1 and EM with HotPotQA's normalisation, and Rouge-L recall, each in [0, 1].

    Where the answers are patches, EM says whether the same lines change and F1 compares the changed lines.
    """
    if answers and all(map(is_patch, answers)):
        return {
            "f1": max(changed_line_f1(prediction, a) for a in answers),
            "em": float(any(same_patch(prediction, a) for a in answers)),
            "rouge_l": rouge_l(prediction, answers).recall,
        }
    return {
        "f1": token_f1(prediction, answers),
        "em": exact_match(prediction, answers),
        "rouge_l": rouge_l(prediction, answers).recall,
    }


def question_record(example: TaskExample, question: Question, prediction: str) -> dict:
    """One question's part of a record. `success` is an exact match: the answer can be used as it is, a patch is
    the reference's (`same_patch`). No test is run here."""
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
