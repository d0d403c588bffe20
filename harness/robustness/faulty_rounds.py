"""Turns of an agent in an engine with injected faults, beside other requests, compared with plain vLLM.

Every annotated request uses settings with exact answers (all reused rows recomputed, or an unchanged prompt), so that
tokens and log-probabilities must equal those of an engine without the connector, whatever the fault.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import torch
from vllm import LLM, SamplingParams
from vllm.sampling_params import BeamSearchParams

from cacheslide.core.tokenizing import encode, encode_parts
from cacheslide.vllm.offline import beam_search, close_engine, open_engine, worker_of
from cacheslide.vllm.options import FIELD
from cacheslide.vllm.scheduler.reasons import FAULT
from harness.robustness.seams import raising

MODEL = "models/tiny-llama-12m"
BLOCK, CHUNK, TOKENS, BEAMS = 32, 32, 4, 2
CLOSE = 2e-3  # tolerance of float32 log-probabilities for another order of summation
LIMIT_S = 60.0  # a turn takes less than a second; a longer one counts as a hang
DOCUMENT = "\nGarden report\n brave ibex follows amber falcon . the painter found the new door ." * 3
_NUMBERS = count()

Said = tuple[list[int], list[float]]


@dataclass(frozen=True)
class Case:
    """One request: name, token ids, and optional annotations."""

    name: str
    ids: list[int]
    annotations: dict[str, Any] | None = None


@dataclass
class Outcome:
    """Outcome of one seam: counts, and every wrong answer, hang or leftover by name."""

    seam: str
    mode: str
    error: str
    calls: int = 0
    raised: int = 0
    faults: int = 0
    fallbacks: int = 0
    wrong: list[str] = field(default_factory=list)
    died: str = ""

    @property
    def good(self) -> bool:
        """Whether no answer was wrong and the engine survived."""
        return not self.wrong and not self.died


def open_plain(model: str = MODEL) -> LLM:
    """Plain vLLM over the model of these rounds."""
    return open_engine(model, None, **engine_settings())


def open_reusing(work: Path, model: str = MODEL) -> LLM:
    """The same with the connector, in this process, over tiers in the folder `work`."""
    store = {"path": str(work), "file_gib": 0.25, "shards": 2, "direct": False, "segment_mib": 1, "stall_limit_s": 0.5}
    options = {"chunk_size": CHUNK, "encode": "now", "max_generation": 2, "store_gib": 0.25}
    return open_engine(model, options, store=store, **engine_settings())


def engine_settings() -> dict[str, Any]:
    """Settings shared by both engines."""
    return {
        "dtype": "float32",
        "max_model_len": 512,
        "block_size": BLOCK,
        "enforce_eager": True,
        "kv_cache_memory_bytes": 2**27,  # poisoning needs as much memory again as the cache
        "max_num_batched_tokens": 256,
        "max_num_seqs": 16,
    }


def cases(tokenizer: Any, turn: int) -> list[Case]:
    """The requests of a turn: the fixed text follows notes that grow with `turn`."""
    head, tail = "Answer each question with the value .", "\nQuestion: what is brave ibex ?\nAnswer:"
    notes = "\nnotes" + " amber falcon is copper seven ." * (turn + 1)

    def prompt(notes: str) -> tuple[list[int], list[list[int]], int]:
        parts = encode_parts(tokenizer, (head, notes, DOCUMENT, tail))
        ends = [sum(map(len, parts[: i + 1])) for i in range(4)]
        return [t for part in parts for t in part], [[0, ends[0]], [ends[1], ends[2]]], ends[2]

    moved, spans, start = prompt(notes)
    same, fixed, _ = prompt("\nnotes amber falcon .")
    exact = {"segments": spans, "recompute_ratio": 1.0, "policy": "cacheslide"}
    return [
        Case("marked", moved, exact),
        Case("isolated", moved, exact | {"policy": "epic"}),
        Case("history", moved, exact | {"history": start}),
        Case("unchanged", same, {"segments": fixed, "policy": "naive_reuse"}),
        # same prompt: these two share chunks, which are exact in this prompt only
        Case("remembered", same, exact | {"segments": fixed, "policy": "cacheslide_remember"}),
        # the server's default system: its chunks are exact in this prompt only, so they get a separate namespace
        Case("default", moved, {"segments": spans, "recompute_ratio": 1.0, "namespace": "default"}),
        Case("plain", moved),
        Case("beside", list(encode(tokenizer, f"{tail}{notes}"))),
    ]


class Rounds:
    """Turns on an engine with the connector, compared with the answers `truth` of one without, by turn and case."""

    def __init__(self, engine: LLM, truth: Sequence[Mapping[str, Any]]) -> None:
        self.engine, self.truth = engine, truth
        self.core = engine.llm_engine.engine_core.engine_core
        self.scheduler, self.worker = self.core.scheduler.connector.scheduler, worker_of()
        self.parts = {"scheduler": self.scheduler, "worker": self.worker}
        self.capacity = self.scheduler.index.capacity

    def round(self, seam: str, mode: str, error: type[Exception], beams: bool = False, heal: bool = True) -> Outcome:
        """A storing turn, a reusing one and one from files, each with the fault; with `heal` two more without it."""
        out = Outcome(seam, mode, error.__name__)
        self._fresh()
        before = self._faults()
        try:
            for turn in range(3):
                if turn == 2:
                    self._to_files()
                with raising(seam, mode, error, self.parts) as counts:
                    self._turn(out, turn, beams)
                    self._idle()
                    if seam.endswith((":reset", ":take_stats")):
                        self.engine.reset_prefix_cache(reset_connector=True)
                out.calls, out.raised = out.calls + counts.calls, out.raised + counts.raised
            self._rest(out)
            if heal:
                self._fresh()
                for turn in (0, 1):
                    self._turn(out, turn, beams, healed=turn == 1)
                self._rest(out)
        except Exception as died:
            out.died = f"{type(died).__name__}: {died}"
        out.faults = self._faults() - before
        return out

    def _faults(self) -> int:
        return sum(self.scheduler.faults.total.values()) + sum(self.worker.faults.total.values())

    def _turn(self, out: Outcome, turn: int, beams: bool, healed: bool = False) -> None:
        self._poison()
        asked = cases(self.engine.get_tokenizer(), turn)
        found = answers(self.engine, asked, preempt=turn == 1)
        hits = {}
        for case in asked:
            if case.name not in found:
                out.wrong.append(f"turn {turn} {case.name}: no answer")
                continue
            said, receipt = found[case.name]
            if not alike(said, self.truth[turn][case.name]):
                out.wrong.append(f"turn {turn} {case.name}: {said[0]} for {self.truth[turn][case.name][0]}")
            if case.annotations is not None:
                hits[case.name] = (receipt or {}).get("chunks_hit", 0)
                out.fallbacks += (receipt or {}).get("fallback", "").startswith(FAULT)
        if healed and not all(hits.values()):
            out.wrong.append(f"nothing is reused any more: {hits}")
        if beams:
            said, want = searched(self.engine, asked[0]), self.truth[turn]["beams"]
            if said != want:
                out.wrong.append(f"turn {turn} beams: {said} for {want}")

    def _poison(self) -> None:
        """Clear the prefix cache and fill all blocks with garbage, so that a row never computed cannot be correct."""
        if not self.engine.reset_prefix_cache():
            raise RuntimeError("blocks are still in use")
        g = torch.Generator().manual_seed(0)
        for paged in self.worker.model.paged:
            paged.cache.copy_(torch.randn(paged.cache[:1].shape, generator=g).expand_as(paged.cache))

    def _fresh(self) -> None:
        """Empty the store and give it room for all chunks."""
        self.scheduler.index.capacity = self.capacity
        self.core.scheduler.connector.reset_cache()

    def _to_files(self) -> None:
        """Move chunks from memory to files; the next turn loads them, with memory for half of them."""
        self.worker.storage_tier.flush()
        self._idle()
        self.scheduler.index.capacity = self.scheduler.index.nbytes // 2
        self.worker.store.clear()
        self.scheduler.index.clear()

    def _idle(self) -> None:
        """Run an idle engine's steps: encode waiting chunks and compare the index."""
        until = time.monotonic() + LIMIT_S
        while self.core.scheduler.has_requests():
            self.core.step_fn()
            if time.monotonic() > until:
                raise TimeoutError("an idle engine goes on stepping")

    def _rest(self, out: Outcome) -> None:
        """Check that requests leave no state behind, and that the index matches the worker's store."""
        self._idle()
        self.scheduler.retention.unsettled = True
        until = time.monotonic() + LIMIT_S
        ask(self.engine, [Case("last", [5, 6, 7])])
        while self.scheduler.storage_tier.coming and time.monotonic() < until:
            ask(self.engine, [Case("last", [5, 6, 7])])
        side, store = self.scheduler, self.worker.store
        left = {
            "tracked": side.tracked, "running": side.running, "prefilling": side.prefilling, "box": side.box,
            "claims": side.claims.blocks, "coming": side.storage_tier.coming, "unsure": self.worker.unsure,
        }  # fmt: skip
        out.wrong += [f"left over: {name}: {list(what)}" for name, what in left.items() if what]
        names = {key for key in side.index.keys() if key in side.index}  # noqa: SIM118
        if not names <= set(store._chunks) <= set(side.index.keys()):
            out.wrong.append(f"the index names {len(names)} chunks, the worker holds {len(store)}")


