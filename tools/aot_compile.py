"""Compiles kernels for architectures that are not here, and reads what came out.

:class:`Compilers` is a pool of worker processes; as a program this file is one such worker: a case per line of JSON on
standard input, a result per line on standard output. Workers start without the ``TRITON_`` settings of the environment
(interpreted kernels cannot be compiled, and a table must not depend on somebody's settings), and a compiler that dies
or never ends costs one case rather than the run.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import queue
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

#: Changes when a result means something else than before, so that cached ones are not believed.
MEASURE_VERSION = 1

TENSOR_CORE = re.compile(r"\b([HIQDB]G?MMA)\b")
# "tt.dot ... -> tensor<64x64xf32, #mma>": the layout of the result says what the product becomes.
DOT_LAYOUT = re.compile(r"\btt\.dot\b.*->\s*tensor<[^#>]*#(?:ttg\.)?(\w+)")
WARP_GROUP_DOT = "warp_group_dot"
# "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32", where there is no machine code to read.
PTX_PRODUCT = re.compile(r"\bmma\.sync\S*\.([fsu])\d+\b")
PTX_NAMES = {"f": "HMMA", "s": "IMMA", "u": "IMMA"}
# What ptxas -v says of a kernel. Neither the stack frame nor the local stores of the machine code are the same: both
# also hold arrays (tl.sin keeps 32 bytes), and a slot may be stored twice.
SPILL_STORES = re.compile(r"(\d+) bytes spill stores")
REGISTERS = re.compile(r"Used (\d+) registers")


class Compilers:
    """``n_workers`` processes that compile cases; a context manager, which ends them."""

    def __init__(self, n_workers: int, *, limit_s: float = 900.0) -> None:
        self.limit_s = limit_s
        self._workers: list[Worker] = []
        self._free: queue.SimpleQueue[Worker] = queue.SimpleQueue()
        for _ in range(n_workers):
            self._workers.append(Worker())
            self._free.put(self._workers[-1])
        self._threads = ThreadPoolExecutor(n_workers)

    def __enter__(self) -> Compilers:
        return self

    def __exit__(self, *exc: object) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
        for worker in self._workers:
            worker.end()
        self._threads.shutdown()

    def run(self, jobs: dict[str, dict[str, Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
        """(key, result) of each job as it finishes; a result without ``"error"`` holds what :func:`measure` read."""
        futures = {self._threads.submit(self._one, job): key for key, job in jobs.items()}
        for future in as_completed(futures):
            yield futures[future], future.result()

    def _one(self, job: dict[str, Any]) -> dict[str, Any]:
        worker = self._free.get()
        try:
            return worker.run(job, self.limit_s)
        finally:
            self._free.put(worker)


class Worker:
    """One process that compiles; started when first needed, and again after it died."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._has_ended = False
        self._folder = Path(tempfile.mkdtemp(prefix="aot_"))
        self._log = self._folder / "log.txt"

    def run(self, job: dict[str, Any], limit_s: float) -> dict[str, Any]:
        """What :func:`measure` read of the case, or ``{"error": why not}``.

        Beside an error, ``is_final`` is False where another try may end otherwise.
        """
        process = self._process = self._process or self._start()
        assert process.stdin is not None
        assert process.stdout is not None
        late = threading.Event()

        def give_up() -> None:
            late.set()
            _kill(process)

        timer = threading.Timer(limit_s, give_up)
        timer.start()
        reply = ""
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(json.dumps(job) + "\n")
            process.stdin.flush()
            reply = process.stdout.readline()
        timer.cancel()
        if reply.endswith("\n") and not late.is_set():
            result = json.loads(reply)
        else:
            code = process.wait()
            self._process = None
            why = f"took longer than {limit_s:g} s" if late.is_set() else f"the compiler died ({_cause(code)})"
            result = {"error": why, "is_final": False}
        if "error" in result:
            result["error"] += _diagnosis(self._log.read_text(errors="replace"))
        return result

    def end(self) -> None:
        """Ends the process and removes its files."""
        self._has_ended = True
        if self._process is not None:
            _kill(self._process)
            self._process.wait()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _start(self) -> subprocess.Popen[str]:
        if self._has_ended:
            raise RuntimeError("this pool of compilers has ended")
        environment = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
        for name in ("PTXAS_OPTIONS", "DISABLE_PTXAS_OPT", "NVPTX_ENABLE_DUMP", "MLIR_ENABLE_DUMP"):
            environment.pop(name, None)
        environment["TRITON_DUMP_PTXAS_LOG"] = "1"
        environment["TRITON_CACHE_DIR"] = str(self._folder / "cache")
        environment["TMPDIR"] = str(self._folder)  # where Triton leaves what ptxas refused
        environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
        environment["PYTHONDONTWRITEBYTECODE"] = "1"
        with self._log.open("ab") as log:
            return subprocess.Popen(
                [sys.executable, __file__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=environment,
                start_new_session=True,  # so that its ptxas can be ended with it
            )


def _kill(process: subprocess.Popen[str]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _cause(code: int) -> str:
    try:
        return signal.Signals(-code).name
    except ValueError:
        return f"exit {code}"


def _diagnosis(log: str) -> str:
    """The compiler's own first line of complaint, without paths, or nothing."""
    for line in log.splitlines():
        found = re.search(r"(?:error: |LLVM ERROR: |Assertion |ptxas fatal\s*: )(.*)", line)
        if found:
            return f": {found.group(1)[:160]}"
    return ""


def work() -> None:
    """Compile what comes in on standard input until it ends."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # Triton prints whole programs when ptxas refuses one
    for line in sys.stdin:
        with contextlib.suppress(OSError):  # a terminal, when somebody runs a worker by hand
            os.ftruncate(2, 0)
        try:
            result = measure(json.loads(line))
        except Exception as error:  # whatever a compiler raises: the case does not compile
            result = {"error": f"{type(error).__name__}: {_gist(str(error))}"}
        replies.write(json.dumps(result) + "\n")
        replies.flush()
        shutil.rmtree(os.environ["TRITON_CACHE_DIR"], ignore_errors=True)  # a megabyte per case


def _gist(message: str) -> str:
    """The line that says it: Triton's own errors quote the program first."""
    lines = [line.strip() for line in message.splitlines() if line.strip()] or [""]
    return lines[-1 if re.match(r"at \d+:\d+", lines[0]) else 0][:160]


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """Compile one case and read registers, spills, shared memory and matrix instructions.

    Parameters
    ----------
    job
        ``module`` and ``kernel``: where the function is. ``signature``, ``constexprs``, ``divisible``, ``options``: as
        in ``geneformer_kernels.launch.KernelCase``. ``sm``: for which architecture.

    Returns
    -------
    dict
        ``registers`` per thread, ``spill_bytes`` (stored to local memory, per thread), ``smem_bytes`` per block, and
        ``matrix``: the matrix instructions, with ``"FMA"`` for a product that became scalar arithmetic.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function = getattr(importlib.import_module(job["module"]), job["kernel"])
    names = list(function.arg_names)
    given = [*job["signature"], *job["constexprs"]]
    if sorted(names) != sorted(given) or not set(job["divisible"]) <= set(job["signature"]):
        raise ValueError(
            f"the case names {sorted(set(given) - set(names)) or 'nothing'} that {job['kernel']} does not take and "
            f"lacks {sorted(set(names) - set(given)) or 'nothing'}; divisible must be part of the signature"
        )
    source = ASTSource(
        fn=function,
        signature={name: job["signature"].get(name, "constexpr") for name in names},
        constexprs={(names.index(name),): value for name, value in job["constexprs"].items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in job["divisible"]},
    )
    log = io.StringIO()
    with contextlib.redirect_stdout(log):  # TRITON_DUMP_PTXAS_LOG
        compiled = triton.compile(source, target=GPUTarget("cuda", job["sm"], 32), options=job["options"])
    matrix = matrix_instructions(compiled.asm["ttgir"], _disassembled(compiled.asm["cubin"]) or compiled.asm["ptx"])
    return resources(log.getvalue()) | {"smem_bytes": compiled.metadata.shared, "matrix": matrix}


def resources(log: str) -> dict[str, int]:
    """Registers and spilled bytes per thread, from what ``ptxas -v`` printed."""
    registers, spills = REGISTERS.findall(log), SPILL_STORES.findall(log)
    if not registers or not spills:
        raise ValueError("ptxas says nothing of registers and spills: Triton 3.5 or newer is needed")
    return {"registers": max(map(int, registers)), "spill_bytes": sum(map(int, spills))}


def matrix_instructions(ttgir: str, code: str) -> str:
    """What a kernel's products became, from Triton's last layouts and from the machine code (or PTX)."""
    layouts = DOT_LAYOUT.findall(ttgir)
    has_scalar_dot = any("mma" not in layout for layout in layouts)
    has_dot = bool(layouts) or WARP_GROUP_DOT in ttgir
    instructions = sorted({*TENSOR_CORE.findall(code), *(PTX_NAMES[kind] for kind in PTX_PRODUCT.findall(code))})
    if has_scalar_dot or (has_dot and not instructions):
        instructions.append("FMA")
    return "+".join(instructions)


def _disassembled(cubin: bytes) -> str:
    """The machine code as text; empty for an architecture that this cuobjdump no longer knows (13.1: below sm_75)."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([tool, "-sass", file.name], capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return done.stdout
    if "is deprecated" in done.stderr:
        return ""
    raise RuntimeError(f"cuobjdump: {done.stderr.strip()}")


if __name__ == "__main__":
    work()
