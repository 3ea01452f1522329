"""Loops over the one row of a generated token, compiled by Numba; `vlm_patch.cpu` asks for them.

On a CPU a dozen small operations of torch take longer than what they compute. The functions of
torch that are named below define the results. Imported where Numba is installed only.
"""

from __future__ import annotations

import numpy as np
from numba import njit

SUMS = {"reassoc", "contract", "nsz"}
"""What sums need to run in the lanes of a vector."""
TINY = np.finfo(np.float32).tiny


@njit(fastmath=SUMS)
def masses(weights, groups):
    """The attention `[B, 3, H]` of weights `[B, H, 1, K]` to the first three of the key groups
    `[B, 4, K]`; to the fourth, all keys, it is 1.
    """
    found = np.empty((len(weights), 3, weights.shape[1]), np.float32)
    keys = np.empty(groups.shape[1:], np.float32)
    for sample in range(len(weights)):
        keys[:] = groups[sample]
        for head in range(weights.shape[1]):
            first, second, third = np.float32(0), np.float32(0), np.float32(0)
            for key in range(keys.shape[1]):
                weight = weights[sample, head, 0, key]
                first += weight * keys[0, key]
                second += weight * keys[1, key]
                third += weight * keys[2, key]
            found[sample, 0, head] = first
            found[sample, 1, head] = second
            found[sample, 2, head] = third
    return found


@njit(fastmath=SUMS)
def scale(weights, groups, shares, edited):
    """Writes the weights `[B, H, 1, K]` times what the shares `[B, 3, H]` of a key's groups add up
    to: of the second and the third group and of all keys.
    """
    keys = np.empty(groups.shape[1:], np.float32)
    for sample in range(len(weights)):
        keys[:] = groups[sample]
        for head in range(weights.shape[1]):
            second, third, every = shares[sample, :, head]
            for key in range(keys.shape[1]):
                factor = second * keys[1, key] + third * keys[2, key] + every
                edited[sample, head, 0, key] = weights[sample, head, 0, key] * factor


ROW = "void(f4[:, :, :, ::1], f4[:, :, :], {}, f4[:, :, :, ::1])"


@njit(ROW.format("f4, f4, f4"), fastmath=SUMS, cache=True)
def sink_row(weights, groups, move_fraction, rho_nonsink, min_image_mass, edited):
    """VAR's edit of the weights `[B, H, 1, K]` by key groups `[B, 4, K]`; see `var.sink_shares`."""
    found = masses(weights, groups)
    shares = np.ones_like(found)
    for sample in range(len(weights)):
        for head in range(weights.shape[1]):
            image, sinks, rest = found[sample, :, head]
            chosen = image >= min_image_mass and rest >= rho_nonsink * image + TINY
            moved = move_fraction if chosen else np.float32(0)
            shares[sample, 0, head] = -moved
            shares[sample, 1, head] = moved * sinks / max(rest, TINY)
    scale(weights, groups, shares, edited)


@njit
def among_top(mass, head, count):
    """Whether a head is among the `count` with the largest mass `[H]`, ties to the lowest index."""
    before = 0
    for other in range(len(mass)):
        if mass[other] > mass[head] or (mass[other] == mass[head] and other < head):
            before += 1
    return before < count


@njit(ROW.format("f4, i8"), fastmath=SUMS, cache=True)
def gaze_row(weights, groups, beta, count, edited):
    """GIFT's edit of the weights `[B, H, 1, K]` by key groups `[B, 4, K]`, with `count` heads in
    each choice; see `gift.gaze_shares`.
    """
    found = masses(weights, groups)
    shares = np.ones_like(found)
    for sample in range(len(weights)):
        image, gained, query = found[sample]
        mine = shares[sample]
        mass, more = np.float32(0), np.float32(0)
        for head in range(len(image)):
            looking = among_top(image, head, count)
            mine[0, head] = 1 if looking else 0
            mass += image[head] if looking else 0
            more += gained[head] if looking else 0
        pace = beta * (more / max(mass, TINY)) + (beta - 1)
        for head in range(len(image)):
            mine[1, head] = pace if among_top(query, head, count) else 0
            total = 1 + mine[0, head] * gained[head] + mine[1, head] * query[head]
            if total > 0:
                mine[:, head] /= total
            else:
                mine[:2, head] = 0
    scale(weights, groups, shares, edited)


@njit("void(f4[:, :, ::1], i8[::1], f4, f4[:, :, ::1], i8)", fastmath=SUMS, cache=True)
def sink_column(hidden, dims, tau, groups, place):
    """Writes VAR's groups `[B, 4, K]` of one new token each at `place`; it is a sink if
    `var.sink_score` of its stream `[B, 1, D]` reaches tau.
    """
    for sample in range(len(hidden)):
        square, peak = np.float32(0), np.float32(0)
        for channel in range(hidden.shape[2]):
            square += hidden[sample, 0, channel] * hidden[sample, 0, channel]
        for channel in dims:
            peak = max(peak, abs(hidden[sample, 0, channel]))
        rms = np.sqrt(square / np.float32(hidden.shape[2]))
        groups[sample, 0, place], groups[sample, 2, place], groups[sample, 3, place] = 0, 0, 1
        groups[sample, 1, place] = peak >= tau * rms + TINY
