"""What a batch takes at any moment of a forward pass is what implementations say of it, and not much less."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from geneformer_kernels.cpu.int8_products import instruction_set
from geneformer_kernels.dispatch import use_impl
from geneformer_kernels.target import target_of
from memory_use import most_bytes

from geneformer_fast import Encoder, EncoderConfig, Ragged, pieces, quantize
from geneformer_fast.extract.batch_memory import _KEPT_BYTES, batch_memory
from geneformer_fast.layers import QuantizedLinear

BASE = EncoderConfig(n_layers=2, width=128, n_heads=2, ff_width=512, vocab_size=500, max_len=700)
PRE = {"norm": "pre", "final_norm": True}
# A batch, and one of twice the tokens, in cells whose attention takes little by itself.
LENGTHS = [160, 90, 6] * 8
LONG = [700]
VARIANTS: dict[str, dict] = {
    "relu": {},
    "gelu": {"activation": "gelu"},
    "swiglu": {"activation": "swiglu", **PRE},
    "no final norm": {"norm": "pre"},
}
LOOPS = ("linear", "varlen_attention", "residual_layernorm", "feed_forward")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def bytes_of_a_batch(model: Encoder, lengths: list[int]) -> tuple[int, int]:
    """Most bytes of tensors, and of arrays, that a batch has at once."""
    rng = np.random.default_rng(0)
    tokens = Ragged.from_cells([torch.from_numpy(rng.integers(4, 500, length)) for length in lengths])
    with torch.inference_mode():
        model(tokens)
        return most_bytes(lambda: model(tokens))


def check_tokens(model: Encoder, *, most: float = 1.06) -> None:
    """More tokens take as much more as is said of a token."""
    one, two = (bytes_of_a_batch(model, lengths)[0] for lengths in (LENGTHS, 2 * LENGTHS))
    said = sum(LENGTHS) * batch_memory(model, max(LENGTHS)).row
    assert two - one <= said <= most * (two - one)


def check_cell(model: Encoder, *, most: float | None) -> None:
    """A batch of one long cell takes no more than is said of its tokens, the batch and a thread; nor much less."""
    row, call, thread = batch_memory(model, max(LONG))
    found, said = sum(bytes_of_a_batch(model, LONG)), sum(LONG) * row + call - _KEPT_BYTES + thread
    assert found <= said
    assert most is None or said <= most * found


@pytest.mark.parametrize(
    ("dtype", "name"),
    [*(("float32", name) for name in VARIANTS), ("bfloat16", "relu"), ("bfloat16", "swiglu"), ("float16", "gelu"),
     ("float64", "relu")],
)  # fmt: skip
def test_floats_as_they_are_multiplied_here(dtype: str, name: str) -> None:
    model = Encoder(replace(BASE, **VARIANTS[name])).eval().cast(dtype)
    check_tokens(model)
    # What libraries may take for a product is counted, and not seen where they do not.
    check_cell(model, most=None)


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_float32_by_compiled_loops(changes: dict) -> None:
    if not target_of("cpu").has_float32_loops:
        pytest.skip("this CPU has no AVX2")
    model = Encoder(replace(BASE, **changes)).eval()
    with contextlib.ExitStack() as stack:
        for op in LOOPS:
            stack.enter_context(use_impl("numba", op))
        check_tokens(model)
        check_cell(model, most=1.25)


@pytest.mark.parametrize("kept", ["varlen_attention", "residual_layernorm", "feed_forward"])
def test_float32_by_loops_and_torch(kept: str) -> None:
    if not target_of("cpu").has_float32_loops:
        pytest.skip("this CPU has no AVX2")
    model = Encoder(replace(BASE, activation="gelu")).eval()
    with contextlib.ExitStack() as stack:
        for op in LOOPS:
            stack.enter_context(use_impl("torch" if op == kept else "numba", op))
        check_tokens(model, most=1.1)
        check_cell(model, most=None)


@pytest.mark.parametrize(
    ("dtype", "name"),
    [*(("float32", name) for name in VARIANTS), ("bfloat16", "relu"), ("bfloat16", "no final norm"),
     ("float16", "gelu")],
)  # fmt: skip
def test_integers_by_compiled_loops(dtype: str, name: str) -> None:
    if instruction_set() is None:
        pytest.skip("this CPU has no instructions for products of int8")
    model = of_integers(replace(BASE, **VARIANTS[name]), "int8").cast(dtype)
    check_tokens(model, most=1.1)
    check_cell(model, most=1.45)


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("kept", ["up", "down", "qkv"])
def test_a_layer_kept_in_floats_has_its_hidden_units_counted(activation: str, kept: str) -> None:
    if instruction_set() is None:
        pytest.skip("this CPU has no instructions for products of int8")
    model = of_integers(replace(BASE, activation=activation), "int8")
    for block in model.blocks:
        getattr(block, kept).mode = "weight_only"
    check_tokens(model, most=2.1)
    check_cell(model, most=None)


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("scheme", ["int8", "int8-weights", "fp8"])
def test_eight_bits_multiplied_by_torch_take_no_more(scheme: str, activation: str) -> None:
    model = of_integers(replace(BASE, activation=activation), scheme)
    with use_impl("torch"):
        check_tokens(model, most=6)
        check_cell(model, most=None)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize("name", VARIANTS)
def test_long_cells_in_pieces(name: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cell that is computed in pieces takes no more than is said, which is less than for it at once."""
    model = Encoder(replace(BASE, **VARIANTS[name])).eval().cast(dtype)
    with use_impl("torch"):
        row, call, _ = batch_memory(model, max(LONG))
        at_once = sum(LONG) * row + call
        monkeypatch.setattr(pieces, "PIECE_ROWS", 64)
        row, call, _ = batch_memory(model, max(LONG))
        assert sum(LONG) * row + call < at_once
        check_cell(model, most=None)


def test_cells_of_values_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Soft bins of a whole cell, all of them different, are no more than a block takes."""
    config = EncoderConfig.preset("aido-cell-3m", n_layers=2, max_len=3000)
    model, tokens = Encoder(config).eval(), Ragged.from_cells([torch.rand(3000) * 5])
    monkeypatch.setattr(pieces, "PIECE_ROWS", 256)
    row, call, thread = batch_memory(model, 3000)
    with torch.inference_mode():
        model(tokens)
        found = sum(most_bytes(lambda: model(tokens)))
    assert found <= 3000 * row + call + thread


def of_integers(config: EncoderConfig, scheme: str) -> Encoder:
    model = quantize(Encoder(config).eval(), scheme=scheme)
    for layer in model.blocks.modules():
        if isinstance(layer, QuantizedLinear):
            layer.mode = "dynamic"
    return model
