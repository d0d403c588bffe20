"""All three steps in one go: `python src/run_pipeline.py --data FILE`; the options are `harness.rag.run_pipeline`'s.

Runs that module by its name, as the scripts do: the code lies in the harness, above this folder.
"""

import runpy
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[3])
    runpy.run_module("harness.rag.run_pipeline", run_name="__main__", alter_sys=True)
