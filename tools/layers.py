"""The import law: which module may import which, and where a library may appear.

``python tools/layers.py`` prints one line per breach, ``file:line: module: what is wrong``, and exits with 1 if there
are any. Imports are read from the syntax tree, nothing is executed. Lazy imports inside functions obey the directions
too; imports under ``if TYPE_CHECKING`` only have to keep the direction, since they load nothing.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

FAST, KERNELS = "geneformer_fast", "geneformer_kernels"
SOURCE_ROOTS = {FAST: ".", KERNELS: "kernels"}

# From top to bottom. A module belongs to the longest name that starts its own; it may import from its own layer and
# from those below. What is on no layer is a breach, so a new module has to be given its place here.
LAYERS: tuple[tuple[str, ...], ...] = (
    (f"{FAST}.__main__",),
    (f"{FAST}.cli",),
    (f"{FAST}.quickstart", f"{FAST}.doctor"),
    (f"{FAST}.finetuning", f"{FAST}.perturbation", f"{FAST}.quantization.check", f"{FAST}.quantization.answers"),
    tuple(f"{FAST}.profiling.{name}" for name in ("scenarios", "compare", "sweep", "prediction")),
    tuple(f"{FAST}.{name}" for name in ("extract", "training", "drop_in")),
    (f"{FAST}.profiling",),
    (f"{FAST}.plot", f"{FAST}.heatmap"),
    (f"{FAST}.tokenization.run", f"{FAST}.tokenization.medians"),
    (f"{FAST}.families",),
    (f"{FAST}.data", f"{FAST}.checkpoints", f"{FAST}.quantization", f"{FAST}.tokenization"),
    (f"{FAST}.encoder",),
    (f"{FAST}.decoders",),
    (f"{FAST}.block", f"{FAST}.heads"),
    (f"{FAST}.random_features",),
    (f"{FAST}.embeddings",),
    (f"{FAST}.layers", f"{FAST}.ragged", f"{FAST}.config", f"{FAST}.pieces"),
    (
        f"{FAST}.tokenization.genes",
        # The rules of value families, which stand on counts alone: the tokenization pass follows them.
        *(f"{FAST}.families.{name}" for name in ("gene_list", "preparation", "preparations")),
    ),
    (f"{FAST}.tokenization.vocabulary",),
    (f"{FAST}.tokenization.dictionaries", f"{FAST}.tokenization.bundled"),
    (f"{FAST}.tokenization.pickles",),
    # The registry loads families by name, so that those below them may ask it what they are.
    (f"{FAST}.families.__init__", f"{FAST}.families.family", f"{FAST}.families.settings"),
    (f"{FAST}.counts",),
    (f"{FAST}.files", f"{FAST}.arguments", f"{FAST}.progress"),
    (KERNELS,),
    (f"{FAST}.errors",),
)

# Nothing that a name starts may import what the other names start.
FORBIDDEN: tuple[tuple[str, tuple[str, ...], str], ...] = (
    (KERNELS, (FAST,), "operations know nothing of genes, files or checkpoints"),
    (
        f"{FAST}.tokenization",
        (
            *(
                f"{FAST}.{name}"
                for name in (
                    "config",
                    "ragged",
                    "layers",
                    "embeddings",
                    "block",
                    "encoder",
                    "heads",
                    "decoders",
                    "random_features",
                )
            ),
            *(f"{FAST}.checkpoints", f"{FAST}.quantization"),
        ),
        "tokenization needs no model",
    ),
    *(
        (f"{FAST}.{name}", (f"{FAST}.tokenization", f"{FAST}.counts"), "the encoder knows nothing of files of cells")
        for name in (
            "config",
            "ragged",
            "layers",
            "embeddings",
            "block",
            "encoder",
            "heads",
            "decoders",
            "random_features",
        )
    ),
)

# What declares what those above are to bring may name their types, which loads nothing.
DECLARING = {f"{FAST}.families", f"{FAST}.families.family"}

# Libraries that may appear only below these names.
LIBRARY_HOMES: dict[str, tuple[str, ...]] = {
    "transformers": (
        *(f"{FAST}.drop_in", f"{FAST}.checkpoints.hf", f"{FAST}.profiling.callback", f"{FAST}.profiling.compare"),
        f"{FAST}.quickstart",
    ),
    "datasets": (f"{FAST}.drop_in",),
    "anndata": (
        *(f"{FAST}.counts", f"{FAST}.extract", f"{FAST}.finetuning.predict"),
        *(f"{FAST}.cli.embed", f"{FAST}.quickstart", f"{FAST}.profiling.scenarios.counts"),
        f"{FAST}.perturbation.matrix",
    ),
    "matplotlib": (
        *(f"{FAST}.extract", f"{FAST}.cli", f"{FAST}.quickstart", f"{FAST}.plot", f"{FAST}.finetuning.pictures"),
        *(f"{FAST}.heatmap", f"{FAST}.perturbation.pictures"),
        *(f"{FAST}.profiling.page.html", f"{FAST}.profiling.page.plots", f"{FAST}.profiling.page.svg"),
    ),
    "jinja2": (f"{FAST}.profiling.page.html",),
    "markupsafe": (f"{FAST}.profiling.page.html", f"{FAST}.profiling.page.sections"),
    "zarr": (f"{FAST}.counts",),
    "hdf5plugin": (f"{FAST}.counts",),
    "sklearn": (
        *(f"{FAST}.{name}" for name in ("quickstart", "plot", "finetuning", "perturbation.statistics.mixture")),
    ),
    "optuna": (f"{FAST}.finetuning.search",),
    "peft": (f"{FAST}.finetuning.lora",),
    "wandb": (f"{FAST}.training.weights_and_biases",),
    "pydantic": (f"{FAST}.files.schema",),
    "tqdm": (f"{FAST}.progress",),
    "pynvml": (f"{FAST}.profiling.meters.cards", f"{FAST}.profiling.machine", f"{FAST}.doctor"),
    "zeus": (f"{FAST}.profiling.meters.counters",),
    "umap": (f"{FAST}.extract", f"{FAST}.quickstart", f"{FAST}.plot"),
    "pickle": (
        *(f"{FAST}.tokenization.pickles", f"{FAST}.perturbation.pickles"),
        f"{FAST}.checkpoints.pytorch",  # for its error class only
        f"{FAST}.checkpoints.distributed",  # for that and the numbers of instructions
    ),
    "yaml": (f"{FAST}.checkpoints.nemo",),
    "dill": (),
    "cloudpickle": (),
    "joblib": (),
}

# Never at import time, in any module that is loaded before the user asks for something.
HEAVY = frozenset(
    (
        *("torch", "triton", "numba", "numpy", "scipy", "pandas", "pyarrow", "h5py", "zarr", "anndata", "datasets"),
        *(
            "transformers",
            "tokenizers",
            "safetensors",
            "matplotlib",
            "sklearn",
            "umap",
            "optuna",
            "pynvml",
            "psutil",
            "pydantic",
            "tqdm",
        ),
    )
)
LIGHT = (
    FAST,
    *(f"{FAST}.{name}" for name in ("__main__", "errors", "cli", "progress", "arguments", "families")),
    *(f"{FAST}.families.{name}" for name in ("family", "settings", "geneformer", "bionemo", "aido_cell")),
    *(f"{FAST}.families.{name}" for name in ("scgpt", "scbert")),
    KERNELS,
    f"{KERNELS}.dispatch",
    f"{KERNELS}.target",
)
# Of LIGHT: the package itself, without its modules.
EXACT = {FAST, KERNELS, *(f"{FAST}.families{name}" for name in ("", ".scgpt", ".scbert"))}

# Inside one operation's folder: the files of the folder, and of the package, that each kind of file may import. Files
# in the package's folder for the CPU are named with it.
PACKAGE_FILES = {
    "dispatch",
    "target",
    "capability",
    "measured",
    "measured_int8",
    "launch",
    "layernorm",
    "on_device",
    "operators",
    "cpu.compiled",
    "cpu.kept",
    "cpu.float32_block",
    "cpu.float32_norm",
    "cpu.float32_products",
    "cpu.float32_tiles",
    "cpu.amx",
    "cpu.int8_amx",
    "cpu.int8_transpose",
    "cpu.int8_block",
    "cpu.int8_norm",
    "cpu.int8_products",
    "cpu.lanes",
    "cpu.llvm",
    "cpu.onednn",
    "arguments",
    "cpu.norm_rows",
    "cpu.parameters",
    "cpu.row_arithmetic",
    "dropout",
    "cpu.dropout_loops",
    "cpu.shares",
    "tiles",
    "int8_rows",
    "ranges",
    "workspace",
}
OPERATION_FILES: dict[str, tuple[set[str], set[str]]] = {
    "__init__": ({"op"}, set()),
    "op": (
        {"reference", "plan", "host", "kernel"},
        {
            "int8_rows",
            *("dispatch", "target", "launch", "on_device", "operators"),
            *("arguments", "cpu.onednn", "layernorm", "cpu.norm_rows", "dropout", "ranges", "workspace"),
            *(f"cpu.{name}" for name in ("float32_norm", "float32_products", "int8_norm", "int8_products")),
        },
    ),
    "host": (
        {"reference", "plan"},
        {
            *("dispatch", "target", "capability", "workspace"),
            *(f"cpu.{name}" for name in ("compiled", "float32_tiles", "llvm", "row_arithmetic", "shares")),
        },
    ),
    "kernel": ({"kernel"}, {"tiles"}),
    "plan": (set(), {"dispatch", "target", "launch"}),
    "reference": (set(), {"int8_rows"}),
}
PACKAGE_DIRECTIONS: dict[str, set[str]] = {
    "dispatch": {"target", "capability", "measured"},
    "target": set(),
    "capability": set(),
    "measured": set(),
    "measured_int8": set(),
    "launch": set(),
    "arguments": {"launch"},
    "int8_rows": {"launch", "target", "cpu.widened_rows"},
    "layernorm": {"arguments"},
    "on_device": {"dispatch", "target"},
    "operators": set(),
    "ranges": set(),
    "workspace": set(),
    "dropout": {"on_device", "operators", "cpu.dropout_loops", "cpu.shares"},
    "cpu.float32_block": {
        *(
            f"cpu.{name}"
            for name in ("compiled", "float32_norm", "float32_products", "parameters", "row_arithmetic", "shares")
        ),
        *("ranges", "workspace"),
    },
    "cpu.float32_norm": {
        *(f"cpu.{name}" for name in ("compiled", "lanes", "parameters", "row_arithmetic", "shares")),
        "workspace",
    },
    "cpu.float32_products": {
        *(f"cpu.{name}" for name in ("compiled", "float32_tiles", "int8_transpose", "lanes", "parameters")),
        *("cpu.row_arithmetic", "cpu.shares"),
        "workspace",
    },
    "cpu.float32_tiles": {"cpu.compiled", "cpu.llvm"},
    "cpu.amx": {"cpu.llvm"},
    "cpu.int8_amx": {"cpu.amx", "cpu.compiled", "cpu.llvm"},
    "cpu.int8_transpose": {"cpu.compiled", "cpu.llvm"},
    "cpu.int8_dot": {"cpu.compiled", "cpu.instructions", "cpu.llvm"},
    "cpu.int8_loops": {f"cpu.{name}" for name in ("compiled", "int8_amx", "int8_dot", "lanes", "row_arithmetic")},
    "cpu.int8_block": {
        *(f"cpu.{name}" for name in ("compiled", "int8_dot", "int8_loops", "int8_norm", "int8_products", "lanes")),
        *("cpu.row_arithmetic", "cpu.shares", "ranges", "workspace"),
    },
    "cpu.int8_norm": {f"cpu.{name}" for name in ("compiled", "lanes", "row_arithmetic", "shares")},
    "cpu.int8_pack": {"cpu.compiled", "cpu.int8_transpose"},
    "cpu.int8_products": {
        *(f"cpu.{name}" for name in ("instructions", "int8_amx", "int8_dot", "int8_loops", "int8_pack", "lanes")),
        *("cpu.row_arithmetic", "cpu.shares", "target", "workspace"),
    },
    "cpu.embed_rows": {"ranges", *(f"cpu.{name}" for name in ("compiled", "lanes", "row_arithmetic", "shares"))},
    "cpu.instructions": {"target"},
    "cpu.lanes": {"cpu.llvm"},
    "cpu.llvm": set(),
    "cpu.row_arithmetic": {"cpu.compiled", "cpu.lanes"},
    "cpu.onednn": {"target", "workspace"},
    "cpu.norm_rows": {"cpu.compiled", "cpu.parameters"},
    "cpu.parameters": set(),
    "cpu.widened_rows": {"cpu.compiled"},
    "cpu.dropout_loops": {"cpu.compiled"},
    "cpu.compiled": {"cpu.kept"},
    "cpu.kept": set(),
    "cpu.shares": set(),
    "tiles": set(),
}


@dataclass(frozen=True)
class Import:
    """One imported module as one module's source names it."""

    module: str
    target: str
    line: int
    is_lazy: bool
    is_typing: bool


