"""A shortcut through Triton's interpreter, which the tests spend most of their time in."""

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
