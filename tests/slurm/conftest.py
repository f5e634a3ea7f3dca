"""One cluster for all tests."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from .cluster import MISSING, PACKAGES, Cluster, running


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Two nodes."""
    if MISSING:
        pytest.skip(f"needs a Slurm: make slurm-deps, or apt-get install {' '.join(PACKAGES)}")
    with tempfile.TemporaryDirectory(prefix="slurm") as folder, running(Path(folder), nodes=2) as started:
        yield started
