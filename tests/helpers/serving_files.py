"""Records of the serving experiment, loaded."""

from harness.backends.client import Result
from harness.backends.http.load import Load


def load(ttft: float, reused: int | None, failure: str = "") -> Load:
    results = []
    for i in range(3):
        at = i * 1.0
        out = Result(f"0-{i}", at, at + ttft + 0.1, [at + ttft * (1 + i / 10), at + ttft + 0.1], 2, prompt_tokens=512)
        if reused is not None:
            out.receipt = {"tokens_reused": reused, "tokens_recomputed": 5, "compute_fraction": 0.25, "fallback": ""}
        results.append(out)
    results[-1].failure = failure
    return Load(results, 0.0, 3.0)
