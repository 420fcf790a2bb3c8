"""What a quantized model's card says, before what the model it was made from says of itself."""

from __future__ import annotations

from pathlib import Path

import pytest
import toys

import geneformer_fast as gf
from geneformer_fast.quantization.report import Report

BEFORE = """---
license: apache-2.0
tags:
- single-cell
library_name: something
pipeline_tag: fill-mask
base_model: older
---

# The old one

## Data

```python
# no heading
```
"""


def test_the_card_before_is_kept_below(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = pytest.importorskip("huggingface_hub")
    folder = gf.save(toys.encoder(), tmp_path / "model")
    (folder / "README.md").write_text(BEFORE)
    out = gf.quantize(folder, tmp_path / "small")
    text = (out / "README.md").read_text()
    card = hub.ModelCard(text).data.to_dict()
    assert card["license"] == "apache-2.0"
    assert not {"base_model", "base_model_relation"} & set(card), "neither the folder's name nor the older one"
    assert (card["library_name"], card["pipeline_tag"], card["tags"]) == ("transformers", "fill-mask", ["single-cell"])
    report = Report.read(out)
    size = f"size: {report.bytes_after / 1e6:,.1f} MB, before {report.bytes_before / 1e6:,.1f} MB"
    for words in (
        "model with weights of eight bits (int8).", f"{report.n_quantized} of {len(report.layers)}", size,
        "\n## The model before\n\n### The old one\n\n#### Data\n\n```python\n# no heading\n```\n",
    ):  # fmt: skip
        assert words in text
    assert str(tmp_path) not in text
    ran: dict[str, object] = {}
    monkeypatch.chdir(out)
    exec(text.partition("```python\n")[2].partition("```")[0], ran)
    assert isinstance(ran["model"], gf.Encoder)


def test_models_in_memory_and_measured_ones_have_cards_too(tmp_path: Path) -> None:
    adata = toys.cells(12)
    words = toys.vocabulary()
    tokens = gf.tokenize(adata, tmp_path / "tokens", dictionary=words, progress=False)
    out = gf.quantize(toys.encoder(), tmp_path / "small", calibrate=tokens, max_cells=12)
    text = (out / "README.md").read_text()
    assert "A model that was in memory with weights of eight bits" in text
    assert "measured on: 12 cells" in text
    assert "To be named by whoever publishes this model" in text
