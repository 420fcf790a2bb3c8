"""A model folder becomes one of weights of eight bits, some rows at a time: no model is built, no tensor read whole."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from geneformer_fast import families
from geneformer_fast.checkpoints import hf, load, native, quantized
from geneformer_fast.checkpoints.mapping import to_ours
from geneformer_fast.checkpoints.quantized import SCALE, SMOOTH, TIED_DECODER, WEIGHT, beside
from geneformer_fast.checkpoints.stored import Stored, stored_tensors
from geneformer_fast.checkpoints.tied import sort_leftovers
from geneformer_fast.checkpoints.transformer_engine import is_transformer_engine
from geneformer_fast.checkpoints.weights import (
    CONFIG,
    FILES,
    WEIGHTS,
    check_floats,
    settings_text,
    warn_of_changes,
    write_around,
)
from geneformer_fast.encoder import Encoder
from geneformer_fast.errors import CheckpointError, UnsupportedError
from geneformer_fast.files.checksums import SUMS, is_verifying
from geneformer_fast.files.locks import file_lock
from geneformer_fast.files.streaming import TensorWriter, pieces
from geneformer_fast.files.writing import followed, whole_folder
from geneformer_fast.layers import EightBits
from geneformer_fast.quantization.build import all_choices, hollow, layers_of, quantized_weight, row_factors
from geneformer_fast.quantization.card import quantized_card
from geneformer_fast.quantization.choices import Choice
from geneformer_fast.quantization.places import check_out, others_in
from geneformer_fast.quantization.report import Report

if TYPE_CHECKING:
    from geneformer_fast.quantization.calibrate import Calibration


def quantize_folder(
    folder: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    scheme: str = "int8",
    choices: Mapping[str, Choice] | None = None,
    calibration: Calibration | None = None,
    keep_embeddings: bool = False,
    overwrite: bool = False,
    verify: bool | None = None,
) -> Report:
    """Write a folder of weights of eight bits for one in floating point.

    At no time is more in memory than a few megabytes of one tensor, and its scales. What else lies in the folder
    (labels, tasks, vocabulary) is copied; a model that is there already is replaced when the new one is whole.

    Parameters
    ----------
    folder
        Of a model, in any of the layouts that :func:`geneformer_fast.load` reads.
    out
        Where the new one goes.
    scheme, choices, keep_embeddings
        As in :func:`geneformer_fast.quantize`.
    calibration
        What was measured, for the report; its choices are taken where ``choices`` are None.
    overwrite
        Whether ``out`` may hold a model.
    verify
        As in :func:`geneformer_fast.load`.

    Returns
    -------
    Report
        What became of each layer; it is in the folder too.

    Raises
    ------
    CheckpointError
        The model is quantized already, its files are damaged, or a weight holds NaN or infinity.
    OutputError
        ``out`` holds something, or lies where the model is.
    UnsupportedError
        There is no such scheme, or no layer of a choice.
    """
    folder, out = Path(folder), followed(Path(out))
    settings = refuse_quantized(folder)
    check_out(out, folder, overwrite=overwrite)
    choices = calibration.choices if choices is None and calibration is not None else choices
    with stored_tensors(folder, verify=verify) as stored, alone_in(out, folder, overwrite=overwrite):
        conversion = Conversion(folder, settings, stored)
        if is_verifying(verify):
            warn_of_changes(folder, conversion.encoder.config, settings)
        chosen = all_choices(conversion.encoder, scheme, choices, keep_embeddings=keep_embeddings)
        with whole_folder(out) as made:
            written = conversion.write(made / WEIGHTS, chosen)
            said = settings_text(written, out)
            write_around(conversion.encoder.config, written, made / WEIGHTS, made / CONFIG, made / SUMS, said=said)
            for path in others_in(folder):
                shutil.copyfile(path, made / path.name)
            shown = conversion.of_weights(chosen) if calibration is None else chosen
            sizes, dtypes = (conversion.before, conversion.after), dtypes_of(conversion.encoder)
            report = Report.of(scheme, shown, *sizes, calibration, dtypes=dtypes)
            report.save(made)
            quantized_card(out, report, folder, is_bert=hf.is_bert(conversion.encoder)).save(made)
    return report


def refuse_quantized(folder: Path) -> dict[str, Any]:
    """The config.json of a model in floating point.

    Raises
    ------
    CheckpointError
        It is quantized already.
    """
    settings = hf.read_settings(folder)
    said = settings.get(quantized.KEY)
    if said is not None:
        method = said.get("quant_method") if isinstance(said, dict) else said
        raise CheckpointError(
            f"{folder} is quantized already (quant_method {method!r}); give the model it was made from"
        )
    return settings


def refuse_float64(encoder: Encoder, folder: Path | None) -> None:
    """See that an encoder, of a folder perhaps, does not compute in float64.

    Raises
    ------
    UnsupportedError
        It does.
    """
    if encoder.dtype != torch.float64:
        return
    if folder is None:
        raise UnsupportedError('this model computes in float64; cast("float32") it before it is quantized')
    raise UnsupportedError(
        f"{folder} holds float64; save it in float32 and quantize that: geneformer_fast.save("
        'geneformer_fast.load(MODEL, dtype="float32"), DIR)'
    )


def has_own_format(folder: Path) -> bool:
    """Whether a model is read whole: by its family in its own way, or as BERT under Transformer Engine's names."""
    found = families.recognise(folder)
    if found is not None and found.load is not None:
        return True
    if not (folder / CONFIG).is_file() or not any((folder / name).exists() for name in FILES):
        return False
    with stored_tensors(folder, verify=False) as stored:
        return is_transformer_engine(stored)


