"""Layers as other people write them, in a file of their own so that a pickle of them can be loaded by another process."""

from __future__ import annotations

import typing

import torch
from torch import nn


class Simple(nn.Conv3d):
    """Torchvision's Conv3DSimple: another constructor, and a method for whoever builds the network."""

    def __init__(self, in_planes, out_planes, midplanes=None, stride=1, padding=1):
        super().__init__(in_planes, out_planes, kernel_size=(3, 3, 3), stride=stride, padding=padding, bias=False)
        self.midplanes = midplanes

    @staticmethod
    def get_downsample_stride(stride):
        return stride, stride, stride


class Documented(nn.Conv2d):
    """Overrides what a convolution does not compute by."""

    def __init__(self, *args, note="", **kwargs):
        super().__init__(*args, **kwargs)
        self.note = note

    def extra_repr(self):
        return f"{super().extra_repr()}, note={self.note!r}"

    def reset_parameters(self):
        nn.init.constant_(self.weight, 0.5)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def twice(self, x):
        return 2 * super().forward(x)


class Further(Documented):
    """A subclass of a subclass."""


class Wider(nn.ConvTranspose2d):
    """A transposed layer that chooses its own output padding."""

    def _output_padding(self, input, output_size, *args, **kwargs):
        return super()._output_padding(input, None, *args, **kwargs) if output_size is None else [1, 0]


class Scaled(nn.Conv2d):
    """A weight that is computed, by a property of the class."""

    @property
    def weight(self):
        if "weight" not in self._parameters:
            raise AttributeError("weight")
        return 2 * self._parameters["weight"]

    def reset_parameters(self):  # torch's would initialise the product
        nn.init.normal_(self._parameters["weight"])
        nn.init.zeros_(self.bias)


class LazySimple(nn.LazyConv2d):
    """A lazy layer that becomes a class of its own."""

    cls_to_become = Documented


class Counted:
    def __call__(self, *args, **kwargs):
        self.__dict__["calls"] = self.__dict__.get("calls", 0) + 1
        return super().__call__(*args, **kwargs)


class Mixed(Counted, nn.Conv2d):
    """A mixin before the layer."""


class Rebuilt(nn.Conv2d):
    """Pickled by its arguments."""

    def __reduce__(self):
        return type(self), (self.in_channels, self.out_channels, self.kernel_size), self.__dict__


# Classes that are left alone


class Same(nn.Conv2d):
    """Timm's Conv2dSame: a convolution called as a function."""

    def forward(self, x):
        return nn.functional.conv2d(nn.functional.pad(x, (1, 1, 1, 1)), self.weight, self.bias)


class Standardized(nn.Conv2d):
    """Another weight handed on."""

    def _conv_forward(self, input, weight, bias):
        return super()._conv_forward(input, weight - weight.mean(), bias)


class Slotted(nn.Conv2d):
    __slots__ = ("note",)


class Meta(type):
    made: typing.ClassVar[list[str]] = []

    def __init__(cls, name, bases, members):
        super().__init__(name, bases, members)
        Meta.made.append(name)


class WithMetaclass(nn.Conv2d, metaclass=Meta):
    pass


class Registered(nn.Conv2d):
    made: typing.ClassVar[list[type]] = []

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        Registered.made.append(cls)


class Sealed(nn.Conv2d):
    def __init_subclass__(cls, **kwargs):
        raise TypeError("no subclasses, please")


class LazySame(nn.LazyConv2d):
    cls_to_become = Same


class Stubborn(nn.Conv2d):
    """Its class cannot be changed."""

    @property
    def __class__(self):
        return Stubborn


def network():
    """Torchvision's R3D-18, cut short: a stem of nn.Conv3d and blocks of Conv3DSimple."""
    torch.manual_seed(0)
    block = nn.Sequential(Simple(4, 4), nn.BatchNorm3d(4), nn.ReLU(), Simple(4, 4), nn.BatchNorm3d(4))
    return nn.Sequential(nn.Conv3d(3, 4, (3, 5, 5), stride=(1, 2, 2), padding=(1, 2, 2), bias=False), block).eval()
