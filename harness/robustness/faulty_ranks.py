"""Two ranks, one of which faults: `python -m harness.robustness.faulty_ranks` prints each seam's outcome as JSON list.

Answers are compared with those of the same engine without annotations. A hang does not end: run this with a time limit.
"""

import json
import os
import sys
from contextlib import ExitStack
from typing import Any

from vllm import LLM, SamplingParams
from vllm.distributed import get_tensor_model_parallel_rank

from cacheslide.vllm.offline import close_engine, open_engine, worker_of
from cacheslide.vllm.options import FIELD
from harness.robustness.faulty_rounds import CHUNK, MODEL, TOKENS, alike, cases, engine_settings, said
from harness.robustness.seams import raising

# (seam, mode, calls that pass before the fault)
SEAMS = (
    ("worker:begin", "always", 0),
    ("worker:load", "always", 0),
    ("worker:save", "always", 0),
    ("worker:encode", "always", 0),
    ("worker:take_report", "always", 0),
    ("worker.store:lend", "always", 0),
    ("worker.store:lend", "once", 1),
    ("worker.store:put", "always", 0),
    ("cacheslide.vllm.worker.loading.Loading:_find", "once", 0),
    ("cacheslide.vllm.worker.loading.Loading:_prepare", "always", 0),
    ("cacheslide.vllm.worker.loading.Loading:_note", "always", 0),
    ("cacheslide.core.encoder.ChunkEncoder:store_chunk", "once", 1),
    ("cacheslide.vllm.worker.ranks.TeamPrefill:compute", "late", 0),
    ("cacheslide.vllm.worker.model_adapter.VllmModel:embed", "once", 0),
    ("cacheslide.vllm.worker.model_adapter.VllmModel:qkv", "once", 3),  # between the sums of a layer
    ("cacheslide.vllm.worker.model_adapter.VllmModel:qkv", "always", 5),
    ("cacheslide.vllm.worker.model_adapter.VllmModel:attend", "once", 2),
    ("cacheslide.vllm.worker.model_adapter.VllmModel:_mlp", "always", 2),  # between the two sums of a layer
    ("cacheslide.vllm.worker.model_adapter.VllmModel:reduce_scores", "once", 0),
)
_ARMED = ExitStack()


def arm(_worker: Any, rank: int, seam: str, mode: str, skip: int) -> None:
    """In a worker: make `seam` raise on `rank` only."""
    if get_tensor_model_parallel_rank() == rank:
        _ARMED.enter_context(raising(seam, mode, RuntimeError, {"worker": worker_of()}, skip))


def disarm(_worker: Any) -> int:
    """In a worker: remove the injected fault; returns the number of faults counted since the last call."""
    _ARMED.close()
    faults = worker_of().faults
    count = sum(faults.total.values())
    faults.total.clear()
    return count


def outcomes(rank: int, names: list[str]) -> list[dict[str, Any]]:
    """Every seam (or those of `names`) raised on `rank` of two, once with empty stores and once with full ones."""
    options = {"chunk_size": CHUNK, "encode": "now", "store_gib": 0.25}
    engine = open_engine(MODEL, options, tensor_parallel_size=2, **engine_settings())
    truth = [_ask(engine, turn, annotations=False) for turn in (0, 1)]
    found = [_outcome(engine, truth, rank, *seam) for seam in SEAMS if not names or seam[0] in names]
    close_engine(engine)
    return found


def _outcome(engine: LLM, truth: list[dict], rank: int, seam: str, mode: str, skip: int) -> dict[str, Any]:
    wrong, reused, faults = [], 0, [0, 0]
    assert engine.reset_prefix_cache(reset_connector=True)
    for turn in (0, 1, 1):
        engine.collective_rpc(arm, args=(rank, seam, mode, skip))
        answers = _ask(engine, turn)
        faults = [a + b for a, b in zip(faults, engine.collective_rpc(disarm), strict=True)]
        wrong += [f"turn {turn} {name}" for name, got in answers.items() if not alike(got[0], truth[turn][name][0])]
    for _ in range(2):  # without faults, answers are correct again
        healed = _ask(engine, 1)
        wrong += [f"healed {name}" for name, got in healed.items() if not alike(got[0], truth[1][name][0])]
        reused = min(r["chunks_hit"] for _, r in healed.values() if r is not None)
    return {"seam": seam, "mode": mode, "skip": skip, "wrong": wrong, "faults": faults, "reused": reused}


def _ask(engine: LLM, turn: int, annotations: bool = True) -> dict[str, tuple[Any, dict | None]]:
    assert engine.reset_prefix_cache()
    asked = cases(engine.get_tokenizer(), turn)
    params = [
        SamplingParams(
            max_tokens=TOKENS,
            temperature=0,
            logprobs=1,
            detokenize=False,
            ignore_eos=True,
            extra_args={"kv_transfer_params": {FIELD: c.annotations}} if c.annotations and annotations else None,
        )
        for c in asked
    ]
    outputs = engine.generate([{"prompt_token_ids": c.ids} for c in asked], params, use_tqdm=False)
    return {c.name: (said(o), (o.kv_transfer_params or {}).get(FIELD)) for c, o in zip(asked, outputs, strict=True)}


if __name__ == "__main__":
    os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"  # `arm` travels to the workers as a pickled function
    from harness.robustness import faulty_ranks  # by name: pickled by value, it would have a separate `_ARMED`

    print(json.dumps(faulty_ranks.outcomes(int(sys.argv[1]), sys.argv[2:])))
