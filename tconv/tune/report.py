"""`report`: a model's convolutions by their share of the step, measured or predicted, as text, HTML or a picture."""

from __future__ import annotations

import html
import os
import pathlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from tconv.planning.device import DEVICES, Device
from tconv.planning.plan import Plan
from tconv.records.book import Measured, book
from tconv.records.key import machine
from tconv.rehearsal.runner import check_callable
from tconv.tune.subject import Asked, passes_of
from tconv.tune.table import TORCH, named

OURS, THEIRS = "#3b6ea5", "#c9c9c9"  # colours of tconv's bars and of torch's
FORMATS = (".html", ".png")


@dataclass(frozen=True)
class Share:
    """One distinct pass of a model.

    Attributes:
        layer: the name of a module that makes it, and how many more do; "-" for calls outside of modules.
        calls: how often the model makes it.
        shape: the problem, as text.
        pass_: "fprop", "dgrad" or "wgrad".
        seconds: of tconv's plan, all calls together; None if it has none that was right.
        torch: of torch's kernel, all calls together; None if it was not measured.
        bound: what the cost model expects to limit tconv's plan.
        choice: what runs: the text of a plan, or "torch".
        why: why that.
    """

    layer: str
    calls: int
    shape: str
    pass_: str
    seconds: float | None
    torch: float | None
    bound: str
    choice: str
    why: str

    @property
    def runs(self) -> float:
        """Seconds of what runs."""
        chosen = self.torch if self.choice == TORCH else self.seconds
        return chosen or 0.0


