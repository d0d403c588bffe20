"""The ledger task: entries that later entries copy or override, written in varied sentences.

It replaces the stress task (`harness.tasks.synthetic`) for measuring the effect of reuse on answers: the word that
completes an entry's meaning varies with the sentence's form, an answer's two words are entered at different places, and
the later of two entries holds, so that wrong positions give wrong answers.
`examples` draws prompts, of the sizes that `documents_for` accepts; `write_rows` and `read_rows` keep them in files.
"""

from harness.tasks.ledger.prompts import documents_for, examples
from harness.tasks.ledger.rows import read_rows, write_rows
from harness.tasks.ledger.sentences import STYLES

MIX = "ledger"

__all__ = ["MIX", "STYLES", "documents_for", "examples", "read_rows", "write_rows"]
