"""Loads: a closed loop of clients that wait for their answers, and an open loop of Poisson arrivals."""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass

from harness.backends.client import Client, Request, Result
from harness.backends.http.client import HttpClient, Send
from harness.load.arrivals import Poisson


@dataclass(frozen=True)
class Load:
    """A finished load: results in order of sending, its start (`time.perf_counter`) and its duration in seconds."""

    results: list[Result]
    started: float
    seconds: float


def closed_loop(client: Client, requests: Sequence[Request], clients: int) -> Load:
    """`clients` clients, each sending its next request after its last answer has ended.

    See `Client.run`: `requests` holds the first request of every client, then the second of every client, and so on.
    The load lasts from the first request sent to the end of the last answer.
    """
    results = _by_sending(client.run(requests, clients))
    if not results:
        return Load([], time.perf_counter(), 0.0)
    return Load(results, results[0].sent, max(r.finished for r in results) - results[0].sent)


def open_loop(client: HttpClient, requests: Sequence[Request], rate: float, seed: int = 0) -> Load:
    """Requests arrive as a Poisson process of `rate` a second, independent of earlier ones.

    The gaps between arrivals are exponential and drawn from `seed`; the load begins with the first gap.
    """
    times, started = Poisson(rate, seed).times(len(requests)), 0.0

    async def work(send: Send) -> list[Result]:
        nonlocal started
        started, tasks = time.perf_counter(), []
        for request, due in zip(requests, times, strict=True):
            await asyncio.sleep(max(0.0, started + due - time.perf_counter()))
            tasks.append(asyncio.create_task(send(request)))
        return await asyncio.gather(*tasks)

    results = _by_sending(client.with_session(work))
    return Load(results, started, max(r.finished for r in results) - started)


def _by_sending(results: Sequence[Result]) -> list[Result]:
    return sorted(results, key=lambda r: r.sent)
