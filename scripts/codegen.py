#!/usr/bin/env python3
"""Compiles every kernel variant that the planner picks for the layers of bench/layers.json, without a GPU, and reads the
machine code: registers, spills, shared memory, tensor-core instructions, widths of memory accesses, loop length.

    python scripts/codegen.py                          # table for sm_90
    python scripts/codegen.py --arch sm_80 --arch gfx942 --json out/codegen.json
    python scripts/codegen.py --check                  # against bench/codegen_budget.json; exit status 1 on a regression
    python scripts/codegen.py --update                 # rewrite the budget of this Triton version and these architectures
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

BUDGET = ROOT / "bench" / "codegen_budget.json"
ARCHS = {  # name: (backend, architecture, warp size, bytes of shared memory a program may use, multiprocessors)
    "sm_80": ("cuda", 80, 32, 166912, 108),
    "sm_90": ("cuda", 90, 32, 232448, 132),
    "sm_100": ("cuda", 100, 32, 232448, 148),
    "gfx942": ("hip", "gfx942", 64, 65536, 304),
}
COLUMNS = (
    ("registers", "regs"), ("spills", "spill"), ("loop_spills", "loopsp"), ("shared_bytes", "smem"), ("mma", "mma"),
    ("mma_kind", "kind"), ("register_detour", "detour"), ("async_copies", "async"), ("async_copy_bytes", "bytes"),
    ("narrow_loads", "narrow"), ("tma_loads", "tma"), ("loop_instructions", "loop"),
)  # fmt: skip


def layers(quick: bool) -> list[tuple[Any, str]]:
    """(problem, name) of the suite's layers; a few of each kind if quick."""
    from tconv.problem import forward_problem, transposed_problem

    found = []
    for row in json.loads((ROOT / "bench" / "layers.json").read_text()):
        x = (row["N"], row["C"], *row["spatial"])
        if "transpose" in row["op"]:
            w = (row["C"], row["K"] // row["groups"], *row["kernel"])
            problem = transposed_problem(
                x, w, row["stride"], row["padding"], row["output_padding"], row["dilation"], row["groups"]
            )
        else:
            w = (row["K"], row["C"] // row["groups"], *row["kernel"])
            problem = forward_problem(x, w, row["stride"], [(p, p) for p in row["padding"]], row["dilation"], row["groups"])
        found.append((problem, row["name"]))
    return found[::6] if quick else found


def collect(arch: str, quick: bool) -> dict[str, Any]:
    """name -> Variant over layers, dtypes and layouts, as planned for a device of that architecture."""
    import torch

    from tconv.device import Device
    from tconv.variants import float32_precision, variants

    _, _, _, shared, units = ARCHS[arch]
    device = Device(arch, units, shared)
    found: dict[str, Any] = {}
    settings = [(torch.bfloat16, True), (torch.float16, True), (torch.float32, True), (torch.float32, False)]
    settings += [] if quick else [(torch.float64, False)]
    for problem, _ in layers(quick):
        for dtype, tf32 in settings:
            with float32_precision(tf32):
                for channels_last in (True, False):
                    for v in variants(problem, dtype, channels_last, device):
                        found.setdefault(v.name, v)
    return found


def compile_one(task: tuple[str, str, bool]) -> dict[str, Any]:
    """Compiles the variant of that name for an architecture and reads its machine code. Runs in a process of its own."""
    arch, name, quick = task
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    variant = _collected(arch, quick)[name]
    names = list(variant.signature)
    pointers = [i for i, n in enumerate(names) if variant.signature[n].startswith("*")]
    source = ASTSource(
        fn=variant.kernel,
        signature=variant.signature,
        constexprs={(names.index(n),): v for n, v in variant.constants.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i in pointers},
    )
    backend, target, warp, shared, _ = ARCHS[arch]
    try:
        kernel = triton.compile(source, target=GPUTarget(backend, target, warp), options=dict(variant.options))
    except Exception as e:  # the table says so, the other variants go on
        return {"name": name, "arch": arch, "error": f"{type(e).__name__}: {str(e).splitlines()[0] if str(e) else ''}"}
    row = {"name": name, "arch": arch, "memory_bound": variant.memory_bound}
    row |= _read_sass(kernel) if backend == "cuda" else _read_amdgcn(kernel)
    row |= {"shared_bytes": kernel.metadata.shared, "shared_limit": shared}
    return row


_cache: dict[tuple[str, bool], dict[str, Any]] = {}


def _collected(arch: str, quick: bool) -> dict[str, Any]:
    if (arch, quick) not in _cache:
        _cache[arch, quick] = collect(arch, quick)
    return _cache[arch, quick]


def _loop(lines: list[str], back_edges: list[tuple[int, int]], wanted: str) -> tuple[int, int]:
    """The shortest loop that holds most of the wanted instructions, as (first, last) line; (0, -1) if there is none."""
    best, found = (0, (0, -1))
    for first, last in back_edges:
        n = sum(bool(re.search(wanted, line)) for line in lines[first : last + 1])
        if n > best or (n == best and n and last - first < found[1] - found[0]):
            best, found = n, (first, last)
    return found


def _read_sass(kernel: Any) -> dict[str, Any]:
    import triton

    tools = pathlib.Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(kernel.asm["cubin"])
        f.flush()
        usage = subprocess.run([tools / "cuobjdump", "-res-usage", f.name], capture_output=True, text=True).stdout
        sass = subprocess.run([tools / "nvdisasm", "-c", f.name], capture_output=True, text=True).stdout
    resources = dict(word.split(":")[:2] for word in usage.split() if word.count(":") == 1)
    lines: list[str] = []
    labels: dict[str, int] = {}
    for line in sass.splitlines():
        label = re.match(r"\s*(\.L_x_\d+):", line)
        if label:
            labels[label[1]] = len(lines)
        elif re.search(r"/\*[0-9a-f]{4,}\*/", line):
            lines.append(line)
    edges = []
    for i, line in enumerate(lines):
        target = re.search(r"BRA.*(\.L_x_\d+)", line)
        if target and labels.get(target[1], i + 1) <= i:
            edges.append((labels[target[1]], i))
    mma = r"\b(HGMMA|QGMMA|IGMMA|UTCHMMA|UTCQMMA|HMMA|DMMA|OMMA)"
    kinds = collections.Counter(m[1] for line in lines if (m := re.search(mma, line)))
    first, last = _loop(lines, edges, mma if kinds else r"\b(FFMA|DFMA|FMUL|HFMA2|FADD|DADD)")
    inside = lines[first : last + 1]
    copies = [line for line in lines if re.search(r"\bLDGSTS", line)]
    widths = {16 if ".128" in c else 8 if ".64" in c else 4 for c in copies}
    return {
        "registers": int(resources.get("REG", 0)),
        "spills": sum(bool(re.search(r"\b(LDL|STL)", line)) for line in lines),
        "loop_spills": sum(bool(re.search(r"\b(LDL|STL)", line)) for line in inside),
        "stack_bytes": int(resources.get("STACK", 0)),
        "mma": sum(kinds.values()),
        "mma_kind": kinds.most_common(1)[0][0] if kinds else "",
        "register_detour": any(re.search(r"\bHGMMA\S* R\d+, R\d+", line) for line in lines),
        "tma_loads": sum("UTMALDG" in line for line in lines),
        "async_copies": len(copies),
        "async_copy_bytes": min(widths) if widths else 0,
        "narrow_loads": sum(bool(re.search(r"\bLDG\.E\.(U16|S16|U8|S8)", line)) for line in inside),
        "wide_loads": sum(bool(re.search(r"\bLDG\.E\.128", line)) for line in inside),
        "wide_stores": sum(bool(re.search(r"\bSTG\.E\.128", line)) for line in lines),
        "stores": sum(bool(re.search(r"\bSTG\.", line)) for line in lines),
        "loop_instructions": len(inside),
    }


def _read_amdgcn(kernel: Any) -> dict[str, Any]:
    text = kernel.asm["amdgcn"]

    def note(key: str) -> int:
        found = re.search(rf"\.{key}:\s*(\d+)", text)
        return int(found[1]) if found else 0

    lines: list[str] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        label = re.match(r"(\.L\w+):", line)
        if label:
            labels[label[1]] = len(lines)
        elif re.match(r"\t[a-z]\w+", line) and not line.startswith("\t."):
            lines.append(line)
    edges = []
    for i, line in enumerate(lines):
        target = re.search(r"s_c?branch\w*\s+(\.L\w+)", line)
        if target and labels.get(target[1], i + 1) <= i:
            edges.append((labels[target[1]], i))
    kinds = collections.Counter(m[1] for line in lines if (m := re.search(r"\b(v_mfma_\w+)", line)))
    first, last = _loop(lines, edges, "v_mfma" if kinds else r"\bv_(pk_)?(fma|mul|add|fmac)_f")
    inside = lines[first : last + 1]
    return {
        "registers": note("vgpr_count"),
        "spills": note("vgpr_spill_count") + note("sgpr_spill_count"),
        "loop_spills": sum("scratch_" in line for line in inside),
        "stack_bytes": note("private_segment_fixed_size"),
        "mma": sum(kinds.values()),
        "mma_kind": kinds.most_common(1)[0][0] if kinds else "",
        "register_detour": False,
        "tma_loads": 0,
        "async_copies": sum("buffer_load" in line and " lds" in line for line in lines),
        "async_copy_bytes": 0,
        "narrow_loads": sum(bool(re.search(r"(global|buffer)_load_(ushort|ubyte|short|sbyte)", line)) for line in inside),
        "wide_loads": sum(bool(re.search(r"(global|buffer)_load_dwordx4", line)) for line in inside),
        "wide_stores": sum(bool(re.search(r"(global|buffer)_store_dwordx4", line)) for line in lines),
        "stores": sum(bool(re.search(r"(global|buffer)_store", line)) for line in lines),
        "loop_instructions": len(inside),
    }


def compile_all(archs: list[str], quick: bool, jobs: int, only: str) -> list[dict[str, Any]]:
    """Rows of every variant on every architecture, compiled in parallel under a progress bar."""
    tasks = [(arch, name, quick) for arch in archs for name in sorted(_collected(arch, quick)) if re.search(only, name)]
    rows = []
    with concurrent.futures.ProcessPoolExecutor(jobs) as pool:
        done = pool.map(compile_one, tasks, chunksize=1)
        for row in _progress(done, len(tasks)):
            rows.append(row)
    return rows


def _progress(items: Any, total: int) -> Any:
    try:
        from tqdm import tqdm
    except ImportError:
        return items
    return tqdm(items, total=total, desc="compiling", unit="variant", disable=not sys.stderr.isatty())


def regressions(rows: list[dict[str, Any]], budget: dict[str, Any]) -> list[str]:
    """What is worse than the budget, one line each. Registers may grow by 8 and loops by a tenth before it counts."""
    found = []
    for row in rows:
        label = f"{row['arch']} {row['name']}"
        if "error" in row:
            found.append(f"{label}: does not compile: {row['error']}")
            continue
        old = budget.get(row["arch"], {}).get(row["name"])
        if old is None:
            found.append(f"{label}: not in the budget; look at it, then --update")
            continue
        for key, slack in (
            ("spills", 0),
            ("loop_spills", 0),
            ("narrow_loads", 0),
            ("registers", 8),
            ("shared_bytes", 0),
            ("stack_bytes", 0),
        ):
            if row[key] > old[key] + slack:
                found.append(f"{label}: {key} {old[key]} -> {row[key]}")
        if row["loop_instructions"] > 1.1 * old["loop_instructions"]:
            found.append(f"{label}: loop_instructions {old['loop_instructions']} -> {row['loop_instructions']}")
        for key in ("mma_kind", "register_detour"):
            if row[key] != old[key]:
                found.append(f"{label}: {key} {old[key]} -> {row[key]}")
        if row["async_copy_bytes"] < old["async_copy_bytes"]:
            found.append(f"{label}: async_copy_bytes {old['async_copy_bytes']} -> {row['async_copy_bytes']}")
    return found


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as text, widest first column last."""
    lines = ["  ".join(f"{title:>6}" for _, title in COLUMNS) + "  variant"]
    for row in rows:
        if "error" in row:
            lines.append(f"  error: {row['error']}  {row['arch']} {row['name']}")
        else:
            lines.append("  ".join(f"{_cell(row[key]):>6}" for key, _ in COLUMNS) + f"  {row['arch']} {row['name']}")
    return "\n".join(lines)


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return str(value).replace("v_mfma_", "")[:14]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", action="append", choices=[*ARCHS, "all"], help="architectures, default sm_90")
    parser.add_argument("--only", default="", help="a regular expression that variant names must match")
    parser.add_argument("--quick", action="store_true", help="every sixth layer, without fp64")
    parser.add_argument("--json", type=pathlib.Path, help="write the rows there")
    parser.add_argument("--check", action="store_true", help="compare with the budget")
    parser.add_argument("--update", action="store_true", help="rewrite the budget")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    args = parser.parse_args()
    os.environ.pop("TRITON_INTERPRET", None)  # before Triton is imported: this is about compiled code
    archs = args.arch or ["sm_90"]
    archs = list(ARCHS) if "all" in archs else archs
    import triton

    version = ".".join(triton.__version__.split(".")[:2])
    rows = compile_all(archs, args.quick, args.jobs, args.only)
    print(f"Triton {triton.__version__}\n{table(rows)}")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({"triton": triton.__version__, "variants": rows}, indent=1))
    budgets = json.loads(BUDGET.read_text()) if BUDGET.exists() else {}
    if args.update:
        mine = budgets.setdefault(version, {})
        for arch in archs:
            mine[arch] = {
                row["name"]: {k: v for k, v in row.items() if k not in ("name", "arch", "shared_limit")}
                for row in rows
                if row["arch"] == arch and "error" not in row
            }
        BUDGET.write_text(json.dumps(budgets, indent=0, sort_keys=True) + "\n")
    failed = [r for r in rows if "error" in r]
    if args.check:
        if version not in budgets:
            print(f"no budget for Triton {version} in {BUDGET.name}")
            return 1
        lines = regressions(rows, budgets[version])
        print("\n".join(lines) or "within the budget")
        return int(bool(lines))
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
