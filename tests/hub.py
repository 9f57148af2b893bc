"""A stand-in of the Hub: a real HTTP server with repositories on disk, which says what it was asked for and sent.

`tests/conftest.py` has the fixture `hub`, whose process and child processes take it for the Hub. It answers what
huggingface_hub's downloads, uploads, tags and file system ask for; regular files and LFS, no Xet.
"""

import base64
import fnmatch
import hashlib
import json
import re
import socket
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

TOKEN = "hf_of_the_stand_in"
READ_TOKEN = "hf_of_the_stand_in_to_read"
USER = "somebody"
LFS_SUFFIXES = {".parquet", ".mp4", ".safetensors", ".bin", ".pt", ".png", ".arrow", ".zip"}
PREFIXES = {"datasets": "dataset", "models": "model", "spaces": "space"}


@dataclass(frozen=True)
class Blob:
    """A file's content: `oid` is git's number of it, or its SHA-256 where it is kept as LFS."""

    sha256: str
    oid: str
    size: int
    lfs: bool

    def entry(self, path):
        lfs = {"lfs": {"oid": self.sha256, "size": self.size, "pointerSize": 134}} if self.lfs else {}
        return {"type": "file", "path": path, "size": self.size, "oid": self.oid, **lfs}


@dataclass
class Repo:
    """Commits as dictionaries path -> blob, branches and tags as names of commits."""

    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, Blob]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def resolve(self, revision):
        """Return the hash of a commit, or None."""
        for names in (self.branches, self.tags):
            if revision in names:
                return names[revision]
        return revision if revision in self.commits else None

    def commit(self, files, branch="main", message=""):
        """Set a branch to these files and return the commit's hash."""
        names = sorted((path, blob.sha256) for path, blob in files.items())
        hash = hashlib.sha1(json.dumps([names, len(self.commits), message]).encode()).hexdigest()
        self.commits[hash], self.branches[branch] = files, hash
        self.messages.append(message)
        return hash


@dataclass(frozen=True)
class Request:
    """A request that was answered: `sent` counts the bytes of the answer's body, `range` is what was asked for."""

    method: str
    path: str
    status: int
    sent: int
    range: str | None = None


@dataclass
class Fault:
    """What goes wrong with the next `times` requests whose path fits: a status, or a cut after `after` bytes."""

    pattern: str
    times: int
    status: int | None = None
    after: int = 0
    method: str = "*"


