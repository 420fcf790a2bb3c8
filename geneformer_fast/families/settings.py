"""What small JSON files of a checkpoint say, for recognising whose it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

# Larger than any configuration of a model; vocabularies are read otherwise.
_MOST_BYTES = 4 << 20


def said_in(path: Path) -> dict[str, Any]:
    """A small JSON object; nothing where there is no such file, or it is none. Whoever loads it says what is wrong."""
    try:
        if path.stat().st_size > _MOST_BYTES:
            return {}
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}
