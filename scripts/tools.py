"""Tools that read or rewrite models: what they answer with torch.nn's layers, after `replace_`, and under `enable()`.

    TRITON_INTERPRET=1 python -m scripts.tools [--only REGEX] [--again] [--limit SECONDS] [--record FILE]

makes docs/tools.md. A row that the record already holds as right, with the versions that are here, is not asked for again
unless --again says so; a tool that is not installed keeps the row it has.

Each tool has a process of its own, which builds the same small model and input for each way from the same seeds. Counts, names
and other integers and strings have to be equal. A tensor is compared by its products with eight random tensors: the 2-norm of
their difference may be at most 1e-4 of the 2-norm, or 0.05 where integers compute, since a rounding may fall the other way.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import pathlib
import re
import subprocess
import sys
import time
import warnings
from collections.abc import Sequence
from typing import Any

import torch
import triton
from tqdm import tqdm

import tconv
from bench.tools import TOOLS, Answer, Tool
from scripts.models import ROOT, Rows, complaint, here
from tconv.swap import TORCHS

RECORD = ROOT / "bench" / "results" / "tools" / "interpreter.json"
PAGE = ROOT / "docs" / "tools.md"
WAYS = ("torch.nn", "replace_", "enable()")
RESTORED = "with tconv.restored(model):"
REMEDY = "remedy"
MARK = "answer: "  # before what a process says
LIMIT = 300  # seconds; torchao takes up to a hundred where a batch norm is left, all others less than forty, by all ways
LEGEND = f"""\
"Same" is torch.nn's answer; where it is another, what differs is shown. The number behind it counts the launches by tconv's
kernels while the tool worked, and the calls that fell back to torch.

Where the answer after `replace_` differs, the last column has what was then done and gave torch.nn's answer. Most of these
tools look for torch.nn's very classes, and `{RESTORED}` gives them to the model for the length of a block. What a
tool returns that is another model, a copy or a new one, has torch.nn's layers after the block too: `tconv.replace_` takes them.
`enable()` changes no layer, and needs none of this.

Eager and FX quantization are deprecated in torch, and still there; pt2e has moved to torchao. `calibrated` and `trained` stand
for what the model is then run on; it all belongs into the block."""


def ask(tool: Tool, way: str) -> dict[str, Any]:
    """A tool's answer by one way, in this process.

    Returns: "answer", "launches" by tconv's kernels and calls "left" to torch, or "failed"; and "seconds".
    """
    start = time.perf_counter()
    try:
        found = _ask(tool, way)
    except Exception as e:  # what a tool raises is what the row shows
        found = {"failed": complaint(e)}
    return found | {"seconds": round(time.perf_counter() - start, 1)}


def _ask(tool: Tool, way: str) -> dict[str, Any]:
    torch.manual_seed(0)
    model, x = tool.build()
    if way in ("replace_", RESTORED, REMEDY):
        tconv.replace_(model)
    before = layers(model)
    context: Any = contextlib.nullcontext()
    if way == "enable()":
        context = tconv.enabled()
    elif way == RESTORED:
        context = tconv.restored(model)
    question = tool.remedy.ask if tool.remedy and way == REMEDY else tool.ask
    torch.manual_seed(1)
    with tconv.recording() as calls, context:
        found = question(model, x)
    if way == RESTORED and layers(model) != before:
        raise RuntimeError(f"of tconv's layers {before} went into the block and {layers(model)} came out of it")
    ours = sum(call.ours for call in calls)
    return {"answer": found, "launches": ours, "left": len(calls) - ours}


def layers(model: torch.nn.Module) -> int:
    """How many of a model's layers are tconv's."""
    return sum(isinstance(m, tuple(TORCHS)) for m in model.modules())


def in_a_process(tool: Tool, ways: Sequence[str], limit: float) -> dict[str, dict[str, Any]]:
    """A tool's answer by each way, from a process that may crash or take too long: then another one goes on behind it."""
    found: dict[str, dict[str, Any]] = {}
    while missing := [way for way in ways if way not in found]:
        try:
            done = subprocess.run(command(tool, missing), capture_output=True, text=True, timeout=limit, cwd=ROOT, check=False)
            printed, last = done.stdout, (done.stderr.strip().splitlines() or ["no message"])[-1]
            why = f"the process ended with {done.returncode}: {last[:120]}"
        except subprocess.TimeoutExpired as e:
            printed, why = (e.stdout or b"").decode(), f"no answer in {limit:g} s"
        whole = printed[: printed.rfind("\n") + 1].splitlines()  # the last line may be cut
        answers = [json.loads(line[len(MARK) :]) for line in whole if line.startswith(MARK)]
        found |= dict(zip(missing, answers, strict=False))
        if len(answers) < len(missing):
            found[missing[len(answers)]] = {"failed": why}
    return found


