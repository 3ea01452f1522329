"""Token ids, tokenizer and processor of the tiny models, made in code: no download, no file."""

from typing import Any

import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlavaProcessor, PreTrainedTokenizerFast

# the one that needs no torchvision goes by another name since transformers 5
ImageProcessor: Any = getattr(transformers, "CLIPImageProcessorPil", None)
if ImageProcessor is None:
    ImageProcessor = transformers.CLIPImageProcessor

PAD, BOS, EOS, UNKNOWN = 0, 1, 2, 3
SINK_WORD = 7  # a text token that `plant` makes a sink, so that generated tokens can be sinks
VISION_END, VISION_START, VIDEO, IMAGE = 96, 97, 98, 99
VOCABULARY = 120

TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}USER: {% else %}ASSISTANT: {% endif %}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>\n{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}"
    "{% if message['role'] == 'user' %} {% else %}</s>{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
WORDS = (
    "\n USER : ASSISTANT . ? , ! Is there a dog in the image Please describe this detail What is"
    " red cat and how many ##s ##ing play an on of table chair person sit near car blue"
)


def tokenizer() -> PreTrainedTokenizerFast:
    """Word pieces over the 120 ids: a few real words ("dogs" is dog ##s), the rest w60, w61 ..."""
    words = WORDS.split(" ")
    special = {"<pad>": PAD, "<s>": BOS, "</s>": EOS, "<unk>": UNKNOWN, "<image>": IMAGE}
    special |= {"<vision_end>": VISION_END, "<vision_start>": VISION_START, "<video>": VIDEO}
    vocabulary = {f"w{index}": index for index in range(VOCABULARY)}
    names = dict(enumerate(words, start=4)) | {index: word for word, index in special.items()}
    vocabulary = {names.get(index, word): index for word, index in vocabulary.items()}
    core = Tokenizer(models.WordPiece(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(" +"), "removed"),
            pre_tokenizers.Split("\n", "isolated"),
            pre_tokenizers.Punctuation(),
        ]
    )
    core.decoder = decoders.WordPiece(cleanup=False)
    core.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", BOS)])
    core.add_special_tokens(list(special))
    kind: Any = PreTrainedTokenizerFast
    made: PreTrainedTokenizerFast = kind(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
        extra_special_tokens={"image_token": "<image>"},
    )
    return made


def processor() -> LlavaProcessor:
    """What `llava()` needs: 32 x 32 images of 16 tokens, "USER: <image>\\n... ASSISTANT:"."""
    side = {"height": 32, "width": 32}
    kind: Any = LlavaProcessor
    made: LlavaProcessor = kind(
        image_processor=ImageProcessor(size={"shortest_edge": 32}, crop_size=side),
        tokenizer=tokenizer(),
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )
    return made
