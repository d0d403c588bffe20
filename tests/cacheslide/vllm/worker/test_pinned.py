"""Regions of pinned memory: never two over the same bytes, back when nobody holds them, not before work is over."""

import gc
import threading
from random import Random

import numpy as np
import pytest
import torch

from cacheslide.store.files import BLOCK
from cacheslide.vllm.worker import pinned
from cacheslide.vllm.worker.pinned import PinnedMemory, pin

pytestmark = pytest.mark.slow


class Later:
    """An event that happens when it is told to, or waited for."""

    def __init__(self) -> None:
        self.happened, self.waits = False, 0

    def query(self) -> bool:
        return self.happened

    def synchronize(self) -> None:
        self.happened, self.waits = True, self.waits + 1


class Memory(PinnedMemory):
    """Without a GPU: what does not fit is ordinary memory."""

    def __init__(self, blocks: int) -> None:
        self.stamped: list[Later] = []
        super().__init__(np.full(blocks * BLOCK, 255, dtype=np.uint8), self.stamps)

    def stamps(self):
        self.stamped.append(Later())
        return self.stamped[-1:]

    def _apart(self, nbytes):
        return torch.zeros(nbytes, dtype=torch.uint8)


def used(memory: Memory) -> Memory:
    """The same after a region came back."""
    memory.take(9)
    memory.settle()
    assert len(memory.stamped) == 1
    return memory


def test_regions_start_at_blocks_and_share_no_byte():
    memory = Memory(16)
    held = [memory.take(n)[0] for n in (1, BLOCK, BLOCK + 1, 5000)]
    for i, x in enumerate(held):
        assert (x.data_ptr() - memory._memory.ctypes.data) % BLOCK == 0
        x.fill_(i)
    assert [len(x) for x in held] == [1, BLOCK, BLOCK + 1, 5000]
    assert all((x == i).all() for i, x in enumerate(held)) and not memory.elsewhere
    assert (memory._memory == 255).sum() == 16 * BLOCK - sum(len(x) for x in held)


def test_a_region_is_back_when_its_last_view_is_gone_and_it_was_settled():
    memory = Memory(2)
    x = memory.take(2 * BLOCK)[0]
    k, v = x.view(torch.bfloat16).view(2, -1).unbind()
    del x, k
    gc.collect()
    memory.settle()
    assert not memory.stamped and memory.take(1)[0].data_ptr() != v.data_ptr()
    assert memory.elsewhere == 1
    at = v.data_ptr() - BLOCK
    del v
    gc.collect()
    assert memory.take(1)[0] is not None and memory.elsewhere == 2  # nobody has said what still uses it
    memory.settle()
    assert memory.take(2 * BLOCK)[0].data_ptr() == at and memory.elsewhere == 2


def test_whoever_takes_a_region_waits_for_the_work_that_used_it():
    memory = Memory(4)
    first, second, wall = (memory.take(BLOCK)[0] for _ in range(3))
    del first
    memory.settle()
    del second
    memory.settle()
    one, two = memory.stamped
    last, unused = memory.take(BLOCK)  # the smallest that fits was never used
    assert not unused
    joined, events = memory.take(2 * BLOCK)
    assert events == [one, two]
    del joined, last, wall
    gc.collect()
    memory.settle()
    one.happened = memory.stamped[-1].happened = True
    assert memory.take(4 * BLOCK)[1] == [] and len(memory.stamped) == 3


def test_the_host_waits_before_it_writes():
    memory = used(Memory(1))
    x = memory.for_host(7)
    [event] = memory.stamped
    assert event.waits == 1 and len(x) == 7 and not memory.elsewhere


def test_a_stream_waits_before_it_writes():
    class Stream:
        def __init__(self) -> None:
            self.waited = []

        def wait_event(self, event) -> None:
            self.waited.append(event)

    memory, stream = used(Memory(1)), Stream()
    x = memory.for_stream((3, 5), torch.bfloat16, stream)
    assert stream.waited == memory.stamped and not stream.waited[0].waits
    assert x.shape == (3, 5) and x.dtype == torch.bfloat16


@pytest.mark.parametrize("seed", range(3))
def test_threads_take_and_give_back_and_all_of_it_is_there_in_the_end(seed):
    memory, wrong = Memory(64), []

    def work(number: int) -> None:
        random, held = Random(100 * seed + number), []
        for turn in range(300):
            if held and random.random() < 0.5:
                x, mark = held.pop(random.randrange(len(held)))
                if not (x == mark).all():
                    wrong.append((number, turn))
            else:
                x = memory.for_host(random.randrange(1, 9 * BLOCK))
                held.append((x.fill_(mark := random.randrange(256)), mark))
            del x
            if number == 0:
                memory.settle()
        wrong.extend((number, "end") for x, mark in held if not (x == mark).all())

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    gc.collect()
    memory.settle()
    assert not wrong
    assert [(r.start, r.end) for r in memory._free] == [(0, 64 * BLOCK)]


def test_without_a_piece_every_region_is_its_own():
    memory = Memory(1)
    memory._memory, memory._free = None, []
    assert len(memory.for_host(77)) == 77 and not memory.elsewhere
    memory.settle()
    assert not memory.stamped


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_copies_under_way_keep_their_region(monkeypatch):
    """A copy to the device that has not begun reads what was there, though its region is written to anew meanwhile."""
    streams = [torch.cuda.Stream() for _ in range(2)]
    piece = pin(4 << 20)
    memory = PinnedMemory(piece, lambda: [s.record_event() for s in streams])
    fresh = torch.zeros(1 << 20, device="cuda")
    for stamped in (True, False):
        x = memory.for_host(4 << 20).view(torch.float32).fill_(1)
        assert x.is_pinned() and x.data_ptr() == piece.ctypes.data
        got = torch.full((1 << 20,), float("nan"), device="cuda")
        torch.cuda.synchronize()
        with torch.cuda.stream(streams[0]):
            torch.cuda._sleep(100_000_000)
            got.copy_(x, non_blocking=True)
        del x
        if not stamped:  # this is what the events are for
            monkeypatch.setattr(memory, "_stamp", tuple)
        memory.settle()
        new = memory.for_stream((1 << 20,), torch.float32, streams[1])
        assert new.data_ptr() == piece.ctypes.data and not memory.elsewhere
        with torch.cuda.stream(streams[1]):
            new.copy_(fresh, non_blocking=True)
        torch.cuda.synchronize()
        assert bool((got == 1).all()) is stamped
        del new
        memory.settle()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_more_than_the_host_has_is_pinned_as_chunks_come(monkeypatch):
    said = []
    monkeypatch.setattr(pinned.logger, "warning", lambda text, *numbers: said.append(text % numbers))
    assert pin(0) is None and not said
    assert pin(1 << 50) is None
    assert len(said) == 1 and "pins memory as chunks come" in said[0] and "of 1048576.0 GiB" in said[0]
    assert PinnedMemory(None, tuple).for_host(5000).is_pinned()
