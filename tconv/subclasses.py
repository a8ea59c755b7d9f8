"""Which class of tconv's takes the place of a layer's class, for torch.nn's own and for subclasses of the user's.

A subclass of the user's that leaves the computation to torch.nn is taken by deriving a class from it and tconv's layer. There
tconv's layer comes right before torch.nn's, so that all that the user's class overrides stays overridden:

    class Named(torch.nn.Conv2d): ...      ->      class Named(Named, tconv.Conv2d): ...

One such class is made per class of the user's, on demand. A pickle names the user's class and is loaded by making it again.
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
USERS = "_tconv_users_class"  # of a class that was derived: the user's
_derived: weakref.WeakValueDictionary[type, type] = weakref.WeakValueDictionary()  # by the user's class
_lock = threading.RLock()


class Left(Exception):
    """A class is left alone; the text says why, and what to do."""


def ours(cls: type) -> type | None:
    """The class of tconv's for a layer's class; None for what is no convolution of torch.nn's, or is tconv's already.

    Raises:
        Left: a subclass of the user's that cannot be taken.
    """
    if cls in OURS or issubclass(cls, tuple(TORCHS)):
        return OURS.get(cls)
    base = next((b for b in cls.__mro__ if b in OURS), None)
    return None if base is None else derived(cls, base)


def theirs(cls: type) -> type | None:
    """What a class of tconv's took the place of: torch.nn's or the user's; None for any other class."""
    found: type | None = cls.__dict__.get(USERS) or TORCHS.get(cls)
    return found


def derived(cls: type, base: type) -> type:
    """The class derived from a user's class and tconv's layer.

    Args:
        cls: a subclass of the user's.
        base: the class of torch.nn's that it comes from.

    Raises:
        Left: it cannot be taken.
    """
    with _lock:
        found = _derived.get(cls)
        if found is None:
            _refuse(cls, base)
            found = _derived[cls] = _derive(cls, base)
        return found


def _refuse(cls: type, base: type) -> None:
    """Raises Left if deriving a class could change what the user's class does, or would change nothing."""
    own = cls.__mro__[: cls.__mro__.index(base)]
    for name in COMPUTES:
        if getattr(cls, name) is not getattr(base, name):
            raise Left(f"it overrides {name} (tconv.enable() reaches what that calls)")
    if type(cls) is not type:
        raise Left(f"its metaclass {type(cls).__name__} may mind a class derived from it (tconv.enable() reaches it)")
    for c in cls.__mro__:
        if c is not object and "__init_subclass__" in c.__dict__:
            raise Left(f"{c.__name__}.__init_subclass__ may mind a class derived from it (tconv.enable() reaches it)")
    if any(c.__dict__.get("__slots__") for c in own):
        raise Left("it has __slots__ (tconv.enable() reaches it)")


def _derive(cls: type, base: type) -> type:
    members: dict[str, Any] = {
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
        "__reduce_ex__": _reduce,
        USERS: cls,
    }
    becomes = getattr(cls, "cls_to_become", None)  # of a lazy layer
    if becomes is not None:
        try:
            members["cls_to_become"] = ours(becomes) or becomes
        except Left as why:
            raise Left(f"it becomes a {becomes.__name__}, which is left alone: {why}") from None
    try:
        return type(cls.__name__, (cls, OURS[base]), members)
    except TypeError as e:  # of an order of bases that Python does not take, say
        raise Left(f"no class can be derived from it, {e} (tconv.enable() reaches it)") from None


def _reduce(self: Any, protocol: Any) -> Any:
    """A derived class's `__reduce_ex__`: what the user's class would say, but for how the object is made."""
    cls: Any = next(c for c in type(self).__mro__ if USERS in c.__dict__)
    said = super(cls, self).__reduce_ex__(protocol)
    if type(self) is not cls or isinstance(said, str):
        return said  # a class derived further, or an object known by name
    (make, args, *rest), users = said, cls.__dict__[USERS]
    if make is cls:
        return (_made, (users, *args), *rest)
    if make is copyreg.__newobj__:  # type: ignore[attr-defined]  # of the protocols from 2 on
        return (_new, (users, *args[1:]), *rest)
    if make is copyreg._reconstructor:  # type: ignore[attr-defined]  # of the older ones
        return (_new, (users,), *rest)
    return said  # by a function of the user's


def _new(users: type, *args: Any) -> Any:
    """An object of the class derived from the user's, for pickle to fill."""
    cls: Any = _again(users)
    return cls.__new__(cls, *args)


def _made(users: type, *args: Any) -> Any:
    """An object of the class derived from the user's, made as the user's `__reduce__` asks."""
    return _again(users)(*args)


def _again(users: type) -> type:
    """The class derived from the user's; the user's own where that can no longer be taken, changed since it was pickled."""
    try:
        return ours(users) or users
    except Left:
        return users