class Hub:
    """The server and its repositories.

    Args:
        folder (`Path`): where the contents of the files are kept.

    Attributes:
        repos: `(kind, "owner/name")` -> `Repo`, kinds being "dataset", "model" and "space".
        log: every `Request` so far.
        token: what a user who may write, and read what is private, sends.
        read_token: what a user who may read what is private sends.
        latency: seconds that every answer is kept waiting.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.repos: dict[tuple[str, str], Repo] = {}
        self.log: list[Request] = []
        self.faults: list[Fault] = []
        self.latency = 0.0
        self.closed = False
        self.token, self.read_token = TOKEN, READ_TOKEN
        self._lock = threading.Lock()
        handler = type("Handler", (Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads, self._server.block_on_close = True, False
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self):
        """Stop answering, on connections that are open as well."""
        self.closed = True
        self._server.shutdown()
        self._server.server_close()

    def upload(self, name, source, kind="dataset", private=False, branch="main"):
        """Make a folder the repository's content on a branch; returns the commit's hash."""
        files = [path for path in sorted(Path(source).rglob("*")) if path.is_file()]
        blobs = {path.relative_to(source).as_posix(): self.keep(path.read_bytes(), path.name) for path in files}
        return self.repos.setdefault((kind, name), Repo(private)).commit(blobs, branch)

    def keep(self, data, path, lfs=None):
        """Put a content on disk."""
        sha256 = hashlib.sha256(data).hexdigest()
        (self.folder / sha256).write_bytes(data)
        lfs = Path(path).suffix in LFS_SUFFIXES if lfs is None else lfs
        oid = sha256 if lfs else hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        return Blob(sha256, oid, len(data), lfs)

    def read(self, name, path, revision="main", kind="dataset"):
        """Return the bytes of a file."""
        repo = self.repos[kind, name]
        return (self.folder / repo.commits[repo.resolve(revision)][path].sha256).read_bytes()

    def files(self, name, revision="main", kind="dataset"):
        """Return the paths of a repository, in order."""
        repo = self.repos[kind, name]
        return sorted(repo.commits[repo.resolve(revision)])

    def fail(self, pattern, times=1, status=503, method="*"):
        """Answer the next requests whose path fits with an error."""
        self.faults.append(Fault(pattern, times, status, method=method))

    def cut(self, pattern, times=1, after=0):
        """Close the connection in the middle of the next answers to paths that fit."""
        self.faults.append(Fault(pattern, times, after=after, method="GET"))

    def cut_upload(self, pattern, times=1, after=0):
        """Close the connection in the middle of the next uploads to paths that fit."""
        self.faults.append(Fault(pattern, times, after=after, method="PUT"))

    def requests(self, pattern="*", method="*"):
        """Return the requests so far whose path fits."""
        return [each for each in self.log if fits(each.path, pattern) and fits(each.method, method)]

    def sent(self, pattern="*"):
        """Return the bytes sent so far of paths that fit."""
        return sum(request.sent for request in self.requests(pattern))

    def fetched(self, pattern="*"):
        """Return the files of which bytes were sent, by their path in the repository."""
        paths = {request.path.split("/resolve/")[1] for request in self.requests("*/resolve/*") if request.sent}
        return sorted(path for path in (path.partition("/")[2] for path in paths) if fits(path, pattern))

    def fault(self, method, path):
        """Take the next fault of such a request."""
        with self._lock:
            for fault in self.faults:
                if fault.times and fits(path, fault.pattern) and fits(method, fault.method):
                    fault.times -= 1
                    return fault
        return None

    def record(self, request):
        """Note a request."""
        with self._lock:
            self.log.append(request)


def fits(text, pattern):
    """Shell-style pattern, with case."""
    return fnmatch.fnmatchcase(text, pattern)


class Refusal(Exception):
    """An error answer as the Hub gives it: status, its name in the header X-Error-Code, text."""


class Handler(BaseHTTPRequestHandler):
    """Answers the requests; one method for each route, found by `ROUTES`."""

    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        self._answer()

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    def _answer(self):
        if self.hub.closed:
            self.close_connection = True
            return
        split = urlsplit(self.path)
        self.route, self.query = unquote(split.path), parse_qs(split.query)
        self.broken = self.hub.fault(self.command, self.route)
        if self.broken and not self.broken.status and self.command == "PUT":
            self.rfile.read(self.broken.after)
            self.hub.record(Request(self.command, self.route, 0, 0))
            self.close_connection = True
            return self.connection.shutdown(socket.SHUT_RDWR)
        self.body = self._read_body()
        time.sleep(self.hub.latency)
        try:
            if self._token not in ("", TOKEN, READ_TOKEN):
                raise Refusal(401, "", "Invalid credentials in Authorization header")
            if self.broken and self.broken.status:
                raise Refusal(self.broken.status, "", "the stand-in was told to fail")
            for method, pattern, answer in ROUTES:
                match = re.fullmatch(pattern, split.path)
                if match and self.command in method:
                    return answer(self, *(group and unquote(group) for group in match.groups()))
            raise Refusal(404, "", f"the stand-in knows no {self.command} {split.path}")
        except Refusal as error:
            status, code, text = error.args
            self._json({"error": text}, status, {"X-Error-Code": code, "X-Error-Message": text})

    def _read_body(self):
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _json(self, content, status=200, headers=None):
        self._send(json.dumps(content).encode(), status, {"Content-Type": "application/json", **(headers or {})})

    def _send(self, data, status=200, headers=None, size=None):
        size = len(data) if size is None else size
        broken = self.broken if self.broken and not self.broken.status else None
        data = b"" if self.command == "HEAD" else data[: broken.after] if broken else data
        self.hub.record(Request(self.command, self.route, status, len(data), self.headers.get("Range")))
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": size}.items():
            self.send_header(name, str(value))
        self.end_headers()
        try:
            self.wfile.write(data)
        except ConnectionError:  # who asked has gone
            self.close_connection = True
        if broken:
            self.close_connection = True

    @property
    def _token(self):
        return self.headers.get("Authorization", "").removeprefix("Bearer ")

    def _signed_in(self):
        if not self._token:
            raise Refusal(401, "", "Invalid username or password.")

    def _may_write(self):
        self._signed_in()
        if self._token != TOKEN:
            raise Refusal(403, "", "you must use a write token to upload to a repository.")

    def _repo(self, kind, name):
        repo = self.hub.repos.get((kind, name))
        if repo is None or (repo.private and not self._token):
            raise Refusal(404 if self._token else 401, "RepoNotFound", "Repository not found")
        return repo

    def _commit(self, repo, revision):
        hash = repo.resolve(revision)
        if hash is None:
            raise Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return hash, repo.commits[hash]

    def whoami(self):
        self._signed_in()
        self._json({"type": "user", "name": USER, "fullname": USER, "orgs": [], "auth": {"type": "access_token"}})

    def create(self):
        self._may_write()
        wanted = json.loads(self.body)
        name = f"{wanted.get('organization') or USER}/{wanted['name']}"
        key = (wanted.get("type") or "model", name)
        url = f"{self.hub.url}/{'' if key[0] == 'model' else key[0] + 's/'}{name}"
        if key in self.hub.repos:
            error = "You already created this repo"
            return self._json({"error": error, "url": url}, 409, {"X-Error-Message": error})
        private = wanted.get("visibility") == "private" or bool(wanted.get("private"))
        self.hub.repos[key] = Repo(private)
        self.hub.repos[key].commit({}, message="initial commit")
        self._json({"url": url, "name": name, "id": "1"})

    def delete(self):
        self._may_write()
        wanted = json.loads(self.body)
        name = f"{wanted.get('organization') or USER}/{wanted['name']}"
        self._repo(wanted.get("type") or "model", name)
        del self.hub.repos[wanted.get("type") or "model", name]
        self._json({})

    def validate(self):
        """Look at a card's metadata: the Hub knows pipelines, and takes no folder for a model."""
        found = re.match(r"---\r?\n(.*?)\r?\n---", json.loads(self.body)["content"], re.DOTALL)
        errors = []
        try:
            metadata = yaml.safe_load(found[1]) if found else {}
            for key in ("base_model", "datasets"):
                names = metadata.get(key) or []
                for name in [names] if isinstance(names, str) else names:
                    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
                        errors.append(f'"{key}" with value "{name}" is not valid')
            if metadata.get("pipeline_tag", "robotics") != "robotics":
                errors.append('"pipeline_tag" is not known')
        except yaml.YAMLError as error:
            errors.append(f"the metadata are no YAML: {error}")
        problems = [{"message": error} for error in errors]
        self._json({"errors": problems, "warnings": []}, 400 if errors else 200)

    def info(self, kind, name, revision="main"):
        repo = self._repo(PREFIXES[kind], name)
        hash, files = self._commit(repo, revision)
        siblings = [{"rfilename": path} for path in sorted(files)]
        modified = "2024-01-01T00:00:00.000Z"
        about = {"id": name, "private": repo.private, "tags": [], "likes": 0, "downloads": 0, "gated": False}
        self._json(about | {"sha": hash, "siblings": siblings, "lastModified": modified, "createdAt": modified})

    def refs(self, kind, name):
        repo = self._repo(PREFIXES[kind], name)

        def listed(names, kind):
            return [{"name": n, "ref": f"refs/{kind}/{n}", "targetCommit": hash} for n, hash in names.items()]

        self._json({"branches": listed(repo.branches, "heads"), "tags": listed(repo.tags, "tags"), "converts": []})

    def commits(self, kind, name, revision):
        hash, _ = self._commit(self._repo(PREFIXES[kind], name), revision)
        self._json([{"id": hash, "title": "", "message": "", "date": "2024-01-01T00:00:00.000Z", "authors": []}])

    def tree(self, kind, name, revision, folder=None):
        _, files = self._commit(self._repo(PREFIXES[kind], name), revision)
        start = f"{folder}/" if folder else ""
        inside = {path: blob for path, blob in files.items() if path.startswith(start)}
        if folder and not inside:
            raise Refusal(404, "EntryNotFound", f"{folder} does not exist on {revision!r}")
        entries = {}
        for path, blob in inside.items():
            parts = path.removeprefix(start).split("/")
            for depth in range(1, len(parts)):
                above = start + "/".join(parts[:depth])
                entries[above] = {"type": "directory", "path": above, "size": 0, "oid": "0" * 40}
            entries[path] = blob.entry(path)
        if self.query.get("recursive", ["False"])[0].lower() not in ("true", "1"):
            entries = {path: entry for path, entry in entries.items() if "/" not in path.removeprefix(start)}
        self._json([entries[path] for path in sorted(entries)])

    def paths_info(self, kind, name, revision):
        _, files = self._commit(self._repo(PREFIXES[kind], name), revision)
        is_json = "json" in self.headers.get("Content-Type", "")
        form = json.loads(self.body) if is_json else parse_qs(self.body.decode())
        found = []
        for path in form.get("paths", []):
            if path in files:
                found.append(files[path].entry(path))
            elif any(file.startswith(path.rstrip("/") + "/") for file in files):
                found.append({"type": "directory", "path": path, "size": 0, "oid": "0" * 40})
        self._json(found)

    def resolve(self, kind, name, revision, path):
        repo = self._repo(PREFIXES[(kind or "models/").rstrip("/")], name)
        hash, files = self._commit(repo, revision)
        if repo.gated and self._token != TOKEN:
            raise Refusal(403, "GatedRepo", f"Access to model {name} is restricted.")
        if path not in files:
            headers = {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found", "X-Repo-Commit": hash}
            return self._json({"error": "Entry not found"}, 404, headers)
        blob = files[path]
        headers = {"X-Repo-Commit": hash, "ETag": f'"{blob.oid}"', "Accept-Ranges": "bytes"}
        if blob.lfs:
            headers |= {"X-Linked-Etag": f'"{blob.sha256}"', "X-Linked-Size": blob.size}
        first, last = 0, blob.size - 1
        if wanted := re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", "")):
            first, last = (int(part) if part else None for part in wanted.groups())
            if first is None:
                first, last = max(blob.size - last, 0), blob.size - 1
            last = blob.size - 1 if last is None else min(last, blob.size - 1)
            if first > last:
                return self._send(b"", 416, {"Content-Range": f"bytes */{blob.size}"})
            headers["Content-Range"] = f"bytes {first}-{last}/{blob.size}"
        with open(self.hub.folder / blob.sha256, "rb") as file:
            file.seek(first)
            data = b"" if self.command == "HEAD" else file.read(last - first + 1)
        self._send(data, 206 if wanted else 200, headers, size=last - first + 1)

    def preupload(self, kind, name, revision):
        self._may_write()
        repo = self._repo(PREFIXES[kind], name)
        files = repo.commits[repo.resolve(revision)]
        wanted = [(file["path"], Path(file["path"]).suffix in LFS_SUFFIXES) for file in json.loads(self.body)["files"]]
        answer = [
            {
                "path": path,
                "uploadMode": "lfs" if lfs else "regular",
                "shouldIgnore": False,
                "oid": files[path].oid if path in files else None,
            }
            for path, lfs in wanted
        ]
        self._json({"files": answer})

    def batch(self, kind, name):
        self._may_write()
        self._repo(PREFIXES[(kind or "models/").rstrip("/")], name)
        objects = []
        for wanted in json.loads(self.body)["objects"]:
            known = (self.hub.folder / wanted["oid"]).is_file()
            upload = {"upload": {"href": f"{self.hub.url}/lfs/{wanted['oid']}"}}
            objects.append(wanted | ({} if known else {"actions": upload}))
        self._json({"transfer": "basic", "objects": objects})

    def put(self, oid):
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise Refusal(400, "", "the content is not what its number says")
        (self.hub.folder / oid).write_bytes(self.body)
        self._send(b"")

    def commit(self, kind, name, revision):
        self._may_write()
        repo = self._repo(PREFIXES[kind], name)
        _, files = self._commit(repo, revision)
        files, message = dict(files), ""
        for line in self.body.decode().splitlines():
            key, value = (json.loads(line)[part] for part in ("key", "value"))
            if key == "header":
                message = value["summary"]
                if value.get("parentCommit") not in (None, repo.resolve(revision)):
                    raise Refusal(412, "", "A commit has happened since. Please refresh and try again.")
                continue
            path = value["path"]
            if key == "file":
                files[path] = self.hub.keep(base64.b64decode(value["content"]), path, lfs=False)
            elif key == "lfsFile":
                if not (self.hub.folder / value["oid"]).is_file():
                    raise Refusal(400, "", f"{path}: its content was not uploaded")
                size = (self.hub.folder / value["oid"]).stat().st_size
                files[path] = Blob(value["oid"], value["oid"], size, True)
            elif key == "deletedFile":
                if path not in files:
                    raise Refusal(404, "EntryNotFound", "A file with this name doesn't exist")
                del files[path]
            else:
                start = path.rstrip("/") + "/"
                files = {file: blob for file, blob in files.items() if not file.startswith(start)}
        hash = repo.commit(files, revision, message)
        prefix = "" if kind == "models" else kind + "/"
        url = f"{self.hub.url}/{prefix}{name}/commit/{hash}"
        self._json({"success": True, "commitUrl": url, "commitOid": hash, "hookOutput": ""})

    def reference(self, kind, name, what, revision):
        self._may_write()
        repo = self._repo(PREFIXES[kind], name)
        wanted = json.loads(self.body or b"{}")
        names = repo.tags if what == "tag" else repo.branches
        new = wanted.get("tag") if what == "tag" else revision
        if self.command == "DELETE":
            if names.pop(revision, None) is None:
                raise Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        elif new in names:
            raise Refusal(409, "", f"Reference {new} exists already")
        else:
            start = revision if what == "tag" else wanted.get("startingPoint", "main")
            names[new] = self._commit(repo, start)[0]
        self._json({})


API, NAME = "/api/(datasets|models|spaces)/", "([^/]+/[^/]+)"
ROUTES = [
    (["GET"], "/api/whoami-v2", Handler.whoami),
    (["POST"], "/api/repos/create", Handler.create),
    (["DELETE"], "/api/repos/delete", Handler.delete),
    (["POST"], "/api/validate-yaml", Handler.validate),
    (["GET"], f"{API}{NAME}", Handler.info),
    (["GET"], f"{API}{NAME}/revision/([^/]+)", Handler.info),
    (["GET"], f"{API}{NAME}/refs", Handler.refs),
    (["GET"], f"{API}{NAME}/commits/([^/]+)", Handler.commits),
    (["GET"], f"{API}{NAME}/tree/([^/]+)", Handler.tree),
    (["GET"], f"{API}{NAME}/tree/([^/]+)/(.+)", Handler.tree),
    (["POST"], f"{API}{NAME}/paths-info/([^/]+)", Handler.paths_info),
    (["POST"], f"{API}{NAME}/preupload/([^/]+)", Handler.preupload),
    (["POST"], f"{API}{NAME}/commit/([^/]+)", Handler.commit),
    (["POST", "DELETE"], f"{API}{NAME}/(tag|branch)/([^/]+)", Handler.reference),
    (["POST"], rf"/(datasets/|spaces/)?{NAME}\.git/info/lfs/objects/batch", Handler.batch),
    (["PUT"], "/lfs/([0-9a-f]{64})", Handler.put),
    (["GET", "HEAD"], f"/(datasets/|spaces/)?{NAME}/resolve/([^/]+)/(.+)", Handler.resolve),
]
