"""A client of a server: HTTP requests with the time of every token."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence

import aiohttp

from cacheslide.errors import ConfigError
from harness.backends.client import Client, Request, Result, at_once
from harness.backends.http.stream import Endpoint, send

Send = Callable[[Request], Awaitable[Result]]


class HttpClient(Client):
    """Requests to an OpenAI-compatible server. Stateless between runs, and usable from many threads."""

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint

    def run(self, requests: Sequence[Request], clients: int | None = None) -> list[Result]:
        """See `Client.run`."""
        step = at_once(requests, clients)

        async def work(send_: Send) -> list[Result]:
            async def client(number: int) -> list[Result]:
                return [await send_(r) for r in requests[number::step]]

            done = await asyncio.gather(*map(client, range(step)))
            return [done[i % step][i // step] for i in range(len(requests))]

        return self.with_session(work)

    def with_session(self, work: Callable[[Send], Awaitable[list[Result]]]) -> list[Result]:
        """The result of `work`, which gets a function to send requests with; it may send any number at once."""

        async def main() -> list[Result]:
            connector = aiohttp.TCPConnector(limit=0)  # aiohttp's own limit would delay requests silently
            async with aiohttp.ClientSession(connector=connector) as session:
                return await work(lambda request: send(session, self.endpoint, request))

        return asyncio.run(main())

    def reset(self) -> None:
        """Raises ConfigError: a client cannot empty a server's caches."""
        raise ConfigError("a client cannot empty a server's caches: give requests a salt of their own")

    def close(self) -> None:
        """Does nothing: no connection is open between runs."""
