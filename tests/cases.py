"""The table of convolutions that every kernel has to get right, each with its reason."""

from tests.oracle import Case

FORWARD = [
    Case("plain 1-D", (2, 5, 11), 7, (3,), padding=1),
    Case("plain 2-D, odd extents", (2, 5, 7, 13), 6, (3, 3), padding=1),
    Case("plain 3-D", (2, 3, 4, 5, 6), 4, (3, 3, 3), padding=1),
    Case("one channel in and out", (1, 1, 6, 6), 1, (3, 3)),
    Case("pointwise", (2, 20, 5, 3), 18, (1, 1)),
    Case("strided pointwise drops pixels", (2, 6, 7, 6), 5, (1, 1), stride=2),
    Case("stride", (2, 4, 9, 8), 6, (3, 3), stride=2, padding=1),
    Case("stride beyond the kernel leaves dgrad phases without taps", (2, 4, 11, 9), 5, (2, 2), stride=(4, 3)),
    Case("kernel equals stride", (2, 3, 8, 8), 6, (4, 4), stride=4),
    Case("stride beyond the input", (1, 3, 5, 4), 4, (2, 3), stride=7),
    Case("padding beyond the kernel", (2, 3, 4, 4), 4, (2, 2), padding=4),
    Case("dilation", (2, 4, 12, 11), 5, (3, 3), padding=2, dilation=2),
    Case("dilation shares a factor with stride", (2, 4, 13, 17), 5, (3, 3), stride=4, padding=3, dilation=6),
    Case("dilation equals stride", (2, 4, 12), 6, (3,), stride=3, padding=1, dilation=3),
    Case("every parameter differs by dimension", (2, 4, 9, 12), 6, (2, 5), stride=(3, 2), padding=(1, 3), dilation=(2, 1)),
    Case(
        "3-D, every parameter differs", (1, 4, 7, 6, 9), 6, (1, 2, 3), stride=(2, 1, 3), padding=(0, 2, 1), dilation=(1, 3, 2)
    ),
    Case("kernel covers the input", (2, 4, 5, 6), 7, (5, 6)),
    Case("kernel wider than a packed field", (1, 2, 40), 3, (35,), padding=17),
    Case("2-D kernel wider than a packed field", (1, 2, 20, 3), 2, (18, 1), padding=(9, 0)),
    Case("same padding, even kernel pads one side more", (2, 3, 6, 7), 4, (4, 2), padding="same"),
    Case("same padding, dilated", (2, 3, 9), 4, (4,), padding="same", dilation=3),
    Case("valid padding", (2, 3, 6, 6), 4, (3, 3), padding="valid"),
    Case("groups", (2, 8, 6, 6), 12, (3, 3), padding=1, groups=4),
    Case("uneven groups, one output channel each", (2, 12, 5, 5), 4, (3, 3), padding=1, groups=4),
    Case("groups wider than a dot's least extent", (1, 40, 4, 4), 36, (3, 3), padding=1, groups=2),
    Case("groups of two and three, the last pack partial", (2, 14, 5, 7), 21, (2, 3), stride=(1, 2), padding=1, groups=7),
    Case("groups of five", (1, 15, 6), 10, (3,), dilation=2, groups=5),
    Case("stem of one channel, 3-D", (1, 1, 5, 6, 7), 5, (3, 2, 3), stride=(2, 1, 1), padding=1),
    Case("stem of three channels", (2, 3, 13, 11), 9, (7, 7), stride=2, padding=3),
    Case("stem of four channels, dilated", (2, 4, 9, 10), 6, (3, 3), padding=(1, 2), dilation=2),
    Case("depthwise", (2, 6, 7, 9), 6, (3, 3), padding=1, groups=6),
    Case("depthwise, stride and dilation", (2, 5, 11, 10), 5, (3, 2), stride=2, padding=2, dilation=2, groups=5),
    Case("depthwise with a channel multiplier", (2, 4, 6, 6), 12, (3, 3), padding=1, groups=4),
    Case("depthwise, stride beyond the kernel", (2, 4, 15), 8, (2,), stride=5, groups=4),
    Case("depthwise 3-D", (1, 3, 4, 5, 4), 3, (3, 2, 3), stride=(1, 2, 1), padding=1, groups=3),
    Case("depthwise, large kernel", (1, 3, 9, 9), 3, (7, 7), padding=3, groups=3),
    Case("a multiplier too large for the depthwise kernels", (1, 2, 6, 6), 20, (3, 3), groups=2),
    Case("one output pixel", (3, 4, 3, 3), 5, (3, 3)),
    Case("long rows", (1, 2, 300), 3, (3,), padding=1),
]
TRANSPOSED = [
    Case("transposed 1-D", (2, 5, 7), 4, (3,), transposed=True),
    Case("transposed, stride 2, kernel 4", (2, 6, 5, 4), 4, (4, 4), stride=2, padding=1, transposed=True),
    Case("transposed from one pixel: a bias is per channel, not per tap", (2, 5, 1, 1), 3, (3, 2), transposed=True),
    Case("transposed, output padding", (2, 4, 5, 5), 6, (3, 3), stride=2, padding=1, output_padding=1, transposed=True),
    Case("transposed, kernel equals stride", (2, 4, 5, 4), 3, (2, 2), stride=2, transposed=True),
    Case("transposed, stride beyond the kernel: gaps hold the bias", (2, 3, 4, 3), 4, (2, 1), stride=(4, 3), transposed=True),
    Case("transposed, output padding within dilation", (1, 3, 5), 4, (3,), dilation=4, output_padding=3, transposed=True),
    Case("transposed, padding crops all but a little", (2, 3, 4, 4), 4, (3, 3), padding=2, transposed=True),
    Case(
        "transposed, dilation shares a factor with stride",
        (2, 4, 5, 6), 4, (3, 3), stride=4, padding=2, dilation=6, output_padding=2, transposed=True,
    ),
    Case("transposed, uneven groups", (2, 8, 4, 5), 6, (3, 3), stride=2, groups=2, transposed=True),
    Case("transposed depthwise", (2, 5, 6, 5), 5, (3, 3), stride=2, padding=1, groups=5, transposed=True),
    Case("transposed depthwise, summed multiplier", (2, 8, 6), 4, (3,), stride=2, groups=4, transposed=True),
    Case("transposed depthwise, widened", (2, 4, 6), 8, (3,), stride=2, groups=4, transposed=True),
    Case("transposed 3-D", (1, 4, 3, 4, 3), 3, (2, 3, 2), stride=(2, 1, 2), padding=(0, 1, 0), transposed=True),
]  # fmt: skip
ALL = FORWARD + TRANSPOSED
# One of each kernel and rank, for what need not run on every case.
FEW = [c for c in ALL if c.reason in {
    "plain 1-D", "every parameter differs by dimension", "3-D, every parameter differs", "groups", "depthwise",
    "depthwise with a channel multiplier", "same padding, even kernel pads one side more",
    "transposed, output padding", "transposed depthwise", "transposed, uneven groups",
}]  # fmt: skip
