"""What a loop gives does not depend on whether it was compiled just now or by an earlier process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

# As a process that starts: what one process compiles and what the next one finds kept are to be told apart.
_SUMS = """
import hashlib, torch
from geneformer_kernels.cpu.norm_rows import add_layer_norm
torch.manual_seed(0)
x, residual, weight, bias = torch.randn(400, 64).bfloat16(), torch.randn(400, 64), torch.rand(64), torch.rand(64)
from geneformer_kernels.ops.varlen_attention import host
q, k, v = torch.randn(3, 150, 2, 64).bfloat16().unbind(0)
attended = host.varlen_attention_blocked(q, k, v, [0, 83, 150], 0.125, 32)
print("attention", hashlib.sha256(attended.view(torch.uint16).numpy().tobytes()).hexdigest())
for norm in ("pre", "post"):
    stream, out = add_layer_norm(x, residual, weight, bias, 1e-12, norm)
    print(norm, hashlib.sha256(stream.numpy().tobytes() + out.view(torch.uint16).numpy().tobytes()).hexdigest())
"""


def test_kept_loops_give_the_same_bits(tmp_path: Path) -> None:
    import geneformer_kernels

    environment = os.environ | {
        "NUMBA_CACHE_DIR": str(tmp_path),
        "PYTHONPATH": str(Path(geneformer_kernels.__file__).parents[1]),
    }
    said = [
        subprocess.run(
            [sys.executable, "-c", _SUMS], env=environment, capture_output=True, text=True, check=True
        ).stdout
        for _ in range(2)
    ]
    assert any(tmp_path.rglob("norm_rows*.nbi"))
    assert said[0] == said[1]