def answers(engine: LLM, asked: Sequence[Case], preempt: bool = False) -> dict[str, tuple[Said, dict | None]]:
    """Tokens, log-probabilities and receipts by case; with `preempt` all running requests are preempted once."""
    return {name: (said(out), (out.kv_transfer_params or {}).get(FIELD)) for name, out in ask(engine, asked, preempt)}


def ask(engine: LLM, asked: Sequence[Case], preempt: bool = False) -> list[tuple[str, Any]]:
    """vLLM's outputs by case, for requests that arrive together; requests that do not end in time are missing."""
    names, outputs, steps = {}, [], 0
    for case in asked:
        extra = None if case.annotations is None else {"kv_transfer_params": {FIELD: case.annotations}}
        params = SamplingParams(
            max_tokens=TOKENS, temperature=0, logprobs=1, detokenize=False, ignore_eos=True, extra_args=extra
        )
        number = str(next(_NUMBERS))
        names[number] = case.name
        engine.llm_engine.add_request(number, {"prompt_token_ids": list(case.ids)}, params)
    until = time.monotonic() + LIMIT_S
    while engine.llm_engine.has_unfinished_requests() and time.monotonic() < until:
        outputs += [(names[o.request_id], o) for o in engine.llm_engine.step() if o.finished]
        steps += 1
        if preempt and steps == 4:
            engine.reset_prefix_cache(reset_running_requests=True)
    ended = {o.request_id for _, o in outputs}
    if left := [number for number in names if number not in ended]:
        engine.llm_engine.abort_request(left)  # a request that hangs must not affect the next fault
    return outputs


