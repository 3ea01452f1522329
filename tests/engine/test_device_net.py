"""The net of `test_whole_device` holds: a tensor of the CPU planted anywhere is caught."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from types import ModuleType
from typing import Any
from unittest import mock

import pytest
import torch
from PIL import Image
from transformers import BatchFeature

from eval.runs import generate as eval_generate
from eval.runs.config import Config
from eval.runs.samples import Sample
from eval.support import tiny
from eval.support.agreement import ours, planted
from eval.support.simulated_device import FAR, REFUSAL, second_device
from tests.support.agreement import NO_PROCESSOR
from tests.support.agreement import generate as generated
from tests.support.on_device import CASES, CPU, answered, moved
from vlm_patch import wrap
from vlm_patch.engine import attention, packed, packing, plans, rows, tracker
from vlm_patch.methods import gift, var, vhr
from vlm_patch.primitives import reweighting, sink_rules, sinks
from vlm_patch.prompts import masks

pytestmark = pytest.mark.filterwarnings(
    NO_PROCESSOR, "ignore:no published settings", "ignore:VAR does nothing"
)
ALL = ("var", "gift", "vhr")


@pytest.fixture(autouse=True)
def _nothing_is_kept() -> Iterator[None]:
    """VAR keeps its constants, planted ones too."""
    var._made.cache_clear()
    yield
    var._made.cache_clear()


def caught() -> AbstractContextManager[Any]:
    return pytest.raises(RuntimeError, match=REFUSAL)


def acting(device: torch.device) -> object:
    return answered(device, ours(ALL))


def one_prompt(device: torch.device) -> object:
    """Without padding, the kernels are given no mask."""
    return answered(device, ours(ALL), tiny.ONE_IMAGE)


def switched(device: torch.device) -> object:
    return CASES["some heads"](device)


def searching(device: torch.device) -> object:
    return CASES["sinks that are found"](device)


def in_one_call(device: torch.device) -> object:
    """Where one call of the kernel reads the text with the prompt."""
    with mock.patch.dict(packing.MOST_ROWS_AT_ONCE, {device.type: 1024}):
        return one_prompt(device)


Case = Callable[[torch.device], object]
LEFT_BEHIND: dict[str, tuple[Any, str, Case]] = {
    "VAR's constants": (var, "_constant", acting),
    "VAR's observe_hidden": (var, "peak_and_norm", acting),
    "VAR's shares": (var, "sink_shares", acting),
    "the product with the groups": (reweighting, "reweight", lambda d: answered(d, ours(("var",)))),
    "GIFT's observe": (gift, "positive_change", acting),
    "GIFT's map": (gift, "saliency_gain", acting),
    "GIFT's heads": (gift, "top_heads", acting),
    "GIFT's shares": (gift, "gaze_shares", acting),
    "VHR's extra pass": (vhr, "without_image", acting),
    "VHR's block mask": (packed.Packed, "_block_mask", in_one_call),
    "VHR's positions": (packing, "_positions", acting),
    "VHR's distance": (vhr, "divergence", acting),
    "VHR's choice": (vhr, "above_median", acting),
    "the image mask": (masks.Reader, "image", acting),
    "the question's mask": (masks.Reader, "question", acting),
    "masks by hand": (masks, "by_hand", CASES["masks by hand on the CPU"]),
    "the padding": (tracker.PromptTracker, "_valid", acting),
    "head switches": (rows, "_heads", switched),
    "the rows written": (rows, "written", switched),
    "a row's weights": (attention.Call, "weights", acting),
    "the causal rows": (attention.Call, "_hidden", one_prompt),
    "the search's values": (sinks, "_projected_norms", searching),
    "the search's sizes": (sink_rules, "value_sizes", searching),
}
"""What a function makes, and who runs it."""


@pytest.mark.parametrize("place", LEFT_BEHIND)
def test_what_a_function_makes(place: str) -> None:
    owner, name, case = LEFT_BEHIND[place]
    real = getattr(owner, name)
    calls: list[str] = []

    def planting(*args: Any, **options: Any) -> Any:
        calls.append(name)
        return moved(real(*args, **options), CPU)

    with second_device(), mock.patch.object(owner, name, planting), caught():
        case(FAR)
    assert calls


class Forgetful(ModuleType):
    """Torch, but what it makes lies on the CPU, as where `device=` is forgotten."""

    def __getattr__(self, name: str) -> Any:
        real = getattr(torch, name)
        if name not in ("arange", "zeros", "ones", "tensor", "full", "empty"):
            return real
        return lambda *args, device=None, **options: real(*args, **options)


FORGETTING: dict[str, tuple[ModuleType, Case]] = {
    "var": (var, acting),
    "vhr": (vhr, acting),
    "two prompts": (packed, in_one_call),
    "attention": (attention, one_prompt),
    "editing": (plans, switched),
}


@pytest.mark.parametrize("name", FORGETTING)
def test_a_device_that_is_forgotten(name: str) -> None:
    module, case = FORGETTING[name]
    with second_device(), mock.patch.object(module, "torch", Forgetful("torch")), caught():
        case(FAR)


def test_inputs_that_stay_behind(tmp_path: Any) -> None:
    """In the evaluation's generation, and in a user's own."""
    model = planted("llava")
    batch = tiny.inputs(model, tiny.ONE_IMAGE)
    with second_device():
        model.to(FAR)
        with wrap(model, *ours(ALL)), caught():
            generated(model, batch)
        loaded = eval_generate.load_model(Config(dtype="float32", device=str(FAR)))
        path = tmp_path / "a.png"
        Image.new("RGB", (96, 96)).save(path)
        sample = Sample("chair", "test", "1", path, "Please describe this image in detail.", {})
        assert eval_generate.ask(*loaded, [sample], 2)
        with mock.patch.object(BatchFeature, "to", lambda inputs, *_, **__: inputs), caught():
            eval_generate.ask(*loaded, [sample], 2)
