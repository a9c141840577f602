"""Imports go one way down, files and functions stay small. Read from the source: nothing is imported."""

import ast
from pathlib import Path

import pytest

# From the bottom up; a module may import what stands on a lower line. A package stands for all its modules,
# which may import one another if they are COHESIVE, except in a cycle.
LAYERS = (
    ("prefix_fast.kernels.primitives", "prefix_fast.cuda_build"),
    ("prefix_fast.kernels.row_major", "prefix_fast.kernels.key_major"),
    ("prefix_fast.kernels.attend",),
    ("prefix_fast.kernels.prefix_attention_bwd_dq",),
    ("prefix_fast.kernels",),
    ("prefix_fast.backends.problem", "prefix_fast.backends.triton_config", "prefix_fast.files", "prefix_fast.kept"),
    ("prefix_fast.backends.triton_neighbours", "prefix_fast.backends.shapes", "prefix_fast.half"),
    ("prefix_fast.backends.triton_vetting",),
    ("prefix_fast.backends.triton_call", "prefix_fast.backends.triton_cost", "prefix_fast.backends.triton_partials"),
    ("prefix_fast.backends.triton_decode", "prefix_fast.backends.cuda_vetting"),
    ("prefix_fast.backends.triton_forward",),
    ("prefix_fast.backends.triton_short",),
    ("prefix_fast.backends.triton_backward",),
    (
        "prefix_fast.backends.reference",
        "prefix_fast.backends.native",
        "prefix_fast.backends.triton",
        "prefix_fast.backends.cuda",
    ),
    ("prefix_fast.backends.native_cost", "prefix_fast.backends.cross_entropy", "prefix_fast.backends.pointwise"),
    ("prefix_fast.backends",),
    ("prefix_fast.ops", "prefix_fast.checks"),
    ("prefix_fast.dispatch",),
    ("prefix_fast.functional",),
    ("prefix_fast.testing", "prefix_fast.geometry", "prefix_fast.choice", "prefix_fast.linears", "prefix_fast.sources"),
    ("prefix_fast.modules", "prefix_fast.linear_loss", "prefix_fast.pointwise"),
    ("prefix_fast.selfcheck",),
    ("prefix_fast.tuning",),
    ("prefix_fast.parametrisation", "prefix_fast.initialisation", "prefix_fast.checkpoint"),
    ("prefix_fast.original", "prefix_fast.adapters_files", "prefix_fast.bank_files"),
    ("prefix_fast.prefix",),
    ("prefix_fast.bank", "prefix_fast.conversion"),
    ("prefix_fast.models",),
    ("prefix_fast.patching",),
    ("prefix_fast.training",),
    ("prefix_fast.demo", "prefix_fast.doctor", "prefix_fast.prediction", "prefix_fast.speed"),
    ("prefix_fast.doctor_report",),
    ("prefix_fast.cli",),
    ("prefix_fast",),
)
COHESIVE = {"prefix_fast.models", "prefix_fast.training"}
MAX_LINES, MAX_FUNCTION = 400, 80


def layer_of(module: str) -> int | None:
    """The line of the longest name that covers the module; the bare package covers nothing but itself."""
    fits = [
        (len(name), line)
        for line, names in enumerate(LAYERS)
        for name in names
        if module == name or (name != "prefix_fast" and module.startswith(name + "."))
    ]
    return max(fits)[1] if fits else None


