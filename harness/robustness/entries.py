"""Campaign: faults at every method that vLLM calls and at the seams below, in a running engine, against plain vLLM."""

import os
import random
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # scheduler, worker and campaign in one process
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "TORCHDYNAMO_DISABLE": "1",
}


def run(minutes: float, seed: int, work: Path) -> dict[str, Any]:
    """Run every seam in every mode once, in an order drawn from `seed`, until `minutes` are over.

    Returns the counts, `entries_raised` (seams that raised) and every outcome in `list`; "not_reached" are seams that
    no turn called.
    """
    os.environ.update({name: value for name, value in _ENVIRONMENT.items() if name not in os.environ})
    from cacheslide.vllm.offline import close_engine
    from harness.robustness.faulty_rounds import Rounds, open_plain, open_reusing, truths
    from harness.robustness.seams import ERRORS, MODES, SEAMS

    until, draw = time.monotonic() + 60 * minutes, random.Random(seed)
    truth, found, rounds = truths(open_plain()), [], None
    todo = [(seam, mode) for mode in MODES for seam in draw.sample(SEAMS, len(SEAMS))]
    for number, (seam, mode) in enumerate(todo):
        if time.monotonic() > until and found:
            break
        rounds = rounds or Rounds(open_reusing(work / str(number)), truth)
        outcome = rounds.round(seam, mode, draw.choice(ERRORS), beams="amil" in seam or "member" in seam)
        found.append(outcome)
        if outcome.died:
            close_engine(rounds.engine)
            rounds = None
    if rounds is not None:
        close_engine(rounds.engine)
    raised = {o.seam for o in found if o.raised}
    return {
        "rounds": len(found),
        "rounds_planned": len(todo),
        "entries_raised": len(raised),
        "raised": sum(o.raised for o in found),
        "faults_survived": sum(o.faults for o in found),
        "wrong_answers": sum(len(o.wrong) for o in found),
        "engine_deaths": sum(bool(o.died) for o in found),
        "faults": sum(not o.good for o in found),
        "not_reached": sorted(set(SEAMS) - raised),
        "list": [asdict(o) for o in found],
    }
