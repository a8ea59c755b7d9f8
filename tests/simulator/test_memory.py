"""Loads, stores and asynchronous copies: what they move, and every access that is a fault."""

import itertools

import numpy as np
import pytest
import torch

from simulator import Fault, Options, Unsupported
from tests.simulator.execute import execute

KINDS = ("b8", "u8", "s8", "b16", "u16", "s16", "b32", "u32", "s32", "f32", "b64", "u64", "s64", "f64")
SIZES = [(n, k) for n, k in itertools.product((1, 2, 4), KINDS) if n * int(k[1:]) <= 128]  # 16 bytes are the most
PREFIX = {8: "rs", 16: "rs", 32: "r", 64: "rd"}
HINTS = ("", ".nc", ".L1::evict_first", ".L1::evict_last", ".L1::no_allocate")
THREADS = np.arange(32)
BASE = 1024  # of shared memory's addresses


def vector(registers):
    return registers[0] if len(registers) == 1 else "{" + ", ".join(registers) + "}"


def suffix(count, kind):
    return f"{f'.v{count}' if count > 1 else ''}.{kind}"


def shared(offset):
    """Addresses in shared memory, of each thread."""
    return {"%r90": (BASE + np.asarray(offset)).astype(np.int32)}


@pytest.mark.parametrize(("count", "kind"), SIZES)
@pytest.mark.parametrize("hint", HINTS)
def test_global_loads(hint, count, kind):
    width = int(kind[1:])
    size = width // 8
    memory = torch.randint(-128, 128, (32 * count * size + 16,), dtype=torch.int8)
    registers = [f"%{PREFIX[width]}{i}" for i in range(1, count + 1)]
    body = f"add.s64 %rd91, %rd90, %rd92; ld.global{hint}{suffix(count, kind)} {vector(registers)}, [%rd91 + 16];"
    got = execute(body, {"%rd92": THREADS * count * size}, tensors={"%rd90": memory})
    right = memory.numpy()[16:].view(f"{'i' if kind[0] == 's' else 'u'}{size}").reshape(32, count)
    for i, register in enumerate(registers):
        held = got[register]
        assert held.view(f"u{held.itemsize}").tolist() == right[:, i].astype(held.dtype).view(f"u{held.itemsize}").tolist()


