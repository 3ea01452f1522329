"""A second device that is not there: its tensors lie in the memory of the CPU, say that they are on
`cpu:1`, and may not meet those of the CPU.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from unittest import mock

import accelerate
import torch
from accelerate.hooks import AlignDevicesHook
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

FAR = torch.device("cpu:1")
MOVES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)


class FarTensor(Tensor):
    """A tensor on the second device."""

    near: Tensor

    @staticmethod
    def __new__(cls, near: Tensor) -> "FarTensor":
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            near.shape,
            strides=near.stride(),
            storage_offset=near.storage_offset(),
            dtype=near.dtype,
            device=FAR,
        )
        made.near = near
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _run(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """An operation of torch, on whichever device its tensors or its `device` say."""
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    far = [tensor for tensor in tensors if isinstance(tensor, FarTensor)]
    near = [t for t in tensors if not isinstance(t, FarTensor) and t.ndim and t.numel()]
    if far and near and func not in MOVES:
        raise RuntimeError(f"{func}: expected all tensors on one device")
    device = kwargs.get("device")
    there = bool(far) if device is None else torch.device(device) == FAR
    if func is torch.ops.aten.copy_.default:
        there = isinstance(args[0], FarTensor)
    own = kwargs if device is None else {**kwargs, "device": torch.device("cpu")}
    found = func(*tree_map(_near, args), **tree_map(_near, own))
    if not there:
        return found
    found = tree_map(lambda leaf: FarTensor(leaf) if isinstance(leaf, Tensor) else leaf, found)
    return return_and_correct_aliasing(func, args, kwargs, found) if far else found


def _near(leaf: Any) -> Any:
    return leaf.near if isinstance(leaf, FarTensor) else leaf


def _tensor(*values: Any, device: Any = None, **options: Any) -> Tensor:
    """`torch.tensor`, which asks no mode where to put what it makes."""
    made = NEAR(*values, **options)
    return made if device is None else made.to(device)


NEAR = torch.tensor


class TwoDevices(TorchDispatchMode):
    """While it is entered, torch knows the second device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


@contextmanager
def spread(model: Any, far: range) -> Iterator[None]:
    """The decoder's layers `far` on the second device, as a device map of accelerate puts them."""
    with TwoDevices(), torch.no_grad(), mock.patch.object(torch, "tensor", _tensor):
        decoder = model.model.language_model
        for index, module in enumerate([*decoder.layers, decoder.norm]):
            place = FAR if index in far else torch.device("cpu")
            accelerate.hooks.add_hook_to_module(module, AlignDevicesHook(place))
            if index in far:
                _move(module)
        yield


def _move(module: nn.Module) -> None:
    for part in module.modules():
        for name, weight in part.named_parameters(recurse=False):
            setattr(part, name, nn.Parameter(FarTensor(weight.data), requires_grad=False))
        for name, buffer in part.named_buffers(recurse=False):
            setattr(part, name, FarTensor(buffer))
