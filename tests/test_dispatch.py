"""Choosing an implementation: explicit works or raises, automatic says why once."""

from __future__ import annotations

import logging

import pytest
from geneformer_kernels import dispatch
from geneformer_kernels.dispatch import OPERATIONS, Impl, ImplUnavailableError, candidates, choose, explain, use_impl
from geneformer_kernels.target import CARDS, Target

CPU = Target.cpu({"avx2"}, name="test CPU")
TARGETS = [CPU, Target.cpu({"amx_bf16", "avx512"}), Target("hip", name="MI300"), Target("mps"), *CARDS.values()]


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name or target.kind)
def test_every_operation_can_run_everywhere(target: Target) -> None:
    choices = explain(target)
    assert [choice.op for choice in choices] == list(OPERATIONS)
    assert all(choice.reason for choice in choices)


def test_explicit_runs_or_raises() -> None:
    assert choose("varlen_attention", "float32", CPU, "reference").impl == Impl.REFERENCE
    with pytest.raises(ImplUnavailableError, match=r"varlen_attention: triton was asked for by impl=.*test CPU.*torch"):
        choose("varlen_attention", "float32", CPU, "triton")
    with pytest.raises(ValueError, match="no operation named 'attention'"):
        candidates("attention", "float32", CPU)
    with pytest.raises(ValueError, match="cuda"):
        choose("varlen_attention", "float32", CPU, "cuda")


def test_block_and_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    def impl_of(op: str) -> Impl:
        return choose(op, "float32", CPU).impl

    monkeypatch.setenv(dispatch.ENVIRONMENT_VARIABLE, "feed_forward=reference")
    assert impl_of("feed_forward") == Impl.REFERENCE
    assert impl_of("varlen_attention") == Impl.TORCH
    with use_impl("reference", "varlen_attention"):
        assert impl_of("varlen_attention") == Impl.REFERENCE
        with use_impl("torch"):  # the inner block wins, over the environment too
            assert impl_of("varlen_attention") == impl_of("feed_forward") == Impl.TORCH
        assert impl_of("varlen_attention") == Impl.REFERENCE
        assert choose("varlen_attention", "float32", CPU, "torch").impl == Impl.TORCH  # an argument wins over a block
    assert impl_of("varlen_attention") == Impl.TORCH
    monkeypatch.setenv(dispatch.ENVIRONMENT_VARIABLE, "reference")
    assert impl_of("varlen_attention") == Impl.REFERENCE
    monkeypatch.setenv(dispatch.ENVIRONMENT_VARIABLE, "varlen_attention=triton")
    with pytest.raises(ImplUnavailableError, match="GENEFORMER_KERNELS_IMPL"):
        impl_of("varlen_attention")
    monkeypatch.setenv(dispatch.ENVIRONMENT_VARIABLE, "fastest")
    with pytest.raises(ImplUnavailableError, match="names no implementation"):
        impl_of("varlen_attention")
    with pytest.raises(ValueError, match="no operation"), use_impl("torch", "attention"):
        pass


