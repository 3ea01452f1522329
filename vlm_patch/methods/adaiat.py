"""AdaIAT: adaptively increased attention to generated text. CVPR 2026,
https://arxiv.org/abs/2603.04908.

As IAT, but in a layer that looks too little at what was written, and per head as much as it did at
real objects.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from vlm_patch.method import ForwardContext, Method, ModelInfo, State
from vlm_patch.primitives.key_bias import PerKey
from vlm_patch.primitives.reweighting import reweight
from vlm_patch.validation import check_number, check_wholes


@dataclass(frozen=True, eq=False, repr=False)
class Calibration:
    """How much a model looks at its own text when it writes an object, by layer and head.

    real, hallucinated: `[L, H]`, the mean weight on a generated token at objects that are in the
        image, at objects that are not.

        Calibration.measure(attention, real).save("llava.safetensors")
    """

    real: Tensor
    hallucinated: Tensor

    def __repr__(self) -> str:
        layers, heads = self.real.shape
        return f"Calibration({layers} layers x {heads} heads)"

    @classmethod
    def measure(cls, attention: Tensor, real: Tensor) -> Calibration:
        """From the weights `[N, L, H]` at N object tokens (see `generated_attention`), of which
        `real` `[N]` (bool) are in their image.
        """
        if attention.ndim != 3 or real.shape != attention.shape[:1] or real.dtype != torch.bool:
            raise ValueError(
                f"calibration: found attention {tuple(attention.shape)} and real {real.dtype} "
                f"{tuple(real.shape)}, expected [N, layers, heads] and bool [N]"
            )
        if real.all() or not real.any():
            raise ValueError(
                f"calibration: found {int(real.sum())} real objects of {len(real)}, expected "
                "some that are and some that are not"
            )
        return cls(attention[real].mean(0), attention[~real].mean(0))

    def save(self, path: str | Path) -> None:
        """Writes a safetensors file."""
        from safetensors.torch import save_file

        parts = {"real": self.real, "hallucinated": self.hallucinated}
        save_file({name: part.contiguous() for name, part in parts.items()}, path)

    @classmethod
    def load(cls, path: str | Path) -> Calibration:
        """Reads what `save` wrote. Raises ValueError for another file."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            found = load_file(path)
        except (OSError, SafetensorError) as error:
            raise ValueError(f"AdaIAT calibration: cannot read {str(path)!r} ({error})") from error
        if set(found) != {"real", "hallucinated"}:
            raise ValueError(
                f"AdaIAT calibration: {str(path)!r} holds {sorted(found)}, expected real and "
                "hallucinated, as Calibration.save writes them"
            )
        return cls(**found)

    def surplus(self) -> Tensor:
        """The ratio of both, less 1, `[L, H]`."""
        tiny = torch.finfo(self.real.dtype).tiny
        ratio = self.real.double() / self.hallucinated.double().clamp_min(tiny)
        return (ratio - 1).to(self.real.dtype)

    def thresholds(self, beta: float) -> Tensor:
        """Between the sums over heads at hallucinated (beta 0) and real objects (beta 1), `[L]`."""
        low, high = (part.double().sum(1) for part in (self.hallucinated, self.real))
        return torch.lerp(low, high, beta).to(self.real.dtype)


def generated_attention(attentions: Sequence[Sequence[Tensor]], prompt: int) -> Tensor:
    """The mean weight on a generated token, `[B, steps - 1, L, H]`, at every generated token, from
    `generate(output_attentions=True, return_dict_in_generate=True).attentions` of a prompt of so
    many tokens (padding included). Entry t predicts the answer's token t + 1, counted from 0.
    """
    return torch.stack(
        [
            torch.stack([layer[:, :, -1, prompt:].mean(-1) for layer in step], 1)
            for step in attentions[1:]
        ],
        1,
    )


def boost_shares(masses: Tensor, gain: Tensor, boosted: Tensor) -> Tensor:
    """The weights of a group of keys times a gain per head, rows renormalised; where `boosted`.

    masses `[B, 2, H, R]`: of the group, and of all keys. gain `[B, H, 1]`: at least 0. boosted
    `[B, 1, R]` (bool). Returns what both add to the factor of their keys, `[B, 2, H, R]`.
    """
    group, whole = masses.unbind(1)
    total = whole + (gain - 1) * group
    boosted = boosted & (total > 0)
    total = total.masked_fill(~boosted, 1.0)
    more = ((gain - 1) / total).masked_fill(~boosted, 0.0)
    return torch.stack((more, 1 / total), 1)


