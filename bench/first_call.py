"""``python -m bench first-call``: what the first call costs, from the start of Python to the second embedding.

Every run is a process of its own. *Cold*: nothing that compilers keep is there (folders of numba, Triton, torch.compile
and CUDA are empty); *warm*: the same again with what the cold run left there, which is what a user's second process
finds. Files lie in the page cache in both, since nobody but root may empty it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.machine import ROOT, save_result

ROUNDS = 3
#: What is embedded: few cells, so that little but the first call is measured.
LENGTHS = (1024, 768, 512, 256)
#: Environment variable -> folder, of everybody who keeps compiled code.
_CACHES = {
    "NUMBA_CACHE_DIR": "numba",
    "TRITON_CACHE_DIR": "triton",
    "TORCHINDUCTOR_CACHE_DIR": "inductor",
    "CUDA_CACHE_PATH": "cuda",
}

# Without any of this folder's modules, which would be imported along. Times are CLOCK_MONOTONIC's, which all processes
# share, so that the first stage begins where this process was asked for.
_HEAD = """
import json, sys, time
last, stages = float(sys.argv[1]), {}
def done(stage):
    global last
    now = time.monotonic()
    stages[stage], last = now - last, time.monotonic()
done("python")
import geneformer_fast
done("import geneformer_fast")
import torch
done("import torch")
"""
_TAIL = """
print("stages " + json.dumps(stages))
"""
_EMBED = """
from geneformer_fast import embed, load
done("import what runs")
model = load(sys.argv[2], device=sys.argv[4])
done("load")
for call in ("first", "second"):
    embed(sys.argv[3], model, progress=False)
    done(f"{call} embed")
"""
_TOKENIZE = """
from geneformer_fast.tokenization.run import tokenize
done("import what runs")
for call in ("first", "second"):
    tokenize(sys.argv[3], sys.argv[2], dictionary=sys.argv[5], preset="v2", progress=False, overwrite=True)
    done(f"{call} tokenize")
"""
_COMPILE = """
from geneformer_fast import Ragged, load
done("import what runs")
model = load(sys.argv[2], device=sys.argv[4]).eval()
lengths = json.loads(sys.argv[5])
ids = torch.randint(5, model.config.vocab_size, (sum(lengths),), device=model.device)
cells = Ragged.from_lengths(ids, lengths)
done("load")
with torch.no_grad():
    compiled = torch.compile(model)
    for call in ("first", "second"):
        compiled(cells)
        if model.device.type == "cuda":
            torch.cuda.synchronize()
        done(f"{call} compiled forward")
