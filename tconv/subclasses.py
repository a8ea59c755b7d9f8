"""Finds the tconv class that replaces a layer's class, for torch.nn's layers and users' subclasses of them.

A user's subclass that leaves the computation to torch.nn is replaced by a class derived from it and from tconv's layer. In
the method resolution order tconv's layer comes right before torch.nn's, so whatever the user's class overrides stays
overridden:

    class Named(torch.nn.Conv2d): ...      ->      class Named(Named, tconv.Conv2d): ...

Such a class is created on demand, once per user's class. A pickle names the user's class, and loading it derives again.
"""

from __future__ import annotations

import copyreg
import threading
import weakref
from typing import Any

import torch

from tconv import modules

NAMES = tuple(f"{lazy}Conv{transpose}{rank}d" for lazy in ("", "Lazy") for transpose in ("", "Transpose") for rank in (1, 2, 3))
OURS: dict[type, type] = {getattr(torch.nn, name): getattr(modules, name) for name in NAMES}
TORCHS: dict[type, type] = {ours: torchs for torchs, ours in OURS.items()}
COMPUTES = ("forward", "_conv_forward")  # the methods that tconv's layers override
USERS = "_tconv_users_class"  # attribute of a derived class: the user's class
_derived: weakref.WeakValueDictionary[type, type] = weakref.WeakValueDictionary()  # {user's class: derived class}
_lock = threading.RLock()


class CannotReplace(Exception):
    """A class cannot be replaced. The text says why and, where possible, what to do."""


def ours(cls: type) -> type | None:
    """Returns tconv's class for a layer's class; None if that is not a torch.nn convolution, or is already tconv's.

    Raises:
        CannotReplace: it is a user's subclass that cannot be replaced.
    """
    if cls in OURS or issubclass(cls, tuple(TORCHS)):
        return OURS.get(cls)
    base = next((b for b in cls.__mro__ if b in OURS), None)
    return None if base is None else derived(cls, base)


def theirs(cls: type) -> type | None:
    """Returns the torch.nn or user's class that a tconv class replaces; None for any other class."""
    found: type | None = cls.__dict__.get(USERS) or TORCHS.get(cls)
    return found


def derived(cls: type, base: type) -> type:
    """Returns the class derived from a user's class and tconv's layer.

    Args:
        cls: the user's class.
        base: its torch.nn base class.

    Raises:
        CannotReplace: it cannot be replaced.
    """
    with _lock:
        found = _derived.get(cls)
        if found is None:
            _refuse(cls, base)
            found = _derived[cls] = _derive(cls, base)
        return found


def _refuse(cls: type, base: type) -> None:
    """Raises CannotReplace if deriving could change the behaviour of the user's class, or would have no effect."""
    for name in COMPUTES:
        if getattr(cls, name) is not getattr(base, name):
            raise CannotReplace(f"it overrides {name} (tconv.enable() reaches what that calls)")
    try:
        refuse_deriving(cls, cls.__mro__[: cls.__mro__.index(base)])
    except CannotReplace as why:
        raise CannotReplace(f"{why} (tconv.enable() reaches it)") from None


def refuse_deriving(cls: type, own: tuple[type, ...]) -> None:
    """Raises CannotReplace if deriving could change the behaviour of a class.

    Args:
        own: itself, and those bases that are not torch's.
    """
    if type(cls) is not type:
        raise CannotReplace(f"its metaclass {type(cls).__name__} may mind a class derived from it")
    for c in cls.__mro__:
        if c is not object and "__init_subclass__" in c.__dict__:
            raise CannotReplace(f"{c.__name__}.__init_subclass__ may mind a class derived from it")
    if any(c.__dict__.get("__slots__") for c in own):
        raise CannotReplace("it has __slots__")


def _derive(cls: type, base: type) -> type:
    members: dict[str, Any] = {
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
        "__reduce_ex__": reduce,
        USERS: cls,
    }
    becomes = getattr(cls, "cls_to_become", None)  # of a lazy layer
    if becomes is not None:
        try:
            members["cls_to_become"] = ours(becomes) or becomes
        except CannotReplace as why:
            raise CannotReplace(f"it becomes a {becomes.__name__}, which is left alone: {why}") from None
    try:
        return type(cls.__name__, (cls, OURS[base]), members)
    except TypeError as e:  # for example, no consistent method resolution order
        raise CannotReplace(f"no class can be derived from it, {e} (tconv.enable() reaches it)") from None


def reduce(self: Any, protocol: Any) -> Any:
    """The `__reduce_ex__` of a derived class: the result of the user's class, except for how the object is created."""
    cls: Any = next(c for c in type(self).__mro__ if USERS in c.__dict__)
    said = super(cls, self).__reduce_ex__(protocol)
    if type(self) is not cls or isinstance(said, str):
        return said  # a subclass of the derived class, or an object pickled by name
    (make, args, *rest), users = said, cls.__dict__[USERS]
    if make is cls:
        return (_made, (users, *args), *rest)
    if make is copyreg.__newobj__:  # type: ignore[attr-defined]  # pickle protocol 2 or later
        return (_new, (users, *args[1:]), *rest)
    if make is copyreg._reconstructor:  # type: ignore[attr-defined]  # earlier protocols
        return (_new, (users,), *rest)
    return said  # created by a user's function


def _new(users: type, *args: Any) -> Any:
    """Returns an empty object of the class derived from `users`, for pickle to fill."""
    cls: Any = _again(users)
    return cls.__new__(cls, *args)


def _made(users: type, *args: Any) -> Any:
    """Returns an object of the class derived from `users`, created as the user's `__reduce__` says."""
    return _again(users)(*args)


def _again(users: type) -> type:
    """Returns the class derived from `users`, or `users` itself if it has changed since and can no longer be replaced."""
    try:
        return ours(users) or users
    except CannotReplace:
        return users
