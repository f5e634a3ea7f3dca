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
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from platform import python_version
from typing import Any

import pyarrow as pa

import megatron_sgopd
from megatron_sgopd.checkpoint.files import locked
from megatron_sgopd.common.ownership import check_ours
from megatron_sgopd.config import PromptSettings
from megatron_sgopd.errors import ConfigError
from megatron_sgopd.processes import SAFE_PATH, die_with_parent, is_first_rank
from megatron_sgopd.rollout.prompts import PromptSet, check_not_empty, check_usable
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
_KEPT_SECONDS = 90 * 24 * 3600
"""After which a file that nobody used is removed."""
_SHAPING = ("transformers", "tokenizers", "jinja2", "datasets", "pyarrow", "reasoning-gym")
_LARGEST_TOKENIZER = 1 << 27
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack")


def load_prompts(sources: Sequence[PromptSettings], tokenizer: str) -> list[PromptSet]:
    """The prompts of each source, tokenized.

    Args:
        tokenizer: model folder; empty to leave prompts as they are written, without tokens.

    Raises:
        ConfigError: naming the file and line, or the setting, that is wrong.
    """
    with contextlib.ExitStack() as stack:
        reader = stack.enter_context(_Reader(tokenizer))
        sets = [_load(reader, settings, tokenizer) for settings in sources]
    for prompts, settings in zip(sets, sources, strict=True):
        check_not_empty(prompts, settings.source)
    return sets


def _load(reader: _Reader, settings: PromptSettings, tokenizer: str) -> PromptSet:
    # Read alike by whoever refuses what cannot be used and whoever leaves it out, so that once is enough for both.
    prompts = _read(reader, dataclasses.replace(settings, unusable_rows="skip"), tokenizer)
    check_usable(prompts, settings)
    return prompts


def _read(reader: _Reader, settings: PromptSettings, tokenizer: str) -> PromptSet:
    if (folder := _cache_folder()) is not None:
        with contextlib.suppress(OSError):  # full, or without locks: as if there were none
            return _cached(folder, reader, settings, tokenizer)
    return _uncached(reader, settings)


# ---- The cache ------------------------------------------------------------------------------------------


def _cached(folder: Path, reader: _Reader, settings: PromptSettings, tokenizer: str) -> PromptSet:
    key = _key(settings, tokenizer)
    path = folder / f"{key}.arrow"
    if (prompts := _used(path)) is not None:
        return prompts
    with path.with_suffix(".lock").open("a") as lock:
        while not locked(lock):  # another process makes it
            time.sleep(0.2)
        if (prompts := _used(path)) is None:
            temporary = path.with_suffix(".tmp")
            try:
                reader.read(settings, temporary)
                if _key(settings, tokenizer) != key:
                    raise ConfigError(
                        f"{settings.source}, {tokenizer} or this package changed while it was read: start again"
                    )
                temporary.rename(path)
            finally:
                temporary.unlink(missing_ok=True)
            _remove_unused(folder)
            prompts = PromptSet(path)
        return prompts


def _used(path: Path) -> PromptSet | None:
    """The prompts of a file, which is noted as used; None where there is none, or a damaged one."""
    try:
        prompts = PromptSet(path)
    except (FileNotFoundError, pa.ArrowInvalid):
        return None
    os.utime(path)
    return prompts


def _cache_folder() -> Path | None:
    """The user's own folder, made if need be; None where nothing can be written, as in some containers.

    Raises:
        ConfigError: the folder that the environment names cannot be made, or others can have written there.
    """
    named = os.environ.get(CACHE)
    try:
        root = Path(named or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "megatron-sgopd")
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder = root / "prompts"
        folder.mkdir(mode=0o700, exist_ok=True)
    except (OSError, RuntimeError) as error:  # the latter: there is no home
        if named:
            raise ConfigError(f"{CACHE}={named} cannot be made ({error}): name another folder") from None
        return None
    if not os.access(folder, os.W_OK | os.X_OK):
        return None
    check_ours(folder, private=True, setting=CACHE)
    return folder


