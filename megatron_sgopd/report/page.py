"""The page: one HTML file that holds its data, its code and Plotly."""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from plotly.offline import get_plotlyjs

from megatron_sgopd.checkpoint.files import write_atomically
from megatron_sgopd.common.ownership import keep_private
from megatron_sgopd.report.contents import Contents


def write_page(paths: Sequence[Path], out: Path) -> int:
    """Write the page of these run folders; returns its size in bytes.

    Raises:
        ConfigError: one of them is none.
    """
    shown = Contents(paths)
    page = render(packed(shown()))
    if shown.private:
        keep_private()
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, page)
    return len(page)


def packed(contents: dict[str, Any]) -> bytes:
    """What a page shows, as gzip'd JSON."""
    return gzip.compress(json.dumps(contents, separators=(",", ":"), allow_nan=False).encode(), mtime=0)


def render(data: bytes, live_state: str = "") -> bytes:
    """The whole page in UTF-8.

    Texts of models are in it as base64 alone, and its code shows them as text. Should that ever fail, the page's
    content policy runs no script but these two, by their digests, loads nothing, and sends no form.

    Args:
        data: as of `packed`.
        live_state: of these contents, where the code is to ask its server for newer ones.
    """
    scripts = [get_plotlyjs(), _asset("page.js")]
    allowed = " ".join(f"'sha256-{_digest(script)}'" for script in scripts)
    policy = ["default-src 'none'", f"script-src {allowed}", "style-src 'unsafe-inline'", "img-src data: blob:"]
    policy += ["base-uri 'none'", "form-action 'none'", *["connect-src 'self'"] * bool(live_state)]
    page = _asset("page.html")
    for name, value in (
        ("POLICY", "; ".join(policy)),
        ("STYLE", _asset("page.css")),
        ("LIVE", live_state),
        ("DATA", base64.b64encode(data).decode()),
        ("PLOTLY", scripts[0]),
        ("SCRIPT", scripts[1]),
    ):
        page = page.replace(f"{{{{{name}}}}}", value, 1)
    return page.encode()


def _asset(name: str) -> str:
    return files("megatron_sgopd.report").joinpath("assets", name).read_text(encoding="utf-8")


def _digest(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
