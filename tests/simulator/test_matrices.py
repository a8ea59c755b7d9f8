"""Tensor cores against PTX's description of fragments, element by element, and layouts of descriptors built by hand."""

import numpy as np
import pytest
import torch

from simulator import Fault, Options, Unsupported
from tests.simulator.execute import execute

TORCH = {"bf16": torch.bfloat16, "f16": torch.float16}
SIZES = {"e4m3": 1, "bf16": 2, "f16": 2, "tf32": 4}
LANES = range(32)


def random_numbers(shape, kind, seed):
    """(bits, as they are stored; the numbers that they are, in fp64). Small multiples of powers of two: sums are exact."""
    values = torch.from_numpy(np.random.default_rng(seed).integers(-16, 17, shape) / 8.0)
    if kind in TORCH:
        t = values.to(TORCH[kind])
        return t.view(torch.int16).numpy().view(np.uint16), t.double().numpy()
    if kind == "e4m3":
        t = values.to(torch.float8_e4m3fn)
        return t.view(torch.uint8).numpy(), t.double().numpy()
    if kind == "tf32":
        t = values.float()
        return t.view(torch.int32).numpy(), t.double().numpy()
    return values.numpy().view(np.int64), values.numpy()


def pack(*parts):
    """Returns the registers whose parts, the lowest first, are those elements."""
    width = 32 // len(parts)
    return sum(part.astype(np.uint32) << np.uint32(width * i) for i, part in enumerate(parts)).view(np.int32)


# Where element i of a thread's fragment lies: row and column of a, k and column of b, as PTX lists them for each shape.
def a_16_bits(lane, i):
    row = lane // 4 + (8 if i % 4 >= 2 else 0)
    return row, lane % 4 * 2 + i % 2 + (8 if i >= 4 else 0)


def b_16_bits(lane, i):
    return lane % 4 * 2 + i % 2 + (8 if i >= 2 else 0), lane // 4


def a_8_bits(lane, i):
    return lane // 4 + (8 if i % 8 >= 4 else 0), lane % 4 * 4 + i % 4 + i // 8 * 16


def a_wide(lane, i):
    return lane // 4 + (8 if i % 2 else 0), lane % 4 + i // 2 * 4


def b_wide(lane, i):
    return lane % 4 + i * 4, lane // 4


def c_16_rows(lane, i):
    return lane // 4 + (8 if i >= 2 else 0), lane % 4 * 2 + i % 2