def command(tool: Tool, ways: Sequence[str]) -> list[str]:
    """What asks in a process of its own, and prints a marked line of JSON for each answer."""
    return [sys.executable, "-m", "scripts.tools", "--answer", tool.name, *ways]


def row_of(tool: Tool, answers: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """A row for the record."""
    return {"version": tool.version, "ran": here(), "ways": answers}


def ways(tool: Tool) -> list[str]:
    """The ways by which a tool is asked."""
    return [*WAYS, RESTORED, *([REMEDY] if tool.remedy else [])]


def differences(tool: Tool, row: dict[str, Any], way: str) -> list[str]:
    """The parts of an answer that are not torch.nn's."""
    wanted, found = (row["ways"][w] for w in ("torch.nn", way))
    if "failed" in found or "failed" in wanted:
        return ["failed"]
    a, b = found["answer"], wanted["answer"]
    return [key for key in a.keys() | b.keys() if key not in a or key not in b or not alike(a[key], b[key], tool.tolerance)]


def alike(found: Any, wanted: Any, tolerance: float) -> bool:
    """Whether two parts of answers are the same: exactly, or lists of floats within a tolerance."""
    if not (floats(found) and floats(wanted)):
        return bool(found == wanted)
    return len(found) == len(wanted) and math.dist(found, wanted) <= tolerance * math.hypot(*wanted)


def floats(part: Any) -> bool:
    return isinstance(part, list) and all(isinstance(value, float) for value in part)


def remedy(tool: Tool, row: dict[str, Any]) -> str | None:
    """What to do with tconv, in Markdown; None where nothing has given torch.nn's answer."""
    if "failed" in row["ways"]["torch.nn"]:
        return "the tool fails with torch.nn's layers too"
    right = {way for way in row["ways"] if not differences(tool, row, way)}
    if {"replace_", "enable()"} <= right:
        return "nothing"
    if tool.note:
        return tool.note
    if "enable()" not in right:
        return None
    if tool.remedy and REMEDY in right:
        return f"`{tool.remedy.code}`"
    return f"`{restored(tool.code)}`" if RESTORED in right else None


def restored(code: str) -> str:
    """The call in a block that gives the model torch.nn's classes."""
    return f"{RESTORED[:-1]}, {code[5:]}" if code.startswith("with ") else f"{RESTORED} {code}"


def wrong(tool: Tool, row: dict[str, Any] | None) -> bool:
    """Whether a row shows no answer, or one that differs and nothing that helps."""
    return row is None or "absent" in row or "failed" in row["ways"]["torch.nn"] or remedy(tool, row) is None


def brief(answer: Answer) -> str:
    """An answer for the table: counts and names; of tensors and long lists only that they are there."""
    parts = []
    for key, value in answer.items():
        if isinstance(value, int):
            parts.append(f"{key} {value:,}")
        elif isinstance(value, str):
            parts.append(f"{key}: {value or 'none'}")
        else:
            parts.append(key if floats(value) else f"{len(value)} {key}")
    if len(parts) > 4:
        parts[3:] = [f"and {len(parts) - 3} more"]
    return "; ".join(parts)


def cell(tool: Tool, row: dict[str, Any], way: str) -> str:
    """What the table shows of one way."""
    found = row["ways"][way]
    if "failed" in found:
        return f"**{found['failed']}**"
    if way == "torch.nn":
        return brief(found["answer"])
    differs = {key: part for key, part in found["answer"].items() if key in differences(tool, row, way)}
    left = f", {found['left']} left" if found["left"] else ""
    return f"{f'**{brief(differs)}**' if differs else 'same'} [{found['launches']}{left}]"


def table(rows: Rows) -> str:
    """The record in Markdown, a line per tool."""
    lines = [
        "| Tool | Version | Call | torch.nn | `replace_` | `enable()` | What to do after `replace_` |",
        "|---|---|---|---|---|---|---|",
    ]
    for tool in TOOLS:
        row = rows.get(tool.name)
        if row is None or "absent" in row:
            lines.append(f"| {tool.name} | {row['absent'] if row else 'not asked'} | `{tool.code}` |" + " |" * 4)
            continue
        what = remedy(tool, row) or "**nothing that was tried gives torch.nn's answer**"
        cells = [tool.name, row["version"], f"`{tool.code}`", *(cell(tool, row, way) for way in WAYS), what]
        lines.append("| " + " | ".join(text.replace("|", "\\|") for text in cells) + " |")
    return "\n".join(lines)


def verdict(rows: Rows) -> str:
    """What the record shows, in two sentences."""
    there = [(tool, rows[tool.name]) for tool in TOOLS if "ways" in rows.get(tool.name, {})]
    on, swapped = (sum(not differences(tool, row, way) for tool, row in there) for way in ("enable()", "replace_"))
    bad = [tool.name for tool, row in there if wrong(tool, row)]
    where = " and ".join(sorted({row["ran"] for _, row in there}))
    rest = f"no remedy for {', '.join(bad)}" if bad else "for the others the last column says what to do"
    return (
        f"{on} of {len(there)} questions have torch.nn's answer under `enable()`, {swapped} after `replace_`; {rest}.\n"
        f"Asked with {where}."
    )


def page(rows: Rows) -> str:
    """The whole document."""
    how = (__doc__ or "").split("\n\n")[3].strip()
    return "\n\n".join([
        "# Tools",
        "Made by `TRITON_INTERPRET=1 python -m scripts.tools`, which asks the tools that are installed; the answers are in\n"
        "`bench/results/tools/`, the questions in `bench/tools.py`.",
        verdict(rows),
        how,
        LEGEND,
        table(rows),
    ]) + "\n"  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--only", default="", metavar="REGEX", help="tools whose name has this in it")
    parser.add_argument("--again", action="store_true", help="ask even where the record is right")
    parser.add_argument("--limit", type=float, default=LIMIT, metavar="SECONDS", help=f"for one tool; default {LIMIT}")
    parser.add_argument("--record", type=pathlib.Path, default=RECORD, metavar="FILE", help="another makes no document")
    parser.add_argument("--answer", nargs="+", help=argparse.SUPPRESS)  # a tool and ways: what `command` runs
    options = parser.parse_args()
    if not triton.knobs.runtime.interpret:
        parser.error("the models are on the CPU: TRITON_INTERPRET=1 runs the kernels in Triton's interpreter")
    if options.answer:
        warnings.simplefilter("ignore")
        tool = next(tool for tool in TOOLS if tool.name == options.answer[0])
        for way in options.answer[1:]:
            print(f"\n{MARK}{json.dumps(ask(tool, way))}", flush=True)
        return 0
    rows = json.loads(options.record.read_text()) if options.record.exists() else {}
    chosen = [tool for tool in TOOLS if re.search(options.only, tool.name)]
    progress = tqdm([tool for tool in chosen if options.again or stale(tool, rows.get(tool.name))], unit="tool")
    for tool in progress:
        progress.set_description(tool.name)
        if tool.there:
            rows[tool.name] = row_of(tool, in_a_process(tool, ways(tool), options.limit))
        else:
            rows.setdefault(tool.name, {"absent": f"{' or '.join(tool.packages)} not installed"})
        options.record.parent.mkdir(parents=True, exist_ok=True)
        options.record.write_text(json.dumps({t.name: rows[t.name] for t in TOOLS if t.name in rows}, indent=1) + "\n")
    if options.record == RECORD:
        PAGE.write_text(page(rows))
    print(verdict(rows))
    return 1 if any(wrong(tool, rows.get(tool.name)) for tool in chosen if tool.there) else 0


def stale(tool: Tool, row: dict[str, Any] | None) -> bool:
    """Whether a row is wrong, or was made with other versions than are here."""
    return row is None or wrong(tool, row) or (tool.there and (row["version"], row["ran"]) != (tool.version, here()))


if __name__ == "__main__":
    sys.exit(main())