@dataclass(frozen=True)
class Report:
    """The result of `report`. It prints as a table, is shown as one in a notebook, and can be saved.

    Attributes:
        device: the name of the GPU.
        shares: the passes, the longest first.
        measured: how many of them were measured; the times of the others are predictions.
    """

    device: str
    shares: tuple[Share, ...]
    measured: int

    @property
    def title(self) -> str:
        """What the times are."""
        if not self.measured:
            return f"convolutions on {self.device}, PREDICTED: nothing was measured"
        some = (
            "" if self.measured == len(self.shares) else f" {self.measured} of {len(self.shares)} passes, the others predicted"
        )
        return f"convolutions on {self.device}, measured{some}"

    def _share(self, one: Share) -> float:
        return one.runs / (sum(share.runs for share in self.shares) or 1.0)

    def _rows(self) -> list[tuple[str, ...]]:
        head = ("share", "layer", "calls", "shape", "pass", "tconv us", "torch us", "bound by", "choice", "why")
        rows = [
            (
                f"{self._share(one):.1%}", one.layer, str(one.calls), one.shape, one.pass_, _us(one.seconds), _us(one.torch),
                one.bound or "-", one.choice, one.why,
            )
            for one in self.shares
        ]  # fmt: skip
        return [head, *rows]

    def __str__(self) -> str:
        rows = self._rows()
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join([self.title, *lines])

    def _repr_html_(self) -> str:
        """Returns a table with a bar for each time, for notebooks and `save`."""
        longest = max((t for one in self.shares for t in (one.seconds, one.torch) if t), default=1.0)
        head, *rows = self._rows()
        lines = []
        for one, row in zip(self.shares, rows, strict=True):
            bars = "".join(_bar(t, longest, colour) for t, colour in ((one.seconds, OURS), (one.torch, THEIRS)))
            lines.append("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + f"<td>{bars}</td></tr>")
        names = "".join(f"<th>{html.escape(name)}</th>" for name in (*head, "tconv above torch"))
        return (
            f"<table><caption>{html.escape(self.title)}</caption><thead><tr>{names}</tr></thead>"
            f"<tbody>{''.join(lines)}</tbody></table>"
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the table as HTML, or a picture of it as PNG.

        Args:
            path: a file that ends in .html or .png.
        Raises:
            ValueError: it ends in something else.
            ImportError: a PNG needs matplotlib, which is not installed.
            OSError: the file cannot be written.
        """
        given = pathlib.Path(path)
        if given.suffix not in FORMATS:
            raise ValueError(f"report: a file that ends in one of {FORMATS} is wanted, got {str(path)!r}")
        if given.suffix == ".html":
            style = "<style>body{font:14px sans-serif}td,th{padding:2px 8px;text-align:left}caption{font-weight:bold}</style>"
            given.write_text(
                f'<!doctype html><meta charset="utf-8"><title>{html.escape(self.title)}</title>{style}{self._repr_html_()}'
            )
        else:
            self._picture(given)

    def _picture(self, path: pathlib.Path) -> None:
        from matplotlib.figure import Figure

        figure = Figure(figsize=(10, 1.2 + 0.45 * max(1, len(self.shares))), layout="constrained")
        axes = figure.subplots()
        places = range(len(self.shares))
        axes.barh(
            [i - 0.2 for i in places], [1e6 * (one.seconds or 0.0) for one in self.shares], 0.38, color=OURS, label="tconv"
        )
        axes.barh(
            [i + 0.2 for i in places], [1e6 * (one.torch or 0.0) for one in self.shares], 0.38, color=THEIRS, label="torch"
        )
        for i, one in enumerate(self.shares):
            note = f" {self._share(one):.0%}, {one.choice}" + (f", bound by {one.bound}" if one.bound else "")
            axes.text(1e6 * max(one.seconds or 0.0, one.torch or 0.0), i, note, va="center", fontsize=7)
        axes.set_yticks(list(places), [f"{one.layer} {one.pass_}" for one in self.shares], fontsize=8)
        axes.set(xlabel="microseconds of all its calls", title=self.title)
        axes.invert_yaxis()
        axes.margins(x=0.35)
        axes.legend()
        figure.savefig(path, dpi=150)


def _bar(seconds: float | None, longest: float, colour: str) -> str:
    width = 0 if seconds is None else max(1, round(200 * seconds / longest))
    return f'<div style="height:7px;width:{width}px;background:{colour}"></div>'


def _us(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1e6:.1f}"


def report(model: Callable[..., Any], *inputs: Any, backward: bool = True, target: str | None = None, **kwargs: Any) -> Report:
    """Tells where the time of a model's convolutions goes: by layer and pass, tconv's beside torch's, and what runs and why.

    Times are those of the record (`tune`), else the cost model's predictions, which say so. The model is only rehearsed.

    Args:
        model: a module or a function, with tconv layers, or with torch's while `enable()` is active.
        inputs, kwargs: example inputs, in containers and objects of any kind.
        backward: whether to include the backward pass.
        target: the GPU to predict for, such as "H100"; this machine need not have one. None: the GPU here, else an H200.
    Returns:
        A `Report`: `print` it, show it in a notebook, or `save` it as .html or .png.
    Raises:
        TypeError: the model cannot be called. Errors of the model itself are passed on.
        ValueError: the target is unknown.
        RuntimeError: no Triton, or the model makes no convolution that tconv computes.

    Example:
        >>> import torch, tconv
        >>> layer = tconv.Conv2d(64, 64, 3, device="meta", dtype=torch.bfloat16)
        >>> print(tconv.report(layer, torch.empty(8, 64, 32, 32, device="meta", dtype=torch.bfloat16)).title)
        convolutions on H200, PREDICTED: nothing was measured
    """
    check_callable("report", "model", model)
    if target is not None and target not in DEVICES:
        raise ValueError(f"report: target must be one of {[*DEVICES]} or None, got {target!r}")
    try:
        from tconv.launching.launch import checked_device
    except ImportError as e:
        raise RuntimeError(f"report: Triton cannot be imported ({e})") from e
    here = target is None and torch.cuda.is_available()
    planned = checked_device(torch.cuda.current_device()) if here else DEVICES[target or "H200"]
    asked, left = passes_of(model, inputs, kwargs, backward, None if here else planned)
    if not asked:
        why = f"all calls fall back to torch: {left[0]}" if left else "no call of tconv: see replace_ and enable"
        raise RuntimeError(f"report: nothing to tell, {why}")
    where = machine(planned.name)
    measured = [book().measured_here(where, one.subject.cell()) for one in asked]
    shares = [_share(one, found, planned) for one, found in zip(asked, measured, strict=True)]
    return Report(planned.name, tuple(sorted(shares, key=lambda one: -one.runs)), sum(found is not None for found in measured))


def _share(one: Asked, found: Measured | None, planned: Device) -> Share:
    more = f" +{len(one.layers) - 1}" if len(one.layers) > 1 else ""
    layer = f"{one.layers[0] if one.layers else '-'}{more}"
    plan: Plan = one.subject.launch(planned, found.plan if found else None).call.plan
    bound = plan.cost.bound if plan.cost else ""
    fixed = layer, one.calls, str(one.subject.problem), one.subject.pass_
    if found is None:
        seconds = plan.cost.seconds * one.calls if plan.cost else None
        return Share(*fixed, seconds, None, bound, named(plan.choices), "predicted to be fastest")
    ours, theirs = (None if t is None else t * one.calls for t in (found.seconds, found.torch))
    if found.torch_is_faster:
        return Share(*fixed, ours, theirs, bound, TORCH, "measured to be faster")
    return Share(*fixed, ours, theirs, bound, named(plan.choices), "measured to be fastest")
