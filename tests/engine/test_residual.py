"""The hooks on the residual stream: what they show, what stays stock, and what is refused."""

import copy
import pickle
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from eval.support import tiny
from eval.support.agreement import ours, planted
from eval.support.build import build
from eval.support.simulated_device import spread
from tests.support.agreement import NO_PROCESSOR, generate
from tests.support.family import KINDS, Family
from tests.support.untouched import answers, check_error_in_method, check_untouched
from vlm_patch import ForwardContext, Method, PatchError, UnsupportedModelError, wrap

pytestmark = pytest.mark.filterwarnings(NO_PROCESSOR, "ignore:.*prompts hold no image")
RESIDUAL = ("steering", "nullu", "memvr", "vista")


MLPS = {"llava": "mlp", "qwen3_vl_moe": "mlp", "llama4": "feed_forward"}
"""What the MLP of a block is called, where its output differs from kind to kind."""


@dataclass(frozen=True)
class Times(Method):
    """What every MLP gives, and what leaves every block, times two numbers."""

    name: ClassVar[str] = "times"
    mlp: float = 2.0
    hidden: float = 1.0

    def edit_mlp(
        self, layer: int, output: Tensor, hidden: Tensor, forward: ForwardContext, state: Any
    ) -> Tensor:
        assert output.shape == hidden.shape == (*forward.valid.shape, hidden.shape[-1])
        return output * self.mlp

    def edit_hidden(self, layer: int, hidden: Tensor, *rest: Any) -> Tensor:
        return hidden * self.hidden


@dataclass(frozen=True, eq=False)
class Product(Method):
    """Edits nothing; keeps what a matrix product is made in."""

    name: ClassVar[str] = "product"
    kinds: list[torch.dtype] = field(default_factory=list)

    def edit_hidden(self, layer: int, hidden: Tensor, *rest: Any) -> Tensor:
        wide = hidden.float()
        self.kinds.append((wide @ wide.transpose(1, 2)).dtype)
        return hidden


def by_hand(modules: list[nn.Module], factor: float, ask: Callable[[], Tensor]) -> Tensor:
    """An answer with the output of these modules multiplied."""

    def times(module: nn.Module, args: Any, output: Any) -> Any:
        return (output[0] * factor, *output[1:]) if isinstance(output, tuple) else output * factor

    handles = [module.register_forward_hook(times) for module in modules]
    try:
        return ask()
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize(
    ("kind", "mlp"),
    [
        (kind, mlp)
        for kind, mlp in MLPS.items()
        if kind in KINDS  # that this version of transformers runs
    ],
)
def test_the_output_of_an_mlp_of_any_kind(kind: str, mlp: str) -> None:
    """Mixtures of experts give a tuple, or their rows without the batch."""
    family = Family(kind)
    model, inputs = family.model, family.batch

    def ask() -> Tensor:
        with torch.no_grad():
            logits: Tensor = model(**inputs).logits
            return logits[:, -1]

    layers = model.get_decoder().layers
    expected = by_hand([getattr(layer, mlp) for layer in layers], 2.0, ask)
    stock = ask()
    with wrap(model, Times()):
        found = ask()
    assert not torch.allclose(expected, stock, atol=1e-4)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert torch.equal(ask(), stock)


def test_what_leaves_a_block() -> None:
    model = planted("llava")
    batch = tiny.inputs(model)

    def ask() -> Tensor:
        with torch.no_grad():
            logits: Tensor = model(**batch).logits
            return logits

    expected = by_hand(list(model.get_decoder().layers), 1.5, ask)
    with wrap(model, Times(1.0, 1.5)):
        assert torch.equal(ask(), expected)


@pytest.mark.parametrize("name", RESIDUAL)
def test_a_prompt_without_an_image_stays_stock(name: str) -> None:
    """Bit for bit, beside others that have one."""
    model = planted("llava")
    batch = tiny.inputs(model, [*tiny.BATCH_OF_3, [tiny.BOS, 5, 6, 21, 22]])
    stock = generate(model, batch)
    with wrap(model, *ours([name])):
        found = generate(model, batch)
    for one, other in zip(found.logits, stock.logits, strict=True):
        assert torch.equal(one[3], other[3])
    assert not torch.equal(found.logits[-1][:3], stock.logits[-1][:3])


