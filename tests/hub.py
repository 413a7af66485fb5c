"""A Hub on loopback: as much of huggingface.co's protocol as its own client libraries ask for."""

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import parse_qs

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_" + "TokenOfTheLoopbackHub"

# A request to read: /api/models/owner/name/tree/main/folder, /owner/name/resolve/main/file
READ = re.compile(
    r"/(?:api/)?(?P<kind>models/|datasets/)?(?P<repo>[\w.-]+/[\w.-]+)"
    r"/(?P<call>revision|tree|paths-info|resolve)/(?P<revision>[\w.-]+)/?(?P<path>.*)"
)
RANGE = re.compile(r"bytes=(?P<first>\d+)-(?P<last>\d*)")


class Handler(BaseHTTPRequestHandler):
    """Answers for the repositories of its server, which notes every request."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        path, body = self.receive()
        self.read(path, body)

    do_HEAD = do_GET

    def do_POST(self) -> None:
        path, body = self.receive()
        for pattern, write in WRITES.items():
            call = re.fullmatch(pattern, path)
            if call:
                return write(self, body, **call.groupdict())
        self.read(path, body)

    do_PUT = do_POST

    def receive(self) -> tuple[str, bytes]:
        """Notes the request and returns its path and its body."""
        self.server.requests.append(f"{self.command} {self.path}")
        length = int(self.headers.get("Content-Length") or 0)
        return self.path.split("?")[0], self.rfile.read(length)

    def answer(self, status: int, content: bytes = b"", **headers) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": len(content)} | headers).items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def answer_json(self, value) -> None:
        self.answer(200, json.dumps(value).encode(), Content_Type="application/json")

    def log_message(self, *_) -> None:
        pass  # the tests' output is not the place

    # ---- Reading ----------------------------------------------------------------------------

    def read(self, path: str, body: bytes) -> None:
        call = READ.fullmatch(path)
        revisions = None
        if not call:  # what there is to know about a repository, at its main revision
            call = READ.fullmatch(f"{path}/revision/main")
        if call:
            name = (call["kind"] or "models/") + call["repo"]
            revisions = self.server.repositories.get(name)
        if revisions is None:
            return self.answer(404, X_Error_Code="RepoNotFound")
        if isinstance(revisions, Path):
            revisions = {"main": revisions}
        commits = {name: commit_of(name) for name in revisions}
        for revision, root in revisions.items():
            if call["revision"] in (revision, commits[revision]):
                return self.read_revision(call, commits[revision], root, body)
        self.answer(404, X_Error_Code="RevisionNotFound")

    def read_revision(self, call: re.Match, commit: str, root: Path, body: bytes) -> None:
        if call["call"] == "resolve":
            return self.send_file(root / call["path"], commit)
        if call["call"] == "revision":
            return self.answer_json(
                repository(call["repo"], commit, root)
                | {"private": call["repo"] in self.server.private}
            )
        if call["call"] == "tree":
            return self.answer_json(self.tree(root, call["path"]))
        wanted = wanted_paths(body)
        self.answer_json([entry for entry in file_entries(root) if entry["path"] in wanted])

    def tree(self, root: Path, folder: str) -> list[dict]:
        """Returns what is in a folder, and with ?recursive=true all that is below it."""
        is_recursive = "recursive=true" in self.path.lower()
        entries = []
        for entry in file_entries(root) + folder_entries(root):
            parents = Path(entry["path"]).parents
            if Path(folder) == parents[0] or is_recursive and Path(folder) in parents:
                entries.append(entry)
        return entries

    def send_file(self, path: Path, commit: str) -> None:
        """Sends a file, or the part of it that the client asks for to resume a download."""
        if not path.is_file():
            return self.answer(404, X_Error_Code="EntryNotFound")
        content = path.read_bytes()
        headers = {
            "ETag": f'"{etag(path)}"',
            "X_Repo_Commit": commit,
            "Accept_Ranges": "bytes",
        }
        part = RANGE.fullmatch(self.headers.get("Range", ""))
        if not part:
            return self.answer(200, content, **headers)
        first = int(part["first"])
        last = int(part["last"] or len(content) - 1)
        headers["Content_Range"] = f"bytes {first}-{last}/{len(content)}"
        self.answer(206, content[first : last + 1], **headers)

    # ---- Uploading --------------------------------------------------------------------------

    def is_allowed(self) -> bool:
        if self.headers.get("Authorization") == f"Bearer {TOKEN}":
            return True
        self.answer(401, json.dumps({"error": "Invalid username or password."}).encode())
        return False

    def create_repository(self, body: bytes) -> None:
        if not self.is_allowed():
            return
        request = json.loads(body)
        repo = f"{request.get('organization') or 'me'}/{request['name']}"
        is_new = f"models/{repo}" not in self.server.repositories
        # Older clients say {"private": true}.
        is_private = request.get("private") or request.get("visibility") == "private"
        if is_new and is_private:
            self.server.private.add(repo)
        root = self.server.repositories.setdefault(f"models/{repo}", self.server.uploads / repo)
        root.mkdir(parents=True, exist_ok=True)
        url = f"http://{self.headers['Host']}/{repo}"
        self.answer_json({"url": url, "name": repo, "id": repo})

    def validate_card(self, body: bytes) -> None:
        if self.is_allowed():
            self.answer_json({"errors": [], "warnings": []})

    def choose_modes(self, body: bytes, repo: str) -> None:
        """Says which files come by git-lfs: as on the Hub, safetensors do."""
        if not self.is_allowed():
            return
        files = []
        for file in json.loads(body)["files"]:
            mode = "lfs" if file["path"].endswith(".safetensors") else "regular"
            files.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False})
        self.answer_json({"files": files})

    def plan_lfs(self, body: bytes, repo: str) -> None:
        """Says where each large file is to be sent."""
        if not self.is_allowed():
            return
        objects = []
        for file in json.loads(body)["objects"]:
            upload = {"href": f"http://{self.headers['Host']}/lfs/{file['oid']}"}
            objects.append(file | {"authenticated": True, "actions": {"upload": upload}})
        self.answer_json({"transfer": "basic", "objects": objects})

    def receive_lfs(self, body: bytes, oid: str) -> None:
        assert hashlib.sha256(body).hexdigest() == oid
        self.server.blobs[oid] = body
        self.answer_json({})

    def commit(self, body: bytes, repo: str) -> None:
        if not self.is_allowed():
            return
        root = self.server.repositories[f"models/{repo}"]
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                (root / value["path"]).write_bytes(base64.b64decode(value["content"]))
            elif entry["key"] == "lfsFile":
                (root / value["path"]).write_bytes(self.server.blobs[value["oid"]])
        url = f"http://{self.headers['Host']}/{repo}/commit/{COMMIT}"
        self.answer_json({"success": True, "commitUrl": url, "commitOid": COMMIT})


# Requests that upload, by their paths.
WRITES = {
    r"/api/repos/create": Handler.create_repository,
    r"/api/validate-yaml": Handler.validate_card,
    r"/api/models/(?P<repo>[^/]+/[^/]+)/preupload/main": Handler.choose_modes,
    r"/(?P<repo>[^/]+/[^/]+)\.git/info/lfs/objects/batch": Handler.plan_lfs,
    r"/lfs/(?P<oid>\w+)": Handler.receive_lfs,
    r"/api/models/(?P<repo>[^/]+/[^/]+)/commit/main": Handler.commit,
}


def commit_of(revision: str) -> str:
    """Returns the commit that a branch or a tag stands for, in every repository."""
    return COMMIT if revision == "main" else hashlib.sha1(revision.encode()).hexdigest()


def repository(name: str, commit: str, root: Path) -> dict:
    """Returns what the Hub says about a repository."""
    return {
        "id": name,
        "sha": commit,
        "siblings": [{"rfilename": entry["path"]} for entry in file_entries(root)],
        "gated": False,
        "disabled": False,
        "tags": [],
        "downloads": 0,
        "likes": 0,
    }


def file_entries(root: Path) -> list[dict]:
    return [
        {
            "type": "file",
            "path": str(path.relative_to(root)),
            "size": path.stat().st_size,
            "oid": etag(path),
        }
        for path in sorted(root.rglob("*"))
        if path.is_file()
    ]


def folder_entries(root: Path) -> list[dict]:
    return [
        {"type": "directory", "path": str(path.relative_to(root)), "size": 0, "oid": COMMIT}
        for path in sorted(root.rglob("*"))
        if path.is_dir()
    ]


def wanted_paths(body: bytes) -> list[str]:
    """Returns the paths that a paths-info request names, as JSON or as a form."""
    if body.startswith(b"{"):
        return json.loads(body)["paths"]
    return parse_qs(body.decode())["paths"]


def etag(path: Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()


@contextmanager
def serving(
    repositories: dict[str, Path | dict[str, Path]], uploads: Path | None = None
) -> Iterator[tuple[str, list[str]]]:
    """Serves {"models/owner/name" or "datasets/owner/name": directory or {revision: directory}}.

    Yields the address and the list of all requests so far. What bearers of TOKEN upload goes into
    the directory `uploads`, and is then served too.
    """
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.repositories = dict(repositories)
    server.private = set()
    server.requests = []
    server.uploads = uploads
    server.blobs = {}
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", server.requests
    finally:
        server.shutdown()
        server.server_close()
