"""Triton kernels for the one row of a generated token; `vlm_patch.engine.fused` launches them.

Imported where a GPU is at work only. With TRITON_INTERPRET=1 they also run on the CPU: the tests.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def members(groups, group, group_step, places, place_step, inside):
    """What part the keys at `places` have in every group, `[G, BLOCK]`; 0 outside."""
    here = groups + group[:, None] * group_step + places[None, :] * place_step
    return tl.load(here, mask=inside[None, :], other=0.0).to(tl.float32)


@triton.jit
def row_masses(
    query,
    key,
    mask,
    groups,
    scores,
    stats,
    masses,
    keys,
    heads,
    shared,
    scaling,
    softcap,
    query_sample,
    query_head,
    key_sample,
    key_head,
    key_place,
    mask_sample,
    mask_place,
    group_sample,
    group_group,
    group_place,
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK: tl.constexpr,
    MASKED: tl.constexpr,
    CAPPED: tl.constexpr,
):
    """Scores `[B, H, K]` of a row, their highest and the sum of exponentials `[B, H, 2]`, and the
    softmax masses `[B, G, H]` of the key groups `[B, G, K]`; one program for each sample and head.

    shared: query heads that share a key head. WIDTH: SIZE rounded up to a power of two.
    """
    row = tl.program_id(0)
    sample, head = row // heads, row % heads
    channels, group = tl.arange(0, WIDTH), tl.arange(0, GROUPS)
    within = channels < SIZE
    here = query + sample * query_sample + head * query_head + channels
    row_query = tl.load(here, mask=within, other=0.0).to(tl.float32)
    row_groups = groups + sample * group_sample
    row_key = key + sample * key_sample + (head // shared) * key_head
    lowest = -3.4028234663852886e38  # of float32; not -inf, so that a hidden row is no NaN
    highest, total = tl.full((), lowest, tl.float32), tl.full((), 0.0, tl.float32)
    sums = tl.zeros([GROUPS], tl.float32)
    for start in range(0, keys, BLOCK):
        places = start + tl.arange(0, BLOCK)
        inside = places < keys
        block = tl.load(
            row_key + places[:, None] * key_place + channels[None, :],
            mask=inside[:, None] & within[None, :],
            other=0.0,
        ).to(tl.float32)
        score = tl.sum(block * row_query[None, :], 1) * scaling
        if CAPPED:
            score = softcap * (1 - 2 / (tl.exp(2 * score / softcap) + 1))
        if MASKED:
            shown = tl.load(mask + sample * mask_sample + places * mask_place, mask=inside, other=0)
            score = tl.where(shown != 0, score, lowest)
        tl.store(scores + row * keys + places, score, mask=inside)
        score = tl.where(inside, score, -float("inf"))
        higher = tl.maximum(highest, tl.max(score, 0))
        shrink, part = tl.exp(highest - higher), tl.exp(score - higher)
        member = members(row_groups, group, group_group, places, group_place, inside)
        total = total * shrink + tl.sum(part, 0)
        sums = sums * shrink + tl.sum(member * part[None, :], 1)
        highest = higher
    tl.store(masses + (sample * GROUPS + group) * heads + head, sums / total)
    tl.store(stats + row * 2, highest)
    tl.store(stats + row * 2 + 1, total)


@triton.jit
def row_output(
    scores,
    stats,
    value,
    groups,
    shares,
    output,
    keys,
    heads,
    shared,
    value_sample,
    value_head,
    value_place,
    group_sample,
    group_group,
    group_place,
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The head outputs `[B, H, Dv]` of a row whose weights are multiplied by what the shares
    `[B, G, H]` of its key groups add up to.
    """
    row = tl.program_id(0)
    sample, head = row // heads, row % heads
    channels, group = tl.arange(0, WIDTH), tl.arange(0, GROUPS)
    within = channels < SIZE
    share = tl.load(shares + (sample * GROUPS + group) * heads + head)
    highest, total = tl.load(stats + row * 2), tl.load(stats + row * 2 + 1)
    row_groups = groups + sample * group_sample
    row_value = value + sample * value_sample + (head // shared) * value_head
    found = tl.zeros([WIDTH], tl.float32)
    for start in range(0, keys, BLOCK):
        places = start + tl.arange(0, BLOCK)
        inside = places < keys
        score = tl.load(scores + row * keys + places, mask=inside, other=-float("inf"))
        member = members(row_groups, group, group_group, places, group_place, inside)
        weight = tl.exp(score - highest) / total * tl.sum(member * share[:, None], 0)
        block = tl.load(
            row_value + places[:, None] * value_place + channels[None, :],
            mask=inside[:, None] & within[None, :],
            other=0.0,
        ).to(tl.float32)
        found += tl.sum(block * weight[:, None], 0)
    tl.store(output + row * SIZE + channels, found.to(output.dtype.element_ty), mask=within)


@triton.jit
def sink_column(
    hidden,
    dims,
    column,
    size,
    count,
    tau,
    hidden_sample,
    BLOCK: tl.constexpr,
    COUNT: tl.constexpr,
):
    """VAR's groups `[B, 4]` of one new token each, which is a sink if `sink_score` reaches tau."""
    sample = tl.program_id(0)
    square = tl.zeros([BLOCK], tl.float32)
    for start in range(0, size, BLOCK):
        places = start + tl.arange(0, BLOCK)
        here = hidden + sample * hidden_sample + places
        part = tl.load(here, mask=places < size, other=0.0).to(tl.float32)
        square += part * part
    rms = tl.sqrt(tl.sum(square, 0) / size)
    which = tl.arange(0, COUNT)
    channel = tl.load(dims + which, mask=which < count, other=0)
    peak = tl.load(hidden + sample * hidden_sample + channel, mask=which < count, other=0.0)
    score = tl.max(tl.abs(peak.to(tl.float32)), 0) / tl.maximum(rms, 1.1754943508222875e-38)
    tl.store(column + sample * 4, 0.0)
    tl.store(column + sample * 4 + 1, tl.where(score >= tau, 1.0, 0.0))
    tl.store(column + sample * 4 + 2, 0.0)
    tl.store(column + sample * 4 + 3, 1.0)


@triton.jit
def sink_shares(
    masses, shares, heads, move_fraction, rho_nonsink, min_image_mass, HEADS: tl.constexpr
):
    """VAR's shares `[B, 4, H]` from masses `[B, 4, H]`, in the paper's semantics."""
    head = tl.arange(0, HEADS)
    within = head < heads
    here = tl.program_id(0) * 4 * heads + head
    image = tl.load(masses + here, mask=within, other=0.0)
    sinks = tl.load(masses + here + heads, mask=within, other=0.0)
    rest = tl.load(masses + here + 2 * heads, mask=within, other=0.0)
    least = tl.maximum(rho_nonsink * image, 1.1754943508222875e-38)
    moved = tl.where((image >= min_image_mass) & (rest >= least), move_fraction, 0.0)
    gain = moved * (sinks / tl.maximum(rest, 1.1754943508222875e-38))
    tl.store(shares + here, tl.zeros([HEADS], tl.float32), mask=within)
    tl.store(shares + here + heads, -moved, mask=within)
    tl.store(shares + here + 2 * heads, gain, mask=within)
    tl.store(shares + here + 3 * heads, tl.full([HEADS], 1.0, tl.float32), mask=within)


@triton.jit
def top(mass, head, count):
    """1 for the `count` heads with the largest mass, ties to the lowest index, else 0."""
    larger = mass[None, :] > mass[:, None]
    earlier = (mass[None, :] == mass[:, None]) & (head[None, :] < head[:, None])
    rank = tl.sum((larger | earlier).to(tl.int32), 1)
    return tl.where(rank < count, 1.0, 0.0)


@triton.jit
def gaze_shares(masses, shares, heads, beta, count, HEADS: tl.constexpr):
    """GIFT's shares `[B, 4, H]` from masses `[B, 4, H]`."""
    head = tl.arange(0, HEADS)
    within = head < heads
    here = tl.program_id(0) * 4 * heads + head
    image = tl.load(masses + here, mask=within, other=-1.0)
    more = tl.load(masses + here + heads, mask=within, other=0.0)
    query = tl.load(masses + here + 2 * heads, mask=within, other=-1.0)
    looking, reading = top(image, head, count), top(query, head, count)
    mass, gained = tl.sum(looking * image, 0), tl.sum(looking * more, 0)
    ratio = 1 + gained / tl.maximum(mass, 1.1754943508222875e-38)
    pace = reading * (beta * ratio - 1)
    every = tl.load(masses + here + 3 * heads, mask=within, other=1.0)
    total = tl.where(tl.abs(every - 1) < 1e-4, 1.0, every) + looking * more + pace * query
    left = total > 0
    divisor = tl.where(left, total, 1.0)
    kept = tl.where(left, 1.0, 0.0)
    tl.store(shares + here, tl.zeros([HEADS], tl.float32), mask=within)
    tl.store(shares + here + heads, kept * looking / divisor, mask=within)
    tl.store(shares + here + 2 * heads, kept * pace / divisor, mask=within)
    tl.store(shares + here + 3 * heads, 1 / divisor, mask=within)
