"""Stores generated text as history: its KV is kept under the keys that the next turn looks up.

The last generated token has no KV yet, so a history ends before it; the receipt gives the rows stored. KV encoded in
the prompt is copied from the finished request's blocks before the next step can reassign them. If rows of the request
were corrected, the copy's generation is one more than the highest among the reused chunks; beyond the server's limit
all corrected chunks of the prompt are encoded exactly instead. Other encodings always get an exact prefill of their
own.
"""

from typing import Any

from cacheslide.core.plan import make_plan
from cacheslide.core.prompt import Prompt
from cacheslide.core.retention import generation_of_copy
from cacheslide.errors import PromptError
from cacheslide.vllm.protocol import SavePlan
from cacheslide.vllm.scheduler.request_state import Tracked
from cacheslide.vllm.scheduler.retention import job_of


def retain_history(retention, request, tracked: Tracked, block_ids: list[int]) -> dict[str, Any] | None:
    """Store a finished request's rows from `tracked.history` on.

    Parameters
    ----------
    retention : ChunkRetention
    request : vLLM's Request
    tracked : Tracked, with a plan
    block_ids : list of int
        Blocks of its computed rows.

    Returns
    -------
    dict or None
        For the receipt: `start` and `end` of the stored rows, their `generation`, and "blocks" if copied or "encode" if
        prefilled. None if nothing was generated or can be stored.
    """
    ids, policy = list(request.all_token_ids), tracked.policy
    start, end = tracked.history, len(ids) - 1
    if end <= max(start, tracked.rows - 1) or request.num_computed_tokens < end or not policy.reuses:
        return None
    spans = [span for span in tracked.spans if span[1] <= start]
    prompt = Prompt.from_spans(ids[:end], [*spans, (start, end)])
    try:
        plan = make_plan(
            policy, tracked.identity, prompt, retention.options.chunk_size, retention.geometry.max_positions
        )
        retention.geometry.slots_of(prompt)
    except PromptError:  # no slot of the schema, or no offset of a CoPE model, is left
        return None
    last = len(plan.prompt.segments) - 1
    missing = {k: c for k, c in plan.keyed if c.segment == last and k not in retention.index}
    retention.index.touch(plan.keys)
    retained = {"start": start, "end": end, "generation": 0}
    generation = generation_of_copy(
        policy,
        exact=tracked.exact,
        oldest=tracked.generation,
        limit=retention.options.max_generation,
        in_place=not tracked.schema,
    )
    if generation is not None:
        scored = policy.needs_scores and not generation and tracked.encode != "off"
        evict = retention.reserve(missing, 0, generation, scored)
        if evict is None:
            return None
        if missing:
            retention.history_saves.append(SavePlan(block_ids, tuple(missing.items()), evict, generation, scored))
            retention.score(policy, plan, tracked.encode)
        return retained | {"generation": generation, "from": "blocks"}
    if tracked.encode == "off":
        return None
    retention.enqueue(job_of(policy, plan, renew=True), tracked.encode)
    retention.score(policy, plan, tracked.encode)
    return retained | {"from": "encode"}
