"""What became of each layer of a quantized model: a table to print, and ``quantization.json`` beside the weights."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from geneformer_fast.errors import CheckpointError
from geneformer_fast.files import schema
from geneformer_fast.files.schema import read_json
from geneformer_fast.files.writing import write_json
from geneformer_fast.quantization.places import REPORT

if TYPE_CHECKING:
    from geneformer_fast.quantization.calibrate import Calibration
    from geneformer_fast.quantization.choices import Choice

FORMAT = "geneformer-fast quantization"
FORMAT_VERSION = 1
#: What is in no layer that a choice was made for: biases of LayerNorm, tables of few rows, heads.
REST = "everything else"


@dataclass(frozen=True)
class Layer:
    """One layer of a quantized model.

    Attributes
    ----------
    name
        Such as ``"blocks.0.qkv"``.
    kind
        What it is now: a scheme, or ``"half"`` where it stayed in floating point.
    is_smoothed
        Whether its rows are scaled, column by column, at run time or by the layer before.
    sqnr_db
        Signal over noise of its product, in dB; None where it was not measured, or nothing is lost.
    bytes_before, bytes_after
        Of its tensors.
    reason
        Why.
    dtype
        Of the weight that stayed in floating point, such as ``"float32"``; None of one of eight bits.
    """

    name: str
    kind: Literal["int8", "int8-weights", "fp8", "half"]
    is_smoothed: bool
    sqnr_db: schema.number() | None  # type: ignore[valid-type]
    bytes_before: schema.whole(0)  # type: ignore[valid-type]
    bytes_after: schema.whole(0)  # type: ignore[valid-type]
    reason: str
    dtype: str | None = None

    @property
    def choice(self) -> str:
        """What became of it, in words."""
        kind = (self.dtype or "floating point") if self.kind == "half" else self.kind
        return f"{kind}, smoothed" if self.is_smoothed else kind


@dataclass(frozen=True)
class Measured:
    """On which cells, and to what end, layers were measured.

    Attributes
    ----------
    n_cells, n_tokens
        That were looked at.
    bar_db
        Least signal over noise of a layer.
    least_cosine, cosine
        Of the embeddings before and after: what was asked for, and the least over cells that was found.
    """

    n_cells: schema.whole(0)  # type: ignore[valid-type]
    n_tokens: schema.whole(0)  # type: ignore[valid-type]
    bar_db: schema.number()  # type: ignore[valid-type]
    least_cosine: schema.number(0, 1)  # type: ignore[valid-type]
    cosine: schema.number(-1.001, 1.001)  # type: ignore[valid-type]


@dataclass(frozen=True)
class Report:
    """What became of a model.

    Attributes
    ----------
    scheme
        Of the model.
    layers
        For which there was a choice.
    rest_before, rest_after
        Bytes of everything else.
    measured
        None where nothing was measured.
    """

    scheme: Literal["int8", "int8-weights", "fp8"]
    layers: list[Layer]
    rest_before: schema.whole(0)  # type: ignore[valid-type]
    rest_after: schema.whole(0)  # type: ignore[valid-type]
    measured: Measured | None = None

    @classmethod
    def of(
        cls,
        scheme: str,
        choices: Mapping[str, Choice],
        before: Mapping[str, int],
        after: Mapping[str, int],
        calibration: Calibration | None = None,
        *,
        dtypes: Mapping[str, str],
    ) -> Report:
        """From choices, and the sizes and dtypes of tensors.

        Parameters
        ----------
        scheme
            Of the model.
        choices
            Layer name to choice.
        before, after
            Bytes of every tensor, by the names that an encoder gives them: those of a layer begin with its name.
        calibration
            What was measured.
        dtypes
            Of weights that stayed in floating point, by the names of their layers.
        """
        sizes_before, sizes_after = (_by_layer(sizes, choices) for sizes in (before, after))
        layers = [
            Layer(
                name,
                choice.kind,  # type: ignore[arg-type]
                choice.smooth is not None,
                _finite(choice.sqnr_db),
                sizes_before.get(name, 0),
                sizes_after.get(name, 0),
                choice.reason,
                None if choice.is_quantized else dtypes[name],
            )
            for name, choice in choices.items()
        ]
        measured = None
        if calibration is not None:
            measured = Measured(**{f.name: getattr(calibration, f.name) for f in dataclasses.fields(Measured)})
        return cls(scheme, layers, sizes_before.get(REST, 0), sizes_after.get(REST, 0), measured)  # type: ignore[arg-type]

    def __repr__(self) -> str:
        size = f"{self.bytes_before / 1e6:,.1f} MB -> {self.bytes_after / 1e6:,.1f} MB"
        return f"Report({self.scheme}: {self.n_quantized} of {len(self.layers)} layers in eight bits, {size})"

    @property
    def bytes_before(self) -> int:
        """Of the whole model."""
        return self.rest_before + sum(layer.bytes_before for layer in self.layers)

    @property
    def bytes_after(self) -> int:
        """Of the whole model."""
        return self.rest_after + sum(layer.bytes_after for layer in self.layers)

    @property
    def n_quantized(self) -> int:
        """Layers that are no longer in floating point."""
        return sum(layer.kind != "half" for layer in self.layers)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        totals = {"bytes_before": self.bytes_before, "bytes_after": self.bytes_after, "n_quantized": self.n_quantized}
        return {"format": FORMAT, "format_version": FORMAT_VERSION, **dataclasses.asdict(self), "totals": totals}

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write :data:`REPORT` into a folder, whole or not at all."""
        path = Path(folder) / REPORT
        write_json(path, self.to_dict())
        return path

    @classmethod
    def read(cls, folder: str | os.PathLike[str]) -> Report:
        """What :meth:`save` wrote into a folder.

        Raises
        ------
        CheckpointError
            There is no such file, or it says something else; names the field.
        """
        path = Path(folder) / REPORT
        found = read_json(path, CheckpointError, cls)
        if found.get("format") != FORMAT or found.get("format_version") != FORMAT_VERSION:
            raise CheckpointError(
                f"{path}: format is {found.get('format')!r}, version {found.get('format_version')!r}, and this version "
                f"reads {FORMAT!r}, version {FORMAT_VERSION}; quantize the model again"
            )
        layers = [Layer(**_fields_of(Layer, entry)) for entry in found["layers"]]
        measured = found.get("measured")
        return cls(
            found["scheme"], layers, found["rest_before"], found["rest_after"],
            None if measured is None else Measured(**_fields_of(Measured, measured)),
        )  # fmt: skip

    def as_text(self) -> str:
        """The table that is printed."""
        rows = [("layer", "before", "after", "SQNR", "choice", "reason")]
        for layer in self.layers:
            sqnr = "" if layer.sqnr_db is None else f"{layer.sqnr_db:.1f} dB"
            rows.append(
                (layer.name, _size(layer.bytes_before), _size(layer.bytes_after), sqnr, layer.choice, layer.reason)
            )
        rows.append((REST, _size(self.rest_before), _size(self.rest_after), "", "", ""))
        share = self.bytes_after / self.bytes_before if self.bytes_before else 1.0
        rows.append(("in all", _size(self.bytes_before), _size(self.bytes_after), "", f"{share:.3f} of before", ""))
        return "\n".join([*columns(rows, right=(1, 2, 3)), *self._about_measuring()])

    def _about_measuring(self) -> list[str]:
        measured = self.measured
        if measured is None:
            return [
                "nothing was measured: --calibrate TOKENS does that, and leaves layers as they are that would lose much"
            ]
        return [
            f"measured on {measured.n_cells:,} cells ({measured.n_tokens:,} tokens); bar of a layer {measured.bar_db:g}"
            f" dB; least cosine of a cell's embeddings {measured.cosine:.6f}, asked for {measured.least_cosine:g}"
        ]


def columns(rows: Sequence[tuple[str, ...]], *, right: tuple[int, ...] = ()) -> list[str]:
    """Rows of text in columns; those of ``right`` end, not begin, below each other."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if i in right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _by_layer(sizes: Mapping[str, int], choices: Mapping[str, Choice]) -> dict[str, int]:
    found: dict[str, int] = {}
    for tensor, size in sizes.items():
        layer = tensor.rpartition(".")[0]
        layer = layer if layer in choices else REST
        found[layer] = found.get(layer, 0) + size
    return found


def _fields_of(kind: type, entry: Mapping[str, Any]) -> dict[str, Any]:
    """Fields that a class has: later versions may write more, and earlier ones wrote fewer."""
    return {field.name: entry[field.name] for field in dataclasses.fields(kind) if field.name in entry}


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _size(n_bytes: int) -> str:
    return f"{n_bytes / 1e6:,.2f} MB"
