"""Where a quantized model may be written, and what beside a model belongs to it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from geneformer_fast.checkpoints.present import CONFIG
from geneformer_fast.errors import OutputError
from geneformer_fast.files.checksums import SUMS
from geneformer_fast.files.writing import is_leftover

#: What becomes of each layer, beside a quantized model.
REPORT = "quantization.json"
# Weights of any framework, and what else of a training may lie beside them: of the model before, and not small.
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".gguf", ".nemo", ".distcp")
# What lies beside a model, with settings and reports in JSON.
_BESIDE = (SUMS, "README.md", ".gitattributes", "vocab.txt")


def check_out(out: Path, folder: Path | None, *, overwrite: bool) -> None:
    """See that a folder may be written.

    Raises
    ------
    OutputError
        It is the model's own (``folder``), in it or above it, or the one that this process is in; it holds a model
        already and ``overwrite`` is not set; or it holds something else, which would be lost.
    """
    ours, theirs = out.resolve(), None if folder is None else folder.resolve()
    if Path.cwd().is_relative_to(ours):
        raise OutputError(f"{out} is or holds the folder that you are in, and would be replaced; name another folder")
    if theirs is not None and (ours.is_relative_to(theirs) or theirs.is_relative_to(ours)):
        raise OutputError(f"{out} is, holds or lies in the folder of the model; name another folder")
    if out.exists() and not out.is_dir():
        raise OutputError(f"{out} is a file; name a folder")
    if (out / CONFIG).exists():
        if not overwrite:
            raise OutputError(
                f"{out} holds a model already; choose another folder or pass overwrite=True (--overwrite)"
            )
        _check_replaced(out, set() if folder is None else {path.name for path in others_in(folder)})
    elif out.exists() and any(not is_leftover(path) for path in out.iterdir()):
        raise OutputError(f"{out} holds files and no model; name another folder")


def _check_replaced(out: Path, others: set[str]) -> None:
    """See that nothing is lost with a model that is replaced but what may lie beside one."""
    for path in sorted(out.iterdir()):
        is_of_model = path.suffix in (*_WEIGHTS, ".json") or path.name in _BESIDE or path.name in others
        if path.is_dir() or not (is_of_model or is_leftover(path)):
            raise OutputError(
                f"{out} holds {path.name}, which is no part of a model and would be lost; move it, or name another "
                "folder"
            )


def others_in(folder: Path) -> Iterator[Path]:
    """Files that are no weights, and say nothing about them; beside a model that is a file there are none."""
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        is_weights = path.suffix in _WEIGHTS or path.name.endswith(".index.json")
        if path.is_file() and not is_weights and path.name not in (CONFIG, SUMS, REPORT) and not is_leftover(path):
            yield path
