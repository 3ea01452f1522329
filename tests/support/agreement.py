"""How far generations are from the reference, and the methods that tests combine."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from eval.support import tiny
from eval.support.agreement import PAIRS, answer_logits, distance, generated, own_forwards
from vlm_patch.methods.var import sink_score

NO_PROCESSOR = "ignore:No processor was given"
ALONE = [(name,) for name in PAIRS]
TOGETHER = [
    ("var", "gift", "vhr"),
    ("gift", "var", "vhr"),
    ("vhr", "gift-inside", "var"),
    ("var-release", "gift-inside", "vhr"),
    ("gift-inside", "var-release", "vhr-paper"),
    ("var", "gift-inside"),
    ("gift-inside", "paint", "var", "vhr"),
    ("pai", "vaf", "devils", "adhh", "mass-target"),
    ("mass-target", "var", "adaiat", "devils", "pai", "adhh", "iat"),
    ("nullu", "memvr", "vista", "steering"),
    ("vista", "nullu", "var", "steering-all", "gift-inside", "vhr"),
    ("vcd", "gift-inside", "m3id", "deco"),
    ("icd", "paint-guided", "dola"),
]


def generate(model: Any, batch: Mapping[str, Tensor], steps: int = 8, **options: Any) -> Any:
    """Exactly `steps` new tokens, greedy unless `options` say otherwise.

    The output's logits are those of the model: transformers' own copy is rounded to float32.
    """
    settings = {"do_sample": False, "max_new_tokens": steps, "min_new_tokens": steps} | options
    with own_forwards(model) as seen:
        output = model.generate(**batch, **settings, return_dict_in_generate=True)
    output.logits = tuple(said.logits[:, -1].detach() for _, said in seen)
    return output


def error(
    model: Any,
    batch: Mapping[str, Tensor],
    output: Any,
    names: Sequence[str],
    heads: Mapping[str, Tensor] | None = None,
    **masks: Tensor,
) -> float:
    """The largest difference of the logits of a generation from the reference's."""
    samples = tiny.samples(model, batch, generated(batch, output), **masks)
    steps = torch.stack(output.logits, 1).double()
    return distance(steps, answer_logits(model, samples, names, heads))


def new_tokens(
    size: int, dims: tuple[int, ...], dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """The streams `[5, 1, size]` of new tokens, and VAR's groups `[5, 4]` of them at tau = 3: the
    second and the third are sinks, the fourth is all zero.
    """
    hidden = torch.randn(5, 1, size, generator=torch.Generator().manual_seed(size)).to(dtype)
    hidden[1, 0, dims[0]], hidden[2, 0, dims[-1]], hidden[3] = 40.0, -50.0, 0.0
    flags = sink_score(hidden.float(), dims)[:, 0] >= 3.0
    assert flags.tolist() == [False, True, True, False, False]
    nothing, one = torch.zeros(5), torch.ones(5)
    return hidden, torch.stack((nothing, flags.float(), nothing, one), 1)
