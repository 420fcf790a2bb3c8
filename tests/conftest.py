"""What must be settled before any test is loaded, and fixtures every test may use."""

from __future__ import annotations

import faulthandler
import gc
import itertools
import os
import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import interpreted
import pytest
import quick_interpreter

ROOT = Path(__file__).resolve().parent.parent
#: Test files at a time when the whole default suite is asked for: some of them hold gigabytes.
MOST_WORKERS = 4
#: Folders whose tests one worker runs.
TOGETHER = ("tests/finetuning", "tests/drop_in")
# A mark, or in the folders that have them one of the fixtures that bring it.
_MARK = re.compile(r"mark\.gpu\b")
_FIXTURES = re.compile(r"^def test_\w+\([^)]*\b(device|card|place)\b", re.MULTILINE)
_FOLDERS_WITH_FIXTURES = ("kernels", "gpu")


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """``pytest`` alone runs the default suite, whole files at a time, on several cores where pytest-xdist is there.

    Chosen files, other marks, ``-n`` and ``--pdb`` are left as they are.
    """
    option = config.option
    if hasattr(config, "workerinput"):  # a worker has no workers
        return
    is_whole = config.args_source == pytest.Config.ArgsSource.TESTPATHS and "not gpu" in option.markexpr
    if is_whole and getattr(option, "numprocesses", 0) is None and not option.usepdb and not option.collectonly:
        option.numprocesses = min(os.cpu_count() or 1, MOST_WORKERS)
        option.dist = "loadfile"
        option.maxworkerrestart = "0"  # a test that ends its worker would end eight more
        # Threads of numpy that wait for its next product take time from other workers. Read when numpy is loaded, by
        # some plugin, before a worker comes here.
        os.environ.setdefault("OPENBLAS_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // option.numprocesses)))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Whole files at a time, and those of a folder where what is trained or loaded once serves them all."""
    if config.getvalue("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class Together(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return next((each for each in TOGETHER if nodeid.startswith(f"{each}/")), super()._split_scope(nodeid))

    return Together(config, log)


def pytest_configure(config: pytest.Config) -> None:
    """What must be settled before the first test file is loaded, where any is: not in the process that has workers.

    Workers share the cores, instead of each of them using all.
    """
    if getattr(config.option, "dist", "no") != "no" and not hasattr(config, "workerinput"):
        return
    interpreted.settle()
    # The same examples every time; HYPOTHESIS_PROFILE=default looks for new ones. Tests on a card do without it.
    if find_spec("hypothesis") is not None:
        from hypothesis import settings

        settings.register_profile("reproducible", derandomize=True)
        settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "reproducible"))
    if n_workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 0)):
        import torch

        torch.set_num_threads(max(1, torch.get_num_threads() // n_workers))


class Backwards(pytest.Dir):
    """A folder whose last test file is loaded first."""

    def collect(self) -> Any:
        return reversed([*super().collect()])


def pytest_collect_directory(path: Path, parent: pytest.Collector) -> pytest.Collector | None:
    """Every other worker begins at the end: in a fresh checkout each then prepares half of the files for all.

    pytest rewrites assertions once for all processes, but all begin at the same time.
    """
    number = os.environ.get("PYTEST_XDIST_WORKER", "").removeprefix("gw")
    is_odd = number.isdigit() and int(number) % 2 == 1
    return Backwards.from_parent(parent, path=path) if is_odd else None


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Workers must agree on one order, which is that of names."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        return
    files = [[*group] for _, group in itertools.groupby(items, key=lambda item: item.path)]
    items[:] = itertools.chain.from_iterable(sorted(files, key=lambda file: file[0].path))


def pytest_collection_finish() -> None:
    """Whoever interprets kernels has loaded Triton by now; and libraries and tests, which stay, are no garbage."""
    quick_interpreter.install()
    gc.collect()
    gc.freeze()


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """With ``-m gpu``, files and folders without such tests are not loaded: they import what those tests do without."""
    if config.option.markexpr != "gpu":
        return None
    files = [collection_path] if collection_path.match("test_*.py") else sorted(collection_path.rglob("test_*.py"))
    if not files:
        return None
    return not any(map(_is_for_cards, files)) or None


def _is_for_cards(path: Path) -> bool:
    text = path.read_text(encoding="utf-8")
    has_fixtures = path.parent.name in _FOLDERS_WITH_FIXTURES
    return _MARK.search(text) is not None or (has_fixtures and _FIXTURES.search(text) is not None)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """``-m gpu`` on a machine without a card skips; what is known to take long has no limit of seconds."""
    if any(item.get_closest_marker(name) is not None for name in ("slow", "gpu", "bench")):
        faulthandler.cancel_dump_traceback_later()
    if item.get_closest_marker("gpu") is not None:
        import torch

        if not torch.cuda.is_available():
            pytest.skip("no CUDA device")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Iterator[None]:
    """What an old card has no kernel for skips there (``old_cards``), with the reason that ``doctor`` gives."""
    try:
        return (yield)
    except Exception as error:
        # Not at the top: tests of the tokenizer do without the kernels.
        import torch
        from geneformer_kernels import on_device
        from old_cards import refused_by_old_card

        target = on_device.target_of("cuda" if torch.cuda.is_available() else "cpu")
        if why := refused_by_old_card(error, target):
            pytest.skip(why)
        raise


@pytest.fixture(autouse=True)
def threads_kept() -> Iterator[None]:
    """Every test finds torch with as many threads as the first one did: sums depend on it, in their last bits."""
    import torch

    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session", autouse=True)
def nothing_waits_for_the_disk() -> Iterator[None]:
    """A fine-tuning syncs hundreds of files: who waits for that is safe from a failure of power, and slow."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda fd: None)
        yield


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The folder of real cells, official dictionaries and numeric references that lies beside a checkout."""
    path = ROOT.parent / "shared"
    if not (path / "data").is_dir():
        pytest.skip(f"real cells and references are not here ({path.name}/ beside the checkout is absent)")
    return path
