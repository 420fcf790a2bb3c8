"""Public functions refuse arguments of another kind before they do anything, by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import geneformer_fast as gf
from geneformer_fast.arguments import checked
from geneformer_fast.errors import ArgumentError, GeneformerFastError


def public_functions() -> Iterator[Callable[..., Any]]:
    """Every function of the package, and the ways to make an object of one of its classes by name or file."""
    for name in gf.__all__:
        thing = getattr(gf, name)
        if inspect.isfunction(thing):
            yield thing
    yield from (gf.Vocabulary.from_folder, gf.Vocabulary.from_medians, gf.EncoderConfig.preset, gf.Recipe.preset)


def arguments() -> Iterator[Any]:
    for function in public_functions():
        for parameter in inspect.signature(function).parameters.values():
            if parameter.kind is not parameter.VAR_KEYWORD and parameter.annotation != "Any":
                yield pytest.param(function, parameter.name, id=f"{function.__qualname__}-{parameter.name}")


class Odd:
    """Nothing that any function takes."""


@pytest.mark.parametrize(("function", "name"), list(arguments()))
def test_every_argument_of_another_kind_is_named(function: Callable[..., Any], name: str) -> None:
    signature = inspect.signature(function)
    sound: dict[str, Any] = {"encoder": torch.nn.Linear(1, 1), "medians": {}, "model": "x"}
    if function.__name__ == "save":
        sound["encoder"] = gf.Encoder(gf.EncoderConfig(1, 8, 1, 8, vocab_size=4, max_len=4))
    if function.__name__ == "accelerate":
        sound["model"] = torch.nn.Linear(1, 1)
    needed = [p.name for p in signature.parameters.values() if p.default is p.empty and p.kind is not p.VAR_KEYWORD]
    given = {needed_name: sound.get(needed_name, "x") for needed_name in needed}
    with pytest.raises(ArgumentError, match=rf"^{function.__name__}: {name} must be .*, not a Odd$"):
        function(**{**given, name: Odd()})


@pytest.mark.parametrize("function", list(public_functions()), ids=lambda function: function.__qualname__)
def test_defaults_are_of_their_own_kind(function: Callable[..., Any]) -> None:
    parameters = inspect.signature(function).parameters.values()
    made = {p.name: p.default for p in parameters if p.default is not p.empty}
    plain = inspect.unwrap(function)
    probe: Any = lambda **options: options  # noqa: E731 - it gets a signature of its own
    probe.__signature__ = inspect.Signature([p for p in inspect.signature(plain).parameters.values() if p.name in made])
    assert checked(probe)(**made) == made


@checked
def example(
    path: str | Path,
    n: int | None = None,
    share: float = 0.5,
    is_on: bool = False,
    names: Sequence[str] | None = None,
    places: str | Iterable[str | Path] = "",
    renamed: Mapping[str, str] | Sequence[str] | None = None,
    column: tuple[str, Sequence[Any]] | None = None,
    device: str | torch.device | None = None,
    vocabulary: gf.Vocabulary | None = None,
) -> str:
    """Whatever kinds there are."""
    return "done"


@pytest.mark.parametrize(
    "good",
    [
        {"n": np.int32(3)},
        {"n": 0, "share": 1, "is_on": np.True_},
        {"share": np.float32(0.1)},
        {"names": []},
        {"names": ("a", "b")},
        {"names": np.array(["a", "b"])},
        {"names": pd.Index(["a", "b"])},
        {"places": iter(["a", Path("b")])},
        {"places": {"a", "b"}},
        {"renamed": {"a": "b"}},
        {"renamed": ["a"]},
        {"column": ("donor", ["d1"])},
        {"device": torch.device("cpu")},
        {"vocabulary": gf.Vocabulary.from_medians({"ENSG00000000001": 1.0})},
    ],
)
def test_what_is_taken(good: dict[str, Any]) -> None:
    assert example("x", **good) == example(Path("x"), **good) == "done"


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"path": 3}, "path must be str or Path, not int 3"),
        ({"path": b"x"}, "path must be str or Path, not bytes b'x'"),
        ({"n": True}, "n must be int or None, not bool True"),
        ({"n": 3.0}, "n must be int or None, not float 3.0"),
        ({"n": np.arange(3)}, "n must be int or None, not a ndarray"),
        ({"n": torch.ones(2)}, "n must be int or None, not a Tensor"),
        ({"share": "0.5"}, "share must be float, not str '0.5'"),
        ({"share": None}, "share must be float, not NoneType None"),
        ({"is_on": "false"}, "is_on must be bool, not str 'false'"),
        ({"is_on": 1}, "is_on must be bool, not int 1"),
        ({"names": "abc"}, r"names must be Sequence\[str\] or None, not str 'abc'"),
        ({"names": np.arange(2)}, r"names must be Sequence\[str\] or None, not a ndarray"),
        ({"names": np.array("a")}, "names must be"),
        ({"names": {"a": "b"}}, "names must be"),
        ({"names": ["a", 1]}, r"names must be Sequence\[str\] or None, not a list"),
        ({"places": 3}, "places must be"),
        ({"places": np.arange(2)}, "places must be"),
        ({"renamed": {"a": 1}}, "renamed must be"),
        ({"column": ("donor",)}, "column must be"),
        ({"column": ("donor", 3)}, "column must be"),
        ({"device": 0}, r"device must be str, torch\.device or None"),
        ({"vocabulary": "x"}, r"vocabulary must be gf\.Vocabulary or None"),
    ],
)
def test_what_is_refused(bad: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=f"^example: {message}") as caught:
        example(**{"path": "x", **bad})
    assert isinstance(caught.value, GeneformerFastError)


def test_wrong_names_and_numbers_of_arguments_are_pythons_own_error() -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'm'"):
        example("x", m=3)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="missing a required argument: 'path'"):
        example()  # type: ignore[call-arg]


def test_signatures_stay_what_they_are() -> None:
    assert list(inspect.signature(gf.load).parameters) == ["path", "dtype", "device", "verify"]
    assert gf.load.__doc__ is not None
