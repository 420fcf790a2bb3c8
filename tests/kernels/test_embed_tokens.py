"""embed_tokens on the CPU: the torch implementation and the reference."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from geneformer_kernels import embed_tokens
from tolerance import Witness, assert_as_good_as

V, L, C = 30, 12, 24
LENGTHS = (3, 0, 12, 1, 5, 0)


def tensors(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor | None]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, mean: float = 0.0) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator, dtype=torch.float64) + mean).to(dtype)

    return {
        "token_ids": torch.randint(0, V, (sum(LENGTHS),), generator=generator),
        "cu_seqlens": F.pad(torch.tensor(LENGTHS).cumsum(0), (1, 0)).int(),
        "token_table": normal(V, C, mean=2),
        "position_table": normal(L, C, mean=-1),
        "type_row": normal(C),
        "weight": normal(C, mean=0.5),
        "bias": normal(C),
    }


def composed(token_ids, cu_seqlens, token_table, position_table, type_row, weight, bias, eps=1e-12):
    """The operations of BertEmbeddings, in their order."""
    hidden = F.embedding(token_ids.long(), token_table)
    if type_row is not None:
        hidden = hidden + type_row
    positions = torch.cat([torch.arange(length) for length in cu_seqlens.diff().tolist()])
    hidden = hidden + F.embedding(positions, position_table)
    return hidden if weight is None else F.layer_norm(hidden, (C,), weight, bias, eps)


@pytest.mark.parametrize("impl", ["torch", "reference"])
@pytest.mark.parametrize("absent", [(), ("type_row",), ("weight", "bias"), ("type_row", "weight", "bias")])
@pytest.mark.parametrize("out_dtype", [None, torch.bfloat16, torch.float16])
def test_forward(impl: str, absent: tuple[str, ...], out_dtype: torch.dtype | None) -> None:
    given = tensors() | dict.fromkeys(absent)
    stream, out = embed_tokens(**given, out_dtype=out_dtype, impl=impl)
    plain = composed(**given)
    exact = composed(
        **{name: t.double() if t is not None and t.is_floating_point() else t for name, t in given.items()}
    )
    assert stream.dtype == torch.float32
    assert out.dtype == (out_dtype or torch.float32)
    assert_as_good_as(stream, Witness(composed, **given), exact)
    assert torch.equal(out, stream.to(out.dtype))
    assert (out is stream) == (out_dtype is None)
    if impl == "torch":
        assert torch.equal(stream, plain)


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_dtypes_of_indices(index_dtype: torch.dtype) -> None:
    given = tensors()
    expected = embed_tokens(**given)[0]
    given |= {name: given[name].to(index_dtype) for name in ("token_ids", "cu_seqlens")}
    assert torch.equal(embed_tokens(**given)[0], expected)


def test_dropout_comes_last() -> None:
    given = tensors()
    torch.manual_seed(0)
    expected = F.dropout(composed(**given), 0.3)
    for impl in ("torch", "reference"):
        torch.manual_seed(0)
        stream, out = embed_tokens(**given, dropout_p=0.3, out_dtype=torch.float16, impl=impl)
        torch.testing.assert_close(stream, expected)
        assert torch.equal(out, stream.half())


def test_gradients_in_float64() -> None:
    given = tensors(torch.float64)
    names = ("token_table", "position_table", "type_row", "weight", "bias")
    leaves = [given[name].requires_grad_() for name in names]

    def function(*values):
        return embed_tokens(**(given | dict(zip(names, values, strict=True))), eps=1e-5)[0]

    assert function(*leaves).dtype == torch.float64
    torch.autograd.gradcheck(function, leaves, fast_mode=True)


def test_no_tokens() -> None:
    given = tensors() | {"token_ids": torch.zeros(0, dtype=torch.int64), "cu_seqlens": torch.zeros(1).int()}
    for impl in ("torch", "reference"):
        assert embed_tokens(**given, impl=impl)[0].shape == (0, C)


def test_compiles_without_a_break() -> None:
    given = tensors()

    def function(token_ids, token_table):
        return embed_tokens(**(given | {"token_ids": token_ids, "token_table": token_table}), out_dtype=torch.bfloat16)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    table = given["token_table"].requires_grad_()
    found = compiled(given["token_ids"], table)
    for value, expected in zip(found, function(given["token_ids"], table), strict=True):
        torch.testing.assert_close(value, expected)
    found[0].square().sum().backward()
    assert table.grad.any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"token_ids": torch.zeros(3)}, "token_ids must be int32 or int64"),
        ({"cu_seqlens": torch.zeros(2, 2, dtype=torch.int32)}, "cu_seqlens must have 1 axis"),
        ({"cu_seqlens": torch.zeros(0, dtype=torch.int32)}, r"cu_seqlens must be \[B \+ 1\]"),
        ({"cu_seqlens": torch.zeros(1, dtype=torch.int32)}, "cu_seqlens must run from 0 to 21"),
        ({"position_table": torch.zeros(L, C + 1)}, r"must be \[V, C\] and \[L, C\]"),
        ({"weight": None}, "both be None"),
        ({"type_row": torch.zeros(1, C)}, rf"type_row \[1, {C}\] must be \[{C}\]"),
    ],
)
def test_bad_arguments(change: dict[str, torch.Tensor | None], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        embed_tokens(**(tensors() | change))


@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_wrong_indices_raise(impl: str) -> None:
    given = tensors()
    ids = given["token_ids"].clone()
    for wrong in (-1, len(given["token_table"])):
        ids[1] = wrong
        with pytest.raises(ValueError, match=f"token_ids must lie between 0 and 29 .*, not {wrong}"):
            embed_tokens(**(given | {"token_ids": ids}), impl=impl)
    with pytest.raises(ValueError, match="position_table has 1 rows"):
        embed_tokens(**(given | {"position_table": given["position_table"][:1]}), impl=impl)
    given["position_table"] = torch.zeros(2 * sum(LENGTHS), C)
    n_tokens = sum(LENGTHS)
    for end in (1, n_tokens - 1, n_tokens + 1):
        with pytest.raises(ValueError, match=f"cu_seqlens must run from 0 to {n_tokens}"):
            embed_tokens(**(given | {"cu_seqlens": torch.tensor([0, end])}), impl=impl)


@pytest.mark.parametrize("name", ["token_table", "position_table"])
def test_empty_tables(name: str) -> None:
    given = tensors() | {name: torch.zeros(0, C)}
    for impl in ("triton", "torch", "reference"):
        with pytest.raises(ValueError, match="must have rows for"):
            embed_tokens(**given, impl=impl)
        if impl != "triton":
            nothing = {"token_ids": torch.zeros(0, dtype=torch.int64), "cu_seqlens": torch.zeros(1).int()}
            assert embed_tokens(**(given | nothing), impl=impl)[0].shape == (0, C)


def test_bad_dropout() -> None:
    with pytest.raises(ValueError, match="dropout_p"):
        embed_tokens(**tensors(), dropout_p=-0.1)
