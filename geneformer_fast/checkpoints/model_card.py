"""Model cards: ``README.md`` beside a model, as the Hugging Face Hub shows it, with what is known of its making.

At its top stands front matter, YAML between two lines of dashes. What is written here is JSON, which YAML is; what is
kept of another card stays as it was written, so that nothing has to understand it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from geneformer_fast import __version__
from geneformer_fast.files.writing import whole_file

#: What the Hub shows.
CARD = "README.md"
TAGS = ("single-cell", "transcriptomics", "geneformer-fast")
_DASHES = "---"
# Where a run puts its model.
_FINAL = "final"
# Where the Hub's client puts models: ``models--owner--name/snapshots/REVISION``.
_OF_HUB, _SNAPSHOTS = "models--", "snapshots"
_KEY = re.compile(r"([A-Za-z_][\w-]*):")


@dataclass(frozen=True)
class Score:
    """A number that says how good a model is.

    Attributes
    ----------
    task, name
        What it does, in the Hub's terms (``"text-classification"``), and in words.
    data
        On which it was measured.
    metrics
        In the Hub's terms -> value.
    """

    task: str
    name: str
    data: str
    metrics: Mapping[str, float]


@dataclass(frozen=True)
class ModelCard:
    """A card.

    Attributes
    ----------
    title
        Name of the model.
    lead
        What it is, in a sentence or two.
    sections
        Heading and Markdown, in order.
    base
        Folder of the model that it was made from; None for one that was trained from nothing. The Hub is told of one
        that was downloaded from there.
    relation
        ``"finetune"``, ``"adapter"`` or ``"quantized"``, with ``base``.
    library, task
        In the Hub's terms: what loads the model, and what it does.
    family
        Of models (:mod:`geneformer_fast.families`), if it is of one.
    scores
        For the Hub to list.
    kept
        Front matter of another card that stays, key by key as it was written.
    """

    title: str
    lead: str
    sections: Sequence[tuple[str, str]]
    base: Path | None = None
    relation: str = "finetune"
    library: str = "transformers"
    task: str | None = None
    family: str | None = None
    scores: Sequence[Score] = ()
    kept: Mapping[str, str] = field(default_factory=dict)

    def text(self) -> str:
        """The file."""
        parts = [f"# {self.title}", self.lead]
        for heading, text in (*self.sections, ("Licence", self._licence())):
            parts += [f"## {heading}", text]
        parts.append(f"Made by geneformer-fast {__version__}.")
        return f"{_DASHES}\n{self._front()}{_DASHES}\n\n" + "\n\n".join(parts) + "\n"

    def save(self, folder: Path) -> Path:
        """Write :data:`CARD` into a folder, whole or not at all."""
        path = folder / CARD
        with whole_file(path) as temporary:
            temporary.write_text(self.text(), encoding="utf-8")
        return path

    def _front(self) -> str:
        blocks = {**licence_in(self.base), **self.kept}
        values: dict[str, Any] = {"library_name": self.library, "tags": [*TAGS, *filter(None, [self.family])]}
        if "tags" in blocks:
            del values["tags"]
        if self.task is not None:
            values["pipeline_tag"] = self.task
        # The Hub links to what stands here, so that the name of a folder would be somebody else's model, or none.
        if (on_hub := hub_id_of(self.base)) is not None:
            values |= {"base_model": on_hub, "base_model_relation": self.relation}
        if self.scores:
            values["model-index"] = [{"name": self.title, "results": list(map(_result, self.scores))}]
        blocks |= {key: f"{key}: {json.dumps(value, ensure_ascii=False)}\n" for key, value in values.items()}
        return "".join(blocks.values())

    def _licence(self) -> str:
        said = {**licence_in(self.base), **self.kept}.get("license")
        value = None if said is None else said.partition(":")[2].strip().strip("\"'")
        if self.base is None:
            return "To be named by whoever publishes this model, beside that of the data it was trained on."
        if not value:
            return (
                f"The card of {name_of(self.base)}, from which this model was made, names none: look for it before "
                "this model is passed on."
            )
        return f"As of {name_of(self.base)}, from which this model was made: {value}."


def name_of(folder: Path) -> str:
    """What a model is called: as its folder, or that of the run whose ``final`` it is, or as the Hub calls it."""
    path = folder.absolute()
    if path.parent.name == _SNAPSHOTS and (on_hub := hub_id_of(path)) is not None:
        return on_hub
    return path.parent.name if path.name == _FINAL else path.name


def hub_id_of(folder: Path | None) -> str | None:
    """``owner/name`` of a model in the folders that the Hub's client downloads to; None of any other."""
    path = Path() if folder is None else folder.absolute()
    for place in (path, *path.parents):
        found = place.parent.parent.name
        if place.parent.name == _SNAPSHOTS and found.startswith(_OF_HUB):
            return found.removeprefix(_OF_HUB).replace("--", "/")
    return None


def licence_in(folder: Path | None) -> dict[str, str]:
    """The front matter about the licence in a folder's card, as it was written; empty where there is none."""
    found = front_matter_in(folder)
    return {key: found[key] for key in ("license", "license_name", "license_link") if key in found}


def front_matter_in(folder: Path | None) -> dict[str, str]:
    """Front matter of a folder's card: key -> its lines."""
    lines, _ = _split(folder)
    blocks: dict[str, str] = {}
    key = None
    for line in lines:
        if match := _KEY.match(line):
            key = match[1]
            blocks[key] = ""
        if key is not None:
            blocks[key] += f"{line}\n"
    return blocks


def body_in(folder: Path | None) -> str:
    """A folder's card without its front matter; empty where there is none."""
    return _split(folder)[1]


def _split(folder: Path | None) -> tuple[list[str], str]:
    try:
        text = "" if folder is None else (folder / CARD).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return [], ""
    lines = text.splitlines()
    if lines[:1] != [_DASHES] or _DASHES not in lines[1:]:
        return [], text.strip()
    end = lines.index(_DASHES, 1)
    return lines[1:end], "\n".join(lines[end + 1 :]).strip()


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown; all columns but the first are numbers."""
    ruler = ["---", *["---:"] * (len(header) - 1)]
    cells = [[text.replace("|", "\\|").replace("\n", " ") for text in row] for row in (header, ruler, *rows)]
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def listed(items: Mapping[str, Any]) -> str:
    """A list in Markdown, without what is None."""
    return "\n".join(f"- {name}: {value}" for name, value in items.items() if value is not None)


def as_code(content: Any, language: str = "json") -> str:
    """A block of code in Markdown."""
    text = content if isinstance(content, str) else json.dumps(content, indent=1, ensure_ascii=False)
    return f"```{language}\n{text.strip()}\n```"


def _result(score: Score) -> dict[str, Any]:
    return {
        "task": {"type": score.task, "name": score.name},
        # Readers take results of one task and data set for one, but for its config.
        "dataset": {"type": "tokens", "name": score.data, "config": score.name},
        "metrics": [{"type": kind, "value": round(value, 5)} for kind, value in score.metrics.items()],
    }
