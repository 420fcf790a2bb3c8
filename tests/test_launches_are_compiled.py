"""What host code launches is in the committed table: recorded launches against rows, for even sizes and for odd ones.

Triton compiles a kernel anew for every class of arguments: which pointers are aligned and which sizes are multiples of
16. A class without a row could spill without anybody knowing. Here the operations run for made-up cards with kernels
that only remember how they were called. ``rank_genes`` is not among them: its sizes are not part of a class.
"""

from __future__ import annotations

import functools
import importlib
import itertools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import aot_matrix
import geneformer_kernels as gk
import pytest
import torch
from aot_tables import ARCHITECTURES
from geneformer_kernels import target as targets
from geneformer_kernels.dispatch import OPERATIONS
from geneformer_kernels.launch import TRITON_TYPES, KernelCase
from geneformer_kernels.on_device import DTYPE_NAMES
from geneformer_kernels.ops.mlm_cross_entropy import plan as mlm_plan
from geneformer_kernels.target import CARDS, Target
from kernel_source import kernel_files, kernel_functions

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="kernels are compiled for the card in this process"
)
OPS = aot_matrix.ROOT / "kernels" / "geneformer_kernels" / "ops"
HALVES = (torch.float16, torch.bfloat16)
DTYPES = (*HALVES, torch.float32)
#: One multiprocessor, which few rows fill with large tiles, and so many that all tiles are small.
N_SMS = (1, 10**6)
HAS_PRODUCTS = [name for name, card in CARDS.items() if card.sm >= 80]


@dataclass(frozen=True)
class Launch:
    """A call of a kernel: its name and arguments."""

    kernel: str
    arguments: dict[str, Any]


def not_specialised(function: Any, option: str = "do_not_specialize") -> set[str]:
    """Arguments of an interpreted kernel that do not make a class."""
    return set(function.kwargs.get(option) or ())


def class_of(launch: Launch, function: Any, case: KernelCase) -> str:
    """Why a launch is not the case; empty where the compiler makes the same code of both."""
    options = case.launch.options
    given = {name: value for name, value in launch.arguments.items() if name not in options}
    if {name: launch.arguments.get(name) for name in options} != options:
        return "options"
    constants = {name for name, value in given.items() if name.isupper() or value is None}
    # Without an optional argument the code is a part of what was compiled; with one more it is not.
    if not set(case.constexprs) <= constants:
        return "one argument more"
    for name in case.constexprs:
        if given[name] != case.constexprs[name]:
            return name
    no_class, no_alignment = (
        not_specialised(function, option) for option in ("do_not_specialize", "do_not_specialize_on_alignment")
    )
    for name in given.keys() - constants:
        value, is_divisible = given[name], False
        if isinstance(value, torch.Tensor):
            if case.signature[name] != "*" + TRITON_TYPES[DTYPE_NAMES[value.dtype]]:
                return name
            is_divisible = value.data_ptr() % 16 == 0 and name not in no_alignment
        elif isinstance(value, int) and name not in no_class:
            assert value != 1, f"{name} is 1, which is a class of its own"
            is_divisible = value % 16 == 0
        if is_divisible != (name in case.divisible):
            return f"{name} divisible {is_divisible}"
    return ""


class Recorder:
    """Stands for a kernel: remembers a launch and computes nothing."""

    def __init__(self, name: str, launches: list[Launch]) -> None:
        self.name, self.launches = name, launches

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda **arguments: self.launches.append(Launch(self.name, arguments))


@pytest.fixture(scope="module")
def kernels() -> dict[str, Any]:
    """Name -> the interpreted kernel, of every operation."""
    found = {}
    for path in (path for folder in sorted(OPS.iterdir()) for path in kernel_files(folder)):
        module = importlib.import_module(f"geneformer_kernels.ops.{path.parent.name}.{path.stem}")
        found |= {name: getattr(module, name) for name in kernel_functions(path)}
    return found


