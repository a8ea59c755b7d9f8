#!/usr/bin/env python3
"""Breaks the kernels, and what calls them, one way at a time, in a copy of the tree, and shows that the tests notice.

python scripts/mutations.py             # every mutation; exit status 1 if one survives
python scripts/mutations.py --only tap  # those whose name matches
"""

from __future__ import annotations

import argparse
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass

ROOT = pathlib.Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Mutation:
    """One edit that makes results wrong, and the tests that should see it."""

    name: str
    file: str
    old: str
    new: str
    tests: str  # pytest's -k
    among: str = "test_kernels.py"


EVERY = "every_case and not 3-D"
MUTATIONS = [
    Mutation("a tap dropped", "kernels/gather.py", "n_taps[2] * tl.cdiv(left", "tl.maximum(n_taps[2] - 1, 1) * tl.cdiv(left", EVERY),
    Mutation("the last channels dropped", "kernels/gather.py", "tl.cdiv(left, BLOCK_K))", "(left // BLOCK_K))", EVERY),
    Mutation("a phase skipped", "kernels/common.py", "past = (pid % tiles).to(OFFSET) * step >= pixels", "past = ((pid % tiles).to(OFFSET) * step >= pixels) | (pid >= tiles)", EVERY),
    Mutation("a phase without taps not written", "kernels/gather.py", "    if past:", "    if past | (n_taps[2] == 0):", EVERY),
    Mutation("phases numbered without the padding", "kernels/common.py", "+ stride - padding % stride)", ")", EVERY),
    Mutation("shared factors of stride and dilation ignored", "kernels/common.py", "step = stride // gcd", "step = stride", EVERY),
    Mutation("a patch's rows taken for others", "kernels/patch.py", "% R1).to(OFFSET) * multiple(r1,", "% R1).to(OFFSET) * multiple(r2,", "patches", "test_patch.py"),
    Mutation("runs joined in the wrong order", "kernels/patch.py", "permute(1, 0, 2)", "permute(1, 0, 2).permute(0, 2, 1)", "patches", "test_patch.py"),
    Mutation("the bias of another tap", "kernels/patch.py", "channel = o // b_each % b_all", "channel = o % b_all", "transposed", "test_patch.py"),
    Mutation("pixels that no patch covers", "planning/simplify.py", 'pass_ != "dgrad" or p.X[d] == p.Y[d] * p.T[d]', 'True', "does_not_take", "test_patch.py"),
    Mutation("the halo read", "kernels/gather.py", "mask=lead(ok, X_FLIP), other", "mask=lead(live, X_FLIP), other", "16_byte"),
    Mutation("pixels said to be contiguous that are not", "kernels/packed.py", "xv = turned(tl.load(xp + at,", "xv = turned(tl.load(tl.max_contiguous(xp + at, [1, 2] if X_FLIP else [2, 1]),", "by_the_packed_kernels and transposed"),
    Mutation("offsets said to be multiples that are not", "kernels/wgrad.py", "tl.multiple_of(lead(offset, FLIP), [VEC, VEC])", "tl.multiple_of(lead(offset, FLIP), [2, 2])", EVERY),
    Mutation("pixels of the next image taken for neighbours", "kernels/common.py", "m // plane * multiple(sn, PIXELS) + m % plane", "m", "vectors_along"),
    Mutation("channels of zeros that are not", "kernels/copy.py", "trail(c < C, X_FLIP), other=0.0)", "trail(c < K, X_FLIP), other=0.0)", "padded"),
    Mutation("gradients of channels that are not there", "planning/operands.py", "if stored is None else stored[::-1]", "if True else stored[::-1]", "padded"),
    Mutation("a frozen weight's old copy", "launching/frozen.py", "found.copies.clear()", "pass", "changed or optimizer", "test_freeze.py"),
    Mutation("the halo's upper end off by one", "kernels/common.py", "tl.maximum(extent - h, 0)", "tl.maximum(extent - h - 1, 0)", EVERY),
    Mutation("a counter that does not wrap", "kernels/gather.py", "dx += tl.where(wrap, wrap_x[1], 0)", "dx += 0", "tails and blocks"),
    Mutation("strides of x swapped", "planning/operands.py", '**strides("sx", self.x),',
             '**strides("sx", self.x), **triple("sx", self.x.spatial[::-1]),', EVERY),
    Mutation("the bias of another group", "kernels/gather.py", "b_ptr + (first + o) * sb", "b_ptr + o * sb", EVERY),
    Mutation("the first channels twice", "kernels/gather.py", "EXTRA) + BLOCK_N + tl", "EXTRA) + tl", "two_blocks_of_split"),
    Mutation("a residual lost", "kernels/epilogue.py", "step(acc + more, dtype", "step(acc, dtype", "test_values", "test_epilogues.py"),
    Mutation("the scale of another group", "kernels/gather.py", "base + tile, mask, first + o,", "base + tile, mask, o,", "test_values and groups", "test_epilogues.py"),
    Mutation("the scale of one channel for all of a sum of splits", "kernels/reduce.py", "i // inner % channels", "i * 0", "every_kernel and splits", "test_epilogues.py"),
    Mutation("a batch norm's old statistics", "chain.py", "(t._version, t.data_ptr(), t.dtype)", "(t.data_ptr(), t.dtype)", "changes_is_seen", "test_fuse.py"),
    Mutation("a padding's dimensions in the order of F.pad", "chain.py", "given[::-1]", "given", "each_chain and sequential", "test_fuse.py"),
    Mutation("a forward of another mode", "fuse.py", "if not is_same(now, value):", "if False:", "training_mode", "test_fuse.py"),
    Mutation("an input written before it is read", "rewrite.py", "not in chain.nodes and _writes", "in chain.nodes and _writes", "refused and meanwhile", "test_fuse.py"),
    Mutation("a residual as it was before another chain", "rewrite.py", "last.replace_all_uses_with(fused)", "last.replace_all_uses_with(fused, lambda n: n.op == 'output')", "residuals", "test_fuse.py"),
    Mutation("a derivative cut short", "kernels/epilogue.py", "g * s * (1 + v * (1 - s))", "g * s", "every_activation and silu", "test_epilogues.py"),
    Mutation("padding on the other side", "dispatch/check.py", "[p for p, _ in pads], [p for _, p in pads]", "[p for _, p in pads], [p for p, _ in pads]", "test_values", "test_sides.py"),
    Mutation("a reflection that repeats the edge", "kernels/common.py", "2 * (extent - 1) - i)", "2 * extent - 1 - i)", "values and reflect", "test_borders.py"),
    Mutation("a circle closed an element late", "kernels/common.py", "i + extent, i - extent", "i + extent, i - extent + 1", "values and circular", "test_borders.py"),
    Mutation("padding that repeats x, stepped like x", "kernels/wgrad.py", 'if BORDERS[d] == "zeros" else sx[d] * 0', 'if BORDERS[d] == "zeros" else sx[d]', "values and 2-D", "test_borders.py"),
    Mutation("a slab in the other side's place", "kernels/borders.py", "tl.where(before, starts[e], ends[e])", "starts[e]", "values and 2-D", "test_borders.py"),
    Mutation("a slab without its corner", "planning/borders.py", "p.X[e] + before[e] + after[e], p.P[e] - before[e]", "p.X[e] + before[e] + after[e], p.P[e]", "values and 2-D", "test_borders.py"),
    Mutation("a slab's outputs cut short", "planning/borders.py", "(start + extent - 1) // p.S[d] + 1)", "(start + extent - 2) // p.S[d] + 1)", "values", "test_borders.py"),
    Mutation("rows merged that repeat x", "planning/simplify.py", 'p.S[a] != 1 or p.borders[a] != "zeros"', "p.S[a] != 1", "pointwise", "test_borders.py"),
    Mutation("a folded gradient without x's own", "kernels/borders.py", "0 if FOLD else 1", "1", "values_and and folded", "test_borders.py"),
    Mutation("the next states' gradient lost", "dispatch/sequences.py", "dxs + F.pad(dnext.to(wide), (times, 0))", "dxs", "formulas", "test_causal.py"),
    Mutation("a state read past its end", "dispatch/sequences.py", "& (i < taps - 1)", "& (i < taps)", "formulas", "test_causal.py"),
    Mutation("a chunk's operator without its state", "dispatch/stream_ops.py", "xs = whole(x, state, chunk)", "xs = whole(x, None, chunk)", "the_operator", "test_stream.py"),
    Mutation("a sum in another's place", "kernels/reduce.py", "rest % extents[d] * strides[d]", "rest % extents[d] * strides[0]", "order", "test_workspace.py"),
    Mutation("a split lost", "kernels/reduce.py", "tl.range(1, splits)", "tl.range(1, splits - 1)", "split"),
    Mutation("a sum of pixels that takes more at a time than lie there", "launching/memory_bound.py", "min(a.lanes(channels, extents).vec, tile.k)", "8", EVERY),
    Mutation("a copy of the first image only", "kernels/copy.py", "image.to(OFFSET) * multiple(sxn, X_VEC)", "image.to(OFFSET) * 0", "is_the_same", "test_copy.py"),
    Mutation("a copy's last channels dropped", "kernels/copy.py", "trail(c < K, False)", "trail(c < K // BLOCK_C * BLOCK_C, False)", "is_the_same", "test_copy.py"),
    Mutation("dimensions merged across a gap", "planning/addressing.py", "kept[-1][1] == extent * stride", "kept[-1][1] >= extent * stride", "same_offsets", "test_copy.py"),
    Mutation("a split of the weight's wrong channels", "kernels/gather.py", "wp += done * w_step_i", "wp += 0 * w_step_i", "split_channels"),
    Mutation("the bias in every split", "kernels/gather.py", "tl.where(split == 0, CO, 0)", "tl.where(split >= 0, CO, 0)", "split_channels"),
    Mutation("a split that runs into the next", "kernels/gather.py", "tl.minimum(chunk, CI - done)", "CI - done", "split_channels"),
    Mutation("a split's last pixels lost", "kernels/wgrad.py", "tl.cdiv(left, BLOCK_P)", "(left // BLOCK_P)", "split"),
    Mutation("a digit without its carry", "kernels/common.py", "(B[1] + 1) * S[1]", "B[1] * S[1]", "tails or split"),
    Mutation("wgrad of the wrong tap", "kernels/wgrad.py", "tap[d] * D[d] - P[d]", "(T[d] - 1 - tap[d]) * D[d] - P[d]", EVERY),
    Mutation("frames skipped by what else is in the tile", "planning/gather.py", "c.p.rank == 3 and not c.batch_invariant", "c.p.rank == 3", "infinite", "test_batch_invariance.py"),
    Mutation("a plan of this batch", "launching/prepare.py", "only, plan=launch.call.plan)", "only)", "nine or same_plan", "test_batch_invariance.py"),
    Mutation("a rewrite of this batch", "planning/simplify.py", "_of_images(form, 1), pass_)", "form, pass_)", "rewritten", "test_batch_invariance.py"),
    Mutation("the fast path of the other setting", "dispatch/entry.py", "id(b), policy, invariant,", "id(b), policy,", "forward_pass_did", "test_batch_invariance.py"),
    Mutation("a frame's last tap taken for missing it", "kernels/common.py", "high // step + 1, n_taps[0]", "high // step, n_taps[0]", "test_frames"),
    Mutation("taps of other frames, with the first one's weight", "kernels/common.py", "t_first[0] + first * (S0 // g0)", "t_first[0]", "test_frames"),
    Mutation("operands in their own places", "launching/launch.py", "        if launch.swapped:", "        if launch.swapped and not launch.copies:", "change_places", "test_simplify.py"),
    Mutation("changed places with the old dilation", "planning/simplify.py", "D=_negative(p.D))", "D=p.D)", "change_places or moves", "test_simplify.py"),
    Mutation("the multiplier ignored", "kernels/depthwise.py", "o * M if TRANSPOSED else o // M", "o * M if TRANSPOSED else o", EVERY),
    Mutation("a depthwise tap dropped", "kernels/depthwise.py", "n_taps[2] * repeats", "tl.maximum(n_taps[2] - 1, 1) * repeats", EVERY),
    Mutation("tap block's tail kept", "kernels/depthwise.py", "mask=k < tl.where(past == 0, K, 0)", "mask=k < tl.where(past >= 0, K, 0)", "split"),
    Mutation("a strip's window a column short", "kernels/strip.py", "(COLUMNS - 1) * S + (T - 1) * D", "(COLUMNS - 1) * S + (T - 1) * D - 1", "every_pass", "test_strips.py"),
    Mutation("the rest of a row of taps dropped", "kernels/strip.py", "if T2 % CHUNK:", "if T2 % CHUNK and T2 < CHUNK:", "every_pass", "test_strips.py"),
    Mutation("a strided strip's phase shifted", "kernels/strip.py", "I * S + t * D - P % S < COLUMNS", "I * S + t * D - P % S < COLUMNS - 1", "every_pass", "test_strips.py"),
    Mutation("a strip's gradients beyond the last column", "kernels/strip.py", "COLUMNS + r[None, :] < Y2)", "COLUMNS + r[None, :] >= 0)", "every_pass", "test_strips.py"),
    Mutation("a pack's rows on the wrong diagonal", "kernels/packed.py", "low = k // K * own", "low = k * 0", "packed"),
    Mutation("a packed column's tap mistaken", "kernels/packed.py", "t1 -= t0 * n_taps[1]", "t1 -= t0", "packed"),
    Mutation("a tap taken from its neighbour's row", "kernels/rows.py", "k * D - P - low", "k * D - P - low + k", "every_case", "test_rows.py"),
    Mutation("columns without a tap added", "kernels/rows.py", "taken = tl.where(exists[None, :], tl.gather(acc, row, 0), 0.0)", "taken = tl.gather(acc, row, 0)", "every_case", "test_rows.py"),
    Mutation("tiles of rows without a halo", "planning/rows.py", "(tile.m - halo) // columns", "tile.m // columns", "overlap", "test_rows.py"),
    Mutation("a box shifted the wrong way", "kernels/tma.py", "reads[1] + i1 * x_step[1]", "reads[1] - i1 * x_step[1]", "every_case", "test_tma.py"),
    Mutation("a phase without taps reads what is there", "kernels/tma.py", "tl.constexpr(-(1 << 20))", "tl.constexpr(0)", "every_case", "test_tma.py"),
    Mutation("a TMA launch by another plan's box", "planning/tma.py", "(*x, (*box, tile.k))", "(*x, (*box[::-1], tile.k))", "every_case", "test_tma.py"),
    Mutation("a box stored over the next group's channels", "planning/tma.py", " or (c.p.G > 1 and c.co % tile.n)", "", "is_all_ours", "test_tma.py"),
    Mutation("a box stored where its pixels lie apart", "planning/tma.py", "(c.transposed and max(c.p.S) > 1) or ", "", "every_case", "test_tma.py"),
    Mutation("a weight gradient's box at the wrong tap", "kernels/tma.py", "tap[2 - i] * D[2 - i] - P[2 - i]", "tap[2 - i] - P[2 - i]", "weight_gradients_have", "test_tma.py"),
    Mutation("runs that overhang dy's end where x goes on", "kernels/common.py", "tl.where(extent + shift >= read, 0", "tl.where(extent + shift >= 0, 0", "spoils", "test_tma.py"),
    Mutation("runs past an end that x passes", "planning/tma.py", "or ends_with_x(p, d)", "or True", "spoils", "test_tma.py"),
    Mutation("a program per tile where programs stay", "planning/persistent.py", "min(device.units, self.programs(p, pass_, tile) * splits)", "self.programs(p, pass_, tile) * splits", "program_per_multiprocessor", "test_persistent.py"),
    Mutation("a tile's end is hidden by a loop that is shorter", "planning/cost.py", "max(0.0, work.beside - products / waves) / 2", "0.0", "hidden_as_far", "test_persistent.py"),
    Mutation("wgmma where it is not", "planning/persistent.py", "device.generation == 9", "device.generation >= 9", "devices_and_tiles", "test_persistent.py"),
    Mutation("bf16 cut off instead of rounded", "kernels/common.py", "(bits + 0x7FFF", "(bits", "every_dtype"),
    Mutation("a piece of fp32 dropped", "kernels/common.py", "step = dot(al, bh, step", "step = dot(al * 0, bh, step", "sums", "test_split_precision.py"),
    Mutation("an infinity in every piece", "kernels/common.py", "tl.where(finite, 0xFFFF0000, 0xBF800000)", "tl.where(finite, 0xFFFF0000, 0xFFFF0000)", "infinity", "test_split_precision.py"),
    Mutation("32-bit offsets everywhere", "planning/operands.py", "p.N * math.prod(self.extents) + tile.m) > LIMIT", "0) < 0", "beyond"),
    Mutation("a batch of weights across the groups", "dispatch/batching.py", '"fprop": ((0, True), (1, True))', '"fprop": ((0, False), (1, True))', "test_vmap", "test_transforms.py"),
    Mutation("a batch of gradients across the groups", "dispatch/batching.py", '"wgrad": ((1, True), (0, True))', '"wgrad": ((1, False), (0, True))', "vjp", "test_transforms.py"),
    Mutation("outer levels of transforms left off", "dispatch/operators.py", "    stack.enter_context(torch.enable_grad())", "    pass", "test_transforms", "test_transforms.py"),
    Mutation("outer levels of forward mode left off", "dispatch/operators.py", "stack.enter_context(forward_ad._set_fwd_grad_enabled(True))", "pass", "second", "test_transforms.py"),
    Mutation("the bias' tangent lost", "dispatch/operators.py", "op(da, b, dbias, *h)", "op(da, b, None, *h)", "forward_mode or jvp", "test_transforms.py"),
    Mutation("a gradient of what is not read", "dispatch/operators.py", "h = exact(h, x.shape[2:], y.shape[2:], w.shape[2:])._replace", "h = h._replace", "unread", "test_transforms.py"),
    Mutation("output padding forgotten by the operator", "dispatch/check.py", "[p - o for p, o", "[p - 0 * o for p, o", "test_vmap", "test_transforms.py"),
    Mutation("a decomposition not cropped", "dispatch/equivalents.py", "dx = _pad(dx, [-n for n in h.before], [-n for n in h.after])", "pass", "every_window", "test_tools.py"),
    Mutation("gradients that were needed before", "dispatch/autograd.py", "needs != self.needs", "needs is None", "backward", "test_repeat.py"),
    Mutation("a gradient that lay otherwise before", "dispatch/autograd.py", "or not self.tensor_guard(dy, x, w)", "", "backward", "test_repeat.py"),
    Mutation("gradients that nobody asks for", "dispatch/derivatives.py", "found[i] and _executes(nodes[places[i]][0])", "found[i]", "asked_for", "test_autograd.py"),
    Mutation("halo gradients kept where they arose", "distributed.py", "take[r].add_(piece)", "pass", "test_space and not dtype", "test_distributed.py"),
    Mutation("a halo one element short", "distributed.py", "(b - 1) * stride - before + span + 1", "(b - 1) * stride - before + max(span, 1)", "test_space and not dtype", "test_distributed.py"),
    Mutation("a weight's gradient of one rank alone", "distributed.py", "return _total(grad, ctx.group), None", "return grad, None", "test_space and not dtype", "test_distributed.py"),
    Mutation("a variance about nothing", "kernels/normalise.py", "squares += d * (v - mean)", "squares += d * v", "test_values and one-group", "test_normalise.py"),
    Mutation("places of a tile that count too often", "kernels/normalise.py", "(left - r + BLOCK_P - 1) // BLOCK_P", "(left + BLOCK_P - 1) // BLOCK_P", "test_values and 3-D", "test_normalise.py"),
    Mutation("a group's means not brought together", "kernels/normalise.py", "+ count * d * d", "+ 0 * d", "test_values and one-group", "test_normalise.py"),
    Mutation("the last chunk counted whole", "kernels/normalise.py", "tl.minimum(chunk, P - i * chunk)", "chunk", "large_mean", "test_normalise.py"),
    Mutation("the mean of another group", "kernels/normalise.py", "image * G + c // (C // G)", "image * G + c % G", "test_values and 2-D", "test_normalise.py"),
    Mutation("padding that is normalised", "kernels/normalise.py", "v = tl.where(read, v, 0.0)", "pass", "test_values and padded", "test_normalise.py"),
    Mutation("padding on the other side of a normalisation", "kernels/normalise.py", "h = j[d] - B[d]", "h = j[d] - (Y[d] - X[d] - B[d])", "test_values and by-side", "test_normalise.py"),
    Mutation("a gradient without the mean of g * w", "kernels/normalise.py", "g -= mean_g + h * mean_gh", "g -= h * mean_gh", "test_values and 2-D", "test_normalise.py"),
    Mutation("means of gradients without the weight", "kernels/normalise.py", "gh += tl.load(row + C, mask=mask, other=0.0) * w", "gh += tl.load(row + C, mask=mask, other=0.0)", "test_values and 2-D", "test_normalise.py"),
    Mutation("NaN of what is not there in a sum", "kernels/normalise.py", "tl.where(live, gradient(g, z, ACTIVATION, 0.0), 0.0)", "gradient(tl.where(mask, g, float('nan')), z, ACTIVATION, 0.0)", "test_values and odd", "test_normalise.py"),
    Mutation("chunks of the whole batch", "planning/normalise.py", "wanted = math.ceil(", "wanted = n.N * math.ceil(", "as_counted", "test_normalise.py"),
    Mutation("a kernel below that has gone not looked for", "dispatch/registration.py", "if VOID not in str(e):", "if True:", "any_order", "test_enable_others.py"),
    Mutation("a kernel taken out from under another", "override.py", "not _overrides[-1].inside and _overrides[-1].on_top()", "not _overrides[-1].inside", "any_order", "test_enable_others.py"),
    Mutation("an enabling again that stays below others", "override.py", "if not _overrides or not _overrides[-1].on_top():", "if not _overrides:", "any_order", "test_enable_others.py"),
    Mutation("the last selection alone", "override.py", "self.chosen = choice(selections) if", "self.chosen = choice(selections[-1:]) if", "add_up", "test_enable_others.py"),
    Mutation("a block that disable() ends", "override.py", "if not one.block)", "if True)", "newest", "test_enable_others.py"),
    Mutation("a selection's gradients from the others", "dispatch/aten.py", "(a if mine else b for", "(b if mine else a for", "test_operations", "test_enable_others.py"),
    Mutation("a choice that forgets", "dispatch/selection.py", "found = _choices.get(key)", "found = None", "toggling_forgets", "test_enable_others.py"),
    Mutation("an enabling that ends for its nodes only later", "override.py", "(*self.process, *scopes) if one.layer is self", "(*self.process, *scopes)", "follows_what_holds", "test_enable_model.py"),
    Mutation("a forward pass that an interrupt does not end", "dispatch/scope.py", "while caller is not None and caller is not p.frame:", "while False:", "error_ends", "test_enable_model.py"),
    Mutation("a backward that counts where it is called", "dispatch/scope.py", "if p.task == task", "if True", "graph_outside", "test_enable_model.py"),
    Mutation("what is computed again outside", "dispatch/scope.py", "ended is not None and ended.unmarked", "False", "checkpoints_inside", "test_enable_model.py"),
    Mutation("a graph made before that is marked", "dispatch/scope.py", " or node._sequence_nr() < ended.first", "", "made_before", "test_enable_model.py"),
    Mutation("a block's copy that stays enabled", "override.py", "    if not block:\n        _open(inside", "    if True:\n        _open(inside", "copies", "test_enable_model.py"),
    Mutation("NaN of fp8 taken for a number", "kernels/common.py", "== 0x7F, float(\"nan\"), v.to(tl.float32))", "== 0x7E, float(\"nan\"), v.to(tl.float32))", "nan", "test_fp8.py"),
    Mutation("fp8 without its end", "kernels/quantize.py", "tl.where(v > LARGEST, LARGEST, ", "tl.where(v > 2 * LARGEST, LARGEST, ", "ends_at_448", "test_fp8.py"),
    Mutation("fp8 rounded half up", "kernels/quantize.py", "0x7FFFF + ((bits >> 20) & 1)", "0x80000", "ends_at_448", "test_fp8.py"),
    Mutation("an infinity for the largest number", "kernels/quantize.py", "tl.where(v < float(\"inf\"), v, 0.0)", "v", "largest_finite", "test_fp8.py"),
    Mutation("blocks after the first not searched for the largest number", "kernels/quantize.py", "i += PARTS * BLOCK", "i += numel", "largest_finite", "test_fp8.py"),
    Mutation("the scales of inputs forgotten", "fp8.py", "device=device) * of_weight", "device=device) * 0 + of_weight", "test_layers", "test_fp8.py"),
    Mutation("fp8 scales of a transposed layer in another order", "fp8.py", ".contiguous().movedim(-1, 0), scale", ".contiguous().movedim(-1, 0), scale.flip(0)", "test_layers and Transpose", "test_fp8.py"),
    Mutation("a transposed weight's box not turned", "planning/tma.py", "if c.transposed and not self._turned(c)", "if c.transposed", "every_kernel and tma and transposed", "test_fp8.py"),
    Mutation("a repeated fp8 call with another's scale", "fp8.py", "residual, position, scale, shift)", "residual, position, scale * 2, shift)", "repeated", "test_fp8.py"),
    Mutation("a state read a frame too early", "kernels/gather.py", "s_offset += P[FIRST]", "s_offset += (P[FIRST] - 1)", "against_the_whole and 1-D", "test_stream.py"),
    Mutation("a stream's zeros taken from its state", "planning/operands.py", 'constants |= {name: "zeros" for', 'constants |= {name: "replicate" for', "against_the_whole and 1-D", "test_stream.py"),
    Mutation("a next state without the old one's end", "kernels/gather.py", "v = tl.where(lead(time >= 0, False), v, turned(before", "v = tl.where(lead(time >= 1, False), v, turned(before", "against_the_whole and 1-D", "test_stream.py"),
    Mutation("a plan that knows the chunk's length", "launching/prepare.py", "X=put(p.X, read), Y=put(p.Y, times)", "X=p.X, Y=p.Y", "plans_do_not", "test_stream.py"),
    Mutation("a sequence that reads its predecessor", "kernels/causal.py", "x = tl.where(lead(same, FLIP), x, 0.0)", "x = x + 0.0", "one_after_the_other", "test_causal.py"),
    Mutation("a gradient from the next sequence", "kernels/causal.py", "u = tl.where(lead(qs[v + T - 1 - t] == qs[v], FLIP), u, 0.0)", "u = u + 0.0", "one_after_the_other", "test_causal.py"),
    Mutation("a state's gradient without the next state's", "kernels/causal.py", "i - (end - first), live, c", "i - (end - first) - 8, live, c", "one_after_the_other", "test_causal.py"),
    Mutation("a ring that turns the wrong way", "kernels/causal.py", "(past + L - 1 - i) % H", "(past + L - 2 - i) % H", "decoding", "test_causal.py"),
    Mutation("an fp8 result in fp16 for bf16", "launching/launch.py", "getattr(torch, g.epilogue.result) if", "torch.float16 if", "every_case and plain", "test_fp8.py"),
]  # fmt: skip


