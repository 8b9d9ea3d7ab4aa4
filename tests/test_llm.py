"""The client of language models (llm.py) on servers that misbehave."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from fake_llm_server import FORMS, Body, FakeServer, sentence
from hypothesis import given, settings
from hypothesis import strategies as st

from semcse.errors import RunError, UserError
from semcse.llm import Answer, ServerPool, creating_clients, read_answer


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short pauses between retries, no key, no proxy."""
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.001)
    for name in ("OPENAI_API_KEY", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)


def body(number: int = 0) -> Body:
    return {"model": "small", "messages": [{"role": "user", "content": f"paper {number}"}]}


def with_pool(
    use: Callable[[ServerPool], Awaitable[Any]],
    *urls: str,
    concurrency: int = 32,
    retries: int = 8,
    timeout: float = 5.0,
) -> Any:
    """What `use` returns for a pool of the servers at these URLs."""

    async def run() -> Any:
        async with ServerPool(urls, concurrency, retries, timeout) as pool:
            return await use(pool)

    return asyncio.run(run())


def ask(*urls: str, requests: int = 1, **options: Any) -> tuple[list[Any], dict[str, int]]:
    """Send requests at once, number i to server i; the answers or exceptions, and the faults."""

    async def use(pool: ServerPool) -> Any:
        tasks = [pool.ask(body(i), i) for i in range(requests)]
        return await asyncio.gather(*tasks, return_exceptions=True), dict(pool.faults)

    return with_pool(use, *urls, **options)  # type: ignore[no-any-return]


def failing(kind: str | None, first: int = 1) -> Callable[[Body, int], str | None]:
    """Misbehave in this way for the first requests."""
    return lambda body, number: kind if number < first else None


# Answers


@pytest.mark.parametrize(
    "said, read", [("7", 7), ("-7", 0), ("1e308", 10**9), ("null", 0), ("true", 1)]
)
def test_a_server_may_report_any_number_of_tokens(said: str, read: int) -> None:
    text = f'{{"choices": [{{"message": {{}}}}], "usage": {{"prompt_tokens": {said}}}}}'
    assert read_answer(text.encode()) == Answer("", False, read, 0)


JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=2),
    max_leaves=3,
)
BODIES = (
    '{"choices": %s}',
    '{"choices": [%s]}',
    '{"choices": [{"message": %s}]}',
    '{"choices": [{"message": {"content": %s}}]}',
    '{"choices": [{"message": {}}], "usage": %s}',
    '{"choices": [{"message": {}}], "usage": {"prompt_tokens": %s}}',
    "%s",
    "{%s",
)


@given(JSON, st.sampled_from(BODIES))
@settings(deadline=None, max_examples=200)
def test_a_body_is_an_answer_or_a_value_error(value: Any, form: str) -> None:
    try:
        answer = read_answer((form % json.dumps(value)).encode())
    except ValueError:
        return
    assert isinstance(answer.text, str)
    assert isinstance(answer.prompt_tokens, int)


