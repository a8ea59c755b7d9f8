#!/usr/bin/env python3
"""Compiles every kernel variant that the planner can choose for the layers of bench/layers.json, without a GPU, and reads
the machine code: registers, spills, shared memory, tensor-core instructions, widths of memory accesses, loop length.

    python scripts/codegen.py                          # table for sm_90
    python scripts/codegen.py --arch sm_80 --arch gfx942 --json out/codegen.json
    python scripts/codegen.py --check                  # against bench/codegen/; exit status 1 on a regression
    python scripts/codegen.py --update                 # rewrite the budgets of this Triton version and these architectures
    python scripts/codegen.py --beside                 # only epilogues, fp8, borders, streams, sequences and normalisations
    python scripts/codegen.py --compare 3.6            # what this Triton compiles differently from what 3.6 did
    python scripts/codegen.py --compare 3.6 3.9        # the same of two recorded ones, without compiling
    python scripts/codegen.py --run --only 'fprop gather 2d bf16 128x128x64 .* even$'    # also what they do, in the simulator
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import json
import multiprocessing
import os
import pathlib
import re
import sys
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import codegen_budget as budget
import machine_code

from tconv.planning.device import ARCHITECTURES as ARCHS

COLUMNS = (
    ("registers", "regs"), ("spills", "spill"), ("loop_spills", "loopsp"), ("shared_bytes", "smem"), ("mma", "mma"),
    ("mma_kind", "kind"), ("register_detour", "detour"), ("async_copies", "async"), ("async_copy_bytes", "bytes"),
    ("load_bytes", "ldbyte"), ("narrow_loads", "narrow"), ("store_bytes", "stbyte"), ("tma_loads", "tma"),
    ("instructions", "code"), ("loop_instructions", "loop"), ("loop_waits", "waits"), ("loop_fences", "fences"),
)  # fmt: skip


def layers(quick: bool = False) -> list[Any]:
    """The suite's layers as problems; every sixth if quick."""
    from bench import layers

    return [layer.problem for layer in layers.layers(quick)]


def collect(arch: str, quick: bool) -> dict[str, Any]:
    """name -> Variant over layers, dtypes and layouts, as planned for a device of that architecture.

    Layers that share a name's every part share the compiled kernel; alignments that no layer has are left out.
    """
    import torch

    from tconv.launching.variants import float32_precision, variants

    found: dict[str, Any] = {}
    settings = [(torch.bfloat16, True), (torch.float16, True), (torch.float32, True), (torch.float32, False)]
    settings += [] if quick else [(torch.float64, False)]
    for problem in layers(quick):
        for dtype, tf32 in settings:
            with float32_precision(tf32):
                for channels_last in (True, False):
                    for v in variants(problem, dtype, channels_last, ARCHS[arch][3]):
                        found.setdefault(v.name, v)
                        _settings.setdefault(v.name, (dtype, tf32, channels_last))
    return found | beside(arch)


# A layer of the suite for each kernel that takes an epilogue, and the epilogues that the gate has: a residual after an
# activation, and all steps.
EPILOGUES = {
    "gather": "resnet50_l2_3x3", "tma": "resnet50_l2_3x3", "packed": "resnet50_stem_7x7s2", "strip": "convnext_b_dw7_128_56",
    "rows": "sdxl_vae_conv_out_k3", "depthwise": "convnext_b_dw7_128_56", "persistent": "resnet50_l1_3x3",
}  # fmt: skip


def with_epilogues(arch: str) -> dict[str, Any]:
    """name -> Variant of a forward pass with an epilogue, for a few layers: in bf16, channels_last, the planner's tile."""
    import torch

    from bench import layers
    from tconv.launching.variants import launches, variant_of
    from tconv.planning.epilogue import Epilogue
    from tconv.planning.plan import force

    found, dtype, device = {}, torch.bfloat16, ARCHS[arch][3]
    problems = {layer.name: layer.problem for layer in layers.layers()}
    for kernel, name in EPILOGUES.items():
        for epilogue in (
            Epilogue(activation="silu", residual="after"),
            Epilogue(activation="relu", scale=True, shift=True, residual="before"),
        ):
            with force(kernel):
                v = variant_of("fprop", launches(problems[name], dtype, True, device, epilogue)["fprop"](), dtype)
            found[v.name], _settings[v.name] = v, (dtype, True, True)
    return found


