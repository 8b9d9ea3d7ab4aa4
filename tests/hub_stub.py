"""A local server that answers like the Hugging Face Hub when huggingface_hub creates a model
repository and commits to it.

    with HubStub(token="hf_x") as hub:
        run_script(..., HF_ENDPOINT=hub.url, HF_HUB_OFFLINE="0", HF_HUB_DISABLE_XET="1")

Files of more than LFS_FROM bytes are uploaded with git-lfs. `hub.asked` lists the requests. If
`hub.refuse` is (part of a path, status), requests with this part in their path get this status,
and the answer repeats the token, as no server should.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, cast
from urllib.parse import unquote, urlsplit

LFS_FROM = 20_000


@dataclass
class Repo:
    """A repository: its files, the id of its last commit, and the paths that each commit wrote."""

    hub: HubStub
    private: bool
    sha: str = "0" * 40
    files: dict[str, bytes] = field(default_factory=dict)
    commits: list[list[str]] = field(default_factory=list)


def git_hash(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class HubStub(ThreadingHTTPServer):
    """The server, which runs in a thread until the `with` block ends."""

    def __init__(self, token: str) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.token = token
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.refuse = ("no such path", 0)
        self.repos: dict[str, Repo] = {}
        self.stored: dict[str, bytes] = {}  # SHA-256 -> a file of git-lfs
        self.asked: list[str] = []
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    def __exit__(self, *exception: object) -> None:
        self.shutdown()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    """One connection. `on_X(repo, words of the path, body)` answers requests for a repository."""

    def log_message(self, *_: Any) -> None:
        pass

    def answer(self, status: int, body: Any = None, **headers: str) -> None:
        content = json.dumps(body).encode()
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(content))} | headers).items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(content)

    def handle_any(self) -> None:
        hub = cast(HubStub, self.server)
        path = unquote(urlsplit(self.path).path)
        sent = self.headers.get("Authorization", "")
        content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        hub.asked.append(f"{self.command} {path}")
        words = path.removeprefix("/api/models").strip("/").split("/")
        repo = hub.repos.get("/".join(words[:2]).removesuffix(".git"))
        if hub.refuse[0] in path:
            message = f"refused {sent}"
            self.answer(hub.refuse[1], {"error": message}, X_Error_Message=message)
        elif words[0] == "lfs":
            hub.stored[words[1]] = content
            self.answer(200 if hashlib.sha256(content).hexdigest() == words[1] else 400)
        elif sent != f"Bearer {hub.token}":
            self.answer(401, {"error": "Invalid username or password."})
        elif path == "/api/repos/create":
            self.on_create(hub, json.loads(content))
        elif path == "/api/validate-yaml":
            self.answer(200, {})
        elif repo is None:
            self.answer(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
        else:
            getattr(self, f"on_{words[2] if len(words) > 2 else 'revision'}")(repo, words, content)

    do_GET = do_POST = do_PUT = handle_any

    def on_create(self, hub: HubStub, asked: dict[str, Any]) -> None:
        name = f"{asked['organization']}/{asked['name']}"
        status = 409 if name in hub.repos else 200
        hub.repos.setdefault(name, Repo(hub, asked.get("visibility") == "private"))
        self.answer(status, {"url": f"{hub.url}/{name}"})

    def on_revision(self, repo: Repo, words: list[str], _: bytes) -> None:
        self.answer(200, {"id": "/".join(words[:2]), "sha": repo.sha, "private": repo.private})

    def on_preupload(self, repo: Repo, _: list[str], content: bytes) -> None:
        found = []
        for one in json.loads(content)["files"]:
            large, old = one["size"] > LFS_FROM, repo.files.get(one["path"])
            mode = {"uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
            if old is not None:
                mode["oid"] = hashlib.sha256(old).hexdigest() if large else git_hash(old)
            found.append(one | mode)
        self.answer(200, {"files": found})

    def on_info(self, repo: Repo, _: list[str], content: bytes) -> None:
        objects = [
            one | {"actions": {"upload": {"href": f"{repo.hub.url}/lfs/{one['oid']}"}}}
            for one in json.loads(content)["objects"]
            if one["oid"] not in repo.hub.stored
        ]
        self.answer(200, {"objects": objects})

    def on_commit(self, repo: Repo, words: list[str], content: bytes) -> None:
        new = {}
        for row in map(json.loads, content.splitlines()):
            value = row["value"]
            if row["key"] == "file":
                new[value["path"]] = base64.b64decode(value["content"])
            elif row["key"] == "lfsFile":
                new[value["path"]] = repo.hub.stored[value["oid"]]
        repo.sha = git_hash(content)
        repo.files |= new
        repo.commits.append(sorted(new))
        address = f"{repo.hub.url}/{words[0]}/{words[1]}/commit/{repo.sha}"
        self.answer(200, {"commitUrl": address, "commitOid": repo.sha})
