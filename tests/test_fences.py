"""The fence between asynchronous copies and wgmma: where it is put, in whose kernels, and under which Tritons."""

import json
import pathlib
import re
import types
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from triton.backends.nvidia import compiler as nvidia

from simulator import Fault
from tconv.launching import fences
from tconv.planning.device import ARCHITECTURES, DEVICES, INTERPRETER
from tests.simulator.execute import execute
from tests.simulator.test_matrices import COPIED, descriptor
from tests.test_launch import script

FENCE = "\tfence.proxy.async.shared::cta;\n"
WGMMA = "\t// begin inline asm\n\twgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {%r1}, %rd1, %rd2, 1, 1, 1, 0, 1;\n"
# As Triton 3.6.0 writes them; ADDED stands where a fence is to be added.
CASES = {
    "a loop": f"""
$L__BB0_4:                              // =>This Inner Loop Header: Depth=1
	.loc	1 163 25                        // gather.py:163:25
	cp.async.wait_group 	2;
	bar.sync 	0;
ADDED	shl.b32 	%r383, %r515, 14;
$L__tmp45:
	wgmma.fence.sync.aligned;
{WGMMA}	// end inline asm
	cp.async.commit_group;
	@%p43 bra 	$L__BB0_4;
	bra.uni 	$L__BB0_5;
""",
    "lines between": f"""
	cp.async.wait_group 	0;
	.loc	1 165 29                        // gather.py:165:29
$L__tmp45:
	bar.sync 	0;
ADDED{WGMMA}""",
    "instructions between": f"""
	cp.async.wait_group 	0;
ADDED	shl.b32 	%r383, %r515, 14;
	bar.sync 	0;
{WGMMA}""",
    "wgmma in another block": f"""
	cp.async.wait_group 	0;
	bar.sync 	0;
ADDED	@%p1 bra 	$L__BB0_2;
{FENCE}{WGMMA}
$L__BB0_2:
{WGMMA}""",
    "a block that ends in a label": f"""
	cp.async.wait_group 	0;
	bar.sync 	0;
ADDED	mov.b32 	%r1, 0;
$L__BB0_2:
{FENCE}{WGMMA}""",
    "a fence behind the first wgmma": f"""
	cp.async.wait_group 	0;
	bar.sync 	0;
ADDED{WGMMA}{FENCE}{WGMMA}""",
    "two waits": f"""
	cp.async.wait_group 	1;
	bar.sync 	0;
ADDED{WGMMA}	cp.async.wait_group 	0;
	bar.sync 	0;
ADDED{WGMMA}""",
    "Triton 3.7.1": f"""
	cp.async.wait_group 	2;
	bar.sync 	0;
	shl.b32 	%r384, %r520, 14;
{FENCE}{WGMMA}""",
    "operands that threads wrote": f"""
	cp.async.wait_group 	0;
	bar.sync 	0;
	ld.shared.b32 	%r721, [%r331];
	st.shared.b32 	[%r116], %r721;
	// begin inline asm
{FENCE}	// end inline asm
	bar.sync 	0;
{WGMMA}""",
    "the end": f"""
$L__BB0_5:
{WGMMA}	cp.async.wait_group 	0;
	bar.sync 	0;
	ret;
""",
    "no wgmma": """
	cp.async.wait_group 	0;
	bar.sync 	0;
	mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%r1}, {%r2}, {%r3}, {%r1};
	@%p43 bra 	$L__BB0_4;
""",
}


@pytest.mark.parametrize("name", CASES)
def test_a_fence_follows_a_wait_that_lacks_one(name):
    assert fences.fenced(CASES[name].replace("ADDED", "")) == CASES[name].replace("ADDED", FENCE)


@pytest.mark.parametrize("name", CASES)
def test_what_is_fenced_stays(name):
    text = CASES[name].replace("ADDED", FENCE)
    assert fences.fenced(text) == text


def test_a_fence_that_is_added_is_one_for_the_simulator():
    given = {f"%rd{i}": np.full(128, np.uint64(descriptor(2048 * (i - 1), 1024, 128, 0))) for i in (1, 2)}
    body = re.sub(r"; *", ";\n", COPIED.format(fence=""))

    def run(body):
        execute(body, given, 128, 4096, {"%rd90": torch.zeros(1024)})

    with pytest.raises(Fault, match="without a fence"):
        run(body)
    run(fences.fenced(body))


@dataclass(frozen=True)
class Options:
    ptx_options: str | None