def _key(settings: PromptSettings, tokenizer: str) -> str:
    """Digest of all that can shape a prompt: every setting of the source, the bytes of its files and of the model's
    folder but for weights, all of this package's code, and the versions of the libraries.

    Raises:
        ConfigError: a file of the source cannot be read.
    """
    digest = hashlib.blake2b(digest_size=16)
    libraries = {name: version(name) for name in _SHAPING}
    said = [dataclasses.asdict(settings), libraries, python_version()]
    digest.update(json.dumps(said, sort_keys=True).encode())
    package, model, source = Path(megatron_sgopd.__file__).parent, Path(tokenizer), Path(settings.source)
    for path in sorted(package.rglob("*.py")):
        _add_file(digest, path, package)
    for path in sorted([*model.glob("*"), *model.glob("additional_chat_templates/*")]) if tokenizer else ():
        if path.is_file() and path.suffix not in _WEIGHTS and path.stat().st_size <= _LARGEST_TOKENIZER:
            with contextlib.suppress(PermissionError):  # whoever needs it says so
                _add_file(digest, path, model)
    if not settings.source.startswith(REASONING_GYM) and source.exists():
        hidden = (path for path in source.rglob("*") if path.is_file())
        files = sorted(p for p in hidden if not any(part.startswith(".") for part in p.relative_to(source).parts))
        for path in files if source.is_dir() else [source]:
            try:
                _add_file(digest, path, source.parent)
            except PermissionError as error:
                raise ConfigError(f"{path} cannot be read ({error.strerror}): change its permissions") from None
    return digest.hexdigest()


def _add_file(digest: hashlib.blake2b, path: Path, root: Path) -> None:
    with path.open("rb") as file:
        content = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=32)).digest()
    digest.update(json.dumps(str(path.relative_to(root))).encode() + content)


def _remove_unused(folder: Path) -> None:
    for path in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):  # another process does the same
            if path.suffix in (".arrow", ".lock", ".tmp") and time.time() - path.stat().st_mtime > _KEPT_SECONDS:
                path.unlink()


# ---- The reader -----------------------------------------------------------------------------------------


def _uncached(reader: _Reader, settings: PromptSettings) -> PromptSet:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "prompts"
        reader.read(settings, path)
        return PromptSet(path)  # which stays mapped when its name is gone


class _Reader(contextlib.AbstractContextManager["_Reader"]):
    """The process that reads sources, one after the other."""

    def __init__(self, tokenizer: str) -> None:
        """Of a model folder's tokenizer; the process starts when there is something to read."""
        self._tokenizer = tokenizer
        self._running: subprocess.Popen[bytes] | None = None

    def _start(self, settings: PromptSettings) -> None:
        self._running = subprocess.Popen(
            [sys.executable, "-P", "-m", "megatron_sgopd.rollout.prompt_reader", self._tokenizer, str(MEMORY_LIMIT)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,  # so that what was not read yet can be waited for
            start_new_session=True,
            umask=0o077,
            preexec_fn=die_with_parent,
            env={**os.environ, **SAFE_PATH, **_FRUGAL},
        )
        self._next(settings, 0, _START_LIMIT)

    def __exit__(self, *exception: object) -> None:
        if self._running is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._running.pid, signal.SIGKILL)
        self._running.wait()
        for pipe in (self._running.stdin, self._running.stdout):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):
                pipe.close()

    def read(self, settings: PromptSettings, out: Path) -> None:
        """Have `out` written.

        Raises:
            ConfigError: something is wrong with the source, or with the template, or they take too much.
        """
        if self._running is None:
            self._start(settings)
        assert self._running is not None and self._running.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._running.stdin.write(json.dumps([dataclasses.asdict(settings), str(out)]).encode() + b"\n")
        read, shown = 0, time.monotonic()
        while True:
            said = self._next(settings, read, _ROW_LIMIT)
            if "whole" in said:
                return
            read = said.get("read", read)
            if is_first_rank() and time.monotonic() - shown > 5:
                shown = time.monotonic()
                print(f"megatron-sgopd: {read:,} prompts of {settings.source} are tokenized", file=sys.stderr)

    def _next(self, settings: PromptSettings, read: int, limit: float) -> dict[str, Any]:
        process = self._running
        assert process is not None and process.stdout is not None
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