@pytest.fixture
def launches(kernels: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> list[Launch]:
    """What was launched so far, by operations whose kernels write nothing: what they would write is zeros."""
    recorded: list[Launch] = []
    for name, function in kernels.items():
        monkeypatch.setattr(importlib.import_module(function.fn.__module__), name, Recorder(name, recorded))
    monkeypatch.setattr(torch, "empty", torch.zeros)
    return recorded


@pytest.fixture
def on_card(monkeypatch: pytest.MonkeyPatch) -> Callable[[Target], None]:
    """Makes every device a given card."""
    return lambda card: monkeypatch.setattr(targets, "_probe", lambda *_: card)


@functools.cache
def committed_labels() -> set[tuple[str, str, str, str, int]]:
    return {(row.op, row.kernel, row.problem, row.dtype, row.sm) for row in aot_matrix.committed_table().rows}


@functools.cache
def default_cases(op: str, sm: int) -> dict[str, list[KernelCase]]:
    cases: dict[str, list[KernelCase]] = {}
    for case in aot_matrix.plan_of(op).kernel_cases(Target.cuda(sm)):
        if case.is_default:
            cases.setdefault(case.kernel, []).append(case)
    return cases


def assert_in_table(op: str, card: Target, launches: list[Launch], kernels: dict[str, Any]) -> None:
    """Every launch is a case that counts as a default, and the committed table has its row."""
    assert launches
    table = committed_labels()
    for launch in launches:
        same = default_cases(op, card.sm).get(launch.kernel, [])
        reasons = [class_of(launch, kernels[launch.kernel], case) for case in same]
        found = [case for case, reason in zip(same, reasons, strict=True) if not reason]
        assert found, f"{launch.kernel} on sm_{card.sm} with {described(launch)} has no row: {sorted(set(reasons))}"
        row = op, launch.kernel, found[0].problem, found[0].dtype, card.sm
        assert row in table, f"{row}: run python tools/aot_matrix.py"
    launches.clear()


def described(launch: Launch) -> dict[str, Any]:
    return {k: [*v.shape] if isinstance(v, torch.Tensor) else v for k, v in launch.arguments.items()}


def leaf(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.ones(shape, dtype=dtype, requires_grad=True)


def both_tiles(card: str) -> Iterator[Target]:
    for n_sms in N_SMS:
        yield replace(CARDS[card], n_sms=n_sms)


@pytest.mark.parametrize("card", HAS_PRODUCTS)
@pytest.mark.parametrize("head_dim", [5, 16, 32, 33, 48, 64, 72, 80, 100, 112, 120, 128])
def test_varlen_attention(card: str, head_dim: int, launches, kernels, on_card) -> None:
    on_card(CARDS[card])
    cu_seqlens = torch.tensor([0, 5, 12], dtype=torch.int32)
    for dtype, dropout_p in itertools.product(HALVES, (0.0, 0.1)):
        qkv = leaf(12, 3, 2, head_dim, dtype=dtype)
        arguments = dict(cu_seqlens=cu_seqlens, dropout_p=dropout_p, impl="triton")
        gk.varlen_attention_qkv(qkv, **arguments).sum().backward()
        gk.varlen_attention(*qkv.unbind(1), **arguments).sum().backward()
        gk.varlen_attention(*qkv.permute(1, 3, 2, 0).contiguous().permute(0, 3, 2, 1), **arguments)
        assert {launch.arguments.get("HEAD_DIM", 16) % 16 for launch in launches} == {0}
        assert_in_table("varlen_attention", CARDS[card], launches, kernels)


@pytest.mark.parametrize("card", HAS_PRODUCTS)
@pytest.mark.parametrize("head_dim", [5, 32, 33, 64, 72, 128])
def test_favor_attention(card: str, head_dim: int, launches, kernels, on_card) -> None:
    cu_seqlens, projection = torch.tensor([0, 5, 5, 1200], dtype=torch.int32), torch.ones(37, head_dim)
    for target, dtype, stabiliser in itertools.product(both_tiles(card), HALVES, ("cell", "batch")):
        on_card(target)
        arguments = dict(cu_seqlens=cu_seqlens, stabiliser=stabiliser, impl="triton")
        qkv = leaf(1200, 3, 2, head_dim, dtype=dtype)
        gk.favor_attention(*qkv.unbind(1), projection, **arguments).sum().backward()
        apart = qkv.detach().permute(1, 3, 2, 0).contiguous().permute(0, 3, 2, 1)
        gk.favor_attention(*apart, projection, **arguments)
        assert_in_table("favor_attention", target, launches, kernels)


ACTIVATIONS = ("relu", "gelu", "gelu_tanh", "swiglu")
FF_SIZES = [(128, 320), (256, 512), (256, 500), (512, 512), (784, 96), (769, 101)]


# Sizes with each activation and with each card; all three together are slow tests.
@pytest.mark.parametrize(
    ("sizes", "activation", "card"),
    [
        pytest.param(*case, marks=() if (i + j + k) % 4 == 0 else pytest.mark.slow, id="-".join(map(str, case)))
        for (i, sizes), (j, activation), (k, card) in itertools.product(
            enumerate(FF_SIZES), enumerate(ACTIVATIONS), enumerate(HAS_PRODUCTS)
        )
        for case in [(sizes, activation, card)]
    ],
)
def test_feed_forward(card: str, activation: str, sizes: tuple[int, int], launches, kernels, on_card) -> None:
    width, ff_width = sizes
    for target, dtype in itertools.product(both_tiles(card), DTYPES):
        on_card(target)
        hidden = ff_width * (2 if activation == "swiglu" else 1)
        weights = leaf(hidden, width), leaf(hidden), leaf(width, ff_width), leaf(width)
        x = leaf(5, width, dtype=dtype)
        gk.feed_forward(x, *weights, activation=activation, impl="triton").sum().backward()
        norm = leaf(width), leaf(width)
        arguments = dict(activation=activation, eps=1e-5, norm="post", impl="triton")
        if width in (128, 256):  # elsewhere, and with other hidden units, the LayerNorm is torch's
            stream, out = gk.feed_forward_layernorm(x, leaf(5, width), *weights, *norm, dropout_p=0.1, **arguments)
            (stream.sum() + out.sum()).backward()
        assert_in_table("feed_forward", CARDS[card], launches, kernels)


@pytest.mark.parametrize("card", HAS_PRODUCTS)
@pytest.mark.parametrize("sizes", [(768, 48), (784, 101), (769, 101), (64, 72)], ids=str)
def test_int8_linear(card: str, sizes: tuple[int, int], launches, kernels, on_card) -> None:
    width, n_columns = sizes
    weight_q, weight_scale = torch.ones(n_columns, width, dtype=torch.int8), torch.ones(n_columns)
    for target, dtype, mode in itertools.product(both_tiles(card), DTYPES, ("dynamic", "weight_only")):
        on_card(target)
        for n_rows, activation in itertools.product((5, 20, 40), (None, "relu", "gelu", "gelu_tanh")):
            x, bias = torch.ones(n_rows, width, dtype=dtype), torch.ones(n_columns)
            gk.int8_linear(x, weight_q, weight_scale, bias, activation=activation, mode=mode, impl="triton")
        assert_in_table("int8_linear", CARDS[card], launches, kernels)


@pytest.mark.parametrize("card", CARDS)
@pytest.mark.parametrize("width", [100, 128, 250, 256, 384, 512, 513, 769, 1024, 1152, 2000, 2050, 3072, 4100, 8192])
def test_quantize_rows(card: str, width: int, launches, kernels, on_card) -> None:
    on_card(CARDS[card])
    for dtype in DTYPES if CARDS[card].sm >= 75 else (torch.float16, torch.float32):
        gk.quantize_rows(torch.ones(7, width, dtype=dtype))
        gk.quantize_rows(torch.ones(width, 7, dtype=dtype).T)
        assert_in_table("int8_linear", CARDS[card], launches, kernels)


@pytest.mark.parametrize("card", HAS_PRODUCTS)
@pytest.mark.parametrize("sizes", [(128, 256, 128), (250, 500, 250), (769, 100, 48), (96, 3420, 96)], ids=str)
def test_int8_feed_forward(card: str, sizes: tuple[int, int, int], launches, kernels, on_card) -> None:
    width, ff_width, n_columns = sizes
    for target, dtype in itertools.product(both_tiles(card), DTYPES):
        on_card(target)
        for n_rows, activation in itertools.product((5, 40), ("relu", "gelu", "gelu_tanh", "swiglu")):
            n_hidden = ff_width * (2 if activation == "swiglu" else 1)
            up_q, down_q = (torch.ones(shape, dtype=torch.int8) for shape in ((n_hidden, width), (n_columns, ff_width)))
            up, down = (torch.ones(n_hidden),) * 2, (torch.ones(n_columns),) * 2
            x, options = torch.ones(n_rows, width), dict(activation=activation, out_dtype=dtype, impl="triton")
            gk.int8_feed_forward(x, up_q, *up, down_q, *down, **options)
            rows = x.to(torch.int8)
            gk.int8_feed_forward(rows, up_q, *up, down_q, *down, x_scale=torch.ones(n_rows), **options)
        assert_in_table("int8_feed_forward", CARDS[card], launches, kernels)


# Each size with two of the cards; with all of them it is a slow test.
@pytest.mark.parametrize(
    ("n_vocab", "width", "card"),
    [
        pytest.param(n_vocab, width, card, marks=() if (i + j + k) % 2 == 0 else pytest.mark.slow)
        for i, n_vocab in enumerate((1003, 1024))
        for j, width in enumerate((250, 256, 511, 512, 768, 769))
        for k, card in enumerate(HAS_PRODUCTS)
    ],
)
def test_mlm_cross_entropy(card: str, width: int, n_vocab: int, launches, kernels, on_card, monkeypatch) -> None:
    monkeypatch.setattr(mlm_plan, "MIN_WORKSPACE_BYTES", 1)  # several chunks, of which the last begins at any entry
    for target, dtype in itertools.product(both_tiles(card), DTYPES):
        on_card(target)
        hidden, weight, bias = leaf(50, width, dtype=dtype), leaf(n_vocab, width), leaf(n_vocab)
        targets_of_rows = torch.arange(50)
        gk.mlm_cross_entropy(hidden, weight, bias, targets_of_rows, impl="triton").backward()
        assert [each.grad.shape for each in (hidden, weight)] == [hidden.shape, weight.shape]
        assert sum(launch.kernel == "mlm_cross_entropy_bwd_dlogits_kernel" for launch in launches) > 1
        assert_in_table("mlm_cross_entropy", CARDS[card], launches, kernels)


# Odd widths of the two operations below are compiled in float32 only.


def is_compiled_width(width: int, dtype: torch.dtype) -> bool:
    return width % 16 == 0 or dtype == torch.float32


@pytest.mark.parametrize("card", CARDS)
@pytest.mark.parametrize("width", [128, 256, 512, 640, 769, 1152, 1280])
def test_residual_layernorm(card: str, width: int, launches, kernels, on_card) -> None:
    on_card(CARDS[card])
    for dtype in DTYPES if CARDS[card].sm >= 75 else (torch.float16, torch.float32):
        if not is_compiled_width(width, dtype):
            continue
        x, residual, weight, bias = leaf(9, width, dtype=dtype), leaf(9, width), leaf(width), leaf(width)
        arguments = dict(eps=1e-5, norm="post", impl="triton", dropout_p=0.1)
        stream, out = gk.residual_layernorm(x, residual, weight, bias, **arguments)
        (stream.sum() + out.sum()).backward()
        for norm, smooth in itertools.product(("post", "pre"), (None, weight)):
            if width % 16 == 0 or (norm == "post" and smooth is not None):
                with torch.no_grad():
                    gk.residual_layernorm_int8(x, residual, weight, bias, eps=1e-5, norm=norm, smooth=smooth)
        assert_in_table("residual_layernorm", CARDS[card], launches, kernels)


@pytest.mark.parametrize("card", CARDS)
@pytest.mark.parametrize("width", [128, 256, 512, 640, 769, 1152, 1280])
def test_embed_tokens(card: str, width: int, launches, kernels, on_card) -> None:
    on_card(CARDS[card])
    cu_seqlens = torch.tensor([0, 5, 12], dtype=torch.int32)
    for dtype in HALVES if CARDS[card].sm >= 75 else (torch.float16,):
        if not is_compiled_width(width, dtype):
            continue
        tables = leaf(30, width), leaf(20, width), leaf(width), leaf(width), leaf(width)
        ids = torch.arange(12)
        stream, out = gk.embed_tokens(ids, cu_seqlens, *tables, dropout_p=0.1, out_dtype=dtype, impl="triton")
        (stream.sum() + out.sum()).backward()
        assert_in_table("embed_tokens", CARDS[card], launches, kernels)


def test_cases_declare_nothing_that_kernels_do_not_look_at(kernels) -> None:
    """What a kernel is not specialised on is not compiled as if it were."""
    for task in aot_matrix.collect(OPERATIONS, ARCHITECTURES):
        function = kernels[task.case.kernel]
        names = not_specialised(function) | not_specialised(function, "do_not_specialize_on_alignment")
        assert not task.case.divisible & names, task.label
