"""A Hub on loopback: enough of huggingface.co's protocol for its own client libraries to resolve, download and upload."""
import base64
import hashlib
import json
import re
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

SHA = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_" + "TokenOfTheLoopbackHub"
ROUTE = re.compile(r"/(?P<api>api/)?(?P<kind>models/|datasets/)?(?P<repo>[\w.-]+/[\w.-]+)/(?P<call>revision|tree|paths-info|resolve)/[\w.-]+/?(?P<path>.*)")


class Handler(BaseHTTPRequestHandler):
    """Answers for the repositories and notes the requests that its server holds."""
    protocol_version = "HTTP/1.1"

    def answer(self, status: int, content: bytes = b"", **headers):
        self.send_response(status)
        for name, value in ({"Content-Length": len(content)} | headers).items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def route(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.requests.append(f"{self.command} {self.path}")
        if self.upload(self.path.split("?")[0], body):
            return
        found = ROUTE.fullmatch(self.path.split("?")[0])
        root = found and self.server.repositories.get((found["kind"] or "models/") + found["repo"])
        if not root:
            return self.answer(404, X_Error_Code="RepoNotFound")
        files = {str(path.relative_to(root)): path for path in sorted(root.rglob("*")) if path.is_file()}
        if found["call"] == "resolve":
            return self.file(files.get(found["path"]))
        entries = [{"type": "file", "path": name, "size": path.stat().st_size, "oid": etag(path)} for name, path in files.items()]
        if found["call"] == "tree":
            entries += [{"type": "directory", "path": str(path.relative_to(root)), "size": 0, "oid": SHA} for path in root.rglob("*") if path.is_dir()]
            below = [(entry, Path(entry["path"]).parents) for entry in entries]
            if "recursive=true" in self.path.lower():
                entries = [entry for entry, parents in below if Path(found["path"]) in parents]
            else:
                entries = [entry for entry, parents in below if Path(found["path"]) == parents[0]]
        if found["call"] == "paths-info":
            asked = json.loads(body)["paths"] if body.startswith(b"{") else re.findall(rb"paths=([^&]+)", body)
            asked = {path if isinstance(path, str) else path.decode().replace("%2F", "/") for path in asked}
            entries = [entry for entry in entries if entry["path"] in asked]
        if found["call"] == "revision":
            entries = {"id": found["repo"], "sha": SHA, "siblings": [{"rfilename": name} for name in files], "private": False,
                       "gated": False, "disabled": False, "tags": [], "downloads": 0, "likes": 0}
        self.answer(200, json.dumps(entries).encode(), Content_Type="application/json")

    def file(self, path: Path | None):
        if path is None:
            return self.answer(404, X_Error_Code="EntryNotFound")
        content, status, extra = path.read_bytes(), 200, {}
        if asked := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first, last = int(asked[1]), int(asked[2] or len(content) - 1)
            status, extra = 206, {"Content_Range": f"bytes {first}-{last}/{len(content)}"}
            content = content[first:last + 1]
        self.answer(status, content, ETag=f'"{etag(path)}"', X_Repo_Commit=SHA, Accept_Ranges="bytes", **extra)

    def upload(self, path: str, body: bytes) -> bool:
        """Answers what an upload asks for, safetensors by git-lfs as on the Hub; False for any other request."""
        asked = re.fullmatch(r"/api/(?:repos/(create)|(validate-yaml)|models/(?P<repo>[^/]+/[^/]+)/(preupload|commit)/main)|/(?P<lfs>.+)\.git/info/lfs/objects/batch|"
                             r"/lfs/(?P<oid>\w+)", path)
        if not asked or self.command == "GET":
            return False
        if not asked["oid"] and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self.answer(401, json.dumps({"error": "Invalid username or password."}).encode())
            return True
        answer = {"errors": [], "warnings": []}  # to validate-yaml
        if asked[1]:
            raw = json.loads(body)
            repo = f"{raw.get('organization') or 'me'}/{raw['name']}"
            self.server.repositories.setdefault(f"models/{repo}", self.server.uploads / repo).mkdir(parents=True, exist_ok=True)
            answer = {"url": f"http://{self.headers['Host']}/{repo}", "name": repo, "id": repo}
        elif asked[4] == "preupload":
            modes = [(file["path"], "lfs" if file["path"].endswith(".safetensors") else "regular") for file in json.loads(body)["files"]]
            answer = {"files": [{"path": name, "uploadMode": mode, "shouldIgnore": False} for name, mode in modes]}
        elif asked["lfs"]:
            answer = {"transfer": "basic", "objects": [{"oid": one["oid"], "size": one["size"], "authenticated": True, "actions": {
                "upload": {"href": f"http://{self.headers['Host']}/lfs/{one['oid']}"}}} for one in json.loads(body)["objects"]]}
        elif asked["oid"]:
            assert hashlib.sha256(body).hexdigest() == asked["oid"]
            self.server.blobs[asked["oid"]] = body
        elif asked[4] == "commit":
            root = self.server.repositories[f"models/{asked['repo']}"]
            for line in map(json.loads, body.splitlines()):
                if line["key"] in ("file", "lfsFile"):
                    value = line["value"]
                    content = base64.b64decode(value["content"]) if line["key"] == "file" else self.server.blobs[value["oid"]]
                    (root / value["path"]).write_bytes(content)
            answer = {"success": True, "commitUrl": f"http://{self.headers['Host']}/{asked['repo']}/commit/{SHA}", "commitOid": SHA}
        self.answer(200, json.dumps(answer).encode(), Content_Type="application/json")
        return True

    do_GET = do_HEAD = do_POST = do_PUT = route

    def log_message(self, *_):
        pass


@contextmanager
def serving(repositories: dict[str, Path], uploads: Path | None = None):
    """Serves {"models/owner/name" or "datasets/owner/name": directory}; gives (address, list of the requests so far).

    What bearers of TOKEN upload goes into `uploads` and is then served too.
    """
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.repositories, server.requests, server.uploads, server.blobs = repositories, [], uploads, {}
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", server.requests
    finally:
        server.shutdown()
        server.server_close()


def etag(path: Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()
