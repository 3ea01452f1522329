"""What a sink is, and what tells it from other tokens: rules on recorded tensors.

A sink is known by what it does: it takes attention, and its values are small
(https://arxiv.org/abs/2309.17453). Massive activations in few channels, by which a method can tell
it without looking at attention (https://arxiv.org/abs/2402.17762), are then read off it. The rules
and their numbers are this library's own proposal.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

TAKEN = 0.1
SMALL_VALUES = 0.5
FEWEST_LAYERS = 2
HALF_OF_STRONGEST = 0.5
MOST_CHANNELS = 4
RARE = 0.03
TIMES_THE_ATTENTION = 5


@dataclass(frozen=True)
class SinkChannels:
    """The sink channels, the score from which on a token is a sink, and the layers in which that
    was measured; or no channels and the reason.
    """

    dims: tuple[int, ...]
    tau: float = math.inf
    layers: tuple[int, ...] = ()
    reason: str = ""


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


def judge(
    blocks: Tensor, attention: Tensor, value_path: Tensor, valid: Tensor, image: Tensor
) -> SinkChannels:
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
        return SinkChannels((), reason=_none_takes(attention, sizes))
    window = slice(run[0], run[-1] + 1)
    x, attention, sizes, sinks = (part[:, window] for part in (blocks, attention, sizes, sinks))
    mean = attention.sum(-1, keepdim=True) / valid.sum(-1)[:, None, None]
    ordinary = valid[:, None] & (attention < mean)

    def channels(*part: slice) -> tuple[int, ...]:
        return sink_channels(x[part], sinks[part], ordinary[part]) if sinks[part].any() else ()

    dims = channels(slice(None))
    if not dims:
        return SinkChannels((), reason=_no_channel(x, attention, sinks))
    every = [slice(None)] * (len(blocks) == 1)
    if any(channels(*every, slice(half, None, 2)) != dims for half in range(2)):
        reason = f"Channels {list(dims)} did not come out of both halves of the data."
        return SinkChannels((), reason=reason)
    score = torch.stack([x[..., channel].abs() for channel in dims]).amax(0) / rms(x)
    tau = threshold(score, sinks, ordinary, scaled_tau(x.shape[-1]))
    flagged, image = (score >= tau) & image[:, None], image[:, None].expand_as(score)
    reason = _no_sinks(dims, attention, sizes, flagged, image & ~flagged) if flagged.any() else ""
    return SinkChannels((), reason=reason) if reason else SinkChannels(dims, tau, run)


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
            f"Tokens take up to {most:.1%} of the attention, but not as sinks do: the values of "
            f"those that take {TAKEN:.0%} have at least {smallest:.2f} times the median size, "
            f"those of a sink {SMALL_VALUES:g} times at most."
        )
    return (
        f"Tokens of small values that take {TAKEN:.0%} of the attention or more are in no "
        f"{FEWEST_LAYERS} layers one after the other of most samples, as those of a sink are."
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
