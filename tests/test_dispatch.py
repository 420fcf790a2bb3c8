"""Choosing an implementation: explicit works or raises, automatic says why once."""

from __future__ import annotations

import logging
import os
from concurrent.futures import ThreadPoolExecutor

import pytest
from geneformer_kernels import dispatch
from geneformer_kernels import target as target_module
from geneformer_kernels.dispatch import OPERATIONS, Impl, ImplUnavailableError, candidates, choose, explain, use_impl
from geneformer_kernels.target import CARDS, Target, cpu_features

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
    with pytest.raises(ValueError, match="no operation"), use_impl("torch", "attention"):
        pass
    with pytest.raises(ValueError, match="no implementation named 'cuda'; there are triton"), use_impl("cuda"):
        pass


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("fastest", "no implementation named 'fastest'"),
        ("feed_forward=fastest", "no implementation named 'fastest'"),
        ("atention=torch", "'atention=torch' names no operation; there are rank_genes"),
        ("torch=varlen_attention", "'torch=varlen_attention' names no operation"),
        ("reference,atention=torch", "names no operation"),
    ],
)
def test_mistakes_in_the_environment_are_named(text: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever operation is asked about."""
    monkeypatch.setenv(dispatch.ENVIRONMENT_VARIABLE, text)
    for op in ("varlen_attention", "linear"):
        with pytest.raises(ImplUnavailableError, match=f"GENEFORMER_KERNELS_IMPL.*{message}"):
            choose(op, "float32", CPU)


@pytest.mark.parametrize("text", ["torch, varlen_attention=reference", "varlen_attention=reference,torch"])
def test_the_environment_may_name_one_operation_and_all(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(dispatch.ENVIRONMENT_VARIABLE, text)
    assert choose("varlen_attention", "float32", CPU).impl == Impl.REFERENCE
    assert choose("feed_forward", "float32", CPU).impl == Impl.TORCH
    assert choose("rank_genes", "float64", CPU).impl == Impl.NUMBA  # it has none in torch


def test_all_operations_means_those_that_have_it() -> None:
    with use_impl("triton"):
        assert choose("linear", "float16", CARDS["A100"]).impl == Impl.TORCH
        assert choose("feed_forward", "float16", CARDS["A100"]).reason == "asked for by use_impl"
        with pytest.raises(ImplUnavailableError, match="triton was asked for by use_impl"):
            choose("feed_forward", "float16", CARDS["T4"])
    with use_impl("triton", "linear"), pytest.raises(ImplUnavailableError, match="linear has no triton"):
        choose("linear", "float16", CARDS["A100"])


def test_blocks_hold_in_all_threads_which_may_leave_them_in_any_order() -> None:
    def impl_here() -> Impl:
        return choose("feed_forward", "float32", CPU).impl

    with ThreadPoolExecutor(1) as pool:
        first, second = use_impl("reference"), use_impl("reference", "feed_forward")
        first.__enter__()
        assert pool.submit(impl_here).result() == Impl.REFERENCE
        pool.submit(second.__enter__).result()
        first.__exit__(None, None, None)
        assert impl_here() == Impl.REFERENCE
        assert choose("varlen_attention", "float32", CPU).impl == Impl.TORCH
        pool.submit(second.__exit__, None, None, None).result()
        assert impl_here() == pool.submit(impl_here).result() == Impl.TORCH


def test_a_function_may_keep_the_choices_of_its_making() -> None:
    def impl_here() -> Impl:
        return choose("feed_forward", "float32", CPU).impl

    with use_impl("reference"):
        as_then = dispatch.as_chosen_now(impl_here)
    before = dispatch.as_chosen_now(impl_here)
    assert (as_then(), impl_here()) == (Impl.REFERENCE, Impl.TORCH)
    with use_impl("reference"):
        assert (before(), impl_here()) == (Impl.TORCH, Impl.REFERENCE)


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
    assert Target.cuda(100).smem_bytes == Target.cuda(103).smem_bytes == 232_448
    assert Target.cuda(120).smem_bytes == CARDS["L4"].smem_bytes


@pytest.mark.parametrize(
    ("limit", "left"),
    [
        (None, {"avx2", "avx512", "avx512_bf16", "amx_bf16", "int8_dot", "avx_vnni", "avx512_vnni", "amx_int8"}),
        ("ALL", {"avx2", "avx512", "avx512_bf16", "amx_bf16", "int8_dot", "avx_vnni", "avx512_vnni", "amx_int8"}),
        ("avx512_core_bf16", {"avx2", "avx512", "avx512_bf16", "int8_dot", "avx_vnni", "avx512_vnni"}),
        ("AVX512_CORE_VNNI", {"avx2", "avx512", "int8_dot", "avx_vnni", "avx512_vnni"}),
        ("AVX2_VNNI", {"avx2", "avx512", "int8_dot", "avx_vnni"}),
        ("AVX512_CORE", {"avx2", "avx512"}),
        ("AVX2", {"avx2", "avx512"}),
    ],
)
def test_what_onednn_may_not_use_is_not_there(limit: str | None, left: set[str], monkeypatch) -> None:
    flags = {"flags": "fpu fma avx2 avx512f avx_vnni avx512_vnni avx512_bf16 amx_bf16 amx_int8"}
    monkeypatch.setattr(target_module, "_cpuinfo", lambda key: flags.get(key, ""))
    left = left | {"fma"}
    monkeypatch.delenv("MKL_ENABLE_INSTRUCTIONS", raising=False)
    for name in ("NUMBA_CPU_NAME", "NUMBA_CPU_FEATURES", "NUMBA_ENABLE_AVX"):
        monkeypatch.delenv(name, raising=False)
    for name in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"):
        monkeypatch.delenv(name, raising=False)
        if limit is not None:
            monkeypatch.setenv(name, limit)
        assert cpu_features.__wrapped__() == left
    monkeypatch.setenv("MKL_ENABLE_INSTRUCTIONS", "AVX2")
    assert cpu_features.__wrapped__() == left - {"avx512"}


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
    assert all("AMD, Apple and other devices take the" in record.getMessage() for record in caplog.records)
    with pytest.raises(ImplUnavailableError, match="AMD, Apple and other devices"):
        choose("feed_forward", "float32", target, "triton")


def test_a_fallback_says_what_could_not_run() -> None:
    without = Target.cuda(80, triton=None, name="A100")
    assert "triton cannot: Triton is not installed" in choose("feed_forward", "float16", without).reason
    old = Target.cuda(80, triton=(3, 2), name="A100")
    assert "triton cannot: these kernels compile with Triton 3.6 and newer, not with 3.2" in (
        choose("feed_forward", "float16", old).reason
    )
    assert choose("feed_forward", "float16", Target.cuda(80, triton=(3, 6), name="A100")).impl == Impl.TRITON


@pytest.mark.parametrize(("sm", "is_loud"), [(75, False), (80, True), (90, True)])
def test_a_card_made_for_the_kernels_is_told_that_it_goes_without(
    sm: int, is_loud: bool, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "_told", set())
    with caplog.at_level(logging.INFO, "geneformer_kernels"):
        choose("varlen_attention", "float16", Target.cuda(sm, triton=None, name="some card"))
        choose("varlen_attention", "float16", CARDS["H100"])
    assert [record.levelno for record in caplog.records] == [logging.WARNING if is_loud else logging.INFO, logging.INFO]


def test_volta_refuses_bfloat16_with_advice() -> None:
    for op in ("varlen_attention", "residual_layernorm", "feed_forward", "mlm_cross_entropy"):
        for impl in (None, "triton", "torch", "reference"):
            with pytest.raises(ImplUnavailableError, match=r"V100 has no bfloat16.*use float16"):
                choose(op, "bfloat16", CARDS["V100"], impl)


@pytest.mark.parametrize("card", ["V100", "T4"])
def test_volta_and_turing_run_on_triton_what_has_no_matrix_product(card: str) -> None:
    """Their products would become scalar arithmetic, or not compile; cuBLAS and torch's attention run them."""
    choices = {choice.op: choice for choice in explain(CARDS[card])}
    on_triton = {op for op, choice in choices.items() if choice.impl == Impl.TRITON}
    in_one_pass = {"residual_layernorm", "residual_layernorm_int8"}
    assert on_triton == {"rank_genes", "embed_tokens", "quantize_rows"} | in_one_pass
    for op in ("varlen_attention", "feed_forward", "mlm_cross_entropy", "int8_linear"):
        assert choices[op].impl == Impl.TORCH
        with pytest.raises(ImplUnavailableError, match=r"not tensor cores|does not compile"):
            choose(op, "float16", CARDS[card], "triton")
    assert "memory-efficient attention over packed sequences" in choices["varlen_attention"].reason
    assert "cuBLAS" in choices["linear"].reason


@pytest.mark.parametrize("card", ["A100", "A10", "L4", "H100"])
def test_from_ampere_on_everything_with_a_kernel_runs_on_it(card: str) -> None:
    for dtype in ("bfloat16", "float16"):
        for choice in explain(CARDS[card], dtype):
            assert choice.impl == (Impl.TORCH if choice.op in ("linear", "fp8_linear") else Impl.TRITON), choice


def test_what_is_too_large_for_a_kernel_falls_back_unless_asked_for() -> None:
    card, why = CARDS["H100"], "rows up to 4,096 wide, not 5,000"
    choice = choose("residual_layernorm", "float16", card, triton_cannot=why)
    assert choice.impl == Impl.TORCH
    assert why in choice.reason
    with pytest.raises(ImplUnavailableError, match=why):
        choose("residual_layernorm", "float16", card, "triton", triton_cannot=why)
    with use_impl("triton"), pytest.raises(ImplUnavailableError, match=why):
        choose("residual_layernorm", "float16", card, triton_cannot=why)


def test_operations_say_what_is_too_large() -> None:
    import torch
    from geneformer_kernels import embed_tokens, rank_genes, residual_layernorm, varlen_attention

    bounds, wide, row = torch.tensor([0, 2]), torch.zeros(2, 4097), torch.zeros(4097)
    heads = torch.zeros(2, 1, 129)
    genes = dict(column_to_gene=torch.tensor([0, 1]), token_ids=torch.arange(262_145), medians=torch.ones(262_145))
    counts = torch.tensor([0, 1]), torch.tensor([1]), torch.ones(1), torch.ones(1)
    calls = {
        r"4,096 wide, not 4,097": lambda **impl: residual_layernorm(wide, None, row, row, eps=1e-5, norm="pre", **impl),
        r"rows up to 4,096 wide": lambda **impl: embed_tokens(
            torch.tensor([0, 1]), bounds, wide, wide, None, None, None, **impl
        ),
        r"up to 128, not 129": lambda **impl: varlen_attention(heads, heads, heads, cu_seqlens=bounds, **impl),
        r"at most 262,144 genes": lambda **impl: rank_genes(*counts, **genes, keep=3, **impl),
    }
    for why, call in calls.items():
        call()
        with pytest.raises(ImplUnavailableError):
            call(impl="triton")
        if os.environ.get("TRITON_INTERPRET") == "1":
            with use_impl("triton"), pytest.raises(ImplUnavailableError, match=why):
                call()
