"""The pages that people read, and the blocks of code in them.

A block that cannot run in a test has a comment in the line before it that says why, ``<!-- not run: needs several
GPUs -->``, or ``<!-- slow: why -->`` where the slow tests run it. What is not run is checked without being run.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
#: Languages of blocks that are code; ``text`` and ``none`` are not.
CODE = ("bash", "python")
#: The two lines that need a fresh machine; ``.ci/run`` takes them from the README and runs them.
INSTALL = "pip install -c constraints.txt -e '.[dev]' && "

_FENCE = re.compile(r"^\s*(`{3,})([^`\s]*)[^`]*$")
_REMARK = re.compile(r"^<!-- (not run|slow): (.+) -->$")


@dataclass(frozen=True)
class Block:
    """A fenced block of a page.

    Attributes
    ----------
    page, line
        Where it is; the line of its first line of text.
    language
        What stands behind the fence.
    text
        Its content.
    remark
        ``"not run"``, ``"slow"`` or ``""``.
    reason
        Why.
    """

    page: Path
    line: int
    language: str
    text: str
    remark: str = ""
    reason: str = ""

    @property
    def place(self) -> str:
        """Page and line, for messages."""
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def pages() -> list[Path]:
    """Every page with code, those of the kernels included."""
    written = sorted(path for path in DOCS.rglob("*.md") if not {"_build", "generated"} & set(path.parts))
    return [ROOT / "README.md", ROOT / "kernels" / "README.md", *written]


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page, in order.

    Raises
    ------
    ValueError
        A fence is not closed.
    """
    found: list[Block] = []
    fence, language, begin, remark, reason = "", "", 0, "", ""
    content: list[str] = []
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        match = _FENCE.match(line)
        if fence:
            if match and match[1] == fence and not match[2]:
                found.append(Block(page, begin, language, "\n".join([*content, ""]), remark, reason))
                fence, content, remark, reason = "", [], "", ""
            else:
                content.append(line)
        elif match:
            fence, language, begin = match[1], match[2], number + 1
        elif said := _REMARK.match(line.strip()):
            remark, reason = said[1], said[2]
        elif line.strip():
            remark, reason = "", ""
    if fence:
        raise ValueError(f"{page}: the block of line {begin} is not closed")
    return found


def code(page: Path) -> list[Block]:
    """The blocks of a page that are commands or Python."""
    return [block for block in blocks(page) if block.language in CODE]


def commands(block: Block) -> list[str]:
    """The lines of a block of commands, continued lines joined, without comments and without the install."""
    lines = [line.strip() for line in block.text.replace("\\\n", " ").splitlines()]
    return [line for line in lines if line and not line.startswith(("#", INSTALL))]


def words_of(line: str) -> list[str]:
    """The words of a command as the program gets them, whatever starts it."""
    words = shlex.split(line)
    if words[0] == "torchrun":
        at = words.index("-m")
        assert words[at + 1] == "geneformer_fast", line
        words = ["geneformer-fast", *words[at + 2 :]]
    return words
