"""Imports go one way: the face -> dispatch -> launching -> planning, kernels beside; within a folder, from a later file to an
earlier one. The kernels know neither torch nor problems, planning nothing but the standard library.
"""

import ast
import pathlib
import re
import subprocess
import sys

import pytest

import tconv

ROOT = pathlib.Path(tconv.__file__).parent
# Each folder imports from itself and from these; "" is the face.
BELOW = {
    "": {"tune", "rehearsal", "dispatch", "launching", "records", "planning"},
    "tune": {"rehearsal", "dispatch", "launching", "records", "planning"},
    "rehearsal": {"dispatch", "launching", "planning"},
    "dispatch": {"launching", "records", "planning"},
    "launching": {"records", "planning", "kernels"},
    "records": {"planning"},
    "planning": set(),
    "kernels": set(),
}
# The face from top to bottom; a file imports what stands in a later row. In the other folders the docstring of __init__.py
# lists the files in reading order, and a file imports earlier ones.
FACE = [
    ("__init__",),
    ("precompile", "distributed", "restored", "freeze", "fuse"),
    ("explain", "swap", "rewrite"),
    ("chain",),
    ("subclasses",),
    ("fused", "causal", "fp8", "normalise"),
    ("modules", "override", "decompositions", "graph_pass"),
    ("functional",),
]


def imports(path):
    """Every name that a file imports, anywhere in it, in full: of `from a import b`, "a.b"."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def place(name):
    """(folder, file) of an imported name of tconv's, else None.

    A name that a module holds counts as the module. One that no folder and no file has is __init__'s: `tconv` itself and
    `tconv.Tile` are the face's.
    """
    package, *parts = name.split(".")
    if package != "tconv":
        return None
    folder = parts.pop(0) if parts and parts[0] in BELOW else ""
    return folder, parts[0] if parts and (ROOT / folder / f"{parts[0]}.py").exists() else "__init__"


def listed(folder):
    """The files that a folder's docstring lists, in its order."""
    text = ast.get_docstring(ast.parse((ROOT / folder / "__init__.py").read_text()), clean=False)
    return re.findall(r"^    (\w+)  ", text, flags=re.M)


def order(folder):
    """File -> its height: a file may import lower ones."""
    if not folder:
        return {name: -row for row, names in enumerate(FACE) for name in names}
    return {name: row for row, name in enumerate(listed(folder))}


@pytest.mark.parametrize("folder", BELOW)
def test_every_file_has_its_place(folder):
    assert {p.stem for p in (ROOT / folder).glob("*.py")} - ({"__init__"} if folder else set()) == set(order(folder))


@pytest.mark.parametrize("folder", BELOW)
def test_folders_import_downwards_only(folder):
    for path in (ROOT / folder).glob("*.py"):
        for found in filter(None, map(place, imports(path))):
            assert found[0] == folder or found[0] in BELOW[folder], f"{folder}/{path.stem} imports {'/'.join(found)}"


@pytest.mark.parametrize("folder", BELOW)
def test_files_import_what_is_read_before_them(folder):
    height = order(folder)
    for path in (ROOT / folder).glob("*.py"):
        for found in filter(None, map(place, imports(path))):
            if found[0] == folder and path.stem in height:
                assert found[1] in height, f"{path.stem} imports {folder} itself"
                assert height[found[1]] < height[path.stem], f"{path.stem} imports {found[1]}"


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("tconv", ("", "__init__")),
        ("tconv.Tile", ("", "__init__")),
        ("tconv.swap", ("", "swap")),
        ("tconv.swap.replace_", ("", "swap")),
        ("tconv.planning", ("planning", "__init__")),
        ("tconv.planning.plan", ("planning", "plan")),
        ("tconv.planning.plan.Plan", ("planning", "plan")),
        ("tconv.planning.nowhere", ("planning", "__init__")),
        ("torch.nn", None),
    ],
)
def test_where_an_imported_name_belongs(name, found):
    assert place(name) == found


def test_folders_have_no_circle():
    for folder, below in BELOW.items():
        assert not any(folder in BELOW[other] for other in below)


HELPERS = {
    "common": (), "epilogue": ("tconv.kernels.common",), "normalise": ("tconv.kernels.common", "tconv.kernels.epilogue"),
    "causal": ("tconv.kernels.common", "tconv.kernels.epilogue.activated", "tconv.kernels.epilogue.gradient"),
    "tma": ("tconv.kernels.common", "tconv.kernels.epilogue"),
    "persistent": ("tconv.kernels.common", "tconv.kernels.epilogue", "types"),
}  # fmt: skip


def test_kernels_import_triton_and_each_others_helpers_only():
    for path in (ROOT / "kernels").glob("*.py"):
        for name in imports(path):
            allowed = ("triton", "functools", "inspect") + HELPERS.get(
                path.stem, ("tconv.kernels.common", "tconv.kernels.epilogue.finish")
            )
            assert name.startswith(allowed), f"kernels/{path.stem} imports {name}"


def test_planning_needs_nothing_but_the_standard_library():
    import sys

    for path in (ROOT / "planning").glob("*.py"):
        outside = {name.split(".")[0] for name in imports(path)} - set(sys.stdlib_module_names) - {"tconv"}
        # device.py asks torch for the device here, in the one function that does.
        assert outside <= ({"torch"} if path.stem == "device" else set()), path.stem


def test_importing_tconv_leaves_heavy_modules_out():
    """They are imported where they are needed: sympy alone takes three times as long as all of tconv."""
    heavy = ("triton", "sympy", "torch._dynamo", "torch._inductor", "torch.distributed.tensor")
    code = (
        f"import sys, torch; had = set(sys.modules); import tconv; print([m for m in {heavy} if m in sys.modules.keys() - had])"
    )
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT.parent, capture_output=True, text=True, check=True).stdout
    assert found == "[]\n"
