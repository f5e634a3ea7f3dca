"""Files that somebody else may have written: of their own folder, and of bounded size, depth and expansion."""

from __future__ import annotations

import errno
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from megatron_sgopd.errors import ConfigError

_YAML_BYTES = 1 << 20
_YAML_VALUES = 100_000


def check_inside(folder: Path, files: Iterable[Path]) -> None:
    """Check that files, or what they are links to, lie in a folder; a hub cache's folder has them in its `blobs`.

    Raises:
        ConfigError: naming the first that does not: it may be anybody's, and end up in an output.
    """
    top = folder.resolve()
    blobs = [parent.parent / "blobs" for parent in top.parents if parent.name == "snapshots"]
    for file in files:
        try:
            real = file.resolve()
        except (OSError, RuntimeError):
            raise ConfigError(f"{file} is a link in a circle: put the file itself there") from None
        if not any(real.is_relative_to(allowed) for allowed in (top, *blobs)):
            raise ConfigError(
                f"{file} leads out of its folder, to {real}: it is not read; put the file itself there, or name the "
                "folder that it is in"
            )


def read_bytes(path: Path, most: int = 1 << 28) -> bytes:
    """All of a file of at most `most` bytes.

    Raises:
        OSError: it cannot be read, or is larger.
    """
    if path.stat().st_size > most:
        raise OSError(errno.EFBIG, f"it has more than {most >> 20} MiB")
    return path.read_bytes()


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        ConfigError: it cannot be read, is too large or too deep, or holds something else.
    """
    try:
        value = json.loads(read_bytes(path))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
    except RecursionError:
        raise ConfigError(f"{path} cannot be read as JSON: it is nested too deeply") from None
    except ValueError as error:
        raise ConfigError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{path} holds a {type(value).__name__}, not an object with fields")
    return value


def read_yaml(path: Path) -> Any:
    """The value in a YAML file of plain values.

    Raises:
        ConfigError: it cannot be read, is too large or too deep, or names one part over and over.
    """
    try:
        value = yaml.safe_load(read_bytes(path, _YAML_BYTES))
        if _values_within(value, _YAML_VALUES) <= 0:
            raise ValueError(f"its aliases stand for more than {_YAML_VALUES} values")
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
    except RecursionError:
        raise ConfigError(f"{path} is no YAML: it is nested too deeply, or within itself") from None
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{path} is no YAML: {' '.join(str(error).split())}") from None
    return value


def _values_within(value: Any, left: int) -> int:
    """How many values more there might be, after those of `value` with all its aliases written out."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    left -= 1
    for one in inner:
        if left <= 0:
            break
        left = _values_within(one, left)
    return left
