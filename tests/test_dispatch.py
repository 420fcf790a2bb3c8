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
