"""The methods as published releases put them in: eager attention, S x S weights, batch 1.

`python -m eval speed` calls this "release-style". It shares no code with vlm_patch, and is kinder
than the releases where they loop over samples, heads or rows in Python: every step is an operation
on whole tensors. VAR has the paper's semantics, VHR the release's.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from eval.support.reference import Gift, Method, Var, Vhr

NAME = "release_style"


@dataclass
class Prompt:
    """What is known of the prompt that runs, and what the methods found in it.

    image, query: bool `[P]` over the prompt. sinks: by layer, bool `[K]`. text: by layer, the
    text-only head outputs `[H, d]`. factors: by layer, VHR's `[H]`. gain: GIFT's `[P]`.
    """

    specs: Sequence[Method]
    image: Tensor
    query: Tensor
    past: int = 0
    rows: Tensor = field(default_factory=lambda: torch.empty(0))
    inside: bool = False
    text_only: bool = False
    enhancing: bool = True
    gain: Tensor | None = None
    sinks: dict[int, Tensor] = field(default_factory=dict)
    text: dict[int, Tensor] = field(default_factory=dict)
    factors: dict[int, Tensor] = field(default_factory=dict)

    def before_decoder(self, decoder: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """Forward pre-hook: runs the passes that must come first, then follows the new rows."""
        if self.inside:
            return
        self.cache_name = "cache" if "cache" in kwargs else "past_key_values"
        cache, new = kwargs.get(self.cache_name), kwargs["inputs_embeds"].shape[1]
        self.past = 0 if cache is None else int(cache.get_seq_length())
        seen = self._over(self.image, self.past + new).cumsum(0) > 0
        self.rows = (seen & ~self._over(self.image, self.past + new))[self.past :]
        if self.past == 0:
            self._read(decoder, kwargs)

    def _read(self, decoder: nn.Module, kwargs: dict[str, Any]) -> None:
        self.gain = None
        self.inside = True
        once = {**kwargs, self.cache_name: None, "use_cache": False}
        if any(isinstance(spec, Vhr) for spec in self.specs):
            embeds = kwargs["inputs_embeds"][:, ~self.image]
            positions = torch.arange(embeds.shape[1], device=embeds.device)[None]
            self.text_only = True
            decoder(inputs_embeds=embeds, position_ids=positions, use_cache=False)
            self.text_only = False
        self.factors.clear()
        if any(isinstance(s, Gift) and max(s.saliency_layers) >= min(s.layers) for s in self.specs):
            self.enhancing = False
            decoder(**once)
            self.enhancing = True
            self.factors.clear()
        self.inside = False

    def before_block(self, layer: int, hidden: Tensor) -> None:
        """Tests the tokens that enter a block, `[1, S, D]`."""
        for spec in self.specs:
            if isinstance(spec, Var) and not self.text_only:
                x = hidden[0].float()
                phi = x[:, list(spec.dims)].abs().amax(-1) / x.square().mean(-1).sqrt()
                before = self.sinks[layer][: self.past] if self.past else phi.new_zeros(0).bool()
                self.sinks[layer] = torch.cat((before, phi >= spec.tau))

    def attend(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float
    ) -> tuple[Tensor, Tensor]:
        """Eager attention with the edits in it; weights are `[1, H, S, K]`."""
        groups = query.shape[1] // key.shape[1]
        if groups > 1:
            key, value = (part.repeat_interleave(groups, 1) for part in (key, value))
        weights = query @ key.transpose(2, 3) * scaling
        if mask is not None:
            weights = weights + mask
        weights = weights.softmax(-1, dtype=torch.float32).to(query.dtype)
        layer = module.layer_idx
        if not self.text_only:
            for spec in self.specs:
                if isinstance(spec, Var) and spec.acts_in(layer, module.config.num_hidden_layers):
                    self._redistribute(spec, layer, weights[0])
                elif isinstance(spec, Gift):
                    self._look(spec, layer, weights[0])
        output = weights @ value
        self._reinforce(layer, output[0])
        return output.transpose(1, 2).contiguous(), weights

    def _redistribute(self, spec: Var, layer: int, weights: Tensor) -> None:
        """VAR on weights `[H, S, K]`, in place."""
        sinks, image = self.sinks[layer], self._over(self.image, weights.shape[-1])
        others = image & ~sinks
        mass, rest = weights[..., image].sum(-1), weights[..., others].sum(-1)
        chosen = self.rows & (mass >= spec.min_image_mass) & (rest > 0)
        chosen &= rest >= spec.rho_nonsink * mass
        if spec.require_visual_sink:
            chosen &= (image & sinks).any()
        gain = 1 + spec.move_fraction * weights[..., sinks].sum(-1) / rest
        weights[..., others] *= torch.where(chosen, gain, 1.0)[..., None]
        weights[..., sinks] *= torch.where(chosen, 1 - spec.move_fraction, 1.0)[..., None]

    def _look(self, spec: Gift, layer: int, weights: Tensor) -> None:
        """GIFT on weights `[H, S, K]`: reads the map in its layer, enhances the last row."""
        if layer == spec.saliency_layer and self.gain is None:
            count = _half(weights, spec)
            change = weights[:, :, self.image].diff(dim=1).clamp(min=0)[:, self.query[1:]]
            kept = change.sum((1, 2)).topk(count).indices
            self.gain = (spec.alpha * _scaled(change[kept].mean((0, 1)))).exp()
        if layer in spec.layers and self.enhancing and self.gain is not None:
            self._enhance(spec, weights[:, -1], self.gain)

    def _enhance(self, spec: Gift, row: Tensor, gain: Tensor) -> None:
        """GIFT on one row `[H, K]`, in place."""
        image, query = (self._over(m, row.shape[-1]) for m in (self.image, self.query))
        looking = row[:, image].sum(-1).topk(_half(row, spec)).indices
        reading = row[:, query].sum(-1).topk(_half(row, spec)).indices
        look = torch.zeros_like(row).bool()
        look[looking] = image
        before = row[look].sum()
        row[look] *= gain.to(row.dtype).repeat(len(looking))
        ratio = torch.where(before > 0, row[look].sum() / before, 1.0)
        read = torch.zeros_like(row).bool()
        read[reading] = query
        row[read] *= spec.beta * ratio
        changed = torch.cat((looking, reading)).unique()  # type: ignore[no-untyped-call]
        row[changed] /= row[changed].sum(-1, keepdim=True)

    def _reinforce(self, layer: int, output: Tensor) -> None:
        """VHR on head outputs `[H, S, d]`, in place; the text-only pass is kept instead."""
        for spec in self.specs:
            if not isinstance(spec, Vhr) or layer not in spec.layers:
                continue
            if self.text_only:
                self.text[layer] = output[:, -1].clone()
                continue
            if layer not in self.factors:
                self.factors[layer] = _factors(spec, output[:, -1], self.text[layer])
            output *= self.factors[layer][:, None, None]

    def _over(self, mask: Tensor, keys: int) -> Tensor:
        """A mask of the prompt over all keys; the generated ones are False."""
        return nn.functional.pad(mask, (0, keys - len(mask)))


def _half(weights: Tensor, spec: Gift) -> int:
    return max(1, int(spec.head_fraction * weights.shape[0]))


def _scaled(saliency: Tensor) -> Tensor:
    """GIFT's map `[V]` clipped to mean +- 3 sd and stretched to [0, 1]."""
    mean, sd = saliency.mean(), saliency.std()
    clipped = saliency.clamp(mean - 3 * sd, mean + 3 * sd)
    width = clipped.max() - clipped.min()
    return torch.where(width > 0, (clipped - clipped.min()) / width, 0.0)


