"""As much of the Hugging Face Hub as pushing and fetching a model needs, on this machine and with faults on demand."""

import base64
import hashlib
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

TOKEN = "hf_correctHorseBatteryStaple"
"""The only token that the server takes."""

FORBIDDEN, UNKNOWN = "others", "nobody"
"""Owners whose repositories the token may not write to, and who are not there."""


@dataclass
class Repository:
    """What the Hub keeps of one."""

    private: bool
    commits: list[dict[str, bytes]] = field(default_factory=lambda: [{}])
    """Files after each commit; the first is the empty one that the Hub makes."""

    def oid(self, index=-1):
        return hashlib.sha1(repr((index % len(self.commits), sorted(self.commits[index]))).encode()).hexdigest()

    @property
    def files(self):
        return self.commits[-1]

    def at(self, revision):
        """The files at `main` or a commit, and the commit; None for other revisions."""
        oids = {self.oid(index): index for index in range(len(self.commits))}
        index = len(self.commits) - 1 if revision == "main" else oids.get(revision)
        return None if index is None else (self.commits[index], self.oid(index))


class Hub(ThreadingHTTPServer):
    """A Hub; use it as a context manager.

    Attributes:
        repositories: id -> repository.
        requests: (method, path) in the order of their arrival.
        faults: kind of request -> what happens to the next ones of the kind, instead: a status; "drop", the connection
            is closed after a part of the request; "lose", the request is carried out, but not answered; "cut", the
            connection is closed after half of the answer; "short", half of a file passes for all of it.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.endpoint = f"http://127.0.0.1:{self.server_port}"
        self.repositories, self.requests, self.faults, self.blobs = {}, [], {}, {}
        self.retry_after = None

    def __enter__(self):
        self._thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()
        return self

    def __exit__(self, *args):
        self.shutdown()
        self._thread.join()
        self.server_close()

    def count(self, kind):
        """Number of requests of a kind."""
        return sum(_kind(method, path) == kind for method, path in self.requests)

    def handle_error(self, request, client_address):
        pass  # connections that a test drops


def _kind(method, path):
    for part, kind in (
        ("/api/repos/create", "create"),
        ("/api/validate-yaml", "validate"),
        ("/preupload/", "preupload"),
        ("/commit/", "commit"),
        (".git/info/lfs/objects/batch", "batch"),
        ("/lfs/", "upload"),
        ("/tree/", "tree"),
        ("/resolve/", "head" if method == "HEAD" else "download"),
        ("/api/models/", "info"),
    ):
        if part in path:
            return kind
    return "other"


def _git_oid(data):
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _is_large(path):
    return path.endswith((".safetensors", ".png"))


def _etag(path, data):
    return hashlib.sha256(data).hexdigest() if _is_large(path) else _git_oid(data)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    fault = None

    def handle_any(self):
        kind = _kind(self.command, self.path)
        self.server.requests.append((self.command, self.path))
        planned = self.server.faults.get(kind, [])
        fault = planned.pop(0) if planned else None
        length = int(self.headers.get("Content-Length", 0))
        if fault == "drop":
            self.rfile.read(length // 2)
            self.close_connection = True
            self.connection.close()
            return
        body = self.rfile.read(length)
        self.fault = None
        if isinstance(fault, int):
            self.answer({"error": "no luck"}, fault)
            return
        self.fault, self.authorised = fault, True  # anew for each request of a connection
        if kind not in ("upload", "validate") and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            if kind in ("create", "preupload", "commit", "batch"):
                said = self.headers.get("Authorization", "none")  # a server that repeats what it must not
                self.answer({"error": f"Invalid credentials in Authorization header: {said}"}, 401)
                return
            self.authorised = False
        getattr(self, f"on_{kind}")(urlsplit(unquote(self.path)).path, body)

    do_GET = do_POST = do_PUT = do_HEAD = handle_any  # noqa: N815

    def answer(self, value, status=200, **headers):
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        if self.fault == "lose":
            self.close_connection = True
            self.connection.close()
            return
        if self.fault == "short":
            data = data[: len(data) // 2]
        self.send_response(status)
        if status == 429 and self.server.retry_after:
            self.send_header("Retry-After", self.server.retry_after)
        for name, text in ({"Content-Type": "application/json", "Content-Length": str(len(data))} | headers).items():
            self.send_header(name.replace("_", "-"), text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[: len(data) // 2] if self.fault == "cut" else data)
        if self.fault == "cut":
            self.close_connection = True

    def on_create(self, path, body):
        asked = json.loads(body)
        owner = asked["organization"] or "someone"
        repo_id = f"{owner}/{asked['name']}"
        if owner == FORBIDDEN:
            self.answer({"error": "You don't have the rights to create a model under this namespace"}, 403)
        elif owner == UNKNOWN:
            self.answer({"error": "Not Found"}, 404)
        elif repo_id in self.server.repositories:
            url = f"{self.server.endpoint}/{repo_id}"
            self.answer({"error": "You already created this model repo", "url": url}, 409)
        else:
            self.server.repositories[repo_id] = Repository(private=asked.get("visibility") == "private")
            self.answer({"url": f"{self.server.endpoint}/{repo_id}"})

    def on_validate(self, path, body):
        self.answer({"errors": [], "warnings": []})

    def repository(self, path):
        owner, name = path.removeprefix("/api/models/").lstrip("/").split("/")[:2]
        repository = self.server.repositories.get(f"{owner}/{name.removesuffix('.git')}")
        if repository is None or (repository.private and not self.authorised):
            self.answer({"error": "Repository not found"}, 401, X_Error_Code="RepoNotFound")
            return None
        return repository

    def at(self, path, marker):
        """Repository, files and commit that a path names, or None after an answer that they are not there."""
        repository = self.repository(path)
        if repository is None:
            return None
        revision = path.split(marker, 1)[1].split("/")[0] if marker in path else "main"
        found = repository.at(revision)
        if found is None:
            self.answer({"error": f"Invalid rev id: {revision}"}, 404, X_Error_Code="RevisionNotFound")
            return None
        return repository, *found

    def on_info(self, path, body):
        if found := self.at(path, "/revision/"):
            repository, files, oid = found
            siblings = [{"rfilename": name} for name in files]
            repo_id = "/".join(path.split("/")[3:5])
            self.answer({"id": repo_id, "sha": oid, "private": repository.private, "siblings": siblings, "tags": []})

    def on_tree(self, path, body):
        if found := self.at(path, "/tree/"):
            _, files, _ = found
            rows = []
            for name, data in files.items():
                row = {"type": "file", "path": name, "oid": _git_oid(data), "size": len(data)}
                if _is_large(name):
                    row["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
                rows.append(row)
            self.answer(rows)

    def on_preupload(self, path, body):
        repository = self.repository(path)
        rows = []
        for name in (file["path"] for file in json.loads(body)["files"]):
            row = {"path": name, "uploadMode": "lfs" if _is_large(name) else "regular", "shouldIgnore": False}
            if name in repository.files:
                row["oid"] = _etag(name, repository.files[name])
            rows.append(row)
        self.answer({"files": rows})

    def on_batch(self, path, body):
        objects = []
        for entry in json.loads(body)["objects"]:
            place = {"upload": {"href": f"{self.server.endpoint}/lfs/{entry['oid']}?signature=secret"}}
            objects.append(entry if entry["oid"] in self.server.blobs else {**entry, "actions": place})
        self.answer({"transfer": "basic", "objects": objects})

    def on_upload(self, path, body):
        oid = path.rsplit("/", 1)[1]
        assert hashlib.sha256(body).hexdigest() == oid
        self.server.blobs[oid] = body
        self.answer({})

    def on_commit(self, path, body):
        repository = self.repository(path)
        files = dict(repository.files)
        for line in (json.loads(line) for line in body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.blobs[value["oid"]]
        repository.commits.append(files)
        oid = repository.oid()
        repo_id = "/".join(path.split("/")[3:5])
        self.answer({"commitUrl": f"{self.server.endpoint}/{repo_id}/commit/{oid}", "commitOid": oid})

    def on_head(self, path, body):
        self.resolve(path)

    def on_download(self, path, body):
        self.resolve(path)

    def resolve(self, path):
        found = self.at(path, "/resolve/")
        if not found:
            return
        _, files, oid = found
        name = path.split("/resolve/", 1)[1].split("/", 1)[1]
        if name not in files:
            self.answer({"error": "Entry not found"}, 404, X_Error_Code="EntryNotFound", X_Repo_Commit=oid)
            return
        data = files[name]
        headers = {"ETag": f'"{_etag(name, data)}"', "X-Repo-Commit": oid}
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").split("-")[0])
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        self.answer(data[start:], 206 if start else 200, **headers)

    def log_message(self, *args):
        pass
