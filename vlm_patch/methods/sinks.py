"""Finds the channels in which attention sinks stick out, and the threshold that parts them from
other tokens, on models of which nobody has published them.

A sink is known by what it does: it takes attention, and its values are small
(https://arxiv.org/abs/2309.17453). Massive activations in few channels, by which a method can tell
it without looking at attention (https://arxiv.org/abs/2402.17762), are then read off it. The rules
and their numbers are this library's own proposal.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby

import torch
from torch import Tensor, nn

from vlm_patch.errors import UnsupportedModelError
from vlm_patch.method import Forward, StockPass, Watcher

TAKEN = 0.1
SMALL_VALUES = 0.5
FEWEST_LAYERS = 2
HALF_OF_STRONGEST = 0.5
MOST_CHANNELS = 4
RARE = 0.03
TIMES_THE_ATTENTION = 5
WATCHED_ROWS = 32


@dataclass(frozen=True)
class Found:
    """The sink channels, the score from which on a token is a sink, and the layers in which that
    was measured; or no channels and the reason.
    """

    dims: tuple[int, ...]
    tau: float = math.inf
    layers: tuple[int, ...] = ()
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
    4096). It serves where none was measured.
    """
    return 20.0 * math.sqrt(width / 4096)


def value_sizes(attention: Tensor, value_path: Tensor) -> Tensor:
    """How large the values are that a key gives for its attention, as a multiple of the median key.

    attention, value_path `[..., S]`: mean attention to each key, and the mean norm of what it
    carries. NaN for a key without attention.
    """
    size = value_path / attention
    return size / size.nanmedian(-1, keepdim=True).values


def longest_run(layers: Sequence[bool]) -> tuple[int, ...]:
    """The longest run of neighbouring layers that are marked, the first of several; () for none."""
    runs = groupby(range(len(layers)), key=layers.__getitem__)
    return max((tuple(run) for marked, run in runs if marked), key=len, default=())


def rms(x: Tensor) -> Tensor:
    """RMS `[...]` of vectors x `[..., D]`; |x_d| is at most sqrt(D) times as large."""
    norm: Tensor = torch.linalg.vector_norm(x, dim=-1)
    return norm.clamp_min(1e-12) / math.sqrt(x.shape[-1])


def sink_channels(x: Tensor, sinks: Tensor, ordinary: Tensor) -> tuple[int, ...]:
    """Channels that stick out at the sinks and hardly anywhere else.

    x `[..., T, D]`: block inputs. sinks, ordinary `[..., T]` (bool). With a_d the median of |x_d| /
    RMS(x) over sinks: a_d >= tau_D (see `scaled_tau`), a_d >= max(a) / 2, at most 3 % of the
    ordinary tokens reach a_d; the strongest four at most.
    """
    at_sinks = _at_sinks(x, sinks)
    strong = at_sinks >= max(scaled_tau(x.shape[-1]), HALF_OF_STRONGEST * float(at_sinks.max()))
    dims = strong.nonzero().flatten()
    elsewhere = (x[..., dims].abs() / rms(x)[..., None])[ordinary]
    dims = dims[(elsewhere >= at_sinks[dims]).float().mean(0) <= RARE]
    strongest = at_sinks[dims].argsort(descending=True)[:MOST_CHANNELS]
    return tuple(sorted(dims[strongest].cpu().tolist()))


def _at_sinks(x: Tensor, sinks: Tensor) -> Tensor:
    """The median of |x| / RMS(x) over the sinks, `[D]`."""
    picked = x[sinks]
    return (picked.abs() / rms(picked)[:, None]).median(0).values


def threshold(score: Tensor, sinks: Tensor, ordinary: Tensor, usual: float) -> float:
    """The score that parts sinks from other tokens: it lies in the widest gap between them.

    score `[..., T]`, sinks, ordinary `[..., T]` (bool). The gap is looked for above 97 % of the
    ordinary tokens and below the median sink. `usual`, if it lies in the middle half of the gap; or
    else three quarters of the way up, since scores of sinks vary less from prompt to prompt than
    those of other tokens, and in two digits, so that prompts agree.
    """
    others = score[ordinary].sort().values
    low, high = others[math.ceil(len(others) * (1 - RARE)) - 1], score[sinks].median()
    between = torch.stack((low, high))
    between = torch.cat((between, score[(score > low) & (score < high)])).sort().values
    widest = between.diff().argmax()
    start, end = float(between[widest]), float(between[widest + 1])
    quarter = (end - start) / 4
    if start + quarter <= usual <= end - quarter:
        return usual
    two_digits = float(f"{end - quarter:.2g}")
    return two_digits if start < two_digits < end else end - quarter


