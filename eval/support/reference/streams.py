"""Methods that edit logits: each row that predicts an answer's token, against the same row of
another whole pass, or against its own residual stream in early layers.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from eval.support.reference import decoder
from eval.support.reference.pai import Pai
from eval.support.reference.paint import Paint
from eval.support.reference.sample import Sample

Near = Callable[[str, Tensor], None]


@dataclass(frozen=True)
class Vcd:
    """Leng et al., arXiv 2311.16922."""

    alpha: float = 1.0
    beta: float = 0.1
    noise_step: int = 500
    seed: int = 0

    name = "vcd"


@dataclass(frozen=True)
class Icd:
    """Wang et al., arXiv 2403.18715; prefix: token ids."""

    alpha: float
    beta: float
    prefix: tuple[int, ...]

    name = "icd"


@dataclass(frozen=True)
class M3id:
    """Favero et al., arXiv 2403.14003."""

    decay: float = 0.02
    gate: float = 1.0

    name = "m3id"


@dataclass(frozen=True)
class Dola:
    """Chuang et al., arXiv 2309.03883; layers by what enters them."""

    layers: tuple[int, ...]
    beta: float = 0.1

    name = "dola"


@dataclass(frozen=True)
class Deco:
    """Wang et al., arXiv 2410.11779; layers by what enters them."""

    layers: tuple[int, ...]
    alpha: float = 0.6
    top_p: float = 0.9
    top_k: int = 20

    name = "deco"


@torch.no_grad()
def edited(model: Any, sample: Sample, method: Any, run: decoder.Run, near: Near) -> Tensor:
    """The logits [S, V] of a run with the rows of every answer edited; near: told the distances
    from every threshold."""
    logits = run.logits.clone()
    if isinstance(method, Dola | Deco):
        early = [_readout(model, run.block_inputs[layer]) for layer in method.layers]
    elif isinstance(method, Vcd | Icd | M3id) or getattr(method, "gamma", 1.0) > 1:
        early = [_stream(model, sample, method)]
    else:
        return logits
    starts = [turn.start for turn in sample.turns[1:]] + [sample.length]
    for turn, stop in zip(sample.turns, starts, strict=True):
        for row in range(turn.end - 1, stop):
            others = [one[row] for one in early]
            logits[row] = _row(method, logits[row], others, row - turn.end + 2, near)
    return logits


def _row(method: Any, own: Tensor, others: Sequence[Tensor], place: int, near: Near) -> Tensor:
    """One row [V]; place: which token of the answer it predicts, from 1."""
    if isinstance(method, Vcd | Icd):
        mixed = own + method.alpha * (own - others[0])
        return plausible(mixed, own, method.beta, near)
    if isinstance(method, Paint | Pai):
        p, q = own.log_softmax(0), others[0].log_softmax(0)
        return plausible(method.gamma * p + (1 - method.gamma) * q, p, method.cutoff, near)
    if isinstance(method, M3id):
        most = own.softmax(0).max()
        near("m3id gate", most - method.gate)
        left = math.exp(-method.decay * place)
        return own + (1 - left) / left * (own - others[0]) if most < method.gate else own
    return (
        dola(method, own, others, near)
        if isinstance(method, Dola)
        else deco(method, own, others, near)
    )


def plausible(mixed: Tensor, own: Tensor, beta: float, near: Near) -> Tensor:
    """-inf where a token has less than `beta` times the probability of the likeliest."""
    p = own.softmax(0)
    if beta:
        near("cut", (p / p.max()).log() - math.log(beta))
    return torch.where(p >= beta * p.max(), mixed, -torch.inf)


def dola(method: Dola, own: Tensor, others: Sequence[Tensor], near: Near) -> Tensor:
    """log p_N - log p_M."""
    p = own.softmax(0)
    apart = []
    for other in others:
        q = other.softmax(0)
        m = (p + q) / 2
        apart.append((torch.xlogy(p, p / m) + torch.xlogy(q, q / m)).sum() / 2)
    found = torch.stack(apart)
    if len(found) > 1:
        best = found.topk(2).values
        near("dola layer", best[0] - best[1])
    chosen = others[int(found.argmax())]
    return plausible(p.log() - chosen.softmax(0).log(), own, method.beta, near)


def deco(method: Deco, own: Tensor, others: Sequence[Tensor], near: Near) -> Tensor:
    """l_N + alpha q l_M on the candidates."""
    p = own.softmax(0)
    kept: list[int] = []
    for token in p.argsort(descending=True).tolist():
        total = p[kept].sum()
        near("deco candidates", total - method.top_p)
        if total >= method.top_p or len(kept) == method.top_k:
            break
        kept.append(token)
    if len(kept) < len(p):
        near("deco candidates", p.sort(descending=True).values[: len(kept) + 1].diff()[-1:])
    sure = torch.stack([other.softmax(0)[kept].max() for other in others])
    if len(sure) > 1:
        best = sure.topk(2).values
        near("deco layer", best[0] - best[1])
    result = torch.full_like(own, -torch.inf)
    chosen = others[int(sure.argmax())]
    for token in kept:
        result[token] = own[token] + method.alpha * sure.max() * chosen[token]
    return result


def _readout(model: Any, residual: Tensor) -> Tensor:
    """Logits [S, V] of a residual stream [S, D]."""
    normed = decoder.rms_norm(model.model.language_model.norm, residual)
    return decoder.linear(model.lm_head, normed)


def _stream(model: Any, sample: Sample, method: Any) -> Tensor:
    """The second stream's logits, for every row [S, V] of the first."""
    if isinstance(method, Vcd):
        assert sample.with_pixels is not None
        prompt = sample.with_pixels(lambda pixels: noised(method, pixels))[: sample.length]
        embeds = torch.cat([prompt, sample.embeds[len(prompt) :]])
        return decoder.forward(model, embeds, sample.positions).logits
    if isinstance(method, Icd):
        return _prefixed(model, sample, method.prefix)
    text = ~sample.image
    count = int(text.sum())
    positions = torch.arange(count).expand(*sample.positions.shape[:-1], -1)
    logits = decoder.forward(model, sample.embeds[text], positions).logits
    return logits[(text.cumsum(0) - 1).clamp_min(0)]


def _prefixed(model: Any, sample: Sample, ids: tuple[int, ...]) -> Tensor:
    """With tokens in front of the question of every turn."""
    prefix = model.get_input_embeddings()(torch.tensor(ids)).detach().double()
    embeds, positions, rows = [], [], []
    starts = [int(turn.query.nonzero()[0]) for turn in sample.turns]
    for row in range(sample.length):
        if row in starts:
            embeds += list(prefix)
            place = sample.positions[..., row] + len(ids) * starts.index(row)
            positions += [place + i for i in range(len(ids))]
        rows.append(len(embeds))
        embeds.append(sample.embeds[row])
        before = sum(start <= row for start in starts)
        positions.append(sample.positions[..., row] + len(ids) * before)
    run = decoder.forward(model, torch.stack(embeds), torch.stack(positions, -1))
    return run.logits[rows]


def noised(method: Vcd, pixels: Tensor) -> Tensor:
    """One image after `noise_step` + 1 steps of diffusion."""
    draw = torch.Generator().manual_seed(method.seed)
    noise = torch.randn(pixels.shape, generator=draw).to(pixels.dtype)
    left = 1.0
    for step in range(method.noise_step + 1):
        x = -6 + 12 * step / 999
        left *= 1 - (1 / (1 + math.exp(-x)) * (0.005 - 1e-5) + 1e-5)
    return math.sqrt(left) * pixels + math.sqrt(1 - left) * noise
