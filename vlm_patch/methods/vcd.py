"""VCD: visual contrastive decoding. Leng et al., CVPR 2024, https://arxiv.org/abs/2311.16922.

What the model would say of a noised image is taken away from what it says of the image.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor

from vlm_patch.method import Branch, ForwardContext, Method
from vlm_patch.primitives.contrast import contrasted, cut
from vlm_patch.validation import check_number, check_whole

STEPS = 1000
NOISED = "noised"


@lru_cache(maxsize=1)
def schedule() -> tuple[float, ...]:
    """The share abar_t of an image's variance that is left after t + 1 steps of diffusion, of 1000
    (the release's): beta_t = sigmoid(x_t) (0.005 - 1e-5) + 1e-5 with x_t from -6 to 6.
    """
    with torch.inference_mode(False):
        x = torch.linspace(-6, 6, STEPS, dtype=torch.float64)
        betas = torch.sigmoid(x) * (0.005 - 1e-5) + 1e-5
        return tuple((1 - betas).cumprod(0).tolist())


def diffused(pixels: Tensor, noise: Tensor, step: int) -> Tensor:
    """sqrt(abar) x + sqrt(1 - abar) n at `step` (0-based), of normalised pixels; unclipped (paper,
    equation 2).
    """
    left = schedule()[step]
    return float(left**0.5) * pixels + float((1 - left) ** 0.5) * noise


@dataclass(frozen=True)
class VCD(Method):
    """(1 + alpha) l - alpha l' of the logits with the image and with the image noised, of tokens
    that are likely enough with the image (Leng et al.).

    alpha: strength of the contrast, at least 0. 1 in the release's scripts, 0.5 in its function.
    beta: a token stays if its probability is at least this share of the likeliest's, 0 to 1.
    noise_step: how far the image is noised, 0 to 999.
    seed: of the noise, which is the same for every image and on every device.

    It costs a second forward per token, with a cache of its own. Raises ValueError on values out of
    range.

        wrap(model, VCD(alpha=0.5))
    """

    name: ClassVar[str] = "vcd"

    alpha: float = 1.0
    beta: float = 0.1
    noise_step: int = 500
    seed: int = 0

    def __post_init__(self) -> None:
        check_number("VCD alpha", self.alpha, 0)
        check_number("VCD beta", self.beta, 0, 1)
        check_whole("VCD noise_step", self.noise_step)
        if self.noise_step >= STEPS:
            raise ValueError(
                f"VCD noise_step: found {self.noise_step}, expected an integer from 0 to 999"
            )
        check_whole("VCD seed", self.seed)

    def noised(self, pixels: Tensor) -> Tensor:
        """The pixels of one image, noised."""
        draw = torch.Generator().manual_seed(self.seed)
        noise = torch.randn(pixels.shape, generator=draw).to(pixels)
        return diffused(pixels, noise, self.noise_step)

    def branches(self) -> Mapping[str, Branch]:
        return {NOISED: Branch(pixels=self.noised)}

    def edit_logits(
        self,
        logits: Tensor,
        others: Mapping[str | int, Tensor],
        forward: ForwardContext,
        state: Any,
    ) -> Tensor:
        return cut(contrasted(logits, others[NOISED], self.alpha), logits, self.beta)
