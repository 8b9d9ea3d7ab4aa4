"""A stand-in for OpenAI's Batch API on 127.0.0.1: files, batches and their answers, which are those
of fake_llm_server.py, in an order drawn by chance.

with BatchServer(misbehave=lambda body, number: "400" if number == 0 else None) as server: ...
serves in threads

Every request of a batch that is answered is counted in `paid`. A batch ends when it was asked about
`looks` times.
"""

from __future__ import annotations

import itertools
import json
import random
import re
import socket
import threading
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

from fake_llm_server import Body, completion


class BatchServer:
    """`misbehave` says of the n-th request what its answer is: a kind of text of fake_llm_server,
    an HTTP status, "unanswered" (expires), "lost" (no line).
    """

    def __init__(
        self, misbehave: Callable[[Body, int], str | None] = lambda body, number: None
    ) -> None:
        self.misbehave = misbehave
        self.looks, self.queue, self.end = 1, 10**9, "completed"
        self.files: dict[str, bytes] = {}
        self.batches: dict[str, dict[str, Any]] = {}
        # of all requests that were answered, in the order of their files
        self.bodies: list[Body] = []
        self.paid: Counter[str] = Counter()  # by custom_id
        self.calls: Counter[str] = Counter()
        # call -> what goes wrong with the next ones: "drop" or "hold" its answer, a status, "cut"
        self.faults: dict[str, list[str]] = {}
        # an answer is being held, until the client or the server ends
        self.held = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.http.server_address[1]}/v1"

    @property
    def uploads(self) -> list[list[dict[str, Any]]]:
        """The requests of every file."""
        return [
            [json.loads(line) for line in self.files[batch["input_file_id"]].splitlines()]
            for batch in self.batches.values()
        ]

    def __enter__(self) -> BatchServer:
        handler = type("Bound", (Handler,), {"world": self})
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.http.daemon_threads = True
        self.http.block_on_close = False
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.http.shutdown()
        self.http.server_close()

    def put(self, content: bytes) -> str:
        name = f"file-{len(self.files)}"
        self.files[name] = content
        return name

    def create(self, file: str) -> dict[str, Any]:
        number, name = len(self.files[file].splitlines()), f"batch_{len(self.batches)}"
        batch = {
            "id": name,
            "object": "batch",
            "endpoint": "/v1/chat/completions",
            "completion_window": "24h",
            "created_at": len(self.batches),
            "looks": 0,
            "input_file_id": file,
            "status": "in_progress",
            "request_counts": {"total": number, "completed": 0, "failed": 0},
        }
        waiting = sum(
            other["request_counts"]["total"]
            for other in self.batches.values()
            if other["status"] == "in_progress"
        )
        if waiting + number > self.queue:
            batch |= {
                "status": "failed",
                "errors": {
                    "data": [
                        {"code": "token_limit_exceeded", "message": "Enqueued token limit reached"}
                    ]
                },
            }
        self.batches[name] = batch
        return batch

    def look(self, name: str) -> dict[str, Any]:
        batch = self.batches[name]
        batch["looks"] += 1
        if batch["status"] == "in_progress" and batch["looks"] >= self.looks:
            self.finish(batch)
        return batch

    def finish(self, batch: dict[str, Any]) -> None:
        """Answer the requests of a batch."""
        good, bad = [], []
        for request in map(json.loads, self.files[batch["input_file_id"]].splitlines()):
            kind = self.misbehave(request["body"], len(self.bodies))
            row: dict[str, Any] = {
                "id": "batch_req",
                "custom_id": request["custom_id"],
                "response": None,
                "error": None,
            }
            self.bodies.append(request["body"])
            if kind == "unanswered":
                bad.append(
                    row | {"error": {"code": "batch_expired", "message": "not executed in time"}}
                )
            elif kind and kind.isdigit():
                bad.append(
                    row
                    | {
                        "response": {
                            "status_code": int(kind),
                            "request_id": "1",
                            "body": {"error": {"message": f"made-up {kind}"}},
                        }
                    }
                )
            else:
                self.paid[request["custom_id"]] += 1
                body = json.loads(completion(request["body"], kind))
                good.append(
                    row | {"response": {"status_code": 200, "request_id": "1", "body": body}}
                )
                if kind == "lost":
                    good.pop()
        batch["request_counts"] |= {"completed": len(good), "failed": len(bad)}
        for rows, name in ((good, "output_file_id"), (bad, "error_file_id")):
            random.Random(1).shuffle(rows)
            if rows:
                batch[name] = self.put("\n".join(map(json.dumps, rows)).encode())
        batch["status"] = self.end


class Handler(BaseHTTPRequestHandler):
    """The calls of the API."""

    world: BatchServer
    # one write an answer: two would wait for each other
    protocol_version, wbufsize = "HTTP/1.1", 65_536
    lock = threading.Lock()

    def do_GET(self) -> None:
        path, query = (
            urlsplit(self.path).path.removeprefix("/v1/"),
            parse_qs(urlsplit(self.path).query),
        )
        if path == "batches":
            self.answer(
                "list", lambda: self.listed(int(query["limit"][0]), query.get("after", [""])[0])
            )
        elif path.startswith("batches/"):
            self.answer("retrieve", lambda: self.world.look(path.split("/")[1]))
        else:
            self.answer("content", lambda: self.world.files[path.split("/")[1]])

    def do_POST(self) -> None:
        body = (
            self.rfile.read(int(self.headers["Content-Length"]))
            if "Content-Length" in self.headers
            else self.chunks()
        )
        if self.path.endswith("files"):
            content = re.search(rb'filename="requests.jsonl"\r\n.*?\r\n\r\n(.*)\r\n--', body, re.S)
            assert content
            self.answer(
                "upload",
                lambda: {
                    "id": self.world.put(content[1]),
                    "object": "file",
                    "bytes": 1,
                    "created_at": 1,
                    "filename": "f",
                    "purpose": "batch",
                },
            )
        else:
            self.answer("create", lambda: self.world.create(json.loads(body)["input_file_id"]))

    def chunks(self) -> bytes:
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size + 2)[:-2]
        self.rfile.readline()
        return body

    def listed(self, limit: int, after: str) -> dict[str, Any]:
        """Newest first, in pages of two at most."""
        rest = list(reversed(self.world.batches.values()))
        rest = (
            list(itertools.dropwhile(lambda batch: batch["id"] != after, rest))[1:]
            if after
            else rest
        )
        page = rest[: min(limit, 2)]
        return {
            "object": "list",
            "data": page,
            "has_more": len(page) < len(rest),
            "first_id": None,
            "last_id": page[-1]["id"] if page else None,
        }

    def answer(self, call: str, work: Callable[[], Any]) -> None:
        with self.lock:
            self.world.calls[call] += 1
            fault = self.world.faults[call].pop(0) if self.world.faults.get(call) else ""
            result = {"error": {"message": f"made-up {fault}"}} if fault.isdigit() else work()
        if fault == "hold":
            self.world.held.set()
            self.rfile.read(1)  # until the client is gone
        if fault in ("hold", "drop"):
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        content = result if isinstance(result, bytes) else json.dumps(result).encode()
        self.send_response(int(fault) if fault.isdigit() else 200)
        self.send_header(
            "Content-Type",
            "application/octet-stream" if isinstance(result, bytes) else "application/json",
        )
        if fault == "cut":  # no length: the client cannot see that something is missing
            content, self.close_connection = content[: len(content) // 2], True
            self.send_header("Connection", "close")
        else:
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *words: Any) -> None:
        pass
