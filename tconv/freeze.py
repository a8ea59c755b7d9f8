"""Keeps what is copied of a model's weights, for inference in the default layout."""

from __future__ import annotations

import warnings

import torch
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils import parametrize

__all__ = ["freeze", "unfreeze"]


def freeze(model: torch.nn.Module) -> torch.nn.Module:
    """Keeps the copies of a model's convolution weights that tconv's kernels need, instead of making them in every call.

    Kernels want weights in channels last. In the default layout they copy them, which takes a launch in each call. With frozen
    weights that is done once per weight, and costs as much memory again as the weights that are copied. Nothing else changes:
    results have the same bits and the same memory format.

    It is meant for inference. A weight that an optimizer, `load_state_dict` or any other operation of torch changes is copied
    anew in the next call. One that is changed without torch's noticing, through `.data` or by another library, is not: then
    call `freeze` again. A weight that moves to other memory, as by `model.to`, is no longer frozen.

    Args:
        model: any module; may itself be a convolution. Layers of torch.nn count, which `enable` may run on tconv's kernels, and
            tconv's own.
    Returns:
        The same model.
    Raises:
        TypeError: `model` is not a module.
        ValueError: a lazy layer has no weight yet. Nothing is frozen.
    Warns:
        UserWarning: the model has no weight that can be frozen. Weights that are computed in each call, as by weight_norm, can
            not.

    Example:
        >>> model = freeze(torch.nn.Conv2d(3, 8, 3).eval())
    """
    from tconv.launching import frozen

    found = _weights(model)
    for name, weight in found.items():
        if isinstance(weight, UninitializedParameter):
            raise ValueError(f"freeze: {name or 'the layer'} has no weight yet; call the model once first")
    if not found:
        warnings.warn("freeze: the model has no convolution whose weight can be frozen", UserWarning, stacklevel=2)
    for weight in found.values():
        frozen.keep(weight)
    return model


def unfreeze(model: torch.nn.Module) -> torch.nn.Module:
    """Forgets what `freeze` keeps of a model's weights, which are then copied in every call.

    Args:
        model: any module, frozen or not.
    Returns:
        The same model.
    Raises:
        TypeError: `model` is not a module.
    """
    from tconv.launching import frozen

    for weight in _weights(model).values():
        if not isinstance(weight, UninitializedParameter):
            frozen.release(weight)
    return model


def _weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Returns the weights of a model's convolutions by the layer's name, without those that a parametrization computes."""
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    layers = ((name, m) for name, m in model.named_modules() if isinstance(m, torch.nn.modules.conv._ConvNd))
    found = ((name, m._parameters.get("weight")) for name, m in layers if not parametrize.is_parametrized(m, "weight"))
    return {name: weight for name, weight in found if weight is not None}
