"""Real text that every machine has: Python's own doc strings (signature and description → summary line).

The files of the standard library and of some of torch are parsed, never imported, in sorted order: the same Python and
torch give the same examples in the same order.
"""

import ast
import importlib.util
import inspect
import sysconfig
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path

from prefix_fast.training.tables import Example

TORCH_PACKAGES = ("distributions", "nn", "optim", "utils/data")
_SKIPPED_FOLDERS = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idle_test", "idlelib", "lib2to3", "ensurepip", "__pycache__"}
)
_MAX_DESCRIPTION_CHARACTERS = 600


def pydoc_examples() -> dict[str, list[Example]]:
    """Return the splits ``train``, ``validation`` and ``test`` (about 90, 5 and 5 % of the modules).

    A module belongs to one split by a checksum of its name, and a summary that occurs in training is not held out, so
    that neither a neighbour nor a copy of a held-out text has been trained on.
    """
    splits: dict[str, dict[Example, None]] = {"train": {}, "validation": {}, "test": {}}
    for module, path in _source_files():
        split = splits[_split_of(module)]
        split.update(dict.fromkeys(_module_examples(module, path)))
    trained = {example.targets for example in splits["train"]}
    held_out = {name: [e for e in splits[name] if e.targets not in trained] for name in ("validation", "test")}
    return {"train": list(splits["train"]), **held_out}


def _split_of(module: str) -> str:
    bucket = zlib.crc32(module.encode()) % 20
    return {0: "test", 1: "validation"}.get(bucket, "train")


def _source_files() -> Iterator[tuple[str, Path]]:
    """(dotted module name, file) of everything that is read, sorted within each package."""
    roots = [("", Path(sysconfig.get_paths()["stdlib"]))]
    torch = importlib.util.find_spec("torch")
    if torch is not None and torch.submodule_search_locations:
        base = Path(torch.submodule_search_locations[0])
        roots += [(f"torch.{package.replace('/', '.')}.", base / package) for package in TORCH_PACKAGES]
    for prefix, root in roots:
        files = sorted((path.relative_to(root).parts, path) for path in root.rglob("*.py"))
        for parts, path in files:
            if _SKIPPED_FOLDERS.isdisjoint(parts):
                yield (prefix + ".".join((*parts[:-1], path.stem))).removesuffix(".__init__"), path


def _module_examples(module: str, path: Path) -> Iterator[Example]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's strings
            tree = ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError):
        return  # templates and files for other Python versions
    yield from _walk(tree, module)


def _walk(node: ast.AST, scope: str) -> Iterator[Example]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            name = f"{scope}.{child.name}"
            example = _example_of(child, name)
            if example is not None:
                yield example
            yield from _walk(child, name)


def _example_of(node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef, name: str) -> Example | None:
    """The pair of one definition, if its doc string opens with a one-line summary that is a sentence."""
    doc = inspect.cleandoc(ast.get_docstring(node, clean=False) or "")
    summary, _, description = doc.partition("\n")
    follows_blank_line = not description or description.startswith("\n")
    if not (follows_blank_line and _is_sentence(summary)):
        return None
    description = description.strip()
    if len(description) > _MAX_DESCRIPTION_CHARACTERS:
        description = description[:_MAX_DESCRIPTION_CHARACTERS].rsplit(maxsplit=1)[0]
    return Example(f"{_signature(node, name)}\n{description}".strip(), (summary,))


def _is_sentence(line: str) -> bool:
    words = line.split()
    return line.isascii() and 4 <= len(words) <= 25 and line.endswith(".") and line[0].isupper() and ">>>" not in line


def _signature(node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef, name: str) -> str:
    if isinstance(node, ast.ClassDef):
        return f"class {name}({', '.join(map(ast.unparse, node.bases))})"
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    return f"def {name}({ast.unparse(node.args)}){returns}"
