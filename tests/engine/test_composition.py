"""The settled points of how methods go together, one after the other."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, ClassVar

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import vlm_patch
from eval.support import tiny
from eval.support.agreement import DIMS, TAU, answer_logits, generated, ours, planted, reference
from eval.support.reference import logits, trace
from eval.support.tiny_text import VISION_END
from tests.support.agreement import NO_PROCESSOR, error, generate
from tests.support.examples import places
from vlm_patch import GIFT, VAR, VHR
from vlm_patch.method import ForwardContext, Method, State

pytestmark = pytest.mark.filterwarnings(NO_PROCESSOR)
EXACT = 1e-10


@cache
def model_of(kind: str = "llava") -> nn.Module:
    return tiny.float64(planted(kind))


def batch_of(model: nn.Module, rows: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    batch = tiny.inputs(model, rows)
    batch["pixel_values"] = batch["pixel_values"].to(model.dtype)
    return batch


def prefill(model: nn.Module, batch: dict[str, Tensor], **options: Any) -> Any:
    with torch.no_grad():
        return model(**batch, **options)


# ---- 1: the map is that of a pass with GIFT off and every other method on


@contextmanager
def passes_of(model: nn.Module) -> Iterator[list[tuple[int, int]]]:
    """Samples and rows of every pass through the decoder's first block."""
    seen: list[tuple[int, int]] = []

    def count(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        seen.append(tuple(hidden.shape[:2]))

    block = model.model.language_model.layers[0]
    handle = block.register_forward_pre_hook(count, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["var"], [25]),
        (["gift"], [25]),
        (["var", "gift"], [25]),
        (["gift-inside"], [25, 1]),
        (["var", "gift-inside"], [25, 1]),
        (["vhr"], [34]),
        (["vhr", "gift"], [34]),
        (["gift-inside", "vhr"], [9, 25, 25]),
    ],
    ids=str,
)
def test_1_as_few_passes_as_give_the_map(names: list[str], expected: list[int]) -> None:
    """One prefill where the saliency layer lies below the enhanced ones; else the last token as a
    step of its own; a whole first pass with VHR. 9 rows: VHR's prompt without its 16 image tokens,
    behind the prompt's own where that is read once.
    """
    model = model_of()
    batch = batch_of(model, tiny.ONE_IMAGE)
    with vlm_patch.wrap(model, *ours(names)), passes_of(model) as passes:
        prefill(model, batch)
        assert passes == [(1, rows) for rows in expected]


def test_1_vhr_chooses_anew_with_gift_on() -> None:
    """Somewhere the heads differ between the map's pass and the one that answers."""
    model, names = model_of(), ("gift-inside", "vhr")
    batch = batch_of(model, tiny.MIXED_BATCH)
    differ = 0
    for sample in tiny.samples(model, batch):
        alone, together = (trace(model, sample, reference(part)) for part in (names[1:], names))
        differ += any(not torch.equal(alone.chosen[k], together.chosen[k]) for k in (1, 2, 3))
    assert differ > 0
    with vlm_patch.wrap(model, *ours(names)):
        output = generate(model, batch)
    assert error(model, batch, output, names) <= EXACT


# ---- 2: what the methods before leave


def test_2_choices_are_made_on_what_the_methods_before_leave() -> None:
    model = model_of()
    batch = batch_of(model, tiny.MIXED_BATCH)
    found = {}
    for names in (("var", "gift"), ("gift", "var")):
        with vlm_patch.wrap(model, *ours(names)):
            found[names] = prefill(model, batch).logits[:, -1]
        for row, sample in enumerate(tiny.samples(model, batch)):
            expected = logits(model, sample, reference(names))[-1]
            torch.testing.assert_close(found[names][row], expected, rtol=0, atol=1e-5)
    first, second = found.values()
    assert ((first - second).abs().amax(1) > 1e-2).all()


def test_2_the_place_of_vhr_does_not_matter() -> None:
    """It scales outputs, and all weights are edited before any output."""
    model = model_of()
    batch = batch_of(model, tiny.BATCH_OF_3)
    found = []
    for names in (("vhr", "var", "gift"), ("var", "vhr", "gift"), ("var", "gift", "vhr")):
        with vlm_patch.wrap(model, *ours(names)):
            found.append(prefill(model, batch).logits)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


