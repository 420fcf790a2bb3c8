"""Single flipped bytes in everything that is read: the same values, or one error of ours; no crash, hang or silence.

Formats without checksums cannot tell a flipped count from another count: there a changed value passes where the
format's own library reads the same one from the same bytes. Run with ``pytest -m slow``; GENEFORMER_FAST_FLIPS says how
many flips of each format (50).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import flips
import pytest

N_FLIPS = int(os.environ.get("GENEFORMER_FAST_FLIPS", 50))
FINE = ("same", "refused", "as stored")
#: libhdf5 does not survive every damage of its own structures, at places that change with its version.
LIBRARY_MAY_CRASH = ("h5ad", "10x", "loom")
KINDS = [
    *("h5ad csr", "h5ad gzip", "h5ad csc", "h5ad dense", "zarr 2", "zarr 3"),
    *("10x h5", "loom", "tokens", "pickles"),
]


def outcomes(kind: str, folder: Path, first: int, last: int) -> list[dict[str, object]]:
    """What became of each flip; of one that ended its process too, after which the next ones go on."""
    root = Path(__file__).resolve().parents[2]
    paths = os.pathsep.join([str(root), str(root / "kernels")])
    done: list[dict[str, object]] = []
    while first < last:
        command = [sys.executable, flips.__file__, kind, str(folder), str(first), str(last)]
        run = subprocess.run(
            command,
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": paths},
            timeout=60 * (last - first),
        )
        lines = [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]
        done += [line for line in lines if "outcome" in line]
        if run.returncode == 0:
            break
        assert lines, run.stderr
        done.append({**lines[-1], "outcome": f"ended with {run.returncode}: {run.stderr[-300:]}"})
        first = int(lines[-1]["seed"]) + 1
    return done


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_flipped_bytes(tmp_path, kind):
    if kind.startswith("zarr"):
        pytest.importorskip("zarr", minversion="3.1.3")
    folder = tmp_path / "whole"
    folder.mkdir()
    flips.write(kind, folder)
    found = outcomes(kind, folder, 0, N_FLIPS)
    assert len(found) == N_FLIPS
    print(kind, Counter(str(line["outcome"]).split(":")[0] for line in found))
    faults = [line for line in found if line["outcome"] not in FINE]
    if kind.startswith(LIBRARY_MAY_CRASH):
        faults = [line for line in faults if not str(line["outcome"]).startswith("ended with -")]
    assert not faults, "\n".join(map(str, faults))


@pytest.mark.parametrize("kind", ["tokens", "pickles"])
def test_a_few_flipped_bytes(tmp_path, kind):
    """In this process, without what may crash."""
    (tmp_path / "whole").mkdir()
    flips.write(kind, tmp_path / "whole")
    whole = flips.ours(kind, tmp_path / "whole")
    for seed in range(1000, 1040):
        what = flips.flip(tmp_path / "whole", tmp_path / "damaged", seed)
        assert flips.judged(kind, tmp_path / "damaged", whole) in FINE, what
