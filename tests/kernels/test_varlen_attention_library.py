"""varlen_attention by torch's kernels for packed sequences: their calls without a card, their numbers on one."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch
from geneformer_kernels import attention_cells, varlen_attention, varlen_attention_qkv
from geneformer_kernels.dispatch import use_impl
from geneformer_kernels.ops.varlen_attention import library, op, reference, sdpa
from geneformer_kernels.ops.varlen_attention.cells import AttentionCells
from geneformer_kernels.ops.varlen_attention.plan import TorchPlan, is_for_cudnn
from geneformer_kernels.target import CARDS
from tolerance import Witness, assert_as_good_as
from torch.fx.operator_schemas import normalize_function

LENGTHS = [5, 0, 1, 33, 12]
ROUTES = ["varlen", "efficient"]


def inputs(dtype: torch.dtype, head_dim: int, lengths: list[int] = LENGTHS, device: str = "cpu"):
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(sum(lengths), 3, 2, head_dim, generator=generator) + 0.5
    d_out = torch.randn(sum(lengths), 2, head_dim, generator=generator) + 0.25
    bounds = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)
    return qkv.to(device, dtype), d_out.to(device, dtype), bounds


@pytest.fixture(params=ROUTES)
def route(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The route, with plain attention in the place of the kernels that only a card has; modes are written down."""
    if request.param == "varlen":
        pytest.importorskip("torch.nn.attention.varlen")
    modes: list[bool] = []

    def efficient(q, k, v, mask, bounds, same, longest, longest_too, dropout_p, mask_type, keeps_sums, *, scale):
        assert mask is None
        assert bounds is same
        assert longest == longest_too == max(LENGTHS)
        out = reference.varlen_attention(q[0], k[0], v[0], bounds, scale)
        state = torch.tensor(3), torch.tensor(4)
        return out[None], q.new_zeros(len(bounds) - 1, 2, 64, dtype=torch.float32), *state, longest, longest

    def efficient_bwd(d, q, k, v, mask, out, bounds, same, longest, again, sums, p, seed, offset, kind, bias, *, scale):
        modes.append(torch.are_deterministic_algorithms_enabled())
        assert (int(seed), int(offset), p) == (3, 4, 0.0)
        return *(x[None] for x in plain_bwd(d[0], q[0], k[0], v[0], bounds, scale)), None

    def flash_bwd(d, q, k, v, out, lse, bounds, same, longest, again, p, is_causal, state, unused, *, scale):
        modes.append(torch.are_deterministic_algorithms_enabled())
        assert not is_causal
        return plain_bwd(d, q, k, v, bounds, scale)

    def plain_bwd(d, q, k, v, bounds, scale):
        return sdpa.attend_cells_bwd(d, q, k, v, bounds, scale, 0.0, None)

    def varlen_attn(q, k, v, bounds, same, longest, again, *, return_aux=None, scale=None):
        out = reference.varlen_attention(q, k, v, bounds, scale)
        return out if return_aux is None else (out, q.new_zeros(2, len(q), dtype=torch.float32))

    aten = SimpleNamespace(
        _efficient_attention_forward=efficient,
        _efficient_attention_backward=efficient_bwd,
        _flash_attention_backward=flash_bwd,
    )
    monkeypatch.setattr(library, "_ATEN", aten)
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_attn, raising=False)
    monkeypatch.setattr(sdpa, "_route", lambda *_: TorchPlan(request.param, "for this test"))
    monkeypatch.setattr(library, "modes", modes, raising=False)
    return request.param


@pytest.mark.parametrize("head_dim", [8, 7])
def test_wiring(route: str, head_dim: int) -> None:
    """Heads padded and cut again, each gradient in its place, deterministic only while the gradient is computed."""
    qkv, d_out, bounds = inputs(torch.float64, head_dim)
    results = []
    for impl in ("torch", "reference"):
        leaf = qkv.clone().requires_grad_()
        out = varlen_attention_qkv(leaf, cu_seqlens=bounds, scale=0.3, impl=impl)
        results.append((out.detach(), torch.autograd.grad(out, leaf, d_out)[0]))
    for value, truth in zip(*results, strict=True):
        torch.testing.assert_close(value, truth)
    assert library.modes == [True]
    assert not torch.are_deterministic_algorithms_enabled()
    with torch.no_grad():
        out = varlen_attention(*qkv.unbind(1), cu_seqlens=bounds, scale=0.3, impl="torch")
    torch.testing.assert_close(out, results[1][0])


