"""A small Hugging Face Hub on loopback: what the real client calls to create, commit, list and resolve."""

import base64
import hashlib
import http.server
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote

WRITER, READER = "hf_writer_of_the_tests", "hf_reader_of_the_tests"


@dataclass
class Repo:
    private: bool = False
    commits: list[dict[str, bytes]] = field(default_factory=lambda: [{}])  # the whole tree at each
    branches: dict[str, int] = field(default_factory=lambda: {"main": 0})  # which commit is its head
    seed: str = ""

    def sha(self, commit: int) -> str:
        return hashlib.sha1(f"{self.seed}{commit}".encode()).hexdigest()

    def find(self, revision: str) -> int | None:
        if revision in self.branches:
            return self.branches[revision]
        return next((i for i in range(len(self.commits)) if self.sha(i) == revision), None)


class Hub:
    """`faults` are taken in order: (part of `METHOD path`, an HTTP status or "cut"), each once."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.blobs: dict[str, bytes] = {}
        self.faults: list[tuple[str, int | str]] = []
        self.requests: list[str] = []

    def add(self, name: str, folder: Path, private: bool = False, seed: str | None = None) -> None:
        """A repository with the files of a folder. Those of equal seed share their commits, like copies."""
        tree = {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
        self.repos[name] = Repo(private, [tree], seed=name if seed is None else seed)

    @contextmanager
    def serve(self) -> Iterator[str]:
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Handler,), {"hub": self}))
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            server.server_close()
            thread.join()


class Handler(http.server.BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(self.path.partition("?")[0])
        request = f"{self.command} {path}"
        self.hub.requests.append(request)
        fault = next((fault for fault in self.hub.faults if fault[0] in request), None)
        if fault:
            self.hub.faults.remove(fault)
        self.cut = bool(fault) and fault[1] == "cut"
        if fault and not self.cut:
            return self._send(int(fault[1]), {"error": "an injected fault"})
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token and token not in (WRITER, READER):
            return self._send(401, {"error": "Invalid credentials"})
        for pattern, handle, writes in ROUTES:
            if match := re.fullmatch(pattern, request):
                if writes and token != WRITER:
                    return self._send(403 if token else 401, {"error": "no permission to write"})
                repo = self.hub.repos.get(match["repo"]) if "repo" in match.groupdict() else None
                if "repo" in match.groupdict() and (repo is None or (repo.private and not token)):
                    return self._send(404 if token else 401, {"error": "?"}, {"X-Error-Code": "RepoNotFound"})
                return handle(self, body, repo, **{k: v for k, v in match.groupdict().items() if k != "repo"})
        self._send(404, {"error": f"no such endpoint: {request}"})

    do_HEAD = do_GET = do_POST = do_PUT = answer

    def _send(self, status: int, content: Any = b"", headers: dict[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[: len(data) // 2] if self.cut else data)
            if self.cut:
                self.close_connection = True

    def _at(self, path: str, host: str = "127.0.0.1") -> str:
        """The client follows redirects to its own host without looking; large files are on another, as on the Hub."""
        return f"http://{host}:{self.server.server_address[1]}/{path}"

    def alive(self, *_: Any) -> None:
        self._send(200)

    def create(self, body: bytes, _: None) -> None:
        asked = json.loads(body)
        name = f"{asked['organization']}/{asked['name']}"
        url = {"url": self._at(name)}
        if name in self.hub.repos:
            return self._send(409, url)
        self.hub.repos[name] = Repo(asked.get("visibility") == "private", seed=name)
        self._send(200, url)

    def validate(self, body: bytes, _: None) -> None:
        good = json.loads(body)["content"].startswith("---\n")
        self._send(200 if good else 400, {"errors": [] if good else [{"message": "no metadata"}], "warnings": []})

    def info(self, _: bytes, repo: Repo, revision: str = "main") -> None:
        if (at := repo.find(revision)) is None:
            return self._send(404, {}, {"X-Error-Code": "RevisionNotFound"})
        siblings = [{"rfilename": name, "size": len(content)} for name, content in repo.commits[at].items()]
        self._send(200, {"id": "?", "sha": repo.sha(at), "siblings": siblings, "private": repo.private, "tags": []})

    def tree(self, _: bytes, repo: Repo, revision: str) -> None:
        files = repo.commits[repo.find(revision) or 0].items()
        self._send(200, [{"type": "file", "path": k, "size": len(v), "oid": sha(v)} for k, v in files])

    def branch(self, _: bytes, repo: Repo, branch: str) -> None:
        if branch in repo.branches:
            return self._send(409, {"error": "exists"})
        repo.branches[branch] = repo.branches["main"]
        self._send(200, {})

    def preupload(self, body: bytes, repo: Repo, revision: str) -> None:
        if repo.find(revision) is None:
            return self._send(404, {}, {"X-Error-Code": "RevisionNotFound"})
        paths = [file["path"] for file in json.loads(body)["files"]]
        modes = {path: "lfs" if path.endswith(".safetensors") else "regular" for path in paths}
        self._send(200, {"files": [{"path": k, "uploadMode": v, "shouldIgnore": False} for k, v in modes.items()]})

    def batch(self, body: bytes, _: Repo) -> None:
        wanted = json.loads(body)["objects"]
        objects = [{**o, "actions": {"upload": {"href": self._at(f"blobs/{o['oid']}")}}} for o in wanted]
        self._send(200, {"transfer": "basic", "objects": objects})

    def store(self, body: bytes, _: None, oid: str) -> None:
        assert sha(body) == oid
        self.hub.blobs[oid] = body
        self._send(200)

    def commit(self, body: bytes, repo: Repo, revision: str) -> None:
        tree = dict(repo.commits[repo.branches[revision]])
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                tree[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                tree[value["path"]] = self.hub.blobs[value["oid"]]
        pull = "create_pr=1" in self.path
        repo.commits.append(tree)
        repo.branches["refs/pr/1" if pull else revision] = len(repo.commits) - 1
        oid = repo.sha(len(repo.commits) - 1)
        name = "/".join(self.path.split("/")[3:5])
        pr_url = self._at(f"{name}/discussions/1") if pull else None
        self._send(200, {"commitUrl": self._at(f"{name}/commit/{oid}"), "commitOid": oid, "pullRequestUrl": pr_url})

    def resolve(self, _: bytes, repo: Repo, revision: str, file: str) -> None:
        if (at := repo.find(revision)) is None:
            return self._send(404, b"", {"X-Error-Code": "RevisionNotFound"})
        commit = {"X-Repo-Commit": repo.sha(at)}
        if (content := repo.commits[at].get(file)) is None:
            return self._send(404, b"", {"X-Error-Code": "EntryNotFound"} | commit)
        oid = sha(content)
        if not file.endswith(".safetensors"):
            return self._send(200, content, commit | {"ETag": f'"{oid}"'})
        self.hub.blobs[oid] = content  # large files are elsewhere
        linked = {"X-Linked-Etag": f'"{oid}"', "X-Linked-Size": str(len(content))}
        self._send(302, b"", commit | linked | {"Location": self._at(f"blobs/{oid}", "localhost")})

    def blob(self, _: bytes, __: None, oid: str) -> None:
        content, asked = self.hub.blobs[oid], re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        if not asked:
            return self._send(200, content, {"ETag": f'"{oid}"'})
        start = int(asked[1])
        self._send(206, content[start:], {"Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"})

    def log_message(self, *_: Any) -> None:
        pass


def sha(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


REPO = r"(?P<repo>[^/]+/[^/]+?)"
ROUTES = [
    (r"(GET|HEAD) /", Handler.alive, False),
    (r"POST /api/repos/create", Handler.create, True),
    (r"POST /api/validate-yaml", Handler.validate, False),
    (rf"GET /api/models/{REPO}", Handler.info, False),
    (rf"GET /api/models/{REPO}/revision/(?P<revision>.+)", Handler.info, False),
    (rf"GET /api/models/{REPO}/tree/(?P<revision>[^/]+)", Handler.tree, False),
    (rf"POST /api/models/{REPO}/branch/(?P<branch>.+)", Handler.branch, True),
    (rf"POST /api/models/{REPO}/preupload/(?P<revision>.+)", Handler.preupload, True),
    (rf"POST /api/models/{REPO}/commit/(?P<revision>.+)", Handler.commit, True),
    (rf"POST /{REPO}\.git/info/lfs/objects/batch", Handler.batch, True),
    (r"PUT /blobs/(?P<oid>\w+)", Handler.store, False),
    (r"(GET|HEAD) /blobs/(?P<oid>\w+)", Handler.blob, False),
    (rf"(GET|HEAD) /{REPO}/resolve/(?P<revision>.+?)/(?P<file>[^/]+)", Handler.resolve, False),
]
