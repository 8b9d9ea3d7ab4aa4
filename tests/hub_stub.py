"""A local server that answers like the Hugging Face Hub when huggingface_hub creates a model
repository and commits to it.

    with HubStub(token="hf_x") as hub:
        run_script(..., HF_ENDPOINT=hub.url, HF_HUB_OFFLINE="0", HF_HUB_DISABLE_XET="1")

Files of more than LFS_FROM bytes are uploaded as with git-lfs. `hub.asked` lists the requests. If
`hub.refuse` is (part of a path, status), such paths are answered with this HTTP status and with
the token that was sent, which no server should do.
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
    """A repository: its files, the id of its last commit, and the paths of each commit."""

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
        self.token, self.url = token, f"http://127.0.0.1:{self.server_address[1]}"
        self.refuse = ("no such path", 0)
        self.repos, self.stored, self.asked = dict[str, Repo](), dict[str, bytes](), list[str]()
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    def __exit__(self, *exception: object) -> None:
        self.shutdown()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    """One connection. `on_X(repo, parts of the path, body)` answers requests about a repository."""

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
        path, hub = unquote(urlsplit(self.path).path), cast(HubStub, self.server)
        sent = self.headers.get("Authorization", "")
        content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        hub.asked.append(f"{self.command} {path}")
        parts = path.removeprefix("/api/models").strip("/").split("/")
        repo = hub.repos.get("/".join(parts[:2]).removesuffix(".git"))
        needs_token = repo is None or repo.private or self.command == "POST"
        if hub.refuse[0] in path:
            refusal = f"refused {sent}"
            self.answer(hub.refuse[1], {"error": refusal}, X_Error_Message=refusal)
        elif parts[0] == "lfs":
            hub.stored[parts[1]] = content
            self.answer(200 if hashlib.sha256(content).hexdigest() == parts[1] else 400)
        elif sent != f"Bearer {hub.token}" and needs_token:
            self.answer(401, {"error": "Invalid username or password."})
        elif path == "/api/repos/create":
            self.create(hub, json.loads(content))
        elif path == "/api/validate-yaml":
            self.answer(200, {})
        elif repo is None:
            self.answer(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
        else:
            getattr(self, f"on_{parts[2] if len(parts) > 2 else 'revision'}")(repo, parts, content)

    do_GET = do_POST = do_PUT = handle_any

    def create(self, hub: HubStub, asked: dict[str, Any]) -> None:
        name = f"{asked['organization']}/{asked['name']}"
        existed = name in hub.repos
        if not existed:
            hub.repos[name] = Repo(hub, asked.get("visibility") == "private")
        self.answer(409 if existed else 200, {"url": f"{hub.url}/{name}"})

    def on_revision(self, repo: Repo, parts: list[str], _: bytes) -> None:
        siblings = [{"rfilename": name} for name in repo.files]
        about = {"id": "/".join(parts[:2]), "sha": repo.sha, "private": repo.private}
        self.answer(200, about | {"siblings": siblings})

    def on_preupload(self, repo: Repo, _: list[str], content: bytes) -> None:
        answers = []
        for one in json.loads(content)["files"]:
            mode, old = "lfs" if one["size"] > LFS_FROM else "regular", repo.files.get(one["path"])
            if old is not None:
                one["oid"] = hashlib.sha256(old).hexdigest() if mode == "lfs" else git_hash(old)
            answers.append(one | {"uploadMode": mode, "shouldIgnore": False})
        self.answer(200, {"files": answers})

    def on_info(self, repo: Repo, _: list[str], content: bytes) -> None:
        objects = [
            one | {"actions": {"upload": {"href": f"{repo.hub.url}/lfs/{one['oid']}"}}}
            for one in json.loads(content)["objects"]
            if one["oid"] not in repo.hub.stored
        ]
        self.answer(200, {"objects": objects})

    def on_commit(self, repo: Repo, parts: list[str], content: bytes) -> None:
        new = {}
        for row in map(json.loads, content.splitlines()):
            value = row["value"]
            if row["key"] == "file":
                new[value["path"]] = base64.b64decode(value["content"])
            elif row["key"] != "header":
                new[value["path"]] = repo.hub.stored[value["oid"]]
        repo.sha, repo.files = git_hash(content), repo.files | new
        repo.commits.append(sorted(new))
        url = f"{repo.hub.url}/{parts[0]}/{parts[1]}/commit/{repo.sha}"
        self.answer(200, {"commitUrl": url, "commitOid": repo.sha})
