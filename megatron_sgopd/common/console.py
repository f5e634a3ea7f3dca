"""What reaches a terminal: text of models, data sets and other people's files with its control characters spelt out."""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Iterator
from typing import Any, TextIO

from rich.console import Console
from rich.text import Text

# C0 and C1 but for line ends and tabs, characters that hide text or turn its direction, and halves of surrogate pairs.
_CONTROL = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u00ad\u061c\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    "\ud800-\udfff\U000e0000-\U000e007f]"
)


def printable(text: str) -> str:
    r"""The text with `\x1b` in place of an escape character, and likewise for all that would act on a terminal."""
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape", "surrogatepass").decode(), text)


def styled(text: object, style: str) -> Text:
    """Printable text in a style of rich's."""
    return Text(printable(str(text)), style=style)


class Terminal(Console):
    """rich's console for plain text: no markup, no emoji codes, and printable whatever it is given."""

    def __init__(self, file: TextIO | None = None, soft_wrap: bool = True) -> None:
        """Write to `file`, else to stdout; tables want `soft_wrap` off."""
        stream: Any = sys.stdout if file is None else file
        super().__init__(
            file=getattr(stream, "unfiltered", stream), markup=False, emoji=False, highlight=False, soft_wrap=soft_wrap
        )

    def render_str(self, text: str, **keywords: Any) -> Text:
        """As rich does, of printable text."""
        return super().render_str(printable(text), **keywords)


class _Printable:
    """A stream that writes printable text to another."""

    def __init__(self, stream: TextIO) -> None:
        self.unfiltered = stream

    def write(self, text: str) -> int:
        self.unfiltered.write(printable(text))
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.unfiltered, name)


@contextlib.contextmanager
def printable_output() -> Iterator[None]:
    """What this process prints, also as an error, is printable text."""
    out: Any = _Printable(sys.stdout)
    errors: Any = _Printable(sys.stderr)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
        yield
