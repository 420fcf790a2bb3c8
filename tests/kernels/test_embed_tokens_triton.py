"""The Triton kernels of embed_tokens against float64, interpreted or on a card."""

from __future__ import annotations

import inspect
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from fences import nan_behind
from geneformer_kernels import arguments as arguments_of_operations
from geneformer_kernels import embed_tokens
from geneformer_kernels.dispatch import ImplUnavailableError, choose
from geneformer_kernels.ops.embed_tokens import plan as planner
from geneformer_kernels.ops.embed_tokens import reference
from geneformer_kernels.ops.embed_tokens.op import _table_gradient, embed_tokens_bwd, embed_tokens_fwd
from geneformer_kernels.target import CARDS, Target, target_of
from philox import keep_mask
from tolerance import Witness, assert_as_good_as

FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
EPS = 1e-12
LEAVES = ("token_table", "position_table", "type_row", "weight", "bias")
NORM = ("weight", "bias")
# Cells shorter and longer than one another, empty ones at both ends and in the middle, and one of a single token.
LENGTHS = (0, 5, 1, 40, 0, 0, 17, 0)


def make(
    device: str,
    *,
    width: int = 48,
    lengths: tuple[int, ...] = LENGTHS,
    n_vocabulary: int = 23,
    n_positions: int = 41,
    absent: tuple[str, ...] = (),
) -> dict[str, torch.Tensor | None]:
    generator = torch.Generator().manual_seed(width)

    def normal(*shape: int, mean: float = 0.0) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator) + mean).to(device)

    ids = torch.randint(0, n_vocabulary - 2, (sum(lengths),), generator=generator)
    ids[::3] = 7  # a token that fills more than a chunk, as <mask> does; the last two never occur
    return {
        "token_ids": ids.int().to(device),
        "cu_seqlens": F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).int().to(device),
        "token_table": normal(n_vocabulary, width, mean=2),
        "position_table": normal(n_positions, width, mean=-1),
        "type_row": normal(width, mean=1),
        "weight": normal(width, mean=0.5),
        "bias": normal(width),
    } | dict.fromkeys(absent)


def plain(
    token_ids: torch.Tensor,
    cu_seqlens: torch.Tensor,
    token_table: torch.Tensor,
    position_table: torch.Tensor,
    type_row: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    keep: torch.Tensor | None,
    dropout_p: float,
) -> torch.Tensor:
    positions = torch.cat([torch.arange(length) for length in cu_seqlens.diff().tolist()]).to(token_ids.device)
    total = F.embedding(token_ids.long(), token_table) + (0 if type_row is None else type_row)
    total = total + F.embedding(positions, position_table)
    if weight is not None:
        total = F.layer_norm(total, total.shape[-1:], weight, bias, eps)
    return total if keep is None else torch.where(keep, total / (1 - dropout_p) if dropout_p < 1 else total * 0, 0)


def results(
    given: dict[str, torch.Tensor | None],
    function,
    *,
    out_dtype: torch.dtype,
    uses: tuple[bool, bool] = (True, True),
    wide: torch.dtype = FP32,
) -> list[torch.Tensor]:
    """[stream, out, gradients...] of a function of the arguments, whose tables are converted to ``wide``."""
    generator = torch.Generator().manual_seed(1)
    shape = (len(given["token_ids"]), given["token_table"].shape[1])
    d_stream, d_out = ((torch.randn(shape, generator=generator) + 0.3).to(given["token_ids"].device) for _ in range(2))
    leaves = {name: nan_behind(given[name].to(wide)).requires_grad_() for name in LEAVES if given[name] is not None}
    stream, out = function(**(given | leaves))
    pairs = [(stream, d_stream.to(stream.dtype)), (out, d_out.to(out_dtype).to(out.dtype))]
    chosen = [(y, nan_behind(d)) for (y, d), is_used in zip(pairs, uses, strict=True) if is_used]
    torch.autograd.backward([y for y, _ in chosen], [d for _, d in chosen])
    return [stream.detach(), out.detach(), *(leaf.grad for leaf in leaves.values())]


