"""Places a sample's passages: the first ones on the device, the rest on the CPU, from saved folders where given."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cacheslide.core.keys import ChunkKey
from cacheslide.errors import StoreError
from harness.rag.chunk_folder import chunk_folder, load_chunk
from harness.rag.kv_cache_manager import KVCacheManager, Place
from harness.rag.prompts import SamplePrompts
from harness.tasks.passages import PassageRow


@dataclass
class Placed:
    """The chunks of one sample, by passage.

    `encode_s` and `load_s` are the seconds of computing and of reading KV; `loaded` counts folders that were read,
    placeholders included; `unusable` has the reasons of those that were not.
    """

    keys: list[ChunkKey]
    encode_s: float = 0.0
    load_s: float = 0.0
    loaded: int = 0
    unusable: list[str] = field(default_factory=list)


def place_sample(
    manager: KVCacheManager,
    prompts: SamplePrompts,
    row: PassageRow,
    top: Sequence[int],
    rest: Place = "placeholder",
    folders: Path | None = None,
) -> Placed:
    """Place the head and the passages `top` on the device, and the others as `rest`.

    With `folders`, KV saved there is read instead of computed; of passages that are not `top` it is staged on the CPU.
    """
    manager.encode([prompts.head], "device")
    placed = Placed([manager.key(passage) for passage in prompts.passages])
    for i, passage in enumerate(prompts.passages):
        place: Place = "device" if i in top else rest
        if folders is not None and _load(manager, placed, i, place, chunk_folder(folders, row, i), prompts):
            continue
        began = time.perf_counter()
        manager.encode([passage], place)
        placed.encode_s += time.perf_counter() - began
    return placed


def _load(
    manager: KVCacheManager, placed: Placed, number: int, place: Place, folder: Path, prompts: SamplePrompts
) -> bool:
    """Whether the passage has been placed from its folder."""
    began, key = time.perf_counter(), placed.keys[number]
    try:
        saved = load_chunk(folder, key)
        if saved.chunk is not None:
            manager.put(prompts.passages[number], saved.chunk, "device" if place == "device" else "cpu")
    except StoreError as why:
        placed.unusable.append(str(why))
        return False
    placed.load_s += time.perf_counter() - began
    placed.loaded += 1
    if saved.chunk is not None:
        return True
    if place == "placeholder":
        manager.encode([prompts.passages[number]], place)
    return place == "placeholder"
