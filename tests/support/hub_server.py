"""A small Hugging Face hub on the loopback interface for the real `datasets` client; it serves a dictionary of files.

    with HubServer({"owner/name": {"main": {"data/train.parquet": b"..."}}}) as hub:
        subprocess.run(command, env=hub.environment(tmp_path))

From the command line it serves a folder: python -m tests.support.hub_server OWNER/NAME FOLDER
"""

import hashlib
import json
import os
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Self
from urllib.parse import parse_qs, unquote, urlsplit

Repository = dict[str, dict[str, bytes]]  # revision -> path -> content


def commit_of(files: dict[str, bytes]) -> str:
    return hashlib.sha1(b"\0".join(name.encode() + b"\0" + files[name] for name in sorted(files))).hexdigest()


class HubServer:
    """Serves repositories; `requests` lists (method, path) of every request."""

    def __init__(self, repositories: dict[str, Repository]) -> None:
        self.repositories = repositories
        self.requests: list[tuple[str, str]] = []

        class Handler(_Handler):
            pass

        Handler.hub = self
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"

    def environment(self, home: Path, **variables: str) -> dict[str, str]:
        """The environment of a process that uses this server as the hub, with its cache in `home`."""
        return os.environ | {"HF_ENDPOINT": self.endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"} | variables

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer()

    do_HEAD = do_POST = do_GET

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append((self.command, path))
        for name, revisions in self.hub.repositories.items():
            for prefix, handle in ((f"/api/datasets/{name}", self._api), (f"/datasets/{name}/resolve", self._file)):
                if path == prefix or path.startswith(prefix + "/"):
                    commits = {commit_of(files): files for files in revisions.values()}
                    handle(name, revisions | commits, path.removeprefix(prefix).strip("/"), body)
                    return
        self._fail("RepoNotFound", 401)  # as the hub answers a client without a token

    def _api(self, name: str, revisions: Repository, path: str, body: bytes) -> None:
        endpoint, _, path = (path or "revision/main").partition("/")
        revision, _, folder = path.partition("/")
        if revision not in revisions:
            self._fail("RevisionNotFound", 404)
            return
        files = revisions[revision]
        rows: list[dict[str, object]] = []
        for file, content in files.items():
            rows.append({"type": "file", "path": file, "size": len(content), "oid": hashlib.sha1(content).hexdigest()})
        folders = {str(parent) for file in files for parent in Path(file).parents} - {"."}
        rows += [{"type": "directory", "path": path, "size": 0, "oid": "0" * 40} for path in sorted(folders)]
        if endpoint == "revision":
            siblings = [{"rfilename": file} for file in files]
            self._json({"id": name, "sha": commit_of(files), "siblings": siblings, "tags": [], "private": False})
        elif endpoint == "tree":
            is_recursive = "recursive=True" in self.path or "recursive=true" in self.path
            below = [row for row in rows if not folder or str(row["path"]).startswith(folder + "/")]
            inside = [row for row in below if str(Path(str(row["path"])).parent) == (folder or ".")]
            if folder and not below:
                self._fail("EntryNotFound", 404)
            else:
                self._json(below if is_recursive else inside)
        elif endpoint == "paths-info":
            is_json = "json" in self.headers.get("Content-Type", "")
            paths = json.loads(body)["paths"] if is_json else parse_qs(body.decode())["paths"]
            self._json([row for row in rows if row["path"] in paths])
        else:
            self._fail("EntryNotFound", 404)

    def _file(self, name: str, revisions: Repository, path: str, body: bytes) -> None:
        revision, _, file = path.partition("/")
        if revision not in revisions:
            self._fail("RevisionNotFound", 404)
            return
        files = revisions[revision]
        if file not in files:
            self._fail("EntryNotFound", 404, {"X-Repo-Commit": commit_of(files)})
            return
        tag = hashlib.sha1(files[file]).hexdigest()
        headers = {"ETag": f'"{tag}"', "X-Repo-Commit": commit_of(files)}
        self._send(200, files[file], "application/octet-stream", headers)

    def _json(self, value: object) -> None:
        self._send(200, json.dumps(value).encode(), "application/json")

    def _fail(self, code: str, status: int, headers: dict[str, str] | None = None) -> None:
        self._send(status, b"{}", "application/json", {"X-Error-Code": code, **(headers or {})})

    def _send(self, status: int, content: bytes, kind: str, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in ({"Content-Type": kind, "Content-Length": str(len(content))} | (headers or {})).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        pass


if __name__ == "__main__":
    folder = Path(sys.argv[2])
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with HubServer({sys.argv[1]: {"main": files}}) as serving:
        print(f"export HF_ENDPOINT={serving.endpoint} HF_HUB_DISABLE_XET=1 HF_HOME=$(mktemp -d)", flush=True)
        threading.Event().wait()
