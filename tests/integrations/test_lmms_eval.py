"""What the lmms-eval model makes of its arguments and requests; lmms-eval runs in tests_lmms/."""

import importlib
import subprocess
import sys
from collections import namedtuple
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn

from eval.support import tiny
from eval.support.simulated_device import FAR, second_device
from vlm_patch import GIFT, VAR, VHR, wrap
from vlm_patch.integrations.lmms_eval import answers
from vlm_patch.integrations.lmms_eval.arguments import build_methods, listed, whole

GREEDY = {"do_sample": False, "temperature": 1.0, "top_p": 1.0, "top_k": 50}


def test_the_package_does_not_import_it() -> None:
    program = (
        "import sys, vlm_patch;"
        "print([name for name in sys.modules if 'lmms' in name or name == 'loguru'])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.parametrize(
    ("text", "options", "methods"),
    [
        ("baseline", {}, []),
        ("gift", {}, [GIFT()]),
        ("vhr+var", {}, [VHR(), VAR()]),
        ("gift", {"gift.alpha": 4, "gift.words": "all"}, [GIFT(alpha=4, words="all")]),
        ("gift", {"gift.layers": "8-10+12"}, [GIFT(layers=(8, 9, 10, 12))]),
        ("gift", {"gift.layers": 8}, [GIFT(layers=(8,))]),
        ("gift", {"gift.saliency_layer": 7}, [GIFT(saliency_layer=7)]),
        ("gift", {"gift.saliency_layer": "5-6+9"}, [GIFT(saliency_layer=(5, 6, 9))]),
        (
            "var+vhr",
            {"var.dims": "1415+2533", "vhr.filter": False, "var.semantics": "release"},
            [VAR(dims=(1415, 2533), semantics="release"), VHR(filter=False)],
        ),
    ],
)
def test_methods_with_their_hyperparameters(
    text: str, options: Mapping[str, Any], methods: list[Any]
) -> None:
    made = build_methods(text, options)
    assert [(type(m), vars(m)) for m in made] == [(type(m), vars(m)) for m in methods]


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        (None, {}, r"methods is missing: expected baseline \(the stock model\) or names of"),
        ("gfit", {}, "unknown method 'gfit': .*did you mean 'gift'"),
        ("gift,var", {}, "unknown method 'gift,var'"),
        ("gift", {"gift.alhpa": 4}, "unknown model argument 'gift.alhpa': .*gift.alpha, gift.beta"),
        ("gift", {"var.tau": 4}, "unknown model argument 'var.tau'"),
        ("baseline", {"prtrained": "x"}, "unknown model argument 'prtrained': .* run are none"),
        ("gift", {"gift.layers": "8 - 10"}, "gift.layers: found '8 - 10', expected integers"),
        ("gift", {"gift.alpha": "much"}, "alpha: found 'much'"),
    ],
)
def test_wrong_arguments_are_explained(
    text: str | None, options: Mapping[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        build_methods(text, options)


def test_lists_are_written_with_plus() -> None:
    assert listed("12:0+3;14-20:*") == "12:0,3;14-20:*"
    assert (listed(12), listed(None)) == ("12", None)


def test_a_batch_size_is_a_whole_number() -> None:
    assert whole("batch_size", "8") == 8
    with pytest.raises(ValueError, match="batch_size: found 'auto', expected an integer"):
        whole("batch_size", "auto")


@pytest.mark.parametrize(
    ("asked", "settings", "ignored"),
    [
        ({}, GREEDY | {"max_new_tokens": 1024, "num_beams": 1}, []),
        ({"temperature": 0, "top_p": 0, "do_sample": False, "max_new_tokens": 9}, GREEDY, []),
        ({"temperature": 0, "do_sample": True}, GREEDY, []),
        ({"temperature": 0.7, "do_sample": False}, GREEDY, []),
        ({"num_beams": 5, "top_p": None}, GREEDY | {"num_beams": 5}, []),
        (
            {"temperature": 0.7, "top_p": 0.9},
            {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "top_k": 0},
            [],
        ),
        ({"until": ["x"], "image_aspect_ratio": "pad"}, GREEDY, ["image_aspect_ratio"]),
    ],
)
def test_the_search_is_what_the_task_asks_for(
    asked: Mapping[str, Any], settings: Mapping[str, Any], ignored: list[str]
) -> None:
    made, left = answers.search(asked)
    assert {key: made[key] for key in settings} == settings
    assert made["max_new_tokens"] == asked.get("max_new_tokens", 1024)
    assert left == ignored


@pytest.mark.parametrize(
    ("until", "text"),
    [
        (None, "A cat.\n\nA dog. \n"),
        ([], "A cat.\n\nA dog. \n"),
        ("\n\n", "A cat."),
        (["dog", "."], "A cat"),
        (["", "dog"], "A cat.\n\nA"),
        (["zebra"], "A cat.\n\nA dog."),
    ],
)
def test_an_answer_ends_at_the_first_stop_text(until: Any, text: str) -> None:
    stops = answers.stops({"until": until})
    assert answers.cut(" A cat.\n\nA dog. \n", stops) == text.strip()


def test_batches_hold_one_kind_and_begin_with_what_is_long() -> None:
    kinds, lengths = ["b", "a", "b", "b", "a", "b"], [3, 9, 5, 4, 2, 5]
    assert answers.batches(kinds, lengths, 3) == [[2, 5, 3], [0], [1, 4]]
    assert answers.batches([], [], 3) == []


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return tiny.llava().eval()


@pytest.fixture(scope="module")
def processor() -> Any:
    return tiny.processor()


def ask(text: str, image: int | None) -> list[dict[str, Any]]:
    """A conversation as lmms-eval hands it over; `image` is the seed of its noise."""
    content: list[dict[str, Any]] = [{"type": "text", "text": text}]
    if image is not None:
        pixels = torch.Generator().manual_seed(image)
        noise = torch.randint(256, (32, 32, 3), generator=pixels, dtype=torch.uint8).numpy()
        content.insert(0, {"type": "image", "image": Image.fromarray(noise)})
    return [{"role": "user", "content": content}]


TALKS = [
    ask("Is there a dog ?", 0),
    ask("Is there a dog ?", None),
    ask("Please describe this image in detail.", 1),
    ask("red", 2),
]


@pytest.mark.parametrize("methods", [(), (GIFT(words="all"), VHR())], ids=["stock", "patched"])
@pytest.mark.filterwarnings("ignore:no published settings", "ignore:.*hold no image")
def test_a_batch_is_answered_in_order_and_as_one_by_one(
    model: Any, processor: Any, methods: Sequence[Any]
) -> None:
    settings, _ = answers.search({"max_new_tokens": 8})
    patch = wrap(model, *methods, processor=processor) if methods else None
    together = answers.answer(model, processor, TALKS, settings)
    alone = [answers.answer(model, processor, [talk], settings)[0] for talk in TALKS]
    if patch:
        patch.remove()
    assert together == alone
    assert len({answer.text for answer in alone}) == len(TALKS)


def test_a_video_is_refused(model: Any, processor: Any) -> None:
    talk = [{"role": "user", "content": [{"type": "video", "video": "a.mp4"}]}]
    with pytest.raises(ValueError, match=r"found video in a question: .* text and images only"):
        answers.answer(model, processor, [talk], {})


def test_a_model_is_loaded_ready_for_batches(model: Any, processor: Any, tmp_path: Any) -> None:
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    settings = {"revision": None, "trust_remote_code": False, "attn_implementation": None}
    loaded, read = answers.load(str(tmp_path), "cpu", None, dtype="bfloat16", **settings)
    assert (loaded.dtype, loaded.training) == (torch.bfloat16, False)
    assert (read.tokenizer.padding_side, read.tokenizer.pad_token) == ("left", "<pad>")
    (tmp_path / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match=r"has no chat template.* chat_template=\{\{ messages"):
        answers.load(str(tmp_path), "cpu", None, dtype="auto", **settings)
    _, given = answers.load(str(tmp_path), "cpu", None, "{{ bos_token }}", dtype="auto", **settings)
    assert given.chat_template == "{{ bos_token }}"


@pytest.mark.filterwarnings("ignore:no published settings", "ignore:.*hold no image")
def test_on_a_device_of_its_own(model: Any, processor: Any, tmp_path: Any) -> None:
    """Its tensors may not meet the CPU's."""
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loading = {"revision": None, "trust_remote_code": False, "attn_implementation": None}
    settings, _ = answers.search({"max_new_tokens": 6})

    def found(device: Any) -> Any:
        loaded, read = answers.load(str(tmp_path), device, None, dtype="float32", **loading)
        assert loaded.device == torch.device(device)
        with wrap(loaded, "gift", "vhr", processor=read):
            return answers.answer(loaded, read, TALKS, settings)

    expected = found("cpu")
    with second_device():
        assert found(FAR) == expected


@dataclass
class Request:
    """What lmms-eval hands over for one question."""

    args: tuple[Any, ...]


class Base:
    """As much of lmms-eval's own class of models as `VlmPatch` uses."""

    task_dict: dict[str, Any]

    def __init__(self) -> None:
        self.cache_hook = SimpleNamespace(add_partial=lambda *args: None)
        self._rank = 0

    @property
    def rank(self) -> int:
        return self._rank

    def clean(self) -> None:
        self.model = None


@pytest.fixture
def model_class(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """`VlmPatch`, on stand-ins for what it imports of lmms-eval, which is not installed here."""
    result = namedtuple("result", "text tokens")
    stand_ins = {
        "api.instance": {"GenerationResult": result, "TokenCounts": lambda output_tokens: None},
        "api.model": {"lmms": Base},
        "protocol": {
            "ChatMessages": lambda messages: SimpleNamespace(to_hf_messages=lambda: messages)
        },
    }
    for name, parts in stand_ins.items():
        module = f"lmms_eval.{name}"
        monkeypatch.setitem(sys.modules, module, SimpleNamespace(**parts))
    log = SimpleNamespace(info=lambda text: None, warning=lambda text: None)
    monkeypatch.setitem(sys.modules, "loguru", SimpleNamespace(logger=log))
    name = "vlm_patch.integrations.lmms_eval.model"
    monkeypatch.delitem(sys.modules, name, raising=False)
    yield importlib.import_module(name).VlmPatch
    sys.modules.pop(name, None)


@pytest.mark.parametrize("methods", ["baseline", "gift+vhr"])
def test_the_model_class_answers_on_another_device_as_on_the_cpu(
    model_class: Any, model: Any, processor: Any, tmp_path: Any, methods: str
) -> None:
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    wanted = {"max_new_tokens": 6, "until": ["\n\n"]}
    requests = [Request(("", list, wanted, i, "task", "test")) for i in range(len(TALKS))]

    def found(device: Any) -> list[str]:
        asked = model_class(str(tmp_path), methods, dtype="float32", device=device, batch_size=2)
        assert asked.device == torch.device(device)
        assert (asked.patch is not None) == (methods != "baseline")
        asked.task_dict = {"task": {"test": TALKS}}
        texts = [answer.text for answer in asked.generate_until(requests)]
        asked.clean()
        assert asked.patch is None
        return texts

    expected = found("cpu")
    assert len(set(expected)) == len(TALKS)
    with second_device():
        assert found(str(FAR)) == expected
