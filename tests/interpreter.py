"""What the tests change in Triton's interpreter: a shortcut, since they spend most of their time in it, and the order in which
the terms of a product are added.
"""

import inspect

import triton.language as tl
from triton.runtime import interpreter


def look_up_once():
    """Makes the interpreter find the builtins of triton.language once.

    It replaces them by its own before it calls a kernel, and again before each device function that the kernel calls, where it
    finds all of them replaced already. Listing what a module has took a third of
    the tests' time.
    """
    builtins = {}

    def patch_builtin(package, builder, *scope):
        if package not in builtins:  # the first time, nothing is replaced
            builtins[package] = [name for name, member in inspect.getmembers(package) if tl.core.is_builtin(member)]
        for name in builtins[package]:
            member = getattr(package, name)
            if not tl.core.is_builtin(member):  # replaced already, and with it all others
                return
            interpreter._patch_attr(package, name, member, builder, *scope)

    interpreter._patch_builtin = patch_builtin


def add_alike():
    """Makes tl.dot add the terms of an element in the same order in every row, as tensor cores do.

    numpy leaves a product to BLAS, whose kernels may add them differently in the last rows of a block: OpenBLAS does for
    Haswell and for Zen. Here each row is a product of its own.
    """
    dot = interpreter.InterpreterBuilder.create_dot

    def create_dot(self, a, b, d, *how):
        def handle(t, data):
            return type(t)(data, t.dtype)

        rows, whole = handle(a, a.data[..., :, None, :]), handle(b, b.data[..., None, :, :])
        product = dot(self, rows, whole, handle(d, d.data[..., :, None, :]), *how)
        return handle(product, product.data[..., 0, :])

    interpreter.InterpreterBuilder.create_dot = create_dot
