"""What Geneformer's own classifier leaves beside a model: the names of its classes.

It saves ``PREFIX_id_class_dict.pkl`` in its output folder, and models below that, in
``DATE_geneformer_cellClassifier_PREFIX/ksplit1`` and in ``checkpoint-N`` there; their config.json says ``LABEL_0`` and
on.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from geneformer_fast.errors import CheckpointError, VocabularyError
from geneformer_fast.tokenization.pickles import read_pickle

SUFFIX = "_id_class_dict.pkl"
# ksplit1/checkpoint-125, ksplit1, the run, the output folder.
_LEVELS = 4
_UNNAMED = re.compile(r"LABEL_\d+$")


def classes_of(folder: Path, named: Mapping[str, Any], n_classes: int) -> list[str]:
    """Names of a classifier's classes.

    Parameters
    ----------
    folder
        Of the model.
    named
        ``id2label`` of its config.json.
    n_classes
        How many it tells apart.

    Returns
    -------
    list of str
        What config.json says, unless that is what transformers makes up and the official classifier's file is there.

    Raises
    ------
    CheckpointError
        That file holds something else than names of classes.
    """
    said = [str(named.get(str(code), f"LABEL_{code}")) for code in range(n_classes)]
    if not all(_UNNAMED.match(name) for name in said):
        return said
    path = _beside(folder)
    if path is None:
        return said
    try:
        content = read_pickle(path)
    except VocabularyError as error:
        raise CheckpointError(f"{error}; move it elsewhere to have classes named LABEL_0 and on") from None
    if not isinstance(content, dict) or sorted(content, key=str) != sorted(range(len(content)), key=str):
        raise CheckpointError(f"{path}: holds no classes numbered from 0; move it elsewhere")
    if len(content) != n_classes:
        warnings.warn(
            f"{path} names {len(content)} classes, but {folder} tells {n_classes} apart, so it is of another model: "
            "classes are called LABEL_0 and on",
            stacklevel=2,
        )
        return said
    return [str(content[code]) for code in range(n_classes)]


def _beside(folder: Path) -> Path | None:
    """The file of the run that a model is of; None where there is none, or nobody knows which of several."""
    places = [folder.absolute(), *folder.absolute().parents][:_LEVELS]
    for place in places:
        files = sorted(place.glob(f"*{SUFFIX}"))
        if len(files) > 1:
            of_run = [file for file in files if any(_is_of(file, each) for each in places)]
            if len(of_run) != 1:
                listed = ", ".join(file.name for file in files)
                warnings.warn(f"{place}: which of {listed} names the classes of {folder} is not known", stacklevel=3)
                return None
            files = of_run
        if files:
            return files[0]
    return None


def _is_of(file: Path, run: Path) -> bool:
    prefix = file.name.removesuffix(SUFFIX)
    return run.name.endswith((f"Classifier_{prefix}", f"classifier_{prefix}"))
