"""PAINT: paying attention to informed tokens. Arif et al., CVPR 2025 workshop,
https://arxiv.org/abs/2501.12206.

The patches that the vision tower itself looks at get more of the answer's attention.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from vlm_patch.method import (
    ForwardContext,
    Method,
    ModelInfo,
    State,
    TowerRead,
)
from vlm_patch.primitives.buffers import append, cast
from vlm_patch.primitives.contrast import Guided
from vlm_patch.primitives.key_bias import raised
from vlm_patch.validation import check_number, check_share, check_wholes

LOCAL, SUMMARY = TowerRead(0), TowerRead(-2)
SPATIAL = TowerRead(0, "patches")
TUKEY = 1.5


def top(scores: Tensor, fraction: float) -> Tensor:
    """The floor(fraction * N) largest of scores `[..., N]`; ties to the lowest index. Returns bool
    `[..., N]`.
    """
    # a product of decimals may fall just below the integer that is meant
    count = math.floor(fraction * scores.shape[-1] + 1e-9)
    order = scores.argsort(dim=-1, descending=True, stable=True)[..., :count]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, order, True)


def outliers(scores: Tensor) -> Tensor:
    """Those of scores `[..., N]` that lie above Q3 + 1.5 (Q3 - Q1), with linear quartiles. Returns
    bool `[..., N]`.
    """
    ordered = scores.sort(-1).values

    def quartile(part: float) -> Tensor:
        place = part * (scores.shape[-1] - 1)
        low, high = (ordered[..., at(place)] for at in (math.floor, math.ceil))
        return torch.lerp(low, high, place - math.floor(place))[..., None]

    first, third = quartile(0.25), quartile(0.75)
    return scores > third + TUKEY * (third - first)


def token_sets(
    local: Tensor, summary: Tensor, rho: float, spatial: Tensor | None = None, rho_sp: float = 0.0
) -> tuple[Tensor, Tensor]:
    """The sets L and S of the patches of one image (paper, section 3), bool `[N]`.

    local, summary `[N]`: attention from the class token in the first and in the last layer but one
    of the tower. S: the outliers of `summary`. L: the share `rho` with the largest `local`, without
    S. spatial `[N]`: see PAINT; the share `rho_sp` of its largest joins L.
    """
    chosen = top(local, rho)
    if spatial is not None:
        chosen = chosen | top(spatial, rho_sp)
    strong = outliers(summary)
    return chosen & ~strong, strong


@dataclass
class BoostState(State):
    """What PAINT remembers of a generation.

    boost: `[B, at least K]`, what the score of each key is raised by.
    share: `[B, layers, H]`, how much of that each head takes; None for all.
    """

    per_key: ClassVar[tuple[str, ...]] = ("boost",)

    boost: Any = None
    share: Tensor | None = None


@dataclass(frozen=True)
class PAINT(Guided):
    """Raises the attention scores of the patches that matter to the vision tower, in the last row
    (Arif et al.).

    alpha, beta: how much, for local and for summary patches (`token_sets`), 0 to 1; 0 changes
        nothing.
    rho: share of local patches, 0 to 1.
    layers: where. None: all but the first two.
    semantics: "paper" (the last row of a prompt and every generated token) or "release" (generated
        tokens only, which is what the release does whenever its contrast is on, as in all of its
        runs).
    rho_sp: ours, off at 0: share of patches that most other patches attend to in the first layer
        ("spatial"; the release's own score is a constant), which join the local ones.
    sensitivity: ours, off at None: a table `[layers, heads]` of how much each head attends to
        images, by which alpha and beta are scaled, 1 at its maximum.
    gamma: at least 1, the contrast with a second stream without the image: gamma log p -
        (gamma - 1) log p'. 1, no contrast and no second stream; the paper's runs have 1.1.
    cutoff: with the contrast, a token stays if its probability is at least this share of the
        likeliest's, 0 to 1.

    Where the paper is silent, by our proposal: towers without a class token are read by the mean
    over their patches, tokens made of several patches by the mean of these; tiles are compared over
    their whole image; every image, and every frame of a video, has sets of its own.

    The defaults are the settings at which captions do not loop, without the contrast;
    `PAINT.paper()` and `PAINT.release()` are the published ones, at which a third of them do.
    Raises ValueError on values out of range.

        wrap(model, PAINT(rho=0.2))
    """

    name: ClassVar[str] = "paint"
    state: ClassVar[type[State]] = BoostState
    edits_prompt_end: ClassVar[bool] = True

    alpha: float = 0.7
    beta: float = 0.4
    rho: float = 0.15
    layers: Sequence[int] | None = None
    semantics: str = "paper"
    rho_sp: float = 0.0
    sensitivity: Sequence[Sequence[float]] | None = None
    gamma: float = 1.0
    cutoff: float = 0.1

    @classmethod
    def paper(cls) -> PAINT:
        """The paper's best row."""
        return cls(alpha=0.7, beta=0.4, rho=0.25, gamma=1.1)

    @classmethod
    def release(cls) -> PAINT:
        """The release as its scripts run it."""
        return cls(alpha=0.7, beta=0.3, rho=0.25, semantics="release", gamma=1.1)

    def __post_init__(self) -> None:
        check_share("PAINT alpha", self.alpha, "published values are 0.3 to 0.7")
        check_share("PAINT beta", self.beta, "published values are 0.3 to 0.7")
        check_number("PAINT rho", self.rho, 0, 1)
        check_number("PAINT rho_sp", self.rho_sp, 0, 1)
        check_number("PAINT gamma", self.gamma, 1)
        check_number("PAINT cutoff", self.cutoff, 0, 1)
        check_wholes("PAINT layers", self.layers)
        if self.semantics not in ("paper", "release"):
            raise ValueError(
                f'PAINT semantics: found {self.semantics!r}, expected "paper" or "release"'
            )
        if self.sensitivity is not None:
            self._check_table(self.sensitivity)

    def _check_table(self, table: Sequence[Sequence[float]]) -> None:
        rows = table if isinstance(table, list | tuple) else [None]
        for row in rows:
            if not isinstance(row, list | tuple) or len(row) != len(rows[0] or ()):
                raise ValueError(
                    f"PAINT sensitivity: found {table!r}, expected a list of a number per head "
                    "for every layer"
                )
            for value in row:
                check_number("PAINT sensitivity", value, 0)
        if not any(map(any, table)):
            raise ValueError("PAINT sensitivity: found no number above 0, expected at least one")

    def resolve(self, info: ModelInfo) -> tuple[Method, list[str]]:
        info.check_layers("PAINT layers", self.layers)
        table = self.sensitivity
        if table is not None and (len(table), len(table[0])) != (info.depth, info.heads):
            raise ValueError(
                f"PAINT sensitivity: found {len(table)} layers of {len(table[0])} heads, this "
                f"model has {info.depth} of {info.heads}"
            )
        layers = self.layers
        if layers is None:
            layers = info.layers_from(2)
        table = None if table is None else tuple(map(tuple, table))
        return replace(self, layers=layers, sensitivity=table), []

    def default_layers(self, depth: int) -> Sequence[int]:
        return self.layers or ()

    def tower_reads(self) -> tuple[TowerRead, ...]:
        return (LOCAL, SUMMARY, SPATIAL) if self.rho_sp else (LOCAL, SUMMARY)

    def before_forward(self, forward: ForwardContext, state: BoostState) -> None:
        """Chooses the patches of a prompt; generated tokens are none."""
        at = forward.position
        behind = forward.valid.shape[1] - at.prompt_rows
        if at.resumed and not forward.image[:, forward.new].any():
            behind += at.prompt_rows  # text that goes on with a prompt read before
        elif at.starts:
            strengths = self._strengths(forward)
            if state.boost is not None:  # what stood behind may have been cut from the cache
                state.boost = state.boost[:, : at.past]
                strengths = strengths.to(state.boost.dtype)
            state.boost = append(state.boost, strengths, at.past)
        if self.sensitivity is not None and state.share is None:
            dtype = torch.promote_types(state.boost.dtype, torch.float32)
            table = forward.seen.new_tensor(self.sensitivity, dtype=dtype)
            table = forward.shard.mine(table / table.max(), 1)
            state.share = table.expand(len(forward.seen), -1, -1)
        if behind:
            nothing = state.boost.new_zeros(len(forward.valid), behind)
            past = at.past + forward.valid.shape[1] - behind
            state.boost = append(state.boost, nothing, past)

    def _strengths(self, forward: ForwardContext) -> Tensor:
        """What the scores of each token of a prompt are raised by, `[B, N]`."""
        patches = forward.patches
        if patches is None:
            return forward.valid[:, : forward.position.prompt_rows].float().zero_()
        strengths = torch.zeros_like(patches.image, dtype=patches.scores[LOCAL].dtype)
        for sample, image in enumerate(patches.image):
            for number in image[image >= 0].unique():
                where = image == number
                read = {of: scores[sample, where] for of, scores in patches.scores.items()}
                local, summary = token_sets(
                    read[LOCAL], read[SUMMARY], self.rho, read.get(SPATIAL), self.rho_sp
                )
                local, summary = local.to(strengths.dtype), summary.to(strengths.dtype)
                strengths[sample, where] = self.alpha * local + self.beta * summary
        return strengths

    def edited_rows(self, forward: ForwardContext) -> Tensor | None:
        if not (self.alpha or self.beta):
            return None
        return forward.answer_rows(prompt=self.semantics == "paper")

    def edit_scores(
        self, layer: int, scores: Tensor, forward: ForwardContext, state: BoostState
    ) -> Tensor:
        strength = forward.newest(state.boost, scores.shape[-1]).to(scores.device)
        strength = cast(strength, scores.dtype)[:, None, None]
        if state.share is not None:
            share = state.share[:, layer].to(scores.device, scores.dtype)
            strength = strength * share[:, :, None, None]
        return raised(scores, strength)
