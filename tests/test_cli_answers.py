"""What every command says, and where: results on standard output, all else on standard error, JSON as one object."""

from __future__ import annotations

import json
import logging
import sys
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import toys

import geneformer_fast as gf
from geneformer_fast import cli, errors
from geneformer_fast.cli.answer import Answer, as_json


@pytest.fixture
def say(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Callable[..., int]]:
    """Makes ``say`` the one command, with a body of the test's choosing; returns what runs it."""

    def of(run: Callable[..., Any], **more: Any) -> Callable[..., int]:
        module = types.SimpleNamespace(NAME="say", HELP="", run=run, add_arguments=lambda parser: None, **more)
        monkeypatch.setitem(sys.modules, "command_of_a_test", module)  # type: ignore[arg-type]
        monkeypatch.setattr(cli, "COMMANDS", {"say": "command_of_a_test"})
        return lambda *options: cli.main(["say", *options])

    return of


def talking(args: Any) -> Answer:
    logger = logging.getLogger("geneformer_fast.somewhere")
    logger.debug("a detail")
    logger.info("how far it is")
    logging.getLogger("geneformer_kernels").warning("a doubt")
    print("from a library")
    warnings.warn("something odd", stacklevel=1)
    return Answer("all is well", {"out": Path("a/b"), "n": np.int64(3), "share": float("nan")})


def test_results_and_all_else(say: Any, capsys: pytest.CaptureFixture[str]) -> None:
    run = say(talking)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        assert run() == 0
        assert capsys.readouterr().out == "from a library\nall is well\n"
        assert run("--quiet") == 0
        quiet = capsys.readouterr()
    assert quiet.out == "from a library\n"
    assert "how far" not in quiet.err
    assert "warning: a doubt" in quiet.err


def test_the_log(say: Any, capsys: pytest.CaptureFixture[str]) -> None:
    run = say(talking)
    loggers = [logging.getLogger(name) for name in ("geneformer_fast", "geneformer_kernels")]
    before = [(list(logger.handlers), logger.level) for logger in loggers]
    run()
    assert capsys.readouterr().err.splitlines()[:2] == ["how far it is", "warning: a doubt"]
    run("--verbose")
    said = capsys.readouterr().err
    assert "geneformer_fast.somewhere: a detail\ngeneformer_fast.somewhere: how far it is\n" in said
    assert "geneformer_kernels: warning: a doubt\n" in said
    assert [(logger.handlers, logger.level) for logger in loggers] == before
    with pytest.raises(SystemExit):
        run("--verbose", "--quiet")


def test_one_object(say: Any, capsys: pytest.CaptureFixture[str]) -> None:
    run = say(talking)
    for more in ([], ["--quiet"]):
        assert run("--json", *more) == 0
        found = json.loads(capsys.readouterr().out)
        assert found.pop("seconds") >= 0
        assert found == {"command": "say", "out": "a/b", "n": 3, "share": None}


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (errors.InputError("x.h5ad: is empty"), 2, {"error": "x.h5ad: is empty", "kind": "InputError"}),
        (OSError(28, "No space left on device", "x"), 2, {"error": "x: No space left on device", "kind": "OSError"}),
        (KeyboardInterrupt(), 130, {"error": "interrupted: half", "kind": "KeyboardInterrupt"}),
    ],
)
def test_an_error_is_one_object_too(
    say: Any, capsys: pytest.CaptureFixture[str], error: BaseException, code: int, said: dict[str, str]
) -> None:
    def fail(args: Any) -> Answer:
        raise error

    for body, more in ((fail, {}), (talking, {"check": fail})):
        assert say(body, interrupted=lambda args: "half", **more)("--json") == code
        found = capsys.readouterr()
        assert json.loads(found.out) == said
        assert said["error"] in found.err


