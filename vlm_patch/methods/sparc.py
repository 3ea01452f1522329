"""SPARC: selective progressive attention recalibration. Jung et al., ICML 2025,
https://arxiv.org/abs/2502.01419.

Image tokens whose attention rises while the answer is written count for more from then on.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from vlm_patch.errors import PatchError
from vlm_patch.method import ForwardContext, Method, ModelInfo, Phase, State
from vlm_patch.primitives.reweighting import KeyReweighting
from vlm_patch.validation import check_number, check_whole, check_wholes


def risen(attention: Tensor, mean: Tensor, tau: float) -> Tensor:
    """Where attention a exceeds its running mean m by tau m or more, and is there at all; bool."""
    return (attention >= (1 + tau) * mean) & (attention > 0)


def running_mean(attention: Tensor, mean: Tensor, beta: float) -> Tensor:
    """(1 - beta) a + beta m: with a small beta, almost the attention of the step before."""
    return torch.lerp(attention, mean, beta)


@dataclass
class RiseState(State):
    """What SPARC remembers of an answer.

    mean: `[B, K]`, the running mean of the attention to each key, over all heads of its layer.
    picked: `[B, K]` (bool), keys that the token before picked.
    count: `[B, K]`, how often each was, in the forwards before.
    factors: `[B, 2, K]`, alpha^count - 1 and 1, of this forward.
    """

    per_key: ClassVar[tuple[str, ...]] = ("mean", "picked", "count")
    per_forward: ClassVar[tuple[str, ...]] = ("factors",)

    mean: Tensor | None = None
    picked: Tensor | None = None
    count: Tensor | None = None
    factors: Tensor | None = None


@dataclass(frozen=True)
class SPARC(KeyReweighting):
    """Multiplies the values of image tokens by `alpha` each time attention to them rises, for the
    rest of the answer (Jung et al.).

    alpha: the factor of one rise; 1 changes nothing.
    tau: a rise: attention above (1 + tau) times its running mean; 1.5 for LLaVA-1.5, 4 for
        LLaVA-NeXT.
    beta: share of the old mean in the new one, 0 to 1.
    layer: where attention is looked at, as the mean over heads. None: 20 of 32, scaled.
    layers: where values are scaled. None: all.

    What is scaled are the weights, which is the same and leaves the cache as it is, so that beams,
    and questions that share an image, each have an answer of their own. Rises are counted from the
    prompt's last row on, anew for each turn, sample by sample; a token sees what the tokens before
    it picked. So they have to come one by one: drafts, and generating without a cache, are refused.
    Raises ValueError on values out of range.

        wrap(model, SPARC(alpha=1.1, tau=1.5))
    """

    name: ClassVar[str] = "sparc"
    state: ClassVar[type[State]] = RiseState

    alpha: float = 1.1
    tau: float = 1.5
    beta: float = 0.1
    layer: int | None = None
    layers: Sequence[int] | None = None

    def __post_init__(self) -> None:
        check_number("SPARC alpha", self.alpha, 0, above=True)
        check_number("SPARC tau", self.tau, 0)
        check_number("SPARC beta", self.beta, 0, 1)
        check_wholes("SPARC layers", self.layers)
        if self.layer is not None:
            check_whole("SPARC layer", self.layer)

    def resolve(self, info: ModelInfo) -> tuple[Method, list[str]]:
        info.check_layers("SPARC layers", self.layers)
        layers = info.layers_from(0) if self.layers is None else self.layers
        if self.layer is not None:
            info.check_layers("SPARC layer", [self.layer])
            return replace(self, layers=layers), []
        (layer, *_), notes = info.published_layers("SPARC", 20, 20)
        notes = [note.replace("layers=[", "layer=").rstrip("]") for note in notes]
        return replace(self, layers=layers, layer=layer), notes

    def default_layers(self, depth: int) -> Sequence[int]:
        return self.layers or ()

    def before_forward(self, forward: ForwardContext, state: RiseState) -> None:
        at, rows = forward.position, forward.valid.shape[1]
        if self.alpha == 1:
            return
        if at.phase is Phase.DRAFT or (at.prompt_rows and rows > at.prompt_rows):
            raise PatchError(
                f"sparc needs generated tokens one by one, each sees what those before it picked; "
                f"found {rows - at.prompt_rows} in one forward: leave out use_cache=False, "
                "prompt_lookup_num_tokens and assistant_model, or generate inside "
                '`with patch.disabled("sparc"):`'
            )
        if at.starts:
            state.clear()
        if at.prompt_rows:
            return
        if state.count is None or state.picked is None:
            raise PatchError(
                "sparc is on, but was off when the prompt was read, so it does not know what "
                "attention rises from. Switch it on before the prompt."
            )
        keys = forward.image.shape[1]
        known = (state.count, state.picked)
        before, picked = (pad(part, (0, keys - part.shape[1])) for part in known)
        state.count = before + picked
        factor = torch.pow(self.alpha, state.count)
        state.factors = torch.stack((factor - 1, torch.ones_like(factor)), 1)

    def edited_rows(self, forward: ForwardContext) -> Tensor | None:
        return forward.answer_rows(prompt=False) if self.alpha != 1 else None

    def watched_rows(self, forward: ForwardContext) -> tuple[Sequence[int], Tensor] | None:
        """The prompt's last row, and every generated token's."""
        return ([self.layer or 0], forward.answer_rows()) if self.alpha != 1 else None

    def observe(
        self, layer: int, weights: Tensor, rows: Tensor, forward: ForwardContext, state: RiseState
    ) -> None:
        mine = weights[:, :, -1].detach().mean(1, keepdim=True)
        attention = forward.shard.gather(mine, 1).mean(1)
        attention = forward.among_all(attention)  # out of a sliding window keys have no weight
        if forward.position.prompt_rows or state.mean is None:
            state.mean = attention
            state.count, state.picked = torch.zeros_like(attention), attention < 0
            return
        mean = pad(state.mean, (0, attention.shape[1] - state.mean.shape[1]))
        state.picked = risen(attention, mean, self.tau) & forward.image
        state.mean = running_mean(attention, mean, self.beta)

    def groups(self, layer: int, forward: ForwardContext, state: RiseState) -> Tensor:
        assert state.factors is not None
        return state.factors

    def shares(self, masses: Tensor, groups: Tensor) -> Tensor:
        return torch.ones_like(masses)
