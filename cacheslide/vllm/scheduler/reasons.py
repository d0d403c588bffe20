"""Reasons for computing an annotated request exactly: texts for its receipt, and kinds for the counters."""

NOT_STORED = "no chunk of this prompt is in the store"
NOT_STORED_BEYOND = "no chunk of this prompt beyond vLLM's prefix cache is in the store"
COVERED = "vLLM's prefix cache holds the whole prompt"
PROMPT_LOGPROBS = "prompt_logprobs needs every row computed by vLLM"
NOT_SEEN = "nothing of this prompt was seen before; its spans are known from now on"
LOST = "a chunk that the index named was not in the worker's store; its rows were recomputed"
AS_FAMILY = "computed exactly, as the first request of its family was"
FAULT = "fault at "  # followed by the name of an entry (guard.py)

MEMORY = {"cpu": "host", "model": "device"}  # name of the workers' memory as a tier, by `ServerOptions.store_device`
TIERS = ("device", "host", "file", "remote")

_KINDS = {
    NOT_STORED: "not_stored",
    NOT_STORED_BEYOND: "not_stored",
    COVERED: "prefix_cache",
    PROMPT_LOGPROBS: "prompt_logprobs",
    LOST: "lost_chunk",
    NOT_SEEN: "not_seen",
}
KINDS = (*dict.fromkeys(_KINDS.values()), "fault", "refused")
RETRY = ("", NOT_STORED, NOT_STORED_BEYOND, COVERED)  # may change when the request is scheduled again


FAILURES = ("damaged", "read error", "remote unavailable", "no room", "other")  # of reads from storage tiers


def failure_of(why: str) -> str:
    """One of `FAILURES`, from a reason whose details follow a colon."""
    kind = why.split(":")[0]
    return kind if kind in FAILURES else "other"


def kind_of(reason: str) -> str:
    """One of `KINDS`; "" without a fallback."""
    if reason.startswith(FAULT):
        return "fault"
    return _KINDS.get(reason, "refused") if reason else ""
