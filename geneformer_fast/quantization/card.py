"""The card of a quantized model: what was done, before what the card of the model it was made from says."""

from __future__ import annotations

from pathlib import Path

from geneformer_fast.checkpoints.model_card import (
    ModelCard,
    as_code,
    body_in,
    front_matter_in,
    listed,
    name_of,
)
from geneformer_fast.quantization.report import REPORT, Report

_USE = """import geneformer_fast as gf

model = gf.load(".")  # ".": the folder of this card"""
# Of the card of the model before: what names it, which this card says itself.
_OWN = ("base_model", "base_model_relation", "library_name", "model-index", "pipeline_tag")


def quantized_card(out: Path, report: Report, base: Path | None, *, is_bert: bool) -> ModelCard:
    """What there is to say.

    Parameters
    ----------
    out
        Folder of the model.
    report
        What became of each layer.
    base
        Folder of the model before, if it came from one.
    is_bert
        Whether transformers loads it, with the package compressed-tensors.
    """
    measured = report.measured
    before, front = body_in(base), front_matter_in(base)
    about = {
        "scheme": report.scheme,
        "layers in eight bits": f"{report.n_quantized} of {len(report.layers)}",
        "size": f"{report.bytes_after / 1e6:,.1f} MB, before {report.bytes_before / 1e6:,.1f} MB",
        "measured on": None if measured is None else f"{measured.n_cells:,} cells",
        "least cosine of a cell's embeddings": None if measured is None else f"{measured.cosine:.5f}",
        "every layer": f"`{REPORT}`",
    }
    task = front.get("pipeline_tag", "").partition(":")[2].strip().strip("\"'") or None
    sections = [("Use", as_code(_USE, "python")), ("What was done", listed(about))]
    if before:
        sections.append(("The model before", "\n".join(_deeper(before.splitlines()))))
    named = "A model that was in memory" if base is None else name_of(base)
    return ModelCard(
        title=name_of(out),
        lead=f"{named} with weights of eight bits ({report.scheme}).",
        sections=sections,
        base=base,
        relation="quantized",
        library="transformers" if is_bert else "geneformer-fast",
        task=task,
        kept={key: text for key, text in front.items() if key not in _OWN},
    )


def _deeper(lines: list[str]) -> list[str]:
    """Headings two levels further down, those in blocks of code aside."""
    found, is_code = [], False
    for line in lines:
        is_code ^= line.lstrip().startswith("```")
        is_heading = not is_code and line.startswith("#")
        found.append(f"##{line}" if is_heading else line)
    return found
