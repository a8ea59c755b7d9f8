"""All kernel families, in the order in which the planner asks them. A new one is added here."""

from __future__ import annotations

from tconv.planning.bias import Bias
from tconv.planning.depthwise import Depthwise, DepthwiseWgrad
from tconv.planning.family import Family
from tconv.planning.gather import Gather
from tconv.planning.packed import Packed, PackedWgrad
from tconv.planning.patch import Patch
from tconv.planning.persistent import Persistent, PersistentWgrad
from tconv.planning.rows import Rows
from tconv.planning.strip import Strip, StripWgrad
from tconv.planning.tma import Tma, TmaWgrad
from tconv.planning.wgrad import Wgrad

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        Strip(), StripWgrad(), Depthwise(), DepthwiseWgrad(), Gather(), Wgrad(), Packed(), PackedWgrad(), Rows(), Patch(),
        Tma(), TmaWgrad(), Persistent(), PersistentWgrad(), Bias(),
    )
}  # fmt: skip


def families(pass_: str) -> list[Family]:
    """Returns the families whose kernels compute a pass: "fprop", "dgrad", "wgrad" or "bias"."""
    return [family for family in FAMILIES.values() if pass_ in family.passes]
