"""The pytest option in a project that knows nothing of tconv, and what Triton itself sees of the simulated device."""

import os
import pathlib
import re
import subprocess
import sys

import pytest

import simulator

ROOT = pathlib.Path(simulator.__file__).parent.parent
PROJECT = """
import pytest
import torch
import triton
import triton.language as tl
from triton.runtime import driver
from triton.tools.tensor_descriptor import TensorDescriptor

import simulator


@triton.jit
def scale(x_ptr, out_ptr, n, by, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + i, tl.load(x_ptr + i, mask=i < n) * by, mask=i < n)


def test_floats_are_passed_as_their_bits():
    x, out = torch.randn(1000), torch.empty(1000)
    kernel = scale[(4,)](x, out, 1000, 2.5, BLOCK=256)
    assert torch.equal(out, x * 2.5)
    assert (kernel.n_spills, kernel.n_regs) == (0, 255)
    assert kernel.asm["cubin"].decode() == kernel.asm["ptx"]


def test_a_fault_that_somebody_catches():
    with pytest.raises(simulator.Fault):
        scale[(4,)](torch.randn(9), torch.empty(1000), 1000, 2.5, BLOCK=256)


@pytest.mark.faults
def test_addresses_in_place_of_tensors():
    x, out = torch.randn(64), torch.empty(64)
    kernel = scale[(1,)](x, out, 64, 3.0, BLOCK=64)
    addresses = x.data_ptr(), out.data_ptr()

    def again():
        kernel.run(1, 1, 1, 0, kernel.function, kernel.packed_metadata, None, None, None, *addresses, 64, 4.0, 64)

    with simulator.tensors(x, out):
        again()
    assert torch.equal(out, x * 4)
    with pytest.raises(simulator.Unsupported, match="an address without its tensor"):
        again()


@triton.jit
def turn(x, y, N: tl.constexpr):
    y.store([0, 0], x.load([2, 8]).trans())


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_tensor_descriptors(dtype):
    x, y = torch.randn(64, 64).to(dtype), torch.zeros(32, 16).to(dtype)
    turn[(1,)](TensorDescriptor.from_tensor(x, [16, 32]), TensorDescriptor.from_tensor(y, [32, 16]), N=1)
    assert torch.equal(y, x[2:18, 8:40].t())


def test_the_device():
    assert driver.active.get_current_target().arch == ARCH
    assert driver.active.get_active_torch_device() == torch.device("cpu")
    properties = driver.active.utils.get_device_properties(0)
    assert properties["max_shared_mem"] == {80: 166912, 90: 232448}[ARCH]

"""


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_a_project_of_its_own(arch, tmp_path):
    text = PROJECT.replace("ARCH", arch.removeprefix("sm_"))
    (tmp_path / "test_project.py").write_text(text)
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-p",
        "simulator.pytest_plugin",
        "--compiled",
        arch,
    ]
    done = subprocess.run([*command, "."], env=environment, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert "1 failed, 5 passed" in done.stdout, done.stdout
    assert "FAILED test_project.py::test_a_fault_that_somebody_catches" in done.stdout
    assert re.search(
        r"reads \d+ bytes out of bounds at byte \d+ of the 36 of x_ptr by program \(0, 0, 0\), thread", done.stdout
    )
    assert "compiled kernels" in done.stdout


def test_an_architecture_that_is_not_simulated():
    with pytest.raises(ValueError, match="arch must be one of"):
        simulator.install("sm_100")


def test_the_interpreter_would_run_kernels_unchecked(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(ValueError, match="TRITON_INTERPRET is set"):
        simulator.install("sm_90")


@pytest.mark.parametrize("option", ["--no-async-copy-fence", "--chosen", "--warp-seed=1"])
def test_options_that_mean_nothing_without_compiled_are_refused(option):
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", option, "tests/test_imports.py"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 4
    assert "--compiled" in done.stderr


def test_what_is_not_there_is_an_error():
    with pytest.raises(AttributeError, match="no attribute 'instal'"):
        simulator.instal  # noqa: B018
