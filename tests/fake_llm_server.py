"""A stand-in for a language-model server: answers /v1/chat/completions with made-up sentences, at a
given latency, and misbehaves on demand.

python tests/fake_llm_server.py [--latency SECONDS] [--faults SHARE] [--log FILE]     prints its
base URL, serves until killed with FakeServer(latency=0.01, misbehave=lambda body, number: "500" if
number == 0 else None) as server: ...     serves in a thread

Equal requests get equal answers; requests that differ in any message or in the seed get different
ones.
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
from pathlib import Path
from typing import Any

Body = dict[str, Any]
STALL = 30.0  # seconds

# 256 made-up words of five to seven letters: no text of theirs is a refusal or speaks of a study.
SYLLABLES = (
    "ba",
    "ke",
    "li",
    "mo",
    "nu",
    "ra",
    "se",
    "ti",
    "vo",
    "zu",
    "dal",
    "fen",
    "gor",
    "hip",
    "jul",
    "pex",
)
WORDS = [SYLLABLES[i // 16] + "n" + SYLLABLES[i % 16] for i in range(256)]

# What may go wrong: on the wire ...
WIRE = ("429", "429 date", "500", "drop", "truncated", "not json", "no choices", "stall")
# ... nothing is wrong with these: other ways to send a body ...
FORMS = ("chunked", "until closed", "gzip")
# ... and in the text of an answer.
TEXTS = {
    "empty": "",
    "refusal": "I'm sorry, but as an AI language model I cannot summarise this text for you today.",
    "study": (
        "This study shows that the authors measured several things about their subject with care."
    ),
}
KINDS = (*WIRE, *TEXTS, "cut", "preamble")


def sentence(body: Body, number: int = 0) -> str:
    """Sixteen words drawn by a hash of the request: the made-up answer."""
    what = json.dumps([body["messages"], body.get("seed"), number]).encode()
    return (
        " ".join(
            WORDS[byte] for byte in hashlib.blake2b(what, digest_size=16).digest()
        ).capitalize()
        + "."
    )


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
    return json.dumps(
        {
            "id": "1",
            "object": "chat.completion",
            "created": 1,
            "model": body["model"],
            "choices": [choice],
            "usage": usage,
        }
    ).encode()


def response(body: Body, kind: str | None) -> bytes:
    """All bytes of an HTTP response."""
    status, extra, content = 200, "", b""
    if kind == "no choices":
        content = b'{"choices": []}'
    elif kind is not None and kind[:3].isdigit():
        status, content = (
            int(kind[:3]),
            json.dumps({"error": {"message": f"made-up {kind}"}}).encode(),
        )
        if status == 429:
            extra = f"Retry-After: {formatdate(usegmt=True) if kind == '429 date' else '0.2'}\r\n"
    else:
        content = completion(body, kind)
    length = len(content)
    if kind == "not json":
        content = b"<html>" + content[6:]
    if kind == "truncated":
        content = content[: length // 2]
    size = f"Content-Length: {length}\r\n"
    if kind == "chunked":
        size = "Transfer-Encoding: chunked\r\n"
        parts = [content[:7], content[7:100], content[100:]]
        content = (
            b"".join(b"%x;x=y\r\n%s\r\n" % (len(part), part) for part in parts)
            + b"0\r\nTrailer: x\r\n\r\n"
        )
    if kind == "until closed":
        size = ""
    if kind == "gzip":
        content = gzip.compress(content)
        size = f"Content-Encoding: gzip\r\nContent-Length: {len(content)}\r\n"
    return (
        f"HTTP/1.1 {status} X\r\nContent-Type: application/json\r\n{size}{extra}\r\n".encode()
        + content
    )


class FakeServer:
    """Serves on 127.0.0.1, in a thread of its own when used as a context manager. `requests`,
    `kinds` and `times` hold every request in order of arrival.
    """

    def __init__(
        self,
        latency: float = 0.0,
        misbehave: Callable[[Body, int], str | None] = lambda body, number: None,
        log: Path | None = None,
    ) -> None:
        self.latency, self.misbehave = latency, misbehave
        self.requests: list[Body] = []
        self.kinds: list[str | None] = []
        self.times: list[float] = []
        self.keys: set[str] = set()
        self.most_active = self.active = self.connections = 0
        self.url = ""
        self._log = log.open("a", encoding="utf-8") if log else None

    async def serve(self, ready: Callable[[], object]) -> None:
        """Serve until cancelled; `ready` is called once `url` is set."""
        server = await asyncio.get_running_loop().create_server(
            lambda: Connection(self), "127.0.0.1", backlog=2048
        )
        self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
        ready()
        await server.serve_forever()

    def take(self, body: Body) -> str | None:
        """Note one request and say what goes wrong with it."""
        kind = self.misbehave(body, len(self.requests))
        self.requests.append(body)
        self.kinds.append(kind)
        self.times.append(time.monotonic())
        if self._log:
            self._log.write(
                json.dumps({"text": body["messages"][-1]["content"], "kind": kind}) + "\n"
            )
            self._log.flush()
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
    """One connection of a client: reads a request, waits for the latency, answers, reads the next."""

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
        body = json.loads(rest[:length])
        kind = self.server.take(body)
        self.server.active += 1
        self.server.most_active = max(self.server.most_active, self.server.active)
        delay = STALL if kind == "stall" else self.server.latency
        # made ready at once: making it is part of the latency
        loop.call_at(arrived + delay, self.answer, response(body, kind), kind)

    def answer(self, ready: bytes, kind: str | None) -> None:
        self.server.active -= 1
        if self.transport.is_closing():
            return
        if kind != "drop":
            self.transport.write(ready)
        if kind in ("drop", "truncated", "until closed"):
            self.transport.close()


def at_random(
    share: float, kinds: Sequence[str] = KINDS, seed: int = 0
) -> Callable[[Body, int], str | None]:
    """Misbehaviour that meets this share of the requests, all kinds alike."""
    draw = random.Random(seed)
    return lambda body, number: draw.choice(kinds) if draw.random() < share else None


def main() -> None:
    """Serve until killed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--latency", type=float, default=0.0)
    parser.add_argument("--faults", type=float, default=0.0)
    parser.add_argument("--log", type=Path)
    words = parser.parse_args()
    server = FakeServer(words.latency, at_random(words.faults), words.log)
    asyncio.run(server.serve(lambda: print(server.url, flush=True)))


if __name__ == "__main__":
    main()
