"""Finds the channels in which attention sinks stick out, on models whose channels nobody has
published.

The anchor and the window of layers follow https://arxiv.org/abs/2512.22213; the contrast rule and
the checks are this library's own proposal. Sinks are tokens with massive activations in few
channels: https://arxiv.org/abs/2402.17762.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from vlm_patch.errors import UnsupportedModelError
from vlm_patch.method import Forward, StockPass, Watcher

CONTRAST = 3.0
HALF_OF_STRONGEST = 0.5
MOST_CHANNELS = 4
ANCHOR_COSINE = 0.9
WATCHED_ROWS = 32


@dataclass(frozen=True)
class Found:
    """The sink channels, or none and the reason."""

    dims: tuple[int, ...]
    reason: str = ""


def one_stream(hidden: Tensor) -> Tensor:
    """The residual stream `[B, S, D]`. Raises UnsupportedModelError where there are several."""
    if hidden.ndim != 3:
        raise UnsupportedModelError(
            f"var looks for sinks in the residual stream [batch, tokens, width], but the layers of "
            f"this model pass on several at once, of shape {list(hidden.shape)}: leave var out"
        )
    return hidden


def scaled_tau(width: int) -> float:
    """The paper's threshold 20, scaled by the bound sqrt(D) of the sink score: 20 * sqrt(D /
    4096).
    """
    return 20.0 * math.sqrt(width / 4096)


def primary_window(norms: Tensor) -> tuple[int, int]:
    """Layers between the anchor's largest rise and its largest fall behind it, end exclusive.

    norms `[L]`: the anchor's norm at every block input.
    """
    step = norms.diff()
    start = int(step.argmax()) + 1
    rest = step[start:]
    end = start + int(rest.argmin()) + 1 if len(rest) and rest.min() < 0 else len(norms)
    return start, end


def sink_channels(relative: Tensor, anchors: Tensor, background: Tensor) -> tuple[int, ...]:
    """Channels that stick out at the anchor and not elsewhere.

    relative `[N, T, D]`: |x| / RMS(x) of T tokens in N (sample, layer) pairs. anchors `[N]`: the
    anchor token of each. background `[N, T]` (bool): ordinary tokens. With a_d the median over
    pairs at the anchor and b_d over ordinary tokens: a_d >= tau_D, a_d >= 3 max(b_d, 1), a_d >=
    max(a) / 2, the strongest four at most. The contrast keeps out channels that are large in every
    token.
    """
    at_anchor = (
        relative[torch.arange(len(anchors), device=anchors.device), anchors].median(0).values
    )
    ordinary = relative[background].median(0).values
    passed = (
        (at_anchor >= scaled_tau(relative.shape[-1]))
        & (at_anchor / ordinary.clamp_min(1) >= CONTRAST)
        & (at_anchor >= HALF_OF_STRONGEST * at_anchor.max())
    )
    order = at_anchor.masked_fill(~passed, -1).argsort(descending=True)[:MOST_CHANNELS]
    return tuple(sorted(int(d) for d in order if passed[d]))


@dataclass
class _Record:
    """What the discovery pass saw: block inputs `[B, S, D]`, and per layer attention and value-path
    norms `[B, S]`.
    """

    forward: Forward
    blocks: list[Tensor] = field(default_factory=list)
    attention: list[Tensor] = field(default_factory=list)
    value_path: list[Tensor] = field(default_factory=list)

    def stacked(self, part: list[Tensor], end: int) -> Tensor:
        """A part over all layers, of the first `end` tokens, where the decoder's input lies."""
        device = self.forward.image.device
        return torch.stack([of_layer.to(device) for of_layer in part], 1)[:, :, :end]

    def block(self, layer: int, hidden: Tensor) -> None:
        self.blocks.append(one_stream(hidden).float())

    def weights(self, layer: int, weights: Tensor, value: Tensor, attention: nn.Module) -> None:
        weights = weights.mean(2)
        self.attention.append(self.forward.shard.gather(weights, 1).mean(1))
        groups = weights.shape[1] // value.shape[1]
        norms = _projected_norms(value.repeat_interleave(groups, 1), attention)
        self.value_path.append(self.forward.shard.gather(weights * norms, 1).mean(1))


def _projected_norms(value: Tensor, attention: nn.Module) -> Tensor:
    """|v W_O| per head and key `[B, H, K]` for values `[B, H, K, Dv]`; |v| where no plain output
    matrix is found.
    """
    value = value.float()
    for name in ("o_proj", "out_proj", "dense"):
        matrix = getattr(getattr(attention, name, None), "weight", None)
        local = getattr(matrix, "to_local", None)  # under tensor parallelism
        matrix = matrix if local is None else local()
        heads, size = value.shape[1], value.shape[-1]
        if not isinstance(matrix, Tensor) or matrix.is_meta or not matrix.is_floating_point():
            continue  # offloaded to the CPU or a disk, or whole numbers whose scale lies elsewhere
        if matrix.ndim == 2 and matrix.shape[1] == heads * size:
            per_head = matrix.dequantize().float().view(-1, heads, size).permute(1, 2, 0)
            gram = per_head @ per_head.transpose(1, 2)
            square: Tensor = ((value @ gram) * value).sum(-1)
            return square.clamp_min(0).sqrt()
    norms: Tensor = torch.linalg.vector_norm(value, dim=-1)
    return norms


