"""Questions behind a cached image: equal to reading all anew, or refused."""

import copy
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import DynamicCache, StaticCache

from eval.support import tiny
from eval.support.agreement import ours, planted
from tests.support.agreement import NO_PROCESSOR
from vlm_patch import GIFT, VAR, VHR, PatchError, wrap

pytestmark = pytest.mark.filterwarnings(NO_PROCESSOR)
CLOSE = 5e-6
INSIDE = GIFT(3.0, beta=1.2, saliency_layer=2, layers=(1, 2, 3))
BELOW = GIFT(3.0, saliency_layer=1, layers=(2, 3))
SINKS = VAR(tau=3.0, dims=tiny.SINK_DIMS)
QUESTION = "What are the dogs near the table ?"


@cache
def model_of(kind: str) -> nn.Module:
    return planted(kind)


def plain(model: nn.Module) -> dict[str, Tensor]:
    return tiny.inputs(model, tiny.ONE_IMAGE)


def chat(question: str = QUESTION) -> dict[str, Any]:
    """A prompt by the chat template; a line feed stands between the image and the question."""
    pixels = torch.arange(32 * 32 * 3).remainder(251).view(32, 32, 3).byte().numpy()
    content = [{"type": "image", "image": Image.fromarray(pixels)}]
    message = {"role": "user", "content": [*content, {"type": "text", "text": question}]}
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    processor = tiny.processor()
    return dict(processor.apply_chat_template([message], add_generation_prompt=True, **options))


def end_of_image(batch: dict[str, Tensor]) -> int:
    return int((batch["input_ids"][0] == tiny.IMAGE).nonzero()[-1]) + 1


def cut(batch: dict[str, Tensor], end: int) -> dict[str, Tensor]:
    per_token = ("input_ids", "attention_mask", "mm_token_type_ids")
    return {name: v[:, :end] if name in per_token else v for name, v in batch.items()}


def without_image(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: v for k, v in batch.items() if k not in ("pixel_values", "image_grid_thw")}


def answer(model: nn.Module, batch: dict[str, Any], **options: Any) -> Tensor:
    """Logits `[batch, 4, V]` of the answer."""
    settings = {"do_sample": False, "max_new_tokens": 4, "min_new_tokens": 4} | options
    asked = {"return_dict_in_generate": True, "output_logits": True, "pad_token_id": tiny.PAD}
    settings["suppress_tokens"] = [tiny.IMAGE, tiny.VIDEO]
    return torch.stack(model.generate(**batch, **settings, **asked).logits, 1)


def prefix(model: nn.Module, batch: dict[str, Tensor], end: int, known: Any = None) -> Any:
    known = DynamicCache(config=model.config.get_text_config()) if known is None else known
    with torch.no_grad():
        model(**cut(batch, end), past_key_values=known, use_cache=True)
    return known


def check_everywhere(
    model: nn.Module, batch: dict[str, Tensor], methods: Sequence[Any], processor: Any = None
) -> None:
    """The prompt cut behind each token from the image on; two answers on copies of each cache."""
    with wrap(model, *methods, processor=processor):
        expected = answer(model, batch)
        for end in range(end_of_image(batch), batch["input_ids"].shape[1]):
            known = prefix(model, batch, end)
            for _ in range(2):
                behind = without_image(batch) | {"past_key_values": copy.deepcopy(known)}
                found = answer(model, behind)
                torch.testing.assert_close(found, expected, rtol=0, atol=CLOSE)


@pytest.mark.parametrize("methods", [(BELOW,), (INSIDE,), (SINKS, INSIDE)], ids=["1", "2", "3"])
@pytest.mark.parametrize("kind", ["llava", "qwen2-vl"])
def test_without_a_processor(kind: str, methods: Sequence[Any]) -> None:
    model = model_of(kind)
    check_everywhere(model, plain(model), methods)