@dataclass(frozen=True)
class Breach:
    """One place where the law is broken."""

    path: Path
    line: int
    module: str
    reason: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.module}: {self.reason}"


def is_under(module: str, name: str) -> bool:
    """Whether a module is the named one or lies in it."""
    return module == name or module.startswith(name + ".")


def module_files(root: Path) -> dict[str, Path]:
    """Module name -> file, for both packages below a repository root."""
    found: dict[str, Path] = {}
    for package, source_root in SOURCE_ROOTS.items():
        for path in sorted((root / source_root / package).rglob("*.py")):
            parts = path.relative_to(root / source_root).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports_of(module: str, path: Path, known: dict[str, Path], homes: dict[str, str]) -> Iterator[Import]:
    """Every module that one file imports, project modules resolved to the module that really holds the name."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    tree = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
    for node, is_lazy, is_typing in _import_nodes(tree):
        if isinstance(node, ast.Import):
            targets = {alias.name for alias in node.names}
        else:
            base = node.module or ""
            if node.level:
                anchor = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*anchor, *filter(None, [node.module])])
            targets = set()
            for alias in node.names:
                name = f"{base}.{alias.name}"
                targets.add(homes.get(name, name if name in known else base))
        for target in sorted(targets):
            yield Import(module, target, node.lineno, is_lazy, is_typing)


def _import_nodes(tree: ast.Module) -> Iterator[tuple[ast.Import | ast.ImportFrom, bool, bool]]:
    stack: list[tuple[ast.AST, bool, bool]] = [(tree, False, False)]
    while stack:
        node, is_lazy, is_typing = stack.pop()
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            yield node, is_lazy, is_typing
        elif isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            stack += [(child, is_lazy, True) for child in node.body]
            stack += [(child, is_lazy, is_typing) for child in node.orelse]
        else:
            inside = is_lazy or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            stack += [(child, inside, is_typing) for child in ast.iter_child_nodes(node)]


def lazy_homes(known: dict[str, Path]) -> dict[str, str]:
    """``package.name -> module`` from the ``_HOME`` tables with which the packages load names on first use."""
    homes: dict[str, str] = {}
    for package in SOURCE_ROOTS:
        if package not in known:
            continue
        for node in ast.parse(known[package].read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "_HOME":
                homes |= {f"{package}.{name}": home for name, home in ast.literal_eval(node.value).items()}
    return homes


def unit_of(module: str) -> str | None:
    """The name on :data:`LAYERS` a module belongs to; None where it is on no layer.

    ``package.__init__`` there is the package's own file alone.
    """
    names = [f"{module}.__init__" for layer in LAYERS if f"{module}.__init__" in layer] or [
        name for layer in LAYERS for name in layer if is_under(module, name)
    ]
    return max(names, key=len, default=None)


def level_of(unit: str) -> int:
    """Height of a unit of :data:`LAYERS`; a greater number is higher."""
    return next(len(LAYERS) - i for i, layer in enumerate(LAYERS) if unit in layer)


def breaches(root: Path) -> list[Breach]:
    """Every breach of the import law in a repository, in order of file and line."""
    known = module_files(root)
    homes = lazy_homes(known)
    found: list[Breach] = []
    runtime: list[Import] = []
    for module, path in known.items():
        if module != FAST and unit_of(module) is None:
            found.append(Breach(path, 1, module, "stands on no layer: give it a place in LAYERS of tools/layers.py"))
            continue
        for item in imports_of(module, path, known, homes):
            reasons = [
                *_direction(item),
                *_library(item),
                *_light(item),
                *(_kernels(item) if is_under(module, KERNELS) else ()),
            ]
            found += [Breach(path, item.line, module, reason) for reason in reasons]
            if item.target in known and not item.is_typing:
                runtime.append(item)
    found += _cycles(runtime, known)
    return sorted(found, key=lambda breach: (str(breach.path), breach.line, breach.reason))


def _direction(item: Import) -> Iterator[str]:
    for name, others, reason in FORBIDDEN:
        if is_under(item.module, name) and any(is_under(item.target, other) for other in others):
            yield f"must not import {item.target}: {reason}"
            return
    # The package itself holds the version and the lazy names only: everyone may import it, and its type imports are
    # free. A lazy name that is imported from it counts as an import of the module that holds it.
    if item.module == FAST or item.target == FAST:
        return
    if item.is_typing and item.module in DECLARING:
        return
    own, other = unit_of(item.module), unit_of(item.target)
    if own is not None and other is not None and level_of(other) > level_of(own):
        yield f"must not import {item.target}, which is on a layer above"


def _library(item: Import) -> Iterator[str]:
    library = item.target.partition(".")[0]
    if item.is_typing or library not in LIBRARY_HOMES:
        return
    allowed = LIBRARY_HOMES[library]
    if not any(is_under(item.module, home) for home in allowed):
        yield f"must not import {library}, which belongs in {', '.join(allowed) or 'no module'}"


def _light(item: Import) -> Iterator[str]:
    is_light = any(item.module == name or (name not in EXACT and is_under(item.module, name)) for name in LIGHT)
    if is_light and not item.is_lazy and not item.is_typing and item.target.partition(".")[0] in HEAVY:
        yield f"must not import {item.target} when loaded: move the import into the function that needs it"
    # Start time and memory of the tokenization pass: torch alone costs about 200 MB and a second or two.
    if (
        is_under(item.module, f"{FAST}.tokenization")
        and item.target.partition(".")[0] == "torch"
        and not item.is_typing
    ):
        yield "must not import torch: tokenization runs without it"


def _kernels(item: Import) -> Iterator[str]:
    library = item.target.partition(".")[0]
    parts = item.module.split(".")[1:]
    if parts[:1] != ["ops"] or len(parts) < 2:
        yield from _kernels_package_file(item, parts)
        return
    operation, file = parts[1], _part(parts[2] if len(parts) > 2 else "__init__")
    target = item.target.split(".")[1:]
    target[2:3] = map(_part, target[2:3])
    if library == KERNELS:
        own_files, package_files = OPERATION_FILES.get(file, (set(OPERATION_FILES), PACKAGE_FILES))
        if target[:1] == ["ops"] and target[1:2] != [operation]:
            yield f"must not import {item.target}: operations never import each other"
        elif target[:1] == ["ops"] and len(target) > 2 and target[2] not in own_files and target[2] in OPERATION_FILES:
            yield f"must not import {target[2]}.py of its folder"
        elif target[:1] != ["ops"] and target and _package_file(target) not in package_files:
            yield f"must not import {item.target}"
        if file == "op" and target[2:3] == ["kernel"] and not item.is_lazy:
            yield "must import kernel.py inside a function: triton may be absent"
    elif not item.is_typing:
        yield from _operation_library(file, library)


def _part(file: str) -> str:
    """What a file of an operation counts as: device code may be split by meaning, kernel.py and kernel_*.py."""
    return "kernel" if file.startswith("kernel_") else file


def _operation_library(file: str, library: str) -> Iterator[str]:
    if file == "plan" and library not in sys.stdlib_module_names:
        yield f"must not import {library}: a plan is pure standard library"
    elif file == "kernel" and library != "triton" and library not in sys.stdlib_module_names:
        yield f"must not import {library}: device code needs triton only, so that it compiles on any machine"
    elif file != "kernel" and library == "triton":
        yield "must not import triton, which belongs in kernel.py and tiles.py"


def _kernels_package_file(item: Import, parts: list[str]) -> Iterator[str]:
    library, target = item.target.partition(".")[0], item.target.split(".")[1:]
    file = _package_file(parts) if parts else "__init__"
    if library == "triton" and file != "tiles":
        yield "must not import triton, which belongs in kernel.py and tiles.py"
    if (
        library == KERNELS
        and file in PACKAGE_DIRECTIONS
        and target
        and _package_file(target) not in PACKAGE_DIRECTIONS[file]
    ):
        yield f"must not import {item.target}"


def _package_file(parts: list[str]) -> str:
    return ".".join(parts[:2]) if parts[0] == "cpu" else parts[0]


def _cycles(runtime: list[Import], known: dict[str, Path]) -> Iterator[Breach]:
    """Circles of modules, by imports that run when they load or later: two that need each other are one, or three."""
    graph: dict[str, dict[str, Import]] = {}
    for item in runtime:
        if item.module != item.target:
            graph.setdefault(item.module, {}).setdefault(item.target, item)
    for cycle in _cycles_of(graph):
        item = graph[cycle[0]][cycle[1]]
        yield Breach(known[item.module], item.line, item.module, f"is part of a cycle: {' -> '.join(cycle)}")


def _cycles_of(graph: dict[str, dict[str, Import]]) -> Iterator[list[str]]:
    """One cycle, as a path that ends where it began, through each edge that closes one in a depth-first walk."""
    finished: set[str] = set()
    for start in sorted(graph):
        path: list[str] = []
        stack: list[tuple[str, Iterator[str]]] = []
        if start not in finished:
            path.append(start)
            stack.append((start, iter(sorted(graph[start]))))
        while stack:
            node, rest = stack[-1]
            target = next(rest, None)
            if target is None:
                finished.add(node)
                stack.pop()
                path.pop()
            elif target in path:
                yield [*path[path.index(target) :], target]
            elif target not in finished:
                path.append(target)
                stack.append((target, iter(sorted(graph.get(target, {})))))


def main() -> int:
    """Print every breach of the law in this repository."""
    root = Path(__file__).resolve().parent.parent
    found = breaches(root)
    for breach in found:
        print(Breach(breach.path.relative_to(root), breach.line, breach.module, breach.reason))
    print(f"{len(found)} breaches of the import law in {len(module_files(root))} modules")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
