"""Files that are there whole or not at all, and a folder that appears only when it is finished."""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from safetensors import SafetensorError

from megatron_sgopd.common.data_files import read_json
from megatron_sgopd.common.ownership import check_ours
from megatron_sgopd.errors import ConfigError

CONVERSION = "conversion.json"
"""Where a conversion says what it made and how that was proven."""
_WRITE_BYTES = 1 << 19


class PieceWriter(io.BufferedWriter):
    """A new file, written half a MiB at a time, however much is handed over.

    The kernel caches a write in pages of up to its size, and large pages may be hard to come by: in a virtual machine
    that gives free memory back, writes of 2 MiB and more were four times slower.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(new_file(path, buffering=0), _WRITE_BYTES)

    def write(self, data: Any) -> int:
        """Write all of a buffer."""
        view = memoryview(data).cast("B")
        for begin in range(0, len(view), _WRITE_BYTES):
            super().write(view[begin : begin + _WRITE_BYTES])
        return len(view)


def new_file(path: Path, buffering: int = -1) -> Any:
    """A file that this process has made, open for writing. What was there is removed; a link is not followed, since
    whoever planted it would have its target overwritten."""
    path.unlink(missing_ok=True)
    return path.open("xb", buffering=buffering)


def write_atomically(path: Path, data: bytes) -> None:
    """Write a small file and sync it, so that after a crash it has its old or its new content."""
    temporary = path.with_name(f"{path.name}.tmp")
    with new_file(temporary) as file:
        file.write(data)
        os.fsync(file.fileno())
    temporary.rename(path)


def locked(file: IO[Any], shared: bool = False) -> bool:
    """Take a file's lock, which is kept until the file is closed or its process ends; False if another one has it.

    Also between nodes, on file systems with flock: NFS, Lustre mounted with `-o flock`, GPFS.

    Args:
        file: open for writing; for a shared lock, reading will do.
        shared: several may have it, and nobody an exclusive one meanwhile.
    """
    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def sync_path(path: Path) -> None:
    """Bring a file's data, or a folder's names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def model_digest(folder: Path, samples: int = 16, sample_bytes: int = 1 << 20) -> str:
    """Digest of a folder's model files by name, size and some of their bytes: pieces at even distances, the first and
    the last included.

    Reading all of a large model would take minutes on a shared file system.
    """
    digest = hashlib.blake2b(digest_size=16)
    for path in sorted(path for path in folder.iterdir() if path.suffix in (".safetensors", ".json")):
        size = path.stat().st_size
        digest.update(json.dumps([path.name, size]).encode())
        with path.open("rb") as file:
            for index in range(samples):
                file.seek(max(0, size - sample_bytes) * index // max(1, samples - 1))
                digest.update(file.read(sample_bytes))
    return digest.hexdigest()


class Staging:
    """`OUT.partial`, where a conversion works until it may be called `OUT`. One that was cut off is gone on with."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.folder = out.with_name(f"{out.name}.partial")
        self._job = out.with_name(f"{out.name}.partial.json")
        """What the folder is of: beside it, so that the folder gets its name whole, in one move."""

    def check(self, job: Mapping[str, Any], needed_bytes: int) -> None:
        """Check that this conversion may start or go on, before anything is written.

        Args:
            job: what is converted and how; work that was left by another job is not gone on with.
            needed_bytes: what it will write.

        Raises:
            ConfigError: the output exists, the disk is too small, or what was left is another job's, nobody's or
                somebody else's.
        """
        if self.out.exists() and (not self.out.is_dir() or any(self.out.iterdir())):
            raise ConfigError(f"{self.out} exists and is not an empty folder: remove it, or choose another output")
        begun = os.path.lexists(self.folder)
        if begun and (self.folder.is_symlink() or not self._job.is_file()):
            raise ConfigError(
                f"{self.folder} was begun by no conversion, or {self._job.name} beside it is gone: remove the folder"
            )
        if begun:
            check_ours(self.folder, private=True, setting="output")
        earlier = read_json(self._job) if begun else None
        if earlier is not None and earlier != job:
            changed = sorted(key for key in earlier.keys() | job.keys() if earlier.get(key) != job.get(key))
            raise ConfigError(
                f"{self.folder} is the unfinished work of a conversion with another {', '.join(changed)}: "
                "give the same arguments to go on with it, or remove it"
            )
        existing = next(path for path in (self.folder, *self.folder.absolute().parents) if path.is_dir())
        if not os.access(existing, os.W_OK):
            raise ConfigError(f"{existing} cannot be written to: choose another output")
        already = sum(path.stat().st_size for path in self.folder.rglob("*") if path.is_file()) if earlier else 0
        free = shutil.disk_usage(existing).free
        if free < needed_bytes - already:
            raise ConfigError(
                f"the output takes {needed_bytes / 2**30:.1f} GiB, and {existing} has {free / 2**30:.1f} GiB free: "
                "free some space, or choose another output"
            )

    def begin(self, job: Mapping[str, Any]) -> None:
        """Make the folder, noted as this job's."""
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self._job, json.dumps(job).encode())
        self.folder.mkdir(mode=0o700, exist_ok=True)  # nobody else gets in before it is what it says

    def publish(self) -> None:
        """Give the finished folder its name."""
        for folder, _, _ in os.walk(self.folder):
            sync_path(Path(folder))
        if self.out.is_dir():
            self.out.rmdir()
        umask = os.umask(0o077)
        os.umask(umask)
        self.folder.rename(self.out)
        self.out.chmod(0o777 & ~umask)  # it is meant for others too
        self._job.unlink()
        sync_path(self.out.absolute().parent)

    @contextmanager
    def explaining(self) -> Iterator[None]:
        """Turn a failure to write into a message that says what is left and how to go on."""
        try:
            yield
        except (OSError, RuntimeError, SafetensorError) as error:
            reason = _reason(error)
            if reason is None:
                raise
            raise ConfigError(
                f"writing {self.folder} failed: {reason}. What was finished is kept there: "
                "mend the cause and start again with the same arguments to go on"
            ) from error


def _reason(error: BaseException) -> str | None:
    """What the system said, also where torch's or safetensors' writer made an error of its own of it."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    if isinstance(error, SafetensorError):
        return str(error)
    return _reason(error.__context__) if error.__context__ else None


def check_conversion(folder: Path) -> None:
    """Where a conversion made `folder`, check that its files are still those that were proven.

    Raises:
        ConfigError: one is gone, or has another size.
    """
    path = folder / CONVERSION
    if not path.is_file():
        return
    files = read_json(path).get("files")
    if not isinstance(files, dict):
        raise ConfigError(f"{path} lists no files: convert again")
    for name, size in files.items():
        file = folder / name
        if not file.is_file() or file.stat().st_size != size:
            raise ConfigError(f"{file} is not the file that {path} speaks of ({size} bytes): convert again")
