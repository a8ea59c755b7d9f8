"""The machine code of the kernels that matter most, compiled for Hopper without a GPU.

`scripts/codegen.py --check` holds every variant to its budget; this is the part of it that fits a test run.
"""

import json
import os
import pathlib
import subprocess
import sys

import pytest
import triton

ROOT = pathlib.Path(__file__).parent.parent
GEMM = r"(gather|wgrad) [123]d bf16 .*inner=cc[io]? vec=8/8(/8)?( even)?( split)?$"
DIRECT = r"depthwise(_wgrad)? 2d bf16 .*inner=cc vec=8/8( split)?$"


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Rows of scripts/codegen.py for the 16-bit channels_last variants, in a process without the interpreter."""
    out = tmp_path_factory.mktemp("codegen") / "rows.json"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, ROOT / "scripts" / "codegen.py", "--quick", "--only", f"{GEMM}|{DIRECT}", "--json", out]
    done = subprocess.run([*command, "--jobs", "1"], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(out.read_text())["variants"]


def test_16_bit_channels_last_uses_the_tensor_cores_and_wide_asynchronous_copies(rows):
    gemm = [row for row in rows if not row["memory_bound"]]
    assert {row["name"].split()[0] for row in gemm} == {"fprop", "dgrad", "wgrad"}
    assert {row["name"].split()[2] for row in gemm} == {"1d", "2d", "3d"}
    for row in gemm:
        assert row["mma_kind"] == "HGMMA", row
        assert not row["register_detour"], row
        assert row["async_copy_bytes"] == 16, row
        assert row["narrow_loads"] == 0, row
        assert row["loop_instructions"] > 0, row


def test_direct_kernels_read_and_write_16_bytes_at_a_time(rows):
    direct = [row for row in rows if row["memory_bound"]]
    assert {row["name"].split()[0] for row in direct} == {"fprop", "dgrad", "wgrad"}
    for row in direct:
        assert row["wide_loads"] > 0, row
        assert row["name"].startswith("wgrad") or row["wide_stores"] == row["stores"], row


def test_nothing_spills(rows):
    assert [row["name"] for row in rows if row["spills"] or row["stack_bytes"]] == []


def test_within_the_budget(rows):
    sys.path.insert(0, str(ROOT / "scripts"))
    import codegen

    version = ".".join(triton.__version__.split(".")[:2])
    budgets = json.loads(codegen.BUDGET.read_text())
    if version not in budgets:
        pytest.skip(f"no budget for Triton {version}")
    assert codegen.regressions(rows, budgets[version]) == []


def test_a_regression_is_named():
    sys.path.insert(0, str(ROOT / "scripts"))
    import codegen

    row = {
        "name": "a", "arch": "sm_90", "spills": 0, "loop_spills": 0,
        "narrow_loads": 0, "registers": 100, "shared_bytes": 10, "stack_bytes": 0,
        "loop_instructions": 100, "mma_kind": "HGMMA", "register_detour": False, "async_copy_bytes": 16,
    }  # fmt: skip
    budget = {"sm_90": {"a": row}}
    assert codegen.regressions([row], budget) == []
    for key, worse in {
        "spills": 1, "narrow_loads": 1, "registers": 109, "shared_bytes": 11, "loop_instructions": 111, "mma_kind": "HMMA",
        "register_detour": True, "async_copy_bytes": 4, "stack_bytes": 8,
    }.items():  # fmt: skip
        assert [key in line for line in codegen.regressions([row | {key: worse}], budget)] == [True]
    assert "not in the budget" in codegen.regressions([row | {"name": "b"}], budget)[0]
    assert "does not compile" in codegen.regressions([{"name": "a", "arch": "sm_90", "error": "E"}], budget)[0]
