"""transformers without its remarks."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

#: What reports call it.
ENGINE = "transformers"


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' remarks about heads that are not there, and its bar for loading."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        logging.enable_progress_bar()
