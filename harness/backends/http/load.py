"""Loads: a closed loop of clients that wait for their answers, and an open loop of Poisson arrivals that do not."""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass

import aiohttp

from harness.backends.http.stream import Endpoint, Outcome, Request, send
from harness.load.arrivals import Poisson


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
    times = Poisson(rate, seed).times(len(requests))

    async def run(session: aiohttp.ClientSession) -> list[Outcome]:
        started, tasks = time.perf_counter(), []
        for request, due in zip(requests, times, strict=True):
            await asyncio.sleep(max(0.0, started + due - time.perf_counter()))
            tasks.append(asyncio.create_task(send(session, endpoint, request)))
        return await asyncio.gather(*tasks)

    return _timed(run)


def _timed(run) -> Load:
    async def main() -> Load:
        connector = aiohttp.TCPConnector(limit=0)  # aiohttp's own limit would hold requests back unseen
        async with aiohttp.ClientSession(connector=connector) as session:
            started = time.perf_counter()
            outcomes = await run(session)
            seconds = time.perf_counter() - started
        return Load(sorted(outcomes, key=lambda o: o.sent), started, seconds)

    return asyncio.run(main())