@dataclass
class GateState(PerKey):
    """What the calibration comes to on the model's device.

    surplus: `[B, L, H]`, see `Calibration`.
    least: `[B, L]`, below which attention to a generated token, summed over heads, is boosted.
    """

    surplus: Tensor | None = None
    least: Tensor | None = None


@dataclass(frozen=True, eq=False)
class AdaIAT(Method):
    """Multiplies the weights of all tokens generated so far by 1 + alpha (r - 1), rows
    renormalised, in a layer whose heads together look at them less than a threshold, at every
    generated token; r being how much more a head looks at them at real than at invented objects.

    calibration: a `Calibration`, or the file that one was saved to; there is no default.
    alpha: how much; 0 changes nothing.
    beta: the threshold, from what is usual at invented objects (0) to real ones (1).
    layers: where. None: the published ones (5 to 17 of 32), scaled to the depth.

    A head whose ratio is so small that its factor would be negative gets 0. The attention of a
    layer, summed over heads, is the mean over generated tokens. Each sample has a gate of its own.
    Raises ValueError on values out of range.

        wrap(model, AdaIAT("llava.safetensors"))
    """

    name: ClassVar[str] = "adaiat"
    state: ClassVar[type[State]] = GateState

    calibration: Calibration | str | None = None
    alpha: float = 6.0
    beta: float = 0.5
    layers: Sequence[int] | None = None

    def __post_init__(self) -> None:
        check_number("AdaIAT alpha", self.alpha, 0)
        check_number("AdaIAT beta", self.beta)
        check_wholes("AdaIAT layers", self.layers)
        if not isinstance(self.calibration, Calibration | str):
            raise ValueError(
                f"AdaIAT calibration: found {self.calibration!r}, expected a Calibration or the "
                "file of one; Calibration.measure makes it from captions of this model"
            )

    def resolve(self, info: ModelInfo) -> tuple[Method, list[str]]:
        given = self.calibration
        found = given if isinstance(given, Calibration) else Calibration.load(str(given))
        for table in (found.real, found.hallucinated):
            if table.shape != (info.depth, info.heads):
                raise ValueError(
                    f"AdaIAT calibration: found a table {tuple(table.shape)}, this model has "
                    f"{info.depth} layers of {info.heads} heads"
                )
        info.check_layers("AdaIAT layers", self.layers)
        if self.layers is not None:
            return replace(self, calibration=found), []
        layers, notes = info.published_layers("AdaIAT", 5, 17)
        return replace(self, layers=layers, calibration=found), notes

    def default_layers(self, depth: int) -> Sequence[int]:
        return self.layers or ()

    def before_forward(self, forward: ForwardContext, state: GateState) -> None:
        keys = forward.answer_keys()
        groups = torch.stack((keys, torch.ones_like(keys))).float()
        samples, device = len(forward.image), forward.image.device
        state.values = groups.expand(samples, -1, -1)
        if state.surplus is None:
            surplus = forward.shard.mine(self._calibration.surplus().to(device), 1)
            state.surplus = surplus.expand(samples, -1, -1)
            state.least = self._calibration.thresholds(self.beta).to(device).expand(samples, -1)

    def edited_rows(self, forward: ForwardContext) -> Tensor | None:
        return forward.answer_rows(prompt=False) if self.alpha else None

    def edit_weights(
        self, layer: int, weights: Tensor, forward: ForwardContext, state: GateState
    ) -> Tensor:
        assert state.surplus is not None
        assert state.least is not None
        groups = forward.newest(state.values, weights.shape[-1]).to(weights.device)
        surplus, least = (part[:, layer].to(weights) for part in (state.surplus, state.least))
        gain = (1 + self.alpha * surplus).clamp_min(0)[..., None]
        least = least[:, None, None] * forward.answer_lengths()

        def shares(masses: Tensor, groups: Tensor) -> Tensor:
            mine = masses[:, 0].sum(1, keepdim=True)
            looked = forward.shard.gather(mine, 1).sum(1, keepdim=True)
            return boost_shares(masses, gain, looked < least)

        return reweight(weights, groups, shares)

    @property
    def _calibration(self) -> Calibration:
        assert isinstance(self.calibration, Calibration)
        return self.calibration
