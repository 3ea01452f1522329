"""Where the user's question stands, in the common chat templates and kinds of tokenizer.

Expected tokens come from the character offsets of the rendered text; the reader sees ids only.
"""

import json
import sys
import types
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoProcessor, PreTrainedTokenizerFast

from eval.pocket import MODEL
from eval.support import tiny
from vlm_patch import PatchError
from vlm_patch.prompts import content_words as words
from vlm_patch.prompts.content_words import FUNCTION_WORDS, content_words
from vlm_patch.prompts.question import QuestionReader

SPECIAL = ["<unk>", "<s>", "</s>", "<image>", "<|im_start|>", "<|im_end|>"]
SPECIAL += ["<|vision_start|>", "<|vision_end|>"]
CORPUS = [
    "USER: What is in the image? ASSISTANT: There is a dog on the table, and a cat.",
    "system user assistant You are a helpful assistant. Describe this picture, please!",
    "[INST] How many dogs are there? [/INST] Three dogs. Is there a person near the car?",
]
# a word, or digits, or marks, each with one blank before it; line breaks; other blanks
SPLIT = Regex(r" ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")

VICUNA = (
    "{% for message in messages %}"
    "{% if message['role'] != 'system' %}{{ message['role'].upper() + ': ' }}{% endif %}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] + ' ' }}"
    "{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
CHATML = (
    "{% if messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<|vision_start|><image><|vision_end|>' }}"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MISTRAL = (
    "{{ '<s>' }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' }}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<image>\n' }}{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{{ ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}"
    "{{ ' ' + message['content'][0]['text'] + '</s>' }}{% endif %}{% endfor %}"
)


def trained(**changes: Any) -> Tokenizer:
    core = Tokenizer(models.BPE())
    for name, value in changes.items():
        setattr(core, name, value)
    return core


def byte_level() -> Tokenizer:
    """As GPT-2, Llama 3 and Qwen split."""
    split = pre_tokenizers.Split(SPLIT, "isolated")
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core = trained(
        pre_tokenizer=pre_tokenizers.Sequence([split, bytes_]), decoder=decoders.ByteLevel()
    )
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=SPECIAL,
        show_progress=False,
    )
    core.train_from_iterator(CORPUS, trainer)
    return core


def sentencepiece() -> Tokenizer:
    """As Llama 2 and Mistral: a blank before every stretch of text, bytes for what is unknown."""
    learnt = trained(pre_tokenizer=pre_tokenizers.Metaspace(split=True))
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=SPECIAL, show_progress=False)
    learnt.train_from_iterator(CORPUS, trainer)
    model = json.loads(learnt.to_str())["model"]
    for byte in range(256):
        model["vocab"].setdefault(f"<0x{byte:02X}>", len(model["vocab"]))
    merges = [tuple(pair) for pair in model["merges"]]
    core = Tokenizer(models.BPE(model["vocab"], merges, unk_token="<unk>", byte_fallback=True))
    core.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    core.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    core.add_special_tokens(SPECIAL)
    return core


@dataclass
class Processor:
    """The part of a processor that is asked for the question."""

    tokenizer: Any
    template: str

    def apply_chat_template(
        self, messages: list[dict[str, Any]], add_generation_prompt: bool, tokenize: bool
    ) -> str:
        text: str = self.tokenizer.apply_chat_template(
            messages,
            chat_template=self.template,
            add_generation_prompt=add_generation_prompt,
            tokenize=tokenize,
        )
        return text


KINDS = {
    "vicuna-sentencepiece": (sentencepiece, VICUNA),
    "vicuna-bytes": (byte_level, VICUNA),
    "chatml-bytes": (byte_level, CHATML),
    "mistral-sentencepiece": (sentencepiece, MISTRAL),
}


@cache
def made(kind: str) -> tuple[Processor, QuestionReader]:
    if kind == "tiny":
        processor = tiny.processor()
        return processor, QuestionReader(processor, [tiny.IMAGE])
    if kind == "pocket":
        processor = AutoProcessor.from_pretrained(MODEL)
    else:
        core, template = KINDS[kind]
        processor = Processor(PreTrainedTokenizerFast(tokenizer_object=core()), template)
    return processor, QuestionReader(processor, [image_id(processor)])


def image_id(processor: Any) -> int:
    number: int = processor.tokenizer.convert_tokens_to_ids("<image>")
    return number


ALL = [*KINDS, "tiny", "pocket"]


