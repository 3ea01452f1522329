"""Looks for the attention sinks of a model of which nobody has published them, on its first
prompt.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from vlm_patch.errors import UnsupportedModelError
from vlm_patch.method import ExtraForward, ForwardContext, Watcher
from vlm_patch.primitives.sink_rules import SinkChannels, judge

WATCHED_ROWS = 32


def one_stream(hidden: Tensor) -> Tensor:
    """The residual stream `[B, S, D]`. Raises UnsupportedModelError where there are several."""
    if hidden.ndim != 3:
        raise UnsupportedModelError(
            "sinks are looked for in the residual stream [batch, tokens, width], but the layers of "
            f"this model pass on several at once, of shape {list(hidden.shape)}: leave out the "
            "method that needs them"
        )
    return hidden


@dataclass
class _Record:
    """What the discovery pass saw: block inputs `[B, S, D]`, and per layer attention and value-path
    norms `[B, S]`.
    """

    forward: ForwardContext
    layers: list[int] = field(default_factory=list)
    blocks: list[Tensor] = field(default_factory=list)
    attention: list[Tensor] = field(default_factory=list)
    value_path: list[Tensor] = field(default_factory=list)

    def stacked(self, part: list[Tensor]) -> Tensor:
        """A part over all layers, of the prompts with an image, where the decoder's input lies."""
        seen, end = self.forward.seen, self.forward.position.prompt_rows
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
            continue  # offloaded to the CPU or a disk, or integers whose scale lies elsewhere
        if matrix.ndim == 2 and matrix.shape[1] == heads * size:
            per_head = matrix.dequantize().float().view(-1, heads, size).permute(1, 2, 0)
            gram = per_head @ per_head.transpose(1, 2)
            square: Tensor = ((value @ gram) * value).sum(-1)
            return square.clamp_min(0).sqrt()
    norms: Tensor = torch.linalg.vector_norm(value, dim=-1)
    return norms


def discover(forward: ForwardContext, run: ExtraForward) -> SinkChannels:
    """One pass of the stock model over the first prompt, and what `judge` makes of it."""
    seen, end = forward.seen, forward.position.prompt_rows
    rows = forward.text[seen, :end].all(0).nonzero().flatten()[-WATCHED_ROWS:]
    if not len(rows):
        reason = "The first prompt has no text after its image, so nothing could be checked."
        return SinkChannels((), reason=reason)
    record = _Record(forward)
    run(
        forward.inputs,
        Watcher(block=record.block, weights=record.weights, rows=rows),
    )
    found = judge(
        record.stacked(record.blocks),
        record.stacked(record.attention),
        record.stacked(record.value_path),
        forward.valid[seen, :end],
        forward.image[seen, :end],
    )
    return replace(found, layers=tuple(record.layers[place] for place in found.layers))