"""
PROGRAMS = {"embed": _EMBED, "compile": _COMPILE, "tokenize": _TOKENIZE}


@dataclass(frozen=True)
class Subject:
    """What is run for the first time.

    Attributes
    ----------
    program
        Of :data:`PROGRAMS`.
    arguments
        What its process gets, after the moment it was begun.
    """

    program: str
    arguments: tuple[str, ...]


def run_once(subject: Subject, caches: Path) -> dict[str, float] | str:
    """Seconds by stage, of a new process that finds compiled code in ``caches``; or why there are none."""
    environment = {**os.environ, **{name: str(caches / folder) for name, folder in _CACHES.items()}}
    paths = [str(ROOT), str(ROOT / "kernels"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment["PYTHONPATH"] = os.pathsep.join(paths)
    program = _HEAD + PROGRAMS[subject.program] + _TAIL
    command = [sys.executable, "-c", program, repr(time.monotonic()), *subject.arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    said = [line for line in done.stdout.splitlines() if line.startswith("stages ")]
    if done.returncode or not said:
        return (done.stderr.strip().splitlines() or [f"the process ended with {done.returncode}"])[-1][:300]
    found: dict[str, float] = json.loads(said[-1].removeprefix("stages "))
    return found


def measure(subjects: Sequence[Subject], work: Path, *, rounds: int = ROUNDS) -> dict[str, Any]:
    """Every subject cold and then warm, in turns, ``rounds`` times.

    Returns
    -------
    dict
        ``programs``: by name its ``stages`` with ``cold`` and ``warm`` ``seconds``, or why it is ``not_available``.
    """
    found: dict[str, dict[str, dict[str, list[float]]]] = {subject.program: {} for subject in subjects}
    failed: dict[str, str] = {}
    for number in range(rounds):
        for subject in subjects:
            with tempfile.TemporaryDirectory(prefix=f"caches_{number}_", dir=work) as caches:
                for kind in ("cold", "warm"):
                    if subject.program in failed:
                        break
                    said = run_once(subject, Path(caches))
                    if isinstance(said, str):
                        failed[subject.program] = said
                        break
                    print(f"  {subject.program}, {kind}: {sum(said.values()):.1f} s", flush=True)
                    for stage, seconds in said.items():
                        stages = found[subject.program].setdefault(stage, {"cold": [], "warm": []})
                        stages[kind].append(seconds)
    return {"programs": {name: _summed(stages, failed.get(name)) for name, stages in found.items()}}


def _summed(stages: Mapping[str, Mapping[str, Sequence[float]]], failure: str | None) -> dict[str, Any]:
    if failure is not None:
        return {"not_available": failure}
    rows = {
        stage: {kind: {"seconds": _spread(values)} for kind, values in kinds.items()} for stage, kinds in stages.items()
    }
    whole = {
        kind: {
            "seconds": _spread([sum(parts) for parts in zip(*(kinds[kind] for kinds in stages.values()), strict=True)])
        }
        for kind in ("cold", "warm")
    }
    return {"stages": rows, "whole": whole}


def _spread(values: Sequence[float]) -> dict[str, float]:
    """Least, median and most: of few rounds there are no percentiles."""
    ordered = sorted(values)
    middle = (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2
    return {"min": round(ordered[0], 4), "median": round(middle, 4), "max": round(ordered[-1], 4)}


def table(content: Mapping[str, Any]) -> str:
    """What a person reads."""
    lines = []
    for name, program in content["programs"].items():
        if "not_available" in program:
            lines.append(f"{name}: not available ({program['not_available']})")
            continue
        lines.append(f"{name:<28}{'cold':>10}{'warm':>10}  seconds, medians")
        rows = {**program["stages"], "all together": program["whole"]}
        for stage, kinds in rows.items():
            cold, warm = (kinds[kind]["seconds"]["median"] for kind in ("cold", "warm"))
            lines.append(f"  {stage:<26}{cold:>10.3f}{warm:>10.3f}")
    return "\n".join(lines)


def prepare(work: Path, preset: str, device: str) -> list[Subject]:
    """A model with random weights, tokens and counts in ``work``, and who is run on them."""
    import torch

    from bench.token_folders import token_folder
    from geneformer_fast import Encoder, EncoderConfig, save

    config = EncoderConfig.preset(preset)
    torch.manual_seed(0)
    model = str(save(Encoder(config).eval(), work / "model"))
    lengths = [min(length, config.max_len) for length in LENGTHS]
    tokens = str(token_folder(work / "tokens", lengths, config))
    subjects = [
        Subject("embed", (model, tokens, device)),
        Subject("compile", (model, tokens, device, json.dumps(lengths))),
    ]
    data = ROOT.parent / "shared" / "data"
    if data.is_dir():
        counts = str(data / "pbmc3k" / "pbmc3k.h5ad")
        subjects.append(Subject("tokenize", (str(work / "tokenized"), counts, device, str(data / "dicts"))))
    return subjects


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and save."""
    parser = argparse.ArgumentParser(prog="python -m bench first-call", description=__doc__)
    parser.add_argument("--preset", default="geneformer-v1-10m", help="model (default: geneformer-v1-10m)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda ... (default: cpu)")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"cold and warm runs of each (default: {ROUNDS})")
    parser.add_argument("--out", type=Path, help="folder of this machine (default: bench/results/<machine or card>)")
    args = parser.parse_args(argv)
    if args.rounds < 1:
        parser.error(f"--rounds must be at least 1, not {args.rounds}")
    with tempfile.TemporaryDirectory(prefix="first_call_") as folder:
        subjects = prepare(Path(folder), args.preset, args.device)
        content = measure(subjects, Path(folder), rounds=args.rounds)
    print(table(content))
    about = {"geometry": args.preset.removeprefix("geneformer-")}
    case = f"first_call_{about['geometry']}_{args.device.partition(':')[0]}"
    content = {**about, "device": args.device, "rounds": args.rounds, "lengths": [*LENGTHS], **content}
    print(save_result(case, content, folder=args.out, device=args.device))
    return 0


if __name__ == "__main__":
    sys.exit(main())
