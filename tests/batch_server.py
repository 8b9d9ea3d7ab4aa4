"""OpenAI's Batch API for tests, on 127.0.0.1: files, batches and their answers, which are those of
fake_llm_server.py, in random order.

BatchServer(misbehave=lambda body, number: "400" if number == 0 else None) serves in threads, as a
context manager. `paid` counts every answered request. A batch ends after `looks` retrievals.
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

from fake_llm_server import Body, Misbehave, completion

QUEUE_FULL = {"code": "token_limit_exceeded", "message": "Enqueued token limit reached"}


class BatchServer:
    """`misbehave` decides the answer of the n-th request: a fault in the text, as in
    fake_llm_server.py, an HTTP status, "unanswered" (expired), or "lost" (no line).
    """

    def __init__(self, misbehave: Misbehave = lambda body, number: None) -> None:
        self.misbehave = misbehave
        self.looks, self.queue, self.end = 1, 10**9, "completed"
        self.files: dict[str, bytes] = {}
        self.batches: dict[str, dict[str, Any]] = {}
        self.bodies: list[Body] = []  # of all requests, in the order of their files
        self.paid: Counter[str] = Counter()  # by custom_id
        self.calls: Counter[str] = Counter()
        # call -> what goes wrong with the next ones: "drop" or "hold" the response, a status, "cut"
        self.faults: dict[str, list[str]] = {}
        self.held = threading.Event()  # a response is held back until the client is gone

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.http.server_address[1]}/v1"

    @property
    def uploads(self) -> list[int]:
        """The number of requests of each batch."""
        files = [self.files[batch["input_file_id"]] for batch in self.batches.values()]
        return [len(file.splitlines()) for file in files]

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
        running = [one for one in self.batches.values() if one["status"] == "in_progress"]
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
        if sum(one["request_counts"]["total"] for one in running) + number > self.queue:
            batch |= {"status": "failed", "errors": {"data": [QUEUE_FULL]}}
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
        good, bad = list[dict[str, Any]](), list[dict[str, Any]]()
        for request in map(json.loads, self.files[batch["input_file_id"]].splitlines()):
            name, body = request["custom_id"], request["body"]
            kind = self.misbehave(body, len(self.bodies))
            row: dict[str, Any] = {"custom_id": name, "response": None, "error": None}
            self.bodies.append(body)
            if kind == "unanswered":
                bad.append(row | {"error": {"code": "batch_expired", "message": "too late"}})
            elif kind and kind.isdigit():
                error = {"error": {"message": f"made-up {kind}"}}
                bad.append(row | {"response": {"status_code": int(kind), "body": error}})
            else:
                self.paid[name] += 1
                answer = {"status_code": 200, "body": json.loads(completion(body, kind))}
                good += [row | {"response": answer}] if kind != "lost" else []
        batch["request_counts"] |= {"completed": len(good), "failed": len(bad)}
        for rows, file in ((good, "output_file_id"), (bad, "error_file_id")):
            random.Random(1).shuffle(rows)
            if rows:
                batch[file] = self.put("\n".join(map(json.dumps, rows)).encode())
        batch["status"] = self.end


class Handler(BaseHTTPRequestHandler):
    """The calls of the API."""

    world: BatchServer
    # One write for each response: two would wait for each other.
    protocol_version, wbufsize = "HTTP/1.1", 65_536
    lock = threading.Lock()

    def do_GET(self) -> None:
        parts = urlsplit(self.path)
        path, query = parts.path.removeprefix("/v1/"), parse_qs(parts.query)
        if path == "batches":
            limit, after = int(query["limit"][0]), query.get("after", [""])[0]
            self.answer("list", lambda: self.listed(limit, after))
        elif path.startswith("batches/"):
            self.answer("retrieve", lambda: self.world.look(path.split("/")[1]))
        else:
            self.answer("content", lambda: self.world.files[path.split("/")[1]])

    def do_POST(self) -> None:
        if "Content-Length" in self.headers:
            body = self.rfile.read(int(self.headers["Content-Length"]))
        else:
            body = self.chunks()
        if self.path.endswith("files"):
            found = re.search(rb'filename="requests.jsonl"\r\n.*?\r\n\r\n(.*)\r\n--', body, re.S)
            assert found
            content = found[1]
            file = {"object": "file", "bytes": 1, "created_at": 1, "filename": "f"}
            file["purpose"] = "batch"
            self.answer("upload", lambda: file | {"id": self.world.put(content)})
        else:
            self.answer("create", lambda: self.world.create(json.loads(body)["input_file_id"]))

    def chunks(self) -> bytes:
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size + 2)[:-2]
        self.rfile.readline()
        return body

    def listed(self, limit: int, after: str) -> dict[str, Any]:
        """Newest first, in pages of at most two."""
        rest = list(reversed(self.world.batches.values()))
        if after:
            rest = list(itertools.dropwhile(lambda batch: batch["id"] != after, rest))[1:]
        page = rest[: min(limit, 2)]
        last = page[-1]["id"] if page else None
        more = len(page) < len(rest)
        return {"object": "list", "data": page, "has_more": more, "last_id": last}

    def answer(self, call: str, work: Callable[[], Any]) -> None:
        with self.lock:
            self.world.calls[call] += 1
            fault = self.world.faults[call].pop(0) if self.world.faults.get(call) else ""
            error = {"error": {"message": f"made-up {fault}"}}
            result: Any = error if fault.isdigit() else work()
        if fault == "hold":
            self.world.held.set()
            self.rfile.read(1)  # until the client is gone
        if fault in ("hold", "drop"):
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        is_file = isinstance(result, bytes)
        content: bytes = result if is_file else json.dumps(result).encode()
        self.send_response(int(fault) if fault.isdigit() else 200)
        kind = "octet-stream" if is_file else "json"
        self.send_header("Content-Type", f"application/{kind}")
        if fault == "cut":  # no length: the client cannot see that something is missing
            content, self.close_connection = content[: len(content) // 2], True
            self.send_header("Connection", "close")
        else:
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *words: Any) -> None:
        pass
