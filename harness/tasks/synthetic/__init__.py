"""The synthetic task family: prompts whose fixed text depends in meaning on the updated text.

`examples` draws prompts; `write_rows` and `read_rows` keep them in the schemas of HotPotQA and SWE-bench.
The data card is datasets/README.md.
"""

from harness.tasks.synthetic.prompts import examples
from harness.tasks.synthetic.render import STYLES
from harness.tasks.synthetic.rows import read_rows, write_rows
from harness.tasks.synthetic.words import SPLITS
from harness.tasks.synthetic.world import MIXES

__all__ = ["MIXES", "SPLITS", "STYLES", "examples", "read_rows", "write_rows"]
