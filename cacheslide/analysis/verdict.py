"""A two-line conclusion from a summary of traffic."""

from typing import Any

LITTLE = 0.05  # of the prompt tokens: below this, reuse beyond a prefix cache does not pay off


def verdict(total: dict[str, Any]) -> list[str]:
    """Two lines on a summary of `traffic.summary`: tokens served by a prefix cache, and added by ordered reuse."""
    tokens, length = total["tokens"], total["prompt_tokens"]
    cached, on_top = (f"{100 * tokens[key] / length if length else 0:.1f} %" for key in ("cached", "on_top"))
    if total["turns"] == total["sessions"]:
        return [
            f"Every session has one request: a prefix cache over all of them serves {cached} of the prompt tokens.",
            "Of reuse within sessions this says nothing: metadata.session_id tells which requests belong together.",
        ]
    if tokens["on_top"] < LITTLE * length:
        return [
            f"A prefix cache suffices: it serves {cached} of the prompt tokens.",
            f"Order-preserving reuse would add {on_top}.",
        ]
    return [
        f"Order-preserving reuse would serve {on_top} of the prompt tokens on top of the {cached} of a prefix cache;",
        "part of them is recomputed to keep answers right, so their prefill time does not vanish.",
    ]
