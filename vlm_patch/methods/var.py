"""VAR: visual attention redistribution. Kang et al., ICLR 2025, https://arxiv.org/abs/2503.03321.

Attention that sinks into tokens without meaning is given to the image tokens that have one.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor

from vlm_patch.errors import PatchError
from vlm_patch.heads import text
from vlm_patch.method import (
    ExtraForward,
    ForwardContext,
    Method,
    ModelInfo,
    Phase,
    State,
)
from vlm_patch.primitives.buffers import append, cast, has_room
from vlm_patch.primitives.reweighting import Formula, KeyReweighting, NewKeyGroups, reweight
from vlm_patch.primitives.sink_rules import SinkChannels, scaled_tau
from vlm_patch.primitives.sinks import discover, one_stream
from vlm_patch.primitives.triton import jit, tl
from vlm_patch.validation import check_flag, check_number, check_whole, check_wholes


def _constant(
    values: tuple[float, ...], device: torch.device, dtype: torch.dtype, behind: int = 0
) -> Tensor:
    """A tensor of these values with `behind` dimensions of size 1 behind them, made once; for
    torch.compile of numbers, which it fuses with what comes of them.
    """
    if torch.compiler.is_dynamo_compiling():
        numbers = [torch.full((1,) * behind, v, device=device, dtype=dtype) for v in values]
        return torch.stack(numbers)
    return _made(values, device, dtype, behind)


@lru_cache(maxsize=256)
def _made(
    values: tuple[float, ...], device: torch.device, dtype: torch.dtype, behind: int
) -> Tensor:
    with torch.inference_mode(False):  # autograd may meet it later
        return torch.tensor(values, device=device, dtype=dtype).view(-1, *[1] * behind)


def peak_and_norm(hidden: Tensor, dims: Sequence[int], eps: float) -> tuple[Tensor, Tensor]:
    """max over dims of |x[d]|, and |x|, each `[...]`, for hidden `[..., D]`. eps: see
    `sink_score`.
    """
    norm = torch.linalg.vector_norm(hidden, dim=-1)
    if eps:
        norm = (norm.square() + eps * hidden.shape[-1]).sqrt()
    if torch.compiler.is_dynamo_compiling():
        channels = torch.stack([hidden[..., channel] for channel in dims], -1)
    else:
        channels = hidden.index_select(-1, _constant(tuple(dims), hidden.device, torch.long))
    return torch.linalg.vector_norm(channels, math.inf, dim=-1), norm


def sink_score(hidden: Tensor, dims: Sequence[int], eps: float = 0.0) -> Tensor:
    """How far the sink channels stick out of a residual stream (paper, equation 5).

    hidden `[..., D]`: the stream entering a block, before its norm. dims: the sink channels. eps:
    added to the mean square, as the release does. Returns `[...]`: max over dims of |x[d]| /
    RMS(x), at most sqrt(D); a zero vector scores 0.
    """
    peak, norm = peak_and_norm(hidden, dims, eps)
    return peak / norm.clamp_min(torch.finfo(norm.dtype).tiny) * math.sqrt(hidden.shape[-1])


def key_groups(image: Tensor, sinks: Tensor) -> Tensor:
    """The image keys V, the sinks S, the image keys that are none, N, and all keys, as 0 and 1
    `[B, 4, K]`.

    image, sinks `[B, K]` (bool); text tokens can be sinks too.
    """
    return torch.stack((image, sinks, image & ~sinks, torch.ones_like(image)), 1)


def sink_shares(
    masses: Tensor,
    groups: Tensor,
    move_fraction: float = 0.6,
    rho_nonsink: float = 0.5,
    min_image_mass: float = 0.2,
    require_visual_sink: bool = False,
    release: bool = False,
) -> Tensor:
    """How the sinks and the other image keys of a row are reweighed (paper, equations 6 to 8).

    masses `[B, 4, H, R]`: attention to V, S, N and all. groups `[B, 4, K]`: see `key_groups`. A
    head's row is edited if its image mass sum_V a is at least min_image_mass and sum_N a / sum_V a
    is at least rho_nonsink; then a' = (1 - move_fraction) a on S, a' = g a on N with g = 1 +
    move_fraction * sum_S a / sum_N a. Row sums are kept; a row with nothing on N stays as it is.
    release: the ratio as the release computes it, with 1e-6 added to every image weight below the
    line. Returns 0, -move_fraction, g - 1 and 1 where it is edited, else 0, 0, 0 and 1,
    `[B, 4, H, R]`.
    """
    tiny, kind = torch.finfo(masses.dtype).tiny, (masses.device, masses.dtype)
    image, sinks, rest, _ = masses.unbind(1)
    chosen = image >= _constant((min_image_mass,), *kind)
    if release:
        floor = 1e-6 * groups[:, 0].sum(-1)[:, None, None]
        chosen &= image - rest <= (1 - rho_nonsink) * (image + floor)
        chosen &= rest >= tiny
    else:
        least = torch.addcmul(_constant((tiny,), *kind), _constant((rho_nonsink,), *kind), image)
        chosen &= rest >= least
    if require_visual_sink:
        chosen &= (groups[:, 0] > groups[:, 2]).any(-1)[:, None, None]
    taken = _constant((0, -move_fraction, 0, 1), *kind, 2)
    given = _constant((0, 0, move_fraction, 0), *kind, 2)
    edited = torch.addcmul(taken, given, (sinks / rest.clamp_min(tiny)).unsqueeze(1))
    return torch.where(chosen.unsqueeze(1), edited, _constant((0, 0, 0, 1), *kind, 2))


@jit
def sink_shares_of_a_row(
    image: tl.tensor,
    sinks: tl.tensor,
    rest: tl.tensor,
    every: tl.tensor,
    inside: tl.tensor,
    move: tl.tensor,
    rho: tl.tensor,
    least: tl.tensor,
) -> Any:
    """`sink_shares` in the paper's semantics; masses `[H]`."""
    enough = tl.maximum(rho * image, 1.1754943508222875e-38)
    moved = tl.where((image >= least) & (rest >= enough), move, 0.0)
    gain = moved * (sinks / tl.maximum(rest, 1.1754943508222875e-38))
    return tl.zeros_like(moved), -moved, gain, tl.zeros_like(moved) + 1.0