def check(
    given: dict[str, torch.Tensor | None],
    *,
    out_dtype: torch.dtype = FP32,
    dropout_p: float = 0.0,
    eps: float = EPS,
    uses: tuple[bool, bool] = (True, True),
) -> list[torch.Tensor]:
    """Compares everything with float64 and returns what the kernels gave."""
    ids = given["token_ids"]
    seed = torch.tensor([(3 << 33) + len(ids)], device=ids.device)
    keep = None
    if dropout_p:
        keep = keep_mask(int(seed), len(ids), given["token_table"].shape[1], dropout_p).to(ids.device)

    def kernel(**arguments):
        return embed_tokens(**arguments, eps=eps, dropout_p=dropout_p, seed=seed, out_dtype=out_dtype, impl="triton")

    def composed(**arguments):
        stream = plain(**arguments, eps=eps, keep=keep, dropout_p=dropout_p)
        return stream, stream.to(out_dtype) if stream.dtype == FP32 else stream

    shared = {"out_dtype": out_dtype, "uses": uses}
    found = results(given, kernel, **shared)
    witnesses = Witness(results, given, composed, **shared)
    truths = results(given, composed, **shared, wide=torch.float64)
    # Of one column the mean takes all: what is left is rounding times the reciprocal deviation, which is 1 / sqrt(eps).
    # A card fuses products into sums and leaves more of it.
    is_one = given["token_table"].is_cuda and given["token_table"].shape[1] == 1
    slack = 1e-6 * eps**-0.5 if is_one else 0.0
    for value, witness, truth in zip(found, witnesses, truths, strict=True):
        assert value.dtype == witness.here.dtype
        assert_as_good_as(value, witness, truth, slack=slack)
    return found


@pytest.mark.parametrize("out_dtype", [FP32, FP16, BF16])
@pytest.mark.parametrize("absent", [(), NORM, ("type_row",), ("type_row", *NORM)])
def test_everything(device: str, guarded: None, absent: tuple[str, ...], out_dtype: torch.dtype) -> None:
    if out_dtype == BF16 and device == "cpu":
        pytest.skip("bfloat16 is for the card: Triton's interpreter gets it wrong")
    check(make(device, absent=absent), out_dtype=out_dtype, dropout_p=0.1 if out_dtype == FP16 else 0.0)


@pytest.mark.parametrize("width", [1, 300, 1500, 4096])
def test_widths(device: str, guarded: None, width: int) -> None:
    check(make(device, width=width, lengths=(2, 3), n_vocabulary=9, n_positions=3), out_dtype=FP16, dropout_p=0.25)


@pytest.mark.parametrize("uses", [(True, False), (False, True)])
def test_one_gradient_comes_in(device: str, guarded: None, uses: tuple[bool, bool]) -> None:
    check(make(device, lengths=(3, 4)), out_dtype=FP16, uses=uses)


def test_everything_dropped(device: str) -> None:
    found = check(make(device, lengths=(3, 4)), dropout_p=1.0)
    assert not any(each.any() for each in found)


def test_eps_counts(device: str) -> None:
    given = make(device, lengths=(3, 4))
    given |= {name: given[name] * 1e-3 for name in ("token_table", "position_table", "type_row")}
    found = [check(given, eps=eps)[0] for eps in (1e-12, 1e-5)]
    assert (found[0] - found[1]).abs().max() > 0.3


def test_statistics_survive_a_large_mean(device: str) -> None:
    given = make(device, lengths=(3, 4))
    check(given | {"token_table": given["token_table"] * 1e-2 + 1000})


@pytest.mark.parametrize(
    "lengths", [(4,), (0, 4), (4, 0), (1, 1), (2, 0, 0, 3), (1,) * 9, (0, 0, 0, 7, 0, 0, 0), LENGTHS]
)
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_positions(device: str, guarded: None, lengths: tuple[int, ...], index_dtype: torch.dtype) -> None:
    given = make(device, width=8, lengths=lengths, absent=("type_row", *NORM))
    given |= {name: given[name].to(index_dtype) for name in ("token_ids", "cu_seqlens")}
    stream, _, positions, mean, _ = embed_tokens_fwd(*given.values(), None, EPS, 0.0, FP32, True)
    expected = torch.cat([torch.arange(length) for length in lengths])
    assert torch.equal(positions.cpu().long(), expected)
    assert mean.numel() == 0
    assert torch.equal(stream, reference.embed_tokens(*given.values(), EPS, FP32)[0])


