"""Folders that torchao quantized to int8 and transformers saved: their names, made those of compressed-tensors.

torchao takes its tensors apart: ``X.weight`` becomes ``X._weight_qdata``, ``X._weight_scale`` and, though it is zero,
``X._weight_zero_point``; what they were is JSON in the header of the file, under ``X.weight`` (torchao 0.18).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from geneformer_fast.checkpoints.described import Kinds
from geneformer_fast.checkpoints.stored import Stored
from geneformer_fast.errors import CheckpointError
from geneformer_fast.files import schema

METHOD = "torchao"
_Q, _SCALE, _ZERO = "._weight_qdata", "._weight_scale", "._weight_zero_point"
_ADVICE = "take the model before it was quantized, and quantize it with geneformer-fast quantize MODEL --out DIR"


def in_our_terms(stored: Stored, folder: Path) -> tuple[Stored, Kinds]:
    """The tensors under the names that compressed-tensors gives them, and which layers are quantized.

    Raises
    ------
    CheckpointError
        Weights are something else than int8 with a symmetric scale per channel, or parts of one are missing.
    """
    names, targets = {}, []
    for name in stored:
        base, mark, _ = name.rpartition("._weight_")
        if not mark:
            names[name] = name
        elif name.endswith(_Q):
            names[f"{base}.weight"] = name
            targets.append((base, _scheme_of(stored, base, folder)))
        elif name.endswith(_SCALE):
            names[f"{base}.weight_scale"] = name
        elif name.endswith(_ZERO):
            if stored.read(name).count_nonzero():
                raise CheckpointError(f"{folder}: tensor {name!r} is not zero; only symmetric int8 is read; {_ADVICE}")
        else:
            raise CheckpointError(f"{folder}: tensor {name!r} is part of no int8 weight; {_ADVICE}")
    return stored.renamed(names), Kinds(tuple(targets))


def _scheme_of(stored: Stored, module: str, folder: Path) -> str:
    """Whether rows of a layer's input are rounded too."""
    where = f"{folder}: the header of {module}.weight"
    said = _object(schema.parse_json(stored.metadata.get(f"{module}.weight", "{}"), where, CheckpointError))
    kind, data = said.get("_type"), _object(said.get("_data"))
    if kind != "Int8Tensor" or data.get("block_size") != [1, stored[f"{module}{_Q}"].shape[-1]]:
        raise CheckpointError(
            f"{folder}: {module} is quantized by torchao as {kind} in blocks of {data.get('block_size')}; only "
            f"Int8Tensor with a scale per row of the weight (PerRow) is read; {_ADVICE}"
        )
    rows = data.get("act_quant_kwargs")
    if rows is None:
        return "int8-weights"
    rounding = _object(_object(rows).get("_data"))
    grain, mapping = (_object(rounding.get(key)) for key in ("granularity", "mapping_type"))
    if grain.get("_type") != "PerRow" or mapping.get("_data") != "SYMMETRIC":
        raise CheckpointError(
            f"{folder}: the input of {module} is rounded by torchao as {grain.get('_type')}, {mapping.get('_data')}; "
            f"only PerRow and SYMMETRIC are read; {_ADVICE}"
        )
    return "int8"


def _object(value: Any) -> dict[str, Any]:
    """What should be a JSON object; an empty one in place of anything else."""
    return value if isinstance(value, dict) else {}
