"""What the recipes' local HTTP servers share: an answer in JSON, and serving until interrupted."""

from __future__ import annotations

import json
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any


class JsonRequest(BaseHTTPRequestHandler):
    """A request that is answered in JSON, without a line in the log."""

    def read_json(self) -> Any:
        """Return the body; ValueError or TypeError where it is none."""
        return json.loads(self.rfile.read(int(self.headers["Content-Length"])))

    def send_json(self, answer: Any) -> None:
        """Answer 200 with an object in JSON."""
        data = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        """Stay quiet: one line a request would fill a training's log."""


def serve(server: HTTPServer, said: str) -> None:
    """Say where it is, and serve until interrupted."""
    with server:
        print(said, flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print("stopped", file=sys.stderr)