def test_wrong_arguments_are_one_object_too(say: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        say(talking)("--json", "--no-such-option")
    assert stop.value.code == 2
    found = capsys.readouterr()
    assert json.loads(found.out) == {
        "error": "unrecognized arguments: --no-such-option", "kind": "ArgumentError",
    }  # fmt: skip
    assert "usage: " in found.err


def test_exit_codes_go_on(say: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert say(lambda args: Answer("no", {"is_fine": False}, 1))("--json") == 1
    assert json.loads(capsys.readouterr().out)["is_fine"] is False
    # Of several processes one speaks.
    assert say(lambda args: 7)("--json") == 7
    assert capsys.readouterr().out == ""


def test_numbers_of_libraries() -> None:
    values = {"a": np.float32(0.5), "b": np.arange(2), "c": (1, float("inf")), "d": {"e": True}, 3: "é"}
    assert json.loads(as_json(values)) == {"a": 0.5, "b": [0, 1], "c": [1, None], "d": {"e": True}, "3": "é"}


@pytest.mark.parametrize("name", sorted(cli.COMMANDS))
def test_all_commands_have_the_common_options(name: str) -> None:
    """Before and after the name of a command within a command."""
    given = {"finetune": [["finetune", "genes", "--classes", "c"], ["t", "--model", "m", "--out", "o"]]}
    needed = {
        "tokenize": ["x", "--out", "o", "--dictionary", "d"], "medians": ["x", "--out", "o"],
        "embed": ["x", "--out", "o", "--model", "m"], "predict": ["x", "--out", "o", "--model", "m"],
        "pretrain": ["x", "--out", "o"], "quantize": ["m", "--out", "o"], "perturb-stats": ["r", "--out", "o"],
        "perturb": ["x", "--out", "o", "--model", "m"],
    }  # fmt: skip
    before, after = given.get(name, [[name], needed.get(name, [])])
    for option in ("quiet", "verbose", "json"):
        places = [[*before, *after, f"--{option}"], [before[0], f"--{option}", *before[1:], *after]]
        for words in places:
            args = cli.parsed(words)
            assert [getattr(args, each) for each in ("quiet", "verbose", "json")] == [
                each == option for each in ("quiet", "verbose", "json")
            ]
    if name not in ("doctor", "quickstart"):
        assert cli.parsed([*before, *after, "--no-verify"]).no_verify


def test_what_tokenizing_and_embedding_answer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cells, words = toys.cells(12), toys.vocabulary()
    cells.write_h5ad(tmp_path / "cells.h5ad")
    words.save(tmp_path / "vocabulary")
    words.save(gf.save(toys.encoder(words), tmp_path / "model"))

    def answered(*arguments: object) -> dict[str, Any]:
        assert cli.main([*map(str, arguments), "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    made = answered("medians", tmp_path / "cells.h5ad", "--out", tmp_path / "new" / "made")
    assert (made["genes"], made["out"]) == (60, str(tmp_path / "new" / "made"))
    tokens = tmp_path / "deep" / "er" / "tokens"
    found = answered("tokenize", tmp_path / "cells.h5ad", "--dictionary", tmp_path / "vocabulary", "--out", tokens)
    assert found["cells"] == {"read": 12, "written": 12, "filtered": 0, "empty": 0, "full": 0}
    assert (found["out"], found["tokens"]) == (str(tokens), gf.open_tokens(tokens).n_tokens)
    out = tmp_path / "some" / "where" / "z.npy"
    found = answered("embed", tokens, "--model", tmp_path / "model", "--pool", "mean", "--out", out)
    assert (found["out"], found["pool"], found["cells"]) == (str(out), "mean", 12)
    assert found["seconds"] > 0
    error = ["embed", str(tokens), "--model", str(tmp_path / "model"), "--out", str(out), "--json"]
    assert cli.main(error) == 2
    assert "exists already" in json.loads(capsys.readouterr().out)["error"]


def test_what_statistics_of_perturbations_answer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from test_cli_checks import write_perturbations

    write_perturbations(tmp_path / "run")
    out = tmp_path / "deep" / "er"
    words = ["perturb-stats", str(tmp_path / "run"), "--out", str(out), "--no-pictures"]
    assert cli.main([*words, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["out"], said["genes"], said["cells"], said["tested"]) == (str(out), 1, 1, 0)
    assert sorted(said["files"]) == sorted(path.name for path in out.iterdir())
    assert cli.main([*words, "--overwrite"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("aggregate_data: 1 genes in 1 cells; too few genes are in enough cells (--min-cells)")
    assert "about.md says what the numbers mean" in text


def test_what_training_and_quantizing_answer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Into folders below folders that are not there."""
    words = toys.vocabulary()
    toys.cells(12).write_h5ad(tmp_path / "cells.h5ad")
    gf.tokenize(tmp_path / "cells.h5ad", tmp_path / "tokens", dictionary=words, progress=False)
    gf.save(toys.encoder(words), tmp_path / "model")

    def answered(*arguments: object) -> dict[str, Any]:
        assert cli.main([*map(str, arguments), "--json", "--device", "cpu"]) == 0
        return json.loads(capsys.readouterr().out)

    out = tmp_path / "some" / "where"
    how = ["--config", tmp_path / "model", "--steps", 1, "--batch-cells", 4, "--token-budget", 64, "--eval-share", 0.2]
    found = answered("pretrain", tmp_path / "tokens", "--out", out / "run", *how)
    assert (found["out"], found["model"], found["steps"]) == (str(out / "run"), str(out / "run" / "final"), 1)
    assert found["evaluation"]["loss"] > 0
    found = answered("quantize", found["model"], "--out", out / "small", "--check", tmp_path / "tokens")
    assert (found["out"], found["scheme"], found["check"]["n_cells"]) == (str(out / "small"), "int8", 12)
    assert gf.load(found["out"]).quantization.scheme == "int8"
