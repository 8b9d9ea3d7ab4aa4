"""A stand-in for the Hugging Face Hub: as much of its API as huggingface_hub asks for to create a
model repository, commit to it and download it.

with HubStub(token="hf_x") as hub: run_script(..., HF_ENDPOINT=hub.url, HF_HUB_OFFLINE="0",
HF_HUB_DISABLE_XET="1", HF_HOME=an empty folder)

Files of more than LFS_FROM bytes go the way of git-lfs. Requests are noted in `hub.asked`. With
`hub.refuse` it answers what has this in its path with an HTTP status and, as no server should,
repeats the token it was sent. Public repositories are read without a token; all else needs it.
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
    """A repository: its files, the id of its last commit, and the paths that each commit changed."""

    hub: HubStub
    private: bool
    sha: str = "0" * 40
    files: dict[str, bytes] = field(default_factory=dict)
    commits: list[list[str]] = field(default_factory=list)


def git_hash(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class HubStub(ThreadingHTTPServer):
    """The server, in a thread, until the `with` block ends."""

    def __init__(self, token: str) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.token, self.url, self.refuse = (
            token,
            f"http://127.0.0.1:{self.server_address[1]}",
            ("no such path", 0),
        )
        self.repos, self.stored, self.asked = dict[str, Repo](), dict[str, bytes](), list[str]()
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    def __exit__(self, *exception: object) -> None:
        self.shutdown()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    """One connection. `on_X(repo, words of the path, body)` answers what is asked of a repository."""

    def log_message(self, *_: Any) -> None:
        pass

    def answer(self, status: int, body: Any = None, **headers: str) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(content))} | headers).items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(b"" if self.command == "HEAD" else content)

    def handle_any(self) -> None:
        path, hub, sent = (
            unquote(urlsplit(self.path).path),
            cast(HubStub, self.server),
            self.headers.get("Authorization", ""),
        )
        content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        hub.asked.append(f"{self.command} {path}")
        words = path.removeprefix("/api/models").strip("/").split("/")
        repo = hub.repos.get("/".join(words[:2]).removesuffix(".git"))
        if hub.refuse[0] in path:
            self.answer(
                hub.refuse[1], {"error": f"refused {sent}"}, X_Error_Message=f"refused {sent}"
            )
        elif words[0] == "lfs":
            hub.stored[words[1]] = content
            self.answer(200 if hashlib.sha256(content).hexdigest() == words[1] else 400)
        elif sent != f"Bearer {hub.token}" and (
            repo is None or repo.private or self.command == "POST"
        ):
            self.answer(401, {"error": "Invalid username or password."})
        elif path in ("/api/repos/create", "/api/validate-yaml"):
            self.answer(
                *self.create(hub, json.loads(content)) if path.endswith("create") else (200, {})
            )
        elif repo is None:
            self.answer(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
        else:
            getattr(self, f"on_{words[2] if len(words) > 2 else 'revision'}")(repo, words, content)

    do_GET = do_HEAD = do_POST = do_PUT = handle_any

    def create(self, hub: HubStub, wanted: dict[str, Any]) -> tuple[int, dict[str, str]]:
        name = f"{wanted['organization']}/{wanted['name']}"
        old = (
            hub.repos.setdefault(name, new := Repo(hub, wanted.get("visibility") == "private"))
            is not new
        )
        return 409 if old else 200, {"url": f"{hub.url}/{name}"}

    def on_revision(self, repo: Repo, words: list[str], _: bytes) -> None:
        self.answer(
            200,
            {
                "id": "/".join(words[:2]),
                "sha": repo.sha,
                "private": repo.private,
                "siblings": [{"rfilename": name} for name in repo.files],
            },
        )

    def on_preupload(self, repo: Repo, _: list[str], content: bytes) -> None:
        found = [
            one
            | {"uploadMode": "lfs" if one["size"] > LFS_FROM else "regular", "shouldIgnore": False}
            for one in json.loads(content)["files"]
        ]
        for one in found:
            if (there := repo.files.get(one["path"])) is not None:
                one["oid"] = (
                    hashlib.sha256(there).hexdigest()
                    if one["uploadMode"] == "lfs"
                    else git_hash(there)
                )
        self.answer(200, {"files": found})

    def on_info(self, repo: Repo, _: list[str], content: bytes) -> None:
        wanted = [
            one for one in json.loads(content)["objects"] if one["oid"] not in repo.hub.stored
        ]
        self.answer(
            200,
            {
                "objects": [
                    one | {"actions": {"upload": {"href": f"{repo.hub.url}/lfs/{one['oid']}"}}}
                    for one in wanted
                ]
            },
        )

    def on_commit(self, repo: Repo, words: list[str], content: bytes) -> None:
        rows = [
            (row["key"], row["value"])
            for row in map(json.loads, content.splitlines())
            if row["key"] != "header"
        ]
        new = {
            one["path"]: (
                base64.b64decode(one["content"]) if kind == "file" else repo.hub.stored[one["oid"]]
            )
            for kind, one in rows
        }
        repo.sha, repo.files, repo.commits = (
            git_hash(content),
            repo.files | new,
            [*repo.commits, sorted(new)],
        )
        self.answer(
            200,
            {
                "commitUrl": f"{repo.hub.url}/{words[0]}/{words[1]}/commit/{repo.sha}",
                "commitOid": repo.sha,
            },
        )

    def on_tree(self, repo: Repo, *_: object) -> None:
        self.answer(
            200,
            [
                {"type": "file", "path": name, "size": len(text), "oid": git_hash(text)}
                for name, text in repo.files.items()
            ],
        )

    def on_resolve(self, repo: Repo, words: list[str], _: bytes) -> None:
        content = repo.files.get("/".join(words[4:]))
        told = (
            {"X_Error_Code": "EntryNotFound"}
            if content is None
            else {"ETag": f'"{git_hash(content)}"'}
        )
        self.answer(404 if content is None else 200, content, X_Repo_Commit=repo.sha, **told)
