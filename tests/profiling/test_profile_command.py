"""``geneformer-fast profile`` from the command line: what it prints, what it writes, what it refuses."""

from __future__ import annotations

import json

import pytest
from toys import cells as toy_counts
from toys import encoder as toy_encoder
from toys import leftovers, vocabulary

from geneformer_fast import save, tokenize
from geneformer_fast.cli import main
from geneformer_fast.files.locks import file_lock
from geneformer_fast.profiling.report import Report

FAST = ["--dtype", "float32", "--steps", "2", "--threads", "1"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("command")
    words = vocabulary()
    tokenize(toy_counts(12), folder / "tokens", dictionary=words, progress=False)
    save(toy_encoder(words), folder / "model")
    return folder


@pytest.fixture(scope="module")
def written(place):
    """A report in a folder."""
    out = place / "profiled"
    assert main(["profile", *what(place), *FAST, "--out", str(out), "--quiet"]) == 0
    return out


def what(place):
    return ["--model", str(place / "model"), "--tokens", str(place / "tokens")]


def refused(capsys, *arguments):
    assert main(["profile", *map(str, arguments)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    return captured.err


def test_the_folder_holds_the_report_its_page_and_the_trace(written):
    assert sorted(path.name for path in written.iterdir()) == ["report.html", "report.json", "trace.json.gz"]
    report = Report.load(written / "report.json")
    assert report.time.n_steps == 2
    page = (written / "report.html").read_text(encoding="utf-8")
    assert page.startswith("<!DOCTYPE html>") or page.lower().startswith("<!doctype html>")
    assert "<svg" in page
    assert leftovers(written.parent) == []


def test_a_table_is_printed_and_json_for_machines(place, capsys):
    assert main(["profile", *what(place), *FAST]) == 0
    said = capsys.readouterr().out
    assert "cells/s" in said
    assert main(["profile", *what(place), *FAST, "--json"]) == 0
    report = Report.from_dict(json.loads(capsys.readouterr().out))
    assert report.subject.mode == "embed"


def test_what_is_there_is_not_replaced_unless_asked(place, written, capsys):
    before = (written / "report.json").read_bytes()
    assert "exists already" in refused(capsys, *what(place), *FAST, "--out", written)
    assert (written / "report.json").read_bytes() == before
    assert main(["profile", *what(place), *FAST, "--out", str(written), "--overwrite", "--quiet"]) == 0
    assert (written / "report.json").read_bytes() != before


def test_folders_with_something_else_are_never_replaced(place, capsys, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    said = refused(capsys, *what(place), *FAST, "--out", tmp_path, "--overwrite")
    assert "holds notes.txt, which is no part of a report" in said
    assert "is a file" in refused(capsys, *what(place), *FAST, "--out", tmp_path / "notes.txt", "--overwrite")
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_nothing_is_left_of_a_run_that_fails(place, capsys, tmp_path):
    out = tmp_path / "out"
    refused(capsys, "--model", place / "model", "--tokens", place / "nothing", "--out", out)
    assert not out.exists()
    assert leftovers(tmp_path) == []


def test_two_at_once_are_refused_and_what_a_killed_one_left_is_removed(place, capsys, tmp_path):
    out = tmp_path / "out"
    with file_lock(out):
        assert "being written by another process" in refused(capsys, *what(place), *FAST, "--out", out)
    assert not out.exists()
    (tmp_path / ".out.killed.part" / "out").mkdir(parents=True)
    (tmp_path / ".out.lock").touch()
    assert main(["profile", *what(place), *FAST, "--out", str(out), "--quiet"]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--lengths", "real"], "--model is missing"),
        (["--model", "geneformer-v1-10m"], "--tokens is missing: say which cells"),
        (["--model", "geneformer-v9", "--lengths", "real"], "presets are geneformer-v1-10m"),
        (["--model", "geneformer-v1-10m", "--lengths", "long"], "must be real, uniform:LOW-HIGH"),
        (["--model", "geneformer-v1-10m", "--lengths", "3000"], "more than the 2,048 positions"),
        (["--model", "geneformer-v1-10m", "--tokens", "nowhere"], "nowhere: no such token folder"),
        (["--model", "geneformer-v1-10m", "--lengths", "real", "--device", "cuda:99"], "cannot be used here"),
        (["--model", "geneformer-v1-10m", "--lengths", "real", "--quiet"], "--quiet prints nothing"),
        (["--mode", "tokenize", "--model", "geneformer-v1-10m"], "--model is about a model"),
        (["--predict", "--cells", "9", "--card", "Voodoo 2"], "There are: AMD EPYC, 2 cores"),
        (["--predict", "--cells", "9"], "--card is missing"),
        (["--card", "H200", "--model", "geneformer-v1-10m", "--lengths", "real"], "--card names measurements"),
    ],
)
def test_bad_input_is_one_line_that_says_what_to_do(capsys, arguments, said):
    assert said in refused(capsys, *arguments)


def test_an_empty_folder_of_tokens_is_refused(place, capsys, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "empty" in refused(capsys, "--model", place / "model", "--tokens", tmp_path / "empty")


def test_predictions_are_said_and_given_as_json(place, capsys):
    asked = ["profile", "--predict", "--cells", "1000000", "--card", "NVIDIA H200"]
    assert main(asked) == 0
    said = capsys.readouterr().out
    assert "1,000,000 cells" in said
    assert "off by up to" in said
    assert main([*asked, "--json", "--model", "geneformer-v2-104m", "--lengths", "uniform:300-2048"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["machine"], found["model"], found["is_good"]) == ("NVIDIA H200", "geneformer-v2-104m", True)
    assert main(["profile", "--predict", "--cells", "5", "--card", "EPYC", *what(place)]) == 0
    assert "as in tokens" in capsys.readouterr().out
    tokenizing = ["profile", "--predict", "--mode", "tokenize", "--cells", "5000", "--card", "EPYC", "--preset", "v1"]
    assert main(tokenizing) == 0
    assert "5,000 cells (lengths of real blood cells, 744 tokens on average), tokenize" in capsys.readouterr().out


def test_sweeping_says_what_was_tried_and_measures_the_best(place, capsys):
    assert main(["profile", *what(place), *FAST, "--sweep", "--json"]) == 0
    report = Report.from_dict(json.loads(capsys.readouterr().out))
    assert report.sweep[0].token_budget == 1024
    best = next(each for each in report.sweep if each.note.startswith("best"))
    assert report.subject.settings["token_budget"] == best.token_budget
    assert best.free_bytes > 0


def test_ctrl_c_says_what_is_there(monkeypatch, place, capsys, tmp_path):
    def stopped(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("geneformer_fast.cli.profile._measured", stopped)
    assert main(["profile", *what(place), "--out", str(tmp_path / "out")]) == 130
    assert "is not written; run the same command again" in capsys.readouterr().err
    assert leftovers(tmp_path) == []
    assert main(["profile", *what(place)]) == 130
    assert "nothing was measured" in capsys.readouterr().err
