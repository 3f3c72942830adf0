"""A small hub on loopback for the real `datasets` client: what it asks for, answered from a dictionary.

    with Hub({"owner/name": {"main": {"data/train.parquet": b"..."}}}) as hub:
        subprocess.run(command, env=hub.environment(tmp_path))

Run by hand it serves a folder: python -m tests.support.hub_server OWNER/NAME FOLDER
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


class Hub:
    """Serves repositories; `asked` lists (method, path) of every request."""

    def __init__(self, repositories: dict[str, Repository]) -> None:
        self.repositories, self.asked = repositories, list[tuple[str, str]]()
        hub = self

        class Handler(_Handler):
            pass

        Handler.hub = hub
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"

    def environment(self, home: Path, **more: str) -> dict[str, str]:
        """For a process that is to take this one for the hub, with a cache of its own."""
        return os.environ | {"HF_ENDPOINT": self.endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"} | more

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer()

    do_HEAD = do_POST = do_GET

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(urlsplit(self.path).path)
        self.hub.asked.append((self.command, path))
        for name, revisions in self.hub.repositories.items():
            for prefix, handle in ((f"/api/datasets/{name}", self._api), (f"/datasets/{name}/resolve", self._file)):
                if path == prefix or path.startswith(prefix + "/"):
                    # a commit is a revision too
                    known = revisions | {commit_of(files): files for files in revisions.values()}
                    handle(name, known, path.removeprefix(prefix).strip("/"), body)
                    return
        self._fail("RepoNotFound", 401)  # so the hub answers those whom it does not know

    def _api(self, name: str, known: Repository, rest: str, body: bytes) -> None:
        what, _, rest = (rest or "revision/main").partition("/")
        revision, _, below = rest.partition("/")
        if revision not in known:
            self._fail("RevisionNotFound", 404)
            return
        files = known[revision]
        sizes = [(path, len(content), hashlib.sha1(content).hexdigest()) for path, content in files.items()]
        rows: list[dict[str, object]] = [{"type": "file", "path": p, "size": n, "oid": oid} for p, n, oid in sizes]
        folders = {str(parent) for p in files for parent in Path(p).parents} - {"."}
        rows += [{"type": "directory", "path": p, "size": 0, "oid": "0" * 40} for p in sorted(folders)]
        if what == "revision":
            siblings = [{"rfilename": path} for path in files]
            self._json({"id": name, "sha": commit_of(files), "siblings": siblings, "tags": [], "private": False})
        elif what == "tree":
            deep = "recursive=True" in self.path or "recursive=true" in self.path
            inside = [r for r in rows if not below or str(r["path"]).startswith(below + "/")]
            here = [r for r in inside if deep or str(Path(str(r["path"])).parent) == (below or ".")]
            if below and not inside:
                self._fail("EntryNotFound", 404)
            else:
                self._json(here)
        elif what == "paths-info":
            is_json = "json" in self.headers.get("Content-Type", "")
            wanted = json.loads(body)["paths"] if is_json else parse_qs(body.decode())["paths"]
            self._json([row for row in rows if row["path"] in wanted])
        else:
            self._fail("EntryNotFound", 404)

    def _file(self, name: str, known: Repository, rest: str, body: bytes) -> None:
        revision, _, path = rest.partition("/")
        if revision not in known:
            self._fail("RevisionNotFound", 404)
        elif path not in known[revision]:
            self._fail("EntryNotFound", 404, {"X-Repo-Commit": commit_of(known[revision])})
        else:
            content = known[revision][path]
            tag = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": commit_of(known[revision])}
            self._send(200, content, "application/octet-stream", tag)

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
    with Hub({sys.argv[1]: {"main": files}}) as serving:
        print(f"export HF_ENDPOINT={serving.endpoint} HF_HUB_DISABLE_XET=1 HF_HOME=$(mktemp -d)", flush=True)
        threading.Event().wait()
