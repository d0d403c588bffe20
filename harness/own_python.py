"""The commands of a workflow's rules run on the Python that runs the workflow."""

import os
import sys


def first_on_path() -> None:
    """Put this interpreter's folder first on PATH, so that `python` is this one without an activated environment."""
    folder = os.path.dirname(sys.executable)
    os.environ["PATH"] = os.pathsep.join([folder, os.environ.get("PATH", os.defpath)])
