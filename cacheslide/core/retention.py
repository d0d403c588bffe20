"""Which KV of a served request is stored: a copy, at which generation, or chunks encoded anew."""

from cacheslide.policies.base import ReusePolicy


def generation_of_copy(policy: ReusePolicy, *, exact: bool, oldest: int, limit: int, in_place: bool) -> int | None:
    """Generation of chunks copied from a request's KV; None where only chunks encoded anew may be stored.

    KV computed over reused rows carries their error: a copy's generation is one more than the highest among the reused
    chunks. With an exact keying nothing is corrected, and only `in_place` matters.

    Parameters
    ----------
    exact : bool
        Every row was computed from exact rows: nothing was reused.
    oldest : int
        The highest `ChunkKV.generation` among the reused chunks.
    limit : int
        Highest generation of a copy; beyond it chunks are encoded exactly instead.
    in_place : bool
        The KV lies at the positions and in the context that the chunks' keys name.
    """
    generation = 0 if exact or policy.keying.exact else oldest + 1
    return generation if policy.copyable and in_place and generation <= limit else None
