"""A literal Llama / Qwen2-VL decoder in float64: what every method edits is in plain sight."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PretrainedConfig

# (layer, block input [S, D], weights [H, S, S]) -> weights [H, S, S]
WeightsEdit = Callable[[int, Tensor, Tensor], Tensor]
# (layer, scores [H, S, S] before mask and softmax) -> scores [H, S, S]
ScoresEdit = Callable[[int, Tensor], Tensor]
# (layer, head outputs [H, S, d] before the output projection) -> head outputs [H, S, d]
OutputsEdit = Callable[[int, Tensor], Tensor]
# (layer, what enters the MLP [S, D], its output [S, D]) -> output [S, D]
MlpEdit = Callable[[int, Tensor, Tensor], Tensor]
# (layer, residual stream leaving the block [S, D]) -> residual stream [S, D]
HiddenEdit = Callable[[int, Tensor], Tensor]
# keys or values [groups, S, d] -> what a cache gives back, and the rows bool [S] that see it so
FromCache = Callable[[Tensor], tuple[Tensor, Tensor]]


def as_they_are(states: Tensor) -> tuple[Tensor, Tensor]:
    """A cache without loss."""
    return states, torch.zeros(states.shape[1], dtype=torch.bool)


@dataclass
class Run:
    """What one pass left behind; the lists have one entry per layer, all float64.

    block_inputs and block_outputs [S, D] are the raw residual stream; stock_weights [H, S, S] is
    the softmax before any edit, weights [H, S, S] after all edits; outputs [H, S, d] are the head
    outputs as the output projection sees them. logits is [S, vocabulary].
    """

    block_inputs: list[Tensor] = field(default_factory=list)
    block_outputs: list[Tensor] = field(default_factory=list)
    stock_weights: list[Tensor] = field(default_factory=list)
    weights: list[Tensor] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)
    logits: Tensor = field(default_factory=lambda: torch.empty(0))


@torch.no_grad()
def forward(
    model: Any,
    embeds: Tensor,
    positions: Tensor,
    edit_weights: WeightsEdit = lambda layer, block_input, weights: weights,
    edit_outputs: OutputsEdit = lambda layer, outputs: outputs,
    from_cache: FromCache = as_they_are,
    edit_scores: ScoresEdit = lambda layer, scores: scores,
    edit_mlp: MlpEdit = lambda layer, entering, output: output,
    edit_hidden: HiddenEdit = lambda layer, hidden: hidden,
) -> Run:
    """Run the decoder of `model` on embeds [S, D] at positions [S] or [3, S] (m-rope)."""
    decoder = model.model.language_model
    run = Run()
    cos, sin = rotary_tables(decoder, positions)
    x = embeds.double()
    for index, block in enumerate(decoder.layers):
        run.block_inputs.append(x)
        normed = rms_norm(block.input_layernorm, x)
        scores, unseen, values = attention_scores(
            decoder.config, block.self_attn, normed, cos, sin, from_cache
        )
        run.stock_weights.append(softmax(scores, unseen))
        weights = softmax(edit_scores(index, scores), unseen)
        weights = edit_weights(index, x, weights)
        run.weights.append(weights)
        outputs = edit_outputs(index, products(weights, values, from_cache))
        run.outputs.append(outputs)
        x = x + linear(block.self_attn.o_proj, outputs.transpose(0, 1).flatten(1))
        entering = rms_norm(block.post_attention_layernorm, x)
        x = edit_hidden(index, x + edit_mlp(index, entering, swiglu(block.mlp, entering)))
        run.block_outputs.append(x)
    run.logits = readout(model, x)
    return run


def readout(model: Any, x: Tensor) -> Tensor:
    """Logits [..., vocabulary] of a residual stream [..., D]."""
    return linear(model.lm_head, rms_norm(model.model.language_model.norm, x))


def softmax(scores: Tensor, unseen: Tensor) -> Tensor:
    """Weights [H, S, S] of scores [H, S, S], nothing on `unseen` [S, S]."""
    return scores.masked_fill(unseen, -torch.inf).softmax(-1)


def attention_scores(
    config: PretrainedConfig,
    attention: Any,
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    from_cache: FromCache,
) -> tuple[Tensor, Tensor, Tensor]:
    """Scores [H, S, S], key/value heads repeated (GQA), which of them are out of sight [S, S], and
    values [groups, S, d].

    With a sliding window a row sees only the newest keys.
    """
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    length = x.shape[0]
    q = linear(attention.q_proj, x).view(length, heads, -1).transpose(0, 1)
    k = linear(attention.k_proj, x).view(length, groups, -1).transpose(0, 1)
    v = linear(attention.v_proj, x).view(length, groups, -1).transpose(0, 1)
    q, k = rotate(q, cos, sin), rotate(k, cos, sin)
    z = products(q / q.shape[-1] ** 0.5, k, from_cache, transposed=True)
    distance = torch.arange(length)[:, None] - torch.arange(length)
    window = getattr(config, "sliding_window", None) or length
    unseen = (distance < 0) | (distance >= window)
    return z, unseen, v


def products(
    rows: Tensor, states: Tensor, from_cache: FromCache, transposed: bool = False
) -> Tensor:
    """rows [H, S, ...] times keys (transposed) or values [groups, S, d] of their group."""
    repeats = len(rows) // len(states)
    stored, late = from_cache(states)
    exact, rounded = (
        rows @ (every.transpose(1, 2) if transposed else every)
        for every in (states.repeat_interleave(repeats, 0), stored.repeat_interleave(repeats, 0))
    )
    return torch.where(late[:, None], rounded, exact)


def rotary_tables(decoder: Any, positions: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin [S, d]. For m-rope, channel section i follows row i of positions [3, S]."""
    rotary = decoder.rotary_emb
    # float32 on purpose: transformers makes these tables in float32 whatever the model's dtype
    angles = positions.float()[..., None] * rotary.inv_freq.float()
    if positions.ndim == 2:
        sections = angles.split(decoder.config.rope_scaling["mrope_section"], dim=-1)
        angles = torch.cat([part[axis] for axis, part in enumerate(sections)], dim=-1)
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos().double(), angles.sin().double()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each pair (channel c, channel c + d/2) of x [H, S, d] by its angle."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def rms_norm(norm: Any, x: Tensor) -> Tensor:
    mean_square = x.square().mean(-1, keepdim=True)
    normed: Tensor = x / (mean_square + norm.variance_epsilon).sqrt() * norm.weight.double()
    return normed


def swiglu(mlp: Any, x: Tensor) -> Tensor:
    return linear(mlp.down_proj, functional.silu(linear(mlp.gate_proj, x)) * linear(mlp.up_proj, x))


def linear(module: Any, x: Tensor) -> Tensor:
    bias = None if module.bias is None else module.bias.double()
    return functional.linear(x, module.weight.double(), bias)