@jit
def sink_groups(
    hidden: tl.tensor,
    image: tl.tensor,
    size: tl.tensor,
    dims: tl.tensor,
    count: tl.tensor,
    tau: tl.tensor,
    WIDTH: tl.constexpr,
    COUNT: tl.constexpr,
) -> Any:
    """`key_groups` of a key that is a sink where `sink_score` reaches tau."""
    place, which = tl.arange(0, WIDTH), tl.arange(0, COUNT)
    stream = tl.load(hidden + place, mask=place < size, other=0.0).to(tl.float32)
    rms = tl.sqrt(tl.sum(stream * stream, 0) / size)
    channel = tl.load(dims + which, mask=which < count, other=0)
    peak = tl.load(hidden + channel, mask=which < count, other=0.0).to(tl.float32)
    score = tl.max(tl.abs(peak), 0) / tl.maximum(rms, 1.1754943508222875e-38)
    sink = tl.where(score >= tau, 1.0, 0.0)
    return image, sink, image * (1.0 - sink), 1.0


def redistribute(weights: Tensor, groups: Tensor, *options: Any, **named: Any) -> Tensor:
    """Moves sink attention to image tokens that are no sinks, in image-centric heads.

    weights `[B, H, R, K]`: attention after the softmax. groups and options: see `sink_shares`.
    """
    return reweight(weights, groups, lambda m, g: sink_shares(m, g, *options, **named))


