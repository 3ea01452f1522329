"""A second device that is not there: its tensors lie in the memory of the CPU, say that they are on
`cpu:1`, and may not meet those of the CPU.

What a card refuses is refused here: an operation on tensors of both devices. A number (a tensor
without dimensions) may come from the CPU, as on a card. Stricter than a card: indices must lie
where the tensor does, since a card would have to wait for them.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import accelerate
import torch
from accelerate.hooks import AlignDevicesHook
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

FAR = torch.device("cpu:1")
NEAR = torch.device("cpu")
MOVES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
REFUSAL = "expected all tensors on one device"


class FarTensor(Tensor):
    """A tensor on the second device; `near` holds its values."""

    near: Tensor
    __torch_function__: Any = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, near: Tensor) -> "FarTensor":
        assert not isinstance(near, FarTensor)
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
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return _run(func, args, kwargs or {})

    def tolist(self) -> Any:
        return self.near.tolist()

    def new_tensor(self, data: Any, **options: Any) -> Tensor:  # type: ignore[override]
        settings: dict[str, Any] = {"dtype": self.dtype, "device": FAR} | options
        return torch.tensor(data, **settings)

    def __getitem__(self, index: Any) -> Tensor:
        return super().__getitem__(_listed(index))

    def __setitem__(self, index: Any, value: Any) -> None:
        super().__setitem__(_listed(index), value)

    def numpy(self, **options: Any) -> Any:
        raise TypeError("can't convert a tensor of the second device to numpy: use .cpu() first")

    def __repr__(self, **options: Any) -> str:  # type: ignore[override]
        return f"{self.near!r} on {FAR}"

    def __deepcopy__(self, memo: dict[int, Any]) -> "FarTensor":
        if id(self) not in memo:
            memo[id(self)] = FarTensor(self.near.detach().clone())
        copied: FarTensor = memo[id(self)]
        return copied


def _run(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """An operation of torch, on whichever device its tensors or its `device` say."""
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    far = [tensor for tensor in tensors if isinstance(tensor, FarTensor)]
    near = [t for t in tensors if not isinstance(t, FarTensor) and t.ndim and t.numel()]
    if far and near and func not in MOVES:
        raise RuntimeError(f"{func}: {REFUSAL}")
    device = kwargs.get("device")
    there = bool(far) if device is None else torch.device(device) == FAR
    if func is torch.ops.aten.copy_.default:
        there = isinstance(args[0], FarTensor)
    asked = device is not None and torch.device(device) == FAR
    own = {**kwargs, "device": NEAR} if asked else kwargs
    found = func(*tree_map(_near, args), **tree_map(_near, own))
    return _far(found, func, far) if there else found


def _listed(index: Any) -> Any:
    """An index with its lists as tensors of the second device, where a card has them too."""
    if isinstance(index, tuple):
        return tuple(map(_listed, index))
    return torch.tensor(index, device=FAR) if isinstance(index, list) else index


def _near(leaf: Any) -> Any:
    return leaf.near if isinstance(leaf, FarTensor) else leaf


def _far(found: Any, func: Any, inputs: list[FarTensor]) -> Any:
    """What came out, on the second device; what was written in place is the tensor it was."""
    before = {id(tensor.near): tensor for tensor in inputs}
    # a view of an ordinary tensor is one too, in inference mode as well
    view = any(of.alias_info and not of.alias_info.is_write for of in func._schema.returns)
    ordinary = view and inputs and not inputs[0].is_inference()

    def there(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        return before[id(leaf)] if id(leaf) in before else FarTensor(leaf)

    with torch.inference_mode(torch.is_inference_mode_enabled() and not ordinary):
        return tree_map(there, found)


MAKERS = (torch.tensor, torch.as_tensor, torch.asarray)


class Makers(TorchFunctionMode):
    """`torch.tensor` and its like, which ask `TwoDevices` not where to put what they make."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        options = dict(kwargs or {})
        device = options.get("device")
        if func not in MAKERS or not (args and (device is None or torch.device(device) == FAR)):
            return func(*args, **options)
        if device is None and isinstance(args[0], FarTensor):
            return args[0].clone() if func is torch.tensor else args[0]
        options.pop("device", None)
        made = func(*tree_map(_near, args), **options)
        return made if device is None else made.to(device)


class TwoDevices(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While it is entered, torch knows the second device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with self:  # in inference mode torch leaves taking them apart to who comes first
            found = func.decompose(*args, **(kwargs or {}))
        return _run(func, args, kwargs or {}) if found is NotImplemented else found


@contextmanager
def second_device(best: bool = False) -> Iterator[torch.device]:
    """Torch knows the second device, and whole models can be moved to it: `model.to(FAR)`.

    best: it is what torch names as the accelerator of this machine.
    """
    before = torch.__future__.get_overwrite_module_params_on_conversion()
    with ExitStack() as stack:
        if best:
            card = {"is_available": True, "current_accelerator": FAR, "device_count": 1}
            for name, value in card.items():
                found = mock.Mock(return_value=value)
                stack.enter_context(mock.patch.object(torch.accelerator, name, found))
            stack.enter_context(mock.patch.object(torch.accelerator, "empty_cache"))
        # the weights of the second device take the place of those before, not of their values
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        stack.callback(torch.__future__.set_overwrite_module_params_on_conversion, before)
        stack.enter_context(TwoDevices())  # type: ignore[no-untyped-call]
        stack.enter_context(Makers())
        yield FAR


@contextmanager
def spread(model: Any, far: range) -> Iterator[None]:
    """The decoder's layers `far` on the second device, as a device map of accelerate puts them."""
    with second_device(), torch.no_grad():
        decoder = model.model.language_model
        for index, module in enumerate([*decoder.layers, decoder.norm]):
            place = FAR if index in far else NEAR
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
