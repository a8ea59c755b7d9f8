"""Data goes one way: a file imports only what lies below it, and the kernels know neither torch nor problems."""

import ast
import pathlib

import tconv

ROOT = pathlib.Path(tconv.__file__).parent
# Top to bottom; a file may import what stands in a later row.
ROWS = [
    ("__init__",),
    ("precompile", "distributed", "restored"),
    ("explain", "swap", "variants"),
    ("rehearsal", "subclasses"),
    ("modules", "override", "decompositions"),
    ("aten", "chain", "scope"),
    ("functional", "selection"),
    ("repeat",),
    ("autograd",),
    ("ops",),
    ("equivalents",),
    ("launch",),
    ("compiled",),
    ("prepare",),
    ("boxes",),
    ("arguments", "profiled"),
    ("record", "dry", "guard", "state", "opaque"),
    ("plan", "layout", "window"),
    ("cost",),
    ("configs", "kernels", "simplify", "strips"),
    ("problem", "kinds"),
    ("device",),
]
RANK = {name: row for row, names in enumerate(ROWS) for name in names}


def imports(path):
    """Every module that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: relative import"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_every_file_has_its_place():
    assert {p.stem for p in ROOT.glob("*.py")} | {"kernels"} == set(RANK)


def test_files_import_downwards_only():
    for path in ROOT.glob("*.py"):
        for name in imports(path):
            parts = name.split(".")
            if parts[0] == "tconv" and len(parts) > 1 and parts[1] in RANK:
                assert RANK[parts[1]] > RANK[path.stem], f"{path.stem} imports {parts[1]}"


def test_kernels_import_triton_and_each_others_helpers_only():
    for path in (ROOT / "kernels").glob("*.py"):
        for name in imports(path):
            allowed = ("triton", "functools", "inspect") + (("tconv.kernels.common",) if path.stem != "common" else ())
            assert name.startswith(allowed), f"kernels/{path.stem} imports {name}"


def test_the_ground_needs_nothing_but_the_standard_library():
    for stem in ("problem", "kinds", "configs", "cost", "plan", "record", "simplify", "strips"):
        assert not any(name.split(".")[0] in ("torch", "triton") for name in imports(ROOT / f"{stem}.py"))