def test_a_failing_backward_leaves_the_mode_as_it_was(route: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_, **__):
        raise torch.OutOfMemoryError("no memory")

    for name in ("_efficient_attention_backward", "_flash_attention_backward"):
        monkeypatch.setattr(library._ATEN, name, fails)
    qkv, _, bounds = inputs(torch.float32, 8)
    with pytest.raises(torch.OutOfMemoryError):
        varlen_attention_qkv(qkv.requires_grad_(), cu_seqlens=bounds, impl="torch").sum().backward()
    assert not torch.are_deterministic_algorithms_enabled()


def test_mode_of_the_user_is_kept() -> None:
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with library.deterministic():
            assert not torch.is_deterministic_algorithms_warn_only_enabled()
        assert torch.is_deterministic_algorithms_warn_only_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("route", ROUTES)
def test_calls_fit_torchs_own_signatures(route: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On tensors without data torch checks arguments and gives shapes; ours promises the same ones to a compiler."""
    if route == "varlen":
        pytest.importorskip("torch.nn.attention.varlen")
    qkv, d_out, bounds = (x.to("meta") for x in inputs(torch.float16, 16))
    q, k, v = qkv.unbind(1)
    numbers = (max(LENGTHS), 0.25, 0.0)
    real = library.attend_fwd.function(route, q, k, v, bounds, *numbers)
    promised = library.attend_fwd(route, q, k, v, bounds, *numbers)
    for one, other in zip(real[:2], promised[:2], strict=True):
        assert (one.shape, one.dtype) == (other.shape, other.dtype)

    name = f"_{'flash' if route == 'varlen' else route}_attention_backward"
    bound = {}

    def backward(*args, **kwargs):
        # torch's own shapes of one of them do not know its arguments; the schema does.
        bound.update(normalize_function(getattr(torch.ops.aten, name).default, args, kwargs, None, None, True).kwargs)
        return (d_out[None],) * 4 if route == "efficient" else (d_out,) * 3

    monkeypatch.setattr(library, "_ATEN", SimpleNamespace(**{name: backward}))
    library.attend_bwd.function(d_out, route, q, k, v, bounds, *promised, *numbers)
    assert bound["out"].shape[-3:] == bound["query"].shape[-3:] == d_out.shape
    assert bound["logsumexp"].shape == promised[1].shape
    assert (bound["scale"], bound["dropout_p"]) == (0.25, 0.0)
    longest = [bound[key] for key in bound if key.startswith("max_")]
    assert longest == [max(LENGTHS)] * 2


def test_compiled_without_a_break(route: str) -> None:
    """The operator is opaque to the compiler; its gradient too."""
    qkv, d_out, bounds = inputs(torch.float32, 8)
    q, k, v = (x.clone().requires_grad_() for x in qkv.unbind(1))
    numbers = (max(LENGTHS), 0.25, 0.0)

    def function(q, k, v):
        return library.attend(route, q * 1, k, v, bounds, *numbers, True) + 1

    torch._dynamo.reset()
    results = []
    for run in (function, torch.compile(function, fullgraph=True, backend="aot_eager")):
        out = run(q, k, v)
        results.append([out.detach(), *torch.autograd.grad(out, (q, k, v), d_out)])
    for value, truth in zip(*results, strict=True):
        torch.testing.assert_close(value, truth)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("head_dim", [32, 64, 128, 20])
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_full_size(dtype: torch.dtype, head_dim: int, dropout_p: float) -> None:
    """Every route that this card and this torch take: against float64, and the same bits every time."""
    if dtype == torch.bfloat16 and torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("this card has no bfloat16")
    qkv, d_out, bounds = inputs(dtype, head_dim, [2048, 0, 1, 50, 777, 300], "cuda")

    def run(impl: str, qkv: torch.Tensor, d_out: torch.Tensor, p: float = 0.0) -> list[torch.Tensor]:
        leaf = qkv.clone().requires_grad_()
        torch.manual_seed(3)
        out = varlen_attention_qkv(leaf, cu_seqlens=bounds, dropout_p=p, impl=impl)
        return [out.detach(), torch.autograd.grad(out, leaf, d_out)[0]]

    first, again = (run("torch", qkv, d_out, dropout_p) for _ in range(2))
    for one, other in zip(first, again, strict=True):
        assert torch.isfinite(one).all()
        assert torch.equal(one, other)
    if dropout_p == 0:
        witnesses = Witness(run, "reference", qkv, d_out)
        truths = run("reference", qkv.double(), d_out.double())
        for value, witness, truth in zip(first, witnesses, truths, strict=True):
            assert_as_good_as(value, witness, truth, factor=3.0 if dtype == torch.float32 else 2.0)


def test_cells_of_one_length_are_views(monkeypatch: pytest.MonkeyPatch) -> None:
    def plain(q, k, v, scale):
        assert q.shape == (3, 2, 4, 8)
        assert q.data_ptr() == qkv.data_ptr()
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=scale)

    monkeypatch.setattr(library, "cudnn", plain)
    qkv, _, bounds = inputs(torch.float32, 8, [4, 4, 4])
    out = sdpa.attend_equal(*qkv.unbind(1), 4, 0.3)
    torch.testing.assert_close(out, reference.varlen_attention(*qkv.unbind(1), bounds, 0.3))


@pytest.mark.parametrize(
    ("card", "dtype", "head_dim", "length", "is_it"),
    [
        ("H100", "bfloat16", 64, 2048, True),
        ("H100", "float16", 128, 4096, True),
        ("H100", "bfloat16", 64, 2000, False),
        ("H100", "bfloat16", 64, 0, False),
        ("H100", "bfloat16", 32, 2048, False),
        ("H100", "float32", 64, 2048, False),
        ("A100", "bfloat16", 64, 2048, False),
    ],
)
def test_where_cudnn_is_faster(card: str, dtype: str, head_dim: int, length: int, is_it: bool) -> None:
    assert is_for_cudnn(dtype, head_dim, length, CARDS[card]) == is_it


@pytest.mark.gpu
def test_a_graph_of_cells_of_one_length_is_right_for_others() -> None:
    """cuDNN would read a replay's cells as if they were as long as those that were captured."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    dtype = torch.bfloat16 if torch.cuda.get_device_capability() >= (8, 0) else torch.float16
    qkv, _, equal = inputs(dtype, 64, [1024, 1024], "cuda")
    bounds = equal.clone()

    def attend() -> torch.Tensor:
        cells = attention_cells(bounds, qkv, head_dim=64, longest=1024)
        return varlen_attention_qkv(qkv, cu_seqlens=cells)

    with torch.no_grad():
        attend()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = attend()
        bounds.copy_(torch.tensor([0, 700, 2048]))
        graph.replay()
    truth = reference.varlen_attention(*qkv.double().unbind(1), bounds, 0.125)
    witness = Witness(reference.varlen_attention, *qkv.unbind(1), bounds, 0.125)
    assert_as_good_as(out, witness, truth)


def test_cudnn_is_not_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    qkv, _, bounds = inputs(torch.bfloat16, 64, [1024, 1024])
    cells = AttentionCells(bounds, 2048, 1024)
    monkeypatch.setattr(op, "target_for", lambda x: CARDS["H100"])
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    for is_capturing, length in ((False, 1024), (True, 0)):
        monkeypatch.setattr(op, "is_capturing", lambda x, is_it=is_capturing: is_it)
        assert op._length_for_cudnn(qkv[:, 0], None, 0.0, cells, False) == length


@pytest.mark.gpu
def test_cudnn_takes_cells_of_one_length(monkeypatch: pytest.MonkeyPatch) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("cuDNN was measured on Hopper alone")
    calls = []
    kernel = library.cudnn
    monkeypatch.setattr(library, "cudnn", lambda *arguments: calls.append(1) or kernel(*arguments))
    qkv, _, bounds = inputs(torch.bfloat16, 64, [1024, 1024], "cuda")
    truth = reference.varlen_attention(*qkv.double().unbind(1), bounds, 0.125)
    witness = Witness(reference.varlen_attention, *qkv.unbind(1), bounds, 0.125)
    assert_as_good_as(varlen_attention_qkv(qkv, cu_seqlens=bounds), witness, truth)
    assert calls == []
    cells = attention_cells(bounds, qkv, head_dim=64, longest=1024)
    for out in (
        varlen_attention_qkv(qkv, cu_seqlens=cells),
        varlen_attention(*qkv.unbind(1), cu_seqlens=cells),
    ):
        assert_as_good_as(out, witness, truth)
    assert calls == [1, 1]
    varlen_attention_qkv(qkv, cu_seqlens=cells, impl="triton")
    varlen_attention_qkv(qkv.clone().requires_grad_(), cu_seqlens=cells)
    varlen_attention_qkv(qkv, cu_seqlens=cells, dropout_p=0.1)
    with use_impl("triton"):
        varlen_attention_qkv(qkv, cu_seqlens=cells)
    assert calls == [1, 1]