SHAPES = {
    **{f"m16n8k{k}.row.col.f32.{t}.{t}.f32": (16, k, t, a_16_bits, b_16_bits) for k in (8, 16) for t in ("bf16", "f16")},
    **{f"m16n8k{k}.row.col.f32.tf32.tf32.f32": (16, k, "tf32", a_wide, b_wide) for k in (4, 8)},
    **{f"m16n8k{k}.row.col.f64.f64.f64.f64": (16, k, "f64", a_wide, b_wide) for k in (4, 8, 16)},
    "m8n8k4.row.col.f64.f64.f64.f64": (8, 4, "f64", lambda lane, i: (lane // 4, lane % 4), b_wide),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_mma(shape):
    rows, k, kind, at_a, at_b = SHAPES[shape]
    (a, a_numbers), (b, b_numbers) = random_numbers((rows, k), kind, 1), random_numbers((k, 8), kind, 2)
    c = np.random.default_rng(3).integers(-99, 99, (rows, 8)).astype(np.float64 if kind == "f64" else np.float32)
    wide = "rd" if kind == "f64" else "r"
    bits = np.int64 if kind == "f64" else np.int32
    per = 2 if kind in TORCH else 1

    def fragment(matrix, at, elements):
        columns = [np.array([matrix[at(lane, i)] for lane in LANES]) for i in range(elements)]
        return [pack(*columns[i : i + 2]) for i in range(0, elements, 2)] if per == 2 else columns

    fragments = {"a": fragment(a, at_a, rows * k // 32), "b": fragment(b, at_b, k * 8 // 32)}
    fragments["c"] = [np.array([c[c_16_rows(lane, i)] for lane in LANES]).view(bits) for i in range(rows * 8 // 32)]
    names, given = {"d": [f"%{wide}{i}" for i in range(90, 90 + rows * 8 // 32)]}, {}
    for start, (which, values) in zip((10, 30, 50), fragments.items(), strict=True):
        held = "rd" if kind == "f64" else "r"
        names[which] = [f"%{held}{start + i}" for i in range(len(values))]
        given |= dict(zip(names[which], values, strict=True))
    operands = ", ".join("{" + ", ".join(names[which]) + "}" for which in "dabc")
    got = execute(f"mma.sync.aligned.{shape} {operands};", given)
    right = a_numbers @ b_numbers + c
    for i, name in enumerate(names["d"]):
        result = got[name].view(np.float64 if kind == "f64" else np.float32)
        assert result.tolist() == [right[c_16_rows(lane, i)] for lane in LANES]


def test_tf32_ignores_the_bits_it_lacks():
    a = np.full(32, 0x3F801FFF, np.int32)  # 1 and all 13 bits that are not read
    given = {f"%r{i}": a for i in range(1, 5)} | {
        "%r5": np.full(32, 0x3F800000, np.int32),
        "%r6": np.full(32, 0x3F800000, np.int32),
    }
    given |= {"%r7": np.zeros(32, np.int32)}
    got = execute(
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%r11, %r12, %r13, %r14}, {%r1, %r2, %r3, %r4}, {%r5, %r6},"
        "{%r7, %r7, %r7, %r7};", given,
    )  # fmt: skip
    assert got.as_type("%r11", "f32").tolist() == [8.0] * 32


# --- ldmatrix and stmatrix ---


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("trans", ["", ".trans"])
@pytest.mark.parametrize("space", ["shared", "shared::cta"])
def test_ldmatrix(count, trans, space):
    """Thread i of matrix m names its row i; thread t gets elements 2(t % 4) and the next of row t // 4, or of that column."""
    words = np.random.default_rng(0).integers(0, 1 << 31, 32 * 4).astype(np.int32)
    rows = np.random.default_rng(1).permutation(32)  # of 16 bytes, anywhere
    given = {f"%r{i}": words[i::4] for i in range(4)} | {"%r8": 1024 + 16 * np.arange(32, dtype=np.int32)}
    given["%r9"] = (1024 + 16 * rows).astype(np.int32)
    targets = [f"%r{20 + i}" for i in range(count)]
    got = execute(
        f"st.shared.v4.b32 [%r8], {{%r0, %r1, %r2, %r3}}; bar.sync 0;"
        f"ldmatrix.sync.aligned.m8n8.x{count}{trans}.{space}.b16 {{{', '.join(targets)}}}, [%r9];", given, shared_bytes=512,
    )  # fmt: skip
    memory = words.view(np.uint16).reshape(32, 8)
    for m, target in enumerate(targets):
        matrix = np.stack([memory[rows[8 * m + i]] for i in range(8)])
        matrix = matrix.T if trans else matrix
        right = [int(matrix[t // 4, 2 * (t % 4)]) | int(matrix[t // 4, 2 * (t % 4) + 1]) << 16 for t in LANES]
        assert got[target].view(np.uint32).tolist() == right


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("trans", ["", ".trans"])
@pytest.mark.parametrize("space", ["shared", "shared::cta"])
def test_stmatrix_is_ldmatrix_backwards(count, trans, space):
    values = [np.random.default_rng(i).integers(0, 1 << 31, 32).astype(np.int32) for i in range(count)]
    rows = np.random.default_rng(9).permutation(32)
    given = {f"%r{i}": v for i, v in enumerate(values)} | {"%r9": (1024 + 16 * rows).astype(np.int32)}
    registers, targets = (", ".join(f"%r{start + i}" for i in range(count)) for start in (0, 20))
    got = execute(
        f"stmatrix.sync.aligned.m8n8.x{count}{trans}.{space}.b16 [%r9], {{{registers}}}; bar.sync 0;"
        f"ldmatrix.sync.aligned.m8n8.x{count}{trans}.{space}.b16 {{{targets}}}, [%r9];", given, shared_bytes=512,
    )  # fmt: skip
    for i, v in enumerate(values):
        assert got[f"%r{20 + i}"].tolist() == v.tolist()


# --- wgmma ---

SPANS = {0: 16, 1: 128, 2: 64, 3: 32}  # descriptor's swizzle mode: bytes


def laid_out(matrix, mode, size):
    """K-major: atoms of eight rows of `span` bytes, 16-byte pieces of which are swizzled; (bytes, leading, stride offset).

    Atoms lie one behind the other, along the rows first.
    """
    rows, k = matrix.shape
    span = SPANS[mode]
    pieces, per_piece = span // 16, 16 // size
    per = span // size
    leading, stride = rows // 8 * 8 * span, 8 * span
    memory = np.zeros(-(-k // per) * leading, np.uint8)
    for i in range(rows):
        for j in range(k):
            base = j // per * leading + i // 8 * stride + i % 8 * span
            piece = j % per // per_piece
            piece ^= (i % 8) * pieces // 8  # 8, 4, 2 or 1 pieces: rows by one, two, four or eight take turns
            at = base + piece * 16 + j % per_piece * size
            memory[at : at + size] = np.array([matrix[i, j]]).view(np.uint8)
    return memory, leading, stride


def descriptor(offset, leading, stride, mode):
    return (1024 + offset) >> 4 | leading >> 4 << 16 | stride >> 4 << 32 | mode << 62


def store_all(data):
    """PTX that has each thread store its part of shared memory, and the register it needs."""
    words = np.zeros((-(-data.size // 512) * 128), np.int32)
    words.view(np.uint8)[: data.size] = data
    body, given = "", {"%r900": 1024 + 4 * np.arange(128, dtype=np.int32)}
    for i in range(words.size // 128):
        given[f"%r{300 + i}"] = words[128 * i : 128 * i + 128]
        body += f"st.shared.b32 [%r900 + {512 * i}], %r{300 + i};\n"
    return body, given, words.size * 4


FENCED = "bar.sync 0; fence.proxy.async.shared::cta; bar.sync 0;"


def wgmma(
    n, kind, mode, in_registers=False, end="wgmma.wait_group.sync.aligned 0;", fence=FENCED, flags="1, 1", scale=None, c=None
):
    """Multiplies a [64, k] by b [k, n]; returns (result, right)."""
    size = SIZES[kind]
    k = 32 // size
    (a, a_numbers), (b, b_numbers) = random_numbers((64, k), kind, 1), random_numbers((n, k), kind, 2)
    a_bytes, a_leading, a_stride = laid_out(a, mode, size)
    b_bytes, b_leading, b_stride = laid_out(b, mode, size)
    offset = -(-a_bytes.size // 1024) * 1024
    data = np.concatenate([a_bytes, np.zeros(offset - a_bytes.size, np.uint8), b_bytes])
    body, given, size_ = store_all(data)
    descriptors = [descriptor(0, a_leading, a_stride, mode), descriptor(offset, b_leading, b_stride, mode)]
    given |= {f"%rd{i}": np.full(128, np.uint64(d)) for i, d in enumerate(descriptors, 1)}
    d = [f"%r{i}" for i in range(n // 2)]
    given |= {r: np.zeros(128, np.int32) if c is None else np.full(128, np.float32(c)).view(np.int32) for r in d}
    first = "%rd1"
    if in_registers:
        first = "{%r200, %r201, %r202, %r203}"
        where, per = {1: a_8_bits, 2: a_16_bits, 4: a_wide}[size], 4 // size
        elements = [
            np.array([a[16 * (t // 32) + where(t % 32, i)[0], where(t % 32, i)[1]] for t in range(128)]) for i in range(4 * per)
        ]
        held = [pack(*elements[i : i + per]) for i in range(0, 4 * per, per)]
        given |= {f"%r{200 + i}": v for i, v in enumerate(held)}
    more = "" if size != 2 else ", 0" if in_registers else ", 0, 0"
    shape = f"m64n{n}k{k}.f32.{kind}.{kind}"
    scale = "1" if scale is None else scale
    operands = f"{{{', '.join(d)}}}, {first}, %rd2, {scale}, {flags}{more}"
    text = (
        f"{body}{fence} wgmma.fence.sync.aligned; wgmma.mma_async.sync.aligned.{shape} {operands};"
        f"wgmma.commit_group.sync.aligned; {end}"
    )
    result = execute(text, given, threads=128, shared_bytes=max(size_, 1024))
    got = np.zeros((64, n))
    for i, r in enumerate(d):
        values = result.as_type(r, "f32")
        for t in range(128):
            row, column = c_16_rows(t % 32, i % 4)
            got[16 * (t // 32) + row, i // 4 * 8 + column] = values[t]
    return got, a_numbers @ b_numbers.T


@pytest.mark.parametrize("kind", SIZES)
@pytest.mark.parametrize("mode", SPANS)
@pytest.mark.parametrize("n", [8, 24, 64])
def test_wgmma_reads_what_descriptors_describe(n, mode, kind):
    got, right = wgmma(n, kind, mode)
    assert (got == right).all()


@pytest.mark.parametrize("kind", SIZES)
def test_wgmma_with_a_in_registers(kind):
    got, right = wgmma(16, kind, 1, in_registers=True)
    assert (got == right).all()


@pytest.mark.parametrize("kind", SIZES)
def test_every_width_of_wgmma(kind):
    for n in range(8, 257, 8):
        got, right = wgmma(n, kind, 3)
        assert (got == right).all(), n


def test_wgmma_scales_and_signs():
    got, right = wgmma(8, "f16", 1, c=3.0)
    assert (got == right + 3).all()
    got, _ = wgmma(8, "f16", 1, c=3.0, scale="0")
    assert (got == right).all()
    got, _ = wgmma(8, "f16", 1, c=3.0, flags="-1, 1")
    assert (got == 3 - right).all()
    got, _ = wgmma(8, "f16", 1, c=3.0, flags="-1, -1")
    assert (got == right + 3).all()


def test_a_transposed_operand_of_wgmma():
    """M-major, 128-byte swizzle: atoms of 64 rows by 8 of k, a row of memory per k."""
    (a, a_numbers), (b, b_numbers) = random_numbers((64, 16), "bf16", 1), random_numbers((8, 16), "bf16", 2)
    memory = np.zeros(2048, np.uint8)
    for i in range(64):
        for j in range(16):
            at = j // 8 * 1024 + j % 8 * 128 + ((i // 8) ^ (j % 8)) * 16 + i % 8 * 2
            memory[at : at + 2] = a[i : i + 1, j].view(np.uint8)
    b_bytes, b_leading, b_stride = laid_out(b, 0, 2)
    body, given, size = store_all(np.concatenate([memory, b_bytes]))
    given |= {"%rd1": np.full(128, np.uint64(descriptor(0, 2048, 1024, 1))),
              "%rd2": np.full(128, np.uint64(descriptor(2048, b_leading, b_stride, 0)))}  # fmt: skip
    got = execute(
        f"{body}{FENCED} wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {{%r1, %r2, %r3, %r4}}, %rd1, %rd2, 0, 1, 1, 1, 0;"
        "wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;", given, threads=128, shared_bytes=size,
    )  # fmt: skip
    right = a_numbers @ b_numbers.T
    for i in range(4):
        at = [(16 * (t // 32) + c_16_rows(t % 32, i)[0], c_16_rows(t % 32, i)[1]) for t in range(128)]
        assert got.as_type(f"%r{i + 1}", "f32").tolist() == [right[p] for p in at]


WAIT, OVERWRITE = "wgmma.wait_group.sync.aligned 0;", "st.shared.b32 [%r900], 0;"
WRONG = {
    "no fence": ({"fence": "bar.sync 0;"}, "asynchronous proxy, that a thread wrote without a fence"),
    "no barrier": ({"fence": "fence.proxy.async;"}, "that another thread wrote since the last barrier"),
    "overwritten too early": ({"end": OVERWRITE}, "that an asynchronous instruction is still reading"),
}


@pytest.mark.parametrize("what", WRONG)
def test_wgmma_races(what):
    more, text = WRONG[what]
    with pytest.raises(Fault, match=text):
        wgmma(8, "bf16", 1, **more)


COPIED = """
    mov.u32 %r1, %tid.x; shl.b32 %r2, %r1, 4; add.s32 %r3, %r2, 1024; cvt.u64.u32 %rd3, %r2; add.s64 %rd4, %rd90, %rd3;
    cp.async.cg.shared.global [%r3], [%rd4], 16; cp.async.cg.shared.global [%r3 + 2048], [%rd4 + 2048], 16;
    cp.async.commit_group; cp.async.wait_group 0; {fence} bar.sync 0;
    wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {{%r11, %r12, %r13, %r14}}, %rd1, %rd2, 0, 1, 1, 0, 0;
    wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;
"""


def copied(fence, options=None):
    given = {f"%rd{i}": np.full(128, np.uint64(descriptor(2048 * (i - 1), 1024, 128, 0))) for i in (1, 2)}
    return execute(COPIED.format(fence=fence), given, 128, 4096, {"%rd90": torch.zeros(1024)}, options)


def test_wgmma_reads_a_copy_only_behind_a_fence():
    """Triton before 3.7.1 leaves this fence out; a rule of its own, which can be turned off."""
    copied("fence.proxy.async.shared::cta;")
    with pytest.raises(Fault, match="without a fence"):
        copied("")
    copied("", Options(async_copy_fence=False))


def test_a_base_offset_is_refused():
    given = {f"%rd{i}": np.full(128, np.uint64(descriptor(0, 1024, 128, 1) | 1 << 49)) for i in (1, 2)}
    with pytest.raises(Unsupported, match="base offset"):
        execute(COPIED.format(fence=""), given, 128, 4096, {"%rd90": torch.zeros(1024)})
