"""A stand-in for the hub on loopback: takes repositories and commits as the real one does, or refuses them."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

USER, TOKEN = "somebody", "hf_standin"


class StandIn:
    """`repositories`: {user/name: {path: bytes}}; `refuse`: the status that calls get; `hang`: they get no answer."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.refuse: int | None = None
        self.hang = threading.Event()
        self.asked = threading.Event()

    def answer(self, path: str, body: bytes) -> dict[str, Any]:
        """To a POST with the right token."""
        if path == "/api/repos/create":
            asked = json.loads(body)
            repo_id = f"{asked.get('organization') or USER}/{asked['name']}"
            self.repositories.setdefault(repo_id, {})
            return {"url": f"{self.url}/{repo_id}", "id": repo_id}
        if path == "/api/validate-yaml":
            return {"errors": [], "warnings": []}
        repo_id, call = path.removeprefix("/api/models/").removesuffix("/main").rsplit("/", 1)
        if call == "preupload":
            files = [{"path": file["path"], "uploadMode": "regular"} for file in json.loads(body)["files"]]
            return {"files": [{**file, "shouldIgnore": False} for file in files]}
        assert call == "commit", path
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                content = base64.b64decode(line["value"]["content"])
                self.repositories[repo_id][line["value"]["path"]] = content
        return {"commitUrl": f"{self.url}/{repo_id}/commit/1", "commitOid": "1", "success": True}


@contextmanager
def standin() -> Iterator[StandIn]:
    """A server for as long as the context lasts."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            hub.asked.set()
            if hub.hang.is_set():
                closing.wait(30)
                return
            refused = hub.refuse or (None if self.headers["Authorization"] == f"Bearer {TOKEN}" else 401)
            answer = {"error": "no room here"} if refused else hub.answer(self.path, body)
            content = json.dumps(answer).encode()
            self.send_response(refused or 200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def do_GET(self) -> None:
            self.send_error(404)

        def log_message(self, *_anything: object) -> None:
            pass

    closing = threading.Event()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub = StandIn(f"http://127.0.0.1:{server.server_port}")
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        closing.set()
        server.shutdown()
        server.server_close()