@pytest.mark.parametrize(
    ("given", "passed"), [(fences.MARK, None), (f"-v {fences.MARK}", "-v"), (f"{fences.MARK} -O3 -v", "-O3 -v")]
)
def test_marked_kernels_are_fenced_and_ptxas_does_not_see_the_mark(given, passed):
    seen = []

    def add_stages(backend, stages, options, language):
        seen.append((backend, options, language))
        stages |= {"llir": None, "ptx": lambda source, metadata: f"{source}{metadata}", "cubin": None}

    stages = {}
    fences.with_fences(add_stages)("backend", stages, Options(given), "language")
    assert seen == [("backend", Options(passed), "language")]
    assert list(stages) == ["llir", "ptx", "cubin"]
    text = CASES["a loop"].replace("ADDED", "")
    assert stages["ptx"](text, "metadata") == CASES["a loop"].replace("ADDED", FENCE) + "metadata"


@pytest.mark.parametrize("given", [None, "", "-v", f"{fences.MARK}s"])
def test_other_kernels_are_left_alone(given):
    stages, plain, options = {}, object(), Options(given)

    def add_stages(backend, stages, got, language):
        assert got is options
        stages["ptx"] = plain

    fences.with_fences(add_stages)("backend", stages, options, "language")
    assert stages == {"ptx": plain}


def test_only_hopper_lacks_fences(monkeypatch):
    monkeypatch.setattr(fences, "NEEDED", True)
    monkeypatch.setattr(fences, "install", lambda: None)
    asked = {device.name for _, _, _, device in ARCHITECTURES.values() if fences.marked(device)}
    assert asked == {"H100"}
    assert fences.marked(DEVICES["H200"]) == {"ptx_options": fences.MARK}
    assert fences.marked(INTERPRETER) == {}
    monkeypatch.setattr(nvidia.CUDAOptions, "ptx_options", "-v")  # the variable PTXAS_OPTIONS
    assert fences.marked(DEVICES["H200"]) == {"ptx_options": f"-v {fences.MARK}"}


@pytest.mark.parametrize(("version", "needed"), [("3.6.0", True), ("3.7.0", True), ("3.7.1", False), ("3.10.0", False)])
def test_only_triton_before_3_7_1_lacks_fences(monkeypatch, version, needed):
    """The file is run anew, as a module of its own, under another version of Triton."""
    import triton

    monkeypatch.setattr(triton, "__version__", version)
    own, before = types.ModuleType("fences"), nvidia.CUDABackend.add_stages
    exec(pathlib.Path(fences.__file__).read_text(), vars(own))
    monkeypatch.setattr(nvidia.CUDABackend, "add_stages", before)
    own.install()
    assert (nvidia.CUDABackend.add_stages is not before) is needed
    assert bool(own.marked(DEVICES["H200"])) is needed


def test_what_precompile_leaves_in_the_cache_is_fenced(tmp_path):
    """Compiled in another process. Under a Triton that needs it, the mark is in the key of each kernel with wgmma."""
    out = script(
        """
        layer, x = tconv.Conv2d(64, 64, 3).bfloat16(), torch.empty(2, 64, 16, 16, device="meta", dtype=torch.bfloat16)
        layer, x = layer.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
        with tconv.force(staged=False):
            print(tconv.precompile(layer, x, target="sm_90", jobs=1, progress=False))
        """,
        TRITON_CACHE_DIR=str(tmp_path),
    )
    assert re.match(r"[345] kernels compiled, 0 already there\n", out), out
    copied = []
    for path in tmp_path.glob("*/*.ptx"):
        text = path.read_text()
        assert fences.fenced(text) == text or not fences.NEEDED
        if "wgmma.mma_async" in text and "cp.async.wait_group" in text:
            copied.append(path)
            assert "fence.proxy.async" in text
            told = json.loads(path.with_suffix(".json").read_text())
            assert (fences.MARK in (told["ptx_options"] or "")) is fences.NEEDED
    assert len(copied) == 3


def test_a_mark_that_nobody_reads_is_an_error():
    """Without the rewriting a kernel that asks for fences does not compile, rather than run without them."""
    out = script(
        """
        from tconv.launching import fences
        fences.NEEDED, fences.install = True, lambda: None
        from tconv.launching.variants import launches
        from tconv.launching.descriptors import stand_ins
        from tconv.planning.device import DEVICES
        from tconv.planning.problem import forward_problem
        from tconv.launching.workers import _Target
        from triton.backends.compiler import GPUTarget
        from triton.runtime import driver
        from triton.runtime.errors import PTXASError

        driver.set_active(_Target(GPUTarget("cuda", 90, 32)))
        w = torch.empty(64, 64, 3, 3, dtype=torch.bfloat16, device="meta")
        problem = forward_problem((2, 64, 16, 16), w.shape, (1, 1), ((0, 0), (0, 0)), (1, 1), 1)
        with tconv.force(kernel="gather"):
            launch = launches(problem, torch.bfloat16, True, DEVICES["H200"])["fprop"]()
        try:
            launch.kernel.warmup(*stand_ins(launch), grid=(1,), **launch.named)
        except PTXASError as e:
            print("Unknown option" in str(e))
        """
    )
    assert out.splitlines()[-1] == "True"