def test_wrong_ids_stay_inside(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a card nobody looks at them."""
    monkeypatch.setattr(arguments_of_operations, "is_looked_into", lambda x: False)
    given = make(device, lengths=(6, 2))
    # The tables lie in the middle of NaN: what is read out of bounds shows.
    for name in ("token_table", "position_table"):
        table = given[name]
        around = torch.full((3 * len(table), table.shape[1]), float("nan"), device=device)
        around[len(table) : 2 * len(table)] = table
        given[name] = around[len(table) : 2 * len(table)]
    last = len(given["token_table"]) - 1
    given["token_ids"][:3] = torch.tensor([-1, last + 1, -20])
    given["position_table"] = given["position_table"][:4]
    leaves = [given[name].requires_grad_() for name in LEAVES]
    stream, _ = embed_tokens(**given, eps=EPS, impl="triton")
    gradients = torch.autograd.grad(stream.square().sum(), leaves)
    given["token_ids"] = given["token_ids"].clamp(0, last)
    given["position_table"] = torch.cat([leaves[1], leaves[1][3:].expand(2, -1)])
    expected = plain(**given, eps=EPS, keep=None, dropout_p=0.0)
    torch.testing.assert_close(stream, expected)
    torch.testing.assert_close(gradients, torch.autograd.grad(expected.square().sum(), leaves))


@pytest.mark.parametrize("width", [8, 300])
@pytest.mark.parametrize(
    "counts",
    [
        (4, 4, 4),  # as many as a chunk holds: one stage, though keys and chunks coincide
        (5, 0, 1),  # one more
        (3, 9, 2),  # begins inside a chunk, fills one, ends inside another
        (8, 8),  # begins and ends with chunks
        (1, 6, 6, 0, 3),  # two long ones meet inside a chunk
        (0, 200, 0),  # more parts than one tile of the second stage holds
        (1,) * 7,
    ],
)
def test_rows_listed_in_two_stages(device: str, guarded: None, counts: tuple[int, ...], width: int) -> None:
    generator = torch.Generator().manual_seed(len(counts))
    keys = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    keys = keys[torch.randperm(len(keys), generator=generator)].int()
    # Small integers: sums are exact in every order.
    d_total = torch.randint(-9, 10, (len(keys), width), generator=generator).float()
    expected = torch.zeros(len(counts), width).index_add_(0, keys.long(), d_total)
    plan = replace(planner.plan(len(keys), width, target_of(device)), chunk=4)
    found = _table_gradient(d_total.to(device), keys.to(device), len(counts), plan)
    assert torch.equal(found.cpu(), expected)


def test_no_tokens(device: str) -> None:
    given = make(device, lengths=(0, 0))
    found = results(given, lambda **a: embed_tokens(**a, impl="triton"), out_dtype=FP32)
    assert [each.shape for each in found[:2]] == [(0, 48)] * 2
    assert not any(each.any() for each in found[2:])
    given["cu_seqlens"] = given["cu_seqlens"][:1]
    assert embed_tokens(**given, impl="triton")[0].shape == (0, 48)


def test_frozen_tensors_cost_nothing(device: str) -> None:
    given = make(device, lengths=(3, 4))
    function = lambda **a: embed_tokens(**a, impl="triton")[0].square().sum()  # noqa: E731
    leaves = {name: given[name].clone().requires_grad_() for name in LEAVES}
    full = torch.autograd.grad(function(**(given | leaves)), list(leaves.values()))
    for name, expected in zip(LEAVES, full, strict=True):
        leaf = given[name].clone().requires_grad_()
        (found,) = torch.autograd.grad(function(**(given | {name: leaf})), leaf)
        assert torch.equal(found, expected)


def test_mask_is_the_one_of_the_seed(device: str) -> None:
    given = make(device, width=64, lengths=(40,), absent=("type_row", *NORM))
    seed = torch.tensor([5], device=device)
    stream, _ = embed_tokens(**given, dropout_p=0.3, seed=seed, impl="triton")
    assert torch.equal((stream != 0).cpu(), keep_mask(5, 40, 64, 0.3))
    torch.manual_seed(0)
    first, second = (embed_tokens(**given, dropout_p=0.3, impl="triton")[0] for _ in range(2))
    torch.manual_seed(0)
    assert torch.equal(embed_tokens(**given, dropout_p=0.3, impl="triton")[0], first)
    assert not torch.equal(first, second)


def test_same_bits_every_time(device: str) -> None:
    lengths = (2000,) * 30 if device == "cuda" else (30, 20)
    given = make(device, lengths=lengths, n_positions=max(lengths))

    def function(**arguments):
        return embed_tokens(
            **arguments, dropout_p=0.1, seed=torch.tensor([1], device=device), out_dtype=FP16, impl="triton"
        )

    runs = [results(given, function, out_dtype=FP16) for _ in range(2)]
    assert all(torch.equal(first, second) for first, second in zip(*runs, strict=True))


def test_kept_for_the_backward(device: str) -> None:
    given = make(device, lengths=(30, 20))
    given |= {name: given[name].requires_grad_() for name in LEAVES}
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t) or t, lambda t: t):
        embed_tokens(**given, out_dtype=FP16, impl="triton")
    arguments = {t.data_ptr() for t in given.values()}
    # A position and two statistics per token, no row.
    assert sum(t.numel() * t.element_size() for t in sizes if t.data_ptr() not in arguments) == 50 * 12


def test_compiles_without_a_break(device: str) -> None:
    given = make(device, lengths=(3, 4))

    def function(**arguments):
        stream, out = embed_tokens(**arguments, dropout_p=0.2, out_dtype=FP16, impl="triton")
        return stream * 2, out + 1

    torch.manual_seed(0)
    expected = results(given, function, out_dtype=FP16)
    torch.manual_seed(0)
    found = results(given, torch.compile(function, fullgraph=True, backend="aot_eager"), out_dtype=FP16)
    for value, truth in zip(found, expected, strict=True):
        torch.testing.assert_close(value, truth)


def test_operators(device: str) -> None:
    given = make(device, width=16, lengths=(3, 2), n_vocabulary=9, n_positions=4)
    arguments = list(given.values())
    seed = torch.tensor([2], device=device)
    leaves = [t.clone().requires_grad_() if t.is_floating_point() else t for t in arguments]
    torch.library.opcheck(embed_tokens_fwd.overload, (*leaves, seed, EPS, 0.1, FP16, True))
    d_stream = torch.ones(5, 16, device=device)
    positions = torch.tensor([0, 1, 2, 0, 1], dtype=torch.int32, device=device)
    ids, _, token_table, position_table, type_row, weight, _ = arguments
    saved = (
        ids,
        positions,
        token_table,
        position_table,
        type_row,
        weight,
        d_stream[:, 0].clone(),
        d_stream[:, 1].clone(),
    )
    torch.library.opcheck(embed_tokens_bwd.overload, (d_stream, None, *saved, seed, 0.1, True, False))


def test_refusals(device: str) -> None:
    with pytest.raises(ImplUnavailableError, match=r"4,096.*4,097"):
        embed_tokens(**make(device, width=4097, lengths=(1,)), impl="triton")
    given = make(device)
    given |= {name: given[name].double() for name in LEAVES}
    with pytest.raises(ImplUnavailableError, match="computes in float32"):
        embed_tokens(**given, impl="triton")


@pytest.mark.parametrize("card", CARDS)
def test_plans(card: str) -> None:
    target = CARDS[card]
    for width in (1, 128, 129, 256, 640, 768, 896, 1280, 2048, 4096):
        for n_rows in (0, 1, 1000, 65_536, 10_000_000):
            plan = planner.plan(n_rows, width, target)
            assert plan.block_c >= width
            assert plan.fwd_block_rows * plan.block_c == 512 * plan.fwd_launch.num_warps
            assert plan.bwd_block_rows * plan.block_c == 256 * plan.bwd_launch.num_warps
            assert plan.table_block_rows * plan.table_block_c == 2048
            assert 1 <= plan.n_programs <= 5 * target.n_sms
            assert 32 <= plan.chunk <= 2048
    assert planner.plan(65_536, 256, target).chunk == 256
    for dtype in ("float16", "float32"):
        assert choose("embed_tokens", dtype, target).impl == "triton"
    if target.sm < 75:
        with pytest.raises(ImplUnavailableError, match="bfloat16"):
            choose("embed_tokens", "bfloat16", target)
    assert choose("embed_tokens", "float64", target).impl == "torch"
    assert choose("embed_tokens", "float32", Target("mps")).impl == "torch"


@pytest.mark.parametrize("card", CARDS)
def test_cases_fit_the_kernels(card: str) -> None:
    from geneformer_kernels.ops.embed_tokens import kernel

    cases = planner.kernel_cases(CARDS[card])
    assert len({(case.kernel, case.problem, case.dtype) for case in cases}) == len(cases)
    for case in cases:
        names = inspect.signature(getattr(kernel, case.kernel).fn).parameters
        assert sorted(names) == sorted([*case.signature, *case.constexprs])
        assert case.divisible <= set(case.signature)
        assert case.dtype != "bfloat16" or CARDS[card].sm >= 75


@pytest.mark.gpu
@pytest.mark.parametrize("lengths", [(2048,) * 20 + (50, 300, 0, 1999), (4096,) + (16,) * 3000])
@pytest.mark.parametrize(("width", "out_dtype"), [(256, FP16), (768, FP32)])
def test_full_size(lengths: tuple[int, ...], width: int, out_dtype: torch.dtype) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    given = make("cuda", width=width, lengths=lengths, n_vocabulary=25_426, n_positions=4096)
    check(given, out_dtype=out_dtype, dropout_p=0.1)


@pytest.mark.gpu
def test_nobody_waits_for_the_device() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    given = make("cuda", width=256, lengths=(500, 0, 300))
    function = lambda **a: embed_tokens(**a, dropout_p=0.1, out_dtype=FP16, impl="triton")  # noqa: E731
    results(given, function, out_dtype=FP16)
    leaves = {name: given[name].requires_grad_() for name in LEAVES}
    torch.cuda.set_sync_debug_mode("error")
    try:
        stream, out = function(**(given | leaves))
        torch.autograd.backward([stream, out], [torch.ones_like(stream), torch.ones_like(out)])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert leaves["token_table"].grad.any()
    with torch.no_grad():  # compiled before the capture
        expected = embed_tokens(**given, out_dtype=FP16, impl="triton")
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        captured = embed_tokens(**given, out_dtype=FP16, impl="triton")
    graph.replay()
    for value, truth in zip(captured, expected, strict=True):
        assert torch.equal(value, truth)
