"""``python -m bench cpu``, ``python -m bench gpu``: every measurement, the most important first, none twice.

Beside them ``compare`` (two folders of results), ``first-call`` (what the first call costs) and ``cost`` (cost against
size).
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

from bench.machine import OUT, ROOT, machine_folder, provenance

_EMBED, _TOKENIZE = "bench/cpu/test_bench_embed.py::test_bench_embed", "bench/cpu/test_bench_tokenize.py::test_bench"
_VERIFY = "bench/cpu/test_bench_verify.py::test_bench_verify"
QUANTIZED = ("2-threads", "2-threads_avx2", "1-threads", "1-threads_avx2")
#: Result -> the test that makes it, per suite, in order of importance.
SUITES = {
    "cpu": {
        "embed_v1-10m_all-threads": f"{_EMBED}[embed_v1-10m_all-threads]",
        "train_v1-10m_all-threads": "bench/cpu/test_bench_train.py::test_bench_train[train_v1-10m_all-threads]",
        "tokenize_v2": f"{_TOKENIZE}_tokenize[v2]",
        "tokenize_v1": f"{_TOKENIZE}_tokenize[v1]",
        "memory_tokenize": f"{_TOKENIZE}_peak_memory[tokenize]",
        "rank_genes_pbmc_facs_v1": f"{_TOKENIZE}_rank[pbmc_facs-v1]",
        "rank_genes_pbmc_facs_v2": f"{_TOKENIZE}_rank[pbmc_facs-v2]",
        "rank_genes_pbmc3k_v1": f"{_TOKENIZE}_rank[pbmc3k-v1]",
        "rank_genes_pbmc3k_v2": f"{_TOKENIZE}_rank[pbmc3k-v2]",
        "rank_genes_mix_celseq2_5cl_v1": f"{_TOKENIZE}_rank[mix_celseq2_5cl-v1]",
        "rank_genes_mix_celseq2_5cl_v2": f"{_TOKENIZE}_rank[mix_celseq2_5cl-v2]",
        "memory_medians": f"{_TOKENIZE}_peak_memory[medians]",
        "profile_overhead": "bench/cpu/test_bench_profile.py::test_bench_profile",
        "profile_ranges": "bench/cpu/test_bench_ranges.py::test_bench_ranges",
        "verify_tokens": f"{_VERIFY}_tokens",
        "verify_tokenize": f"{_VERIFY}_tokenize",
        **{f"peak_{size}": f"bench/cpu/test_bench_peak.py::test_bench_peak[{size}]" for size in ("v1-10m", "v2-104m")},
        **{
            f"verify_{preset}_{kind}": f"{_VERIFY}_model[{file}-geneformer-{preset}]"
            for preset in ("v1-10m", "v2-104m")
            for kind, file in (("safetensors", "model.safetensors"), ("bin", "pytorch_model.bin"))
        },
        **{
            name: f"bench/cpu/test_bench_quantized.py::test_bench_quantized[{name}]"
            for geometry in ("v1-10m", "v2-104m")
            for name in (f"quantized_{geometry}_{end}" for end in QUANTIZED)
        },
        **{
            name: f"bench/cpu/test_bench_float32.py::test_bench_float32[{name}]"
            for name in (f"embed_{case}-threads_avx2" for case in ("v1-10m_2", "v1-10m_1", "v2-104m_2"))
        },
        **{
            name: f"bench/cpu/test_bench_perturb.py::test_bench_perturb[{name}]"
            for geometry in ("v1-10m", "v2-104m")
            for name in (f"perturb_{geometry}_2-threads{end}" for end in ("", "_avx2"))
        },
        "favor_attention": "bench/cpu/test_bench_favor.py::test_bench_favor",
        "aido_embed": "bench/cpu/test_bench_aido.py::test_bench_aido",
        **{f"scgpt_embed_{n}-threads": f"bench/cpu/test_bench_scgpt.py::test_bench_scgpt[{n}]" for n in (2, 1)},
        "embed_v1-10m_1-threads": f"{_EMBED}[embed_v1-10m_1-threads]",
        "embed_v2-104m_all-threads": f"{_EMBED}[embed_v2-104m_all-threads]",
    },
}
#: Command -> module, of those that are no suite of tests.
OTHERS = {
    "gpu": "bench.gpu.suite",
    "compare": "bench.compare",
    "first-call": "bench.first_call",
    "cost": "bench.cost",
}


def run_suite(suite: str, out: Path, *, is_again: bool, only: str) -> list[str]:
    """Run what is missing in ``out``; returns the cases that failed or missed their goal."""
    failed = []
    for case, test in SUITES[suite].items():
        if only not in case:
            continue
        if (out / f"{case}.json").exists() and not is_again:
            print(f"{case}: there already (--again repeats it)", flush=True)
            continue
        print(f"{case} ...", flush=True)
        command = [sys.executable, "-m", "pytest", test, "-m", "bench", "-q", "-p", "no:cacheprovider"]
        if subprocess.run(command, cwd=ROOT, env={**os.environ, OUT: str(out)}, check=False).returncode:
            failed.append(case)
    return failed


def main() -> int:
    """Run a suite; 0 if all went well and every goal was met."""
    if sys.argv[1:2] and sys.argv[1] in OTHERS:
        return int(import_module(OTHERS[sys.argv[1]]).main(sys.argv[2:]))
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    others = ", ".join(OTHERS)
    parser.add_argument("suite", choices=[*SUITES, *OTHERS], help=f"{others} have options of their own: gpu --help")
    parser.add_argument("--out", type=Path, help="folder of this machine (default: bench/results/<machine>)")
    parser.add_argument("--again", action="store_true", help="measure also what is there")
    parser.add_argument("--only", default="", metavar="TEXT", help="only cases whose name contains this")
    args = parser.parse_args()
    out = (args.out or machine_folder(provenance())).resolve()
    failed = run_suite(args.suite, out, is_again=args.again, only=args.only)
    print(f"results in {os.path.relpath(out)}; python -m bench.report puts them into docs/results.md")
    if failed:
        print("failed, or slower than the goal: " + ", ".join(failed))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