def without_numbers(folder: Path) -> Encoder:
    """The encoder of a folder in floating point, on the meta device; only headers of its files are read.

    One of another format than BERT's or ours is loaded.
    """
    if has_own_format(folder):
        return load(folder, device="cpu")
    settings = refuse_quantized(folder)
    with stored_tensors(folder, verify=False) as stored:
        return Conversion(folder, settings, stored).encoder


@contextlib.contextmanager
def alone_in(out: Path, folder: Path | None, *, overwrite: bool) -> Iterator[None]:
    """Nobody else writes the folder meanwhile, nor has since :func:`check_out`, which is called again.

    Raises
    ------
    OutputError
        As there, or another process is writing it.
    """
    with file_lock(out):
        check_out(out, folder, overwrite=overwrite)
        yield


class Conversion:
    """A folder in floating point on its way to one of eight bits.

    Parameters
    ----------
    folder, settings
        The folder, and its config.json.
    stored
        Its tensors.

    Attributes
    ----------
    encoder
        Without numbers.
    before, after
        Bytes of every tensor of the encoder, by its name.
    """

    def __init__(self, folder: Path, settings: dict[str, Any], stored: Stored) -> None:
        check_floats(stored, folder)
        self._home = native if settings.get("model_type") == native.MODEL_TYPE else hf
        self.folder, self.stored = folder, stored
        self.encoder, self._table = self._home.opened(settings, stored, folder)
        shapes = {name: tensor.shape for name, tensor in self.encoder.state_dict().items()}
        self.encoder.load_state_dict(to_ours(stored, self._table, shapes, source=str(folder)), assign=True)
        refuse_float64(self.encoder, folder)
        if self._home is hf:
            used = {name for entry in self._table for name in entry.theirs}
            sort_leftovers(stored, used, self.encoder, folder, stored.read)
        self.before = self.after = bytes_of(self.encoder)
        # Energy of each layer's weight, and of what rounding leaves out of it.
        self._energy: dict[str, torch.Tensor] = {}

    def write(self, path: Path, choices: Mapping[str, Choice]) -> dict[str, Any]:
        """Write the weights, and say what config.json says of them."""
        factors = row_factors(self.encoder, choices)
        hollow(self.encoder, choices)
        self.after = bytes_of(self.encoder)
        settings, described = self._home.as_saved(self.encoder)
        with TensorWriter(path, described, self._home.METADATA) as writer:
            for entry in self._table:
                layer, _, kind = entry.ours.rpartition(".")
                start = 0
                for name in entry.theirs:
                    n_rows = len(self.stored[name])
                    factor = factors[layer][start : start + n_rows] if layer in factors else None
                    start += n_rows
                    if kind == WEIGHT and isinstance(self.encoder.get_submodule(layer), EightBits):
                        self._quantize(name, layer, choices[layer], factor, described, writer)
                    else:
                        self._copy(name, factor, described, writer)
            for name in set(described) & set(self.stored) - {each for entry in self._table for each in entry.theirs}:
                self._copy(name, None, described, writer)
        return settings

    def _quantize(
        self,
        name: str,
        layer: str,
        choice: Choice,
        factor: torch.Tensor | None,
        described: Mapping[str, torch.Tensor],
        writer: TensorWriter,
    ) -> None:
        """A weight, and its scales: all of them, since whole rows are rounded."""
        smooth = None if choice.smooth is None else choice.smooth.float().cpu()
        scales = []
        for start, stop in pieces(self.stored[name]):
            rows = self.stored.read(name, start, stop).float()
            rows = rows if smooth is None else rows / smooth
            q, scale = quantized_weight(rows, described[name].dtype, f"{self.folder}: tensor {name!r}")
            self._note(layer, rows, q, scale)
            writer.write(name, q, start)
            scales.append(scale)
        scale = torch.cat(scales)[:, None]
        scale = scale if factor is None else scale * factor[:, None]
        writer.write(beside(name, SCALE), scale)
        if layer == "embeddings.token" and self._home is hf and quantized.is_tied(self.encoder):
            writer.write(f"{TIED_DECODER}.{SCALE}", scale)
        if smooth is not None and beside(name, SMOOTH) in described:
            writer.write(beside(name, SMOOTH), smooth)

    def _copy(
        self, name: str, factor: torch.Tensor | None, described: Mapping[str, torch.Tensor], writer: TensorWriter
    ) -> None:
        for start, stop in pieces(self.stored[name]):
            rows = self.stored.read(name, start, stop)
            if rows.is_floating_point() and not bool(rows.isfinite().all()):
                raise CheckpointError(f"{self.folder}: tensor {name!r} holds NaN or infinity; no model can use that")
            if factor is not None:
                rows = rows.float() * factor[start:stop].reshape(-1, *[1] * (rows.ndim - 1))
            writer.write(name, rows.to(described[name].dtype), start)

    def _note(self, layer: str, rows: torch.Tensor, q: torch.Tensor, scale: torch.Tensor) -> None:
        lost = rows - q.float() * scale[:, None]
        energy = torch.stack([each.square().sum(dtype=torch.float64) for each in (rows, lost)])
        self._energy[layer] = self._energy.get(layer, 0) + energy

    def of_weights(self, choices: Mapping[str, Choice]) -> dict[str, Choice]:
        """Choices with the signal over noise of the weight itself, for want of anything better."""
        found = dict(choices)
        for layer, (whole, lost) in ((layer, energy.tolist()) for layer, energy in self._energy.items()):
            decibels = 10 * math.log10(whole / lost) if whole > 0 and lost > 0 else None
            found[layer] = dataclasses.replace(choices[layer], sqnr_db=decibels)
        return found


def bytes_of(encoder: Encoder) -> dict[str, int]:
    """Of every tensor, by its name."""
    return {name: tensor.numel() * tensor.itemsize for name, tensor in encoder.state_dict().items()}


def dtypes_of(encoder: Encoder) -> dict[str, str]:
    """Of the weights of layers in floating point, by the names of the layers, as they are in the encoder's folder."""
    home = hf if hf.is_bert(encoder) else native
    _, tensors = home.as_saved(encoder)
    stored = {entry.ours.removesuffix(f".{WEIGHT}"): entry.theirs[0] for entry in home.table_of(encoder)}
    return {
        name: str(tensors[stored[name]].dtype).removeprefix("torch.")
        for name, layer in layers_of(encoder).items()
        if not isinstance(layer, EightBits)
    }
