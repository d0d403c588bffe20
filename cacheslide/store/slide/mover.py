"""Moves pages between tiers: evicts from memory, queues writes, and keeps versions apart."""

from collections.abc import Sequence

from torch import Tensor

from cacheslide.store.files import align
from cacheslide.store.pages import packed
from cacheslide.store.slide.arena import Arena
from cacheslide.store.slide.entry import Entry, Page, PagesJob
from cacheslide.store.slide.eviction import PageId
from cacheslide.store.slide.table import PageTable
from cacheslide.store.slide.writer import PageWriter

_BATCH = 64  # dirty pages evicted together, to be written in one go


class _Plan:
    """Work for making room: pages to drop, chunks to publish, private pages to spill, pages to move down."""

    def __init__(self) -> None:
        self.drop: list[PageId] = []
        self.publish: dict[int, Entry] = {}
        self.spill: list[PageId] = []
        self.demote: list[PageId] = []
        self.nbytes = 0


class Mover:
    """Makes room and fills it in one step under the table's lock; never waits while holding the lock."""

    def __init__(self, table: PageTable, writer: PageWriter) -> None:
        self.table, self.stats, self.writer, self.queue = table, table.stats, writer, writer.queue

    # --- into memory -----------------------------------------------------------------------------------------------

    def insert(self, arena: Arena, pages: Sequence[Page], content: Tensor, only_current: bool = False) -> None:
        """Insert pages into a tier, making room first. `only_current`: skip replaced or released pages."""
        step = max(1, len(arena.slots) // 2)  # at most half a tier at once
        for at in range(0, len(pages), step):
            self._insert(arena, pages[at : at + step], content[at : at + step], only_current)

    def _insert(self, arena: Arena, pages: Sequence[Page], content: Tensor, only_current: bool) -> None:
        reserved, forced = 0, False
        while True:
            with self.table.lock:
                keep = [i for i, (e, p) in enumerate(pages) if self._wanted(arena, e, p, only_current)]
                keep = self._admitted(arena, pages, keep)
                for e, p in (pages[i] for i in keep):
                    self.table.drop(arena, e.ids([p]), retire=False)
                plan = self._plan(arena, len(keep) - arena.room)
                if forced or plan.nbytes <= reserved:
                    moved, used = self._execute(arena, plan, forced)
                    kept = content[keep] if len(keep) < len(pages) else content
                    self.table.place(arena, [pages[i] for i in keep], kept)
                    self.queue.release(reserved - used)
                    break
            if reserved:  # never wait with reserved bytes: two threads would wait for each other
                self.queue.release(reserved)
            reserved = plan.nbytes if self.queue.reserve(plan.nbytes) else 0
            forced = not reserved
        if moved is not None:
            down, tensor = moved
            self.insert(self.table.arenas[1], down, tensor, only_current=True)
            self.table.arrived(down)

    def _wanted(self, arena: Arena, entry: Entry, page: int, only_current: bool) -> bool:
        """Whether a page should still enter a tier: its entry is current, or a forgotten reference version."""
        number, known = entry.ids([page])[0], self.table.version(entry.name, entry.owner)
        if entry.lost or (known is not entry and (known is not None or entry.owner is not None)):
            return False
        if not only_current:
            return True
        if number in arena.held:
            return False
        top = arena is self.table.arenas[0]
        if entry.owner is not None:  # from the spill file, or moving down
            return page in entry.spilled if top else self.table.on_its_way(number)
        return not top or len(self.table.arenas) == 1 or not entry.dirty(page) or not self.table.below(number)

    def _admitted(self, arena: Arena, pages: Sequence[Page], keep: list[int]) -> list[int]:
        """`keep` without clean new pages that would be evicted first."""
        yielding = arena.order.yields_to_clean()
        if yielding is None:
            return keep
        clean = [i for i in keep if pages[i][0].dirty(pages[i][1]) == 0]
        spare = arena.room + yielding - (len(keep) - len(clean))
        if spare >= len(clean):
            return keep
        left_out = set(clean[max(0, spare) :])
        return [i for i in keep if i not in left_out]

    # --- out of memory ---------------------------------------------------------------------------------------------

    def _plan(self, arena: Arena, need: int) -> _Plan:
        """Choose victims for `need` slots in the tier's order; dirty ones in batches."""
        plan = _Plan()
        if need <= 0:
            return plan
        last = arena is self.table.arenas[-1]
        extra = 0  # dirty pages chosen in addition
        for count, number in enumerate(arena.order.victims()):
            if count >= need and not (0 < extra < _BATCH):
                break
            entry, page = self.table.page(number)
            dirty = entry.dirty(page)
            if count >= need and not dirty:
                break
            if not dirty:
                plan.drop.append(number)
            elif not last:
                plan.demote.append(number)
            elif entry.owner is None:
                if entry.number not in plan.publish:
                    plan.publish[entry.number] = entry
                    plan.nbytes += entry.layout.payload_bytes
                plan.drop.append(number)
            else:
                extra += 1
                plan.spill.append(number)
                plan.nbytes += align(entry.layout.page_bytes)
        return plan

    def _execute(self, arena: Arena, plan: _Plan, forced: bool) -> tuple[tuple[list[Page], Tensor] | None, int]:
        """Carry out a plan whose bytes were reserved; `forced`: nothing can be queued, and dirty pages are lost.

        Returns the pages to move to the next tier, and the reserved bytes used.
        """
        used = 0
        for entry in plan.publish.values():
            gathered = self.table.gather(entry, range(entry.layout.pages), touch=False)
            if forced or gathered.missing or not self.writer.persistent.exists:  # never publish a partial chunk
                self.table.lose(entry, "dropped: no storage tier took it in time")
                self.stats.dirty_dropped += entry.layout.pages
            else:
                payload = packed(gathered.content, entry.layout).cpu()
                self.writer.submit_record(entry, payload)
                used += len(payload)
        if plan.spill:
            used += self._spill(arena, sorted(plan.spill), forced)
        moved = None
        if plan.demote:
            numbers = sorted(plan.demote)
            moved = [self.table.page(n) for n in numbers], self.table.depart(arena, numbers)
            self.stats.demoted += len(numbers)
        clean = [n for n in plan.drop if n in arena.held and self.table.page(n)[0].number not in plan.publish]
        self.stats.clean_dropped += len(clean)
        self.table.drop(arena, [*plan.drop, *plan.spill, *plan.demote])
        return moved, used

    def _spill(self, arena: Arena, numbers: list[PageId], forced: bool) -> int:
        pages = [self.table.page(n) for n in numbers]
        if forced or self.table.spill is None:
            self.stats.dirty_dropped += len(pages)
            for entry in {e.number: e for e, _ in pages}.values():
                entry.lost = "corrected pages were lost: no room to spill them"
            return 0
        content = self.table.depart(arena, numbers)
        nbytes = sum(align(e.layout.page_bytes) for e, _ in pages)
        self.queue.submit(PagesJob([e for e, _ in pages], [p for _, p in pages], content, nbytes))
        return nbytes