# ---- 3: generated tokens, and beams


def answer_steps(model: nn.Module, batch: dict[str, Tensor], answer: Tensor) -> Tensor:
    """Logits `[B, n + 1, V]` of the prompt's last row and of a forced answer `[B, n]`."""
    output = prefill(model, batch)
    found = [output.logits[:, -1]]
    for token in answer.split(1, 1):
        output = prefill(model, {"input_ids": token}, past_key_values=output.past_key_values)
        found.append(output.logits[:, -1])
    return torch.stack(found, 1)


@pytest.mark.parametrize("name", ["var", "var-release"])
def test_3_only_the_paper_tests_generated_tokens(name: str) -> None:
    model = model_of()
    batch = batch_of(model, tiny.ONE_IMAGE)
    answer = torch.tensor([[60, tiny.SINK_WORD, 61, 62]])
    with vlm_patch.wrap(model, *ours([name])):
        found = answer_steps(model, batch, answer)[0]
    (sample,) = tiny.samples(model, batch, answer)
    seen = trace(model, sample, reference([name]))
    end = sample.turns[0].end
    assert bool(seen.sinks[2][end + 1]) == (name == "var")
    torch.testing.assert_close(found, seen.run.logits[end - 1 :], rtol=0, atol=EXACT)


def test_3_flags_follow_the_cache() -> None:
    """Two beams of one prompt, of which one holds a sink word, change places."""
    model, names = model_of(), ("var", "gift", "vhr")
    batch = batch_of(model, [*tiny.ONE_IMAGE, *tiny.ONE_IMAGE])
    batch["pixel_values"][1] = batch["pixel_values"][0]
    first, second = torch.tensor([[tiny.SINK_WORD], [60]]), torch.tensor([[61], [62]])
    with vlm_patch.wrap(model, *ours(names)):
        cache = prefill(model, batch).past_key_values
        prefill(model, {"input_ids": first}, past_key_values=cache)
        cache.reorder_cache(torch.tensor([1, 0]))
        found = prefill(model, {"input_ids": second}, past_key_values=cache).logits[:, -1]
    answers = torch.cat([first.flip(0), second], 1)
    for row, sample in enumerate(tiny.samples(model, batch, answers)):
        expected = logits(model, sample, reference(names))[-1]
        torch.testing.assert_close(found[row], expected, rtol=0, atol=EXACT)


# ---- 4: what the question is


class Spy(Method):
    """Edits nothing; keeps the masks that a method is shown."""

    name: ClassVar[str] = "spy"
    reads_question: ClassVar[bool] = True

    def __init__(self, words: str | Tensor = "all") -> None:
        object.__setattr__(self, "words", words)
        self.query: list[list[int]] = []
        self.content: list[list[int]] = []

    def before_forward(self, forward: ForwardContext, state: State) -> None:
        if forward.reading:
            self.query = [places(row) for row in forward.query]
            self.content = [places(row) for row in forward.content]


def test_4_without_a_processor_all_text_after_the_last_image() -> None:
    """Up to and including the last token; text between images is out."""
    model, spy = model_of(), Spy()
    batch = batch_of(model, tiny.MIXED_BATCH)
    with vlm_patch.wrap(model, spy), pytest.warns(UserWarning, match="No processor was given"):
        prefill(model, batch)
    length = batch["input_ids"].shape[1]
    assert spy.query == [list(range(length - n, length)) for n in (6, 10, 4, 5)]
    assert spy.content == spy.query


def test_4_markers_around_the_image_count() -> None:
    model, spy = model_of("qwen2-vl"), Spy()
    batch = batch_of(model, tiny.ONE_IMAGE)
    with vlm_patch.wrap(model, spy):
        prefill(model, batch)
    ids = batch["input_ids"][0].tolist()
    assert spy.query == [list(range(ids.index(VISION_END), len(ids)))]


def asked(processor: Any, *texts: str) -> dict[str, Tensor]:
    """A left-padded batch of one-image prompts by the chat template."""
    prompts = [
        processor.apply_chat_template(
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}],
            add_generation_prompt=True,
        )
        for text in texts
    ]
    picture = Image.new("RGB", (32, 32), (200, 30, 30))
    return dict(
        processor(images=[[picture]] * len(texts), text=prompts, padding=True, return_tensors="pt")
    )


