"""A run that is killed without a word goes on, and ends with the bytes of one that was not."""

from __future__ import annotations

import hashlib
import signal
from pathlib import Path

import killed_perturber
import own_process
import pytest
from isp_scenarios import HAS_ISP

import geneformer_fast as gf
from geneformer_fast.errors import OutputError

pytestmark = pytest.mark.skipif(not HAS_ISP, reason="../shared/fixtures/isp is not there")


def run(out: Path, *, files_until_killed: int | None = None, workers: int = 1, resume: bool = False) -> int:
    child = own_process.begin(
        killed_perturber.main, str(out), files_until_killed, workers, resume, environment={"OMP_NUM_THREADS": "1"}
    )
    child.join(timeout=300)
    return int(child.exitcode)


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.glob("*.parquet"))}


def test_a_killed_run_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    assert run(tmp_path / "whole") == 0
    whole = digests(tmp_path / "whole")
    assert len(whole) > 4
    out = tmp_path / "killed"
    assert run(out, files_until_killed=2) == -signal.SIGKILL
    before = {path: path.stat().st_mtime_ns for path in sorted(out.glob("part-*.parquet"))[:2]}
    with pytest.raises(OutputError, match=r"killed is unfinished: 2 of \d+ files are complete\. Run the same command"):
        gf.open_perturbations(out)
    assert run(out, files_until_killed=1, workers=2, resume=True) == -signal.SIGKILL
    assert run(out, workers=2, resume=True) == 0
    assert digests(out) == whole
    assert {path: path.stat().st_mtime_ns for path in before} == before, "what was complete was not made again"
    assert gf.open_perturbations(out).read().equals(gf.open_perturbations(tmp_path / "whole").read())
    assert {path.name for path in out.iterdir()} == {path.name for path in (tmp_path / "whole").iterdir()}