def message(role: str, *parts: str) -> dict[str, Any]:
    """A turn; the part "<image>" is an image."""
    content = [
        {"type": "image"} if part == "<image>" else {"type": "text", "text": part} for part in parts
    ]
    return {"role": role, "content": content}


def encoded(processor: Any, messages: Sequence[dict[str, Any]]) -> tuple[str, list[int], list[Any]]:
    """The rendered prompt with 3 tokens an image, its ids, and their offsets."""
    text = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    text = text.replace("<image>", "<image>" * 3)
    both = processor.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    return text, both["input_ids"], both["offset_mapping"]


def check(kind: str, messages: Sequence[dict[str, Any]], skip: int = 0) -> None:
    """The reader finds the tokens of the last part of the last turn, without the first `skip`."""
    processor, reader = made(kind)
    text, ids, offsets = encoded(processor, messages)
    question = messages[-1]["content"][-1]["text"].strip()
    start = text.rindex(question)
    inside = [
        i
        for i, (first, last) in enumerate(offsets)
        if last > start and first < start + len(question) and text[first:last].strip()
    ]
    assert reader.span(ids[skip:]) == (inside[0] - skip, inside[-1] + 1 - skip)


QUESTION = "What is in the image?"
TEXTS = [
    QUESTION,
    "Dog?",
    "Z",
    "Is there a dog on the table, near the car? Describe it, please!",
    " starts with a blank",
    "ends with a blank ",
    "  two blanks around  ",
    "\nstarts with a line break",
    "\n\n two of them and a blank",
    "ends with a line break\n",
    "lines\nwithin\n\nit",
    "(in brackets)",
    ". starts with a mark",
    "ends with a colon:",
    "¿Qué es esto? Ein Äpfelchen, naïve",
    "猫はどこ",
    "🐱 and 🐶🐶",
    "🐱",
    "user assistant system",
    "Is USER: a word?",
    "Is ASSISTANT: a word?",
    "Which of USER: and ASSISTANT: is a word?",
    "The answer ends in [/INST or INST]",
    "im_start im_end vision_end image",
    "3 + 4 = 7 dogs",
]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("kind", ALL)
def test_one_turn(kind: str, text: str) -> None:
    check(kind, [message("user", "<image>", text)])


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("kind", ALL)
def test_second_turn_without_an_image(kind: str, text: str) -> None:
    first = [message("user", "<image>", QUESTION), message("assistant", "There is a dog.")]
    check(kind, [*first, message("user", text)])


@pytest.mark.parametrize("kind", ALL)
def test_third_turn_with_the_same_words(kind: str) -> None:
    first = [message("user", "<image>", QUESTION), message("assistant", "There is a dog.")]
    check(kind, [*first, *first[:1], *first[1:], message("user", QUESTION)])


@pytest.mark.parametrize("kind", ALL)
def test_an_image_in_the_second_turn(kind: str) -> None:
    first = [message("user", "<image>", QUESTION), message("assistant", "There is a dog.")]
    check(kind, [*first, message("user", "<image>", "And in this one?")])


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("kind", ALL)
def test_a_second_turn_from_the_cache_on(kind: str, text: str) -> None:
    """Only the tokens behind the cached ones are seen, from inside the answer."""
    processor, _ = made(kind)
    first = [message("user", "<image>", QUESTION), message("assistant", "There is a dog.")]
    answer = processor.apply_chat_template(first[:1], add_generation_prompt=True, tokenize=False)
    prompt = answer.replace("<image>", "<image>" * 3)
    skip = len(processor.tokenizer(prompt, add_special_tokens=False)["input_ids"]) + 2
    check(kind, [*first, message("user", text)], skip)


@pytest.mark.parametrize("kind", ALL)
def test_two_images(kind: str) -> None:
    check(kind, [message("user", "<image>", "<image>", QUESTION)])


@pytest.mark.parametrize("kind", ["chatml-bytes", "mistral-sentencepiece", "tiny"])
def test_the_last_text_behind_the_last_image(kind: str) -> None:
    check(kind, [message("user", "<image>", "One.", "<image>", "Two. What is new?")])


@pytest.mark.parametrize("kind", ["vicuna-sentencepiece", "vicuna-bytes", "chatml-bytes"])
def test_a_system_prompt(kind: str) -> None:
    system = message("system", "Look closely. What is in the image?")
    check(kind, [system, message("user", "<image>", QUESTION)])


