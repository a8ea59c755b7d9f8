"""Runs a script with every Triton kernel in the simulator, on CPU tensors, and prints what the launches did.

    python -m simulator.profile --arch sm_90 script.py [arguments of the script]

It is for this command alone: `simulator.profile` is the function of counters.py.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import runpy
import sys


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m simulator.profile", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arch", choices=("sm_80", "sm_90"), default="sm_90", help="the GPU to simulate, default sm_90")
    parser.add_argument("script", help="a Python file")
    parser.add_argument("arguments", nargs=argparse.REMAINDER)
    args = parser.parse_args()
    if not pathlib.Path(args.script).is_file():
        parser.error(f"no file {args.script}")
    os.environ.pop("TRITON_INTERPRET", None)  # before Triton is imported: this is about compiled code
    from simulator.counters import profile
    from simulator.driver import install

    install(args.arch)
    sys.argv = [args.script, *args.arguments]
    sys.path[0] = str(pathlib.Path(args.script).resolve().parent)
    with profile() as counts:
        try:
            runpy.run_path(args.script, run_name="__main__")
        finally:
            print(counts)


if __name__ == "__main__":
    main()
