"""The page: one HTML file that holds its data, its code and Plotly, and may load nothing."""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from plotly.offline import get_plotlyjs

from megatron_sgopd.checkpoint.files import write_atomically
from megatron_sgopd.report.contents import contents
from megatron_sgopd.report.runs import read_run


def write_page(paths: Sequence[Path], out: Path) -> int:
    """Write the page of these run folders; returns its size in bytes.

    Raises:
        ConfigError: one of them is none.
    """
    page = render(paths, live=False)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, page)
    return len(page)


def packed_contents(paths: Sequence[Path]) -> bytes:
    """What the page shows, as gzip'd JSON."""
    text = json.dumps(contents([read_run(path) for path in paths]), separators=(",", ":"))
    return gzip.compress(text.encode(), mtime=0)


def render(paths: Sequence[Path], live: bool) -> bytes:
    """The whole page in UTF-8.

    Texts of models are in it as base64 alone, and the code shows them as text. Should that ever fail, the page's
    content policy runs no script but these two, by their digests, and lets nothing be loaded or sent.

    Args:
        live: the code asks its server for new data.
    """
    scripts = [get_plotlyjs(), _asset("page.js")]
    allowed = " ".join(f"'sha256-{_digest(script)}'" for script in scripts)
    parts = {
        "POLICY": f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data: blob:"
        + ("; connect-src 'self'" if live else ""),
        "STYLE": _asset("page.css"),
        "LIVE": "live" if live else "",
        "DATA": base64.b64encode(packed_contents(paths)).decode(),
        "PLOTLY": scripts[0],
        "SCRIPT": scripts[1],
    }
    page = _asset("page.html")
    for name, value in parts.items():
        page = page.replace(f"{{{{{name}}}}}", value, 1)
    return page.encode()


def _asset(name: str) -> str:
    return files("megatron_sgopd.report").joinpath("assets", name).read_text(encoding="utf-8")


def _digest(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
