"""The command: measures the convolutions of the benchmark suite on the GPU here, or compares a record with the cost model.

    python -m tconv.tune --suite [--layer NAME ...] [--precision bf16 ...] [--record FILE]    # from a checkout
    python -m tconv.tune --regret [--record FILE]    # by kind of layer: measured over predicted, and the planner's regret
    python -m tconv.tune --fit [--record FILE]       # the cost model's times, as they are and as fitted to the record

A model is measured by `tconv.tune(model, *inputs)`.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

from tconv.planning.device import DEVICES
from tconv.planning.problem import PASSES
from tconv.records import file
from tconv.tune import fit, tuner
from tconv.tune.subject import Asked


def suite(names: Sequence[str], precisions: Sequence[str], tiny: bool) -> list[Asked]:
    """Returns the passes of the suite's layers (bench/layers.json) in both memory formats.

    Args:
        names: only these layers; all of them if empty.
        precisions: some of "bf16", "fp16", "tf32" and "fp32". The last two differ by torch's setting, so only one may be given.
        tiny: whether to shrink the layers, for a dry run by the interpreter.
    Raises:
        ValueError: a layer does not exist.
    """
    bench: Any = importlib.import_module("bench.layers")
    providers: Any = importlib.import_module("bench.providers")
    layers = {layer.name: layer.tiny() if tiny else layer for layer in bench.layers()}
    unknown = [name for name in names if name not in layers]
    if unknown:
        raise ValueError(f"no layer {unknown[0]!r} in {bench.FILE.name}")
    found = []
    for name, precision, layout in itertools.product(names or layers, precisions, providers.LAYOUTS):
        o = providers.operands(layers[name], precision, "meta").in_layout(layout)
        found += [Asked(providers.subject(o, pass_), [f"{name} {precision} {layout}"], 1) for pass_ in PASSES]
    return found


def compared(path: pathlib.Path, fitted: bool) -> int:
    """Prints how a record compares with the cost model, for each GPU in it; or what the model would be if fitted to it."""
    try:
        found = fit.timed(path)
    except OSError as e:
        print(f"{path} cannot be read: {e}", file=sys.stderr)
        return 2
    if not found:
        print(f"{path} has no times of candidates", file=sys.stderr)
        return 2
    for gpu in dict.fromkeys(one.gpu for one in found):
        known = next((device for name, device in DEVICES.items() if name in gpu), None)
        if known is None:
            print(f"{gpu}: the cost model does not know this GPU; it knows {', '.join(DEVICES)}")
            continue
        of_gpu = [one for one in found if one.gpu == gpu]
        print(f"\n{gpu}\n")
        print(fit.fit(of_gpu, known) if fitted else "\n".join(fit.regrets(of_gpu, known)))
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "python -m tconv.tune", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--suite", action="store_true", help="measure the layers of bench/layers.json")
    what.add_argument("--regret", action="store_true", help="print how far the planner's choices are from the best measured")
    what.add_argument("--fit", action="store_true", help="fit the cost model's times to the record; no file is changed")
    parser.add_argument("--layer", action="append", default=[], help="only this layer of the suite")
    parser.add_argument("--precision", action="append", choices=("bf16", "fp16", "tf32", "fp32"), help="bf16 if not given")
    parser.add_argument(
        "--record", help="--suite: a file to add the lines to, to ship, besides the user's own record; else the file to read"
    )
    parser.add_argument("--again", action="store_true", help="measure also what the record has")
    parser.add_argument("--jobs", type=int, help="processes that compile; one per core if not given")
    parser.add_argument("--tiny", action="store_true", help="shrink the layers: a dry run, on a CPU by the interpreter")
    args = parser.parse_args(arguments)
    if not args.suite:
        return compared(pathlib.Path(args.record) if args.record else file.own(), args.fit)
    precisions = args.precision or ["bf16"]
    if {"tf32", "fp32"} <= {*precisions}:
        parser.error("tf32 and fp32 differ by a setting of the process: run twice")
    try:
        importlib.import_module("bench.layers")
    except ImportError as e:
        print(f"--suite needs a checkout of tconv as the current directory: {e}", file=sys.stderr)
        return 2
    importlib.import_module("bench.providers").set_precision(precisions[-1])
    try:
        device, planned = tuner.device_here()
        asked = suite(args.layer, precisions, args.tiny)
    except (RuntimeError, ValueError) as e:
        print(e, file=sys.stderr)
        return 2
    print(tuner.tune_passes(asked, device, planned, (), args.record, args.again, args.jobs))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
