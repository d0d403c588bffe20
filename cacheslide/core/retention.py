"""The rule of what is retained of a served request: its KV copied, and at which generation, or chunks encoded anew."""

from cacheslide.policies.base import ReusePolicy


def generation_of_copy(policy: ReusePolicy, *, exact: bool, oldest: int, limit: int, in_place: bool) -> int | None:
    """The generation at which chunks may be copied out of a request's KV; None where only an encoding may be retained.

    KV that was computed over reused rows carries their error on: a copy is one generation older than the oldest chunk
    behind it. Where equal keys mean equal KV nothing was corrected: nothing but the prefix decides it.

    Parameters
    ----------
    exact : bool
        Every row was computed over rows that were: nothing was reused.
    oldest : int
        The highest `ChunkKV.generation` among the chunks that were reused.
    limit : int
        Generations that a copy may have at most; beyond them chunks are encoded anew, exactly.
    in_place : bool
        The KV is there, at the positions and in the context that the chunks' keys name.
    """
    generation = 0 if exact or policy.keying.exact else oldest + 1
    return generation if policy.copyable and in_place and generation <= limit else None
