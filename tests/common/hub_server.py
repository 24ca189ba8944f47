"""A Hub on the loopback interface: repositories in memory, enough of the API to push and load models and data sets."""

import base64
import hashlib
import json
import re
import secrets
import threading
import traceback
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

from .card_rules import card_errors


__all__ = ["HubServer"]

REPO = r"/(?P<kind>models|datasets|spaces)/(?P<repo>[^/]+/[^/]+)"


class HubServer:
    """Context manager around the server.

    Attributes: `url`, `repos` (`("model", "me/name")` to branch heads and the files of every commit) and `requests`
    (method and path of every request). `environment(home)` gives the variables that make a subprocess use it.

    Example:
        ```python
        with HubServer() as hub:
            run_python("...", env=hub.environment(tmp_path / "home"))
            assert "config.json" in hub.files("me/model")
        ```
    """

    def __init__(self):
        self.repos: dict[tuple[str, str], dict] = {}
        self.blobs: dict[str, bytes] = {}  # LFS objects by sha256
        self.requests: list[str] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "HubServer":
        self._thread.start()
        return self

    def __exit__(self, *error) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def environment(self, home: Path) -> dict[str, str]:
        """Variables for a subprocess; `home` is its own, empty cache. They act only if set before the first import."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_TOKEN": "hf_dummy",
            "HF_HOME": str(home),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_XET": "1",
            "NO_PROXY": "127.0.0.1",
        }

    def files(self, repo: str, kind: str = "model", revision: str = "main") -> dict[str, bytes]:
        """The files at the head of a branch."""
        entry = self.repos[kind, repo]
        return entry["commits"][entry["heads"][revision]]

    def create(self, repo: str, kind: str = "model") -> bool:
        if (kind, repo) in self.repos:
            return False
        sha = secrets.token_hex(20)
        self.repos[kind, repo] = {"heads": {"main": sha}, "commits": {sha: {}}}
        return True

    def commit(self, repo: str, changes: list[dict], kind: str = "model", revision: str = "main") -> str:
        entry = self.repos[kind, repo]
        files = dict(entry["commits"][entry["heads"][revision]])
        for change in changes:
            value = change["value"]
            if change["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif change["key"] == "lfsFile":
                files[value["path"]] = self.blobs[value["oid"]]
            elif change["key"] == "deletedFile":
                files.pop(value["path"], None)
            elif change["key"] == "deletedFolder":
                files = {name: data for name, data in files.items() if not name.startswith(value["path"] + "/")}
        sha = secrets.token_hex(20)
        entry["commits"][sha] = files
        entry["heads"][revision] = sha
        return sha


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments):
        pass

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            parts = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _send(self, status: int, data: bytes = b"", kind: str = "application/json", **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(data)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _json(self, value, status: int = 200) -> None:
        self._send(status, json.dumps(value).encode())

    def _missing(self, code: str) -> None:
        self._send(404, json.dumps({"error": code}).encode(), X_Error_Code=code, X_Error_Message=code)

    def _handle(self) -> None:
        url = urlsplit(self.path)
        path = unquote(url.path)
        self.hub.requests.append(f"{self.command} {path}")
        body = self._body()
        for pattern, method in _ROUTES:
            if found := re.fullmatch(pattern, f"{self.command} {path}"):
                try:
                    return getattr(self, method)(body, parse_qs(url.query), **found.groupdict())
                except Exception:  # a mistake in here: said at once, where a dropped connection would be retried
                    return self._send(400, traceback.format_exc().encode(), "text/plain")
        return self._missing("EntryNotFound")

    do_GET = do_HEAD = do_POST = do_PUT = _handle

    def _snapshot(self, kind: str, repo: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """Commit id and files; answers 404 itself when there is no such repository or revision."""
        entry = self.hub.repos.get((kind.removesuffix("s"), repo))
        if entry is None:
            return self._missing("RepoNotFound")
        sha = entry["heads"].get(revision, revision)
        if sha not in entry["commits"]:
            return self._missing("RevisionNotFound")
        return sha, entry["commits"][sha]

    def whoami(self, body, query):
        self._json({"type": "user", "name": "me", "fullname": "Me", "orgs": [], "auth": {"type": "access_token"}})

    def create(self, body, query):
        wanted = json.loads(body)
        repo = f"{wanted.get('organization') or 'me'}/{wanted['name']}"
        kind = wanted.get("type") or "model"
        is_new = self.hub.create(repo, kind)
        prefix = "" if kind == "model" else f"{kind}s/"
        self._json({"url": f"{self.hub.url}/{prefix}{repo}", "name": repo}, 200 if is_new else 409)

    def validate(self, body, query):
        errors = card_errors(json.loads(body)["content"])
        self._json({"errors": [{"message": error} for error in errors], "warnings": []}, 400 if errors else 200)

    def preupload(self, body, query, kind, repo, revision):
        if self._snapshot(kind, repo, revision) is None:
            return
        # data sets delete their temporary parquet files early, so these go the LFS way; everything else inline
        files = json.loads(body)["files"]
        modes = [(file["path"], "lfs" if file["path"].endswith(".parquet") else "regular") for file in files]
        self._json({"files": [{"path": path, "uploadMode": mode, "shouldIgnore": False} for path, mode in modes]})

    def commit(self, body, query, kind, repo, revision):
        if self._snapshot(kind, repo, revision) is None:
            return
        sha = self.hub.commit(repo, [json.loads(line) for line in body.splitlines()], kind.removesuffix("s"), revision)
        self._json({"commitUrl": f"{self.hub.url}/{repo}/commit/{sha}", "commitOid": sha, "success": True})

    def branch(self, body, query, kind, repo, revision):
        if (snapshot := self._snapshot(kind, repo, "main")) is None:
            return
        heads = self.hub.repos[kind.removesuffix("s"), repo]["heads"]
        is_new = revision not in heads
        heads.setdefault(revision, snapshot[0])
        self._json({}, 200 if is_new else 409)

    def info(self, body, query, kind, repo, revision):
        if (snapshot := self._snapshot(kind, repo, revision or "main")) is None:
            return
        sha, files = snapshot
        siblings = [{"rfilename": name} for name in sorted(files)]
        self._json({"id": repo, "modelId": repo, "sha": sha, "private": False, "tags": [], "siblings": siblings})

    def tree(self, body, query, kind, repo, revision, folder):
        if (snapshot := self._snapshot(kind, repo, revision)) is None:
            return
        recursive = query.get("recursive", [""])[0].lower() in ("true", "1")
        prefix = f"{folder.strip('/')}/" if folder and folder.strip("/") else ""
        entries = {}
        for name, data in snapshot[1].items():
            if name.startswith(prefix):
                head, _, rest = name[len(prefix) :].partition("/")
                if rest:
                    entries[prefix + head] = {"type": "directory", "path": prefix + head, "oid": "0" * 40, "size": 0}
                if not rest or recursive:
                    entries[name] = _entry(name, data)
        if prefix and not entries:
            return self._missing("EntryNotFound")
        self._json(list(entries.values()))

    def paths_info(self, body, query, kind, repo, revision):
        if (snapshot := self._snapshot(kind, repo, revision)) is None:
            return
        try:
            paths = json.loads(body)["paths"]
        except ValueError:
            paths = parse_qs(body.decode()).get("paths", [])
        self._json([_entry(name, snapshot[1][name]) for name in paths if name in snapshot[1]])

    def resolve(self, body, query, kind, repo, revision, name):
        if (snapshot := self._snapshot(kind or "model", repo, revision)) is None:
            return
        sha, files = snapshot
        if name not in files:
            return self._missing("EntryNotFound")
        data = files[name]
        headers = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X_Repo_Commit": sha, "Accept_Ranges": "bytes"}
        if found := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start, end = int(found[1]), min(int(found[2] or len(data) - 1), len(data) - 1)
            headers["Content_Range"] = f"bytes {start}-{end}/{len(data)}"
            return self._send(206, data[start : end + 1], "application/octet-stream", **headers)
        self._send(200, data, "application/octet-stream", **headers)

    def lfs_batch(self, body, query):
        objects = json.loads(body)["objects"]
        href = {file["oid"]: {"upload": {"href": f"{self.hub.url}/lfs/{file['oid']}"}} for file in objects}
        answer = [{**file, "authenticated": True, "actions": href[file["oid"]]} for file in objects]
        self._send(200, json.dumps({"transfer": "basic", "objects": answer}).encode(), "application/vnd.git-lfs+json")

    def lfs_put(self, body, query, oid):
        self.hub.blobs[oid] = body
        self._send(200)


def _entry(name: str, data: bytes) -> dict:
    return {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}


_ROUTES = [
    (r"GET /api/whoami-v2", "whoami"),
    (r"POST /api/repos/create", "create"),
    (r"POST /api/validate-yaml", "validate"),
    (rf"POST /api{REPO}/preupload/(?P<revision>.+)", "preupload"),
    (rf"POST /api{REPO}/commit/(?P<revision>.+)", "commit"),
    (rf"POST /api{REPO}/branch/(?P<revision>.+)", "branch"),
    (rf"GET /api{REPO}(/revision/(?P<revision>.+))?", "info"),
    (rf"GET /api{REPO}/tree/(?P<revision>[^/]+)(?P<folder>/.*)?", "tree"),
    (rf"POST /api{REPO}/paths-info/(?P<revision>.+)", "paths_info"),
    (r"POST /(?:datasets/|spaces/)?[^/]+/[^/]+\.git/info/lfs/objects/batch", "lfs_batch"),
    (r"PUT /lfs/(?P<oid>\w+)", "lfs_put"),
    (
        r"(?:GET|HEAD) /(?:(?P<kind>datasets|spaces)/)?(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<name>.+)",
        "resolve",
    ),
]
