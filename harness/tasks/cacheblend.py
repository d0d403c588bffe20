"""The input files of CacheBlend's experiments (Yao et al., 2025): a question, its answers and retrieved passages.

Its `musique_s.json` and `wikimqa_s.json` are one JSON list each. They have neither ids nor supporting-passage labels.
"""

from datasets import Features, List, Value

from harness.tasks.schema import Schema

SCHEMA = Schema(
    Features(
        {
            "question": Value("string"),
            "answers": List(Value("string")),
            "ctxs": List({"title": Value("string"), "text": Value("string")}),
        }
    )
)
