"""A small Hub on loopback: real HTTP, the endpoints that uploads use, and faults on demand.

Repositories live in memory as git-like branches: a commit is its files' contents, its parent and
its message. Large files (by extension, as on the Hub) travel by LFS's basic transfer.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_SecretOfTheTestsOnly1234567890"
LARGE = (".safetensors", ".png", ".bin")


@dataclass
class Repo:
    private: bool
    branches: dict[str, list[str]] = field(default_factory=dict)  # name -> commits, newest last
    commits: dict[str, dict[str, Any]] = field(default_factory=dict)  # oid -> files, message
    blobs: dict[str, bytes] = field(default_factory=dict)  # LFS contents by sha256

    def add(self, branch: str, files: dict[str, bytes], message: str) -> str:
        """A commit that makes `branch` hold these files."""
        line = self.branches.setdefault(branch, [])
        text = repr((line, sorted(files.items()), message))
        oid = hashlib.sha1(text.encode()).hexdigest()
        line.append(oid)
        self.commits[oid] = {"files": files, "message": message}
        return oid

    def files(self, branch: str = "main") -> dict[str, bytes]:
        return self.commits[self.branches[branch][-1]]["files"]


@dataclass
class Fault:
    """What goes wrong with the next `times` requests whose "METHOD path" contains `where`."""

    where: str
    status: int = 0  # 0 drops the connection
    times: int = 1
    body: str = "{}"
    headers: dict[str, str] = field(default_factory=dict)
    after: bool = False  # the request takes effect, and its answer is lost


class Hub(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos: dict[str, Repo] = {}
        self.faults: list[Fault] = []
        self.seen: list[str] = []  # "METHOD path"
        self.owners = {"me"}  # whom the token may write for
        self.token = TOKEN
        self.before_commit: Any = None  # called once, before a commit is looked at
        self.lock = threading.RLock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def create(self, name: str, private: bool = False, **files: bytes) -> Repo:
        repo = self.repos[name] = Repo(private)
        repo.add("main", {".gitattributes": b"*.safetensors filter=lfs\n", **files}, "initial")
        return repo

    def count(self, part: str) -> int:
        return sum(part in line for line in self.seen)


@contextmanager
def serving() -> Iterator[Hub]:
    """A running Hub, in a thread of its own."""
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        thread.join()
        hub.server_close()


class Refused(Exception):
    def __init__(self, status: int, error: str, code: str = "") -> None:
        super().__init__(error)
        self.status, self.error, self.code = status, error, code


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.take()

    def do_HEAD(self) -> None:
        self.take()

    def do_POST(self) -> None:
        self.take()

    def do_PUT(self) -> None:
        self.take()

    def take(self) -> None:
        hub, path = self.server, unquote(urlsplit(self.path).path)
        self.query = parse_qs(urlsplit(self.path).query)
        with hub.lock:
            hub.seen.append(f"{self.command} {path}")
            fault = next((f for f in hub.faults if f.where in hub.seen[-1] and f.times), None)
            if fault is not None:
                fault.times -= 1
        if fault is not None and not fault.after and not fault.status:
            # some of the body was read: the connection breaks in the middle of an upload
            self.rfile.read(min(64, int(self.headers.get("Content-Length") or 0)))
            return self.drop()
        body = self.body()
        if fault is not None and not fault.after:
            return self.answer(fault.status, fault.body.encode(), fault.headers)
        try:
            with hub.lock:
                status, data, headers = self.route(path, body)
        except Refused as no:
            headers = {"X-Error-Message": no.error}
            if no.code:
                headers["X-Error-Code"] = no.code
            status, data = no.status, json.dumps({"error": no.error}).encode()
        if fault is not None:
            return self.drop()
        self.answer(status, data, headers)

    def body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def drop(self) -> None:
        self.close_connection = True
        self.connection.close()

    def answer(self, status: int, data: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in {"Content-Type": "application/json", **headers}.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    # ---- the endpoints

    def route(self, path: str, body: bytes) -> tuple[int, bytes, dict[str, str]]:
        if path.startswith("/lfs/"):  # presigned: no token
            return self.lfs(path, body)
        if self.headers.get("Authorization") != f"Bearer {self.server.token}":
            raise Refused(401, "Invalid credentials in Authorization header")
        if "/resolve/" in path:
            return self.resolve(path)
        if path == "/api/validate-yaml":
            return ok({"errors": [], "warnings": []})
        if path == "/api/repos/create":
            return self.create(json.loads(body))
        if path.endswith(".git/info/lfs/objects/batch"):
            return self.batch(path[1:].split(".git")[0], json.loads(body))
        _, _, models, owner, name, *rest = path.split("/")
        assert models == "models", path
        repo = self.repo(f"{owner}/{name}")
        verb, branch = rest[0] if rest else "", "/".join(rest[1:]) or "main"
        if verb in ("", "revision"):
            head = self.branch(repo, branch)[-1]
            files = [{"rfilename": k} for k in self.held(repo, branch)]
            about = {"id": f"{owner}/{name}", "sha": head, "private": repo.private}
            return ok({**about, "siblings": files})
        if verb == "tree":
            return ok([entry(k, v) for k, v in self.held(repo, branch).items()])
        self.writable(owner)
        if verb == "branch":
            if branch in repo.branches:
                raise Refused(409, "Reference already exists")
            repo.branches[branch] = list(repo.branches["main"])
            return ok({})
        if verb == "preupload":
            return self.preupload(repo, branch, json.loads(body))
        assert verb == "commit", path
        return self.commit(f"{owner}/{name}", branch, body)

    def repo(self, name: str) -> Repo:
        if name not in self.server.repos:
            raise Refused(404, "Repository not found", "RepoNotFound")
        return self.server.repos[name]

    def branch(self, repo: Repo, name: str) -> list[str]:
        """The commits of a branch, or the one that is named outright."""
        if name in repo.commits:
            return [name]
        if name not in repo.branches:
            raise Refused(404, f"Invalid rev id: {name}", "RevisionNotFound")
        return repo.branches[name]

    def held(self, repo: Repo, branch: str) -> dict[str, bytes]:
        return repo.commits[self.branch(repo, branch)[-1]]["files"]

    def writable(self, owner: str) -> None:
        if owner not in self.server.owners:
            raise Refused(403, f"You don't have the rights to write to {owner}")

    def create(self, asked: dict[str, Any]) -> tuple[int, bytes, dict[str, str]]:
        name = f"{asked['organization']}/{asked['name']}"
        self.writable(asked["organization"])
        if name in self.server.repos:
            raise Refused(409, "You already created this model repo")
        private = asked.get("visibility") == "private" or bool(asked.get("private"))
        self.server.create(name, private)
        return ok({"url": f"{self.server.url}/{name}"})

    def resolve(self, path: str) -> tuple[int, bytes, dict[str, str]]:
        name, rest = path[1:].split("/resolve/")
        branch, file = rest.split("/", 1)
        repo = self.repo(name)
        files = self.held(repo, branch)
        if file not in files:
            raise Refused(404, "Entry not found", "EntryNotFound")
        tag = hashlib.sha256(files[file]).hexdigest()
        commit = {"X-Repo-Commit": self.branch(repo, branch)[-1], "ETag": f'"{tag}"'}
        return 200, files[file], commit

    def preupload(
        self, repo: Repo, branch: str, asked: dict[str, Any]
    ) -> tuple[int, bytes, dict[str, str]]:
        there = self.held(repo, branch)
        files = []
        for file in asked["files"]:
            large = file["path"].endswith(LARGE)
            oid = entry(file["path"], there[file["path"]]) if file["path"] in there else {}
            files.append(
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if large else "regular",
                    "shouldIgnore": False,
                    "oid": oid.get("lfs", oid).get("oid"),
                }
            )
        return ok({"files": files})

    def batch(self, name: str, asked: dict[str, Any]) -> tuple[int, bytes, dict[str, str]]:
        self.writable(name.split("/")[0])
        repo, objects = self.repo(name), []
        for wanted in asked["objects"]:
            made = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in repo.blobs:
                href = f"{self.server.url}/lfs/{name}/{wanted['oid']}"
                made["actions"] = {"upload": {"href": href}, "verify": {"href": href}}
            objects.append(made)
        return ok({"transfer": "basic", "objects": objects})

    def lfs(self, path: str, body: bytes) -> tuple[int, bytes, dict[str, str]]:
        _, _, owner, name, oid = path.split("/")
        blobs = self.repo(f"{owner}/{name}").blobs
        if self.command == "PUT":
            if hashlib.sha256(body).hexdigest() != oid:
                raise Refused(400, "the content is not what was announced")
            blobs[oid] = body
        elif oid not in blobs:
            raise Refused(404, "not uploaded")
        return ok({})

    def commit(self, name: str, branch: str, body: bytes) -> tuple[int, bytes, dict[str, str]]:
        repo = self.repo(name)
        if (meanwhile := self.server.before_commit) is not None:
            self.server.before_commit = None
            meanwhile()
        lines = [json.loads(line) for line in body.splitlines()]
        header, files = lines[0]["value"], dict(self.held(repo, branch))
        if header.get("parentCommit") not in (None, repo.branches[branch][-1]):
            raise Refused(412, "A commit has happened since. Please refresh and try again.")
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                if value["oid"] not in repo.blobs:
                    raise Refused(400, f"LFS object {value['oid']} is missing")
                files[value["path"]] = repo.blobs[value["oid"]]
            else:
                assert line["key"] == "deletedFile", line
                del files[value["path"]]
        oid = repo.add(branch, files, header["summary"])
        return ok({"commitUrl": f"{self.server.url}/{name}/commit/{oid}", "commitOid": oid})


def ok(content: Any) -> tuple[int, bytes, dict[str, str]]:
    return 200, json.dumps(content).encode(), {}


def entry(path: str, content: bytes) -> dict[str, Any]:
    """A file as the tree endpoint lists it."""
    size = len(content)
    sha1 = hashlib.sha1(b"blob %d\0" % size + content).hexdigest()
    made: dict[str, Any] = {"type": "file", "path": path, "size": size, "oid": sha1}
    if path.endswith(LARGE):
        sha256 = hashlib.sha256(content).hexdigest()
        made["lfs"] = {"oid": sha256, "size": size, "pointerSize": 130}
        made["oid"] = hashlib.sha1(sha256.encode()).hexdigest()  # of the pointer
    return made