@dataclass
class _Record:
    """What the discovery pass saw: block inputs `[B, S, D]`, and per layer attention and value-path
    norms `[B, S]`.
    """

    forward: Forward
    layers: list[int] = field(default_factory=list)
    blocks: list[Tensor] = field(default_factory=list)
    attention: list[Tensor] = field(default_factory=list)
    value_path: list[Tensor] = field(default_factory=list)

    def stacked(self, part: list[Tensor]) -> Tensor:
        """A part over all layers, of the prompts with an image, where the decoder's input lies."""
        seen, end = self.forward.seen, self.forward.prompt
        return torch.stack([of_layer.to(seen.device)[seen, :end] for of_layer in part], 1)

    def block(self, layer: int, hidden: Tensor) -> None:
        self.layers.append(layer)
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
    """One pass of the stock model over the first prompt, and what `judge` makes of it."""
    seen, end = forward.seen, forward.prompt
    rows = forward.text[seen, :end].all(0).nonzero().flatten()[-WATCHED_ROWS:]
    if not len(rows):
        reason = "The first prompt has no text after its image, so nothing could be checked."
        return Found((), reason=reason)
    record = _Record(forward)
    run(
        forward.inputs,
        Watcher(block=record.block, weights=record.weights, rows=rows),
    )
    parts = (record.stacked(part) for part in (record.blocks, record.attention, record.value_path))
    found = judge(*parts, forward.valid[seen, :end], forward.image[seen, :end])
    return replace(found, layers=tuple(record.layers[place] for place in found.layers))


def judge(
    blocks: Tensor, attention: Tensor, value_path: Tensor, valid: Tensor, image: Tensor
) -> Found:
    """The search on recorded tensors.

    blocks `[B, L, S, D]`: block inputs. attention, value_path `[B, L, S]`: mean attention of
    post-image text to each key, and the norm of what it carries. valid, image `[B, S]` (bool).

    A token that takes a tenth of the attention, with values of half the median's size at most, is a
    sink. Channels and threshold are measured in the longest run of layers that have one in most
    samples. They are accepted if both halves of the data (samples, or layers where there is one
    sample) give the same channels, and image tokens above the threshold, if any, take 5 times as
    much attention as the others, with smaller values.
    """
    sizes = value_sizes(attention, value_path).masked_fill(~valid[:, None], math.nan)
    sinks = (attention >= TAKEN) & (sizes <= SMALL_VALUES)
    run = longest_run((sinks.any(-1).float().mean(0) > 0.5).cpu().tolist())
    if len(run) < FEWEST_LAYERS:
        return Found((), reason=_none_takes(attention, sizes))
    window = slice(run[0], run[-1] + 1)
    x, attention, sizes, sinks = (part[:, window] for part in (blocks, attention, sizes, sinks))
    mean = attention.sum(-1, keepdim=True) / valid.sum(-1)[:, None, None]
    ordinary = valid[:, None] & (attention < mean)

    def channels(*part: slice) -> tuple[int, ...]:
        return sink_channels(x[part], sinks[part], ordinary[part]) if sinks[part].any() else ()

    dims = channels(slice(None))
    if not dims:
        return Found((), reason=_no_channel(x, attention, sinks))
    every = [slice(None)] * (len(blocks) == 1)
    if any(channels(*every, slice(half, None, 2)) != dims for half in range(2)):
        reason = f"Channels {list(dims)} did not come out of both halves of the data."
        return Found((), reason=reason)
    score = torch.stack([x[..., channel].abs() for channel in dims]).amax(0) / rms(x)
    tau = threshold(score, sinks, ordinary, scaled_tau(x.shape[-1]))
    flagged, image = (score >= tau) & image[:, None], image[:, None].expand_as(score)
    reason = _no_sinks(dims, attention, sizes, flagged, image & ~flagged) if flagged.any() else ""
    return Found((), reason=reason) if reason else Found(dims, tau, run)


def _none_takes(attention: Tensor, sizes: Tensor) -> str:
    """Why no token is a sink; attention and value sizes `[B, L, S]`."""
    most = float(attention.max())
    if most < TAKEN:
        return (
            f"No token takes more than {most:.1%} of the attention of the text behind the image; "
            f"a sink takes {TAKEN:.0%}."
        )
    smallest = float(sizes[(attention >= TAKEN) & sizes.isfinite()].min())
    if smallest > SMALL_VALUES:
        return (
            f"One token takes {most:.1%} of the attention, but for its values, not as a sink: "
            f"values of those that take {TAKEN:.0%} have at least {smallest:.2f} times the median "
            f"size, those of a sink {SMALL_VALUES:g} times at most."
        )
    return (
        f"Tokens of small values that take {TAKEN:.0%} of the attention or more are in no "
        f"{FEWEST_LAYERS} layers one after the other, as those of a sink are."
    )


def _no_channel(x: Tensor, attention: Tensor, sinks: Tensor) -> str:
    """Why no channel tells the sinks; x `[B, L, S, D]`, attention, sinks `[B, L, S]`."""
    peak = float(_at_sinks(x, sinks).max())
    return (
        f"The tokens that take {float(attention[sinks].mean()):.0%} of the attention have no "
        f"channel of their own: their strongest one reaches {peak:.1f} times their RMS; "
        f"{scaled_tau(x.shape[-1]):.1f} is needed, and that at most {RARE:.0%} of the other tokens "
        "reach as high."
    )


def _no_sinks(
    dims: tuple[int, ...], attention: Tensor, sizes: Tensor, flagged: Tensor, others: Tensor
) -> str:
    """Why the image tokens that channels flag are no sinks, or ""; tensors `[B, L, S]`."""
    ratio = float(attention[flagged].mean() / attention[others].mean())
    if not ratio >= TIMES_THE_ATTENTION:
        return (
            f"Channels {list(dims)} flag image tokens that draw {ratio:.1f} times the attention of "
            f"others, expected {TIMES_THE_ATTENTION}."
        )
    if not sizes[flagged].nanmean() < sizes[others].nanmean():
        return f"Channels {list(dims)} flag image tokens whose values are no smaller than others'."
    return ""