@pytest.mark.parametrize("words", ["content", "all"])
@pytest.mark.parametrize("method", [BELOW, INSIDE], ids=["below", "inside"])
def test_with_a_processor_and_not_a_word_of_warning(method: GIFT, words: str) -> None:
    """Also cut inside a word, whose beginning alone is another word."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model, processor = model_of("llava"), tiny.processor()
        check_everywhere(model, chat(), (replace(method, words=words),), processor)


def test_the_release_of_var_finds_sinks_in_the_question_too() -> None:
    model = model_of("llava")
    batch = tiny.inputs(model, [[*tiny.ONE_IMAGE[0][:5], tiny.SINK_WORD, 22, 23]])
    check_everywhere(model, batch, ours(["var-release"]))


def test_raw_forwards_in_three_parts() -> None:
    """System text, image and half a question, the other half; the tails are read again in turn."""
    model = model_of("llava")
    batch = plain(model)
    end = end_of_image(batch)
    for method in (BELOW, INSIDE):
        with torch.no_grad(), wrap(model, method):
            expected = model(**batch).logits[:, -1]
            known = prefix(model, batch, end + 1)
            for first, last in ((end + 1, end + 3), (end + 3, None)):
                ids = batch["input_ids"][:, first:last]
                output = model(input_ids=ids, past_key_values=known)
            torch.testing.assert_close(output.logits[:, -1], expected, rtol=0, atol=CLOSE)


def test_a_question_of_one_token_in_generate() -> None:
    """A prompt cached but for its last token, as for every option of a choice."""
    model = model_of("llava")
    batch = tiny.inputs(model, [[*tiny.ONE_IMAGE[0][:4], 21]])
    check_everywhere(model, batch, (BELOW,))


def test_a_cache_that_is_cropped_and_used_again() -> None:
    """Without a copy; after a forward of the prefix, or after a whole prompt of generate."""
    model, processor = model_of("llava"), tiny.processor()
    first, second = chat(), chat("How many cats are in the image ?")
    end = end_of_image(first)
    with wrap(model, INSIDE, processor=processor):
        expected = [answer(model, batch) for batch in (first, second)]
        known = prefix(model, first, end)
        for batch, wanted in zip((first, second, first), (*expected, expected[0]), strict=True):
            found = answer(model, without_image(batch) | {"past_key_values": known})
            torch.testing.assert_close(found, wanted, rtol=0, atol=CLOSE)
            known.crop(end - known.get_seq_length())
        anew = DynamicCache(config=model.config.text_config)
        answer(model, first | {"past_key_values": anew})
        anew.crop(end - anew.get_seq_length())
        found = answer(model, without_image(second) | {"past_key_values": anew})
        torch.testing.assert_close(found, expected[1], rtol=0, atol=CLOSE)
        anew.crop(end + 2 - anew.get_seq_length())
        with pytest.raises(PatchError, match="ends 2 tokens behind the image"):
            answer(model, without_image(first) | {"past_key_values": anew})


def test_a_prefix_that_generate_read() -> None:
    """At the image it goes on; behind it that is refused, if the template shows that it should."""
    model, processor, batch = model_of("llava"), tiny.processor(), chat()
    end = end_of_image(batch)
    with wrap(model, BELOW, processor=processor), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = answer(model, batch)
        for place in (end, end + 1):
            known = DynamicCache(config=model.config.text_config)
            model.generate(**cut(batch, place), past_key_values=known, max_new_tokens=1)
            behind = without_image(batch) | {"past_key_values": known}
            if place == end:
                torch.testing.assert_close(answer(model, behind), expected, rtol=0, atol=CLOSE)
            else:
                with pytest.raises(PatchError, match="Cut the prompt right behind the last image"):
                    answer(model, behind)


def test_a_static_cache() -> None:
    model, batch = model_of("llava"), plain(model_of("llava"))
    end = end_of_image(batch)

    def known(place: int) -> Any:
        kept = StaticCache(config=model.config.text_config, max_cache_len=64)
        return without_image(batch) | {"past_key_values": prefix(model, batch, place, kept)}

    with wrap(model, BELOW):
        expected = answer(model, batch)
        torch.testing.assert_close(answer(model, known(end)), expected, rtol=0, atol=CLOSE)
        with pytest.raises(PatchError, match="ends 1 tokens behind the image"):
            answer(model, known(end + 1))


def test_vhr_is_refused_with_the_reason() -> None:
    model, batch = model_of("llava"), plain(model_of("llava"))
    with wrap(model, VHR(layers=(1, 2, 3))) as patch:
        known = prefix(model, batch, end_of_image(batch))
        behind = without_image(batch) | {"past_key_values": known}
        with pytest.raises(PatchError) as caught:
            answer(model, behind)
        with patch.disabled():
            answer(model, behind)
    assert str(caught.value) == (
        "vhr chooses its heads by the last row of the prompt and amplifies them in all rows "
        "before it, of which 19 are cached already: give the whole prompt, with its image, without "
        'a cache, or generate inside `with patch.disabled("vhr"):` (before a new turn, feed the '
        "answer token by token)"
    )


def test_vhr_keeps_its_heads_for_the_image_of_a_later_turn_and_says_so() -> None:
    model, processor = model_of("llava"), tiny.processor()
    batch = chat()
    with torch.no_grad(), wrap(model, VHR(layers=(1, 2, 3)), processor=processor):
        known = DynamicCache(config=model.config.text_config)
        answer(model, batch | {"past_key_values": known})
        ids, pixels = batch["input_ids"], batch["pixel_values"]
        with pytest.warns(UserWarning, match="VHR keeps the heads that it chose"):
            model(input_ids=ids, pixel_values=pixels, past_key_values=known)


def test_a_method_that_was_off_when_the_image_was_read() -> None:
    model, batch = model_of("llava"), plain(model_of("llava"))
    with wrap(model, SINKS, BELOW) as patch:
        with patch.disabled("gift"):
            known = prefix(model, batch, end_of_image(batch))
        with pytest.raises(PatchError, match="was off when the beginning of this prompt was read"):
            answer(model, without_image(batch) | {"past_key_values": known})


def test_gift_counts_the_keys_that_were_read_while_it_was_off() -> None:
    model, batch = model_of("llava"), plain(model_of("llava"))
    with torch.no_grad(), wrap(model, SINKS, BELOW) as patch:
        known = DynamicCache(config=model.config.text_config)
        step = model(**batch, past_key_values=known)
        for off in ((), ("gift",), ()):
            token = {"input_ids": step.logits[:, -1:].argmax(-1), "past_key_values": known}
            with patch.disabled(*off) if off else nullcontext():
                step = model(**token)
        groups = known.vlm_patch.states["gift"].groups[..., : known.get_seq_length()]
    assert (groups[:, 3] == 1).all()
    assert (groups[:, :3, -3:] == 0).all()


def test_text_that_was_cached_before_any_image() -> None:
    """GIFT needs nothing of it; VAR does not know its sinks."""
    model, batch = model_of("llava"), plain(model_of("llava"))
    text = {name: batch[name][:, :3] for name in ("input_ids", "attention_mask")}

    def behind() -> Tensor:
        known = DynamicCache(config=model.config.text_config)
        model(**text, past_key_values=known)
        rest = batch["input_ids"][:, 3:], batch["pixel_values"]
        return model(input_ids=rest[0], pixel_values=rest[1], past_key_values=known).logits[:, -1]

    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with wrap(model, INSIDE):
            expected = model(**batch).logits[:, -1]
            torch.testing.assert_close(behind(), expected, rtol=0, atol=CLOSE)
        with wrap(model, SINKS), pytest.raises(PatchError, match="were read without an image"):
            behind()


def test_what_is_said_waits_until_the_prompt_is_known_to_be_whole() -> None:
    model, processor = model_of("llava"), tiny.processor()
    batch = chat()
    with torch.no_grad(), wrap(model, BELOW, processor=processor):
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            known = prefix(model, batch, end_of_image(batch))
        with pytest.warns(UserWarning, match="GIFT leaves 1 of 1") as said:
            model(input_ids=torch.tensor([[60]]), past_key_values=known)
    assert any("does not follow the processor's chat template" in str(one.message) for one in said)


def test_a_question_that_begins_at_the_first_token_of_a_turn() -> None:
    """The row before it was generated, and is not known."""
    model, batch = model_of("llava"), plain(model_of("llava"))
    with torch.no_grad(), wrap(model, BELOW) as patch:
        known = DynamicCache(config=model.config.text_config)
        answer(model, batch | {"past_key_values": known})
        ids = torch.tensor([[70, 71, 72]])
        query = torch.ones(1, known.get_seq_length() + 3, dtype=torch.bool)
        with patch.prompt(query=query), pytest.raises(PatchError, match="the row before it was"):
            model(input_ids=ids, past_key_values=known)
