"""VAR (Kang et al., arXiv 2503.03321): recycle the attention of sinks to the other image tokens."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Var:
    """move_fraction is the share taken from sinks, rho_nonsink the least visual non-sink ratio."""

    dims: tuple[int, ...]
    tau: float
    move_fraction: float = 0.6
    rho_nonsink: float = 0.5
    min_image_mass: float = 0.2
    first_layer: int = 0
    exclude_last_layer: bool = True
    require_visual_sink: bool = False
    semantics: str = "paper"

    name = "var"

    def acts_in(self, layer: int, layers: int) -> bool:
        first = max(self.first_layer, 2) if self.semantics == "release" else self.first_layer
        return first <= layer < layers - self.exclude_last_layer


def phi(x: Tensor, dims: tuple[int, ...], eps: float = 0.0) -> Tensor:
    """Sink score [...] of block inputs x [..., D]: the largest |x[d]| over dims, per RMS of x."""
    rms = (x.square().mean(-1) + eps).sqrt()
    return x[..., list(dims)].abs().amax(-1) / rms


def is_sink(x: Tensor, spec: Var, tested: Tensor) -> Tensor:
    """bool [S]: the sinks among the tested (bool [S]) tokens whose block inputs are x [S, D]."""
    if spec.semantics == "release":
        return (phi(x, spec.dims, eps=1e-6) > spec.tau) & tested
    return (phi(x, spec.dims) >= spec.tau) & tested


def image_mass(weights: Tensor, image: Tensor) -> Tensor:
    """m [...]: the weight on image keys, of weights [..., K]."""
    return weights[..., image].sum(-1)


def sink_ratio(weights: Tensor, image: Tensor, sinks: Tensor, semantics: str) -> Tensor:
    """[...]: the share of the image mass that lies on sinks (1 - r of the paper)."""
    mass = image_mass(weights, image)
    if semantics == "release":
        mass = mass + 1e-6 * image.sum()
    return weights[..., image & sinks].sum(-1) / mass


def selected(weights: Tensor, image: Tensor, sinks: Tensor, spec: Var) -> Tensor:
    """bool [...]: the image-centric rows of weights [..., K] that are redistributed."""
    mass = image_mass(weights, image)
    others = weights[..., image & ~sinks].sum(-1)
    if spec.semantics == "release":
        pure = sink_ratio(weights, image, sinks, "release") <= 1 - spec.rho_nonsink
    else:
        pure = others / mass >= spec.rho_nonsink
    chosen = (mass > 0) & (mass >= spec.min_image_mass) & pure & (others > 0)
    needs_one = spec.require_visual_sink or spec.semantics == "release"
    return chosen & bool((image & sinks).any()) if needs_one else chosen


def gain(weights: Tensor, image: Tensor, sinks: Tensor, spec: Var) -> Tensor:
    """g = 1 + Omega / sum_N a [...]: the factor of every visual non-sink weight."""
    omega = spec.move_fraction * weights[..., sinks].sum(-1)
    return 1 + omega / weights[..., image & ~sinks].sum(-1)


def redistributed(weights: Tensor, image: Tensor, sinks: Tensor, spec: Var) -> Tensor:
    """weights [..., K] with the selected rows redistributed; their sums stay as they were."""
    factor = torch.ones_like(weights)
    factor[..., sinks] = 1 - spec.move_fraction
    factor = torch.where(
        image & ~sinks, gain(weights, image, sinks, spec)[..., None].expand_as(weights), factor
    )
    return torch.where(selected(weights, image, sinks, spec)[..., None], weights * factor, weights)
