"""Reads compiled kernels: registers, spills, tensor-core instructions, widths of memory accesses, the main loop."""

from __future__ import annotations

import collections
import itertools
import os
import pathlib
import re
import subprocess
from typing import Any

MMA = r"\b(HGMMA|QGMMA|IGMMA|UTCHMMA|UTCQMMA|HMMA|DMMA|OMMA)"
SEPARATOR = "\n-- code --\n"


def tools() -> pathlib.Path:
    """Where Triton keeps NVIDIA's disassemblers."""
    import triton

    return pathlib.Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def missing_tools() -> str | None:
    """Which disassembler this Triton came without, as one line; None if it has both."""
    absent = [name for name in ("cuobjdump", "nvdisasm") if not (tools() / name).exists()]
    return f"this Triton comes without {' and '.join(absent)} (looked in {tools()})" if absent else None


def read(kernel: Any) -> dict[str, Any]:
    """What the machine code of a kernel that Triton compiled says, whichever maker's it is."""
    found = _amd(kernel.asm["amdgcn"]) if "amdgcn" in kernel.asm else _nvidia(*_disassembled(kernel))
    return found | {"lanes": _lanes(kernel.asm["ttgir"])}


def _lanes(ttgir: str) -> list[int]:
    """The axis along which neighbouring threads lie, of each access to a two-dimensional tile in global memory."""
    orders = {name: int(axis) for name, axis in re.findall(r"^(#\w+) = #ttg\.blocked<.*order = \[(\d)", ttgir, re.MULTILINE)}
    for name, step in re.findall(r"^(#\w+) = #ttg\.linear<.*lane = \[\[(\d+, \d+)\]", ttgir, re.MULTILINE):
        orders[name] = int(step.startswith("0,"))  # from one lane to the next
    for name, turned in re.findall(r"^(#\w+) = #ttg\.amd_mfma<.*isTransposed = (\w+)", ttgir, re.MULTILINE):
        orders[name] = int(turned == "false")  # a lane holds a column, or turned round a row
    for name in re.findall(r"^(#\w+) = #ttg\.nvidia_mma<", ttgir, re.MULTILINE):
        orders[name] = 1  # four neighbours hold eight elements of a row
    access = r"(?:tt\.load|tt\.store|async_copy_global_to_local) .*tensor<\d+x\d+x!tt\.ptr<\w+>, (#\w+)>"
    return [orders[layout] for layout in re.findall(access, ttgir)]


def _disassembled(kernel: Any) -> tuple[str, str]:
    """Resource usage and SASS. Kept beside the cubin in Triton's cache: disassembling takes half as long as compiling."""
    cubin = next(pathlib.Path(p) for name, p in kernel.metadata_group.items() if name.endswith(".cubin"))
    kept = cubin.with_suffix(".sass")
    if not kept.exists():
        texts = (
            subprocess.run([tools() / tool, *options, cubin], capture_output=True, text=True, check=True).stdout
            for tool, *options in (("cuobjdump", "-res-usage"), ("nvdisasm", "-ndf", "-c"))
        )
        part = kept.with_suffix(f".{os.getpid()}")
        part.write_text(SEPARATOR.join(texts))
        part.replace(kept)  # whole, whatever else compiles the same variant now
    usage, sass = kept.read_text().split(SEPARATOR)
    return usage, sass


def _nvidia(usage: str, sass: str) -> dict[str, Any]:
    resources = dict(word.split(":")[:2] for word in usage.split() if word.count(":") == 1)
    kinds = collections.Counter(re.findall(MMA, sass))
    lines, main = _nvidia_code(sass, MMA if kinds else r"\b(FFMA|DFMA|FMUL|HFMA2|FADD|DADD)")
    inside = lines[main]
    loads = [_nvidia_bytes(m[1]) for line in inside or lines if (m := re.search(r"\bLDG\.E(\S*)", line))]
    stores = [_nvidia_bytes(m[1]) for line in lines if (m := re.search(r"\bSTG\.E(\S*)", line))]
    copies = [_nvidia_bytes(m[1]) for line in lines if (m := re.search(r"\bLDGSTS(\S*)", line))]
    return {
        "registers": int(resources["REG"]),
        "spills": _count(lines, r"\b(LDL|STL)\b"),
        "loop_spills": _count(inside, r"\b(LDL|STL)\b"),
        "stack_bytes": int(resources["STACK"]),
        **_mma(kinds),
        # An operand that wgmma takes from registers, or tcgen05 from tensor memory, was brought there from shared memory.
        "register_detour": bool(_count(lines, r"\bHGMMA\S* R\d+, R\d+|\bUTC\w*MMA\S* tmem\[\w+\], gdesc")),
        "tma_loads": _count(lines, "UTMALDG"),
        "tma_stores": _count(lines, "UTMASTG"),
        **_accesses(copies, loads, stores),
        "instructions": len(lines),
        "loop_instructions": len(inside),
        # Blocks that the compiler moved to the end count as after the loop. Without a loop all count as before it.
        "before_loop": main.start if inside else len(lines),
        "after_loop": len(lines) - main.stop - _count(lines[main.stop :], r"\bNOP\b") if inside else 0,
        # If ptxas cannot keep accumulators in wgmma's hands it waits after every one of them, not once per iteration.
        "loop_waits": _count(inside, r"\bWARPGROUP\.DEPBAR"),
        # wgmma sees what threads and their asynchronous copies wrote only behind one (tconv/launching/fences.py).
        "loop_fences": _count(inside, r"\bFENCE\.VIEW\.ASYNC"),
    }


