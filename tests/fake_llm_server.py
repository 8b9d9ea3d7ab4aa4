"""A language-model server for tests: answers /v1/chat/completions with made-up sentences after a
given latency, and misbehaves on demand.

python tests/fake_llm_server.py [--latency SECONDS] prints its base URL and serves until killed.
FakeServer(latency=0.01, misbehave=lambda body, number: "500" if number == 0 else None) serves in a
thread, as a context manager.

Equal requests get equal answers; requests that differ in a message or in the seed get different
answers. The server ignores the path of a request, so that it can play an HTTP proxy, too.
"""

from __future__ import annotations

import argparse
import asyncio
import gzip
import hashlib
import json
import random
import threading
import time
from collections.abc import Callable, Sequence
from email.utils import formatdate
from typing import Any

Body = dict[str, Any]
Misbehave = Callable[[Body, int], str | None]  # (body, number of the request) -> kind of fault
STALL = 30.0  # seconds

# 256 made-up words of five to seven letters: no text of them is a refusal or speaks of a study.
SYLLABLES = "ba ke li mo nu ra se ti vo zu dal fen gor hip jul pex".split()
WORDS = [SYLLABLES[i // 16] + "n" + SYLLABLES[i % 16] for i in range(256)]

# Faults of server or network ...
WIRE = ("429", "429 date", "500", "204", "drop", "truncated", "not json", "no choices", "stall")
# ... correct but unusual ways to send a response ...
FORMS = ("chunked", "until closed", "gzip", "continue", "early hints")
# ... and faults in the text of an answer.
TEXTS = {
    "empty": "",
    "refusal": "I'm sorry, but as an AI language model I cannot summarise this text for you today.",
    "study": "This study shows that the authors measured several things about their subject.",
}
KINDS = (*WIRE, *TEXTS, "cut", "preamble")


def sentence(body: Body, number: int = 0) -> str:
    """Sixteen words drawn by a hash of the request: the made-up answer."""
    what = json.dumps([body["messages"], body.get("seed"), number]).encode()
    words = [WORDS[byte] for byte in hashlib.blake2b(what, digest_size=16).digest()]
    return " ".join(words).capitalize() + "."


def completion(body: Body, kind: str | None) -> bytes:
    """The JSON body of a response."""
    text = sentence(body)
    if "response_format" in body:
        number = body["response_format"]["json_schema"]["schema"]["properties"]["texts"]["maxItems"]
        text = json.dumps({"texts": [sentence(body, i) for i in range(number)]})
    text = TEXTS.get(kind or "", text)
    if kind == "cut":
        text = text[: 2 * len(text) // 3]
    if kind == "preamble":
        text = f'Sure! Here is a one-sentence summary:\n\n**"{text}"**'
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": text},
        "finish_reason": "length" if kind == "cut" else "stop",
    }
    usage = {
        "prompt_tokens": sum(len(message["content"]) for message in body["messages"]) // 4,
        "completion_tokens": len(text.split()),
    }
    head = {"id": "1", "object": "chat.completion", "created": 1, "model": body["model"]}
    return json.dumps(head | {"choices": [choice], "usage": usage}).encode()


def response(body: Body, kind: str | None) -> bytes:
    """All bytes of an HTTP response."""
    status, fields = 200, ["Content-Type: application/json"]
    before = {"continue": "100 Continue", "early hints": "103 Early Hints"}.get(kind or "", "")
    content = completion(body, kind)
    if kind == "no choices":
        content = b'{"choices": []}'
    elif kind and kind[:3].isdigit():
        status = int(kind[:3])
        content = json.dumps({"error": {"message": f"made-up {kind}"}}).encode()
    if status == 429:
        wait = {"429 date": formatdate(usegmt=True), "429 long": "500"}.get(kind or "", "0.2")
        fields.append(f"Retry-After: {wait}")
    length: int | None = len(content)
    if kind == "not json":
        content = b"<html>" + content[6:]
    if kind == "truncated":
        content = content[: len(content) // 2]
    if kind == "chunked":
        parts = [content[:7], content[7:100], content[100:]]
        content = b"".join(b"%x;x=y\r\n%s\r\n" % (len(part), part) for part in parts)
        content += b"0\r\nTrailer: x\r\n\r\n"
        fields.append("Transfer-Encoding: chunked")
    if kind == "gzip":
        content = gzip.compress(content)
        length = len(content)
        fields.append("Content-Encoding: gzip")
    if kind == "204":
        content = b""
    if kind not in ("chunked", "until closed", "204"):
        fields.append(f"Content-Length: {length}")
    start = f"HTTP/1.1 {before}\r\n\r\n" if before else ""
    return "\r\n".join([f"{start}HTTP/1.1 {status} X", *fields, "", ""]).encode() + content


class FakeServer:
    """Serves on 127.0.0.1, in a thread when used as a context manager. `requests`, `targets`,
    `kinds` and `times` describe all requests in the order of arrival.
    """

    def __init__(
        self, latency: float = 0.0, misbehave: Misbehave = lambda body, number: None
    ) -> None:
        self.latency, self.misbehave = latency, misbehave
        self.requests: list[Body] = []
        self.targets: list[str] = []  # of the request lines
        self.kinds: list[str | None] = []
        self.times: list[float] = []
        self.keys: set[str] = set()
        self.most_active = self.active = self.connections = 0
        self.url = ""

    async def serve(self, ready: Callable[[], object]) -> None:
        """Serve until cancelled; `ready` is called once `url` is set."""
        server = await asyncio.get_running_loop().create_server(
            lambda: Connection(self), "127.0.0.1", backlog=2048
        )
        self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
        ready()
        await server.serve_forever()

    def take(self, body: Body) -> str | None:
        """Record a request and return what goes wrong with it."""
        kind = self.misbehave(body, len(self.requests))
        self.requests.append(body)
        self.kinds.append(kind)
        self.times.append(time.monotonic())
        return kind

    def __enter__(self) -> FakeServer:
        started = threading.Event()
        self._loop = asyncio.new_event_loop()
        self._serving = self._loop.create_task(self.serve(started.set))
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        assert started.wait(10)
        return self

    def _run(self) -> None:
        try:
            self._loop.run_until_complete(self._serving)
        except asyncio.CancelledError:
            self._loop.close()

    def __exit__(self, *exception: object) -> None:
        self._loop.call_soon_threadsafe(self._serving.cancel)
        self._thread.join(10)


class Connection(asyncio.Protocol):
    """One connection: reads a request, waits for the latency, answers, and reads the next."""

    def __init__(self, server: FakeServer) -> None:
        self.server, self.buffer = server, b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        self.server.connections += 1

    def data_received(self, data: bytes) -> None:
        loop = asyncio.get_running_loop()
        arrived, self.buffer = loop.time(), self.buffer + data
        head, found, rest = self.buffer.partition(b"\r\n\r\n")
        fields = dict(
            line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:] if b": " in line
        )
        length = int(fields.get(b"content-length", 0))
        if not found or len(rest) < length:
            return
        self.buffer = rest[length:]
        self.server.keys.add(fields.get(b"authorization", b"").decode())
        self.server.targets.append(head.split()[1].decode())
        body = json.loads(rest[:length])
        kind = self.server.take(body)
        self.server.active += 1
        self.server.most_active = max(self.server.most_active, self.server.active)
        delay = STALL if kind == "stall" else self.server.latency
        # The time for making the response is part of the latency.
        loop.call_at(arrived + delay, self.answer, response(body, kind), kind)

    def answer(self, ready: bytes, kind: str | None) -> None:
        self.server.active -= 1
        if self.transport.is_closing():
            return
        if kind != "drop":
            self.transport.write(ready)
        if kind in ("drop", "truncated", "until closed"):
            self.transport.close()


def at_random(share: float, kinds: Sequence[str] = KINDS) -> Misbehave:
    """Misbehave for this share of the requests, with all kinds of faults alike."""
    draw = random.Random(0)
    return lambda body, number: draw.choice(kinds) if draw.random() < share else None


def main() -> None:
    """Serve until killed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--latency", type=float, default=0.0)
    server = FakeServer(parser.parse_args().latency)
    asyncio.run(server.serve(lambda: print(server.url, flush=True)))


if __name__ == "__main__":
    main()
