"""The frame of the command line: parsing, exit codes, errors; the commands have tests of their own."""

from __future__ import annotations

import importlib
import subprocess
import sys
import types
import warnings
from collections.abc import Callable

import pytest

from geneformer_fast import __version__, cli, errors

HEAVY = ("torch", "triton", "numba", "anndata", "h5py", "pyarrow", "scipy", "pandas", "matplotlib", "transformers")


@pytest.fixture
def add_command(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[..., int]], None]:
    """Make ``say`` the one command of the program, with a body of the test's choosing."""

    def add(run: Callable[..., int]) -> None:
        module = types.ModuleType("command_of_a_test")
        module.NAME, module.HELP, module.run = "say", "say a word", run  # type: ignore[attr-defined]
        module.add_arguments = lambda parser: parser.add_argument("word")  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setattr(cli, "COMMANDS", {"say": module.__name__})

    return add


def test_the_command_gets_its_arguments_and_its_code_is_returned(add_command):
    seen = []

    def run(args):
        seen.append(args.word)
        return 7

    add_command(run)
    assert cli.main(["say", "hello"]) == 7
    assert seen == ["hello"]


@pytest.mark.parametrize(
    "kind", [errors.InputError, errors.VocabularyError, errors.CheckpointError, errors.OutputError]
)
def test_errors_meant_for_the_user_come_without_a_traceback(add_command, capsys, kind):
    def run(args):
        raise kind("cells.h5ad: column n_counts is missing; add it")

    add_command(run)
    assert cli.main(["say", "x"]) == 2
    captured = capsys.readouterr()
    assert captured.err == "error: cells.h5ad: column n_counts is missing; add it\n"
    assert captured.out == ""


def test_a_warning_is_one_line_and_only_within_the_command(add_command):
    shown = []

    def run(args):
        shown.append(warnings.formatwarning("the file is odd", UserWarning, "inputs.py", 12, None))
        return 0

    add_command(run)
    before = warnings.formatwarning
    assert cli.main(["say", "x"]) == 0
    assert shown == ["warning: the file is odd\n"]
    assert warnings.formatwarning is before


def test_ctrl_c_is_reported_and_gives_130(add_command, capsys):
    def run(args):
        raise KeyboardInterrupt

    add_command(run)
    assert cli.main(["say", "x"]) == 130
    assert "interrupted" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(28, "No space left on device"), "error: No space left on device"),
        (PermissionError(13, "Permission denied", "/a/b"), "error: /a/b: Permission denied"),
    ],
)
def test_what_the_system_refuses_is_one_line(add_command, capsys, error, said):
    def run(args):
        raise error

    add_command(run)
    assert cli.main(["say", "x"]) == cli.EXIT_ERROR
    assert capsys.readouterr().err.strip() == said


def test_a_bug_keeps_its_traceback(add_command):
    def run(args):
        raise ZeroDivisionError

    add_command(run)
    with pytest.raises(ZeroDivisionError):
        cli.main(["say", "x"])


@pytest.mark.parametrize("argv", [[], ["no-such-command"], ["say"], ["say", "x", "--no-such-option"]])
def test_wrong_arguments_exit_with_2_and_show_usage(add_command, capsys, argv):
    add_command(lambda args: 0)
    with pytest.raises(SystemExit) as stop:
        cli.main(argv)
    assert stop.value.code == 2
    assert "usage: geneformer-fast" in capsys.readouterr().err


def test_version(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"geneformer-fast {__version__}\n"


def test_help_lists_every_command_with_its_line(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["--help"])
    assert stop.value.code == 0
    # argparse wraps and indents: compare words.
    said = " ".join(capsys.readouterr().out.split())
    for name, module in cli.COMMANDS.items():
        assert f" {name} {importlib.import_module(module).HELP} " in f"{said} ", name


@pytest.mark.parametrize("name", sorted(cli.COMMANDS))
def test_a_commands_help_names_it_and_costs_no_heavy_import(name):
    code = (
        "import sys\n"
        "from geneformer_fast.cli import main\n"
        "try:\n"
        f"    main([{name!r}, '--help'])\n"
        "except SystemExit as stop:\n"
        "    code = stop.code\n"
        f"loaded = [m for m in {HEAVY!r} if m in sys.modules]\n"
        "assert code == 0 and not loaded, (code, loaded)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"usage: geneformer-fast {name} ")


def test_python_dash_m_is_the_same_program():
    done = subprocess.run(
        [sys.executable, "-m", "geneformer_fast", "--version"], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout) == (0, f"geneformer-fast {__version__}\n")


def test_a_reader_that_goes_away_is_no_crash():
    code = (
        "import sys, types\n"
        "from geneformer_fast import cli\n"
        "def run(args):\n"
        "    for _ in range(100_000): print('a line')\n"
        "    return 0\n"
        "sys.modules['talk'] = types.SimpleNamespace(NAME='talk', HELP='', add_arguments=lambda p: None, run=run)\n"
        "cli.COMMANDS = {'talk': 'talk'}\n"
        "sys.exit(cli.main(['talk']))\n"
    )
    writer = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert writer.stdout is not None
    assert writer.stderr is not None
    assert writer.stdout.readline() == "a line\n"
    writer.stdout.close()
    complaint = writer.stderr.read()
    writer.stderr.close()
    assert writer.wait(timeout=60) == 141
    assert complaint == ""


def test_a_warning_is_shown_once(add_command, capsys):
    """Whatever libraries do to the filters, after which Python forgets what it has shown."""

    def run(args):
        for message in ("first", "second", "first"):
            sys.stderr.write(warnings.formatwarning(message, UserWarning, "file.py", 1))
        return 0

    add_command(run)
    for _ in range(2):
        assert cli.main(["say", "word"]) == 0
        assert capsys.readouterr().err == "warning: first\nwarning: second\n"
