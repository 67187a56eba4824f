"""A small model hub on the loopback interface: what huggingface_hub asks for, with real answers.

Repositories, branches, commits, files by range, uploads by LFS, tokens; and faults on demand.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import http.server
import json
import re
import threading
import urllib.parse

LFS_BYTES = 1000  # larger files are uploaded on their own


@dataclasses.dataclass
class Repository:
    """Branches and commits; a commit is path -> content."""

    private: bool = False
    gated: bool = False
    branches: dict[str, str] = dataclasses.field(default_factory=dict)
    commits: dict[str, dict[str, bytes]] = dataclasses.field(default_factory=dict)
    ignored: tuple[str, ...] = ()

    def commit(self, files: dict[str, bytes], branch: str = "main") -> str:
        """Add a commit with these files on top of a branch."""
        content = self.commits.get(self.branches.get(branch, ""), {}) | files
        text = repr([(len(self.commits), branch), *sorted(content)])
        oid = hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()
        self.commits[oid] = content
        self.branches[branch] = oid
        return oid

    def resolve(self, revision: str) -> str | None:
        oid = self.branches.get(revision, revision)
        return oid if oid in self.commits else None


class FakeHub:
    """The state of the hub, and its server; use it as a context manager.

    Attributes:
        repositories: ``OWNER/NAME`` -> repository.
        writer: token that may write, and read private repositories.
        reader: token that may read private repositories.
        cuts: path -> numbers of bytes after which its next downloads break off.
        stalls: path -> number of bytes after which its downloads wait for ``goes_on``.
        failing: status of every answer, if set.
        requests: method, path and headers of all requests.
    """

    writer, reader = "hf_writer", "hf_reader"

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.cuts: dict[str, list[int]] = {}
        self.stalls: dict[str, int] = {}
        self.goes_on = threading.Event()
        self.failing: int | None = None
        self.requests: list[tuple[str, str, dict[str, str]]] = []
        self.blobs: dict[str, bytes] = {}
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answers)
        self._server.hub = self  # type: ignore[attr-defined]
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def asked(self, method: str, suffix: str = "") -> list[dict[str, str]]:
        """Headers of the requests with a method whose path ends so."""
        return [h for m, path, h in self.requests if m == method and path.endswith(suffix)]

    def __enter__(self) -> FakeHub:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.goes_on.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def etag(content: bytes) -> str:
    if len(content) > LFS_BYTES:
        return hashlib.sha256(content).hexdigest()
    blob = b"blob %d\0" % len(content) + content
    return hashlib.sha1(blob, usedforsecurity=False).hexdigest()


class Answers(http.server.BaseHTTPRequestHandler):
    """Answers one connection."""

    protocol_version = "HTTP/1.1"
    timeout = 5

    @property
    def hub(self) -> FakeHub:
        return self.server.hub  # type: ignore[attr-defined]

    def log_message(self, *words: object) -> None:
        pass

    def handle_one_request(self) -> None:
        try:
            super().handle_one_request()
        except (ConnectionError, TimeoutError):  # the client was killed, or is done
            self.close_connection = True

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def do_POST(self) -> None:
        self.answer()

    def do_PUT(self) -> None:
        self.answer()

    def answer(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        self.body = self.rfile.read(length)
        path = urllib.parse.urlsplit(self.path).path
        self.hub.requests.append((self.command, path, dict(self.headers)))
        if self.hub.failing is not None:
            return self.send(self.hub.failing, {"error": "down for maintenance"})
        for pattern, method, respond in ROUTES:
            found = re.fullmatch(pattern, path)
            if found and method == self.command.replace("HEAD", "GET"):
                return respond(self, *map(urllib.parse.unquote, found.groups()))
        return self.send(404, {"error": f"the fake hub has no {self.command} {path}"})

    def send(self, status: int, value: object = None, **headers: str) -> None:
        content = json.dumps(value).encode()
        self.send_response(status)
        for name, text in headers.items():
            self.send_header(name.replace("_", "-"), text)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def token(self) -> str:
        return self.headers.get("Authorization", "").removeprefix("Bearer ")

    def repository(self, name: str, *, write: bool = False) -> Repository | None:
        """Return a repository that the token may use; otherwise answers, and returns None."""
        found, known = self.hub.repositories.get(name), (self.hub.writer, self.hub.reader)
        if found is None or (found.private and self.token() not in known):
            error = "Invalid username or password." if not self.token() else "Repository not found"
            status = 404 if self.token() in known else 401
            self.send(status, {"error": error}, X_Error_Code="RepoNotFound", X_Error_Message=error)
        elif found.gated and self.token() not in known:
            self.send(401, {"error": "gated"}, X_Error_Code="GatedRepo")
        elif write and self.token() != self.hub.writer:
            self.send(403, {"error": "no"}, X_Error_Message="You don't have the rights")
        else:
            return found
        return None

    def commit_of(self, name: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        repository = self.repository(name)
        if repository is None:
            return None
        oid = repository.resolve(revision)
        if oid is None:
            error = f"Invalid rev id: {revision}"
            self.send(404, {"error": error}, X_Error_Code="RevisionNotFound", X_Error_Message=error)
            return None
        return oid, repository.commits[oid]

    def resolve(self, name: str, revision: str, path: str) -> None:
        found = self.commit_of(name, revision)
        if found is None:
            return
        oid, files = found
        if path not in files:
            headers = {"X_Error_Code": "EntryNotFound", "X_Error_Message": "Entry not found"}
            self.send(404, {"error": "Entry not found"}, X_Repo_Commit=oid, **headers)
            return
        content = files[path]
        begin = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        start = int(begin[1]) if begin else 0
        self.send_response(206 if begin else 200)
        self.send_header("ETag", f'"{etag(content)}"')
        self.send_header("X-Repo-Commit", oid)
        if len(content) > LFS_BYTES:
            self.send_header("X-Linked-Etag", f'"{etag(content)}"')
            self.send_header("X-Linked-Size", str(len(content)))
        if begin:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        if self.command == "GET":
            self.send_body(path, content[start:])

    def send_body(self, path: str, content: bytes) -> None:
        cuts = self.hub.cuts.get(path)
        if cuts:
            self.wfile.write(content[: cuts.pop(0)])
            self.close_connection = True
        elif path in self.hub.stalls:
            begun = self.hub.stalls[path]
            self.wfile.write(content[:begun])
            self.hub.goes_on.wait()
            self.wfile.write(content[begun:])
        else:
            self.wfile.write(content)

    def info(self, name: str, revision: str = "main") -> None:
        repository = self.repository(name)
        if repository is None:
            return
        found = repository.resolve(revision)
        if found is None and repository.commits:
            self.send(404, {"error": "no"}, X_Error_Code="RevisionNotFound")
        else:
            self.send(200, {"id": name, "sha": found, "private": repository.private, "tags": []})

    def tree(self, name: str, revision: str) -> None:
        found = self.commit_of(name, revision)
        if found is None:
            return
        entries = []
        for path, content in found[1].items():
            entry = {"type": "file", "path": path, "size": len(content), "oid": etag(content)[:40]}
            if len(content) > LFS_BYTES:
                entry["lfs"] = {"oid": etag(content), "size": len(content), "pointerSize": 130}
            entries.append(entry)
        self.send(200, entries)

    def create(self) -> None:
        if self.token() != self.hub.writer:
            self.send(401, {"error": "no"}, X_Error_Message="Invalid username or password.")
            return
        wanted = json.loads(self.body)
        name = f"{wanted['organization']}/{wanted['name']}"
        known = name in self.hub.repositories
        if not known:
            private = wanted.get("visibility") == "private"
            self.hub.repositories[name] = Repository(private=private)
            self.hub.repositories[name].commit({".gitattributes": b"*.onnx filter=lfs\n"})
        self.send(409 if known else 200, {"url": f"{self.hub.endpoint}/{name}"})

    def branch(self, name: str, branch: str) -> None:
        repository = self.repository(name, write=True)
        if repository is not None:
            known = branch in repository.branches
            repository.branches.setdefault(branch, repository.branches["main"])
            self.send(409 if known else 200, {})

    def preupload(self, name: str, revision: str) -> None:
        repository = self.repository(name, write=True)
        if repository is None:
            return
        oid = repository.resolve(revision)
        stored = repository.commits[oid] if oid else {}
        files = []
        for each in json.loads(self.body)["files"]:
            path = each["path"]
            files.append(
                {
                    "path": path,
                    "uploadMode": "lfs" if each["size"] > LFS_BYTES else "regular",
                    "shouldIgnore": path in repository.ignored,
                    "oid": etag(stored[path]) if path in stored else None,
                }
            )
        self.send(200, {"files": files})

    def batch(self, name: str) -> None:
        if self.repository(name, write=True) is None:
            return
        objects = []
        for each in json.loads(self.body)["objects"]:
            upload = {"href": f"{self.hub.endpoint}/lfs/{each['oid']}"}
            known = each["oid"] in self.hub.blobs
            objects.append(each if known else each | {"actions": {"upload": upload}})
        self.send(200, {"transfer": "basic", "objects": objects})

    def store(self, oid: str) -> None:
        assert hashlib.sha256(self.body).hexdigest() == oid
        self.hub.blobs[oid] = self.body
        self.send(200, {})

    def commit(self, name: str, revision: str) -> None:
        repository = self.repository(name, write=True)
        if repository is None:
            return
        header, *operations = map(json.loads, self.body.splitlines())
        files = {}
        for operation in operations:
            value = operation["value"]
            if operation["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            else:
                files[value["path"]] = self.hub.blobs[value["oid"]]
        oid = repository.commit(files, revision)
        url = f"{self.hub.endpoint}/{name}/commit/{oid}"
        self.send(200, {"commitUrl": url, "commitOid": oid, "message": header["value"]["summary"]})


_REPO = r"([\w.-]+/[\w.-]+)"
ROUTES = (
    (rf"/{_REPO}/resolve/([^/]+)/(.+)", "GET", Answers.resolve),
    (rf"/api/models/{_REPO}", "GET", Answers.info),
    (rf"/api/models/{_REPO}/revision/([^/]+)", "GET", Answers.info),
    (rf"/api/models/{_REPO}/tree/([^/]+)", "GET", Answers.tree),
    (r"/api/repos/create", "POST", Answers.create),
    (rf"/api/models/{_REPO}/branch/([^/]+)", "POST", Answers.branch),
    (rf"/api/models/{_REPO}/preupload/([^/]+)", "POST", Answers.preupload),
    (rf"/api/models/{_REPO}/commit/([^/]+)", "POST", Answers.commit),
    (rf"/{_REPO}\.git/info/lfs/objects/batch", "POST", Answers.batch),
    (r"/lfs/(\w+)", "PUT", Answers.store),
)
