"""Any decoder of transformers as the reference's: its own layers, with literal attention in them.

One sample, no padding, no cache: the whole model runs on token ids, and where a decoder layer asks
for its attention function it gets S x S weights in float64, which the methods edit in plain sight.
What the model hands its layers (masks, rotary angles, windows, norms) is its own; who is image, who
is text and what happens to the weights is the reference's.
"""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from eval.support.reference.decoder import OutputsEdit, Run, WeightsEdit


class Hooked:
    """A model whose samples are token ids [S] in the place of embeddings.

    run_model: runs the whole model on ids [S], with the image if they hold one, and returns logits
    [S, vocabulary]. depth: decoder layers. values: of the last pass, by layer [H, S, d].
    """

    def __init__(self, model: Any, run_model: Callable[[Tensor], Tensor], depth: int) -> None:
        self.run_model = run_model
        self.config = SimpleNamespace(text_config=SimpleNamespace(num_hidden_layers=depth))
        self.depth = depth
        self.values: dict[int, Tensor] = {}
        modules = dict(model.get_decoder().named_modules())
        self.blocks: dict[Any, nn.Module] = {
            module: modules[name.rpartition(".")[0]]
            for name, module in modules.items()
            if hasattr(module, "layer_idx") and hasattr(module, "config")
        }

    @torch.no_grad()
    def run(self, ids: Tensor, edit_weights: WeightsEdit, edit_outputs: OutputsEdit) -> Run:
        """One pass; layers without softmax attention leave one number each."""
        entering: dict[nn.Module, Tensor] = {}
        nothing = torch.zeros(1, 1, 1, dtype=torch.float64)
        empty = [nothing] * self.depth
        run = Run(empty[:], empty[:], empty[:], empty[:])

        def attend(
            module: Any,
            q: Tensor,
            k: Tensor,
            v: Tensor,
            attention_mask: Tensor | None = None,
            **options: Any,
        ) -> Any:
            if module not in self.blocks:
                return stock(module, q, k, v, attention_mask, **options)
            layer = module.layer_idx
            weights, values = attention(module, q, k, v, attention_mask, options)
            self.values[layer] = values
            run.block_inputs[layer] = entering[self.blocks[module]][0].double()
            run.stock_weights[layer] = weights
            run.weights[layer] = edit_weights(layer, run.block_inputs[layer], weights)
            run.outputs[layer] = edit_outputs(layer, run.weights[layer] @ values)
            return run.outputs[layer].transpose(0, 1)[None].to(q.dtype), None

        def keep(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            entering[block] = args[0] if args else kwargs["hidden_states"]

        name = next(iter(self.blocks)).config._attn_implementation
        stock: Any = ALL_ATTENTION_FUNCTIONS.get(name)  # of towers and the like; none under "eager"
        hooks = [
            block.register_forward_pre_hook(keep, with_kwargs=True)
            for block in self.blocks.values()
        ]
        ALL_ATTENTION_FUNCTIONS[name] = attend
        try:
            run.logits = self.run_model(ids).double()
        finally:
            ALL_ATTENTION_FUNCTIONS.pop(name)
            for hook in hooks:
                hook.remove()
        return run


def attention(
    module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, options: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """Softmax weights [H, S, S] and values [H, S, d] of one sample, in float64."""
    heads, groups, length = q.shape[1], k.shape[1], q.shape[2]
    q, k, v = (part[0].double() for part in (q, k, v))
    k, v = (part.repeat_interleave(heads // groups, dim=0) for part in (k, v))
    scale = options.get("scaling")
    z = q @ k.transpose(1, 2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if options.get("softcap"):
        z = options["softcap"] * (z / options["softcap"]).tanh()
    if mask is not None:
        seen = mask[0] if mask.dtype == torch.bool else mask[0] == 0
    else:
        causal = options.get("is_causal")
        causal = getattr(module, "is_causal", True) if causal is None else causal
        seen = torch.ones(length, length, dtype=torch.bool)
        seen = seen.tril() if causal else seen
    z = z.masked_fill(~seen, -torch.inf)
    if options.get("sinks") is not None:  # a learned score per row that takes weight to nowhere
        return torch.cat([z, options["sinks"][0].double()], -1).softmax(-1)[..., :-1], v
    return z.softmax(-1), v
