"""The page over runs that are going on, for this machine alone."""

from __future__ import annotations

import errno
from collections.abc import Sequence
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, parse_qs, urlsplit

from megatron_sgopd.errors import ConfigError
from megatron_sgopd.report.page import packed_contents, render
from megatron_sgopd.report.runs import read_run, state

ADDRESS = "127.0.0.1"


def serve(paths: Sequence[Path], port: int) -> None:
    """Serve `/`, the page, and `/data?seen=STATE`, its data if they have changed since, until interrupted.

    Raises:
        ConfigError: a path is no run folder, or the port is taken.
    """
    for path in paths:
        read_run(path)
    try:
        server = ThreadingHTTPServer((ADDRESS, port), _handler(paths))
    except OSError as error:
        if error.errno not in (errno.EADDRINUSE, errno.EACCES):
            raise
        raise ConfigError(
            f"--port {port} cannot be had ({error.strerror}): give another, or 0 for any free one"
        ) from None
    with server:
        print(f"report: http://localhost:{server.server_port}/ (Ctrl-C ends it)", flush=True)
        server.serve_forever()


def _handler(paths: Sequence[Path]) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            # Another site's page may have had its own name resolved to this address, to read what is served here.
            if urlsplit(f"//{self.headers.get('Host', '')}").hostname not in ("localhost", ADDRESS):
                self._answer(HTTPStatus.FORBIDDEN, "text/plain", b"This page is served to localhost alone.\n")
                return
            try:
                self._find(urlsplit(self.path))
            except ConfigError as error:
                self._answer(HTTPStatus.INTERNAL_SERVER_ERROR, "text/plain; charset=utf-8", str(error).encode())

        def _find(self, target: SplitResult) -> None:
            if target.path == "/":
                self._answer(HTTPStatus.OK, "text/html; charset=utf-8", render(paths, live=True))
            elif target.path == "/data":
                now = state(paths)
                if parse_qs(target.query).get("seen") == [now]:
                    self._answer(HTTPStatus.NO_CONTENT, "text/plain", b"")
                else:
                    self._answer(HTTPStatus.OK, "application/gzip", packed_contents(paths), now)
            else:
                self._answer(HTTPStatus.NOT_FOUND, "text/plain", b"There is / and /data.\n")

        def _answer(self, status: HTTPStatus, kind: str, body: bytes, now: str = "") -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Cache-Control", "no-store")
            self.send_header("X-State", now)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    return Handler
