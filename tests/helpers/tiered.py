"""The tiered store of the tests, its keys, and how many pages a chunk takes."""

from cacheslide.store.files import Files
from cacheslide.store.pages import PageLayout
from cacheslide.store.persistent.filetier import FileOptions, FileTier
from cacheslide.store.slide.arena import Arena
from cacheslide.store.slide.spill import SpillFile
from cacheslide.store.slide.tiered import TieredChunkStore
from tests.helpers.chunks import chunk

N = 8  # tokens a page
PAGE = PageLayout.of(chunk(), N).page_bytes
PAGES = PageLayout.of(chunk(), N).pages


def key(i: int) -> str:
    return f"{i * 2654435761 % 2**160:040x}"


def arena(name: str, pages: int, policy="clean-first") -> Arena:
    made = Arena(name, pages * PAGE, PAGE, "cpu", policy)
    made.slots.fill_(255)  # NaN in every float: a slot that was never written must not be served
    return made


def store(
    path, *, device=None, host=None, policy="clean-first", disk=64 << 20, spill=8 << 20, files=None, slow=None, **kw
):
    files = files or Files()
    file = FileTier(FileOptions(path / "chunks", disk, shards=2, durable=False), files) if disk else None
    spilled = SpillFile(path / "spill", spill, PAGE, slow or files) if spill else None
    return TieredChunkStore(
        N,
        PAGE,
        device=arena("device", device, policy) if device else None,
        host=arena("host", host, policy) if host else None,
        file=file,
        spill=spilled,
        **({"stall_limit_s": 5.0} | kw),
    )
