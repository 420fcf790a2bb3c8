"""The report of a quantized model: what it holds, prints and refuses."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from geneformer_fast.errors import CheckpointError
from geneformer_fast.quantization.choices import Choice
from geneformer_fast.quantization.report import REPORT, Report

CHOICES = {
    "blocks.0.qkv": Choice("int8", None, 40.25, "above the bar"),
    "blocks.0.out": Choice("int8", torch.ones(4), 38.0, "smoothed within the layer before: 12.0 dB without"),
    "blocks.0.up": Choice("half", None, 9.0, "below the bar of 30 dB"),
    "embeddings.token": Choice("int8-weights", None, math.inf, "above the bar"),
}
BEFORE = {
    "blocks.0.qkv.weight": 4000, "blocks.0.qkv.bias": 40, "blocks.0.out.weight": 1600, "blocks.0.up.weight": 2000,
    "embeddings.token.weight": 8000, "embeddings.token_type.weight": 80, "blocks.0.ff_norm.weight": 20,
}  # fmt: skip
AFTER = {
    "blocks.0.qkv.weight_q": 1000, "blocks.0.qkv.weight_scale": 4, "blocks.0.qkv.bias": 40,
    "blocks.0.out.weight_q": 400, "blocks.0.up.weight": 1000, "embeddings.token.weight_q": 2000,
    "embeddings.token.weight_scale": 80, "embeddings.token_type.weight": 80, "blocks.0.ff_norm.weight": 20,
}  # fmt: skip


class Measuring:
    """What a calibration says of itself."""

    n_cells, n_tokens, bar_db, least_cosine, cosine = 256, 1234567, 30.0, 0.9995, 0.99981


def report(calibration: Any = Measuring) -> Report:
    return Report.of("int8", CHOICES, BEFORE, AFTER, calibration, dtypes={"blocks.0.up": "bfloat16"})


def test_bytes_of_tensors_are_those_of_their_layers() -> None:
    made = report()
    sizes = {layer.name: (layer.bytes_before, layer.bytes_after) for layer in made.layers}
    assert sizes == {
        "blocks.0.qkv": (4040, 1044), "blocks.0.out": (1600, 400), "blocks.0.up": (2000, 1000),
        "embeddings.token": (8000, 2080),
    }  # fmt: skip
    assert (made.rest_before, made.rest_after) == (100, 100)
    assert (made.bytes_before, made.bytes_after) == (sum(BEFORE.values()), sum(AFTER.values()))
    assert made.n_quantized == 3


@pytest.mark.parametrize("calibration", [Measuring, None])
def test_what_is_written_is_read_again(tmp_path: Path, calibration: Any) -> None:
    made = report(calibration)
    assert made.save(tmp_path) == tmp_path / REPORT
    assert Report.read(tmp_path) == made
    written = json.loads((tmp_path / REPORT).read_text())
    assert written["totals"] == {"bytes_before": 15740, "bytes_after": 4624, "n_quantized": 3}
    assert written["layers"][3]["sqnr_db"] is None  # nothing was lost, and JSON has no infinity


def test_the_table_lists_every_layer_with_its_numbers_and_reason() -> None:
    lines = report().as_text().splitlines()
    assert len(lines) == 1 + len(CHOICES) + 3
    for line, (name, choice) in zip(lines[1:], CHOICES.items(), strict=False):
        assert line.startswith(name)
        assert choice.reason in line
    assert "38.0 dB  int8, smoothed" in lines[2]
    # What a layer is in that stayed as it was; nothing says that this is half of something.
    assert "9.0 dB  bfloat16 " in lines[3]
    assert "half" not in report().as_text()
    assert "0.294 of before" in lines[-2]
    assert "256 cells (1,234,567 tokens)" in lines[-1]
    assert "0.999810" in lines[-1]
    assert "--calibrate TOKENS" in report(None).as_text().splitlines()[-1]


def changed(path: tuple[str | int, ...], value: Any) -> dict[str, Any]:
    content = report().to_dict()
    place: Any = content
    for key in path[:-1]:
        place = place[key]
    if value is None:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    return json.loads(json.dumps(content))


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        (("format",), "something", "format is 'something'"),
        (("format_version",), 7, "version 7"),
        (("scheme",), "int4", 'scheme is "int4"'),
        (("layers",), "none", "layers is"),
        (("layers", 1, "kind"), "int3", "layers.1.kind"),
        (("layers", 0, "bytes_after"), -1, "layers.0.bytes_after"),
        (("layers", 0, "sqnr_db"), "loud", "layers.0.sqnr_db"),
        (("layers", 2, "reason"), None, "layers.2.reason is missing"),
        (("measured", "cosine"), 3.0, "measured.cosine"),
        (("rest_before",), None, "rest_before is missing"),
    ],
)
def test_a_report_that_says_something_else_is_refused_by_field(
    tmp_path: Path, path: tuple[str | int, ...], value: Any, said: str
) -> None:
    (tmp_path / REPORT).write_text(json.dumps(changed(path, value)))
    with pytest.raises(CheckpointError) as caught:
        Report.read(tmp_path)
    assert str(tmp_path / REPORT) in str(caught.value)
    assert said in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": NaN}', None])
def test_a_report_that_is_no_json_or_absent_is_refused(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / REPORT).write_text(text)
    with pytest.raises(CheckpointError, match=r"quantization\.json"):
        Report.read(tmp_path)


def test_a_report_of_an_earlier_version_names_no_dtype(tmp_path: Path) -> None:
    content = report().to_dict()
    for layer in content["layers"]:
        del layer["dtype"]
    (tmp_path / REPORT).write_text(json.dumps(content))
    assert "9.0 dB  floating point " in Report.read(tmp_path).as_text()


def test_fields_of_later_versions_are_left_aside(tmp_path: Path) -> None:
    content = report().to_dict()
    content["layers"][0]["colour"] = "red"
    content["more"] = content["measured"]["more"] = 1
    (tmp_path / REPORT).write_text(json.dumps(content))
    assert Report.read(tmp_path) == report()
