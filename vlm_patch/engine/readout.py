"""What a model would say of the residual stream of any layer: its last norm and its head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vlm_patch.errors import UnsupportedModelError

NORM_NAMES = (
    *("norm", "final_layernorm", "final_layer_norm", "final_norm", "ln_f"),
    *("layer_norm", "embedding_norm"),
)
"""What the norm behind the last layer is called in the models of transformers."""


@dataclass(frozen=True)
class Readout:
    """The last norm of a decoder and the head behind it.

    split: the head's rows lie on several processes, which its hooks bring together.
    """

    norm: nn.Module
    head: Any
    split: bool = False

    @classmethod
    def of(cls, decoder: nn.Module, generator: Any, name: str, split: bool = False) -> Readout:
        """Raises UnsupportedModelError, for the method `name`, where either is not found."""
        children = dict(decoder.named_children())
        found = [child for child in NORM_NAMES if child in children]
        head = generator.get_output_embeddings()
        if len(found) != 1 or head is None:
            raise UnsupportedModelError(
                f"{name} reads logits off the residual stream: expected one of {list(NORM_NAMES)} "
                f"in {type(decoder).__name__} and an output embedding, found {found} and {head}"
            )
        return cls(children[found[0]], head, split)

    def __call__(self, hidden: Tensor) -> Tensor:
        """Logits `[..., V]` in float32 at least of hidden `[..., D]`, on its device."""
        normed = self.norm(_beside(self.norm, hidden))
        # past the hooks of the head, which users read the model's logits with
        call = self.head if self.split else self.head.forward
        logits: Tensor = call(_beside(self.head, normed))
        return logits.to(hidden.device, torch.promote_types(logits.dtype, torch.float32))


def _beside(module: nn.Module, tensor: Tensor) -> Tensor:
    """A tensor where a module computes; one whose weights are offloaded sees to that itself."""
    place = next(module.parameters(), tensor).device
    return tensor if place.type == "meta" else tensor.to(place)
