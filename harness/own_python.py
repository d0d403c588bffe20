"""The commands of a workflow's rules run on the Python that runs the workflow."""

import os
import sys


def first_on_path() -> None:
    """Let `python` be the one beside this process's own, also where its environment is not activated."""
    folder = os.path.dirname(sys.executable)
    os.environ["PATH"] = os.pathsep.join([folder, os.environ.get("PATH", os.defpath)])
