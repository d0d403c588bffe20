"""Loads: a closed loop of clients that wait for their answers, and an open loop of Poisson arrivals that do not."""

import asyncio
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import aiohttp

from cacheslide.errors import DataError
from harness.client.stream import Endpoint, Outcome, Request, send


@dataclass(frozen=True)
class Load:
    """A load that has run: outcomes in order of sending, its start (`time.perf_counter`) and its seconds."""

    outcomes: list[Outcome]
    started: float
    seconds: float


def closed_loop(endpoint: Endpoint, clients: Sequence[Sequence[Request]]) -> Load:
    """One client a list: it sends a request, waits for the end of its answer, then sends the next."""

    async def run(session: aiohttp.ClientSession) -> list[Outcome]:
        async def client(requests: Sequence[Request]) -> list[Outcome]:
            return [await send(session, endpoint, r) for r in requests]

        return [o for done in await asyncio.gather(*map(client, clients)) for o in done]

    return _timed(run)


def open_loop(endpoint: Endpoint, requests: Sequence[Request], rate: float, seed: int = 0) -> Load:
    """Requests arrive as a Poisson process of `rate` a second, whatever becomes of those before them.

    The gaps between arrivals are exponential and drawn from `seed`.
    """
    times = arrivals(len(requests), rate, seed)

    async def run(session: aiohttp.ClientSession) -> list[Outcome]:
        started, tasks = time.perf_counter(), []
        for request, due in zip(requests, times, strict=True):
            await asyncio.sleep(max(0.0, started + due - time.perf_counter()))
            tasks.append(asyncio.create_task(send(session, endpoint, request)))
        return await asyncio.gather(*tasks)

    return _timed(run)


def arrivals(count: int, rate: float, seed: int = 0) -> list[float]:
    """Seconds from the start at which `count` requests of a Poisson process arrive."""
    if rate <= 0:
        raise DataError(f"rate must be above 0 requests a second, not {rate}")
    rng = random.Random(f"arrivals-{seed}")
    return list(accumulate(rng.expovariate(rate) for _ in range(count)))


def _timed(run) -> Load:
    async def main() -> Load:
        connector = aiohttp.TCPConnector(limit=0)  # aiohttp's own limit would hold requests back unseen
        async with aiohttp.ClientSession(connector=connector) as session:
            started = time.perf_counter()
            outcomes = await run(session)
            seconds = time.perf_counter() - started
        return Load(sorted(outcomes, key=lambda o: o.sent), started, seconds)

    return asyncio.run(main())
