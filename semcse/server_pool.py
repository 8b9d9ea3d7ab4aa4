"""Asks one or several OpenAI-compatible servers for chat completions.

The openai package does HTTP, proxies, exponential backoff and Retry-After. This module adds three
things: a retry goes to the next server, fewer requests are in flight after HTTP 429 and timeouts,
and a run ends when no server answers any more.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import httpx2
import openai

from semcse.errors import RunError
from semcse.llm import (
    Answer,
    api_key,
    checked_proxies,
    connection_fault,
    read_answer,
    translated_errors,
)

# A run ends after so many failures in a row, and so many seconds without any answer.
GONE_AFTER_FAILURES, GONE_AFTER_SECONDS = 50, 60.0
RETRY_COUNT = "x-stainless-retry-count"  # header in which the openai package counts retries


class Stopped(Exception):
    """A request was not sent because the run is stopping."""


class ServerPool(openai.DefaultAsyncHttpxClient):
    """The HTTP client of all servers. The openai package calls `send` for each request, and again
    for each retry after the pause that it chooses.

    Args:
        base_urls: the addresses of the servers, most of which end in /v1.
        concurrency: the most requests in flight.
        retries: how often a request is sent again after a fault of server or network.
        timeout: seconds to wait for an answer.
    """

    def __init__(
        self, base_urls: Sequence[str], concurrency: int, retries: int, timeout: float
    ) -> None:
        logging.getLogger("openai").setLevel(logging.WARNING)  # it logs every retry
        with checked_proxies():
            super().__init__(limits=httpx2.Limits(), timeout=timeout)
            options: dict[str, Any] = {"max_retries": retries, "http_client": self}
            self.servers = [
                openai.AsyncOpenAI(base_url=url, api_key=api_key(), timeout=timeout, **options)
                for url in base_urls
            ]
        self.urls = [server.base_url.join("chat/completions") for server in self.servers]
        self.concurrency = concurrency
        self.limit = float(concurrency)  # of requests in flight, lower after faults
        self.in_flight = 0
        self.stopping = False  # once it is set, no more requests are sent
        self.faults: Counter[str] = Counter()
        self._failures_in_a_row = 0
        self._last_answer = self._last_cut = float("-inf")

    async def ask(self, body: dict[str, Any], server: int) -> Answer:
        """Send one request to the server with this number, modulo the number of servers.

        Raises:
            Unanswered: there was no answer to this request after all retries.
            RunError: there is no answer to any request: wrong key, wrong URL, servers gone.
            Stopped: the run is stopping.
        """
        first = self.servers[server % len(self.servers)]
        with translated_errors():
            try:
                response = await first.post("/chat/completions", cast_to=httpx2.Response, body=body)
            except openai.RateLimitError as error:
                # The package gives up early on a pause of more than two minutes.
                if int(error.request.headers[RETRY_COUNT]) < first.max_retries:
                    what = "a server accepts no more requests for now (HTTP 429)"
                    raise RunError(what, "run again later to continue") from None
                raise
            return read_answer(response.content)

    async def send(self, request: httpx2.Request, **options: Any) -> httpx2.Response:
        """Send a request or a retry as soon as fewer than `limit` are in flight. The openai package
        tries again after an httpx2.RequestError.
        """
        while self.in_flight >= self.limit and not self.stopping:
            await asyncio.sleep(0.1)
        if self.stopping:
            raise Stopped
        retry = int(request.headers[RETRY_COUNT])
        request.url = self.urls[(self.urls.index(request.url) + retry) % len(self.urls)]
        request.headers["Host"] = request.url.netloc.decode()
        self.in_flight += 1
        try:
            response = await super().send(request, **options)
            if response.is_success:
                read_answer(response.content)
        except httpx2.RequestError as error:
            self._count_fault(connection_fault(error))
            raise
        except ValueError as error:
            self._count_fault("bad body")
            raise httpx2.DecodingError(str(error), request=request) from error
        finally:
            self.in_flight -= 1
        if response.is_success:
            self._failures_in_a_row, self._last_answer = 0, time.monotonic()
            self.limit = min(float(self.concurrency), self.limit + 1 / self.limit)
        else:
            self._count_fault(f"HTTP {response.status_code}")
        return response

    def _count_fault(self, kind: str) -> None:
        """Lower the limit if a server has too much to do, and end the run if none answers."""
        now = time.monotonic()
        self.faults[kind] += 1
        if kind in ("HTTP 429", "timeout") and now - self._last_cut >= 1:
            self.limit, self._last_cut = max(1.0, 0.7 * self.limit), now
        self._failures_in_a_row += kind != "HTTP 429"
        silent = now - self._last_answer > GONE_AFTER_SECONDS
        if silent and self._failures_in_a_row >= GONE_AFTER_FAILURES:
            raise RunError(
                f"{self._failures_in_a_row} requests in a row failed, the last with: {kind}",
                "check --base-url and its server, and run again to continue",
            )