def test_some_heads_of_a_layer_are_refused() -> None:
    model = planted("llava")
    with wrap(model, Times()) as patch:
        patch.heads["times"][2, 1] = False
        with pytest.raises(PatchError) as caught:
            generate(model, tiny.inputs(model))
        assert str(caught.value) == (
            "times edits the residual stream, which has no heads, but only some heads of layer 2 "
            'are on: switch the whole layer, patch.heads["times"][2] = True or False'
        )
        patch.heads["times"][2] = False
        generate(model, tiny.inputs(model))


def test_a_block_without_an_mlp_of_its_own_is_refused() -> None:
    model = build("blip-2")
    with pytest.raises(UnsupportedModelError, match=r"found .*'fc1'"):
        wrap(model, Times())
    wrap(model, Product()).remove()  # behind the block none is needed


def test_gradient_checkpointing_is_refused_behind_an_mlp() -> None:
    model = planted("llava").train()
    model.gradient_checkpointing_enable()
    batch = tiny.inputs(model)
    with wrap(model, Times(), *ours(["vhr"])) as patch:
        with pytest.raises(PatchError, match="train without gradient checkpointing"):
            model(**batch, use_cache=False)
        with patch.disabled("times"):
            model(**batch, use_cache=False)


STAGES = {
    "steering": ("edit_hidden",),
    "nullu": ("edit_mlp",),
    "memvr": ("before_forward", "observe_readout", "edit_mlp"),
    "vista": ("probe", "before_forward", "edit_mlp"),
}


@pytest.mark.parametrize("name", RESIDUAL)
def test_an_error_at_any_stage_of_a_method(name: str) -> None:
    model = planted("llava")
    batch = tiny.inputs(model)
    methods = ours(RESIDUAL)
    method = methods[RESIDUAL.index(name)]
    for stage in STAGES[name]:
        check_error_in_method(model, lambda: answers(model, batch), methods, method, stage)


def test_nothing_is_left_behind(tmp_path: Path) -> None:
    model = tiny.plant(tiny.llava())
    batch = tiny.inputs(model, tiny.BATCH_OF_3)
    check_untouched(model, lambda: answers(model, batch), ours(RESIDUAL), tmp_path)


def test_switched_off_it_is_the_stock_model() -> None:
    model = planted("llava")
    batch = tiny.inputs(model, tiny.BATCH_OF_3)
    stock = generate(model, batch)
    with wrap(model, *ours(RESIDUAL)) as patch:
        twin = copy.deepcopy(model)
        assert not torch.equal(generate(model, batch).logits[-1], stock.logits[-1])
        with patch.disabled():
            off = generate(model, batch)
        copied = generate(twin, batch)
    for found in (off, copied, generate(model, batch)):
        assert all(map(torch.equal, found.logits, stock.logits))


def test_a_pickle_is_the_stock_model() -> None:
    model = tiny.llava()  # not run yet, after which it cannot be pickled
    with wrap(model, *ours(RESIDUAL)):
        twin = pickle.loads(pickle.dumps(model))
    batch = tiny.inputs(model, tiny.BATCH_OF_3)
    found, stock = generate(twin, batch), generate(model, batch)
    assert all(map(torch.equal, found.logits, stock.logits))


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_layers_on_two_devices(options: dict[str, int]) -> None:
    found = []
    for far in (range(0), range(1, 3)):
        model = planted("llava")
        batch = tiny.inputs(model, tiny.BATCH_OF_3)
        with spread(model, far), wrap(model, *ours(RESIDUAL)):
            found.append(generate(model, batch, **options))
    assert torch.equal(found[0].sequences, found[1].sequences)
    torch.testing.assert_close(found[0].logits, found[1].logits, rtol=0, atol=1e-6)


def test_edits_keep_their_precision_under_autocast() -> None:
    model = planted("llava")
    kinds: list[torch.dtype] = []
    method = Product(kinds)
    with wrap(model, method), torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        model(**tiny.inputs(model))
    assert kinds == [torch.float32] * 4
