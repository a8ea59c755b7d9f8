"""What each instruction does: one function per family, for the complete opcodes that its decorator lists.

integers, floats, bits and conversions compute; moves copies registers and tells them parameters; control jumps and waits;
warps exchanges between the threads of a warp; memory loads, stores and copies; matrices multiplies; bulk moves boxes.
"""

from simulator.forms import bits, bulk, control, conversions, floats, integers, matrices, memory, moves, warps

__all__ = ["bits", "bulk", "control", "conversions", "floats", "integers", "matrices", "memory", "moves", "warps"]