def in_fp8(arch: str) -> dict[str, Any]:
    """name -> Variant of a forward pass in fp8 with every tile, of a layer in channels_last, with scale and bias; and of a
    transposed layer's.
    """
    from bench import layers
    from tconv.launching.variants import FP8, launches, variant_of
    from tconv.planning.epilogue import Epilogue
    from tconv.planning.families import families
    from tconv.planning.plan import force
    from tconv.planning.tiles import Access

    found, device = {}, ARCHS[arch][3]
    problem = next(layer.problem for layer in layers.layers() if layer.name == EPILOGUES["gather"])
    prepare = launches(problem, FP8, True, device, Epilogue(scale=True, shift=True, wide=True, result="bfloat16"))
    for pass_, family in ((p, f) for p in prepare for f in families(p) if f.fp8):
        for tile in family.tiles_on(Access(1, True), device):
            with force(family.name, tile):
                v = variant_of(pass_, prepare[pass_](), FP8)
            found[v.name], _settings[v.name] = v, (FP8, True, True)
    return found


def at_borders_and_in_streams(arch: str) -> dict[str, Any]:
    """name -> Variant of the kernels of calls with padding that repeats x, forward and backward, and of chunks of streams."""
    import torch

    from tconv import batch_invariant
    from tconv import functional as TF
    from tconv.kernels.borders import add_borders
    from tconv.launching.variants import direct_variant, variant_of
    from tconv.planning.families import FAMILIES
    from tconv.precompile import rehearse

    found, dtype = {}, torch.bfloat16

    def add(call: Any, *shape: int, channels_last: bool = True, backward: bool = True) -> None:
        x = empty(*shape, channels_last=channels_last)
        call = call if backward else torch.no_grad()(call)  # a rehearsal asks for gradients of what it is given
        launches = list(rehearse(call, (x,), {}, ARCHS[arch][3], backward)[0])
        with batch_invariant():  # where gradients are not folded
            launches += [p for p in rehearse(call, (x,), {}, ARCHS[arch][3], backward)[0] if p.kernel is add_borders]
        for p in launches:
            c = p.constants
            if p.kernel is add_borders:
                how = [f"inner={'c' if c['X_UNIT'] else 'p'}", f"vec={c['X_VEC']}", *_modes(c), *["fold"] * c["FOLD"]]
                v = direct_variant(p, "borders", dtype, f"{p.call.problem.rank}d", *how)
            elif p.call.plan.kernel in FAMILIES and (_modes(c) or c.get("NEXT")):
                v = variant_of(p.call.operation, p, dtype)
            else:
                continue
            found[v.name], _settings[v.name] = dataclasses.replace(v, call=None), (dtype, True, channels_last)

    for mode in ("reflect", "replicate", "circular"):
        for w, groups, shape in ((empty(256, 256, 3, 3), 1, (32, 256, 28, 28)), (empty(128, 1, 7, 7), 128, (32, 128, 56, 56))):
            w.requires_grad_()
            add(lambda x, w=w, g=groups, m=mode: TF.conv2d(x, w, padding="same", groups=g, padding_mode=m), *shape)
        w = empty(64, 3, 7, 7)
        add(lambda x, w=w, m=mode: TF.conv2d(x, w, padding=3, padding_mode=m), 8, 3, 224, 224)
    w = empty(64, 64, 3, 3, channels_last=False)
    add(lambda x, w=w: TF.conv2d(x, w, padding=1, padding_mode="reflect"), 8, 64, 56, 56, channels_last=False)
    w = empty(96, 96, 3, 3, 3)
    add(lambda x, w=w: TF.conv3d(x, w, padding=1, padding_mode="replicate"), 1, 96, 9, 60, 104)
    of_frames, frame = {"padding": ((2, 0), 1, 1)}, (1, 96, 4, 60, 104)
    add(lambda x, w=w: TF.conv3d_stream(x, w, None, None, **of_frames), *frame, backward=False)
    state = empty(1, 96, 2, 60, 104)
    add(lambda x, w=w, s=state: TF.conv3d_stream(x, w, None, s, **of_frames), *frame, backward=False)
    w, state = empty(512, 512, 7), empty(1, 512, 6)
    add(lambda x, w=w, s=state: TF.conv1d_stream(x, w, None, s, padding=((6, 0),)), 1, 512, 256, backward=False)
    return found


