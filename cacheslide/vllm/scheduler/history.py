"""Generated text becomes the next turn's history: its KV is retained under the keys that the next turn will look up.

The last generated token has no KV yet, so a history ends before it; the receipt names the rows that were retained. KV
encoded in the prompt is copied out of the finished request's blocks before the next step can give them away. Where
rows of the request were corrected, the copy is one generation older than the oldest chunk it was built on, and beyond
the server's limit all corrected chunks of the prompt are encoded anew, exactly. Other encodings always get an exact
prefill of their own.
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
    """Retain a finished request's rows from `tracked.history` on.

    Parameters
    ----------
    retention : ChunkRetention
    request : vLLM's Request
    tracked : what the scheduler's half knows about it, with a plan
    block_ids : list of int
        The blocks of its computed rows.

    Returns
    -------
    dict or None
        For the receipt: `start` and `end` of the rows retained, their `generation`, and whether they were copied
        "blocks" or will be prefilled ("encode"). None where nothing was generated or nothing can be retained.
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
    except PromptError:  # a schema has no slot left for it, or a CoPE model no offset
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