@pytest.mark.parametrize("kind", ["vicuna-sentencepiece", "vicuna-bytes", "pocket"])
def test_templates_that_put_images_first(kind: str) -> None:
    processor, reader = made(kind)
    _, ids, _ = encoded(processor, [message("user", QUESTION, "<image>")])
    _, turned, _ = encoded(processor, [message("user", "<image>", QUESTION)])
    assert ids == turned
    check(kind, [message("user", "<image>", QUESTION)])
    assert reader.span(ids) == reader.span(turned)


@pytest.mark.parametrize("kind", ["chatml-bytes", "mistral-sentencepiece", "tiny"])
def test_a_question_before_the_image_is_empty(kind: str) -> None:
    processor, reader = made(kind)
    _, ids, _ = encoded(processor, [message("user", QUESTION, "<image>")])
    start, end = reader.span(ids) or (0, 1)
    assert start == end


@pytest.mark.parametrize("kind", ALL)
def test_padding_before_a_prompt_shifts_the_span(kind: str) -> None:
    processor, reader = made(kind)
    _, ids, _ = encoded(processor, [message("user", "<image>", QUESTION)])
    start, end = reader.span(ids) or (0, 0)
    assert reader.span([0] * 7 + ids) == (start + 7, end + 7)


@pytest.mark.parametrize("kind", ALL)
def test_a_prompt_that_does_not_follow_the_template(kind: str) -> None:
    processor, reader = made(kind)
    plain = processor.tokenizer("What is in the image?", add_special_tokens=False)["input_ids"]
    image = [image_id(processor)] * 3
    assert reader.span([*image, *plain]) is None
    assert reader.span(plain) is None


def test_a_prompt_without_the_marker_behind_its_image() -> None:
    processor, reader = made("chatml-bytes")
    text = "<|im_start|>user\n<image>What?<|im_end|>\n<|im_start|>assistant\n"
    assert reader.span(processor.tokenizer(text)["input_ids"]) is None


# ---- content words


def marked(kind: str, text: str, mode: str = "content") -> str:
    """What the tokens that count cover of `text`, without marks."""
    processor, reader = made(kind)
    both = processor.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    marks = reader.content(both["input_ids"], mode)
    assert len(marks) == len(both["input_ids"])
    covered = {
        place
        for mark, (first, last) in zip(marks, both["offset_mapping"], strict=True)
        if mark
        for place in range(first, last)
    }
    kept = "".join(letter if i in covered else " " for i, letter in enumerate(text))
    return " ".join(kept.replace("?", " ").replace(".", " ").split())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Is there a dog in the image?", "dog image"),
        ("What is the red cat doing near the blue car?", "red cat blue car"),
        ("How many people can you see?", "many people see"),
        ("Please describe this image in detail.", "describe image detail"),
        ("WHAT IS IT", ""),
        ("The dog's tail isn't long", "dog's tail long"),
        ("Who's there and what's that?", ""),
        ("It mustn\u2019t rain", "rain"),
        ("naïve Äpfel 猫", "naïve Äpfel 猫"),
        ("is it 猫 or 犬", "猫 犬"),
        ("is it é", "é"),
        ("is the 🐱 here", ""),
    ],
)
def test_content_words(kind: str, text: str, expected: str) -> None:
    assert marked(kind, text) == expected


@pytest.mark.parametrize("kind", KINDS)
def test_every_byte_of_a_letter_belongs_to_its_word(kind: str) -> None:
    processor, reader = made(kind)
    for letter in ("猫", "é", "Ж"):
        ids = processor.tokenizer(f"is {letter}", add_special_tokens=False)["input_ids"]
        head = processor.tokenizer("is", add_special_tokens=False)["input_ids"]
        marks = reader.content(ids, "content")
        assert marks[: len(head)] == [False] * len(head)
        assert marks[-len(letter.encode()) :] == [True] * len(letter.encode())


@pytest.mark.parametrize("kind", KINDS)
def test_all_words(kind: str) -> None:
    assert marked(kind, "Is it a dog", "all") == "Is it a dog"


def test_content_words_of_a_text() -> None:
    text = "Is the Teddy-bear’s hat red, or isn't it?"
    assert [text[a:b] for a, b in content_words(text)] == ["Teddy", "bear’s", "hat", "red"]


