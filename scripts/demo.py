"""Trains one small network on real images twice, by torch.nn and by tconv, and compares. Run it with scripts/demo.sh.

The images are scikit-learn's: 1,797 scanned digits and two photographs. The network reads each digit as an image and as a
scan line, names and redraws it, and tells from short clips which way a camera pans over a photograph: dense, strided,
grouped, depthwise, pointwise, dilated and transposed convolutions, in one, two and three dimensions.

Rounding is all that may differ between the two, so the yardstick is rounding itself: a third run, torch.nn in float64,
says how far fp32 takes torch.nn from the exact course of the training, and tconv may stray that far from torch.nn, times
TOLERANCE. Exit status 1 where it strays further, or where any call fell back to torch.
"""

from __future__ import annotations

import argparse
import copy
import os
import platform
import statistics
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import matplotlib
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from sklearn.datasets import load_digits, load_sample_images
from torch import Tensor, nn
from tqdm import tqdm

import tconv

matplotlib.use("Agg")
import matplotlib.pyplot as plt

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu")
STEPS = {"cpu": 36, "cuda": 400}  # under the interpreter a step takes seconds
BATCH = 80
TRAINING = 1437  # digits, and as many clips; the other 360 are held out
LEARNING_RATE = 0.02
RECONSTRUCTION = 10  # weight of the reconstruction's error, which is small in number, in the loss
TOLERANCE = 10  # two fp32 runs add in different orders: as far apart as each from float64, and some luck
FLOOR = 1e-5  # of the tolerance: 20 units in the last place of the first loss, about 6

FRAMES, WINDOW = 4, 8  # of a clip; the camera moves one pixel per frame
DIRECTIONS = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}  # rows, columns
NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
PALETTE = {"torch.nn": "#1f5fa8", "tconv": "#e8742c", "float64": "#8a8a8a"}


@dataclass(frozen=True)
class Images:
    """Digits and clips, paired at random.

    Attributes:
        digits: [N, 1, 8, 8], ink from 0 to 1.
        labels: [N], 0 to 9.
        clips: [N, 3, FRAMES, WINDOW, WINDOW], each of mean 0 and about unit variance.
        directions: [N], indices into DIRECTIONS.
    """

    digits: Tensor
    labels: Tensor
    clips: Tensor
    directions: Tensor

    def __getitem__(self, index: Tensor | slice) -> Images:
        return Images(self.digits[index], self.labels[index], self.clips[index], self.directions[index])

    def to(self, like: Tensor) -> Images:
        """On a tensor's device, the images in its dtype."""
        device = like.device
        return Images(self.digits.to(like), self.labels.to(device), self.clips.to(like), self.directions.to(device))


