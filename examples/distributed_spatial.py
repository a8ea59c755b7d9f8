"""Trains a small 3-D U-Net on volumes cut into slabs, one per process, and checks itself against one process.

    torchrun --nproc-per-node 2 examples/distributed_spatial.py

On GPUs it uses nccl; without one, gloo and Triton's interpreter (set TRITON_INTERPRET=1). No process holds a whole volume,
but for the check: there each also trains the same network on the whole, by torch.nn.
"""

from __future__ import annotations

import argparse
import copy
import os
import pathlib
import sys

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))  # runs from a checkout too

import tconv
import tconv.distributed

PLANE = (4, 4)  # height and width; the depth is cut


class UNet(nn.Module):
    """One level down and up, and a skip connection: convolutions, transposed ones and what works by element."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv3d(1, 2, 3, padding=1)
        self.down = nn.Conv3d(2, 4, 3, stride=2, padding=1)
        self.inner = nn.Conv3d(4, 4, 3, padding=2, dilation=2)
        self.up = nn.ConvTranspose3d(4, 2, 3, stride=2, padding=1)
        self.head = nn.Conv3d(4, 1, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a = F.relu(self.stem(x))
        b = F.relu(self.inner(F.relu(self.down(a))))
        up = self.up(b, output_size=a.shape[2:])
        return self.head(torch.cat([a, up], 1))


def volume(first: int, last: int) -> torch.Tensor:
    """Slices of a made-up volume, as a reader of files would get them: only those asked for."""
    z, y, x = torch.meshgrid(torch.arange(first, last), *map(torch.arange, PLANE), indexing="ij")
    return torch.sin(0.7 * z + 0.3 * y * x).double().view(1, 1, *z.shape)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    optimizer.zero_grad()
    loss = (model(x) - target).square().sum()  # a sum: the slabs need not be equally deep
    loss.backward()
    optimizer.step()
    return loss.detach()


def main() -> None:
    parser = argparse.ArgumentParser(description="A 3-D U-Net on volumes cut into slabs, checked against one process.")
    parser.add_argument("--steps", type=int, default=3)
    steps = parser.parse_args().steps
    gpu = torch.cuda.is_available()
    if gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if gpu else "gloo")
    device = "cuda" if gpu else "cpu"
    mesh = init_device_mesh(device, (dist.get_world_size(),))
    torch.manual_seed(0)  # the same parameters everywhere
    whole = UNet().double().to(device)
    model = tconv.distributed.replace_(copy.deepcopy(whole))

    depth = 4 * mesh.size() - 1  # uneven, and enough for everyone at the lower level
    cuts = tconv.distributed.bounds(depth, mesh.size())
    slab = volume(*cuts[mesh.get_local_rank() :][:2]).to(device)
    form = torch.empty(1, 1, depth, *PLANE, device="meta")
    place = {"shape": form.shape, "stride": form.stride()}
    x = DTensor.from_local(slab, mesh, [Shard(2)], **place)
    target = DTensor.from_local(slab.square(), mesh, [Shard(2)], **place)

    everything = volume(0, depth).to(device)
    optimizers = [torch.optim.SGD(net.parameters(), lr=1e-4) for net in (model, whole)]
    with tconv.recording() as calls:
        for i in range(steps):
            loss = step(model, optimizers[0], x, target).full_tensor()
            expected = step(whole, optimizers[1], everything, everything.square())
            torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-9)
            if dist.get_rank() == 0:
                print(f"step {i}: loss {loss:.9f}, as of one process {expected:.9f}")
    for ours, right in zip(model.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(ours, right, rtol=1e-9, atol=1e-9)
    left = [str(call) for call in calls if not call.ours]
    if left:
        raise SystemExit("fell back to torch:\n" + "\n".join(left))
    if dist.get_rank() == 0:
        print(f"depth {depth} cut at {cuts}: parameters as of one process; {len(calls)} passes by tconv, no fallback to torch")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