def _factors(spec: Vhr, output: Tensor, text: Tensor) -> Tensor:
    """VHR's factor of every head `[H]` from last-row outputs `[H, d]` with and without image."""
    scores = (output - text).float().square().sum(-1)
    strength = text.float().square().sum(-1)
    if spec.filter and scores.std() > 1:
        outlier = scores > scores.mean() + scores.std()
        outlier &= strength > strength.mean() + strength.std()
        scores = scores.masked_fill(outlier, 0.0)
    return torch.where(scores > scores.median(), spec.alpha, 1.0).to(output.dtype)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    **unused: Any,
) -> tuple[Tensor, Tensor]:
    prompt: Prompt = module.__dict__[NAME]
    return prompt.attend(module, query, key, value, attention_mask, scaling)


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS["eager"])


@contextmanager
def release_style(
    model: Any, specs: Sequence[Method], image: Tensor, query: Tensor
) -> Iterator[None]:
    """Methods on `model` for prompts of one sample, whose image and query keys are bool `[P]`.

    Raises ValueError for semantics and several saliency layers, which this file does not have.
    """
    for spec in specs:
        wanted = "release" if isinstance(spec, Vhr) else "paper"
        if getattr(spec, "semantics", wanted) != wanted:
            raise ValueError(
                f"{spec}: found semantics other than {wanted!r}, which is all there is"
            )
        if isinstance(spec, Gift) and not isinstance(spec.saliency_layer, int):
            raise ValueError(f"{spec}: found several saliency layers; one is all there is")
    decoder = model.get_decoder()
    prompt, stock = Prompt(specs, image, query), decoder.config._attn_implementation
    with ExitStack() as undo:
        model.set_attn_implementation({"text_config": NAME})
        undo.callback(model.set_attn_implementation, {"text_config": stock})
        hook = decoder.register_forward_pre_hook(prompt.before_decoder, with_kwargs=True)
        undo.callback(hook.remove)
        for layer, block in enumerate(decoder.layers):
            block.self_attn.__dict__[NAME] = prompt
            undo.callback(block.self_attn.__dict__.pop, NAME)
            hook = block.register_forward_pre_hook(
                lambda module, args, layer=layer: prompt.before_block(layer, args[0])
            )
            undo.callback(hook.remove)
        yield
