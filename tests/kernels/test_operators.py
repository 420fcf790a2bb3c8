"""Operators and torch's compiler: it is not loaded for them, and does not look into them."""

from __future__ import annotations

import subprocess
import sys

import torch
from geneformer_kernels.operators import operator

# Each operator that a CPU runs, called once where nothing has loaded the compiler.
CHILD = """
import sys
import torch
import geneformer_kernels as kernels
from geneformer_kernels.ops.int8_linear.launches import quantize_rows_op
x, weight, scale = torch.randn(5, 32), torch.ones(32, 32, dtype=torch.int8), torch.ones(32)
kernels.fp8_linear(x, *kernels.quantize_weight_fp8(torch.ones(32, 32)), scale)
print(sorted({"numba", "scipy", "pandas"} & set(sys.modules)))
q, rows_scale = kernels.quantize_rows(x, impl="torch")
kernels.int8_linear(q, weight, scale, x_scale=rows_scale, out_dtype=torch.float32, impl="torch")
kernels.residual_layernorm_int8(x, x, scale, scale, eps=1e-5, norm="post", impl="torch")
kernels.int8_linear(x.requires_grad_(), weight, scale, mode="dynamic", impl="torch").sum().backward()
heavy = {"torch._dynamo", "torch._inductor", "sympy", "triton"}
print(sorted(heavy & set(sys.modules)), x.grad is not None)
"""


def test_calling_an_operator_does_not_load_the_compiler() -> None:
    done = subprocess.run([sys.executable, "-c", CHILD], capture_output=True, text=True)
    # Eight bits of floating point need no compiled loops either.
    assert done.stdout == "[]\n[] True\n", done.stdout + done.stderr


insides: list[bool] = []


def doubled(x: torch.Tensor) -> torch.Tensor:
    return x * 2


@operator("test_operators_probe")
def probe(x: torch.Tensor) -> torch.Tensor:
    insides.append(torch.compiler.is_compiling())
    return doubled(x)


@probe.register_fake
def _(x):
    return torch.empty_like(x)


@torch.compiler.disable(recursive=False)
def around(x: torch.Tensor) -> torch.Tensor:
    """Not compiled itself, while what it calls is."""
    return probe.overload(x)


def test_the_compiler_does_not_look_into_an_operator() -> None:
    torch._dynamo.reset()
    insides.clear()
    graphs: list[list[str]] = []

    def keep(graph, inputs):
        graphs.append([str(node.target) for node in graph.graph.nodes if node.op == "call_function"])
        return graph.forward

    x = torch.arange(3.0)
    inside = torch.compile(lambda x: probe(x) + 1, backend=keep)
    beside = torch.compile(lambda x: around(x) + 1, backend=keep)
    for compiled in (inside, beside):
        assert torch.equal(compiled(x), 2 * x + 1)
        assert torch.equal(compiled(x), 2 * x + 1)
    assert insides == [False] * 4
    assert any("test_operators_probe" in target for target in graphs[0])
    assert not any("mul" in target for targets in graphs for target in targets)
