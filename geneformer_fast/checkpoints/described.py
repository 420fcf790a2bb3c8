"""What ``config.json`` says of weights of eight bits, in the convention of compressed-tensors.

``quantization_config`` has groups of layers, each with what its weights and its input are rounded to, and a list of
layers that are in no group. A layer is named by its class (``Linear``), by itself, or by a regular expression
(``re:...``). transformers loads such a folder with the package compressed-tensors; what that package cannot do, such as
smoothing where a LayerNorm's output is read, has a format of our own in its group, which it refuses.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from geneformer_fast.errors import CheckpointError
from geneformer_fast.files import schema

KEY, METHOD = "quantization_config", "compressed-tensors"
#: ``format`` of a group in which rows are smoothed when they are read.
SMOOTHED = "geneformer-fast-smoothed"
LINEAR, TABLE = "Linear", "Embedding"
_FORMATS = {"int8": "int-quantized", "int8-weights": "int-quantized", "fp8": "float-quantized"}
_NUMBERS = {"int8": "int", "int8-weights": "int", "fp8": "float"}
# With what is in place of an encoder's own head, whoever loads the folder has fresh weights there, and not of 8 bits.
_HEADS = ("pooler.dense", "classifier", "cls.predictions.transform.dense", "cls.predictions.decoder")
_AGAIN = "take the model before it was quantized, and quantize it with geneformer-fast quantize MODEL --out DIR"


@dataclass
class Rounding:
    """What is read of how weights or activations are rounded."""

    num_bits: int = 8
    type: str = "int"
    symmetric: bool = True
    strategy: str | None = None
    dynamic: bool | str = False


@dataclass
class Group:
    """What is read of a group of layers."""

    targets: list[str]
    weights: Rounding | None = None
    input_activations: Rounding | None = None
    output_activations: Rounding | None = None
    format: str | None = None


@dataclass
class Settings:
    """What is read of ``quantization_config``."""

    config_groups: dict[str, Group]
    ignore: list[str] | None = None
    format: str | None = None


@dataclass(frozen=True)
class Kinds:
    """Which layers have weights of eight bits.

    Attributes
    ----------
    targets
        Names, expressions and classes in the order they were given, each with a scheme.
    ignore
        Names, expressions and classes of layers that have not.
    smoothed
        Those of ``targets`` whose layers have a factor for their input.
    """

    targets: tuple[tuple[str, str], ...]
    ignore: tuple[str, ...] = ()
    smoothed: frozenset[str] = frozenset()

    def kind_of(self, module: str, kind: str) -> str | None:
        """The scheme of a layer, by its name and class (``Linear`` or ``Embedding``); None where it has none.

        A name counts more than an expression, and that more than a class.
        """
        return self._of(module, kind)[1]

    def is_smoothed(self, module: str, kind: str) -> bool:
        """Whether a layer, by its name and class, has a factor for its input."""
        return self._of(module, kind)[0] in self.smoothed

    def _of(self, module: str, kind: str) -> tuple[str | None, str | None]:
        """The target that a layer is in, and its scheme."""
        if any(_fits(pattern, module, kind) for pattern in self.ignore):
            return None, None
        ranked = sorted(self.targets, key=lambda target: (target[0] == kind, target[0].startswith("re:")))
        return next((target for target in ranked if _fits(target[0], module, kind)), (None, None))


def _fits(pattern: str, module: str, kind: str) -> bool:
    if pattern.startswith("re:"):
        return re.match(pattern.removeprefix("re:"), module) is not None
    return pattern in (module, kind)


def kinds_in(settings: Mapping[str, Any], where: Path) -> Kinds:
    """Read ``quantization_config`` of compressed-tensors.

    Parameters
    ----------
    settings
        Content of config.json.
    where
        Its path.

    Raises
    ------
    CheckpointError
        Weights are rounded to something else than eight bits with a scale per channel, or activations otherwise than
        row by row as they come.
    """
    said = settings[KEY]
    schema.check(Settings, said, f"{where}: {KEY}", CheckpointError)
    if transformed := next((key for key in ("transform_config", "kv_cache_scheme") if said.get(key)), None):
        raise CheckpointError(f"{where}: {KEY} has a {transformed}, which is not supported; {_AGAIN}")
    if (said.get("sparsity_config") or {}).get("format", "dense") != "dense":
        raise CheckpointError(f"{where}: the weights are sparse, which is not supported; {_AGAIN}")
    targets, smoothed = [], set()
    for name, group in said["config_groups"].items():
        scheme = _scheme_of(group, said.get("format"), f"{where}: {KEY}: {name}")
        if scheme is not None:
            targets += [(target, scheme) for target in group["targets"]]
            smoothed |= set(group["targets"]) if (group.get("format") or said.get("format")) == SMOOTHED else set()
    kinds = Kinds(tuple(targets), tuple(said.get("ignore") or ()), frozenset(smoothed))
    for pattern in (*(target for target, _ in kinds.targets), *kinds.ignore):
        try:
            _fits(pattern, "", "")
        except re.error as reason:
            raise CheckpointError(f"{where}: {KEY}: {pattern!r} is no regular expression ({reason})") from None
    return kinds


def schemes_in(settings: Mapping[str, Any]) -> dict[str, str] | None:
    """Target to scheme, as config.json says it; None where it says nothing in the convention of compressed-tensors."""
    said = settings.get(KEY)
    if not isinstance(said, dict) or said.get("quant_method") != METHOD:
        return None
    return dict(kinds_in(settings, Path(KEY)).targets)


def _scheme_of(group: Mapping[str, Any], default: str | None, where: str) -> str | None:
    """The scheme of a group; None where its weights are as they were."""
    if group.get("output_activations"):
        raise CheckpointError(f"{where}: rounded outputs are not supported; {_AGAIN}")
    if not group.get("weights"):
        return None
    weights: dict[str, Any] = {**vars(Rounding()), **group["weights"]}
    rows: dict[str, Any] | None = None
    if group.get("input_activations"):
        rows = {**vars(Rounding()), **group["input_activations"]}
    form = group.get("format") or default
    known = {*_FORMATS.values(), SMOOTHED, "naive-quantized"}
    has_scales = weights["strategy"] == "channel" and weights["symmetric"] and not weights["dynamic"]
    is_read = rows is None or (rows["strategy"] == "token" and rows["symmetric"] and rows["dynamic"] is True)
    schemes = {("int", None): "int8-weights", ("int", "int"): "int8", ("float", "float"): "fp8"}
    scheme = schemes.get((weights["type"], None if rows is None else rows["type"]))
    bits = {each["num_bits"] for each in (weights, rows) if each}
    if form not in known or not has_scales or not is_read or scheme is None or bits != {8}:
        told = f"{weights['num_bits']}-bit {weights['type']} per {weights['strategy']}, format {form}"
        if rows is not None:
            told += f", input {rows['num_bits']}-bit {rows['type']} per {rows['strategy']}"
        raise CheckpointError(
            f"{where}: weights are {told}; read are int8 and float8 weights with a symmetric scale per channel, and an "
            f"input that is rounded per token as it comes, or int8 weights alone; {_AGAIN}"
        )
    return scheme


def refuse_others(settings: Mapping[str, Any], where: Path) -> None:
    """Refuse weights that were quantized in a way that nothing here reads.

    Raises
    ------
    CheckpointError
        Naming the method, and what to do.
    """
    said = settings[KEY]
    method = said.get("quant_method") if isinstance(said, dict) else None
    if isinstance(said, dict) and (said.get("load_in_8bit") or said.get("load_in_4bit")):
        method = "bitsandbytes"
    if method == "bitsandbytes":
        raise CheckpointError(
            f"{where}: the weights are quantized by bitsandbytes, in a layout that only it can read; {_AGAIN}"
        )
    if method not in (METHOD, "torchao"):
        raise CheckpointError(f"{where}: the weights are quantized (quant_method {method!r}); {_AGAIN}")


def config_of(
    linears: Mapping[str, str | None],
    tables: Mapping[str, str | None],
    *,
    smoothed: Iterable[str] = (),
    prefix: str | None = None,
) -> dict[str, Any]:
    """What ``quantization_config`` is to say.

    Parameters
    ----------
    linears, tables
        Name in the checkpoint to scheme, or None for a layer in floating point; tables are int8 in any scheme.
    smoothed
        Names of linear layers that have a factor for their input.
    prefix
        ``"bert."`` or empty in folders of BERT, where others may load the encoder with or without it; None elsewhere.
    """
    smoothed, groups = set(smoothed), {}
    counts = Counter(kind for name, kind in linears.items() if kind and name not in smoothed)
    main = counts.most_common(1)[0][0] if counts else None
    for kind in sorted({kind for kind in linears.values() if kind}):
        for is_smoothed in (False, True):
            names = [name for name, each in linears.items() if each == kind and (name in smoothed) == is_smoothed]
            if names:
                is_main = kind == main and not is_smoothed
                targets = [LINEAR] if is_main else [_pattern(name, prefix) for name in names]
                form = SMOOTHED if is_smoothed else _FORMATS[kind]
                groups[f"{kind}-smoothed" if is_smoothed else kind] = _group(targets, kind, form)
    if any(tables.values()):
        groups["tables"] = _group([TABLE], "int8-weights", _FORMATS["int8-weights"])
    kept = [name for each in (linears, tables) for name, kind in each.items() if kind is None]
    others = [] if prefix is None else [name for name in _HEADS if _bare(name) not in map(_bare, (*linears, *tables))]
    formats = {group["format"] for group in groups.values()}
    return {
        "quant_method": METHOD,
        "quantization_status": "compressed",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "config_groups": groups,
        "ignore": [_pattern(name, prefix) for name in (*kept, *others)],
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def _group(targets: Sequence[str], kind: str, form: str) -> dict[str, Any]:
    weights = {"num_bits": 8, "type": _NUMBERS[kind], "symmetric": True, "strategy": "channel", "dynamic": False}
    rows = None if kind == "int8-weights" else {**weights, "strategy": "token", "dynamic": True}
    return {
        "targets": list(targets),
        "weights": weights,
        "input_activations": rows,
        "output_activations": None,
        # The package guesses one where it is not said: for weights alone that would be four bits in a word.
        "format": form,
    }


def _bare(name: str) -> str:
    return name.removeprefix("bert.")


def _pattern(name: str, prefix: str | None) -> str:
    """How a layer is named, so that it is found with and without the prefix of BertFor... models."""
    is_within = prefix is not None and (
        name.startswith("bert.") or name.startswith(("encoder.", "embeddings.", "pooler."))
    )
    return f"re:(?:bert\\.)?{re.escape(_bare(name))}$" if is_within else name