def imported(module: str, is_package: bool, source: str, modules: set[str]) -> set[str]:
    """Every module of ours, or named `kernels`, that the source imports, at any depth of nesting."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = module.split(".")[
                    : None if is_package and node.level == 1 else (1 if is_package else 0) - node.level
                ]
                base = ".".join([*parents, base] if base else parents)
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                found.add(inner if inner in modules else base)
        elif isinstance(node, ast.Call) and node.args:
            # importlib.import_module("prefix_fast.x") is an edge too.
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            first = node.args[0]
            if called in {"import_module", "__import__"} and isinstance(first, ast.Constant):
                found.add(str(first.value))
    return {name for name in found if name.split(".")[0] in {"prefix_fast", "kernels"}}


def cycles(edges: dict[str, set[str]]) -> list[str]:
    """One line for every module that imports itself by way of others."""
    lines = []
    for start in edges:
        reached, todo = set(), set(edges[start])
        while todo:
            module = todo.pop()
            reached.add(module)
            todo |= edges.get(module, set()) - reached
        if start in reached:
            lines.append(f"{start} imports itself by way of others")
    return lines


def violations(sources: dict[str, tuple[bool, str]]) -> list[str]:
    """One line for every edge that goes up or sideways. Sources: module → (is a package, its text)."""
    lines, within = [], {}
    for module, (is_package, source) in sources.items():
        upper = layer_of(module)
        if upper is None:
            lines.append(f"{module} has no layer")
            continue
        for target in imported(module, is_package, source, set(sources)):
            lower = layer_of(target)
            if target.split(".")[0] == "kernels":
                lines.append(f"{module} imports {target} instead of prefix_fast.kernels")
            elif lower is None:
                lines.append(f"{module} imports {target}, which has no layer")
            elif lower == upper and LAYERS[upper][0] in COHESIVE:
                within.setdefault(module, set()).add(target)
            elif lower >= upper and target != module:
                lines.append(f"{module} imports {target}, which is not below it")
    return lines + cycles(within)


def read_sources(root: Path) -> dict[str, tuple[bool, str]]:
    """All modules of the package, kernels included."""
    sources = {}
    for folder, name in ((root / "prefix_fast", "prefix_fast"), (root / "kernels", "prefix_fast.kernels")):
        for file in sorted(folder.rglob("*.py")):
            is_package = file.name == "__init__.py"
            parts = file.relative_to(folder).with_suffix("").parts
            module = ".".join((name, *(parts[:-1] if is_package else parts)))
            sources[module] = (is_package, file.read_text(encoding="utf-8"))
    return sources


def test_imports_go_down(root: Path) -> None:
    sources = read_sources(root)
    assert {"prefix_fast", "prefix_fast.functional", "prefix_fast.backends.reference"} <= set(sources)
    assert violations(sources) == []


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("prefix_fast.backends.native", "from prefix_fast.functional import prefix_attention"),
        ("prefix_fast.backends.native", "from prefix_fast.backends.reference import forward"),
        ("prefix_fast.backends.native", "from prefix_fast.backends import reference"),
        ("prefix_fast.backends.reference", "from . import native"),
        ("prefix_fast.backends.reference", "from .native import forward"),
        ("prefix_fast.backends.reference", "from ..functional import prefix_attention"),
        ("prefix_fast.backends.problem", "import prefix_fast"),
        ("prefix_fast.ops", "from prefix_fast import functional"),
        ("prefix_fast.ops", "def late():\n    from prefix_fast import dispatch"),
        ("prefix_fast.functional", "import importlib\nimportlib.import_module('prefix_fast.patching')"),
        ("prefix_fast.functional", "import kernels.primitives"),
        ("prefix_fast.functional", "from kernels import primitives"),
        ("prefix_fast.kernels", "from prefix_fast.backends import problem"),
        ("prefix_fast.models", "from prefix_fast.patching import patch"),
        ("prefix_fast.unheard_of", "import torch"),
    ],
)
def test_edge_up_or_sideways_is_found(root: Path, module: str, line: str) -> None:
    sources = read_sources(root)
    for name in (
        "functional",
        "dispatch",
        "ops",
        "patching",
        "models",
        "backends.native",
        "backends.reference",
    ):
        sources.setdefault(f"prefix_fast.{name}", (name == "models", ""))
    is_package, source = sources.get(module, (False, ""))
    before = violations(sources)
    sources[module] = (is_package, f"{source}\n{line}\n")
    new = [found for found in violations(sources) if found not in before]
    assert len(new) == 1
    assert new[0].startswith(module)


def test_cycle_within_a_package_is_found() -> None:
    sources = {
        "prefix_fast.models": (True, ""),
        "prefix_fast.models.hub": (False, "from prefix_fast.models import peft"),
        "prefix_fast.models.peft": (False, "from .hub import adapter"),
    }
    assert violations(sources) == [
        "prefix_fast.models.hub imports itself by way of others",
        "prefix_fast.models.peft imports itself by way of others",
    ]


def too_large(name: str, source: str) -> list[str]:
    """One line for a file, or a function in it without its docstring, past the limit."""
    count = source.count("\n")
    lines = [f"{name} has {count} lines"] if count > MAX_LINES else []
    if name.endswith(".py"):
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef) and node.end_lineno is not None:
                first = node.body[0]
                text = first.end_lineno - first.lineno + 1 if ast.get_docstring(node) is not None else 0
                length = node.end_lineno - node.lineno + 1 - text
                if length > MAX_FUNCTION:
                    lines.append(f"{name}: {node.name} has {length} lines")
    return lines


def test_files_and_functions_stay_small(root: Path) -> None:
    files = [
        file
        for folder in ("prefix_fast", "kernels", "csrc", "tests", "benchmarks")
        for file in sorted((root / folder).rglob("*"))
        if file.suffix in {".py", ".cpp", ".cu", ".h", ".cuh", ".inl"}
    ]
    assert len(files) > 10
    assert [line for file in files for line in too_large(str(file.relative_to(root)), file.read_text("utf-8"))] == []


def test_large_file_and_function_are_found() -> None:
    body = "    x = 1\n" * MAX_FUNCTION
    assert too_large("a.py", f"def long():\n    '''Text.'''\n{body}") == [f"a.py: long has {MAX_FUNCTION + 1} lines"]
    assert too_large("a.cpp", "\n" * (MAX_LINES + 1)) == [f"a.cpp has {MAX_LINES + 1} lines"]