def said(output: Any) -> Said:
    """Generated ids and their log-probabilities."""
    first = output.outputs[0]
    return list(first.token_ids), [p[t].logprob for t, p in zip(first.token_ids, first.logprobs, strict=True)]


def alike(got: Said, want: Said) -> bool:
    """The same tokens, with log-probabilities that differ by rounding only."""
    return got[0] == want[0] and all(abs(a - b) < CLOSE for a, b in zip(got[1], want[1], strict=True))


def searched(engine: LLM, case: Case) -> list[list[int]]:
    """The sequences of a beam search over a case's prompt."""
    annotations = None if case.annotations is None else {FIELD: case.annotations}
    params = BeamSearchParams(beam_width=BEAMS, max_tokens=3, ignore_eos=True)
    [found] = beam_search(engine, [{"prompt_token_ids": list(case.ids)}], params, [annotations], use_tqdm=False)
    return [list(s.tokens) for s in found.sequences]


def truths(engine: LLM) -> list[dict[str, Any]]:
    """Answers of an engine without the connector, by turn and case; closes the engine."""
    out = []
    for turn in range(3):
        asked = cases(engine.get_tokenizer(), turn)
        plain = [Case(c.name, c.ids) for c in asked]
        out.append({name: got[0] for name, got in answers(engine, plain).items()})
        out[-1]["beams"] = searched(engine, plain[0])
    close_engine(engine)
    return out
