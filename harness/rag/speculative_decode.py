"""Decoding with retrieval every few tokens, over reused KV, with promotions ahead of it.

Every `stride` tokens the retriever ranks the passages for the question and the text so far (as in iterative RAG: Ram et
al., 2023, "In-Context Retrieval-Augmented Language Models"). If its first k are other passages than the prompt's, the
prompt is made anew with them and prefilled by the system from the chunks on the device. Before that, after `ahead` of
the stride's tokens and once after the first prefill, the proxy's first passages are promoted (Zhang et al., 2024,
"Accelerating Retrieval-Augmented Language Model Serving with Speculation", speculate on the retrieval in the same
place). Promotions change when KV is on the device and never the answer.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from cacheslide.core.engine import Prefilled
from cacheslide.core.greedy import greedy
from cacheslide.errors import ConfigError
from harness.rag.kv_cache_manager import KVCacheManager, Place
from harness.rag.placing import Placed, place_sample
from harness.rag.prompts import SamplePrompts
from harness.rag.proxy import Proxy, TokenOverlap
from harness.rag.retrievers.base import Index, ranking
from harness.rag.speculation import Speculation
from harness.tasks.passages import PassageRow


@dataclass(frozen=True)
class DecodeSettings:
    """How one sample is decoded.

    Attributes
    ----------
    k : int
        Passages in the prompt.
    max_new_tokens : int
    stride : int
        Tokens between two retrievals.
    ahead : int
        Tokens of a stride after which its forecast is made; below `stride`. If it is above 0, the first prefill is
        followed by a forecast too.
    promotions : int
        Chunks promoted a forecast; 0 turns speculation off.
    """

    k: int
    max_new_tokens: int = 32
    stride: int = 4
    ahead: int = 2
    promotions: int = 2

    def __post_init__(self) -> None:
        least = {"k": 1, "max_new_tokens": 1, "stride": 1, "ahead": 0, "promotions": 0}
        for name, lowest in least.items():
            if getattr(self, name) < lowest:
                raise ConfigError(f"{name} must be at least {lowest}, not {getattr(self, name)}")
        if self.ahead >= self.stride:
            raise ConfigError(f"ahead ({self.ahead}) must be below stride ({self.stride})")


class SampleDecoder:
    """Decodes one sample whose chunks are placed.

    Attributes
    ----------
    ids : list of int
        What was generated, up to and without the token that ended it.
    prefills : list of dict
        Of each prefill: tokens generated before it, its passages, seconds, compute fraction and chunks hit.
    retrievals : int
        Retrievals during decoding.
    """

    def __init__(
        self,
        manager: KVCacheManager,
        prompts: SamplePrompts,
        row: PassageRow,
        index: Index,
        placed: Placed,
        ranked: Sequence[int],
        settings: DecodeSettings,
        proxy: Callable[[Sequence[Sequence[int]]], Proxy] = TokenOverlap,
    ) -> None:
        self.manager, self.prompts, self.row, self.index, self.settings = manager, prompts, row, index, settings
        made = proxy([p.token_ids for p in prompts.passages])
        self.speculation = Speculation(manager, placed.keys, made, settings.promotions)
        self.context = list(ranked[: settings.k])
        self.ids: list[int] = []
        self.prefills: list[dict[str, Any]] = []
        self.retrievals = 0

    def run(self) -> None:
        """Generate until a stop token or `max_new_tokens`."""
        settings, stop = self.settings, self.manager.backend.stop_ids()
        state = self._prefill()
        logits = state.logits
        if self.settings.ahead:
            self._forecast([])
        while True:
            most = min(settings.stride, settings.max_new_tokens - len(self.ids))
            new = self._stride(state, logits, most, stop)
            self.ids += new
            if len(new) < most or len(self.ids) == settings.max_new_tokens:
                return
            if self._retrieve():
                state = self._prefill()
                logits = state.logits
            else:
                logits = self.manager.engine.extend(state, self.ids[-1:])

    def _stride(self, state: Prefilled, logits: Tensor, most: int, stop: frozenset[int]) -> list[int]:
        """The next `most` tokens or fewer, with a forecast on the way."""
        drafted: list[int] = []
        if not self.settings.ahead:
            self._forecast(drafted)

        def advance(_: list[int], tokens: list[int]) -> list[Tensor]:
            drafted.extend(tokens)
            if len(drafted) == self.settings.ahead:
                self._forecast(drafted)
            return [self.manager.engine.extend(state, tokens)]

        [new] = greedy([logits], [most], stop, advance)
        return new

    def _forecast(self, drafted: Sequence[int]) -> None:
        if len(self.ids) + self.settings.stride >= self.settings.max_new_tokens:
            return  # no retrieval follows
        text = [*self.prompts.question, *self.ids, *drafted]
        self.speculation.forecast(text, len(self.ids) + len(drafted), self.context)

    def _retrieve(self) -> bool:
        """Whether the retriever's first k passages are others than the prompt's; they are then the new context."""
        self.retrievals += 1
        query = f"{self.row.question} {self.manager.backend.decode(self.ids)}"
        wanted = ranking(self.index.scores(query))[: self.settings.k]
        if set(wanted) == set(self.context):
            return False
        self.speculation.demand([i for i in wanted if i not in self.context], len(self.ids))
        self.context = wanted
        return True

    def _prefill(self) -> Prefilled:
        self.manager.bring([self.prompts.head, *(self.prompts.passages[i] for i in self.context)])
        began = time.perf_counter()
        prompt = self.prompts.prompt(self.context, self.ids)
        state = self.manager.engine.prefill(prompt, room=self.settings.max_new_tokens - len(self.ids))
        receipt = state.receipt
        self.prefills.append(
            {
                "step": len(self.ids),
                "passages": list(self.context),
                "tokens": receipt.tokens,
                "chunks_hit": receipt.chunks_hit,
                "tokens_recomputed": receipt.tokens_recomputed,
                "compute_fraction": receipt.compute_fraction,
                "fallback": receipt.fallback,
                "seconds": time.perf_counter() - began,
            }
        )
        return state


def decode_sample(
    manager: KVCacheManager,
    prompts: SamplePrompts,
    row: PassageRow,
    index: Index,
    ranked: Sequence[int],
    settings: DecodeSettings,
    rest: Place = "placeholder",
    folders: Path | None = None,
) -> tuple[SampleDecoder, dict[str, Any]]:
    """Place a sample's chunks, decode it, and describe the run in numbers.

    Times are in seconds. `total_s` is from the first prefill to the last token; placing (`encode_s`, `load_s`) comes
    before it. Promotions are not overlapped with decoding here: `total_s` holds them.
    """
    manager.clear()
    placed = place_sample(manager, prompts, row, ranked[: settings.k], rest, folders)
    began = time.perf_counter()
    decoder = SampleDecoder(manager, prompts, row, index, placed, ranked, settings)
    decoder.run()
    total = time.perf_counter() - began
    figures = {
        "tokens": len(decoder.ids),
        "prompt_tokens": decoder.prefills[0]["tokens"],
        "retrievals": decoder.retrievals,
        "prefills": decoder.prefills,
        "events": decoder.speculation.events,
        **decoder.speculation.counts(),
        "ttft_s": decoder.prefills[0]["seconds"],
        "total_s": total,
        "encode_s": placed.encode_s,
        "load_s": placed.load_s,
        "loaded": placed.loaded,
        "unusable": placed.unusable,
        "device_bytes": manager.device.nbytes,
        "cpu_bytes": manager.host.nbytes,
    }
    return decoder, figures