def pan(photograph: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Clips of a window moving over a photograph, from random places in random directions.

    Args:
        photograph: [3, H, W].
        count: how many.
        generator: of the places and directions.
    Returns:
        clips [count, 3, FRAMES, WINDOW, WINDOW] and directions [count].
    """
    reach = FRAMES - 1
    directions = torch.randint(len(DIRECTIONS), (count,), generator=generator)
    moves = torch.tensor(list(DIRECTIONS.values()))[directions]  # [count, 2]
    limits = [extent - WINDOW - reach for extent in photograph.shape[1:]]
    starts = torch.stack([torch.randint(reach, limit, (count,), generator=generator) for limit in limits], 1)
    corners = starts[:, None] + moves[:, None] * torch.arange(FRAMES)[:, None]  # [count, FRAMES, 2]
    rows, columns = (corners[..., axis, None] + torch.arange(WINDOW) for axis in (0, 1))
    clips = photograph[:, rows[..., :, None], columns[..., None, :]].transpose(0, 1)
    clips = clips - clips.mean((2, 3, 4), keepdim=True)
    return clips / (clips.std((1, 2, 3, 4), keepdim=True) + 0.02), directions  # 0.02: noise in the sky stays small


def load_images() -> tuple[Images, Images]:
    """The images to train on and those held out: other digits, and clips of the photographs' right quarters."""
    generator = torch.Generator().manual_seed(1)
    scans = load_digits()
    order = torch.randperm(len(scans.target), generator=generator)
    digits = (torch.tensor(scans.images, dtype=torch.float32) / 16).unsqueeze(1)[order]
    labels = torch.tensor(scans.target)[order]
    # Every second pixel: neighbours differ more, so that a clip of few pixels shows its direction.
    photographs = [torch.tensor(p[::2, ::2]).permute(2, 0, 1) / 255 for p in load_sample_images().images]
    cut = photographs[0].shape[2] * 3 // 4
    trained = clips_of([p[:, :, :cut] for p in photographs], TRAINING, generator)
    held_out = clips_of([p[:, :, cut:] for p in photographs], len(digits) - TRAINING, generator)
    return Images(digits[:TRAINING], labels[:TRAINING], *trained), Images(digits[TRAINING:], labels[TRAINING:], *held_out)


def clips_of(photographs: Sequence[Tensor], count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """`pan` over several photographs in equal shares, shuffled."""
    share = -(-count // len(photographs))
    clips, directions = zip(*(pan(p, share, generator) for p in photographs), strict=True)
    order = torch.randperm(share * len(photographs), generator=generator)[:count]
    return torch.cat(clips)[order], torch.cat(directions)[order]


def normed(conv: nn.Module) -> nn.Sequential:
    """A convolution without bias, batch norm, and GELU: smooth, for at ReLU's kink rounding would turn into a jump."""
    return nn.Sequential(conv, NORMS[len(conv.kernel_size)](conv.out_channels), nn.GELU())


class Network(nn.Module):
    """Names and redraws digits, and names the direction of clips."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(  # [N, 1, 8, 8] -> [N, 8, 4, 4]
            normed(nn.Conv2d(1, 16, 3, stride=2, padding=1, bias=False)),
            normed(nn.Conv2d(16, 16, 3, padding=1, bias=False)),
            normed(nn.Conv2d(16, 24, (1, 3), padding=(0, 1), groups=2, bias=False)),
            normed(nn.Conv2d(24, 24, 3, padding=1, groups=24, bias=False)),
            normed(nn.Conv2d(24, 16, 1, bias=False)),
            nn.Conv2d(16, 8, 3, padding=2, dilation=2),
        )
        self.decoder = nn.Sequential(  # [N, 8, 4, 4] -> [N, 1, 8, 8]
            nn.GELU(),
            normed(nn.ConvTranspose2d(8, 16, 2, stride=2, bias=False)),
            nn.ConvTranspose2d(16, 1, 3, padding=1),
            nn.Sigmoid(),
        )
        self.scan_line = nn.Sequential(  # [N, 1, 64] -> [N, 16, 16]
            normed(nn.Conv1d(1, 16, 3, stride=2, padding=1, bias=False)),
            normed(nn.Conv1d(16, 16, 3, stride=2, padding=1, bias=False)),
        )
        self.camera = nn.Sequential(  # [N, 3, 4, 8, 8] -> [N, 16, 2, 3, 3]
            normed(nn.Conv3d(3, 16, 2, bias=False)),
            normed(nn.Conv3d(16, 16, 2, stride=(1, 2, 2), bias=False)),
        )
        self.digit = nn.Linear(8 * 4 * 4 + 16 * 16, 10)
        self.direction = nn.Linear(16, len(DIRECTIONS))

    def forward(self, digits: Tensor, clips: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Scores of the digits [N, 10], the digits redrawn [N, 1, 8, 8], scores of the directions [N, 4]."""
        code, line = self.encoder(digits), self.scan_line(digits.flatten(2))
        features = torch.cat([code.flatten(1), line.flatten(1)], 1)
        return self.digit(features), self.decoder(code), self.direction(self.camera(clips).mean((2, 3, 4)))


@dataclass(frozen=True)
class Run:
    """A trained network and how it went.

    Attributes:
        model: the network, trained.
        losses: [steps], of each step's batch.
        milliseconds: a step's, their median.
        accuracy, pan_accuracy: of the held-out digits and clips, 0 to 1.
        error: mean squared error of the held-out digits' reconstruction.
        redrawn: [N, 8, 8], the held-out digits' reconstruction.
    """

    model: nn.Module
    losses: Tensor
    milliseconds: float
    accuracy: float = 0.0
    pan_accuracy: float = 0.0
    error: float = 0.0
    redrawn: Tensor | None = None


def train(name: str, model: nn.Module, images: Images, steps: int) -> Run:
    """Trains a model in place, on the same batches whatever the model."""
    images = images.to(next(model.parameters()))
    batches = torch.randint(len(images.labels), (steps, BATCH), generator=torch.Generator().manual_seed(2))
    optimizer = torch.optim.Adam(model.parameters(), eps=1e-5)  # eps: a gradient that is all rounding moves nothing
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)
    losses, seconds = [], []
    for index in tqdm(batches.to(images.labels.device), desc=f"{name:17}", unit="step"):
        start = time.perf_counter()
        loss = joint_loss(model, images[index])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())  # waits for the device
        seconds.append(time.perf_counter() - start)
    return Run(model, torch.tensor(losses, dtype=torch.float64), 1e3 * statistics.median(seconds))


def joint_loss(model: nn.Module, batch: Images) -> Tensor:
    """Cross entropy of digits and directions, and the reconstruction's squared error; a scalar."""
    digit, redrawn, direction = model(batch.digits, batch.clips)
    reconstruction = RECONSTRUCTION * F.mse_loss(redrawn, batch.digits)
    return F.cross_entropy(digit, batch.labels) + reconstruction + F.cross_entropy(direction, batch.directions)


@torch.no_grad()
def test(run: Run, images: Images) -> Run:
    """The same run with its scores on held-out images."""
    images = images.to(next(run.model.parameters()))
    digit, redrawn, direction = run.model.eval()(images.digits, images.clips)
    return replace(
        run,
        accuracy=(digit.argmax(1) == images.labels).float().mean().item(),
        pan_accuracy=(direction.argmax(1) == images.directions).float().mean().item(),
        error=F.mse_loss(redrawn, images.digits).item(),
        redrawn=redrawn.squeeze(1).cpu(),
    )


def parameter_difference(a: nn.Module, b: nn.Module) -> tuple[float, float]:
    """The largest difference between two networks' parameters, and the same over the largest parameter."""
    pairs = list(zip(a.parameters(), b.parameters(), strict=True))
    largest = max((p.double() - q.double()).abs().max().item() for p, q in pairs)
    return largest, largest / max(p.abs().max().item() for p, _ in pairs)


def farthest(a: Run, b: Run) -> float:
    """The largest difference between two runs' losses over all steps."""
    return (a.losses - b.losses).abs().max().item()


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of text, the first a heading, as aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def comparison(torchs: Run, ours: Run, exact: Run) -> str:
    """The two runs side by side."""
    runs = (torchs, ours)
    rows = [
        ["", "torch.nn", "tconv"],
        ["final loss", *(f"{r.losses[-1]:.6f}" for r in runs)],
        ["accuracy, held-out digits", *(f"{r.accuracy:.2%}" for r in runs)],
        ["accuracy, held-out pans", *(f"{r.pan_accuracy:.2%}" for r in runs)],
        ["reconstruction, mean squared error", *(f"{r.error:.6f}" for r in runs)],
        ["loss, farthest from float64", *(f"{farthest(r, exact):.1e}" for r in runs)],
        ["parameters, farthest from float64", *(f"{parameter_difference(r.model, exact.model)[0]:.1e}" for r in runs)],
    ]
    if DEVICE.type == "cuda":
        rows.append(["ms per step, median", *(f"{r.milliseconds:.2f}" for r in runs)])
    return table(rows)


def kernels_that_ran(calls: Sequence[tconv.Call]) -> str:
    """How many calls each kernel took for each pass."""
    counts = Counter((c.operation, c.plan.kernel) for c in calls if c.plan)
    return table([["pass", "kernel", "calls"], *([*key, str(count)] for key, count in sorted(counts.items()))])


def left_to_torch(calls: Sequence[tconv.Call], model: nn.Module) -> Counter[str]:
    """Calls that tconv did not take, and layers that `replace_` did not, with how often."""
    torchs = nn.modules.conv.__name__
    missed = [f"{name}: still torch.nn's" for name, layer in model.named_modules() if type(layer).__module__ == torchs]
    return Counter([*(str(call) for call in calls if not call.ours), *missed])


def draw_losses(loss_axes: Axes, difference_axes: Axes, torchs: Run, ours: Run, exact: Run, tolerance: float) -> None:
    """Both loss curves, and beneath them how far apart they are."""
    steps = torch.arange(1, len(ours.losses) + 1)
    sparse = max(1, len(steps) // 36)
    loss_axes.plot(steps, torchs.losses, color=PALETTE["torch.nn"], linewidth=2, label="torch.nn")
    loss_axes.plot(
        steps, ours.losses, "--o", color=PALETTE["tconv"], linewidth=1, markersize=4, markerfacecolor="white",
        markevery=sparse, label="tconv",
    )  # fmt: skip
    loss_axes.set(ylabel="loss", title="Training, same weights and batches", ylim=(0, None))
    loss_axes.tick_params(labelbottom=False)
    for run, name, label in ((exact, "float64", "torch.nn and torch.nn in float64"), (ours, "tconv", "torch.nn and tconv")):
        difference = (torchs.losses - run.losses).abs()
        difference_axes.plot(
            steps, difference, "-o", color=PALETTE[name], linewidth=1, markersize=3, markevery=sparse, label=label
        )
    difference_axes.axhline(tolerance, color="#b03030", linewidth=1, linestyle=":", label="tolerance")
    difference_axes.set_yscale("symlog", linthresh=1e-8)  # logarithmic, with a place for losses alike to the last bit
    difference_axes.set(xlabel="step", ylabel="|difference|", ylim=(0, 5 * tolerance))
    loss_axes.legend(frameon=False)
    difference_axes.legend(frameon=False, fontsize=8, loc="lower right", bbox_to_anchor=(1, 1), ncols=3, borderaxespad=0)
    for axes in (loss_axes, difference_axes):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)


def draw(path: Path, torchs: Run, ours: Run, exact: Run, images: Images, tolerance: float) -> None:
    """Saves a picture: losses at the left, digits and their reconstructions at the right."""
    figure = plt.figure(figsize=(13, 5), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(5, 6.5))
    loss_axes, difference_axes = left.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    draw_losses(loss_axes, difference_axes, torchs, ours, exact, tolerance)
    rows = {"scanned": images.digits.squeeze(1), "torch.nn": torchs.redrawn, "tconv": ours.redrawn}
    examples = [int((images.labels == digit).nonzero()[i]) for i in (0, 1) for digit in range(10)]
    grid = right.subplots(2 * len(rows), 10)
    for i, axes_row in enumerate(grid):
        name, pictures = list(rows.items())[i % len(rows)]
        for axes, example in zip(axes_row, examples[10 * (i // len(rows)) :], strict=False):
            axes.imshow(pictures[example], cmap="gray_r", vmin=0, vmax=1)
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_color("#cccccc")
        axes_row[0].set_ylabel(name, color=PALETTE.get(name, "black"), fontsize=9)
    right.suptitle("Held-out digits, as scanned and as redrawn")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def describe_machine() -> str:
    """Device and versions, in two lines."""
    try:
        from triton import __version__ as triton
    except ImportError:
        triton = "missing"
    name = torch.cuda.get_device_name(DEVICE) if DEVICE.type == "cuda" else f"{platform.machine()} CPU"
    how = ", kernels run in Triton's interpreter: results count, times do not" if INTERPRETED else ""
    return f"device: {name}{how}\ntorch {torch.__version__}, triton {triton}, tconv {tconv.__version__}, fp32 without TF32"


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    steps = STEPS[DEVICE.type]
    parser.add_argument("--steps", type=int, default=steps, help=f"training steps of each run (default here: {steps})")
    parser.add_argument("--out", type=Path, default=Path("out/demo.png"), help="where the picture goes (default: %(default)s)")
    arguments = parser.parse_args()
    if arguments.steps < 2:
        parser.error(f"--steps must be at least 2, got {arguments.steps}")
    return arguments


def main() -> int:
    """Trains, tests, compares; 0 if tconv ran every convolution and its losses are torch.nn's but for rounding."""
    arguments, start = parse(), time.perf_counter()
    torch.backends.cudnn.allow_tf32 = False  # else torch and tconv would both round products to 10 bits
    print(describe_machine())
    training, held_out = load_images()
    torch.manual_seed(0)
    model = Network().to(DEVICE)
    ours_model, exact_model = copy.deepcopy(model), copy.deepcopy(model).double()
    print(f"\n{len(training.labels)} digits and clips to train on, {len(held_out.labels)} held out; batches of {BATCH}\n")
    tconv.replace_(ours_model, report=print)
    print(flush=True)

    exact = train("torch.nn, float64", exact_model, training, arguments.steps)
    torchs = test(train("torch.nn", model, training, arguments.steps), held_out)
    with tconv.recording() as calls:
        ours = test(train("tconv", ours_model, training, arguments.steps), held_out)

    tolerance = max(TOLERANCE * farthest(torchs, exact), FLOOR)
    apart, left = farthest(torchs, ours), left_to_torch(calls, ours_model)
    absolute, relative = parameter_difference(torchs.model, ours.model)
    draw(arguments.out, torchs, ours, exact, held_out, tolerance)
    print(f"\n{comparison(torchs, ours, exact)}\n")
    print(f"largest parameter difference, torch.nn and tconv: {absolute:.1e}, {relative:.1e} of the largest parameter")
    print(f"largest loss difference, torch.nn and tconv: {apart:.1e}, tolerance {tolerance:.1e}")
    print(f"  ({TOLERANCE} times what rounding alone moves torch.nn's losses, its distance from float64; at least {FLOOR:.0e})")
    print(f"\n{kernels_that_ran(calls)}\n\nfallbacks to torch, of calls and layers: {left.total()}")
    print("".join(f"  {count} x {reason}\n" for reason, count in left.items()), end="")
    print(f"\npicture: {arguments.out}\ntook {time.perf_counter() - start:.0f} s")
    if left or not calls or not apart <= tolerance:  # not <=: a loss may be no number
        print("FAILED: " + ("a call fell back to torch" if left or not calls else "the losses differ by more than rounding"))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
