"""Answers of a tiny random LLaVA: batches, greedy search, and inputs that cannot be used."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import GenerationConfig, GenerationMixin

from eval.errors import EvalError
from eval.runs import batches, generate
from eval.runs.batches import BatchRunner
from eval.runs.config import from_settings
from eval.runs.samples import Sample
from eval.support import tiny
from tests.eval.conftest import Settings
from vlm_patch.models import chat

PROMPTS = (
    "Is there a dog ?",
    "Please describe this image in detail.",
    "What is on the table ?",
    "red",
)
LONG = 12


@pytest.fixture(scope="module")
def model() -> Any:
    """Greedy answers of this seed are of different lengths: some end, some are cut."""
    return tiny.llava().eval()


@pytest.fixture
def processor() -> Any:
    return generate.prepare(tiny.processor(), "tiny")


@pytest.fixture
def images(tmp_path: Path) -> list[Path]:
    paths = []
    for place in range(len(PROMPTS)):
        pixels = torch.Generator().manual_seed(place)
        noise = torch.randint(256, (32, 32, 3), generator=pixels, dtype=torch.uint8).numpy()
        paths.append(tmp_path / f"{place}.png")
        Image.fromarray(noise).save(paths[-1])
    return paths


@pytest.fixture
def samples(images: list[Path]) -> list[Sample]:
    return [
        Sample("chair", "test", str(place), image, prompt, {})
        for place, (image, prompt) in enumerate(zip(images, PROMPTS, strict=True))
    ]


def test_a_padded_batch_says_what_single_prompts_say(
    model: Any, processor: Any, samples: list[Sample]
) -> None:
    together = generate.ask(model, processor, samples, LONG)
    alone = [generate.ask(model, processor, [sample], LONG)[0] for sample in samples]
    assert together == alone
    assert len({answer.text for answer in together}) > 1


def test_prompts_are_padded_on_the_left_and_hold_one_image_each(
    processor: Any, samples: list[Sample]
) -> None:
    inputs = generate.encode(processor, samples)
    lengths = inputs["attention_mask"].sum(1)
    assert len(set(lengths.tolist())) > 1
    for mask, length in zip(inputs["attention_mask"], lengths, strict=True):
        assert mask.tolist() == [0] * (len(mask) - length) + [1] * int(length)
    assert (inputs["input_ids"] == tiny.IMAGE).sum(1).tolist() == [16] * len(samples)
    rendered = processor.tokenizer.decode(inputs["input_ids"][0][-int(lengths[0]) :])
    assert rendered.startswith("<s> USER : <image>")
    assert rendered.endswith("Is there a dog ? ASSISTANT :")


def test_length_counts_the_end_mark_and_cut_answers_are_not_ended(processor: Any) -> None:
    tokens = [10, 11, tiny.EOS, tiny.PAD, tiny.PAD]
    said = chat.response(processor.tokenizer, tokens, {tiny.EOS})
    assert (said.tokens, said.ended) == (3, True)
    cut = chat.response(processor.tokenizer, [10, 11, 12], {tiny.EOS})
    assert (cut.tokens, cut.ended) == (3, False)
    assert "</s>" not in said.text
    assert said.text == processor.tokenizer.decode([10, 11])


def test_the_limit_cuts_the_same_answer_short(
    model: Any, processor: Any, samples: list[Sample]
) -> None:
    (short,), (long,) = (generate.ask(model, processor, samples[:1], n) for n in (2, LONG))
    assert short.tokens == 2
    assert long.text.startswith(short.text)
    assert long.tokens > 2


def test_search_is_greedy_whatever_the_checkpoint_asks_for(
    processor: Any, samples: list[Sample]
) -> None:
    model = tiny.llava().eval()
    plain = generate.ask(model, processor, samples, LONG)
    model.generation_config.do_sample = True
    model.generation_config.temperature = 5.0
    model.generation_config.repetition_penalty = 3.0
    model.generation_config.num_beams = 2
    assert generate.ask(model, processor, samples, LONG) == plain


def test_a_missing_and_a_broken_image_are_named(
    processor: Any, samples: list[Sample], tmp_path: Path
) -> None:
    missing = replace(samples[1], image=tmp_path / "none.png")
    with pytest.raises(EvalError, match=r"sample chair test 1: no such image: .*none\.png"):
        generate.encode(processor, [samples[0], missing])
    (tmp_path / "broken.png").write_bytes(samples[0].image.read_bytes()[:200])
    broken = replace(samples[1], image=tmp_path / "broken.png")
    with pytest.raises(EvalError, match=r"chair test 1: .*broken\.png is not a readable image"):
        generate.encode(processor, [samples[0], broken])
    (tmp_path / "text.png").write_text("not an image")
    with pytest.raises(EvalError, match=r"text\.png is not a readable image"):
        generate.open_image(replace(samples[1], image=tmp_path / "text.png"))


def test_an_empty_prompt_is_named(processor: Any, samples: list[Sample]) -> None:
    with pytest.raises(EvalError, match="sample chair test 2: the prompt is empty"):
        generate.encode(processor, [samples[0], replace(samples[2], prompt=" ")])


def test_a_prompt_without_its_image_is_an_error(
    model: Any, processor: Any, samples: list[Sample]
) -> None:
    blind = {"input_ids": torch.tensor([[1, 20, tiny.IMAGE], [1, 20, 21]])}
    with pytest.raises(EvalError, match=r"chair test 1: the rendered prompt holds no image token"):
        generate._check_images(model, blind["input_ids"], samples[:2])
    processor.chat_template = "USER: {{ messages[0]['content'][1]['text'] }}"
    with pytest.raises(EvalError, match=r"sample chair test 0\b"):
        generate.ask(model, processor, samples[:2], 2)


def test_a_prompt_the_processor_refuses_is_named(processor: Any, samples: list[Sample]) -> None:
    processor.chat_template += (
        "{% if 'kites' in messages[0]['content'][1]['text'] %}{{ 'no' + 7 }}{% endif %}"
    )
    refused = replace(samples[1], prompt="What about kites?")
    with pytest.raises(EvalError, match=r"the processor cannot take sample chair test 1:"):
        generate.encode(processor, [samples[0], refused, samples[2]])


def test_an_image_the_processor_refuses_is_to_blame_and_no_other(
    model: Any, processor: Any, samples: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Qwen2-VL's does with a line, InternVL's with too many tiles: whatever error it is."""
    inner = type(processor.image_processor).__call__
    Image.new("RGB", (3, 32)).save(samples[1].image)

    def picky(self: Any, images: Any, *more: Any, **named: Any) -> Any:
        flat = [
            image for group in images for image in (group if isinstance(group, list) else [group])
        ]
        if any(min(image.size) < 4 for image in flat):
            raise ZeroDivisionError("division by zero")
        return inner(self, images, *more, **named)

    monkeypatch.setattr(type(processor.image_processor), "__call__", picky)
    reason = r"chair test 1: the processor cannot take .*1\.png: division by zero"
    with pytest.raises(generate.BrokenImageError, match=reason) as caught:
        generate.encode(processor, samples)
    assert caught.value.sample is samples[1]
    config = from_settings({"tasks": ["chair"], "chair": {"max_new_tokens": 3}, "batch_size": 4})
    (batch,) = batches.divide(samples, config)
    ((*found,),) = BatchRunner(model, processor, config).answer(batch)
    said = {sample.id: it for sample, it in found}
    assert isinstance(said.pop("1"), generate.BrokenImageError)
    others = [sample for sample in samples if sample.id != "1"]
    assert [said[sample.id] for sample in others] == generate.ask(model, processor, others, 3)


