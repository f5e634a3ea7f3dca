"""The page over runs that are going on, for this machine alone."""

from __future__ import annotations

import errno
import secrets
import threading
from collections.abc import Sequence
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, parse_qs, urlsplit

from megatron_sgopd.errors import ConfigError
from megatron_sgopd.report.contents import Contents
from megatron_sgopd.report.page import packed, render
from megatron_sgopd.report.runs import state

ADDRESS = "127.0.0.1"


def serve(paths: Sequence[Path], port: int) -> None:
    """Serve `/TOKEN/`, the page, and `/TOKEN/data?seen=STATE`, its contents if they have changed, until interrupted.

    Who else is on this machine can reach the port too: the token, which is in the address alone, keeps them out.

    Raises:
        ConfigError: a path is no run folder, or the port cannot be had.
    """
    newest = _Newest(paths)
    newest()
    token = secrets.token_urlsafe(16)
    try:
        server = ThreadingHTTPServer((ADDRESS, port), _handler(newest, token))
    except (OSError, OverflowError) as error:
        if isinstance(error, OSError) and error.errno not in (errno.EADDRINUSE, errno.EACCES):
            raise
        raise ConfigError(f"--port {port} cannot be had ({error}): give another, or 0 for any free one") from None
    with server:
        print(f"report: http://localhost:{server.server_port}/{token}/ (Ctrl-C ends it)", flush=True)
        server.serve_forever()


class _Newest:
    """The contents of a page, made once for each state of the runs however many ask."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths, self._contents = paths, Contents(paths)
        self._lock = threading.Lock()
        self._made: tuple[str, bytes] = ("", b"")

    def __call__(self) -> tuple[str, bytes]:
        """The runs' state, and what a page shows of it."""
        with self._lock:
            now = state(self._paths)
            if now != self._made[0]:
                self._made = now, packed(self._contents())
            return self._made


def _handler(newest: _Newest, token: str) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        timeout = 10  # seconds without a request, after which a connection's thread ends

        def do_GET(self) -> None:
            # Another site's page may have had its own name resolved to this address, to read what is served here.
            if self.headers.get("Host", "").split(":")[0] not in ("localhost", ADDRESS):
                self._answer(HTTPStatus.FORBIDDEN, "text/plain", b"This page is served to localhost alone.\n")
                return
            try:
                self._find(urlsplit(self.path))
            except ConfigError as error:
                self._answer(HTTPStatus.INTERNAL_SERVER_ERROR, "text/plain; charset=utf-8", str(error).encode())

        def _find(self, target: SplitResult) -> None:
            given, _, name = target.path.removeprefix("/").partition("/")
            if not secrets.compare_digest(given.encode(), token.encode()) or name not in ("", "data"):
                self._answer(HTTPStatus.NOT_FOUND, "text/plain", b"Open the address that `report --live` printed.\n")
                return
            now, data = newest()
            if not name:
                self._answer(HTTPStatus.OK, "text/html; charset=utf-8", render(data, live_state=now))
            elif parse_qs(target.query).get("seen") == [now]:
                self._answer(HTTPStatus.NO_CONTENT, "text/plain", b"")
            else:
                self._answer(HTTPStatus.OK, "application/gzip", data, now)

        def _answer(self, status: HTTPStatus, kind: str, body: bytes, now: str = "") -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Cache-Control", "no-store")
            self.send_header("X-State", now)
            self.send_header("Referrer-Policy", "no-referrer")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    return Handler
