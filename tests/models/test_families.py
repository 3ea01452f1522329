"""Every family against the literal reference: the methods alone and together, on a left-padded
batch, with new tokens from the cache.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import vlm_patch
from eval.support import reference
from eval.support.check import Probe
from eval.support.families import quietly
from eval.support.reference import Gift, Var, Vhr, trace
from tests.support.agreement import NO_PROCESSOR
from tests.support.family import BREAKS_PADDING, KINDS, STATEFUL, STEPS, WITHOUT, Family, made
from tests.support.untouched import check_untouched
from vlm_patch import GIFT, VAR, VHR
from vlm_patch.method import ForwardContext, Method, State
from vlm_patch.primitives import sinks

pytestmark = pytest.mark.filterwarnings(NO_PROCESSOR, "ignore:no published settings")
CLOSE = 1e-5
LOOSE = 3e-5
"""For state spaces and linear attention, which in float32 make a padded batch differ that much by
themselves."""


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with quietly():
        yield


@pytest.fixture(scope="module", params=KINDS)
def named(request: pytest.FixtureRequest) -> tuple[str, Family]:
    """Every type in turn; tests of one type run together, so that each model is built once."""
    return request.param, made(request.param)


def softmax_layers(model: Any) -> list[int]:
    with vlm_patch.wrap(model, Probe()) as patch:
        words = patch.describe().splitlines()[0].rpartition(" in ")[2]
    runs = [part.partition("-") for part in words.split(", ")]
    return [n for a, dash, b in runs for n in range(int(a), int(b if dash else a) + 1)]


def pairs(layers: Sequence[int]) -> dict[str, tuple[reference.Method, Any]]:
    """Each method for the reference and for the library; tau makes sinks of ordinary tokens."""
    first, last, all_of_them = layers[0], layers[-1], tuple(layers)
    return {
        "var": (
            Var((3,), 1.0, rho_nonsink=0.0, min_image_mass=0.0, exclude_last_layer=False),
            VAR(
                dims=(3,),
                tau=1.0,
                rho_nonsink=0.0,
                min_image_mass=0.0,
                exclude_last_layer=False,
            ),
        ),
        "gift": (Gift(3.0, first, (last,)), GIFT(3.0, saliency_layer=first, layers=(last,))),
        "gift-late": (Gift(2.0, last, (first,)), GIFT(2.0, saliency_layer=last, layers=(first,))),
        "vhr": (Vhr(all_of_them), VHR(layers=all_of_them)),
    }


SETS = {
    "stock": (),
    "var": ("var",),
    "gift-late": ("gift-late",),
    "vhr": ("vhr",),
    "together": ("var", "gift", "vhr"),
}


def apart(tiny: Family, names: Sequence[str], index: int) -> float:
    """How far a generation of the library is from the reference, in one of the two prompts."""
    both = pairs(softmax_layers(tiny.model))
    ours = [both[name][1] for name in names] or [Probe()]
    with vlm_patch.wrap(tiny.model, *ours):
        logits, new = tiny.generate()
    seen = trace(tiny.alone(index), tiny.sample(index, new[index]), [both[n][0] for n in names])
    expected = seen.run.logits[-STEPS - 1 : -1]
    return float((expected - logits[index].double()).abs().max())


def test_against_the_reference(named: tuple[str, Family]) -> None:
    kind, tiny = named
    bound = LOOSE if kind in STATEFUL else CLOSE
    for label, names in SETS.items():
        if any(name.partition("-")[0] in WITHOUT.get(kind, ()) for name in names):
            continue
        assert apart(tiny, names, 0) <= bound, label
        assert (apart(tiny, names, 1) <= bound) != (kind in BREAKS_PADDING), label


def test_nothing_is_left_behind(named: tuple[str, Family], tmp_path: Path) -> None:
    kind, tiny = named
    both = pairs(softmax_layers(tiny.model))
    names = [name for name in ("var", "gift", "vhr") if name not in WITHOUT.get(kind, ())]
    methods = [both[name][1] for name in names]
    check_untouched(tiny.model, lambda: tiny.generate()[0], methods, tmp_path)


# ---- what VAR is shown


@dataclass(frozen=True, eq=False)
class Streams(Method):
    """Keeps what enters every block while a prompt is read."""

    name: ClassVar[str] = "streams"
    reads_blocks: ClassVar[bool] = True
    seen: dict[int, Tensor] = field(default_factory=dict)

    def observe_hidden(
        self, layer: int, hidden: Tensor, forward: ForwardContext, state: State
    ) -> None:
        self.seen.setdefault(layer, hidden.clone())


DEEPSTACK = (
    *("cohere_compass", "cosmos3_omni", "granite4_vision", "granite_docling", "qwen3_vl"),
    *("qwen3_vl_moe", "qwen3_omni_moe_thinker"),
)
"""Image features are added to the stream between their first layers, behind what transformers
reports as hidden states."""


def test_the_raw_stream_that_enters_a_block(named: tuple[str, Family]) -> None:
    """Before any norm, as the sink score wants it: the hidden states that transformers reports."""
    (kind, tiny), streams = named, Streams()
    if kind == "phi4_multimodal":  # its vision tower fails when hidden states are asked for
        return
    with vlm_patch.wrap(tiny.model, streams):
        output = tiny.model.generate(
            **tiny.prompt(),
            max_new_tokens=1,
            output_hidden_states=True,
            return_dict_in_generate=True,
        )
    assert list(streams.seen) == softmax_layers(tiny.model)
    text = ~torch.isin(tiny.batch["input_ids"], tiny.image_ids)
    for layer, hidden in streams.seen.items():
        expected = output.hidden_states[0][layer]
        if kind in DEEPSTACK:
            assert torch.equal(hidden, expected) == (layer == 0)
            hidden, expected = hidden[text], expected[text]
            if layer > 1:  # text has seen other image keys from here on
                continue
        assert torch.equal(hidden, expected), layer


def test_a_model_without_massive_activations_is_reported(named: tuple[str, Family]) -> None:
    kind, tiny = named
    if "var" in WITHOUT.get(kind, ()):
        return
    before, _ = tiny.generate()
    with (
        vlm_patch.wrap(tiny.model, VAR()),
        pytest.warns(UserWarning, match="VAR does nothing on this model: no attention sink"),
    ):
        after, _ = tiny.generate()
    assert torch.equal(before, after)


OUTPUT = ("o_proj", "out_proj", "dense")


def carried(attention: nn.Module, values: Tensor, weights: Tensor) -> Tensor:
    """Mean over heads of the mean weight of a key times |v W_O| `[S]`, step by step.

    values `[H, S, d]`, weights `[H, R, S]`.
    """
    matrix = next(module for name, module in attention.named_children() if name in OUTPUT).weight
    total = torch.zeros(values.shape[1], dtype=values.dtype)
    for head, own in enumerate(values):
        columns = matrix[:, head * own.shape[1] : (head + 1) * own.shape[1]].double()
        total += weights[head].mean(0) * (own @ columns.T).norm(dim=-1)
    return total / len(values)


def test_what_sinks_are_looked_for_in(
    named: tuple[str, Family], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Streams, attention of the text behind the image, and what keys carry, for GQA, MQA, MLA and
    hybrid decoders alike.
    """
    kind, tiny = named
    if "var" in WITHOUT.get(kind, ()):
        return
    calls: list[tuple[Tensor, ...]] = []

    def catch(*args: Tensor) -> sinks.SinkChannels:
        calls.append(args)
        return sinks.SinkChannels((3,), 2.0)

    monkeypatch.setattr(sinks, "judge", catch)
    with vlm_patch.wrap(tiny.model, VAR()) as patch:
        _, new = tiny.generate()
        assert "dims=(3,)" in patch.describe()
    blocks, attention, values, valid, image = calls[0]
    near: dict[str, Any] = {"rtol": CLOSE, "atol": CLOSE}
    modules = {module.layer_idx: module for module in tiny.alone(0).blocks}
    for index in () if kind in BREAKS_PADDING else (0, 1):
        sample, alone = tiny.sample(index, new[index][:0]), tiny.alone(index)
        run, kept = trace(alone, sample).run, valid[index]
        assert torch.equal(image[index][kept], sample.image)
        for place, layer in enumerate(softmax_layers(tiny.model)):
            weights = run.stock_weights[layer][:, sample.turns[0].query]
            found = (blocks[index, place], attention[index, place], values[index, place])
            expected = (
                run.block_inputs[layer],
                weights.mean((0, 1)),
                carried(modules[layer], alone.values[layer], weights),
            )
            for seen, wanted in zip(found, expected, strict=True):
                torch.testing.assert_close(seen[kept].double(), wanted, **near)