def test_function_words_are_closed_classes() -> None:
    """No noun, full verb, adjective, number or colour; all of what the classes are made of."""
    content = """dog image picture photo person man woman see look show describe count go make take
    red blue big small left right many two three color colour what's-this happy run name kind type
    list detail many much several few first second top bottom side middle next"""
    assert not FUNCTION_WORDS & set(content.split())
    function = """a an the this that these those i you he she it we they me him her us them my your
    his its our their of in on at by for from with to into over under between and or but if because
    while is are was were be been being am do does did have has had can could will would shall
    should may might must who whom whose which what when where why how not there"""
    assert set(function.split()) <= FUNCTION_WORDS
    assert all(word == word.lower() and word.strip() for word in FUNCTION_WORDS)


# ---- spaCy


@pytest.fixture
def no_tagger() -> Iterator[None]:
    words._tagger.cache_clear()
    yield
    words._tagger.cache_clear()


@pytest.mark.usefixtures("no_tagger")
def test_without_spacy_the_message_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "spacy", None)
    _, reader = made("chatml-bytes")
    with pytest.raises(PatchError) as error:
        reader.content([10, 11], "spacy")
    assert str(error.value) == (
        'GIFT(words="spacy") needs spaCy and its model en_core_web_sm (import of spacy halted; '
        "None in sys.modules). Install both (pip install spacy; python -m spacy download "
        'en_core_web_sm), or use words="content".'
    )


@pytest.mark.usefixtures("no_tagger")
def test_without_its_model_too(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in = types.ModuleType("spacy")

    def load(name: str, disable: list[str]) -> None:
        raise OSError(f"can't find model '{name}'")

    stand_in.load = load  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "spacy", stand_in)
    with pytest.raises(PatchError, match=r"\(can't find model 'en_core_web_sm'\)\. Install both"):
        words.spacy_words("a dog")


@pytest.mark.usefixtures("no_tagger")
def test_spacy_keeps_the_open_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    tags = {
        "Is": "AUX",
        "there": "PRON",
        "dog": "NOUN",
        "Paris": "PROPN",
        "eating": "VERB",
        "red": "ADJ",
        "quickly": "ADV",
        "two": "NUM",
        "the": "DET",
        "in": "ADP",
        "and": "CCONJ",
        "not": "PART",
        "?": "PUNCT",
    }
    loads: list[tuple[str, list[str]]] = []

    def load(name: str, disable: list[str]) -> Any:
        loads.append((name, disable))

        def tagger(text: str) -> list[types.SimpleNamespace]:
            found, place = [], 0
            for word in text.split(" "):
                token = types.SimpleNamespace(idx=place, text=word, pos_=tags[word])
                found.append(token)
                place += len(word) + 1
            return found

        return tagger

    stand_in = types.ModuleType("spacy")
    stand_in.load = load  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "spacy", stand_in)
    text = "Is there the red dog eating in Paris and not two quickly ?"
    for kind in KINDS:
        assert marked(kind, text, "spacy") == "red dog eating Paris two quickly"
    assert loads == [("en_core_web_sm", ["parser", "ner"])]


# ---- processors that cannot be read


def test_the_processor_of_another_model() -> None:
    with pytest.raises(PatchError) as error:
        QuestionReader(tiny.processor(), [32000])
    assert str(error.value) == (
        "LlavaProcessor renders an image without an image token of this model ([32000]): it is the "
        "processor of another model. Pass this model's own."
    )


CURE = (
    "so the question cannot be told from the text around it. Pass a processor with a chat template "
    "and a fast tokenizer, or give the question by hand: with patch.prompt(query=mask)."
)


def unread(processor: Any) -> str:
    with pytest.raises(PatchError) as error:
        QuestionReader(processor, [tiny.IMAGE])
    text = str(error.value)
    assert text.endswith(CURE)
    return text


def test_a_processor_without_a_chat_template() -> None:
    processor = tiny.processor()
    processor.chat_template = None
    message = unread(processor)
    assert message.startswith("the chat template of LlavaProcessor could not be read (")
    assert "chat template" in message.split("(")[1]


def test_a_tokenizer_instead_of_a_processor() -> None:
    tokenizer = tiny.tokenizer()
    kind = type(tokenizer).__name__
    assert unread(tokenizer).startswith(f"the chat template of {kind} could not be read (")


def test_something_that_is_no_processor() -> None:
    assert unread(7) == (
        "the chat template of int could not be read ('int' object has no attribute "
        f"'apply_chat_template'), {CURE}"
    )


def test_a_template_that_hides_the_text() -> None:
    processor, _ = made("chatml-bytes")
    silent = Processor(processor.tokenizer, "{{ '<image>' }}")
    assert unread(silent) == (
        f"the chat template of Processor could not be read (substring not found), {CURE}"
    )