def test_the_chat_template_of_a_tokenizer_serves_a_processor_that_keeps_none() -> None:
    plain = tiny.processor()
    plain.tokenizer.chat_template, plain.chat_template = plain.chat_template, None
    assert generate.prepare(plain, "m").chat_template == tiny.processor().chat_template


def test_a_processor_without_chat_template_or_tokenizer_is_refused() -> None:
    bare = tiny.processor()
    bare.chat_template = None
    with pytest.raises(EvalError, match=r"model m: .* no chat template.*chat_template="):
        generate.prepare(bare, "m")
    assert generate.prepare(bare, "m", "{{ bos_token }}").chat_template == "{{ bos_token }}"
    bare.chat_template = None
    with pytest.raises(EvalError, match="model m: its processor has no tokenizer"):
        generate.prepare(object(), "m")


def test_a_model_is_loaded_from_its_folder(checkpoint: Path, settings: Settings) -> None:
    model, processor = generate.load_model(settings(dtype="bfloat16"))
    assert (model.dtype, model.device.type, model.training) == (torch.bfloat16, "cpu", False)
    assert processor.tokenizer.padding_side == "left"
    eager, _ = generate.load_model(settings(attn_implementation="eager", device=None))
    assert eager.config._attn_implementation == "eager"
    assert eager.dtype == torch.float32


