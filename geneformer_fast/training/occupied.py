"""What a folder holds that is to be trained into, and whether that is in the way."""

from __future__ import annotations

from pathlib import Path

from geneformer_fast.errors import OutputError

#: What a run, or a fine-tuning, is one of; a folder with this file holds one.
RUN, FINETUNING = "run.json", "finetune.json"
#: How to go on, in the words of whoever asks for it.
RESUME = "--resume (resume=True)"


def check_is_no_file(folder: Path) -> None:
    """Refuse a file where a folder is to be."""
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"{folder} is a file; name a folder for the run")


def has_content(folder: Path) -> bool:
    """Whether a folder holds anything but hidden files."""
    return folder.is_dir() and any(not path.name.startswith(".") for path in folder.iterdir())


def check_run_folder(folder: Path, *, is_resuming: bool) -> None:
    """Refuse a folder in which a run cannot be begun, or gone on with.

    Raises
    ------
    OutputError
        It is a file, holds a run that is not to be continued, or files of something else.
    """
    check_is_no_file(folder)
    if (folder / RUN).exists():
        if not is_resuming:
            raise OutputError(f"{folder} holds a run already; continue it with {RESUME}, or name another folder")
    elif has_content(folder):
        raise OutputError(f"{folder} holds files that are no training run; name another folder")


def check_finetuning_folder(folder: Path, *, is_resuming: bool, is_replacing: bool) -> None:
    """Refuse a folder in which a fine-tuning cannot be begun, or gone on with.

    Raises
    ------
    OutputError
        It is a file, holds a fine-tuning that is neither to be resumed nor replaced, or files of something else.
    """
    check_is_no_file(folder)
    if (folder / FINETUNING).exists():
        if not (is_resuming or is_replacing):
            raise OutputError(
                f"{folder} holds a fine-tuning already; go on with it (--resume), replace it (--overwrite), or name "
                "another folder"
            )
    elif has_content(folder):
        raise OutputError(f"{folder} holds files that finetune did not make; name another folder")
