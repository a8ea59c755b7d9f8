"""Records of runs: a folder per device and commit, a file of JSON lines per stage.

The first line says where and with what the numbers were seen; every further line is one test or one cell of a table, written
as soon as it is known. A run that is cut keeps what it has, and the next one goes on behind it.
"""

from __future__ import annotations

import datetime
import functools
import hashlib
import json
import pathlib
import platform
import subprocess
from dataclasses import dataclass
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
KIND = "tconv record"


@dataclass(frozen=True)
class Record:
    """One file that was read: its path, its first line, the other lines, and what is wrong with it, if anything."""

    path: pathlib.Path
    machine: dict[str, Any]
    lines: list[dict[str, Any]]
    complaint: str | None


def read(path: pathlib.Path) -> Record:
    """A record, as far as it can be read: what follows a broken line is left out, and the complaint says so."""
    try:
        texts = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as e:
        return Record(path, {}, [], f"cannot be read ({type(e).__name__})")
    found: list[dict[str, Any]] = []
    complaint = None
    for number, text in enumerate(texts, 1):
        try:
            line = json.loads(text)
        except ValueError:
            complaint = f"line {number} of {len(texts)} is cut or foreign; what follows it is left out"
            break
        if not isinstance(line, dict):
            complaint = f"line {number} is not an object; what follows it is left out"
            break
        found.append(line)
    if not found or found[0].get("kind") != KIND:
        return Record(path, {}, [], "not a record of tconv's")
    return Record(path, found[0], found[1:], complaint)


def read_all(folder: pathlib.Path) -> tuple[dict[str, Record], list[str]]:
    """Stage -> record of a folder, and a line about each file that is cut or foreign."""
    records, complaints = {}, []
    for path in sorted(folder.glob("*.jsonl")):
        record = read(path)
        if record.complaint:
            complaints.append(f"{path}: {record.complaint}")
        if record.machine:
            records[path.stem] = record
    return records, complaints


class Writer:
    """Appends lines to a record; one that is cut is mended by dropping its broken end, a foreign one is refused.

    Args:
        path: the file; its folder is made.
        machine: what the first line is to say, without "kind".
    Raises:
        ValueError: the file is something else, or was made elsewhere or with other versions.
    """

    def __init__(self, path: pathlib.Path, machine: dict[str, Any]) -> None:
        self.path = path
        self.lines: list[dict[str, Any]] = []
        first = {"kind": KIND, **machine}
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and path.stat().st_size:
            old = read(path)
            if not old.machine:
                raise ValueError(f"{path}: {old.complaint}; move it away first")
            differs = [k for k in ("gpu", "commit", "code", "torch", "triton", "tiny") if old.machine.get(k) != first.get(k)]
            if differs:
                raise ValueError(f"{path}: made with another {', '.join(differs)}; give another folder")
            self.lines = old.lines
            if old.complaint or not path.read_text().endswith("\n"):
                path.write_text("".join(json.dumps(line) + "\n" for line in (old.machine, *old.lines)))
        else:
            path.write_text(json.dumps(first) + "\n")

    def write(self, line: dict[str, Any]) -> None:
        """Adds a line and sees it written."""
        self.lines.append(line)
        with self.path.open("a") as f:
            f.write(json.dumps(line) + "\n")


def machine(commit: str | None = None) -> dict[str, Any]:
    """GPU, driver, versions and commit of this checkout: what a record's first line says.

    Args:
        commit: where the checkout has no git beside it.
    """
    import torch

    facts: dict[str, Any] = {
        "commit": commit or _commit(), "code": _code(), "torch": torch.__version__, "triton": _version("triton"),
        "numpy": _version("numpy"), "python": platform.python_version(), "gpu": None, "host": platform.machine(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }  # fmt: skip
    if torch.cuda.is_available():
        p = torch.cuda.get_device_properties(0)
        facts |= {
            "gpu": p.name, "units": p.multi_processor_count, "memory_bytes": p.total_memory, "cuda": torch.version.cuda,
            "hip": torch.version.hip, "cudnn": torch.backends.cudnn.version(), "driver": _driver(),
        }  # fmt: skip
    return facts


def folder_name(facts: dict[str, Any]) -> str:
    """A folder's name for a machine and commit: "nvidia-h200-1a2b3c4d5"."""
    gpu = (facts["gpu"] or "cpu").lower().replace(" ", "-")
    return f"{gpu}-{str(facts['commit'])[:9]}"


@functools.cache
def _commit() -> str:
    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True, timeout=20).stdout.strip()

    try:
        # Results themselves do not make a checkout a changed one.
        changed = git("status", "--porcelain", "--", ".", ":!bench/results")
        return git("rev-parse", "HEAD") + ("-changed" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def _code() -> str:
    """A digest of what is measured and of what measures, which a commit that is unknown or changed does not tell."""
    digest = hashlib.sha256()
    for path in sorted([*(ROOT / "tconv").rglob("*.py"), *(ROOT / "bench").glob("*.py"), *(ROOT / "tests").glob("*.py")]):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def _driver() -> str | None:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return None


def _version(package: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return None


if __name__ == "__main__":  # the folder's name, for scripts/gpu.sh
    import sys

    print(folder_name(machine(sys.argv[2] if sys.argv[1:2] == ["--commit"] else None)))
