"""Good arguments of every operation, and for each of them values that are nonsense."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import geneformer_kernels
import numpy as np
import torch

NAN, INF = float("nan"), float("inf")
T, C, F, V, H = 6, 16, 32, 12, 2
#: What may stand in a tensor's place, and never does.
NO_TENSORS = {"a list": [1.0, 2.0], "an array": np.ones(3), "a number": 3.0, "a word": "x"}
NO_NUMBERS = {"None": None, "a word": "0.1", "a tensor": torch.tensor([0.1, 0.2]), "a boolean": True, "a list": [0.1]}
BAD_PROBABILITIES = {"-0.1": -0.1, "1.5": 1.5, "NaN": NAN, "infinity": INF, **NO_NUMBERS}
BAD_EPS = {
    "0": 0.0,
    "-1": -1,
    "beyond floats": 10**400,
    "numpy's infinity": np.float32(INF),
    "NaN": NAN,
    "infinity": INF,
    **NO_NUMBERS,
}
BAD_OUT_DTYPES = {
    "int16": torch.int16, "bool": torch.bool, "complex64": torch.complex64, "float8": torch.float8_e4m3fn,
    "a word": "float32", "a type": float, "numpy's": np.float32,
}  # fmt: skip
BAD_SEEDS = {
    "an integer": 3,
    "float32": torch.ones(1),
    "two": torch.ones(2).long(),
    "meta": torch.ones(1).long().to("meta"),
}
BAD_WORDS = {"another": "mish", "a number": 3, "a list": ["relu"]}


def floats(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)) + 0.5


def ints(*values: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype)


def as_floats(shape: tuple[int, ...] | None = None, *, is_optional: bool = False) -> Callable[[torch.Tensor], dict]:
    """What is wrong with every tensor of floats: kinds, dtypes, places, axes."""

    def wrong(x: torch.Tensor) -> dict[str, Any]:
        found = dict(NO_TENSORS) | ({} if is_optional else {"None": None})
        found |= {str(dtype): x.to(dtype) for dtype in (torch.int64, torch.bool, torch.complex64, torch.float8_e5m2)}
        found |= {"sparse": x.to_sparse()}
        return found | {"another device": x.to("meta"), "another axis": x[None], "no axis": x.new_zeros(())}

    return wrong


def as_integers(x: torch.Tensor) -> dict[str, Any]:
    found = dict(NO_TENSORS) | {"None": None, "another device": x.to("meta"), "another axis": x[None]}
    found |= {"sparse": x.to_sparse()}
    return found | {str(dtype): x.to(dtype) for dtype in (torch.float32, torch.float64, torch.bool, torch.complex64)}


def as_bounds(x: torch.Tensor) -> dict[str, Any]:
    wrong = {
        "nothing": [], "one number": [0], "another start": [1, 4, 4, 6], "too short": [0, 4, 5], "too long": [0, 4, 7],
        "decreasing": [0, 5, 4, 6], "negative": [0, -1, 6], "beyond": [0, 9, 6],
    }  # fmt: skip
    return as_integers(x) | {name: ints(*values, dtype=x.dtype) for name, values in wrong.items()}


@dataclass(frozen=True)
class Case:
    """Good arguments of an operation, and for each of them values that are nonsense."""

    function: Callable[..., Any]
    impls: tuple[str, ...]
    good: dict[str, Any]
    bad: dict[str, Callable[[Any], dict[str, Any]] | dict[str, Any]]
    #: What the message may name in the argument's place.
    also: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def wrong(self, name: str) -> dict[str, Any]:
        """What is wrong with an argument -> the value."""
        wrong = self.bad[name]
        return wrong if isinstance(wrong, dict) else wrong(self.good[name])


def counts() -> dict[str, Any]:
    """Two cells of three and two genes."""
    return dict(
        indptr=ints(0, 3, 5, dtype=torch.int64), indices=ints(0, 1, 3, 1, 2), data=torch.tensor([2.0, 1, 5, 3, 4]),
        n_counts=torch.tensor([8.0, 7]), column_to_gene=ints(0, 1, 2, -1, dtype=torch.int64),
        token_ids=ints(3, 4, 9, dtype=torch.int64), medians=torch.tensor([1.0, 2, 3], dtype=torch.float64), keep=2,
    )  # fmt: skip


def _wrong_counts(x: torch.Tensor) -> dict[str, Any]:
    wrong = {"NaN": NAN, "negative": -1.0, "infinity": INF, "minus infinity": -INF}
    found = {name: torch.tensor([2.0, value, 5, 3, 4]) for name, value in wrong.items()}
    found |= {f"negative {dtype}": x.to(dtype).neg() for dtype in (torch.int8, torch.int64, torch.bfloat16)}
    found |= {"float8": x.to(torch.float8_e4m3fn), "complex": x.cfloat(), "another axis": x[None], "shorter": x[:4]}
    return found | NO_TENSORS | {"None": None}


BAD_KEEPS = {"0": 0, "negative": -3, "a fraction": 2.5, "whole as float": 2.0, **NO_NUMBERS}
BAD_TOKENS = {"below -1": -2, "too large": 2**31, "a fraction": 1.5, **NO_NUMBERS}
ALL, TWO = ("triton", "torch", "reference"), ("torch", "reference")
ATTENTION = {
    "cu_seqlens": lambda x: {name: value for name, value in as_bounds(x).items() if name != "another device"},
    "scale": {
        "0": 0.0,
        "negative": -1.0,
        "beyond floats": 10**400,
        "numpy's infinity": np.float32(INF),
        "NaN": NAN,
        "infinity": INF,
        "a word": "1",
        "a boolean": True,
    },
    "dropout_p": BAD_PROBABILITIES | {"1": 1.0},
    "seed": BAD_SEEDS,
}
NORM = dict(eps=1e-5, norm="post", out_dtype=None, dropout_p=0.0, seed=None)
BAD_NORM = {
    "eps": BAD_EPS, "norm": BAD_WORDS | {"None": None}, "out_dtype": BAD_OUT_DTYPES, "dropout_p": BAD_PROBABILITIES,
    "seed": BAD_SEEDS,
}  # fmt: skip
LAYERS = dict(up_weight=floats(F, C), up_bias=floats(F), down_weight=floats(C, F), down_bias=floats(C))
BAD_LAYERS = {
    "up_weight": lambda x: as_floats()(x) | {"other widths": x[:, 1:], "fewer": x[1:]},
    "up_bias": lambda x: as_floats(is_optional=True)(x) | {"shorter": x[1:]},
    "down_weight": lambda x: as_floats()(x) | {"other widths": x[:, 1:], "fewer": x[1:]},
    "down_bias": lambda x: as_floats(is_optional=True)(x) | {"shorter": x[1:]},
    "activation": BAD_WORDS | {"None": None},
}
# As many axes as there are is right for rows of several.
rows_of = lambda x: {k: v for k, v in as_floats()(x).items() if k not in ("another axis", "another device")}  # noqa: E731

as_smooth = lambda x: as_floats(is_optional=True)(x) | {"shorter": x[1:]}  # noqa: E731


def integers(*shape: int) -> torch.Tensor:
    return torch.randint(-127, 128, shape, generator=torch.Generator().manual_seed(0), dtype=torch.int8)


CASES = {
    "rank_genes": Case(
        geneformer_kernels.rank_genes,
        ("numba", "triton", "reference"),
        counts() | dict(first=1, last=2, padded_length=None, pad_id=0),
        {
            "indptr": lambda x: (
                as_integers(x)
                | {"negative": ints(-1, 3, 5), "decreasing": ints(0, 6, 5), "beyond": ints(0, 3, 9), "shorter": x[1:]}
            ),
            "indices": lambda x: as_integers(x) | {"negative": ints(0, -1, 3, 1, 2), "beyond": ints(0, 1, 4, 1, 2)},
            "data": _wrong_counts,
            "n_counts": lambda x: (
                NO_TENSORS
                | {"None": None, "bool": x.bool(), "complex": x.cfloat(), "another axis": x[None], "shorter": x[1:]}
                | {
                    name: torch.tensor([8.0, value])
                    for name, value in {"0": 0.0, "-1": -1.0, "NaN": NAN, "inf": INF}.items()
                }
            ),
            "column_to_gene": lambda x: as_integers(x) | {"below -1": ints(0, 1, -2, -1), "beyond": ints(0, 1, 3, -1)},
            "token_ids": lambda x: (
                as_integers(x)
                | {"repeated": ints(3, 3, 9), "negative": ints(3, -4, 9), "shorter": x[1:]}
                | {"too large": ints(3, 4, 2**31, dtype=torch.int64)}
            ),
            "medians": lambda x: (
                as_floats()(x)
                | {"shorter": x[1:]}
                | {
                    name: x.new_tensor([1.0, value, 3])
                    for name, value in {"0": 0.0, "-1": -1.0, "NaN": NAN, "inf": INF}.items()
                }
            ),
            "keep": BAD_KEEPS,
            "first": BAD_TOKENS,
            "last": BAD_TOKENS,
            "padded_length": {"negative": -1, "too short": 3, "a fraction": 9.0, "a word": "9", "a boolean": True},
            "pad_id": {"a fraction": 0.5, "too large": 2**63, **NO_NUMBERS},
        },
        {"indptr": ("row",), "indices": ("row",), "n_counts": ("row",), "token_ids": ("token ids",)},
    ),
    "embed_tokens": Case(
        geneformer_kernels.embed_tokens,
        ALL,
        dict(
            token_ids=ints(1, 5, 0, 11, 3, 3, dtype=torch.int64),
            cu_seqlens=ints(0, 4, 4, 6),
            token_table=floats(V, C),
            position_table=floats(4, C),
            type_row=floats(C),
            weight=floats(C),
            bias=floats(C),
            eps=1e-5,
            dropout_p=0.0,
            seed=None,
            out_dtype=None,
        ),
        {
            "token_ids": lambda x: (
                as_integers(x) | {"int16": x.short(), "negative": x - 2, "beyond": x + 1, "shorter": x[1:]}
            ),
            "cu_seqlens": as_bounds,
            "token_table": lambda x: (
                as_floats()(x) | {"other widths": x[:, 1:], "empty": x[:0], "no columns": x[:, :0]}
            ),
            "position_table": lambda x: as_floats()(x) | {"other widths": x[:, 1:], "shorter than a cell": x[:3]},
            "type_row": lambda x: as_floats(is_optional=True)(x) | {"shorter": x[1:]},
            "weight": lambda x: as_floats()(x) | {"shorter": x[1:]},
            "bias": lambda x: as_floats()(x) | {"shorter": x[1:]},
            "eps": BAD_EPS,
            "dropout_p": BAD_PROBABILITIES,
            "seed": BAD_SEEDS,
            "out_dtype": BAD_OUT_DTYPES,
        },
        # A table elsewhere is what the others are compared with.
        {"token_table": ("position_table",), "token_ids": ("cu_seqlens",), "cu_seqlens": ("position_table",)},
    ),
    "varlen_attention": Case(
        geneformer_kernels.varlen_attention,
        ALL,
        dict(
            q=floats(T, H, C),
            k=floats(T, H, C),
            v=floats(T, H, C),
            cu_seqlens=ints(0, 4, 4, 6),
            scale=None,
            dropout_p=0.0,
            seed=None,
        ),
        {
            name: (lambda x: as_floats()(x) | {"shorter": x[1:], "other dtype": x.half(), "no heads": x[:, :0]})
            for name in "qkv"
        }
        | ATTENTION,
        {"q": ("k",)},
    ),
    "varlen_attention_qkv": Case(
        geneformer_kernels.varlen_attention_qkv,
        ALL,
        dict(qkv=floats(T, 3, H, C), cu_seqlens=ints(0, 4, 4, 6), scale=None, dropout_p=0.0, seed=None),
        {
            "qkv": lambda x: (
                {k: v for k, v in as_floats()(x).items() if k != "another device"}
                | {"two": x[:, :2], "no elements": x[..., :0], "no heads": x[:, :, :0]}
            ),
            **ATTENTION,
        },
    ),
    "attention_cells": Case(
        geneformer_kernels.attention_cells,
        ALL,
        dict(cu_seqlens=ints(0, 4, 4, 6), x=floats(T, C), head_dim=8, longest=None, dropout_p=0.0, dtype=None),
        {
            "cu_seqlens": ATTENTION["cu_seqlens"],
            "x": lambda x: rows_of(x) | {"shorter": x[1:]},
            "head_dim": BAD_KEEPS,
            "longest": {"shorter than a cell": 3, "negative": -1, "a fraction": 4.5, "a boolean": True, "a word": "4"},
            "dropout_p": BAD_PROBABILITIES | {"1": 1.0},
            "dtype": BAD_OUT_DTYPES,
        },
        {"x": ("cu_seqlens",)},
    ),
    "attention_scores": Case(
        geneformer_kernels.attention_scores,
        (),
        dict(q=floats(T, H, C), k=floats(T, H, C), cu_seqlens=ints(0, 4, 4, 6), scale=None),
        {name: (lambda x: as_floats()(x) | {"shorter": x[1:], "other dtype": x.half()}) for name in "qk"}
        | {name: ATTENTION[name] for name in ("cu_seqlens", "scale")},
        {"q": ("k",)},
    ),
    "favor_attention": Case(
        geneformer_kernels.favor_attention,
        ALL,
        dict(
            q=floats(T, H, C),
            k=floats(T, H, C),
            v=floats(T, H, C),
            projection=floats(F, C),
            cu_seqlens=ints(0, 4, 4, 6),
            stabiliser="cell",
            eps=1e-4,
            longest=None,
        ),
        {
            name: (lambda x: as_floats()(x) | {"shorter": x[1:], "other dtype": x.half(), "no heads": x[:, :0]})
            for name in "qkv"
        }
        | {
            "projection": lambda x: as_floats()(x) | {"other widths": x[:, 1:], "none": x[:0]},
            "cu_seqlens": as_bounds,
            "stabiliser": BAD_WORDS | {"None": None},
            "eps": BAD_EPS,
            "longest": {"shorter than a cell": 3, "negative": -1, "a fraction": 4.5, "a boolean": True, "a word": "4"},
        },
        {"q": ("k",)},
    ),
    "residual_layernorm": Case(
        geneformer_kernels.residual_layernorm,
        ALL,
        dict(x=floats(T, C), residual=floats(T, C), weight=floats(C), bias=floats(C), **NORM),
        {
            "x": lambda x: as_floats()(x) | {"shorter": x[1:], "no columns": x[:, :0]},
            "residual": lambda x: as_floats(is_optional=True)(x) | {"shorter": x[1:]},
            "weight": lambda x: as_floats()(x) | {"shorter": x[1:]},
            "bias": lambda x: as_floats()(x) | {"shorter": x[1:]},
            **BAD_NORM,
        },
        {"x": ("residual",)},
    ),
    "linear": Case(
        geneformer_kernels.linear,
        TWO,
        dict(x=floats(T, C), weight=floats(F, C), bias=floats(F)),
        {
            "x": lambda x: as_floats()(x) | {"other widths": x[:, 1:], "other dtype": x.double()},
            "weight": lambda x: as_floats()(x) | {"other widths": x[:, 1:], "other dtype": x.double()},
            "bias": lambda x: as_floats(is_optional=True)(x) | {"shorter": x[1:], "other dtype": x.bfloat16()},
        },
        {"x": ("weight",)},
    ),
    "feed_forward": Case(
        geneformer_kernels.feed_forward,
        ALL,
        dict(x=floats(T, C), **LAYERS, activation="relu"),
        {"x": lambda x: rows_of(x) | {"other widths": x[:, 1:], "no columns": x[:, :0]}, **BAD_LAYERS},
    ),
    "feed_forward_layernorm": Case(
        geneformer_kernels.feed_forward_layernorm,
        ALL,
        dict(
            x=floats(T, C), residual=floats(T, C), **LAYERS, weight=floats(C), bias=floats(C), activation="relu", **NORM
        ),
        {
            "x": lambda x: rows_of(x) | {"other widths": x[:, 1:], "shorter": x[1:], "no columns": x[:, :0]},
            "residual": lambda x: as_floats(is_optional=True)(x) | {"shorter": x[1:]},
            "weight": lambda x: as_floats()(x) | {"shorter": x[1:]},
            "bias": lambda x: as_floats()(x) | {"shorter": x[1:]},
            **BAD_LAYERS,
            **BAD_NORM,
        },
    ),
    "int8_linear": Case(
        geneformer_kernels.int8_linear,
        ALL,
        dict(
            x=floats(T, C),
            weight_q=ints(*range(F * C)).view(F, C).to(torch.int8),
            weight_scale=floats(F),
            bias=floats(F),
            x_scale=None,
            activation=None,
            mode=None,
            out_dtype=None,
        ),
        {
            "x": lambda x: rows_of(x) | {"other widths": x[:, 1:]},
            "x_scale": lambda _: NO_TENSORS | {"of floats": floats(T)},
            "weight_q": lambda x: as_integers(x) | {"int16": x.short(), "other widths": x[:, 1:]},
            "weight_scale": lambda x: as_floats()(x) | {"shorter": x[1:], "float64": x.double()},
            "bias": lambda x: as_floats(is_optional=True)(x) | {"shorter": x[1:]},
            "activation": BAD_WORDS,
            "mode": BAD_WORDS,
            "out_dtype": BAD_OUT_DTYPES,
        },
    ),
    "quantize_rows": Case(
        geneformer_kernels.quantize_rows,
        ALL,
        dict(x=floats(T, C), smooth=floats(C)),
        {"x": lambda x: rows_of(x) | {"other widths": x[:, 1:]}, "smooth": as_smooth},
        {"x": ("smooth",)},
    ),
    "int8_mode": Case(
        geneformer_kernels.int8_mode,
        (),
        dict(width=C, n_columns=F, dtype=torch.float32, device="cpu"),
        {
            "width": BAD_KEEPS,
            "n_columns": BAD_KEEPS,
            "dtype": BAD_OUT_DTYPES | {"None": None},
            "device": {"None": None, "a number": 1.5, "a word": "gpu", "a tensor": floats(1)},
        },
    ),
    "int8_feed_forward": Case(
        geneformer_kernels.int8_feed_forward,
        ALL,
        dict(
            x=integers(T, C),
            up_q=integers(F, C),
            up_scale=floats(F),
            up_bias=floats(F),
            down_q=integers(C, F),
            down_scale=floats(C),
            down_bias=floats(C),
            x_scale=floats(T),
            activation="relu",
            out_dtype=torch.float32,
        ),
        {
            "x": lambda x: (
                as_integers(x)
                | {"int16": x.short(), "other widths": x[:, 1:], "no columns": x[:, :0], "shorter": x[1:]}
            ),
            "up_q": lambda x: as_integers(x) | {"int16": x.short(), "other widths": x[:, 1:], "fewer": x[1:]},
            "up_scale": lambda x: as_floats()(x) | {"shorter": x[1:], "float64": x.double()},
            "up_bias": lambda x: as_floats(is_optional=True)(x) | {"shorter": x[1:]},
            "down_q": lambda x: as_integers(x) | {"int16": x.short(), "other widths": x[:, 1:]},
            "down_scale": lambda x: as_floats()(x) | {"shorter": x[1:], "float64": x.double()},
            "down_bias": lambda x: as_floats(is_optional=True)(x) | {"shorter": x[1:]},
            "x_scale": lambda x: as_floats()(x) | {"shorter": x[1:], "float64": x.double()},
            "activation": BAD_WORDS | {"None": None},
            "out_dtype": BAD_OUT_DTYPES | {"None": None},
        },
        {"x": ("x_scale", "up_q")},
    ),
    "residual_layernorm_int8": Case(
        geneformer_kernels.residual_layernorm_int8,
        ALL,
        dict(
            x=floats(T, C),
            residual=floats(T, C),
            weight=floats(C),
            bias=floats(C),
            eps=1e-5,
            norm="post",
            smooth=floats(C),
        ),
        {
            "x": lambda x: as_floats()(x) | {"shorter": x[1:], "no columns": x[:, :0]},
            "residual": lambda x: as_floats(is_optional=True)(x) | {"shorter": x[1:]},
            "weight": lambda x: as_floats()(x) | {"shorter": x[1:]},
            "bias": lambda x: as_floats()(x) | {"shorter": x[1:]},
            "smooth": as_smooth,
            "eps": BAD_EPS,
            "norm": BAD_WORDS | {"None": None},
        },
        {"x": ("residual",)},
    ),
    "fp8_linear": Case(
        geneformer_kernels.fp8_linear,
        TWO,
        dict(
            x=floats(T, C),
            weight_q=floats(F, C).to(torch.float8_e4m3fn),
            weight_scale=floats(F),
            bias=floats(F),
            activation=None,
            out_dtype=None,
        ),
        {
            "x": lambda x: rows_of(x) | {"other widths": x[:, 1:]},
            "weight_q": lambda x: (
                NO_TENSORS
                | {"None": None, "another device": x.to("meta"), "another axis": x[None], "other widths": x[:, 1:]}
                | {str(dtype): x.to(dtype) for dtype in (torch.float32, torch.float8_e5m2, torch.bool)}
            ),
            "weight_scale": lambda x: as_floats()(x) | {"shorter": x[1:], "float64": x.double()},
            "bias": lambda x: as_floats(is_optional=True)(x) | {"shorter": x[1:]},
            "activation": BAD_WORDS,
            "out_dtype": BAD_OUT_DTYPES,
        },
    ),
    "quantize_rows_fp8": Case(
        geneformer_kernels.quantize_rows_fp8,
        (),
        dict(x=floats(T, C), smooth=floats(C)),
        {"x": lambda x: rows_of(x) | {"other widths": x[:, 1:]}, "smooth": as_smooth},
        {"x": ("smooth",)},
    ),
    "quantize_weight_fp8": Case(
        geneformer_kernels.quantize_weight_fp8,
        (),
        dict(weight=floats(F, C)),
        {
            "weight": lambda x: (
                rows_of(x) | {"another axis": x[None], "NaN": x * NAN, "infinity": torch.where(x == x[3, 4], INF, x)}
            )
        },
    ),
    "quantize_weight": Case(
        geneformer_kernels.quantize_weight,
        (),
        dict(weight=floats(F, C)),
        {
            "weight": lambda x: (
                rows_of(x) | {"another axis": x[None], "NaN": x * NAN, "infinity": torch.where(x == x[3, 4], INF, x)}
            )
        },
    ),
    "mlm_cross_entropy": Case(
        geneformer_kernels.mlm_cross_entropy,
        ALL,
        dict(
            hidden=floats(T, C),
            weight=floats(V, C),
            bias=floats(V),
            targets=ints(1, 0, -100, 11, 5, 5, dtype=torch.int64),
            ignore_index=-100,
            reduction="mean",
        ),
        {
            "hidden": lambda x: as_floats()(x) | {"other widths": x[:, 1:], "shorter": x[1:]},
            "weight": lambda x: as_floats()(x) | {"other widths": x[:, 1:], "empty": x[:0]},
            "bias": lambda x: as_floats(is_optional=True)(x) | {"shorter": x[1:]},
            "targets": lambda x: (
                as_integers(x)
                | {"int32": x.int(), "shorter": x[1:], "beyond": x + 1, "negative": torch.where(x == 0, -1, x)}
            ),
            "ignore_index": {"too large": 2**31, "a fraction": -100.0, **NO_NUMBERS},
            "reduction": BAD_WORDS | {"None": None},
        },
        {"hidden": ("weight", "targets"), "targets": ("target",)},
    ),
}


def error_of(case: Case, arguments: dict[str, Any], impl: str | None) -> BaseException | None:
    positional = [arguments[name] for name in arguments if name in _POSITIONAL[case.function]]
    named = {name: value for name, value in arguments.items() if name not in _POSITIONAL[case.function]}
    if impl is not None:
        named["impl"] = impl
    try:
        case.function(*positional, **named)
    except Exception as error:
        return error
    return None


_POSITIONAL = {
    case.function: {
        name
        for name, parameter in inspect.signature(case.function).parameters.items()
        if parameter.kind is not inspect.Parameter.KEYWORD_ONLY
    }
    for case in CASES.values()
}
