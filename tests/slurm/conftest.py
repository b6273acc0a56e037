"""A live cluster for the tests of a file, and what it takes to run a job on it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import SlurmCluster, missing_programs
from tests.slurm.jobs import Site


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark every test that needs the cluster."""
    for item in items:
        if "site" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    """Three nodes."""
    missing = missing_programs()
    if missing and (os.environ.get("CI") == "1" or os.environ.get("HARNESS_REQUIRE_SLURM")):
        pytest.fail(f"Slurm is required here, but there is {missing}")
    if missing:
        pytest.skip(missing)
    cluster = SlurmCluster(3, tmp_path_factory.mktemp("slurm"))
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


@pytest.fixture
def site(cluster: SlurmCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    """A folder to run in, whose name is as bad as a name can be, and the cluster with nothing on it."""
    folder = tmp_path / 'it\'s a "run" 50% $NO #'
    folder.mkdir()
    for name in ("SLURM_CONF", "PATH", "TMPDIR"):
        monkeypatch.setenv(name, cluster.environment[name])
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.chdir(folder)
    cluster.wait_for_nodes()
    site = Site(cluster, folder)
    try:
        yield site
    finally:
        site.cancel_all()
