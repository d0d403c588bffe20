"""The ledger task: entries that later entries copy or overrule, told in varied sentences.

It replaces the stress task (`harness.tasks.synthetic`) as the picture of what reuse does to answers: what an entry
means becomes known at a word that the sentence's form does not give away, an answer's two words are entered at
different places, and of two entries the later one holds, so that wrong positions give wrong answers.
`examples` draws prompts; `write_rows` and `read_rows` keep them in files.
"""

from harness.tasks.ledger.prompts import examples
from harness.tasks.ledger.rows import read_rows, write_rows
from harness.tasks.ledger.sentences import STYLES

MIX = "ledger"

__all__ = ["MIX", "STYLES", "examples", "read_rows", "write_rows"]