QUESTIONS = ("Is there a dog in the image ?", "Please describe this image in detail .")


def words_at(processor: Any, ids: Tensor, where: list[list[int]]) -> list[str]:
    tokenizer = processor.tokenizer
    return [
        " ".join(tokenizer.convert_ids_to_tokens(row[picked]))
        for row, picked in zip(ids, where, strict=True)
    ]


@pytest.mark.parametrize(
    ("words", "content"),
    [
        ("content", ["dog image", "describe image detail"]),
        ("all", [*QUESTIONS]),
    ],
)
def test_4_with_a_processor_exactly_the_last_user_text(words: str, content: list[str]) -> None:
    model, processor, spy = planted("llava"), tiny.processor(), Spy(words)
    batch = asked(processor, *QUESTIONS)
    with vlm_patch.wrap(model, spy, processor=processor), warnings.catch_warnings():
        warnings.simplefilter("error")
        prefill(model, batch)
    assert words_at(processor, batch["input_ids"], spy.query) == [*QUESTIONS]
    assert words_at(processor, batch["input_ids"], spy.content) == content


def test_4_the_last_of_several_turns_is_the_question() -> None:
    model, processor, spy = planted("llava"), tiny.processor(), Spy("content")
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTIONS[0]}]},
        {"role": "assistant", "content": [{"type": "text", "text": "there is a cat ."}]},
        {"role": "user", "content": [{"type": "text", "text": "What is red ?"}]},
    ]
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    picture = Image.new("RGB", (32, 32), (200, 30, 30))
    batch = dict(processor(images=[picture], text=[text], return_tensors="pt"))
    with vlm_patch.wrap(model, spy, processor=processor):
        prefill(model, batch)
    assert words_at(processor, batch["input_ids"], spy.query) == ["What is red ?"]
    assert words_at(processor, batch["input_ids"], spy.content) == ["red"]


@pytest.mark.parametrize("words", ["content", "all"])
def test_4_gift_with_a_processor_equals_the_reference_with_those_masks(words: str) -> None:
    model, processor = model_of(), tiny.processor()
    batch = asked(processor, *QUESTIONS)
    batch["pixel_values"] = batch["pixel_values"].double()
    query, content = torch.zeros(2, *batch["input_ids"].shape, dtype=torch.bool)
    spy = Spy(words)
    with vlm_patch.wrap(model, spy, processor=processor):
        prefill(model, batch)
    for row in range(2):
        query[row, spy.query[row]], content[row, spy.content[row]] = True, True
    with vlm_patch.wrap(
        model, GIFT(3.0, saliency_layer=1, layers=(2, 3), words=words), processor=processor
    ):
        output = generate(model, batch)
    assert error(model, batch, output, ["gift"], query=query, content=content) <= EXACT


# ---- 5: switched-off heads count, and stay stock


@contextmanager
def head_outputs(model: nn.Module, layer: int) -> Iterator[list[Tensor]]:
    """What the output projection of a layer is given, `[B, S, H, D]`."""
    seen: list[Tensor] = []
    projection = model.model.language_model.layers[layer].self_attn.o_proj
    handle = projection.register_forward_pre_hook(
        lambda module, args: seen.append(args[0].detach().unflatten(-1, (4, -1)))
    )
    try:
        yield seen
    finally:
        handle.remove()


def outputs_at(model: nn.Module, batch: dict[str, Tensor], layer: int, *wrapped: Any) -> Tensor:
    """Head outputs of the last pass over the prompt, with `wrapped` = method and heads."""
    with head_outputs(model, layer) as seen:
        if wrapped:
            with vlm_patch.wrap(model, wrapped[0], heads=wrapped[1]):
                prefill(model, batch)
        else:
            prefill(model, batch)
    return seen[-1]


