"""Processes of one gloo group on the CPU, started once and asked many times.

    with Ranks(4) as ranks:
        ranks(function, *args)  # on every rank; what they return, by rank

The function is found by its name in its module; a rank's exception is raised here, with its traceback as text.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from typing import Any

SECONDS = 120  # until a rank that waits for another gives up


class Ranks:
    def __init__(self, count: int) -> None:
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        spawn = multiprocessing.get_context("spawn")
        self.pipes, self.processes = [], []
        for rank in range(count):
            here, there = spawn.Pipe()
            process = spawn.Process(target=_serve, args=(there, rank, count, port), daemon=True)
            process.start()
            self.pipes.append(here)
            self.processes.append(process)

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *_: object) -> None:
        for pipe in self.pipes:
            pipe.send(None)
        for process in self.processes:
            process.join(SECONDS)

    def __call__(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        for pipe in self.pipes:
            pipe.send((function, args))
        answers = [self._answer(rank) for rank in range(len(self.pipes))]
        failed = [f"rank {rank}:\n{text}" for rank, (text, _) in enumerate(answers) if text]
        assert not failed, "\n".join(failed)
        return [result for _, result in answers]

    def _answer(self, rank: int) -> Any:
        if not self.pipes[rank].poll(2 * SECONDS):
            return "no answer", None
        try:
            return self.pipes[rank].recv()
        except EOFError:
            return "died", None


def _serve(pipe: Any, rank: int, count: int, port: int) -> None:
    os.environ.update(TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1")  # before any kernel is imported
    import datetime

    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)  # and with it every uninitialised tensor is NaN
    dist.init_process_group(
        "gloo",
        init_method=f"tcp://127.0.0.1:{port}",
        rank=rank,
        world_size=count,
        timeout=datetime.timedelta(seconds=SECONDS),
    )
    while (asked := pipe.recv()) is not None:
        function, args = asked
        torch.manual_seed(0)
        try:
            pipe.send((None, function(*args)))
        except BaseException:
            pipe.send((traceback.format_exc(), None))
    dist.destroy_process_group()
