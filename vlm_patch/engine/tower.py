"""What the vision tower's own attention looks at, for methods that choose among patches.

The attention of the tower's layers that a method asks for is reached as the decoder's is, so that
query and key are those of the tower's own pass: no second pass, and no map of a layer that nobody
asked for. Each patch's score then takes the way of the patch's features to its image token.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from vlm_patch.engine import attention
from vlm_patch.engine.attention import Call, ForwardHandler
from vlm_patch.errors import PatchError, UnsupportedModelError
from vlm_patch.method import Patches, TowerRead, TowerRows
from vlm_patch.models.info import Decoder, Layer, asks_for_attention
from vlm_patch.models.tensor_parallel import WHOLE, Shard, shard_of
from vlm_patch.prompts.masks import expand

ROWS_BUDGET = 64 * 2**20
"""Bytes of attention weights held at once where all rows of a layer are asked for."""
CLS_NAMES = ("class_embedding", "cls_token")
PLAIN_TOWERS = ("clip_vision_model", "siglip_vision_model")
"""Those of LLaVA and PaliGemma that give a row per patch of one image or tile."""

Images: TypeAlias = list[Tensor]
"""The scores of a read `[T]` for the tokens of every image, in the order of the images; nan for a
token that is no patch."""


def received(call: Call, rows: TowerRows, cls: bool, shard: Shard = WHOLE) -> Tensor:
    """The attention `[N, P]` that the P patches get in a call, summed over heads.

    rows: from the class token (in towers without one from the patches), or the mean from the
    patches. cls: whether the tower has a class token, which is no patch.
    """
    batch, heads, length, _ = call.query.shape
    every = torch.arange(length, device=call.query.device)
    if cls and rows == "cls":
        total, count = call.weights(every[:1]).sum(2), 1
    else:
        size = max(1, ROWS_BUDGET // (4 * batch * heads * length))
        chunks = torch.split(every[int(cls) :], size)
        total = torch.stack([call.weights(chunk).sum(2) for chunk in chunks]).sum(0)
        count = length - int(cls)
    return (shard.gather(total, 1).sum(1) / count)[:, int(cls) :]


def one_per_patch(model: Any, scores: Tensor, sizes: Any) -> Images:
    """LLaVA and PaliGemma: a token per patch; the class token is one more, or is dropped."""
    if getattr(model.config, "vision_feature_select_strategy", None) == "full" and has_cls(model):
        scores = nn.functional.pad(scores, (1, 0), value=torch.nan)
    return list(scores)


def merged(model: Any, scores: Tensor, sizes: Any) -> Images:
    """Qwen-VL: a token per square of neighbours, which follow each other; the mean of theirs."""
    square = model.config.vision_config.spatial_merge_size**2
    return list(scores.view(len(scores), -1, square).mean(2))


def shuffled(model: Any, scores: Tensor, sizes: Any) -> Images:
    """InternVL: a token per square of neighbours in the rows of a tile; the mean of theirs."""
    side = round(scores.shape[1] ** 0.5)
    grid = scores.view(len(scores), side, side, 1)
    squares = model.model.pixel_shuffle(grid, scale_factor=model.config.downsample_ratio)
    return list(squares.mean(-1).flatten(1))


def tiles(model: Any, scores: Tensor, sizes: Any) -> Images:
    """LLaVA-NeXT: the model's own packing of tiles, its line ends being nan."""
    from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

    config = model.config
    grids, tile = config.image_grid_pinpoints, config.vision_config.image_size
    counts = [image_size_to_num_patches(size, grids, tile) for size in sizes]
    images, _ = model.model.pack_image_features(
        torch.split(scores[..., None], counts),
        sizes,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        image_newline=scores.new_full((1,), torch.nan),
    )
    return [image[:, 0] for image in images]


WAYS: Mapping[str, Callable[[Any, Tensor, Any], Images]] = {
    "llava": one_per_patch,
    "vipllava": one_per_patch,
    "paligemma": one_per_patch,
    "qwen2_vl": merged,
    "qwen3_vl": merged,
    "qwen3_vl_moe": merged,
    "internvl": shuffled,
    "llava_next": tiles,
}
"""How the patches of a model type become image tokens: from scores `[N, P]` of N images or tiles,
and the sizes of the images in pixels where the model is given them."""
_QUERIES = "its image tokens are made by queries that look at all patches, so none stands for one"
REASONS = {
    **dict.fromkeys(("blip-2", "instructblip", "instructblipvideo", "kosmos-2"), _QUERIES),
    "qwen2_5_vl": "its tower looks inside windows, so that no row compares all patches",
}


def has_cls(model: nn.Module) -> bool:
    """Whether a model's vision tower has a class token in front of its patches."""
    return any(name.rpartition(".")[2] in CLS_NAMES for name, _ in model.named_parameters())