def _modes(constants: dict[str, Any]) -> list[str]:
    """What reads beyond x find, where that is x."""
    return sorted({v for k, v in constants.items() if k.startswith("BORDER")} - {"zeros", "state"})


def empty(*shape: int, channels_last: bool = True) -> Any:
    """A tensor in bf16 without storage."""
    import torch

    from tconv.launching.memory_format import shaped

    return shaped(shape, channels_last, torch.bfloat16)


def direct(arch: str) -> dict[str, Any]:
    """name -> Variant of kernels that are not planned, in bf16: sequences, decoding, rounding to fp8, and normalisations.

    These are normalisations as the decoders of AutoencoderKL and Wan have them.
    """
    import torch

    from tconv.launching import causal
    from tconv.launching.dry_run import dry_run
    from tconv.launching.launch import collecting
    from tconv.launching.memory_bound import prepare_quantize
    from tconv.launching.variants import direct_variant, normalisation_variants
    from tconv.planning.normalise import Normalisation

    found, dtype, device = [], torch.bfloat16, ARCHS[arch][3]
    w, b = empty(1536, 4, channels_last=False), empty(1536, channels_last=False)
    for channels_last in (True, False):
        x, state = empty(2, 1536, 512, channels_last=channels_last), empty(2, 1536, 3)
        of = causal.Sequences(x, w, b, state, None, None, "silu")
        with dry_run(device), collecting() as launches:
            y, after = causal.forward(of, True)
            causal.weight_gradients(of, y)
            causal.input_gradients(of, y, after, True)
            causal.step(dataclasses.replace(of, x=x[..., :1]), None, None)
        for p in launches:
            flags = [k.lower() for k in ("STATE", "NEXT", "DSTATE", "DNEXT") if p.constants.get(k)]
            layout = f"inner={'c' if channels_last else 'p'}"
            found.append(direct_variant(p, p.call.operation, dtype, layout, *flags))
        zero = (0, 0, 0)
        for n in (
            Normalisation("group_norm_silu", 2, 1, 128, 32, (1, 512, 512), zero, zero, channels_last, 1e-6, "silu", True, True),
            Normalisation("rms_norm_silu", 3, 1, 384, 1, (5, 60, 104), zero, zero, channels_last, 0.0, "silu", True, False),
        ):
            found += normalisation_variants(n, dtype, device)
    found += [direct_variant(p, "quantize", dtype) for p in prepare_quantize(1 << 20, dtype, True) if p]
    return {v.name: dataclasses.replace(v, call=None) for v in found}


def beside(arch: str) -> dict[str, Any]:
    """name -> Variant of what `variants` does not list, by a few calls of each kind. For Hopper only."""
    if arch != "sm_90":
        return {}
    return with_epilogues(arch) | in_fp8(arch) | at_borders_and_in_streams(arch) | direct(arch)


_collected: dict[str, dict[str, Any]] = {}  # by architecture; worker processes inherit it
_settings: dict[str, tuple[Any, bool, bool]] = {}  # by variant: dtype, whether TF32 is allowed, channels_last


