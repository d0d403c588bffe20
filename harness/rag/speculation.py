"""Promotions of one sample's chunks ahead of demand, and what became of them."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

from cacheslide.core.keys import ChunkKey
from harness.rag.kv_cache_manager import KVCacheManager
from harness.rag.proxy import Proxy
from harness.rag.retrievers.base import ranking


@dataclass
class Speculation:
    """Brings chunks to the device before the retriever asks for them.

    Parameters
    ----------
    manager : KVCacheManager
    keys : sequence of ChunkKey
        The sample's chunks, by passage.
    proxy : Proxy
    most : int
        Promotions a forecast; 0: none.

    Attributes
    ----------
    events : list of dict
        Every promotion and every demand in the trace's form: `kind` is "promotion" or "demand".
    """

    manager: KVCacheManager
    keys: Sequence[ChunkKey]
    proxy: Proxy
    most: int
    events: list[dict[str, Any]] = field(default_factory=list)
    _ahead: dict[int, dict[str, Any]] = field(default_factory=dict)

    def forecast(self, token_ids: Sequence[int], step: int, context: Collection[int]) -> None:
        """Promote the passages off the device that the proxy ranks first for the text `token_ids`.

        `step` is the number of tokens generated so far; passages in `context` are in the prompt already.
        """
        if not self.most:
            return
        scores = self.proxy.scores(token_ids)
        off = [i for i in ranking(scores) if scores[i] > 0 and i not in context and not self._on_device(i)]
        for i in off[: self.most]:
            promotion = self.manager.promote(self.keys[i])
            event = {"kind": "promotion", "step": step, "passage": i, "score": round(scores[i], 6), "used": False}
            event |= {"source": promotion.source, "bytes": promotion.nbytes, "seconds": promotion.seconds}
            self.events.append(event)
            self._ahead[i] = event

    def demand(self, passages: Sequence[int], step: int) -> None:
        """The retriever asks for `passages`; those off the device are brought there now, while decoding waits.

        Outcome "hit": promoted ahead of this demand; "resident": on the device for another reason; "miss".
        """
        for i in passages:
            event: dict[str, Any] = {"kind": "demand", "step": step, "passage": i, "seconds": 0.0}
            promotion = self.manager.promote(self.keys[i])
            ahead = self._ahead.pop(i, None)
            if promotion is not None:
                event |= {"outcome": "miss", "source": promotion.source, "seconds": promotion.seconds}
            elif ahead is not None:
                ahead["used"] = True
                event["outcome"] = "hit"
            else:
                event["outcome"] = "resident"
            self.events.append(event)

    def _on_device(self, passage: int) -> bool:
        return self.manager.where(self.keys[passage]) == "device"

    def counts(self) -> dict[str, Any]:
        """Numbers and seconds of the events so far; a promotion without a later demand is wasted."""
        promotions = [e for e in self.events if e["kind"] == "promotion"]
        demands = [e for e in self.events if e["kind"] == "demand"]
        outcomes = {name: sum(e["outcome"] == name for e in demands) for name in ("hit", "miss", "resident")}
        used = sum(e["used"] for e in promotions)
        return {
            "promotions": len(promotions),
            "hits": outcomes["hit"],
            "misses": outcomes["miss"],
            "resident": outcomes["resident"],
            "wasted_promotions": len(promotions) - used,
            "promotion_s": sum(e["seconds"] for e in promotions),
            "demand_s": sum(e["seconds"] for e in demands),
        }