@pytest.mark.parametrize(
    "key", ["sk-one\r\nX-Other: header", "sk-\u00e4\u00f6\u00fc-0123456789", "sk-\x1b[31m012345"]
)
def test_a_key_that_no_header_can_contain_is_refused(
    key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises(UserError, match="OPENAI_API_KEY contains") as error, creating_clients():
        pass
    assert key not in str(error.value)


# HTTP


@pytest.mark.parametrize(
    "kind, counted",
    [
        ("429", "HTTP 429"),
        ("429 date", "HTTP 429"),
        ("500", "HTTP 500"),
        ("503", "HTTP 503"),
        ("408", "HTTP 408"),
        ("204", "bad body"),
        ("drop", "connection"),
        ("truncated", "connection"),
        ("not json", "bad body"),
        ("no choices", "bad body"),
        ("stall", "timeout"),
    ],
)
def test_after_a_fault_the_same_request_is_sent_again(kind: str, counted: str) -> None:
    with FakeServer(misbehave=failing(kind)) as server:
        answers, faults = ask(server.url, timeout=0.5)
    assert faults == {counted: 1}
    assert server.requests == [body()] * 2
    assert [answer.text for answer in answers] == [sentence(body())]


@pytest.mark.parametrize("form", FORMS)
def test_a_response_may_come_in_any_form_of_http(form: str) -> None:
    with FakeServer(misbehave=failing(form, 10)) as server:
        answers, faults = ask(server.url, requests=3, concurrency=1)
    assert [answer.text for answer in answers] == [sentence(body(i)) for i in range(3)]
    assert faults == {}


def test_connections_are_used_again() -> None:
    with FakeServer(latency=0.01) as server:
        ask(server.url, requests=20, concurrency=3)
    assert (len(server.requests), server.connections) == (20, 3)


@pytest.mark.parametrize("direct", [False, True])
def test_proxies_of_the_environment_are_used(direct: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    with FakeServer() as proxy, FakeServer() as server:
        monkeypatch.setenv("HTTP_PROXY", proxy.url)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1" if direct else "")
        answers, _ = ask(server.url)
    assert [answer.text for answer in answers] == [sentence(body())]
    assert (len(proxy.requests), len(server.requests)) == ((0, 1) if direct else (1, 0))
    assert proxy.targets == ([] if direct else [f"{server.url}/chat/completions"])


@pytest.mark.parametrize("proxy", ["socks5://127.0.0.1:1", "ftp://127.0.0.1:1", "foo:bar:1"])
def test_a_proxy_that_cannot_be_used_is_an_error_in_one_line(
    proxy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTP_PROXY", proxy)
    with pytest.raises(UserError, match="a proxy or --base-url cannot be used"):
        ask("http://127.0.0.1:1/v1")


# Retries, servers, limits


def test_a_server_gets_the_pause_that_it_asks_for() -> None:
    with FakeServer(misbehave=failing("429", 2)) as server:
        ask(server.url)
    pauses = [later - time for time, later in zip(server.times, server.times[1:], strict=False)]
    assert len(pauses) == 2
    assert min(pauses) >= 0.2


def test_requests_go_to_their_server_and_retries_to_the_next() -> None:
    with FakeServer() as one, FakeServer() as two, FakeServer(misbehave=failing("500", 9)) as bad:
        ask(one.url, two.url, requests=4)
        assert one.requests == [body(0), body(2)]
        assert two.requests == [body(1), body(3)]
        answers, faults = ask(bad.url, one.url, f"{two.url}/", requests=3, retries=1)
    assert [answer.text for answer in answers] == [sentence(body(i)) for i in range(3)]
    assert (faults, bad.requests) == ({"HTTP 500": 1}, [body(0)])
    assert sorted(map(str, one.requests[2:])) == sorted(map(str, [body(0), body(1)]))
    assert two.requests[2:] == [body(2)]


@pytest.mark.parametrize(
    "kind, fix",
    [("401", "OPENAI_API_KEY"), ("403", "OPENAI_API_KEY"), ("404", "--base-url"), ("429 long", "")],
)
def test_a_server_that_accepts_no_request_ends_the_run(kind: str, fix: str) -> None:
    with FakeServer(misbehave=failing(kind)) as server:
        (error,), _ = ask(server.url)
    assert isinstance(error, RunError)
    assert f"HTTP {kind[:3]}" in str(error)
    assert fix in str(error)
    assert len(server.requests) == 1


@pytest.mark.parametrize("kind", ["500", None])
def test_a_run_ends_when_no_server_answers(kind: str | None) -> None:
    with socket.socket() as nobody, FakeServer(misbehave=failing("500", 999)) as server:
        nobody.bind(("127.0.0.1", 0))
        url = server.url if kind else f"http://127.0.0.1:{nobody.getsockname()[1]}/v1"
        ends, faults = ask(url, requests=60)
    errors = [str(end) for end in ends if isinstance(end, RunError)]
    assert "requests in a row failed" in errors[0]
    assert int(errors[0].split()[0]) >= 50
    assert sum(faults.values()) < 50 + 60


def test_a_short_outage_does_not_end_a_run() -> None:
    """More than 50 failures in a row, but not for a minute after an answer."""

    async def use(pool: ServerPool) -> Any:
        await pool.ask(body(0), 0)
        answers = await asyncio.gather(*(pool.ask(body(i), 0) for i in range(30)))
        return [answer.text for answer in answers], dict(pool.faults)

    drop = lambda body, number: "drop" if 1 <= number < 90 else None  # noqa: E731
    with FakeServer(misbehave=drop) as server:
        texts, faults = with_pool(use, server.url)
    assert texts == [sentence(body(i)) for i in range(30)]
    assert faults == {"connection": 89}


def test_the_limit_falls_after_429_once_a_second_and_rises_slowly() -> None:
    async def use(pool: ServerPool) -> list[float]:
        limits = []
        for pause, requests in ((0, 10), (0, 10), (1, 1), (0, 1)):
            await asyncio.sleep(pause)
            tasks = [pool.ask(body(i), 0) for i in range(requests)]
            await asyncio.gather(*tasks, return_exceptions=True)
            limits.append(pool.limit)
        return limits

    with FakeServer(misbehave=failing("429", 21)) as server:
        limits = with_pool(use, server.url, concurrency=100, retries=0)
    assert limits == pytest.approx([70, 70, 49, 49 + 1 / 49])


def test_a_server_with_room_for_four_answers_all_requests() -> None:
    with FakeServer(latency=0.02) as server:
        server.misbehave = lambda body, number: "429" if server.active >= 4 else None
        answers, _ = ask(server.url, requests=40, concurrency=16, retries=100)
    assert [answer.text for answer in answers] == [sentence(body(i)) for i in range(40)]
    assert server.most_active <= 16


def test_a_pool_that_is_stopping_sends_nothing() -> None:
    async def use(pool: ServerPool) -> None:
        pool.stopping = True
        await pool.ask(body(), 0)

    with FakeServer() as server, pytest.raises(asyncio.CancelledError):
        with_pool(use, server.url)
    assert server.requests == []
