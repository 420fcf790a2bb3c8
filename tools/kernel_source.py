"""What a kernel's machine code is made from: its own source, and every function and constant it reaches.

:func:`source_hash` changes when that source does, and stays when a comment, a docstring or another kernel of the file
changes. Everything is read from the syntax tree; nothing is executed, and Triton may be absent.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.util
import io
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Source:
    """One module's text, by what its top level defines.

    Attributes
    ----------
    path
        The file.
    definitions
        Name -> the statements that define it (functions, constants).
    imports
        Local name -> (module, name in it), or (module, None) for a module itself; modules of the same package only.
    lines
        The file's lines without comments.
    """

    path: Path
    definitions: dict[str, list[ast.stmt]]
    imports: dict[str, tuple[str, str | None]]
    lines: list[str]


def source_hash(module: str, name: str) -> str:
    """Twelve hexadecimal digits for a kernel and all project code it reaches.

    Raises
    ------
    LookupError
        The module defines no such name.
    """
    if name not in read_module(module).definitions:
        raise LookupError(f"{module} defines no {name}")
    pieces: dict[tuple[str, str], str] = {}
    stack = [(module, name)]
    while stack:
        place = stack.pop()
        if place not in pieces:
            source = read_module(place[0])
            statements = source.definitions.get(place[1], [])
            pieces[place] = "\n".join(_text(source, statement) for statement in statements)
            stack += [found for statement in statements for found in _references(place[0], source, statement)]
    text = "\n".join(f"# {module}.{name}\n{piece}" for (module, name), piece in sorted(pieces.items()))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def kernel_functions(path: Path) -> dict[str, range]:
    """Name -> line numbers of every ``@triton.jit`` function of a file whose name ends in ``_kernel``."""
    found = {}
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel"):
            decorators = [ast.unparse(decorator) for decorator in node.decorator_list]
            if any(text.partition("(")[0] in ("triton.jit", "jit") for text in decorators):
                found[node.name] = range(_first_line(node), (node.end_lineno or node.lineno) + 1)
    return found


def kernel_files(folder: Path) -> list[Path]:
    """Where an operation's kernels are: ``kernel.py`` and, where it is split by meaning, ``kernel_*.py``."""
    return [
        path for path in sorted(folder.glob("kernel*.py")) if path.stem == "kernel" or path.stem.startswith("kernel_")
    ]


@functools.cache
def kernel_module(package: str, name: str) -> str:
    """The module of an operation's package that defines a kernel; ``kernel`` if none does."""
    spec = importlib.util.find_spec(package)
    for folder in (spec and spec.submodule_search_locations) or ():
        for path in kernel_files(Path(folder)):
            if name in kernel_functions(path):
                return f"{package}.{path.stem}"
    return f"{package}.kernel"


@functools.cache
def read_module(module: str) -> Source:
    """A module's source; its packages are imported to find it, the module itself is not."""
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise LookupError(f"there is no module {module}")
    path = Path(spec.origin)
    text = path.read_text(encoding="utf-8")
    definitions: dict[str, list[ast.stmt]] = {}
    imports: dict[str, tuple[str, str | None]] = {}
    for statement in ast.parse(text).body:
        if isinstance(statement, (ast.Import, ast.ImportFrom)):
            imports |= _project_imports(module, statement)
        else:
            for name in _defined(statement):
                definitions.setdefault(name, []).append(statement)
    return Source(path, definitions, imports, _without_comments(text))


def _project_imports(module: str, node: ast.Import | ast.ImportFrom) -> dict[str, tuple[str, str | None]]:
    package = module.partition(".")[0]
    found: dict[str, tuple[str, str | None]] = {}
    if isinstance(node, ast.Import):
        # "import a.b" without "as" binds "a" and is used as a.b.c: not a form the kernels are written in.
        for alias in node.names:
            if alias.asname and alias.name.partition(".")[0] == package:
                found[alias.asname] = (alias.name, None)
        return found
    base = node.module or ""
    if node.level:
        base = ".".join([*module.split(".")[: -node.level], *filter(None, [node.module])])
    if base.partition(".")[0] == package:
        for alias in node.names:
            inner = f"{base}.{alias.name}"
            is_module = importlib.util.find_spec(inner) is not None if _is_package(base) else False
            found[alias.asname or alias.name] = (inner, None) if is_module else (base, alias.name)
    return found


def _is_package(module: str) -> bool:
    spec = importlib.util.find_spec(module)
    return spec is not None and spec.submodule_search_locations is not None


def _defined(statement: ast.stmt) -> Iterator[str]:
    if isinstance(statement, (ast.FunctionDef, ast.ClassDef)):
        yield statement.name
        return
    for node in ast.walk(statement):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id


def _references(module: str, source: Source, statement: ast.stmt) -> Iterator[tuple[str, str]]:
    for node in ast.walk(statement):
        if isinstance(node, ast.Name):
            if node.id in source.definitions:
                yield module, node.id
            target, name = source.imports.get(node.id, ("", None))
            if name is not None:
                yield target, name
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            target, name = source.imports.get(node.value.id, ("", ""))
            if name is None:
                yield target, node.attr


def _first_line(statement: ast.stmt) -> int:
    return min([statement.lineno, *(decorator.lineno for decorator in getattr(statement, "decorator_list", []))])


def _text(source: Source, statement: ast.stmt) -> str:
    numbers = set(range(_first_line(statement), (statement.end_lineno or statement.lineno) + 1))
    for node in ast.walk(statement):
        if isinstance(node, ast.FunctionDef) and ast.get_docstring(node, clean=False) is not None:
            numbers -= set(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    lines = [source.lines[number - 1].rstrip() for number in sorted(numbers)]
    return "\n".join(line for line in lines if line)


def _without_comments(text: str) -> list[str]:
    lines = text.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column]
    return lines