@pytest.mark.parametrize("name", ["var", "var-release", "gift", "vhr"])
@pytest.mark.parametrize("head", range(4))
def test_5_one_head_on_changes_its_slice_as_if_all_were_on(name: str, head: int) -> None:
    model = model_of()
    batch = batch_of(model, tiny.MIXED_BATCH)
    (method,) = ours([name])
    stock = outputs_at(model, batch, 2)
    everything = outputs_at(model, batch, 2, method, {2: "*"})
    alone = outputs_at(model, batch, 2, method, {2: [head]})
    others = [other for other in range(4) if other != head]
    assert torch.equal(alone[:, :, others], stock[:, :, others])
    assert torch.equal(alone[:, :, head], everything[:, :, head])
    assert not torch.equal(everything, stock)


@pytest.mark.parametrize("names", [["var"], ["gift"], ["vhr"], ["var", "gift-inside", "vhr"]])
def test_5_every_head_off_is_stock_bit_for_bit(names: list[str]) -> None:
    model = planted("llava")
    batch = tiny.inputs(model, tiny.MIXED_BATCH)
    stock = generate(model, batch)
    with vlm_patch.wrap(model, *ours(names)) as patch:
        for table in patch.heads.values():
            table[:] = False
        output = generate(model, batch)
    assert torch.equal(torch.stack(output.logits), torch.stack(stock.logits))


# ---- 6: one meaning of the numbers


def test_6_both_semantics_move_the_same_share_by_the_same_ratio() -> None:
    """In a layer with image sinks and clear scores, a prompt comes out alike."""
    model = model_of()
    batch = batch_of(model, tiny.MIXED_BATCH)
    stock = prefill(model, batch).logits
    for options in ({}, {"move_fraction": 0.3}, {"rho_nonsink": 0.2}, {"move_fraction": 1.0}):
        found = []
        for semantics in ("paper", "release"):
            method = VAR(tau=TAU, dims=DIMS, semantics=semantics, **options)
            with vlm_patch.wrap(model, method, layers=[2]):
                found.append(prefill(model, batch).logits)
        torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-4)
        assert (found[0] - stock).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("options", "layers"),
    [
        ({}, "0-2"),
        ({"semantics": "release"}, "2"),
        ({"semantics": "release", "first_layer": 1}, "2"),
        ({"first_layer": 1, "exclude_last_layer": False}, "1-3"),
    ],
    ids=str,
)
def test_6_the_first_layer(options: dict[str, Any], layers: str) -> None:
    with vlm_patch.wrap(model_of(), VAR(tau=TAU, dims=DIMS, **options)) as patch:
        assert patch.describe().endswith(f": on in layers {layers}")


# ---- 7: masks by hand


@pytest.mark.filterwarnings("ignore:GIFT leaves")
@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}])
def test_7_masks_are_repeated_for_beams(options: dict[str, int]) -> None:
    """One prompt of the three has no question by these masks: GIFT leaves its beams alone."""
    model, names = model_of(), ("var", "gift", "vhr")
    batch = batch_of(model, tiny.BATCH_OF_3)
    query = (batch["input_ids"] >= 21) & (batch["input_ids"] < 39)
    words = torch.isin(batch["input_ids"], torch.tensor([22, 25, 32, 36, 7]))
    methods = [
        GIFT(3.0, saliency_layer=1, layers=(2, 3), words=words) if isinstance(m, GIFT) else m
        for m in ours(names)
    ]
    with vlm_patch.wrap(model, *methods) as patch, patch.prompt(query=query):
        output = generate(model, batch, output_scores=True, length_penalty=0.0, **options)
    kept = options.get("num_return_sequences", 1)
    new = generated(batch, output)
    for offset in range(kept):
        own = new[offset::kept]
        samples = tiny.samples(model, batch, own, query=query, content=words)
        predicted = answer_logits(model, samples, names).log_softmax(-1)
        expected = predicted.gather(2, own[..., None])[..., 0].sum(1)
        found = output.sequences_scores[offset::kept].double()
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_7_a_question_before_the_image_is_left_alone_and_said() -> None:
    """specs/gift.md, decision 17: no gaze can shift over an image that comes later."""
    model = model_of()
    batch = batch_of(model, tiny.BATCH_OF_3)
    stock = generate(model, batch)
    query = torch.isin(batch["input_ids"], torch.tensor([5, 6, 8, 9, 33]))  # 33: in the second
    with (
        vlm_patch.wrap(model, *ours(["gift"])) as patch,
        patch.prompt(query=query),
        pytest.warns(UserWarning, match="GIFT leaves 2 of 3 prompts as they are"),
    ):
        output = generate(model, batch)
    found, plain = torch.stack(output.logits, 1), torch.stack(stock.logits, 1)
    assert [torch.equal(found[row], plain[row]) for row in range(3)] == [True, False, True]
    assert error(model, batch, output, ["gift"], query=query) <= EXACT