def discover(forward: Forward, run: StockPass) -> Found:
    """One pass of the stock model over the first prompt, the rule above, and three checks on what
    it flags.

    Accepted only if 0.2 to 3 % of the image tokens are flagged per layer, post-image text attends
    to them 5 times as much as to other image tokens, their value path is weaker than that of the
    others, and both halves of the data (samples, or layers where there is one sample) give the same
    channels.
    """
    rows = forward.text[:, : forward.prompt].all(0).nonzero().flatten()[-WATCHED_ROWS:]
    if not len(rows):
        return Found(
            (), "The first prompt has no text after its image, so nothing could be checked."
        )
    record = _Record(forward)
    run(
        forward.inputs,
        Watcher(block=record.block, weights=record.weights, rows=rows),
    )
    end = forward.prompt
    blocks, attention, value_path = (
        record.stacked(part, end) for part in (record.blocks, record.attention, record.value_path)
    )
    return judge(blocks, attention, value_path, forward.valid[:, :end], forward.image[:, :end])


def judge(
    blocks: Tensor, attention: Tensor, value_path: Tensor, valid: Tensor, image: Tensor
) -> Found:
    """The rule and its checks on recorded tensors.

    blocks `[B, L, S, D]`: block inputs. attention, value_path `[B, L, S]`: mean attention of
    post-image text to each key, and the norm of what it carries. valid, image `[B, S]` (bool).
    """
    if blocks.shape[1] < 3:
        return Found((), f"It has softmax attention in {blocks.shape[1]} layers, 3 are needed.")
    samples = torch.arange(len(blocks), device=blocks.device)
    first = valid.long().argmax(1)
    candidates = first[:, None] + torch.arange(3, device=first.device)
    norms = blocks.norm(dim=-1)
    layer_mean = norms.mean(1).gather(1, candidates.clamp_max(norms.shape[-1] - 1))
    anchor = first + layer_mean.argmax(1)
    start, end = primary_window(norms[samples, :, anchor].median(0).values)

    window = blocks[:, start:end]
    at_anchor = window[samples, :, anchor][:, :, None]
    ordinary = (cosine_similarity(window, at_anchor, dim=-1).abs() < ANCHOR_COSINE) & valid[:, None]
    relative = window.abs() / window.square().mean(-1, keepdim=True).sqrt().clamp_min(1e-12)
    anchors = anchor[:, None].expand(-1, window.shape[1])
    if not ordinary.any():
        return Found((), "Every token looks like the first one.")

    def channels(part: tuple[slice, slice]) -> tuple[int, ...]:
        mask = ordinary[part].flatten(0, 1)
        if not mask.any():
            return ()
        return sink_channels(relative[part].flatten(0, 1), anchors[part].flatten(), mask)

    everything = slice(None)
    dims = channels((everything, everything))
    if not dims:
        peak = relative[samples, :, anchor].median(1).values.median(0).values.max()
        return Found(
            (),
            f"The first token's strongest channel reaches {float(peak):.1f} times its RMS; "
            f"{scaled_tau(blocks.shape[-1]):.1f} and a contrast of {CONTRAST:g} to ordinary "
            "tokens are needed.",
        )
    halves = [
        (slice(half, None, 2), everything)
        if len(blocks) > 1
        else (everything, slice(half, None, 2))
        for half in range(2)
    ]
    if any(channels(half) != dims for half in halves if relative[half].numel()):
        return Found((), f"Channels {list(dims)} did not come out of both halves of the data.")

    flagged = relative[..., list(dims)].amax(-1) >= scaled_tau(blocks.shape[-1])
    return _accept(dims, flagged, attention[:, start:end], value_path[:, start:end], image)


def _accept(
    dims: tuple[int, ...], flagged: Tensor, attention: Tensor, value_path: Tensor, image: Tensor
) -> Found:
    """Checks what the channels flag among image tokens; flagged, attention, value_path `[B, window,
    S]`.
    """
    sinks = flagged & image[:, None]
    others = ~flagged & image[:, None]
    share = float(sinks.sum() / image.sum() / flagged.shape[1])
    name = f"Channels {list(dims)}"
    if not 0.002 <= share <= 0.03:
        return Found((), f"{name} flag {share:.1%} of the image tokens, expected 0.2 to 3 %.")
    ratio = float(attention[sinks].mean() / attention[others].mean())
    if not ratio >= 5:
        return Found(
            (),
            f"{name} flag image tokens that draw {ratio:.1f} times the attention of others, "
            "expected 5.",
        )
    if not value_path[sinks].mean() < value_path[others].mean():
        return Found((), f"{name} flag image tokens that carry more than others do.")
    return Found(dims)