def _amd(text: str) -> dict[str, Any]:
    def note(key: str) -> int:
        found = re.search(rf"\.{key}:\s*(\d+)", text)
        return int(found[1]) if found else 0

    kinds = collections.Counter(re.findall(r"\bv_(mfma_\w+)", text))
    lines, inside = _amd_code(text, "v_mfma" if kinds else r"\bv_(pk_)?(fma|mul|add|fmac)_f")
    access = r"\b(?:global|buffer)_%s_(\w+)"
    copied = [line for line in lines if re.search(r"\blds\b", line)]
    loads = [line for line in inside or lines if line not in copied]
    return {
        "registers": note("vgpr_count"),
        "spills": note("vgpr_spill_count"),  # scalar registers spill to vector ones, not to memory
        "loop_spills": _count(inside, r"\bscratch_"),
        "stack_bytes": note("private_segment_fixed_size"),
        **_mma(kinds),
        "register_detour": False,
        "tma_loads": 0,
        "tma_stores": 0,
        **_accesses(*(
            [_amd_bytes(m[1]) for line in where if (m := re.search(access % kind, line))]
            for where, kind in ((copied, "load"), (loads, "load"), (lines, "store"))
        )),
        "instructions": len(lines),
        "loop_instructions": len(inside),
        "loop_waits": 0,
        "loop_fences": 0,
        "before_loop": None,  # blocks do not lie in the order in which they run
        "after_loop": None,
    }  # fmt: skip


def _nvidia_code(sass: str, wanted: str) -> tuple[list[str], slice]:
    """The instructions, and which are the main loop's: a backward branch's shortest span with most of the wanted ones.

    Not with all of them: blocks that the compiler moved to the end branch backward too.
    """
    lines: list[str] = []
    labels: dict[str, int] = {}
    for line in sass.splitlines():
        if found := re.match(r"\s*(\.L_x_\d+):", line):
            labels[found[1]] = len(lines)
        elif re.search(r"/\*[0-9a-f]{4,}\*/", line):
            lines.append(line)
    hits = [0, *itertools.accumulate(bool(re.search(wanted, line)) for line in lines)]
    branches = ((i, re.search(r"BRA.*(\.L_x_\d+)", line)) for i, line in enumerate(lines))
    spans = [(labels[m[1]], i + 1) for i, m in branches if m and labels.get(m[1], i + 1) <= i]
    most = max((hits[j] - hits[i] for i, j in spans), default=0)
    first, last = min((s for s in spans if most and 2 * (hits[s[1]] - hits[s[0]]) >= most), key=_length, default=(0, 0))
    return lines, slice(first, last)


def _length(span: tuple[int, int]) -> int:
    return span[1] - span[0]


def _amd_code(text: str, wanted: str) -> tuple[list[str], list[str]]:
    """The instructions, and those of the loop with most of the wanted ones, by the compiler's own comments."""
    lines: list[str] = []
    loops: dict[str, list[str]] = {}
    block = header = ""
    for line in text.splitlines():
        if found := re.match(r"\.L(BB\w+):|; %bb\.", line):
            block, header = found[1] or "", ""
        if found := re.search(r"; .*Header=(\w+)|;.*This (?:Inner )?Loop Header", line):
            header = found[1] or block
        if re.match(r"\t[a-z]\w+", line):
            lines.append(line)
            loops.setdefault(header, []).append(line)
    loops.pop("", None)
    return lines, max(loops.values(), key=lambda inside: _count(inside, wanted), default=[])


def _count(lines: list[str], pattern: str) -> int:
    return sum(bool(re.search(pattern, line)) for line in lines)


def _mma(kinds: collections.Counter[str]) -> dict[str, Any]:
    return {"mma": sum(kinds.values()), "mma_kind": kinds.most_common(1)[0][0] if kinds else ""}


def _accesses(copies: list[int], loads: list[int], stores: list[int]) -> dict[str, int]:
    """Numbers and widths in bytes: the narrowest asynchronous copy, the mean load of the main loop (of all, if
    there is none), the mean store."""
    return {
        "async_copies": len(copies),
        "async_copy_bytes": min(copies, default=0),
        "loads": len(loads),
        "load_bytes": sum(loads) // max(1, len(loads)),
        "narrow_loads": sum(n < 4 for n in loads),
        "stores": len(stores),
        "store_bytes": sum(stores) // max(1, len(stores)),
    }


def _nvidia_bytes(suffix: str) -> int:
    for mark, n in ((".128", 16), (".64", 8), ("16", 2), ("8", 1)):
        if mark in suffix.replace("128B", "").replace("64B", ""):
            return n
    return 4


def _amd_bytes(suffix: str) -> int:
    for mark, n in (("x4", 16), ("x3", 12), ("x2", 8), ("short", 2), ("b16", 2), ("byte", 1), ("b8", 1)):
        if mark in suffix:
            return n
    return 4
