"""Tensors that a user brings for some layers, from a file or as they are."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

LayerSource: TypeAlias = str | Path | Mapping[int, Tensor]
"""A safetensors file with the tensors "0", "1", ... (or "layers.0", ...), or tensors by layer."""
_KEY = re.compile(r"(?:layers?\.)?(\d+)")


class LayerTensors(Mapping[int, Tensor]):
    """Tensors by layer in float32, and copies of them where a layer computes.

    source: where they come from, in words.
    """

    def __init__(self, tensors: Mapping[int, Tensor], source: str) -> None:
        self.tensors, self.source = tensors, source
        self._copies: dict[tuple[int, torch.device, torch.dtype], Tensor] = {}

    def __getitem__(self, layer: int) -> Tensor:
        return self.tensors[layer]

    def __iter__(self) -> Iterator[int]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    def __repr__(self) -> str:
        return self.source

    def choose(self, name: str, wanted: Sequence[int] | None) -> tuple[int, ...]:
        """The layers `wanted`; None: all with a tensor. Raises ValueError for one without."""
        missing = [layer for layer in wanted or () if layer not in self.tensors]
        if missing:
            raise ValueError(f"{name}: found {missing[0]}, expected one of {self.source}")
        return tuple(self.tensors if wanted is None else wanted)

    def near(self, layer: int, hidden: Tensor) -> Tensor:
        """The tensor of a layer with the type and on the device of `hidden`; copied once."""
        key = layer, hidden.device, hidden.dtype
        if key not in self._copies:
            with torch.inference_mode(False):  # autograd may meet it later
                self._copies[key] = self.tensors[layer].to(hidden.device, hidden.dtype)
        return self._copies[key]


def check_source(name: str, source: LayerSource | None, what: str) -> None:
    """Raises ValueError unless `source` is a path or a mapping of layers."""
    if not source or not isinstance(source, str | Path | Mapping):
        raise ValueError(
            f"{name}: found {source!r}, expected {what} by layer: a safetensors file whose tensors "
            'are called "0", "1", ..., or a mapping such as {12: tensor}'
        )


def read(name: str, source: LayerSource, shape: str, width: int, depth: int) -> LayerTensors:
    """The tensors of a source, checked against a model of `depth` layers and width D.

    shape: "D" or "r, D". Raises ValueError for what is not there or does not fit.
    """
    if isinstance(source, Mapping):
        given, where = {str(layer): tensor for layer, tensor in source.items()}, "a mapping"
    else:
        given, where = _file(name, Path(source)), str(source)
    found = {}
    for key, tensor in given.items():
        match = _KEY.fullmatch(key)
        if match is None or int(match[1]) >= depth:
            raise ValueError(
                f"{name}: {where} names {key!r}, expected the index of a layer of this model, "
                f'"0" to "{depth - 1}"'
            )
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            raise ValueError(f"{name}: layer {key} of {where} holds no tensor of floats: {tensor}")
        if tensor.ndim != len(shape.split(",")) or tensor.shape[-1] != width or not len(tensor):
            raise ValueError(
                f"{name}: layer {key} of {where} has shape {tuple(tensor.shape)}, expected "
                f"[{shape}] with D = {width}, the width of this model"
            )
        if not tensor.isfinite().all():
            raise ValueError(f"{name}: layer {key} of {where} holds nan or infinity")
        found[int(match[1])] = tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32))
    return LayerTensors(dict(sorted(found.items())), f"<layers {sorted(found)} of {where}>")


def _file(name: str, path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"{name}: {path} cannot be read as a safetensors file ({error}): write one by "
            'safetensors.torch.save_file({"12": tensor}, path)'
        ) from error