def compile_one(task: tuple[str, str]) -> dict[str, Any]:
    """Compiles the variant of that name for an architecture and reads its machine code. Runs in a process of its own."""
    arch, name = task
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource

    variant = _collected[arch][name]
    names = list(variant.signature)
    pointers = [i for i, n in enumerate(names) if variant.signature[n].startswith("*")]
    source = (GluonASTSource if variant.kernel.is_gluon() else ASTSource)(
        fn=variant.kernel,
        signature=variant.signature,
        constexprs={(names.index(n),): v for n, v in variant.constants.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i in pointers},
    )
    backend, target, warp, device = ARCHS[arch]
    row = {"name": name, "arch": arch}
    try:
        kernel = triton.compile(source, target=GPUTarget(backend, target, warp), options=dict(variant.options))
        row |= machine_code.read(kernel)
    except Exception as e:  # the table says so, the other variants go on
        return row | {"error": f"{type(e).__name__}: {str(e).splitlines()[0] if str(e) else ''}"}
    return row | {
        "shared_bytes": kernel.metadata.shared,
        "shared_limit": device.shared_bytes,
        "memory_bound": variant.memory_bound,
    }


def run_one(arch: str, name: str) -> str:
    """What a variant does in the simulator on a smaller problem than the one it was listed for: its counts as text."""
    from bench.smaller import MOST, smaller
    from tconv.launching.variants import float32_precision

    call, (dtype, tf32, channels_last) = _collected[arch][name].call, _settings[name]
    if call is None or call.plan.kernel in ("bias", "copy"):
        return f"{arch} {name}\nnot run: --run is for fprop, dgrad and wgrad"
    plan = dataclasses.replace(call.plan, splits=min(call.plan.splits, MOST))
    with float32_precision(tf32):
        try:
            problem, launch, _ = smaller(call.problem, plan, channels_last, dtype, ARCHS[arch][3])
        except ValueError as e:
            return f"{arch} {name}\nnot run: {e}"
        return f"{arch} {name}\non {problem}\n{launch.count()}"


def compile_all(tasks: list[tuple[str, str]], jobs: int) -> list[dict[str, Any]]:
    """The rows of tasks, compiled in parallel under a progress bar."""
    from tqdm import tqdm

    fork = multiprocessing.get_context("fork")
    with concurrent.futures.ProcessPoolExecutor(jobs, mp_context=fork) as pool:
        done = pool.map(compile_one, tasks)
        return list(tqdm(done, total=len(tasks), desc="compiling", unit="variant", disable=None))


def run_all(tasks: list[tuple[str, str]], file: Any) -> None:
    """Prints the counts of tasks, run one after another under a progress bar."""
    from tqdm import tqdm

    import simulator

    for arch, name in tqdm(tasks, desc="running", unit="variant", disable=None):
        simulator.install(arch)
        print(f"\n{run_one(arch, name)}", file=file)


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
    return str(value)[:14]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", action="append", choices=[*ARCHS, "all"], help="architectures, default sm_90")
    parser.add_argument("--only", default="", help="a regular expression that variant names must match")
    parser.add_argument("--quick", action="store_true", help="every sixth layer, without fp64")
    parser.add_argument("--list", action="store_true", help="print the variants' names, compile nothing")
    parser.add_argument("--json", nargs="?", const="-", metavar="PATH", help="print the rows as JSON, or write them there")
    parser.add_argument("--check", action="store_true", help="compare with the budget; exit status 1 on a regression")
    parser.add_argument("--update", action="store_true", help="rewrite the budget; of what was compiled, if that is a part")
    parser.add_argument("--compare", nargs="+", metavar="VERSION", help="name what another Triton compiles differently")
    parser.add_argument("--run", action="store_true", help="also run them in the simulator on a small problem, and count")
    parser.add_argument("--beside", action="store_true", help="only what is used beside plain layers: epilogues, streams, ...")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    args = parser.parse_args()
    if args.run and not {*(args.arch or ["sm_90"])} <= {"sm_80", "sm_90"}:
        parser.error("--run is for sm_80 and sm_90, which the simulator knows")
    if args.compare and len(args.compare) > 2:
        parser.error("--compare takes one version, or two to compare with each other")
    return args


def main() -> int:
    args = arguments()
    archs = list(ARCHS) if "all" in (args.arch or []) else args.arch
    try:
        if args.compare and len(args.compare) == 2:
            return compare_recorded(*args.compare, archs)
        return compile_and_judge(args, archs or ["sm_90"])
    except budget.BudgetError as e:
        print(e, file=sys.stderr)
        return 2


