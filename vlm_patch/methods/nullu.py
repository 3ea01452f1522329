"""Nullu: null space of hallucinations. Yang et al., CVPR 2025, https://arxiv.org/abs/2412.13817.

What an MLP writes along directions in which hallucinated and true captions differ is removed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from vlm_patch.method import ForwardContext, Method, ModelInfo, State
from vlm_patch.primitives.layer_tensors import LayerSource, LayerTensors, check_source, read
from vlm_patch.validation import check_whole, check_wholes

ORTHONORMAL = 1e-2
"""How far from the identity the products of directions may be, which half precision needs."""


def hallucination_directions(hallucinated: Tensor, true: Tensor, rank: int = 4) -> Tensor:
    """The directions in which hallucinated captions differ most from true ones (paper, section 3):
    the first right-singular vectors of the differences.

    hallucinated, true `[N, D]`: features of a layer (its hidden states, averaged over the tokens of
    a caption) for N pairs of captions of one image. Returns `[rank, D]`, orthonormal.
    """
    if hallucinated.shape != true.shape or hallucinated.ndim != 2:
        raise ValueError(
            f"features: found shapes {tuple(hallucinated.shape)} and {tuple(true.shape)}, expected "
            "[N, D] twice, one row a pair of captions"
        )
    if not 1 <= rank <= min(hallucinated.shape):
        raise ValueError(
            f"rank: found {rank}, expected 1 to {min(hallucinated.shape)}, which is all that "
            f"{len(true)} pairs of width {true.shape[1]} can tell"
        )
    kind = torch.promote_types(hallucinated.dtype, torch.float32)
    difference = hallucinated.to(kind) - true.to(kind)
    directions: Tensor = torch.linalg.svd(difference, full_matrices=False).Vh[:rank]
    return directions


def remove_directions(output: Tensor, directions: Tensor) -> Tensor:
    """(I - V V^T) y: output y `[..., D]` of an MLP, directions V `[r, D]`, orthonormal.

    The same as the paper's edit of the weights, (I - V V^T) W x = y - V V^T (W x).
    """
    return output - (output @ directions.T) @ directions


@dataclass(frozen=True)
class Nullu(Method):
    """Removes the directions of hallucination from what MLPs add to the residual stream (Yang et
    al., section 3).

    directions: `[r, D]` by layer, orthonormal: a safetensors file with the tensors "16", "17", ...,
        or a mapping of tensors; `hallucination_directions` makes them of pairs of captions. The
        published ones are of layers 16 to 31, four a layer.
    rank: how many of them, the first ones; None: all.
    layers: where. None: every layer that has directions.

    The paper edits the weights of the down projections; here they are never touched, which gives
    the same numbers (without a bias there), acts at once on a model whose weights are quantised,
    split or offloaded, and leaves prompts without an image as they are. Raises ValueError on values
    out of range, and in `wrap` on directions that do not fit the model.

        wrap(model, Nullu("directions.safetensors"))
    """

    name: ClassVar[str] = "nullu"

    directions: LayerSource | None = None
    rank: int | None = None
    layers: Sequence[int] | None = None

    def __post_init__(self) -> None:
        check_source("Nullu directions", self.directions, "directions [r, D]")
        if self.rank is not None:
            check_whole("Nullu rank", self.rank)
            if self.rank == 0:
                raise ValueError("Nullu rank: found 0, expected an integer of at least 1")
        check_wholes("Nullu layers", self.layers)

    def resolve(self, info: ModelInfo) -> tuple[Method, list[str]]:
        source: Any = self.directions
        found = read("Nullu directions", source, "r, D", info.width, info.depth)
        layers = found.choose("Nullu layers", self.layers)
        info.check_layers("Nullu layers", layers)
        kept = {layer: self._checked(layer, found[layer]) for layer in layers}
        return replace(self, directions=LayerTensors(kept, found.source), layers=layers), []

    def _checked(self, layer: int, directions: Tensor) -> Tensor:
        """The first `rank` directions of a layer."""
        if self.rank is not None and self.rank > len(directions):
            raise ValueError(
                f"Nullu rank: found {self.rank}, but layer {layer} has {len(directions)} directions"
            )
        eye = torch.eye(len(directions), dtype=directions.dtype, device=directions.device)
        off = float((directions @ directions.T - eye).abs().max())
        if off > ORTHONORMAL:
            raise ValueError(
                f"Nullu directions: those of layer {layer} are not orthonormal (their products are "
                f"{off:.2g} from the identity): make them by torch.linalg.svd or torch.linalg.qr"
            )
        return directions[: self.rank]

    def default_layers(self, depth: int) -> Sequence[int]:
        return self.layers or ()

    def edit_mlp(
        self, layer: int, output: Tensor, hidden: Tensor, forward: ForwardContext, state: State
    ) -> Tensor:
        directions: Any = self.directions  # read by now
        precise = output.to(torch.promote_types(output.dtype, torch.float32))
        return remove_directions(precise, directions.near(layer, precise))
