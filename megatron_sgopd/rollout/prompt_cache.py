"""Prompts that were read and tokenized once for each data set and tokenizer, in the user's own cache.

Data sets and the templates of models are hostile: a process of its own reads them (prompt_reader.py), with limits of
time and memory and without a network, and leaves a file that ranks map into memory.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from platform import python_version
from typing import Any

import megatron_sgopd
from megatron_sgopd.checkpoint.files import locked
from megatron_sgopd.common.ownership import check_ours
from megatron_sgopd.config import PromptSettings
from megatron_sgopd.errors import ConfigError
from megatron_sgopd.processes import SAFE_PATH, die_with_parent, is_first_rank
from megatron_sgopd.rollout.prompts import PromptSet, check_not_empty
from megatron_sgopd.rollout.sources import REASONING_GYM

CACHE = "SGOPD_CACHE"
"""Environment variable of the folder; else megatron-sgopd in XDG_CACHE_HOME or in ~/.cache."""
MEMORY_LIMIT = 8 << 30
"""Bytes that the reader may take beyond its libraries."""
_FRUGAL = {"MALLOC_ARENA_MAX": "4", "ARROW_DEFAULT_MEMORY_POOL": "system"}
"""Allocators that do not reserve what they may never use, which would count."""
_ROW_LIMIT = 60.0
"""Seconds in which the reader must get on."""
_START_LIMIT = 300.0
"""Seconds for it to load its libraries, from a slow shared file system too."""
_KEPT_SECONDS = 30 * 24 * 3600
"""After which a file that nobody used is removed."""
_SHAPING = ("transformers", "tokenizers", "jinja2", "datasets", "pyarrow", "reasoning-gym")
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack")


def load_prompts(sources: Sequence[PromptSettings], tokenizer: str) -> list[PromptSet]:
    """The prompts of each source, tokenized.

    Args:
        tokenizer: model folder.

    Raises:
        ConfigError: naming the file and line, or the setting, that is wrong.
    """
    with contextlib.ExitStack() as stack:
        folder = _cache_folder()
        reader: _Reader | None = None
        sets = []
        for settings in sources:
            if folder is None:
                reader = reader or stack.enter_context(_Reader(tokenizer))
                sets.append(_uncached(reader, settings))
                continue
            key = _key(settings, tokenizer)
            path = folder / f"{key}.arrow"
            if not path.is_file():
                reader = reader or stack.enter_context(_Reader(tokenizer))
                with _sole_maker(path):
                    if not path.is_file():
                        _make(reader, settings, path)
                        if _key(settings, tokenizer) != key:
                            path.unlink()
                            raise ConfigError(
                                f"{settings.source}, or {tokenizer}, has changed while it was read: again"
                            )
                        _remove_unused(folder)
            os.utime(path)
            sets.append(PromptSet(path))
    for prompts, settings in zip(sets, sources, strict=True):
        check_not_empty(prompts, settings.source)
    return sets


# ---- The cache ------------------------------------------------------------------------------------------


def _cache_folder() -> Path | None:
    """The user's own folder, made if need be; None where nothing can be written, as in some containers.

    Raises:
        ConfigError: others can have written there.
    """
    named = os.environ.get(CACHE)
    folder = Path(named or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "megatron-sgopd")
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        if named:
            raise ConfigError(f"{CACHE}={named} cannot be made ({error.strerror}): name another folder") from None
        return None
    if not os.access(folder, os.W_OK | os.X_OK):
        return None
    check_ours(folder, private=True, setting=CACHE)
    return folder


def _key(settings: PromptSettings, tokenizer: str) -> str:
    """Digest of all that can shape a prompt: every setting of the source, the bytes of its files and of the model's
    folder but for weights, all of this package's code, and the versions of the libraries."""
    digest = hashlib.blake2b(digest_size=16)
    libraries = {name: version(name) for name in _SHAPING}
    said = [dataclasses.asdict(settings), libraries, python_version()]
    digest.update(json.dumps(said, sort_keys=True).encode())
    package, model, source = Path(megatron_sgopd.__file__).parent, Path(tokenizer), Path(settings.source)
    files = [*sorted(package.rglob("*.py")), *sorted(path for path in model.rglob("*") if _shapes_tokens(path, model))]
    if not settings.source.startswith(REASONING_GYM):
        files += sorted(path for path in source.rglob("*") if path.is_file()) if source.is_dir() else [source]
    for path in files:
        digest.update(json.dumps([path.name, path.stat().st_size if path.is_file() else None]).encode())
        if path.is_file():
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=32)).digest())
    return digest.hexdigest()


