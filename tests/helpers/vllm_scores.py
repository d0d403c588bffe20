"""Two turns under rules that read scores, on so many ranks, as JSON: `python -m tests.helpers.vllm_scores 2`.

On two ranks the same again for each of `FAULTS`, raised on the second rank while the first turn's chunks are made.
Every rank's scores are among what is printed. The systems have to be installed: the engine is a process of its own.
"""

import json
import sys
from typing import Any

from vllm import LLM, SamplingParams

from cacheslide.vllm.offline import close_engine, open_engine, worker_of
from cacheslide.vllm.options import FIELD
from harness.robustness.faulty_ranks import arm, disarm
from harness.robustness.faulty_rounds import CHUNK, MODEL, cases, engine_settings

SYSTEMS = ("remembering", "remembering_chain")
# (seam, mode, calls that pass before the fault): see `harness.robustness.seams`
FAULTS = (
    ("cacheslide.core.remembering:_sums", "once", 0),  # before the first sum over the ranks
    ("cacheslide.core.remembering:_sums", "always", 3),
    ("worker.store:get", "once", 1),
    ("worker.store:rescore", "once", 1),  # behind the sum: the other rank goes on to the next
    ("cacheslide.core.remembering.Contrast:prepare", "always", 0),
    ("cacheslide.vllm.worker.scoring.Scorer:run", "always", 0),
)


def scores(_worker: Any) -> dict[str, list[float] | None]:
    """In a worker: what each chunk remembers."""
    store = worker_of().store
    held = {key: store.get(key) for key in sorted(store._chunks)}
    return {key: None if chunk.scores is None else chunk.scores.tolist() for key, chunk in held.items()}


def outcomes(ranks: int) -> dict[str, list]:
    """Without a fault and with each."""
    options = {"chunk_size": CHUNK, "encode": "now", "store_gib": 0.25}
    engine = open_engine(MODEL, options, tensor_parallel_size=ranks, **engine_settings())
    found = {"sound": _turns(engine), "faulty": [_turns(engine, fault) for fault in FAULTS if ranks > 1]}
    close_engine(engine)
    return found


def _turns(engine: LLM, fault: tuple[str, str, int] | None = None) -> list[dict[str, Any]]:
    """A system each: its two answers with their receipts, the faults counted a rank, and the ranks' scores."""
    found = []
    for system in SYSTEMS:
        assert engine.reset_prefix_cache(reset_connector=True)
        if fault is not None:
            engine.collective_rpc(arm, args=(1, *fault))
        said = [_ask(engine, system, 0)]
        faults = engine.collective_rpc(disarm)
        held = engine.collective_rpc(scores)
        said.append(_ask(engine, system, 1))
        found.append({"said": said, "faults": faults, "scores": held})
    return found


def _ask(engine: LLM, system: str, turn: int) -> list:
    assert engine.reset_prefix_cache()
    case = cases(engine.get_tokenizer(), turn)[0]
    asked = {FIELD: {"segments": case.annotations["segments"], "policy": system}}
    params = SamplingParams(max_tokens=4, temperature=0, ignore_eos=True, extra_args={"kv_transfer_params": asked})
    [output] = engine.generate([{"prompt_token_ids": case.ids}], params, use_tqdm=False)
    receipt = output.kv_transfer_params[FIELD]
    return [list(output.outputs[0].token_ids), receipt["tokens_recomputed"], receipt["chunks_hit"]]


if __name__ == "__main__":
    from tests.helpers import vllm_scores  # by its name: what travels to the workers is found there

    print(json.dumps(vllm_scores.outcomes(int(sys.argv[1]))))
