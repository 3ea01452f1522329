"""The shipped pocket model does what its card says, and its training packs samples correctly."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, LlavaForConditionalGeneration

from eval.pocket import CAPTION_PROMPT, MODEL, language, train
from eval.pocket.build import IMAGE_TOKENS, make_model, make_processor, make_tokenizer
from eval.pocket.card import card
from eval.pocket.lessons import IGNORED, Dose, Teacher, patch_words, pixels_of
from eval.pocket.measure import mentions, quick, random_pairs, respond
from eval.pocket.report import bars
from eval.pocket.scenes import NAMES, Scene, Thing, render, scene, stream

TALK = [
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "A cup."}]},
    {"role": "user", "content": "Is there a cat?"},
]


@pytest.fixture(scope="module")
def shipped() -> tuple[Any, Any]:
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_pretrained(MODEL).eval()
    return model, AutoProcessor.from_pretrained(MODEL)


@pytest.fixture(scope="module")
def scores() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((MODEL / "scores.json").read_text(encoding="utf-8"))
    return found


def test_the_folder_holds_a_small_llava(shipped: tuple[Any, Any]) -> None:
    model, processor = shipped
    assert isinstance(model, LlavaForConditionalGeneration)
    assert sum(path.stat().st_size for path in MODEL.iterdir()) <= 15e6
    text = model.config.text_config
    assert 6 <= text.num_hidden_layers <= 8
    assert text.num_attention_heads == 8
    assert model.config.image_seq_length == IMAGE_TOKENS == 64
    assert processor.tokenizer.padding_side == "left"
    assert processor.chat_template


def test_the_shipped_words_are_those_of_the_code(shipped: tuple[Any, Any]) -> None:
    _, processor = shipped
    assert processor.tokenizer.get_vocab() == make_tokenizer().get_vocab()
    assert processor.chat_template == make_processor(make_tokenizer()).chat_template


def test_two_turns_are_rendered_as_llava_renders_them(shipped: tuple[Any, Any]) -> None:
    render_chat = shipped[1].apply_chat_template
    asked = "USER: <image>\nWhat is it? ASSISTANT: A cup.</s>USER: Is there a cat? "
    assert render_chat(TALK) == asked
    assert render_chat(TALK, add_generation_prompt=True) == asked + "ASSISTANT:"
    with pytest.raises(Exception, match="user and assistant only"):
        render_chat([{"role": "system", "content": "Be brief."}])


def test_the_processor_gives_the_pixels_of_training(shipped: tuple[Any, Any]) -> None:
    image = render(scene("test", 3))
    found = shipped[1](text=["<image>"], images=[image], return_tensors="pt")
    assert torch.allclose(found["pixel_values"], pixels_of([image]), atol=1e-5)
    assert (found["input_ids"] == shipped[0].config.image_token_id).sum() == IMAGE_TOKENS


@pytest.mark.parametrize("split", ["test", "break"])
def test_the_model_is_good_but_not_perfect(split: str, shipped: tuple[Any, Any]) -> None:
    found = quick(*shipped, split, 40)
    assert found.recall >= 0.45
    assert found.yes_no >= 0.70
    assert found.ended >= 0.95
    assert 0.01 <= found.chair_i <= 0.45


def test_the_model_looks_at_the_picture(shipped: tuple[Any, Any]) -> None:
    views = [scene("test", index) for index in range(40)]
    pairs = random_pairs(views)
    texts = [f"Is there {language.article(name)} in the image?" for _, name, _ in pairs]

    def accuracy(shift: int) -> float:
        images = [render(views[(at + shift) % 40]) for at, _, _ in pairs]
        said = respond(*shipped, images, texts, 3)
        return float(
            np.mean([s.startswith("Yes") == t for s, (_, _, t) in zip(said, pairs, strict=True)])
        )

    assert accuracy(0) - accuracy(1) >= 0.12


def test_captions_are_well_formed(shipped: tuple[Any, Any]) -> None:
    images = [render(scene("break", index)) for index in range(24)]
    said = [text.removesuffix("</s>") for text in respond(*shipped, images, [CAPTION_PROMPT] * 24)]
    assert np.mean([language.well_formed(text) for text in said]) >= 0.9
    assert len(set(said)) > 20


def test_a_second_turn_is_answered(shipped: tuple[Any, Any]) -> None:
    model, processor = shipped
    text = processor.apply_chat_template(TALK, add_generation_prompt=True)
    inputs = processor(text=[text], images=[render(scene("test", 0))], return_tensors="pt")
    out = model.generate(**inputs, do_sample=False, max_new_tokens=3)
    said = processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert said.strip() in ("Yes", "No")


def test_the_card_is_made_from_the_scores(scores: dict[str, Any]) -> None:
    assert (MODEL / "README.md").read_text(encoding="utf-8") == card(scores)
    assert bars(scores) == scores["bars"]
    chair = scores["splits"]["break"]["chair"]
    assert f"{100 * chair['chair_i']:.1f} %" in card(scores)


def test_well_formed_knows_the_world_and_its_mistakes() -> None:
    for index in range(60):
        assert language.well_formed(
            language.caption(scene("test", index), stream("test", index, 2))
        )
    assert not language.well_formed("There is a oven at the top.")
    assert not language.well_formed("The image shows a kitchen scene. There is a cup at")
    assert not language.well_formed("")


def test_mentions_are_whole_words_in_order() -> None:
    assert mentions("A cup can be seen. A cat, a cup.") == ["cup", "cat", "cup"]
    assert mentions("A cupboard and catnip.") == []


def test_a_packed_conversation_reads_nothing_but_the_picture_and_itself() -> None:
    """Its logits are those of the same conversation alone."""
    tokenizer = make_tokenizer()
    teacher, model = Teacher(tokenizer, Dose(blind=0.0)), make_model(len(tokenizer), 0).eval()
    batch = teacher.batch(7, 1)
    start = len(teacher.prefix)
    decoder = model.model.language_model

    @torch.no_grad()
    def hidden(tokens: torch.Tensor, positions: torch.Tensor, visible: Any) -> torch.Tensor:
        found: torch.Tensor = decoder(
            input_ids=tokens, attention_mask=visible, position_ids=positions, use_cache=False
        ).last_hidden_state
        return found

    packed = hidden(batch.tokens, batch.positions, batch.visible)[0]
    at = start
    for tokens, labels in teacher.conversations(scene("train", 7)):
        here = slice(at, at + len(tokens))
        alone = torch.tensor([teacher.prefix + tokens])
        expected = hidden(alone, torch.arange(alone.shape[1])[None], None)[0, start:]
        assert torch.allclose(packed[here], expected, atol=1e-4)
        assert batch.labels[0, here].tolist() == labels
        at += len(tokens)
    assert (batch.labels[0, at:] == IGNORED).all()


def test_a_blind_sample_cannot_read_the_picture() -> None:
    teacher = Teacher(make_tokenizer(), Dose(blind=1.0))
    batch = teacher.batch(0, 2)
    image = slice(teacher.first_image, teacher.first_image + IMAGE_TOKENS)
    assert not batch.visible[:, 0, image.stop :, image].any()


def test_patches_are_named_where_things_are() -> None:
    thing = Thing("cup", "red", 24, 1.0, (12, 24, 24, 12))
    shown = patch_words(Scene("train", 0, "kitchen", (thing,))).reshape(8, 8, -1)
    assert np.argwhere(shown[..., NAMES.index("cup")] == 1).tolist() == [[2, 1], [2, 2]]
    assert shown[2, 1, len(NAMES)] == 0.5
    assert shown.sum() == pytest.approx(3.0)


def test_training_repeats_and_keeps_finished_stages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "CALIBRATION_SCENES", 1)
    stages = (
        train.Stage("see", 2, 2, 1e-3, 0, True, 1.0),
        train.Stage("settle", 2, 2, 1e-3, 100, True, 0.25),
    )

    def weights(folder: str) -> dict[str, torch.Tensor]:
        (tmp_path / folder).mkdir(exist_ok=True)
        trainer = train.Trainer(tmp_path / folder, seed=3)
        for stage in stages:
            trainer.run(stage)
        return trainer.model.state_dict()

    first, again = weights("a"), weights("b")
    assert all(torch.equal(first[key], again[key]) for key in first)
    untrained = make_model(len(make_tokenizer()), 3).state_dict()
    assert not torch.equal(first["lm_head.weight"], untrained["lm_head.weight"])
    monkeypatch.setattr(train.Trainer, "step", None)
    kept = weights("a")
    assert all(torch.equal(first[key], kept[key]) for key in first)
