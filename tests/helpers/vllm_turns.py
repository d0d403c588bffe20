"""An agent's turns over `models/tiny-llama-12m` on so many ranks, as JSON: `python -m tests.helpers.vllm_turns 2
[STORE]`.
"""

import json
import sys
from contextlib import closing

from cacheslide.vllm.options import ServerOptions
from cacheslide.vllm.turns import Turns
from harness.backends.scripted import Engine

DOCUMENT = "\nGarden report\n brave ibex follows amber falcon . the painter found the new door ." * 4
SHARES = {"naive_reuse": None, "cacheslide": 0.3}


def answers(ranks: int, store: str = "") -> list[dict]:
    """Per turn: the tokens said and what the receipt counts; `store` is a folder that outlives the engine."""
    below = {"path": store, "file_gib": 0.25, "shards": 2, "direct": False} if store else ""
    options = ServerOptions(chunk_size=64, encode="now", max_generation=2, store=below)
    engine = Engine("models/tiny-llama-12m", options, dtype="float32", max_model_len=1024, tensor_parallel_size=ranks)
    with closing(engine):
        return [
            turn
            for system, recompute_ratio in SHARES.items()
            for turn in _turns(engine, system, recompute_ratio, bool(store))
        ]


def _turns(engine: Engine, system: str, recompute_ratio: float | None, tiers: bool) -> list[dict]:
    found, talk = [], Turns(engine.begin() + engine.encode("Answer each question with the value ."))
    talk.add(engine.encode(DOCUMENT))
    for turn in range(4):
        notes = engine.encode("\nnotes" + " amber falcon is copper seven ." * (turn + 1))
        ids, annotations = talk.prompt(notes, engine.encode("\nQuestion: what is brave ibex ?\nAnswer:"), policy=system)
        answer = engine.ask(
            ids, annotations if recompute_ratio is None else annotations | {"recompute_ratio": recompute_ratio}, 6
        )
        talk.answered(answer.generated)
        counted = ("chunks", "chunks_hit", "tokens_reused", "tokens_recomputed", "generation", "history", "fallback")
        found.append({"said": answer.generated, "system": system} | {k: answer.receipt[k] for k in counted})
        if tiers:
            found[-1]["tiers"] = {tier: n["chunks"] for tier, n in answer.receipt["tiers"].items()}
    return found


if __name__ == "__main__":
    print(json.dumps(answers(int(sys.argv[1]), *sys.argv[2:])))