def test_what_the_config_says_of_a_large_model_reaches_from_pretrained(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A recording stand-in: placing over several devices and quantisation cannot run here."""
    calls: list[tuple[str, dict[str, Any]]] = []
    placed: list[str] = []

    class Model:
        def eval(self) -> "Model":
            return self

        def to(self, device: str) -> "Model":
            placed.append(device)
            return self

        def parameters(self) -> list[Any]:
            return []

    def model(name: str, **given: Any) -> Model:
        calls.append((name, given))
        return Model()

    def processor(name: str, **given: Any) -> Any:
        calls.append((name, given))
        return tiny.processor()

    monkeypatch.setattr(generate.chat.MODELS, "from_pretrained", model)
    monkeypatch.setattr(generate.chat.PROCESSORS, "from_pretrained", processor)
    four_bit = {"load_in_4bit": True, "bnb_4bit_compute_dtype": "bfloat16"}
    source = {"revision": "v1.2", "trust_remote_code": True}
    spread = {"device_map": {"": 0}, "quantization": four_bit, "attn_implementation": "sdpa"}
    generate.load_model(
        settings(model="org/large", dtype="bfloat16", device=None, **source, **spread)
    )
    more = {"quantization_config": four_bit, "device_map": {"": 0}, "attn_implementation": "sdpa"}
    assert calls == [("org/large", source), ("org/large", {"dtype": "bfloat16", **source, **more})]
    calls.clear()
    generate.load_model(settings(model="org/large", device=None, tp_plan="auto"))
    plain = {"revision": None, "trust_remote_code": False}
    (_, first), (_, second) = calls
    assert first == plain
    where = second.pop("distributed_config", None)  # an argument of its own in transformers 4
    assert (second.pop("tp_plan") if where is None else where.tp_plan) == "auto"
    assert second == {"dtype": "float32", **plain}
    assert placed == [], "what from_pretrained placed is not moved"
    generate.load_model(settings(model="org/large", device="cpu"))
    assert placed == ["cpu"]


def test_a_quantisation_section_is_read_by_transformers_itself(
    settings: Settings, checkpoint: Path
) -> None:
    """The plain section becomes transformers' own config; its library is missing, and says so."""
    config = settings(quantization={"quant_method": "hqq", "nbits": 4}, device=None)
    with pytest.raises(EvalError, match=r"cannot be loaded .*HQQ"):
        generate.load_model(config)


def test_a_device_map_and_an_attention_implementation_act(settings: Settings) -> None:
    config = settings(device=None, device_map={"": "cpu"}, attn_implementation="eager")
    model, _ = generate.load_model(config)
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}
    assert model.config._attn_implementation == "eager"


def test_code_of_a_model_folder_runs_only_where_it_is_asked_for(
    settings: Settings, checkpoint: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "own"
    shutil.copytree(checkpoint, folder)
    about = json.loads((folder / "config.json").read_text())
    about |= {"model_type": "own_llava", "architectures": ["OwnModel"]}
    about["auto_map"] = {
        "AutoConfig": "own.OwnConfig",
        "AutoModelForImageTextToText": "own.OwnModel",
    }
    (folder / "config.json").write_text(json.dumps(about))
    (folder / "own.py").write_text(
        "from transformers import LlavaConfig, LlavaForConditionalGeneration\n"
        "class OwnConfig(LlavaConfig):\n    model_type = 'own_llava'\n"
        "class OwnModel(LlavaForConditionalGeneration):\n    config_class = OwnConfig\n"
    )
    with pytest.raises(EvalError, match=r"(?s)cannot be loaded .*trust_remote_code"):
        generate.load_model(settings(model=str(folder)))
    model, _ = generate.load_model(settings(model=str(folder), trust_remote_code=True))
    assert type(model).__name__ == "OwnModel"


def test_each_process_of_a_launch_has_its_own_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 4)
    monkeypatch.setenv("LOCAL_RANK", "5")
    monkeypatch.setattr(generate, "best_device", lambda: "cpu")
    assert generate.own_device() == "cpu"
    monkeypatch.setattr(generate, "best_device", lambda: "cuda")
    assert generate.own_device() == "cuda:1"
    monkeypatch.delenv("LOCAL_RANK")
    assert generate.own_device() == "cuda"


def test_a_model_that_is_not_there_is_explained(settings: Settings, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(EvalError, match=r"model .*empty cannot be loaded \(expected: pocket"):
        generate.load_model(settings(model=str(tmp_path / "empty")))


@pytest.mark.parametrize("own", [False, True], ids=["generates by itself", "leaves it to a part"])
def test_what_ends_an_answer_stands_with_who_writes_it(own: bool) -> None:
    """Llama 4 holds a language model that could generate, and InstructBLIP one that does."""

    class Writer(GenerationMixin):
        def __init__(self, end: int) -> None:
            self.generation_config = GenerationConfig(eos_token_id=end)

    class Asking(Writer):
        def generate(self, *_: Any, **__: Any) -> Any:
            return self.language_model.generate()

    model: Any = (Asking if own else Writer)(7)
    model.language_model = Writer(2)
    assert chat.end_tokens(model) == {2 if own else 7}