def test_the_reason_is_logged_once(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_told", set())
    with caplog.at_level(logging.INFO, "geneformer_kernels"):
        for _ in range(3):
            choose("feed_forward", "float32", CPU)
        choose("feed_forward", "float32", CPU, "torch")
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 1
    assert "feed_forward in float32 on test CPU: torch, because" in messages[0]


def test_targets() -> None:
    assert CARDS["H100"].smem_bytes == 232_448
    assert CARDS["T4"].fastest_dtype == CARDS["V100"].fastest_dtype == "float16"
    assert CARDS["A100"].fastest_dtype == "bfloat16"
    assert Target.cpu().fastest_dtype == "float32"
    assert Target.cuda(100).smem_bytes == 232_448


def rows(*measured: tuple[dict[str, int], dict[str, float]]) -> dict:
    found = tuple((shape, times, "2030-01-02 at 0123456789ab") for shape, times in measured)
    return {("varlen_attention", "A100", "float16"): found}


AHEAD, BEHIND, ALIKE = ({"triton": 1.0, "torch": torch_ms} for torch_ms in (1.5, 0.5, 0.99))


@pytest.mark.parametrize(
    ("measured", "shape", "expected"),
    [
        ([({"head_dim": 64}, BEHIND)], {"head_dim": 64}, "torch"),
        ([({"head_dim": 64}, AHEAD)], {"head_dim": 64}, "triton"),
        ([({"head_dim": 64}, ALIKE)], {"head_dim": 64}, "triton"),  # noise: the plan's order
        ([({"head_dim": 64}, BEHIND)], {"head_dim": 16}, "triton"),  # too far away to say anything
        ([({"head_dim": 64, "length": 512}, BEHIND), ({"head_dim": 64, "length": 4096}, AHEAD)],
         {"head_dim": 64, "length": 700}, "torch"),
        ([({"head_dim": 64, "length": 512}, BEHIND), ({"head_dim": 64, "length": 4096}, AHEAD)],
         {"head_dim": 64, "length": 3000}, "triton"),
        ([({"head_dim": 64, "length": 512}, BEHIND), ({"head_dim": 64, "length": 4096}, AHEAD)],
         {"head_dim": 64}, "triton"),  # of unknown length the rows disagree
        ([({"head_dim": 64, "needs_grad": 1}, BEHIND)], {"head_dim": 64, "needs_grad": 0}, "triton"),
        ([({"head_dim": 64, "needs_grad": 1}, BEHIND)], {"head_dim": 64, "needs_grad": True}, "torch"),
        ([({"head_dim": 64}, {"torch": 1.0})], {"head_dim": 64}, "triton"),  # of one alone nothing follows
    ],
)  # fmt: skip
def test_what_was_measured_faster_on_a_card_runs_there(
    measured: list, shape: dict[str, int], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "MEASURED", rows(*measured))
    monkeypatch.setattr(dispatch, "CAPABILITY", {("varlen_attention", 80, "float16"): "tensor cores"})
    dispatch.candidates.cache_clear()
    try:
        choice = choose("varlen_attention", "float16", CARDS["A100"], shape=shape)
        assert choice.impl == expected
        if expected == "torch":
            assert "2.00 times as fast as triton on A100, measured 2030-01-02 at 0123456789ab" in choice.reason
        # Another card, and who asks by name, are not concerned.
        assert choose("varlen_attention", "float16", CARDS["H100"], shape=shape).impl == "triton"
        for impl in ("triton", "torch"):
            assert choose("varlen_attention", "float16", CARDS["A100"], impl, shape).impl == impl
    finally:
        dispatch.candidates.cache_clear()


def test_a_fast_row_runs_nothing_that_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the table of architectures forbids stays forbidden, whatever a row says."""
    monkeypatch.setattr(dispatch, "MEASURED", rows(({"head_dim": 64}, AHEAD)))
    monkeypatch.setattr(dispatch, "CAPABILITY", {("varlen_attention", 80, "float16"): "fma"})
    dispatch.candidates.cache_clear()
    try:
        assert choose("varlen_attention", "float16", CARDS["A100"], shape={"head_dim": 64}).impl == "torch"
        with pytest.raises(ImplUnavailableError, match="not tensor cores"):
            choose("varlen_attention", "float16", CARDS["A100"], "triton")
    finally:
        dispatch.candidates.cache_clear()


@pytest.mark.parametrize("kind", ["hip", "mps"])
def test_other_makers_devices_are_told_once(
    kind: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "_told", set())
    target = Target(kind, name="some device")
    with caplog.at_level(logging.WARNING, "geneformer_kernels"):
        for _ in range(2):
            for op in OPERATIONS:
                assert choose(op, "float64" if op == "rank_genes" else "float32", target).impl != Impl.TRITON
    assert len(caplog.records) == len(OPERATIONS)
    assert all("AMD and Apple devices take the torch path" in record.getMessage() for record in caplog.records)
    with pytest.raises(ImplUnavailableError, match="AMD and Apple devices"):
        choose("feed_forward", "float32", target, "triton")


def test_a_fallback_says_what_could_not_run() -> None:
    without = Target.cuda(80, triton=None, name="A100")
    assert "triton cannot: Triton is not installed" in choose("feed_forward", "float16", without).reason


def test_volta_refuses_bfloat16_with_advice() -> None:
    for op in ("varlen_attention", "residual_layernorm", "feed_forward", "mlm_cross_entropy"):
        for impl in (None, "triton", "torch", "reference"):
            with pytest.raises(ImplUnavailableError, match=r"V100 has no bfloat16.*use float16"):
                choose(op, "bfloat16", CARDS["V100"], impl)