class Tower(threading.local, ForwardHandler):
    """Listens to the vision tower while the images of a prompt are encoded; one state per thread.

    run: itself while it listens, as the layers of the tower ask for it. inside: `generate` runs,
    which may encode images before the model's first forward.
    """

    def __init__(self, model: Any, decoder: Decoder, reads: Sequence[TowerRead]) -> None:
        self.model, self.reads = model, reads
        own = set(decoder.module.modules())
        self.layers = [m for m in model.modules() if m not in own and asks_for_attention(m)]
        self.way, self.cls = WAYS[model.config.model_type], has_cls(model)
        self.shard = shard_of(model, self.layers[0])
        self.run: Tower | None = None
        self.joint = None
        self.inside = False
        self.forget()

    def forget(self) -> None:
        """Drops what was heard."""
        self.scores: dict[TowerRead, list[Tensor]] = {}
        self.sizes: Any = None
        self.mixed = False

    def install(self, undo: ExitStack) -> None:
        """Reaches the attention of the layers asked for; closing `undo` restores them exactly."""
        for index in sorted({self.index(read) for read in self.reads}):
            layer = self.layers[index]
            attention.install(Layer(index, layer, layer), self, undo)

    def index(self, read: TowerRead) -> int:
        """The layer of a read, counted from the first."""
        return range(len(self.layers))[read.layer]

    @contextmanager
    def generating(self, inputs: Mapping[str, Any]) -> Iterator[None]:
        """While `generate` runs on these arguments with a method on that reads the tower."""
        self.inside = False
        self.listen(inputs)
        self.inside = True
        try:
            yield
        finally:
            self.run, self.inside = None, False
            self.forget()

    def listen(self, inputs: Mapping[str, Any]) -> None:
        """Called before a model runs: begins anew if images come with it, or outside `generate`."""
        pixels = [name for name, value in inputs.items() if value is not None]
        pixels = [name for name in pixels if name.startswith("pixel_values")]
        if pixels or not self.inside:
            self.forget()
        if pixels:
            self.run, self.sizes, self.mixed = self, inputs.get("image_sizes"), len(pixels) > 1

    def attend(self, call: Call) -> tuple[Tensor, Tensor | None]:
        """The stock attention of a layer; keeps the scores of its patches."""
        with torch.no_grad():
            for read in self.reads:
                if self.index(read) == call.layer:
                    result = received(call, read.rows, self.cls, self.shard)
                    self.scores.setdefault(read, []).append(result)
        return call.stock()

    def place(self, image: Tensor, name: str) -> Patches:
        """The scores on the image tokens `[B, N]` of a prompt, which may be repeated for beams.

        name: of the method that asks. Raises PatchError where they cannot be placed.
        """
        if not self.scores:
            raise PatchError(
                f"{name} reads the attention of the vision tower, but the images of this prompt "
                "were encoded before, so that it was not seen. Call the model or generate with "
                "pixel_values instead of image features or embeddings."
            )
        if self.mixed:
            raise PatchError(
                f"{name} cannot tell images from videos in one prompt: give one of the two"
            )
        images = {read: self._images(read) for read in self.reads}
        first = images[self.reads[0]]
        numbers = [torch.full_like(scores, i) for i, scores in enumerate(first)]
        # at least float32, which holds every integer of images exactly
        number = _put(numbers, image, name)
        scores = {read: _put(result, image, name) for read, result in images.items()}
        real = ~scores[self.reads[0]].isnan()
        if self.way is shuffled:  # several tiles are one image, whose tokens stand together
            number = (image & ~nn.functional.pad(image, (1, 0))[:, :-1]).cumsum(1) - 1
        if not self.inside:
            self.forget()
        return Patches(scores, number.masked_fill(~real, -1).long())

    def _images(self, read: TowerRead) -> Images:
        """What was heard of a read, for the tokens of every image."""
        heard = self.scores[read]
        if self.way is tiles:
            heard = [torch.cat(heard)]
        return [image for scores in heard for image in self.way(self.model, scores, self.sizes)]


def _put(images: Images, where: Tensor, name: str) -> Tensor:
    """Values `[T]` of the tokens of each image, put on `where` `[B, N]` in order, as the model puts
    features there; nan elsewhere.
    """
    flat = torch.cat(images).to(where.device)
    tokens, batch = int(where.sum()), len(where)
    repeats, left = divmod(tokens, len(flat))
    if left or not repeats or batch % repeats:
        raise PatchError(
            f"{name}: the vision tower's patches make {len(flat)} image tokens, but the prompt has "
            f"{tokens}, so it is not known which is which. Prompts must hold all tokens of the "
            "images they come with."
        )
    rows = where[::repeats]
    return expand(flat.new_full(rows.shape, torch.nan).masked_scatter(rows, flat), batch)


def _known(kind: str, vision: Any) -> bool:
    """Whether it is known how the patches of a model type with this tower become image tokens."""
    plain = getattr(vision, "model_type", None) in PLAIN_TOWERS
    return kind in WAYS and (plain or WAYS[kind] in (merged, shuffled))


def tower_of(
    model: Any, decoder: Decoder, reads: Mapping[str, Sequence[TowerRead]]
) -> Tower | None:
    """What listens to the tower for methods that read it, `reads` by their names; None without any.

    Raises UnsupportedModelError where its patches cannot be told from each other in the prompt.
    """
    every = tuple(dict.fromkeys(read for of in reads.values() for read in of))
    if not every:
        return None
    name, kind = next(name for name, of in reads.items() if of), model.config.model_type
    reason = REASONS.get(kind)
    if reason is None and not _known(kind, getattr(model.config, "vision_config", None)):
        reason = f"how its patches become image tokens is not known, only for {', '.join(WAYS)}"
    if reason is not None:
        raise UnsupportedModelError(
            f"{name} is not supported on this model, since it reads the vision tower: {reason}"
        )
    tower = Tower(model, decoder, every)
    least = max(max(read.layer + 1, -read.layer) for read in every)
    if len(tower.layers) < least:
        raise UnsupportedModelError(
            f"{name} reads {least} layers of the vision tower, and this model's has "
            f"{len(tower.layers)} whose attention can be reached"
        )
    return tower