def compare_recorded(old: str, new: str, archs: list[str] | None) -> int:
    known = budget.recorded()
    shared = [a for a in known.get(old, []) if a in known.get(new, [])]
    for arch in archs or shared or ["sm_90"]:
        sides = {version: budget.load(version, arch) for version in (old, new)}
        print_differences(arch, sides, [budget.scope(version, arch) for version in sides], sys.stdout)
    return 0


def print_differences(arch: str, sides: dict[str, budget.Budget], scopes: list[str], file: Any) -> None:
    """What two compilers do differently, of the variants that both were asked for."""
    for scope in filter(None, dict.fromkeys(scopes)):
        print(f"only variants that match {scope!r}", file=file)
    both = [{n: row for n, row in side.items() if all(re.search(s, n) for s in scopes)} for side in sides.values()]
    names = list(sides)
    print("\n".join(budget.compare(arch, (names[0], names[-1]), both[0], both[-1])), file=file)


def compile_and_judge(args: argparse.Namespace, archs: list[str]) -> int:
    os.environ.pop("TRITON_INTERPRET", None)  # before Triton is imported: this is about compiled code
    import triton

    version = budget.short(triton.__version__)
    # Before an hour of compiling, not after it: budgets that cannot be read.
    budgets = {arch: budget.load(version, arch) for arch in archs} if args.check else {}
    others = {arch: budget.load(args.compare[0], arch) for arch in archs} if args.compare else {}
    problem = machine_code.missing_tools()
    if problem and any(ARCHS[arch][0] == "cuda" for arch in archs):
        raise budget.BudgetError(problem)
    for arch in archs:
        _collected[arch] = beside(arch) if args.beside else collect(arch, args.quick)
    only = {arch: args.only or (budget.scope(version, arch) if args.check else "") for arch in archs}
    tasks = [(arch, name) for arch in archs for name in sorted(_collected[arch]) if re.search(only[arch], name)]
    if args.list:
        print("\n".join(f"{arch} {name}" for arch, name in tasks))
        return 0
    rows = compile_all(tasks, args.jobs)
    text = sys.stderr if args.json == "-" else sys.stdout
    if args.json != "-":
        print(f"Triton {triton.__version__}\n{table(rows)}")
    if args.run:
        run_all(tasks, text)
    report = json.dumps({"triton": triton.__version__, "variants": rows}, indent=1)
    if args.json == "-":
        print(report)
    elif args.json:
        pathlib.Path(args.json).parent.mkdir(parents=True, exist_ok=True)
        pathlib.Path(args.json).write_text(report)

    part = args.only or args.quick or args.beside
    for arch in archs:
        mine = {row["name"]: row for row in rows if row["arch"] == arch and "error" not in row}
        if args.update:
            known = part and budget.path(version, arch).exists()
            kept, scope = (budget.load(version, arch), budget.scope(version, arch)) if known else ({}, args.only)
            kept = {name: row for name, row in kept.items() if args.quick or args.beside or name in _collected[arch]}
            budget.save(version, arch, kept | mine, scope)
        if others:
            theirs = {k: v for k, v in others[arch].items() if not part or k in mine}
            names = (args.compare[0], f"{version} now")
            print_differences(arch, dict(zip(names, (theirs, mine), strict=True)), [budget.scope(names[0], arch)], text)
    if not args.check:
        return int(any("error" in row for row in rows))
    lines = budget.regressions(rows, budgets)
    whole = not (args.quick or args.beside)
    stale = [f"{arch} {name}" for arch in archs for name in budgets[arch] if whole and name not in _collected[arch]]
    lines += [f"{label}: in the budget, but no longer to be chosen; --update" for label in stale]
    parts = "".join(f"; {arch} only {pattern!r}" for arch, pattern in only.items() if pattern)
    print("\n".join(lines) or f"{len(rows)} variants within the budget{parts}", file=text)
    return int(bool(lines))


if __name__ == "__main__":
    sys.exit(main())