def survives(mutation: Mutation) -> bool:
    """Whether the tests still pass with the mutation, in a copy of the tree."""
    with tempfile.TemporaryDirectory() as directory:
        copy = pathlib.Path(directory)
        for part in ("tconv", "simulator", "tests", "bench", "pyproject.toml"):
            source = ROOT / part
            (shutil.copytree if source.is_dir() else shutil.copy)(source, copy / part)
        target = copy / "tconv" / mutation.file
        text = target.read_text()
        if text.count(mutation.old) < 1:
            raise SystemExit(f"{mutation.name}: {mutation.file} no longer contains {mutation.old!r}")
        target.write_text(text.replace(mutation.old, mutation.new, 1))
        environment = os.environ | {"PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1"}
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-x",
            "-q",
            "-p",
            "no:cacheprovider",
            f"tests/{mutation.among}",
            "-k",
            mutation.tests,
        ]
        done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, check=False)
        if done.returncode not in (0, 1):
            raise SystemExit(f"{mutation.name}: pytest did not run\n{done.stdout[-2000:]}")
        failed = re.findall(r"^FAILED (\S+)", done.stdout, re.MULTILINE)
        print(
            f"{'SURVIVED' if not failed else 'caught':9} {mutation.name:46} {failed[0].split('::')[1] if failed else ''}",
            flush=True,
        )
        return not failed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="a regular expression that names must match")
    args = parser.parse_args()
    alive = [m.name for m in MUTATIONS if re.search(args.only, m.name) and survives(m)]
    print(f"{len(alive)} survived" if alive else "every mutation was caught")
    return int(bool(alive))


if __name__ == "__main__":
    sys.exit(main())
