"""Triton kernels for edited rows of attention; `layer.py` launches them.

A key reweighting is linear in the values: out = sum_g c_g sum_k a_k w_gk v_k. Each head of a row
becomes one line of a matrix product for every group, 4 of them; two methods in one layer have the
products of their groups, 16. A line is a softmax of its own, with log |w_gk| added to the scores,
so that no weight overflows; its sum of exponentials is the mass of its group. So when the keys and
values have been read once, the coefficients c follow from the masses, and out from the lines.

Imported only where Triton is installed. With TRITON_INTERPRET=1 they also run on the CPU: the
tests.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOWEST = tl.constexpr(-3.4028234663852886e38)  # of float32; not -inf: a hidden row is no NaN
TINY = tl.constexpr(1.1754943508222875e-38)


@triton.jit
def pick(kind, a, b, c, d):
    """The one of four tensors that `kind` (0 to 3) names."""
    return tl.where(kind == 0, a, tl.where(kind == 1, b, tl.where(kind == 2, c, d)))


@triton.jit
def of_kind(tile, kind, wanted):
    """Per head `[H]`, what a tile `[H, L]` holds in the lines of a kind, added up."""
    return tl.sum(tl.where(kind == wanted, tile, 0.0), 1)


@triton.jit
def coefficients(masses, kind, formula: tl.constexpr, switched: tl.constexpr, on, inside, a, b, c):
    """A method's coefficients `[H, L]` of the lines, by `kind` `[1, L]`, from masses `[H, L]` of
    which those of a kind add up to the mass of its group. on `[H]`: a head that is off keeps its
    weights.
    """
    m0, m1 = of_kind(masses, kind, 0), of_kind(masses, kind, 1)
    m2, m3 = of_kind(masses, kind, 2), of_kind(masses, kind, 3)
    c0, c1, c2, c3 = formula(m0, m1, m2, m3, inside, a, b, c)
    if switched:
        c0, c1 = tl.where(on, c0, 0.0), tl.where(on, c1, 0.0)
        c2, c3 = tl.where(on, c2, 0.0), tl.where(on, c3, 1.0)
    return pick(kind, c0[:, None], c1[:, None], c2[:, None], c3[:, None])


@triton.jit(
    do_not_specialize=["place", "count", "image_sample", "image_place", "step"],
    do_not_specialize_on_alignment=["image", "groups", "indices"],
)
def columns(
    hidden,
    image,
    groups,
    indices,
    place,
    count,
    image_sample,
    image_place,
    step,
    size,
    hidden_sample,
    hidden_row,
    number,
    COLUMN: tl.constexpr,
    WIDTH: tl.constexpr,
    COUNT: tl.constexpr,
):
    """Writes the groups `[B, 4, >= K]` of the new keys, from `place` on; grid (S, B).

    hidden `[B, S, D]`, image `[B, S]`: the streams entering the block, and whether it is an image
    token. step: from a group to the next one.
    """
    row, sample = tl.program_id(0), tl.program_id(1)
    shown = tl.load(image + sample * image_sample + row * image_place).to(tl.float32)
    stream = hidden + sample.to(tl.int64) * hidden_sample + row * hidden_row
    a, b, c, d = COLUMN(stream, shown, size, indices, count, number, WIDTH, COUNT)
    there = groups + sample * 4 * step + place + row
    tl.store(there, a)
    tl.store(there + step, b)
    tl.store(there + 2 * step, c)
    tl.store(there + 3 * step, d)


@triton.jit(
    do_not_specialize=[
        *("keys", "new", "first", "rows", "split", "behind", "step", "more_step", "mask_sample"),
        *("mask_row", "picked_sample", "size", "count", "hidden_sample"),
    ],
    do_not_specialize_on_alignment=[
        *("groups", "more", "mask", "picked", "on", "gain", "hidden", "indices"),
        *("partial", "arrived"),
    ],
)
def attend(
    query,
    key,
    value,
    output,
    groups,
    more,
    mask,
    gain,
    hidden,
    picked,
    on,
    indices,
    partial,
    arrived,
    keys,
    new,
    first,
    rows,
    split,
    behind,
    step,
    more_step,
    mask_sample,
    mask_row,
    picked_sample,
    count,
    size,
    hidden_sample,
    query_sample,
    query_head,
    query_row,
    key_sample,
    key_head,
    key_place,
    value_sample,
    value_head,
    value_place,
    output_sample,
    output_row,
    scaling,
    softcap,
    number,
    n0,
    n1,
    n2,
    LINES: tl.constexpr,
    FORMULA: tl.constexpr,
    COLUMN: tl.constexpr,
    SLOT: tl.constexpr,
    KV: tl.constexpr,
    SHARED: tl.constexpr,
    D: tl.constexpr,
    DW: tl.constexpr,
    V: tl.constexpr,
    VW: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    SPLITS: tl.constexpr,
    MASKED: tl.constexpr,
    CAUSAL: tl.constexpr,
    CAPPED: tl.constexpr,
    PICKED: tl.constexpr,
    SWITCHED: tl.constexpr,
    GAIN: tl.constexpr,
    WIDTH: tl.constexpr,
    COUNT: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Rows `first` to `first + rows` of the `new` ones, edited; grid (tiles * SPLITS, KV, B).

    groups, more `[B, 4, >= K]`: of the first and the second method, the `keys` keys from place
    `behind` on; `step` and `more_step` lead from a group to the next one. FORMULA: of a method
    whose heads do not look at each other, so that the last program of a tile writes `output`; None:
    `finish` follows, and what was found is left in `partial`. COLUMN: the last key's groups of
    method SLOT are found here from `hidden` `[B, 1, size]`, and written. PICKED: rows `[B, S]` that
    are written at all, in the heads that are `on`. split: keys a program, a multiple of N.
    """
    tile, part = tl.program_id(0) // SPLITS, tl.program_id(0) % SPLITS
    group, sample = tl.program_id(1), tl.program_id(2)
    sample_64 = sample.to(tl.int64)
    spot = tl.arange(0, M)
    line = tile * M + spot
    kind, head_of_row = line % LINES, line // LINES
    row, head = head_of_row // SHARED, group * SHARED + head_of_row % SHARED
    real = row < rows
    place = keys - new + first + row
    low = part * split
    high = tl.minimum(low + split, keys)
    if CAUSAL:
        last = tl.minimum(rows - 1, (tile * M + M - 1) // LINES // SHARED)
        high = tl.minimum(high, keys - new + first + last + 1)
    if PICKED:
        flags = picked + sample * picked_sample + first + row
        wanted = tl.max(tl.load(flags, mask=real, other=0).to(tl.int32), 0)
        high = tl.where(wanted > 0, high, low)
    channel, read = tl.arange(0, DW), tl.arange(0, VW)
    here = query + sample_64 * query_sample + head[:, None] * query_head
    here += (first + row)[:, None] * query_row + channel[None, :]
    asked = tl.load(here, mask=real[:, None] & (channel[None, :] < D), other=0.0)
    if WIDE:
        asked = asked.to(tl.float32)
    sample_groups = groups + sample * 4 * step + behind
    if LINES == 16:
        sample_more = more + sample * 4 * more_step + behind
    if COLUMN is not None:
        stream = hidden + sample * hidden_sample
        a, b, c, d = COLUMN(stream, 0.0, size, indices, count, number, WIDTH, COUNT)
        if (tl.program_id(0) == 0) & (group == 0):
            if SLOT == 0:
                there, far = sample_groups + keys - 1, step
            else:
                there, far = sample_more + keys - 1, more_step
            tl.store(there, a)
            tl.store(there + far, b)
            tl.store(there + 2 * far, c)
            tl.store(there + 3 * far, d)
        if SLOT == 0 and LINES == 16:
            column = pick(kind // 4, a, b, c, d)
        else:
            column = pick(kind % 4, a, b, c, d)
    highest = tl.full([M], LOWEST, tl.float32)
    sums = tl.zeros([M], tl.float32)
    found = tl.zeros([M, VW], tl.float32)
    row_key = key + sample_64 * key_sample + group.to(tl.int64) * key_head
    row_value = value + sample_64 * value_sample + group.to(tl.int64) * value_head
    for start in range(low, high, N):
        at = start + tl.arange(0, N)
        inside = at < high
        block = tl.load(
            row_key + at[None, :].to(tl.int64) * key_place + channel[:, None],
            mask=inside[None, :] & (channel[:, None] < D),
            other=0.0,
        )
        if WIDE:
            block = block.to(tl.float32)
        score = tl.dot(asked, block, input_precision=PRECISION) * scaling
        if CAPPED:
            score = softcap * (1 - 2 / (tl.exp(2 * score / softcap) + 1))
        seen = inside[None, :]
        if MASKED:
            visible = tl.load(
                mask + sample_64 * mask_sample + (first + row)[:, None] * mask_row + at[None, :],
                mask=seen & real[:, None],
                other=0,
            )
            score = tl.where(visible != 0, score, LOWEST)
        if CAUSAL:
            seen = seen & (at[None, :] <= place[:, None])
        if LINES == 16:
            weight = tl.load(
                sample_groups + (kind // 4)[:, None] * step + at[None, :],
                mask=inside[None, :],
                other=0.0,
            )
            second = tl.load(
                sample_more + (kind % 4)[:, None] * more_step + at[None, :],
                mask=inside[None, :],
                other=0.0,
            )
            if COLUMN is not None:
                if SLOT == 0:
                    weight = tl.where((at == keys - 1)[None, :], column[:, None], weight)
                else:
                    second = tl.where((at == keys - 1)[None, :], column[:, None], second)
            weight = weight * second
        else:
            weight = tl.load(
                sample_groups + kind[:, None] * step + at[None, :],
                mask=inside[None, :],
                other=0.0,
            )
            if COLUMN is not None:
                weight = tl.where((at == keys - 1)[None, :], column[:, None], weight)
        sign = tl.where(weight > 0, 1.0, tl.where(weight < 0, -1.0, 0.0))
        score = tl.where(seen, score + tl.log(tl.maximum(tl.abs(weight), TINY)), -float("inf"))
        higher = tl.maximum(highest, tl.max(score, 1))
        shrink = tl.exp(highest - higher)
        weight = tl.exp(score - higher[:, None]) * sign
        sums = sums * shrink + tl.sum(weight, 1)
        block = tl.load(
            row_value + at[:, None].to(tl.int64) * value_place + read[None, :],
            mask=inside[:, None] & (read[None, :] < V),
            other=0.0,
        )
        weight = weight.to(block.dtype)
        if WIDE:
            weight, block = weight.to(tl.float32), block.to(tl.float32)
        found = found * shrink[:, None]
        found += tl.dot(weight, block, input_precision=PRECISION)
        highest = higher
    unit = (sample * KV + group) * (tl.num_programs(0) // SPLITS) + tile
    size_of_part = M * (VW + 2)
    if FORMULA is None or SPLITS > 1:
        mine = partial + (unit.to(tl.int64) * SPLITS + part) * size_of_part
        tl.store(mine + spot[:, None] * VW + read[None, :], found, mask=real[:, None])
        tl.store(mine + M * VW + spot, highest)
        tl.store(mine + M * VW + M + spot, sums)
    if FORMULA is not None:
        done = 0
        if SPLITS > 1:
            tl.debug_barrier()
            done = tl.atomic_add(arrived + unit, 1, sem="acq_rel")
        if done == SPLITS - 1:
            if SPLITS > 1:
                highest = tl.full([M], LOWEST, tl.float32)
                sums = tl.zeros([M], tl.float32)
                found = tl.zeros([M, VW], tl.float32)
                for other in range(SPLITS):
                    theirs = partial + (unit.to(tl.int64) * SPLITS + other) * size_of_part
                    peak = tl.load(theirs + M * VW + spot, cache_modifier=".cg")
                    higher = tl.maximum(highest, peak)
                    shrink, fresh = tl.exp(highest - higher), tl.exp(peak - higher)
                    their_sums = tl.load(theirs + M * VW + M + spot, cache_modifier=".cg")
                    product = tl.load(
                        theirs + spot[:, None] * VW + read[None, :],
                        mask=real[:, None],
                        other=0.0,
                        cache_modifier=".cg",
                    )
                    sums = sums * shrink + their_sums * fresh
                    found = found * shrink[:, None] + product * fresh[:, None]
                    highest = higher
                tl.store(arrived + unit, 0)
            short = tile * (M // 4) + tl.arange(0, M // 4)
            of_row, of_head = short // SHARED, group * SHARED + short % SHARED
            write = of_row < rows
            lit = write
            if SWITCHED:
                lit = tl.load(on + of_head, mask=write, other=0) != 0
            kinds = tl.arange(0, 4)[None, :]
            peaks = tl.reshape(highest, (M // 4, 4))
            masses = tl.exp(peaks - of_kind(peaks, kinds, 3)[:, None])
            scale = masses
            masses = masses * tl.reshape(sums, (M // 4, 4))
            total = of_kind(masses, kinds, 3)[:, None]
            total = tl.where(total > 0, total, 1.0)
            share = coefficients(masses / total, kinds, FORMULA, SWITCHED, lit, write, n0, n1, n2)
            share = tl.reshape(share * scale / total, (M,))
            out = tl.sum(tl.reshape(found * share[:, None], (M // 4, 4, VW)), 1)
            if GAIN:
                by = gain + sample * KV * SHARED + of_head
                out = out * tl.load(by, mask=write, other=1.0)[:, None]
            if PICKED:
                at_row = picked + sample * picked_sample + first + of_row
                write = write & lit & (tl.load(at_row, mask=write, other=0) != 0)
            there = output + sample_64 * output_sample + (first + of_row)[:, None] * output_row
            there += of_head[:, None] * V + read[None, :]
            tl.store(
                there,
                out.to(output.dtype.element_ty),
                mask=write[:, None] & (read[None, :] < V),
            )


@triton.jit(
    do_not_specialize=["first", "tiles", "picked_sample"],
    do_not_specialize_on_alignment=["partial", "picked", "on", "on_more", "gain", "given"],
)
def finish(
    output,
    gain,
    given,
    picked,
    on,
    on_more,
    partial,
    first,
    tiles,
    picked_sample,
    output_sample,
    output_row,
    n0,
    n1,
    n2,
    p0,
    p1,
    p2,
    LINES: tl.constexpr,
    FORMULA: tl.constexpr,
    SECOND: tl.constexpr,
    HEADS: tl.constexpr,
    HW: tl.constexpr,
    KV: tl.constexpr,
    SHARED: tl.constexpr,
    V: tl.constexpr,
    VW: tl.constexpr,
    M: tl.constexpr,
    SPLITS: tl.constexpr,
    PICKED: tl.constexpr,
    SWITCHED: tl.constexpr,
    SWITCHED_MORE: tl.constexpr,
    GAIN: tl.constexpr,
):
    """Head outputs from what `attend` found, where the heads of a row are compared, or two methods
    edit it; grid (rows, HEADS, B). Every program works out its row's coefficients in all heads.

    FORMULA, SECOND: of the first and the second method; None: the coefficients are `given`
    `[B, R, H, LINES]`.
    """
    row, own, sample = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    head, line = tl.arange(0, HW), tl.arange(0, LINES)[None, :]
    within = head < HEADS
    inside = within[:, None] & (line >= 0)
    place = (row * SHARED + head % SHARED)[:, None] * LINES + line
    unit = (sample * KV + head // SHARED)[:, None] * tiles + place // M
    size_of_part = M * (VW + 2)
    stats = partial + unit.to(tl.int64) * SPLITS * size_of_part + M * VW + place % M
    peaks = tl.full([HW, LINES], LOWEST, tl.float32)
    sums = tl.zeros([HW, LINES], tl.float32)
    for part in range(SPLITS):
        peak = tl.load(stats + part * size_of_part, mask=inside, other=LOWEST)
        more = tl.load(stats + part * size_of_part + M, mask=inside, other=0.0)
        higher = tl.maximum(peaks, peak)
        sums = sums * tl.exp(peaks - higher) + more * tl.exp(peak - higher)
        peaks = higher
    best = of_kind(peaks, line, LINES - 1)[:, None]
    scale = tl.exp(peaks - best)
    masses = sums * scale
    total = of_kind(masses, line, LINES - 1)[:, None]
    total = tl.where(total > 0, total, 1.0)
    masses = masses / total
    lit, lit_more = within, within
    if SWITCHED:
        lit = tl.load(on + head, mask=within, other=0) != 0
    if SWITCHED_MORE:
        lit_more = tl.load(on_more + head, mask=within, other=0) != 0
    if FORMULA is None:
        here = given + ((sample * tl.num_programs(0) + row) * HEADS + head)[:, None] * LINES + line
        share = tl.load(here, mask=inside, other=0.0)
    elif LINES == 4:
        share = coefficients(masses, line, FORMULA, SWITCHED, lit, within, n0, n1, n2)
    else:
        plain = tl.where(line % 4 == 3, masses, 0.0)  # the second method's group of all keys
        share = coefficients(plain, line // 4, FORMULA, SWITCHED, lit, within, n0, n1, n2)
        masses = masses * share
        second = coefficients(masses, line % 4, SECOND, SWITCHED_MORE, lit_more, within, p0, p1, p2)
        share = share * second
    mine = (head == own)[:, None]
    share = tl.sum(tl.where(mine, share / total, 0.0), 0)
    best = tl.sum(tl.where(mine, tl.where(line == LINES - 1, peaks, 0.0), 0.0))
    own_line = (row * SHARED + own % SHARED) * LINES
    lines = tl.arange(0, LINES)
    own_unit = ((sample * KV + own // SHARED) * tiles + own_line // M).to(tl.int64)
    read = tl.arange(0, VW)
    out = tl.zeros([VW], tl.float32)
    for part in range(SPLITS):
        theirs = partial + (own_unit * SPLITS + part) * size_of_part
        spots = own_line % M + lines
        by = share * tl.exp(tl.load(theirs + M * VW + spots) - best)
        product = tl.load(theirs + spots[:, None] * VW + read[None, :])
        out += tl.sum(product * by[:, None], 0)
    if GAIN:
        out = out * tl.load(gain + sample * HEADS + own)
    width = V
    if PICKED:
        wanted = tl.load(picked + sample * picked_sample + first + row).to(tl.int32)
        if SWITCHED and (LINES == 4 or SWITCHED_MORE):
            some = tl.load(on + own).to(tl.int32)
            if LINES == 16:
                some += tl.load(on_more + own).to(tl.int32)
            wanted = wanted * some
        width = tl.where(wanted > 0, V, 0)
    there = output + sample.to(tl.int64) * output_sample + (first + row) * output_row + own * V
    tl.store(there + read, out.to(output.dtype.element_ty), mask=read < width)
