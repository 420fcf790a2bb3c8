"""A pytest plugin (``-p bare``): hides every package that the tests for cards must do without."""

from __future__ import annotations

import importlib.machinery
from typing import Any

# What pyproject.toml asks for beyond torch, triton, numpy and pytest, and transformers with what it brings itself.
ABSENT = frozenset(
    (
        *("anndata", "h5py", "numba", "psutil", "pyarrow", "pynvml", "scipy", "zarr", "pandas", "sklearn", "umap"),
        *("matplotlib", "optuna", "tensorboard", "datasets", "accelerate", "peft", "hypothesis", "pytest_benchmark"),
        *("pynndescent", "numcodecs", "natsort", "llvmlite", "seaborn", "dill", "multiprocess", "sqlalchemy"),
    )
)

_find = importlib.machinery.PathFinder.find_spec


def _find_spec(name: str, path: Any = None, target: Any = None) -> Any:
    return None if name.partition(".")[0] in ABSENT else _find(name, path, target)


importlib.machinery.PathFinder.find_spec = _find_spec  # type: ignore[method-assign]
