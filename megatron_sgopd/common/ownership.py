"""Whose a run folder is: what lies in it is believed, and so must have been put there by whom the user trusts."""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

from megatron_sgopd.errors import ConfigError


def keep_private() -> None:
    """Let what this process and its children make from now on be readable by its owner alone."""
    os.umask(0o077)


def own_temporary_folder(name: str) -> Path:
    """A folder of this user in the machine's temporary folder, where anybody could have made one of that name before.

    Raises:
        ConfigError: somebody else did, or can write there.
    """
    folder = Path(tempfile.gettempdir(), f"{name}-{os.geteuid()}")
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o022:
        raise ConfigError(
            f"{folder} is another user's, or can be written by others, and what is compiled there is executed: remove "
            "it, or set TMPDIR to a folder of your own"
        )
    return folder


def check_ours(folder: Path, private: bool, setting: str = "run_dir") -> None:
    """Check that nobody but this user, or the folder's group if it is not private, can have put files into a folder.

    Args:
        setting: that names the folder.

    Raises:
        ConfigError: naming the first file that another user owns, or can write.
    """
    top = folder.stat()
    shareable = "; for a folder that a group shares, set private to false" if setting == "run_dir" else ""
    # Permissions within count for those alone who can enter the folder.
    by_others = stat.S_IWOTH if top.st_mode & stat.S_IXOTH else 0
    by_group = stat.S_IWGRP if top.st_mode & stat.S_IXGRP else 0
    for path in _within(folder):
        try:
            found = path.lstat()
        except FileNotFoundError:  # another rank has removed it
            continue
        shared = not private and found.st_gid == top.st_gid
        if found.st_uid != os.geteuid() and not shared:
            raise ConfigError(
                f"{path} belongs to another user (number {found.st_uid}), and going on would believe what it says: "
                f"choose another {setting}{shareable}"
            )
        writable = found.st_mode & (by_others if shared else by_others | by_group)
        if writable and not stat.S_ISLNK(found.st_mode):
            raise ConfigError(
                f"{path} can be written by others, and going on would believe what it says: if nobody did, "
                f"`chmod -R g-w,o-w {folder}`{shareable}"
            )


def _within(folder: Path) -> Iterator[Path]:
    yield folder
    for parent, folders, files in os.walk(folder):
        for name in (*folders, *files):
            yield Path(parent, name)