@pytest.mark.parametrize(("count", "kind"), SIZES)
@pytest.mark.parametrize("hint", [hint for hint in HINTS if hint != ".nc"])
def test_global_stores(hint, count, kind):
    width = int(kind[1:])
    size = width // 8
    memory = torch.zeros(32 * count * size + 16, dtype=torch.int8)
    registers = [f"%{PREFIX[width]}{i}" for i in range(1, count + 1)]
    held = max(width, 16)
    values = np.random.default_rng(0).integers(0, 256, (count, 32 * held // 8), np.uint8)
    given = {r: v.view(f"u{held // 8}") for r, v in zip(registers, values, strict=True)}
    body = f"add.s64 %rd91, %rd90, %rd92; st.global{hint}{suffix(count, kind)} [%rd91 + 16], {vector(registers)};"
    execute(body, given | {"%rd92": THREADS * count * size}, tensors={"%rd90": memory})
    right = np.stack([given[r] for r in registers], 1).astype(f"u{size}")
    assert memory[:16].eq(0).all()
    assert memory.numpy()[16:].view(f"u{size}").tolist() == right.reshape(-1).tolist()


@pytest.mark.parametrize("space", ["shared", "shared::cta"])
@pytest.mark.parametrize(("count", "kind"), SIZES)
def test_shared_memory_returns_what_was_stored(space, count, kind):
    width = int(kind[1:])
    held, end = max(width, 16), suffix(count, kind)
    registers = [f"%{PREFIX[width]}{i}" for i in range(1, count + 1)]
    loaded = [f"%{PREFIX[width]}{i + 20}" for i in range(1, count + 1)]
    values = np.random.default_rng(0).integers(0, 256, (count, 32 * held // 8), np.uint8)
    given = {r: v.view(f"u{held // 8}") for r, v in zip(registers, values, strict=True)}
    body = f"st.{space}{end} [%r90], {vector(registers)}; ld.{space}{end} {vector(loaded)}, [%r90];"
    got = execute(body, given | shared(THREADS * count * width // 8), shared_bytes=2048)
    for register, source in zip(loaded, registers, strict=True):
        right = given[source].astype(f"{'i' if kind[0] == 's' else 'u'}{width // 8}").astype(got[register].dtype)
        assert got[register].tolist() == right.tolist()


def test_a_load_into_a_wider_register_is_extended_and_guarded():
    memory = torch.arange(-16, 16, dtype=torch.int8)
    given = {"%rd92": THREADS, "%r1": np.full(32, 99, np.int32), "%p1": THREADS % 2 == 0}
    got = execute("add.s64 %rd91, %rd90, %rd92; @%p1 ld.global.s8 %r1, [%rd91];", given, tensors={"%rd90": memory})
    assert got["%r1"].tolist() == [t - 16 if t % 2 == 0 else 99 for t in range(32)]


def test_a_store_takes_the_low_bits_of_wider_registers():
    given = {"%r1": THREADS.astype(np.int32) + 0x70000} | shared(2 * THREADS)
    got = execute("st.shared.b16 [%r90], %r1; ld.shared.u16 %r2, [%r90];", given, shared_bytes=64)
    assert got["%r2"].tolist() == list(range(32))


@pytest.mark.parametrize("cache", ["ca", "cg"])
@pytest.mark.parametrize("size", [4, 8, 16])
@pytest.mark.parametrize("end", ["cp.async.commit_group; cp.async.wait_group 0;", "cp.async.wait_all;"])
def test_asynchronous_copies_fill_up_with_zeros(cache, size, end):
    memory = torch.randint(-128, 128, (32 * size,), dtype=torch.int8)
    given = {"%rd92": THREADS * size, "%r1": np.where(THREADS % 3 == 0, 0, size).astype(np.int32)} | shared(THREADS * size)
    copy = f"add.s64 %rd91, %rd90, %rd92; cp.async.{cache}.shared.global [%r90], [%rd91], {size}, %r1;"
    got = execute(f"{copy} {end} ld.shared.b32 %r2, [%r90];", given, shared_bytes=32 * size, tensors={"%rd90": memory})
    right = memory.numpy().view(np.int32).reshape(32, -1)[:, 0]
    assert got["%r2"].tolist() == np.where(THREADS % 3 == 0, 0, right).tolist()


def test_groups_of_copies_end_in_order():
    """Waiting for all but one ends the first group only."""
    memory = torch.arange(64, dtype=torch.int32)
    copies = "cp.async.ca.shared.global [%r90], [%rd91], 4; cp.async.commit_group;"
    more = "cp.async.ca.shared.global [%r90 + 128], [%rd91 + 128], 4; cp.async.commit_group; cp.async.wait_group 1;"
    given = {"%rd92": THREADS * 4} | shared(THREADS * 4)
    body = f"add.s64 %rd91, %rd90, %rd92; {copies} {more}"
    got = execute(f"{body} ld.shared.b32 %r2, [%r90];", given, shared_bytes=256, tensors={"%rd90": memory})
    assert got["%r2"].tolist() == list(range(32))
    with pytest.raises(Fault, match="that an asynchronous copy is still writing"):
        execute(f"{body} ld.shared.b32 %r2, [%r90 + 128];", given, shared_bytes=256, tensors={"%rd90": memory})


# --- faults ---


def test_out_of_bounds_by_one_names_everything():
    body = ".loc 7 12 34\nadd.s64 %rd91, %rd90, %rd92;\nld.global.b32 %r1, [%rd91];"
    with pytest.raises(Fault) as e:
        execute(body, {"%rd92": THREADS * 4}, tensors={"%rd90": torch.zeros(31)})
    fault = e.value
    assert fault.what == "reads 4 bytes out of bounds"
    assert (fault.place.kernel, fault.place.source, fault.place.text) == ("kernel", "7:12:34", "ld.global.b32 %r1, [%rd91];")
    assert (fault.program, fault.thread, fault.address) == ((0, 0, 0), 31, "byte 124 of the 124 of %rd90")
    assert fault.place.line == 14
    for part in (
        "out of bounds",
        "byte 124",
        "(0, 0, 0)",
        "thread 31",
        "kernel kernel",
        "7:12:34",
        "PTX line 14",
        "ld.global.b32",
    ):
        assert part in str(fault)


def test_next_tensor_is_out_of_bounds_too():
    """However near it lies in memory: two halves of one storage are one tensor's, two storages never."""
    a, b = torch.zeros(32), torch.zeros(32)
    distance = b.data_ptr() - a.data_ptr()
    with pytest.raises(Fault, match="reads 4 bytes out of bounds"):
        execute("add.s64 %rd91, %rd90, %rd92; ld.global.b32 %r1, [%rd91];", {"%rd92": np.full(32, distance)},
                tensors={"%rd90": a, "%rd80": b})  # fmt: skip


COPY = "cp.async.ca.shared.global [%r90], [%rd90], 4;"
WRONG_COPY = "cp.async.cg.shared.global [%r90], [%rd90 + 128], 16;"
FAULTS = {
    "writes out of bounds": ("st.global.b32 [%rd90 + 128], %r1;", "writes 4 bytes out of bounds"),
    "before the beginning": ("ld.global.b32 %r1, [%rd90 + -4];", "reads 4 bytes out of bounds at byte -4"),
    "a null pointer": ("mov.b64 %rd90, 0; ld.global.b32 %r1, [%rd90];", "which is in no tensor"),
    "misaligned": ("ld.global.b32 %r1, [%rd90 + 2];", "reads 4 bytes, misaligned"),
    "a misaligned vector": ("ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [%rd90 + 8];", "reads 16 bytes, misaligned"),
    "shared, out of bounds": (
        "st.shared.b32 [%r90 + 256], %r1;",
        "writes 4 bytes out of bounds at shared memory, byte 256 of 256",
    ),
    "shared, misaligned": ("st.shared.b64 [%r90 + 4], %rd90;", "writes 8 bytes, misaligned,"),
    "shared, never written": ("ld.shared.b32 %r1, [%r90];", "of shared memory that nothing wrote"),
    "a copy out of bounds": (WRONG_COPY, "reads 16 bytes out of bounds"),
    "a copy that nobody waited for": (f"{COPY} cp.async.commit_group; ld.shared.b32 %r1, [%r90];", "is still writing"),
    "a store over a copy": (f"{COPY} st.shared.b32 [%r90], 1;", "writes 4 bytes of shared memory that an asynchronous copy"),
    "two values in global memory": ("mov.u32 %r1, %tid.x; st.global.b32 [%rd90], %r1;", "writes other values at once"),
    "two values in shared memory": ("mov.u32 %r1, %tid.x; st.shared.b32 [%r90], %r1;", "writes other values at once"),
}


@pytest.mark.parametrize("what", FAULTS)
def test_faults(what):
    body, text = FAULTS[what]
    with pytest.raises(Fault, match=text):
        execute(body, shared(np.zeros(32)), shared_bytes=256, tensors={"%rd90": torch.zeros(32)})


def test_one_value_by_many_threads_is_no_race():
    memory = torch.zeros(32, dtype=torch.int32)
    execute(
        "st.global.b32 [%rd90], 7; st.shared.b32 [%r90], 7;", shared(np.zeros(32)), shared_bytes=4, tensors={"%rd90": memory}
    )
    assert memory[0] == 7


def test_gaps_between_elements_are_not_the_tensors():
    every_second = torch.zeros(64)[::2]
    read = "ld.global.b32 %r1, [%rd90 + 8]; ld.global.v2.b32 {%r1, %r2}, [%rd90];"
    with pytest.raises(Fault, match="reads 8 bytes between the tensor's elements at byte 0"):
        execute(read, tensors={"%rd90": every_second})
    execute(read, tensors={"%rd90": every_second}, options=Options(elements=False))
    with pytest.raises(Fault, match="writes 4 bytes between the tensor's elements at byte 4"):
        execute("st.global.b32 [%rd90 + 4], 0;", tensors={"%rd90": every_second})


def test_a_copy_of_a_part_of_its_bytes_is_refused():
    with pytest.raises(Unsupported, match=r"a part of its bytes"):
        execute(
            "cp.async.ca.shared.global [%r90], [%rd90], 4, 2;",
            shared(THREADS * 4),
            shared_bytes=128,
            tensors={"%rd90": torch.zeros(32)},
        )
