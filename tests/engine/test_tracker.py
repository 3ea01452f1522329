"""Which key is image, question or text: the masks that a method is shown, forward by forward.

Prompts are written by hand, so the expected places are too. One LLaVA image is 16 tokens.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache

from eval.support import tiny
from vlm_patch import PatchError, wrap
from vlm_patch.method import ForwardContext, Method, State

MASKS = ("image", "query", "content", "valid", "text", "last", "seen")

pytestmark = pytest.mark.filterwarnings("ignore:No processor was given")


@dataclass(frozen=True, eq=False)
class Spy(Method):
    """Changes nothing and keeps every forward that it is shown."""

    name: ClassVar[str] = "spy"
    reads_question: ClassVar[bool] = True

    words: str | Tensor = "all"
    forwards: list[ForwardContext] = field(default_factory=list)

    def before_forward(self, forward: ForwardContext, state: State) -> None:
        masks = {name: getattr(forward, name).clone() for name in MASKS}
        self.forwards.append(replace(forward, **masks))


def run(
    model: nn.Module,
    batch: Mapping[str, Any],
    processor: Any = None,
    words: str | Tensor = "all",
    prompt: Mapping[str, Tensor] | None = None,
) -> ForwardContext:
    """What a method is shown of the prompt `batch`."""
    spy = Spy(words)
    with wrap(model, spy, processor=processor) as patch, patch.prompt(**(prompt or {})):
        model(**batch)
    (found,) = spy.forwards
    return found


def places(mask: Tensor) -> list[list[int]]:
    """The indices of each row [S] of a mask that are set."""
    return [row.nonzero().flatten().tolist() for row in mask]


def to(*bounds: int) -> list[int]:
    return [place for a, b in zip(bounds[::2], bounds[1::2], strict=True) for place in range(a, b)]


def masks(forward: ForwardContext) -> dict[str, list[list[int]]]:
    return {name: places(getattr(forward, name)) for name in MASKS[:-1]}


def test_one_image() -> None:
    model = tiny.llava()
    found = run(model, tiny.inputs(model, tiny.ONE_IMAGE))
    assert (found.position.past, found.reading, found.new) == (0, True, slice(0, 25))
    assert found.seen.tolist() == [True]
    assert masks(found) == {
        "image": [to(3, 19)],
        "query": [to(19, 25)],
        "content": [to(19, 25)],
        "valid": [to(0, 25)],
        "text": [to(19, 25)],
        "last": [[24]],
    }


def test_two_images_with_text_between() -> None:
    """The text between is text, but the question stands behind the last image."""
    model = tiny.llava()
    found = run(model, tiny.inputs(model, tiny.TWO_IMAGES))
    assert masks(found) == {
        "image": [to(2, 18, 21, 37)],
        "query": [to(37, 42)],
        "content": [to(37, 42)],
        "valid": [to(0, 42)],
        "text": [to(18, 21, 37, 42)],
        "last": [[41]],
    }


def test_left_padding_and_different_spans() -> None:
    model = tiny.llava()
    found = run(model, tiny.inputs(model, tiny.BATCH_OF_3))
    assert found.seen.tolist() == [True, True, True]
    assert masks(found) == {
        "image": [to(5, 21), to(1, 17), to(7, 23)],
        "query": [to(21, 27), to(17, 27), to(23, 27)],
        "content": [to(21, 27), to(17, 27), to(23, 27)],
        "valid": [to(2, 27), to(0, 27), to(2, 27)],
        "text": [to(21, 27), to(17, 27), to(23, 27)],
        "last": [[26], [26], [26]],
    }


def test_the_vision_end_marker_counts_without_a_processor() -> None:
    model = tiny.qwen2_vl()
    batch = tiny.inputs(model, tiny.ONE_IMAGE)
    assert batch["input_ids"][0, 20] == tiny.VISION_END
    found = run(model, batch)
    assert places(found.image) == [to(4, 20)]
    assert places(found.text) == [to(20, 27)]
    assert places(found.query) == [to(20, 27)]


def test_an_image_after_all_text() -> None:
    model = tiny.llava()
    found = run(model, tiny.inputs(model, [[tiny.BOS, 5, 6, 7, tiny.IMAGE]]))
    assert places(found.image) == [to(4, 20)]
    assert places(found.text) == places(found.query) == places(found.content) == [[]]
    assert places(found.last) == [[19]]
    assert found.seen.tolist() == [True]


def test_a_row_without_an_image() -> None:
    model = tiny.llava()
    rows = [[tiny.BOS, 30, 31, 32], *tiny.ONE_IMAGE]
    with pytest.warns(UserWarning, match="1 of 2 prompts hold no image"):
        found = run(model, tiny.inputs(model, rows))
    assert found.seen.tolist() == [False, True]
    assert places(found.valid) == [to(21, 25), to(0, 25)]
    assert places(found.image) == [[], to(3, 19)]
    assert places(found.text) == places(found.query) == [[], to(19, 25)]


def test_placeholders_in_a_forward_without_images_are_words() -> None:
    """As in a question about the token itself; and in generated text."""
    model, spy = tiny.llava(), Spy()
    batch = tiny.inputs(model, tiny.ONE_IMAGE)
    with wrap(model, spy):
        cache = model(**batch, use_cache=True).past_key_values
        model(input_ids=torch.tensor([[tiny.IMAGE]]), past_key_values=cache)
        model(input_ids=torch.tensor([[60, tiny.IMAGE, 61]]), past_key_values=cache)
    _, step, turn = spy.forwards
    assert places(step.image) == places(turn.image) == [to(3, 19)]
    assert places(step.text) == [[0]]
    assert places(turn.text) == [[0, 1, 2]]
    assert places(turn.query) == [[27, 28]]


def test_a_prompt_of_placeholders_without_pixels_holds_no_image() -> None:
    model, spy = tiny.llava(), Spy()
    batch = tiny.inputs(model, tiny.ONE_IMAGE)
    with wrap(model, spy), pytest.warns(UserWarning, match="1 of 1 prompts hold no image"):
        model(input_ids=batch["input_ids"])
    assert spy.forwards == []


@pytest.mark.parametrize("build", [tiny.llava, tiny.qwen2_vl])
def test_generated_tokens_are_text_and_no_question(build: Any) -> None:
    model, spy = build(), Spy()
    batch = tiny.inputs(model, tiny.BATCH_OF_3)
    with wrap(model, spy):
        model.generate(**batch, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    prompt, *steps = spy.forwards
    length = batch["input_ids"].shape[1]
    assert [step.position.past for step in steps] == [length, length + 1, length + 2]
    for count, step in enumerate(steps, start=1):
        assert not step.reading
        for name in ("image", "query", "content"):
            was, now = getattr(prompt, name), getattr(step, name)
            assert torch.equal(now, torch.nn.functional.pad(was, (0, count)))
        for name in ("text", "valid", "last"):
            assert getattr(step, name).tolist() == [[True]] * 3
        assert torch.equal(step.seen, prompt.seen)


# ---- later turns


def turns(
    model: nn.Module, first: Iterable[Sequence[int]], second: Tensor, **more: Any
) -> list[ForwardContext]:
    """A prompt, one generated token, and a second turn on the same cache."""
    spy = Spy()
    batch = tiny.inputs(model, list(first))
    mask = batch["attention_mask"]
    with wrap(model, spy), torch.no_grad():
        cache = model(**batch, use_cache=True).past_key_values
        for ids in (torch.full((len(mask), 1), 60), second):
            mask = torch.cat((mask, torch.ones_like(ids)), 1)
            last = {} if ids is not second else more
            model(input_ids=ids, attention_mask=mask, past_key_values=cache, **last)
    return spy.forwards


def test_a_second_turn_keeps_the_image_and_asks_anew() -> None:
    _, step, turn = turns(tiny.llava(), tiny.BATCH_OF_3, torch.tensor([[61, 70, 71]] * 3))
    assert (step.position.past, turn.position.past, turn.reading) == (27, 28, True)
    assert masks(turn) == {
        "image": [to(5, 21), to(1, 17), to(7, 23)],
        "query": [[29, 30]] * 3,  # the first of the new tokens ends the answer
        "content": [[29, 30]] * 3,
        "valid": [[0, 1, 2]] * 3,
        "text": [[0, 1, 2]] * 3,
        "last": [[2]] * 3,
    }


def test_an_image_in_the_second_turn() -> None:
    ids = torch.tensor([[61, 62, *[tiny.IMAGE] * 16, 63, 64]])
    model = tiny.llava()
    pixels = tiny.inputs(model, tiny.ONE_IMAGE, seed=3)["pixel_values"]
    *_, turn = turns(model, tiny.ONE_IMAGE, ids, pixel_values=pixels)
    assert places(turn.image) == [to(3, 19, 28, 44)]
    assert places(turn.query) == places(turn.content) == [[44, 45]]
    assert places(turn.text) == [to(0, 2, 18, 20)]


def test_a_first_image_in_the_second_turn() -> None:
    ids = torch.tensor([[61, 62, *[tiny.IMAGE] * 16, 63, 64]])
    model = tiny.llava()
    pixels = tiny.inputs(model, tiny.ONE_IMAGE, seed=3)["pixel_values"]
    with pytest.warns(UserWarning, match="1 of 1 prompts hold no image"):
        (turn,) = turns(model, [[tiny.BOS, 21, 22]], ids, pixel_values=pixels)
    assert places(turn.image) == [to(6, 22)]
    assert places(turn.text) == [[18, 19]]
    assert places(turn.query) == [[22, 23]]


# ---- with a processor


def chat(*texts: str, images: int = 1) -> list[dict[str, Any]]:
    """Turns of user and assistant in alternation; the images stand before the first text."""
    content = [[{"type": "text", "text": text}] for text in texts]
    content[0] = [{"type": "image"}] * images + content[0]
    roles = ["user", "assistant"] * len(texts)
    return [{"role": role, "content": part} for role, part in zip(roles, content, strict=False)]


def rendered(processor: Any, model: nn.Module, chats: list[list[dict[str, Any]]]) -> dict[str, Any]:
    texts = [processor.apply_chat_template(one, add_generation_prompt=True) for one in chats]
    count = sum(text.count("<image>") for text in texts)
    pixels = torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    texts = [text.replace("<image>", "<image>" * 16) for text in texts]
    ids = processor.tokenizer(texts, padding=True, return_tensors="pt")
    return {**ids, "pixel_values": pixels}


def words(processor: Any, batch: Mapping[str, Any], mask: Tensor) -> list[list[str]]:
    """The tokens under a mask, as text."""
    return [
        processor.tokenizer.convert_ids_to_tokens(ids[row].tolist())
        for ids, row in zip(batch["input_ids"], mask, strict=True)
    ]


def test_the_question_is_exactly_the_users_text_row_by_row() -> None:
    model, processor = tiny.llava(), tiny.processor()
    chats = [
        chat("Is there a dog in the image?"),
        chat("What is this"),
        chat("Describe", "a cat.", "how many dogs?", images=2),
    ]
    batch = rendered(processor, model, chats)
    found = run(model, batch, processor, words="content")
    assert words(processor, batch, found.query) == [
        ["Is", "there", "a", "dog", "in", "the", "image", "?"],
        ["What", "is", "this"],
        ["how", "many", "dog", "##s", "?"],
    ]
    assert words(processor, batch, found.content) == [
        ["dog", "image"],
        ["What", "is", "this"],  # no content word: the whole question
        ["many", "dog", "##s"],
    ]


def test_a_second_turn_on_a_cache_with_a_processor() -> None:
    model, processor, spy = tiny.llava(), tiny.processor(), Spy("content")
    first = chat("Is there a dog?")
    second = [*first, *chat("", "a dog", "What is red in this image?")[1:]]
    batch = rendered(processor, model, [first])
    with wrap(model, spy, processor=processor):
        cache = DynamicCache(config=model.config.get_text_config())
        model(**batch, past_key_values=cache)
        whole = rendered(processor, model, [second])
        new = whole["input_ids"][:, batch["input_ids"].shape[1] :]
        model(input_ids=new, past_key_values=cache)
    turn = spy.forwards[-1]
    assert words(processor, whole, turn.query) == [
        ["What", "is", "red", "in", "this", "image", "?"]
    ]
    assert words(processor, whole, turn.content) == [["red", "image"]]


def test_a_question_before_the_image_is_empty() -> None:
    model, processor = tiny.llava(), tiny.processor()
    parts = [{"type": "text", "text": "What is this?"}, {"type": "image"}]
    batch = rendered(processor, model, [[{"role": "user", "content": parts}]])
    found = run(model, batch, processor, words="content")
    assert places(found.query) == places(found.content) == [[]]
    assert found.seen.tolist() == [True]


def test_a_strange_prompt_warns_once_and_takes_all_text_after_the_image() -> None:
    model, processor, spy = tiny.llava(), tiny.processor(), Spy("all")
    batch = tiny.inputs(model, tiny.ONE_IMAGE)
    with wrap(model, spy, processor=processor), pytest.warns(UserWarning, match=r"^A|^1") as record:
        [model(**batch) for _ in range(2)]
    assert [str(item.message) for item in record] == [
        "A prompt does not follow the processor's chat template, so all text after the image "
        "counts as its question. Render prompts with processor.apply_chat_template, or give "
        "masks: patch.prompt(query=mask)."
    ]
    assert [places(forward.query) for forward in spy.forwards] == [[to(19, 25)]] * 2


def test_a_row_without_an_image_does_not_count_as_a_strange_prompt() -> None:
    model, processor, spy = tiny.llava(), tiny.processor(), Spy()
    batch = rendered(processor, model, [chat("What is this?"), chat("Is there a dog?", images=0)])
    with wrap(model, spy, processor=processor), pytest.warns(UserWarning, match=r"^A|^1") as record:
        model(**batch)
    assert [str(item.message) for item in record] == [
        "1 of 2 prompts hold no image: they run as in the stock model."
    ]
    assert words(processor, batch, spy.forwards[0].query) == [["What", "is", "this", "?"], []]


# ---- masks by hand


def hand(*bounds: int, length: int = 25) -> Tensor:
    mask = torch.zeros(1, length, dtype=torch.bool)
    mask[0, to(*bounds)] = True
    return mask


def test_masks_by_hand_take_the_place_of_what_is_derived() -> None:
    model = tiny.llava()
    batch = tiny.inputs(model, tiny.ONE_IMAGE)
    given = {"image": hand(4, 10), "query": hand(20, 22)}
    found = run(model, batch, prompt=given)
    assert places(found.image) == [to(4, 10)]
    assert places(found.query) == places(found.content) == [[20, 21]]
    assert places(found.text) == [to(10, 25)]
    only = run(model, batch, prompt={"query": hand(20, 22)})
    assert places(only.image) == [to(3, 19)]
    assert places(only.query) == [[20, 21]]
    only = run(model, batch, prompt={"image": hand(4, 10)})
    assert places(only.image) == [to(4, 10)]
    assert places(only.query) == [to(10, 25)]


def test_a_question_by_hand_holds_no_image_token_and_nothing_before_the_image() -> None:
    model = tiny.llava()
    batch = tiny.inputs(model, tiny.ONE_IMAGE)
    found = run(model, batch, prompt={"query": hand(0, 4, 18, 21)})
    assert places(found.query) == [[19, 20]]


def test_content_by_hand() -> None:
    model = tiny.llava()
    batch = tiny.inputs(model, tiny.ONE_IMAGE)
    found = run(model, batch, words=hand(0, 4, 22, 24))
    assert places(found.query) == [to(19, 25)]
    assert places(found.content) == [[22, 23]]


def test_masks_by_hand_are_repeated_for_beams_and_return_sequences() -> None:
    model = tiny.llava()
    batch = tiny.inputs(model, tiny.BATCH_OF_3)
    query = torch.zeros(3, 27, dtype=torch.bool)
    for row, place in enumerate((22, 24, 25)):
        query[row, place] = True
    for ways in (
        {"num_beams": 2},
        {"num_beams": 2, "num_return_sequences": 2},
        {"do_sample": True, "num_return_sequences": 2},
    ):
        spy = Spy()
        with wrap(model, spy) as patch, patch.prompt(query=query):
            model.generate(**batch, max_new_tokens=1, **ways)
        assert places(spy.forwards[0].query) == [[22], [22], [24], [24], [25], [25]]


def _fail(module: nn.Module, args: object) -> None:
    raise ZeroDivisionError


def test_nested_prompts_end_where_they_began() -> None:
    model, spy = tiny.llava(), Spy()
    batch = tiny.inputs(model, tiny.ONE_IMAGE)
    with wrap(model, spy) as patch:
        with patch.prompt(query=hand(20, 21)):
            fail = model.lm_head.register_forward_pre_hook(_fail)
            with pytest.raises(ZeroDivisionError), patch.prompt(query=hand(22, 23)):
                model(**batch)
            fail.remove()
            model(**batch)
        model(**batch)
    assert [places(forward.query) for forward in spy.forwards] == [[[22]], [[20]], [to(19, 25)]]


def test_inputs_embeds_with_masks_by_hand() -> None:
    model, spy = tiny.llava(), Spy()
    batch = tiny.inputs(model, tiny.ONE_IMAGE)
    embeds = model.get_input_embeddings()(batch["input_ids"])
    with wrap(model, spy) as patch:
        with pytest.raises(PatchError, match="cannot be told"):
            model(inputs_embeds=embeds)
        with patch.prompt(image=hand(3, 19), query=hand(20, 22)):
            model(inputs_embeds=embeds)
    (found,) = spy.forwards
    assert places(found.image) == [to(3, 19)]
    assert places(found.query) == [[20, 21]]
