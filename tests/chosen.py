"""The part of the tests that CI also runs on compiled code: `pytest --compiled sm_90 --chosen`.

Compiling is what takes the time, half a second to a second a kernel, so of each dimension (kernel family, pass, dtype, layout,
alignment, awkward case) every value is there, but of their products only some. All of it is run before a release.
"""

import re

import pytest

# (file, test and parameters as a regular expression, why)
ROWS = [
    ("test_kernels", r"test_every_dtype\[", "the planner's choice: every family, pass and dtype, channels_last"),
    ("test_kernels", r"test_channels_last_with_16_byte_accesses", "wide accesses, asynchronous copies, wgmma"),
    ("test_kernels", r"test_every_case\[(stride-beyond|padding-beyond|dilation-shares|one-channel|long-rows)", "edges"),
    ("test_kernels", r"test_every_case\[2-D-kernel-wider", "taps that a packed field does not hold"),
    ("test_kernels", r"test_every_case\[transposed,-(stride-beyond|padding-crops|dilation-shares)", "edges, transposed"),
    ("test_kernels", r"test_staged_operands\[(plain|groups|every).*bfloat16", "the default layout, copied"),
    ("test_kernels", r"test_channels_padded.*(three-channels-to-four\W|both-sides).*bfloat16", "channels padded to vectors"),
    ("test_kernels", r"test_tails_in_every_extent\[(depthwise|channel-blocks,-2-D|transposed-depthwise)", "partial tiles"),
    ("test_kernels", r"test_split_(reductions|channels_in_every_dtype)", "split reductions, the same bits every time"),
    ("test_kernels", r"test_tiles_of_two_blocks.*\[(second,-first|whole,-second).*bfloat16", "two accumulators"),
    ("test_kernels", r"test_a_tile_of_several_taps|test_packs_with_wide_accesses", "packed kernels with a GPU's tiles"),
    ("test_kernels", r"test_any_strides\[every", "crops, steps, expanded and permuted tensors"),
    ("test_kernels", r"test_frames\[.*contiguous-1|test_infinity|test_a_tap_that_meets_no_frame", "frames, infinities"),
    ("test_tma", r"test_every_case\[(plain|groups-of-five|depthwise-3-D|transposed,-output|dilation-equals)", "boxes"),
    ("test_tma", r"test_every_weight_gradient_of_unit_stride\[(plain|groups\]|transposed-1)", "boxes of a weight gradient"),
    ("test_tma", r"spoils_no_weight_gradient\[(padded|two-taps|three-taps).*nan", "runs that overhang either end, or neither"),
    ("test_tma", r"test_default_layout_is_copied|test_infinity|test_refusals|refused", "copies, refusals"),
    ("test_persistent", r"test_every_case\[(1-D|groups|transposed)|order\[[12]\]|infinity|refus", "warps in two orders"),
    ("test_persistent", r"test_every_case\[by-turns,-(1-D|pointwise|groups|transposed)|handed", "teams that take turns"),
    ("test_persistent", r"every_epilogue\[(all steps, by turns\]|an argument|nothing)|round_at", "their epilogues"),
    ("test_rows", r"test_every_case\[(plain|rows-sh|transposed,-(a-stem|by-threes\W|gaps)).*contig", "few written channels"),
    ("test_rows", r"test_the_default_layout.*bfloat|overlap|not_finite|refused", "read along rows, tiles, infinities"),
    ("test_persistent", r"every_weight_gradient\[(1-D|2-D|3-D|groups|one-image)|spoils.*\[(padded|two-taps)", "their wgrad"),
    ("test_epilogues", r"test_every_kernel\[.*-before-(contiguous|channels_last)", "each kernel's epilogue"),
    ("test_fp8", r"test_every_case\[(plain|uneven|channels-that|1-D-c)|kernel.*before-.*bfloat|carried|nan|448", "fp8"),
    ("test_fp8", r"largest_finite_number\[(infin|NaN|tiny).*-5000-kernel", "the scale of each input"),
    ("test_fp8", r"test_every_case\[transposed(-c|,-uneven)", "fp8, transposed"),
    ("test_causal", r"(values.*kernels-4-True|one_after.*kernels-uneven)", "sequences, in either layout"),
    ("test_stream", r"against_the_whole\[(1-D|3-D)-uneven-channels_last", "a state beside x, and the next one"),
    ("test_strips", r"test_every_dtype.*(16-bytes|two-whole)|test_infinity|test_what_they", "strips in every dtype and layout"),
    ("test_borders", r"test_strips\[(3x3|7x7|strided).*-reflect", "columns that are found beyond x"),
    ("test_split_precision", r"test_sums_of_any_length\[(1|33|576)\]|test_few_channels", "fp32 by six products"),
    ("test_split_precision", r"test_infinity|test_cancellation", "their edges"),
    ("test_copy", r"test_a_copy_is_the_same.*(bfloat16-32 bits|float64-64 bits)", "copies"),
    ("test_normalise", r"test_tiles_and_chunks|test_values.*(one-g|by-side,-3)", "normalisations in both layouts"),
    ("test_checks", r"", "mistakes in every kernel, each of which a check of the simulator names"),
    ("test_self_check", r"works_and_is_asked_once|(tma|bf16x6)-.*one element", "mechanisms beside plain kernels"),
    ("test_random", r"by_one_kernel\[packed\]", "random problems"),
    ("test_autograd", r"test_gradcheck|test_threads|test_only_what_is_asked", "gradients of any order, threads"),
    ("test_torch_samples", r"test_samples\[conv2d-torch.float64|test_half_samples\[conv_transpose1d", "torch's own inputs"),
    ("test_errors", r"", "errors, which compile nothing"),
]  # fmt: skip


def chosen(nodes):
    """Returns those of the tests, given by their ids, that are in the table.

    Raises:
        pytest.UsageError: a row chooses nothing of a file that is there: the test has another name by now, or only some of the
            file's tests were asked for.
    """
    found = set()
    for name, pattern, why in ROWS:
        there = [node for node in nodes if node.partition("::")[0].endswith(f"{name}.py")]
        mine = {node for node in there if re.search(pattern, node.partition("::")[2])}
        if there and not mine:
            raise pytest.UsageError(f"tests/chosen.py: no test of {name} that was collected is {pattern!r} ({why})")
        found |= mine
    return found