def _shapes_tokens(path: Path, model: Path) -> bool:
    """A file that a tokenizer may be made of, in a model's folder or one level below."""
    return path.suffix not in _WEIGHTS and len(path.relative_to(model).parts) <= 2 and path.is_file()


@contextlib.contextmanager
def _sole_maker(path: Path) -> Iterator[None]:
    """Wait for another process that makes the same file."""
    with path.with_suffix(".lock").open("a") as lock:
        while not locked(lock):
            time.sleep(0.2)
        yield


def _remove_unused(folder: Path) -> None:
    for path in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):  # another process does the same
            if time.time() - path.stat().st_mtime > _KEPT_SECONDS:
                path.unlink()


# ---- The reader -----------------------------------------------------------------------------------------


def _make(reader: _Reader, settings: PromptSettings, path: Path) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.unlink(missing_ok=True)
    try:
        reader.read(settings, temporary)
        temporary.rename(path)
    finally:
        temporary.unlink(missing_ok=True)


def _uncached(reader: _Reader, settings: PromptSettings) -> PromptSet:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "prompts"
        reader.read(settings, path)
        return PromptSet(path)  # which stays mapped when its name is gone


class _Reader(contextlib.AbstractContextManager["_Reader"]):
    """The process that reads sources, one after the other."""

    def __init__(self, tokenizer: str) -> None:
        self._tokenizer = tokenizer
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "megatron_sgopd.rollout.prompt_reader", tokenizer, str(MEMORY_LIMIT)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,  # so that what was not read yet can be waited for
            start_new_session=True,
            umask=0o077,
            preexec_fn=die_with_parent,
            env={**os.environ, **SAFE_PATH, **_FRUGAL},
        )
        self._started = False

    def __exit__(self, *exception: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):
                pipe.close()

    def read(self, settings: PromptSettings, out: Path) -> None:
        """Have `out` written.

        Raises:
            ConfigError: something is wrong with the source, or with the template, or they take too much.
        """
        assert self._process.stdin is not None
        if not self._started:
            self._next(settings, 0)
            self._started = True
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps([dataclasses.asdict(settings), str(out)]).encode() + b"\n")
        read, shown = 0, time.monotonic()
        while True:
            said = self._next(settings, read)
            if "whole" in said:
                return
            read = said.get("read", read)
            if is_first_rank() and time.monotonic() - shown > 5:
                shown = time.monotonic()
                print(f"megatron-sgopd: {read:,} prompts of {settings.source} are tokenized", file=sys.stderr)

    def _next(self, settings: PromptSettings, read: int) -> dict[str, Any]:
        process, limit = self._process, _ROW_LIMIT if self._started else _START_LIMIT
        assert process.stdout is not None
        where = f"{settings.source}, after {read} prompts"
        if not select.select([process.stdout], [], [], limit)[0]:
            raise ConfigError(
                f"{where}: nothing came for {limit:.0f} s: a prompt, or the chat template of {self._tokenizer}, takes "
                "too long: leave it out, or set chat_template: false"
            )
        line = process.stdout.readline()
        if not line:
            code = process.wait()
            raise ConfigError(
                f"{where}: the process that reads it ended with code {code}: most likely a prompt, a file that unpacks "
                f"to far more than it is, or the chat template of {self._tokenizer} takes more than "
                f"{MEMORY_LIMIT >> 30} GiB of memory: leave it out"
            )
        said = json.loads(line)
        if "error" in said:
            raise ConfigError(said["error"])
        return said
