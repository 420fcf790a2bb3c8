"""Two processes write what one writes, into one folder."""

from __future__ import annotations

import hashlib
import socket
from pathlib import Path

import own_process
import pytest
import two_perturbers
from isp_scenarios import HAS_ISP

pytestmark = pytest.mark.skipif(not HAS_ISP, reason="../shared/fixtures/isp is not there")


def run(out: Path, *, resume: bool = False) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    ranks = [
        own_process.begin(
            two_perturbers.main, str(out), resume, environment={**shared, "RANK": rank, "LOCAL_RANK": rank}
        )
        for rank in "01"
    ]
    for rank in ranks:
        rank.join(timeout=300)
    assert [rank.exitcode for rank in ranks] == [0, 0]


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.glob("*.parquet"))}


def test_two_processes_write_the_files_of_one(tmp_path):
    alone = own_process.begin(two_perturbers.main, str(tmp_path / "one"), False, environment={"OMP_NUM_THREADS": "1"})
    run(tmp_path / "two")
    alone.join(timeout=300)
    assert alone.exitcode == 0
    one, two = digests(tmp_path / "one"), digests(tmp_path / "two")
    assert len(one) > 4
    assert one == two
    run(tmp_path / "two", resume=True)  # there is nothing left to do, and both say so
    assert digests(tmp_path / "two") == one
