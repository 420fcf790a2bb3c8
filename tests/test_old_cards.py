"""The tests for cards on Volta and Turing, of which there is none here: nothing fails, and nothing hides a failure."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from geneformer_kernels.dispatch import ImplUnavailableError, choose
from geneformer_kernels.target import CARDS, Target
from old_cards import refused_by_old_card

ROOT = Path(__file__).resolve().parent.parent
KERNELS = "tests/kernels"
#: Test -> whether it passes on a V100 and on a T4; otherwise it skips.
SUBSET = {
    f"{KERNELS}/test_varlen_attention_triton.py::test_no_tokens[cpu]": (False, False),
    f"{KERNELS}/test_feed_forward_triton.py::test_no_row_and_one_row[cpu-(1, 70, 51)]": (False, False),
    f"{KERNELS}/test_feed_forward_layernorm_triton.py::test_composed[cpu-post-triton]": (False, False),
    f"{KERNELS}/test_feed_forward_layernorm_triton.py::test_composed[cpu-post-torch]": (True, True),
    f"{KERNELS}/test_feed_forward.py::test_forward[cpu-True-dtype1-relu-torch]": (True, True),
    f"{KERNELS}/test_feed_forward.py::test_forward[cpu-True-dtype2-relu-torch]": (False, True),
    f"{KERNELS}/test_quantize_rows.py::test_ties_go_to_even[cpu-triton]": (True, True),
    f"{KERNELS}/test_quantize_rows.py::test_ties_go_to_even[cpu-torch]": (True, True),
    f"{KERNELS}/test_int8_linear.py::test_compiles_without_a_graph_break[cpu-3-triton]": (False, False),
    f"{KERNELS}/test_mlm_cross_entropy_triton.py::test_no_rows[cpu]": (False, False),
    f"{KERNELS}/test_mlm_cross_entropy.py::test_torch_path[cpu-1-1-1-dtype2]": (True, True),
    f"{KERNELS}/test_residual_layernorm_triton.py::test_everything[cpu-1-21-post-dtype1]": (True, True),
    f"{KERNELS}/test_embed_tokens_triton.py::test_widths[cpu-1]": (True, True),
}


# A fresh process for each card: one of them is a slow test.
@pytest.mark.parametrize("card", ["V100", pytest.param("T4", marks=pytest.mark.slow)])
def test_nothing_fails_on_an_old_card(card: str) -> None:
    """In a process in which tensors on the CPU count as lying on such a card, and kernels are interpreted."""
    paths = [ROOT, ROOT / "kernels", ROOT / "tests" / "gpu", *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {
        **os.environ, "OLD_CARD": card, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": os.pathsep.join(map(str, paths)),
    }  # fmt: skip
    options = ("-p", "old_card", "-p", "no:cacheprovider", "-v", "--assert=plain")
    command = [sys.executable, "-m", "pytest", *SUBSET, *options]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr
    column = ["V100", "T4"].index(card)
    for test, passes in SUBSET.items():
        assert f"{test} {'PASSED' if passes[column] else 'SKIPPED'}" in done.stdout


def refusal(
    op: str, dtype: str, target: Target, impl: str | None = "triton", triton_cannot: str = ""
) -> ImplUnavailableError:
    with pytest.raises(ImplUnavailableError) as caught:
        choose(op, dtype, target, impl, triton_cannot=triton_cannot)
    return caught.value


def test_only_what_the_table_refuses_is_skipped() -> None:
    v100, t4 = CARDS["V100"], CARDS["T4"]
    assert "scalar arithmetic" in refused_by_old_card(refusal("feed_forward", "float16", t4), t4)
    assert "does not compile" in refused_by_old_card(refusal("int8_linear", "float16", v100), v100)
    for impl in ("triton", "torch", None):
        assert "no bfloat16" in refused_by_old_card(refusal("feed_forward", "bfloat16", v100, impl), v100)
    for target in (v100, t4, CARDS["A100"]):
        for triton in (None, (3, 1)):
            without = replace(target, triton=triton)
            assert not refused_by_old_card(refusal("feed_forward", "float16", without), without)
    assert not refused_by_old_card(refusal("feed_forward", "float16", t4, "numba"), t4)
    assert not refused_by_old_card(refusal("feed_forward", "float64", CARDS["A100"]), CARDS["A100"])
    assert not refused_by_old_card(AssertionError("feed_forward: triton was asked for"), t4)
    too_wide = refusal("embed_tokens", "float16", t4, triton_cannot="rows are too wide")
    assert not refused_by_old_card(too_wide, t4)