@dataclass
class SinkState(State):
    """groups: by layer, `[B, 4, at least K]`, see `key_groups`."""

    per_key: ClassVar[tuple[str, ...]] = ("groups",)

    groups: dict[int, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class VAR(KeyReweighting):
    """Moves attention from sinks to image tokens that are none, for every text token after the
    image (Kang et al., equations 5 to 8).

    move_fraction: share of the sink attention that is moved, 0 to 1.
    rho_nonsink: least share of a head's image attention that lies outside sinks, 0 to 1; the
        papers' tables use 0.5 for hallucination, 0.8 for general tasks.
    min_image_mass: least attention of a head to the image, 0 to 1.
    tau: a token is a sink where its score reaches tau. None: measured where channels are searched,
        or else 20 scaled by sqrt(width / 4096).
    dims: the sink channels. None: the published ones, or those found on the first prompt.
    first_layer: index of the first layer. None: 0 ("paper") or 2 ("release").
    exclude_last_layer: leave the last layer alone.
    require_visual_sink: act only in layers where an image token is a sink.
    semantics: "paper", or "release" (sinks found once, on the prompt, from layer 2; strict
        threshold; needs a visual sink). move_fraction and rho_nonsink mean the same in both.

    Raises ValueError on values out of range.

        wrap(model, VAR(move_fraction=0.4, dims=[1415, 2533], tau=20.0))
    """

    name: ClassVar[str] = "var"
    state: ClassVar[type[State]] = SinkState
    reads_blocks: ClassVar[bool] = True

    move_fraction: float = 0.6
    rho_nonsink: float = 0.5
    min_image_mass: float = 0.2
    tau: float | None = None
    dims: Sequence[int] | None = None
    first_layer: int | None = None
    exclude_last_layer: bool = True
    require_visual_sink: bool = False
    semantics: str = "paper"
    found: SinkChannels | None = field(default=None, init=False, compare=False)

    def __post_init__(self) -> None:
        check_number("VAR move_fraction", self.move_fraction, 0, 1)
        check_number("VAR rho_nonsink", self.rho_nonsink, 0, 1)
        check_number("VAR min_image_mass", self.min_image_mass, 0)
        check_flag("VAR exclude_last_layer", self.exclude_last_layer)
        check_flag("VAR require_visual_sink", self.require_visual_sink)
        if self.tau is not None:
            check_number("VAR tau", self.tau, 0, above=True)
        if self.first_layer is not None:
            check_whole("VAR first_layer", self.first_layer)
        check_wholes("VAR dims", self.dims)
        if self.semantics not in ("paper", "release"):
            raise ValueError(
                f'VAR semantics: found {self.semantics!r}, expected "paper" or "release"'
            )

    @property
    def release(self) -> bool:
        return self.semantics == "release"

    def resolve(self, info: ModelInfo) -> tuple[Method, list[str]]:
        dims = info.profile.get("dims") if self.dims is None else self.dims
        check_wholes("VAR dims", dims, info.width)
        tau = self.tau
        if tau is None and dims is not None:
            tau = scaled_tau(info.width)
        first = (2 if self.release else 0) if self.first_layer is None else self.first_layer
        if self.release:
            first = max(first, 2)
        check_whole("VAR first_layer", first, info.depth)
        dims = None if dims is None else tuple(dims)
        if dims == ():
            warnings.warn("VAR(dims=()) does nothing: it names no sink channel", stacklevel=5)
        return replace(self, dims=dims, tau=tau, first_layer=first), []

    def default_layers(self, depth: int) -> Sequence[int]:
        return range(self.first_layer or 0, depth - self.exclude_last_layer)

    def probe(
        self, forward: ForwardContext, state: SinkState, layers: list[int], run: ExtraForward
    ) -> Method:
        """Finds the sink channels, and the threshold, on the first prompt where no channels are
        known for this model.
        """
        if self.dims is not None:
            return self
        if forward.position.past or not forward.position.ends:
            raise PatchError(
                "VAR does not know the sink channels of this model, and looks for them in a prompt "
                "that is read at once from its beginning. Run such a prompt first (no "
                "prefill_chunk_size, an empty cache), or pass VAR(dims=...)."
            )
        found = discover(forward, run)
        if not found.dims:
            warnings.warn(
                f"VAR does nothing on this model: no attention sink was found. {found.reason} "
                "If you know its sink channels, pass VAR(dims=...).",
                stacklevel=2,
            )
        tau = found.tau if self.tau is None and found.dims else self.tau
        settled = replace(self, dims=found.dims, tau=tau)
        object.__setattr__(settled, "found", found)
        return settled

    def report(self) -> str:
        if self.dims is None:
            return "looks for its sinks at the first prompt"
        if self.found is None:
            return ""
        if not self.found.dims:
            return f"found no sinks at the first prompt: {self.found.reason}"
        where = text(list(self.found.layers))
        return f"found its sinks at the first prompt, measured in layers {where}"

    def observe_hidden(
        self, layer: int, hidden: Tensor, forward: ForwardContext, state: SinkState
    ) -> None:
        """Finds the sinks among the new tokens; the release looks at the first prompt only."""
        if not self.dims:
            return
        hidden = one_stream(hidden)
        groups = self._groups(hidden, forward)
        state.groups[layer] = append(state.groups.get(layer), groups, forward.position.past)

    def new_key_groups(self) -> NewKeyGroups | None:
        if not self.dims or self.release:
            return None
        return NewKeyGroups(
            sink_groups, tuple(self.dims), math.inf if self.tau is None else self.tau
        )

    def make_room(self, layer: int, forward: ForwardContext, state: SinkState) -> None:
        buffer, total = state.groups.get(layer), forward.image.shape[1]
        if buffer is None or not has_room(buffer, total):
            new = forward.image.new_zeros(len(forward.image), 4, total - forward.position.past)
            state.groups[layer] = append(buffer, new.float(), forward.position.past)

    def _groups(self, hidden: Tensor, forward: ForwardContext) -> Tensor:
        """The key groups `[B, 4, S]` of new tokens."""
        hidden = cast(hidden, torch.promote_types(hidden.dtype, torch.float32))
        kind = hidden.device, hidden.dtype
        if self.release and not (forward.position.first_prompt and forward.position.prompt_rows):
            sinks = torch.zeros(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
        else:
            peak, norm = peak_and_norm(hidden, self.dims or (), 1e-6 if self.release else 0.0)
            tau = math.inf if self.tau is None else self.tau
            share = _constant((tau / math.sqrt(hidden.shape[-1]),), *kind)
            least = torch.addcmul(_constant((torch.finfo(norm.dtype).tiny,), *kind), share, norm)
            sinks = peak > least if self.release else peak >= least
            if self.release:
                sinks[:, forward.position.prompt_rows :] = False
        if forward.position.phase is not Phase.DECODE:
            return key_groups(forward.image[:, forward.new], sinks).to(hidden.dtype)
        sink, other = _constant((0, 1, 0, 1), *kind, 1), _constant((0, 0, 0, 1), *kind, 1)
        return torch.where(sinks.unsqueeze(1), sink, other)

    def edited_rows(self, forward: ForwardContext) -> Tensor | None:
        return forward.text if self.dims else None

    def groups(self, layer: int, forward: ForwardContext, state: SinkState) -> Tensor:
        if self.release and layer < 2:
            raise PatchError(
                f'VAR(semantics="release") never acts below layer 2, but layer {layer} is on'
            )
        return state.groups[layer]

    def shares(self, masses: Tensor, groups: Tensor) -> Tensor:
        numbers = self.move_fraction, self.rho_nonsink, self.min_image_mass
        return sink_shares(masses, groups, *numbers, self._visual, self.release)

    def formula(self, heads: int) -> Formula | None:
        if self._visual:
            return None
        numbers = self.move_fraction, self.rho_nonsink, self.min_image_mass
        return Formula(sink_shares_of_a_row, numbers)

    @property
    def _visual(self) -> bool:
        return self.require_visual_sink or self.release