# ---- 8: a second turn


def test_8_a_second_turn_reads_a_new_map_and_no_new_heads() -> None:
    """Values are compared in test_generation.py; here, that VHR does not look again."""
    model = model_of()
    batch = batch_of(model, tiny.ONE_IMAGE)
    question = {"input_ids": torch.tensor([[60, 70, 71, 72]])}
    with vlm_patch.wrap(model, *ours(["gift-inside", "vhr"])), passes_of(model) as passes:
        cache = prefill(model, batch).past_key_values
        prefill(model, {"input_ids": torch.tensor([[61]])}, past_key_values=cache)
        del passes[:]
        prefill(model, question, past_key_values=cache)
        assert passes == [(1, 4), (1, 1)]
        assert cache.get_seq_length() == 30


def test_8_the_new_question_is_found_behind_the_answer() -> None:
    """With a processor, on the cache of `generate`: only the new tokens reach the model."""
    model, processor, spy = planted("llava"), tiny.processor(), Spy("content")
    batch = asked(processor, QUESTIONS[0])
    tokens = processor.tokenizer("</s>USER: What is red ? ASSISTANT:", add_special_tokens=False)
    with vlm_patch.wrap(model, spy, *ours(["var", "gift"]), processor=processor):
        first = generate(model, batch, steps=4)
        ids = torch.cat([first.sequences, torch.tensor([tokens["input_ids"]])], 1)
        again = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        with passes_of(model) as passes:
            generate(model, again | {"past_key_values": first.past_key_values}, steps=1)
    assert words_at(processor, ids, spy.query) == ["What is red ?"]
    assert words_at(processor, ids, spy.content) == ["red"]
    assert passes == [(1, 1 + len(tokens["input_ids"]))]


# ---- 9: bounds (each value in tests/methods), and no method twice


@pytest.mark.parametrize(
    "methods", [(VAR(), VAR()), (VAR(), "var"), ("var", VHR(), "var")], ids=["", "name", "apart"]
)
def test_9_the_same_method_twice(methods: tuple[Any, ...]) -> None:
    with pytest.raises(ValueError, match="var was given twice: one instance of each"):
        vlm_patch.wrap(model_of(), *methods)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: VAR(dims=(64,)), "VAR dims: found 64, but this model has only 0 to 63"),
        (lambda: VHR(layers=(4,)), "VHR layers: found 4, but this model has only 0 to 3"),
        (lambda: GIFT(layers=(9,)), "GIFT layers: found 9, but this model has only 0 to 3"),
        (lambda: GIFT(saliency_layer=4), "GIFT saliency_layer: found 4, but this model has only"),
        (lambda: VAR(first_layer=4), "VAR first_layer: found 4, but this model has only 0 to 3"),
    ],
)
def test_9_values_that_this_model_does_not_have(make: Callable[[], Any], message: str) -> None:
    model = model_of()
    with pytest.raises(ValueError, match=message):
        vlm_patch.wrap(model, make())
    vlm_patch.wrap(model, VAR(tau=TAU, dims=DIMS)).remove()  # nothing was left behind


# ---- 10: prompts without an image (rows of a batch: test_generation.py)


def test_10_is_said_once_however_many_prompts() -> None:
    model = model_of()
    text = torch.tensor([[tiny.BOS, 5, 6, 21]])
    with (
        vlm_patch.wrap(model, *ours(["var", "gift", "vhr"])),
        warnings.catch_warnings(record=True) as said,
    ):
        warnings.simplefilter("always")
        for _ in range(3):
            prefill(model, {"input_ids": text})
            prefill(model, batch_of(model, tiny.ONE_IMAGE))
    messages = [str(warning.message) for warning in said]
    assert sum("hold no image" in message for message in messages) == 1
