"""A steering vector of your own, added to the residual stream. Turner et al. 2023,
https://arxiv.org/abs/2308.10248.

What a model does is moved along a direction that was found elsewhere, for example the mean
difference of activations between two kinds of prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from vlm_patch.method import ForwardContext, Method, ModelInfo, State
from vlm_patch.primitives.layer_tensors import LayerSource, check_source, read
from vlm_patch.validation import check_number, check_wholes

POSITIONS = ("all", "last", "generated")


def steered(hidden: Tensor, vector: Tensor, strength: float) -> Tensor:
    """h + strength * v: hidden `[B, S, D]`, vector `[D]`."""
    return torch.add(hidden, vector, alpha=strength)


@dataclass(frozen=True)
class Steering(Method):
    """Adds a vector to the residual stream that leaves a block (Turner et al., section 3).

    vectors: `[D]` by layer: a safetensors file with the tensors "12", "13", ..., or a mapping of
        tensors.
    strength: by what it is multiplied; 0 changes nothing, a negative one steers away.
    positions: "all" rows of prompt and answer, the "last" one of a prompt and what is generated, or
        "generated" tokens only.
    layers: where. None: every layer that has a vector.

    Raises ValueError on values out of range, and in `wrap` on vectors that do not fit the model.

        wrap(model, Steering("vectors.safetensors", strength=-2.0))
    """

    name: ClassVar[str] = "steering"

    vectors: LayerSource | None = None
    strength: float = 1.0
    positions: str = "all"
    layers: Sequence[int] | None = None

    def __post_init__(self) -> None:
        check_source("Steering vectors", self.vectors, "a vector [D]")
        check_number("Steering strength", self.strength)
        check_wholes("Steering layers", self.layers)
        if self.positions not in POSITIONS:
            raise ValueError(
                f"Steering positions: found {self.positions!r}, expected one of {POSITIONS}"
            )

    @property
    def edits_prompt_end(self) -> bool:  # type: ignore[override]
        """The last row of a prompt, where it is not one of all."""
        return self.positions == "last"

    def resolve(self, info: ModelInfo) -> tuple[Method, list[str]]:
        source: Any = self.vectors
        vectors = read("Steering vectors", source, "D", info.width, info.depth)
        layers = vectors.choose("Steering layers", self.layers)
        info.check_layers("Steering layers", layers)
        return replace(self, vectors=vectors, layers=layers), []

    def default_layers(self, depth: int) -> Sequence[int]:
        return self.layers or ()

    def edit_hidden(
        self, layer: int, hidden: Tensor, forward: ForwardContext, state: State
    ) -> Tensor:
        vectors: Any = self.vectors  # read by now
        new = steered(hidden, vectors.near(layer, hidden), self.strength)
        if self.positions == "all" or not forward.position.prompt_rows:
            return new
        return torch.where(self._rows(forward)[..., None], new, hidden)

    def _rows(self, forward: ForwardContext) -> Tensor:
        """The rows `[B, S]` to steer where some are of a prompt."""
        if self.positions == "last":
            rows = forward.last
            if forward.position.may_continue:  # read up to its image, the question follows
                rows = rows & ~forward.image[:, forward.new]
            return rows
        rows = torch.ones_like(forward.valid)
        rows[:, : forward.position.prompt_rows] = False
        return rows
