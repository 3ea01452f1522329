"""Scenes of the pocket world: which objects stand where, and the picture of them.

A scene has a theme (a kitchen, a street, ...), shown by its backdrop, and each theme has four to
six usual companions with presence probabilities: this co-occurrence is the prior that a model can
hallucinate from. Everything is a function of the split and the scene's number.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from PIL import Image

from eval.pocket import SPLITS, WORLD
from eval.pocket.glyphs import COLORS, SIDE, backdrop, sprite

NAMES: tuple[str, ...] = tuple(WORLD["objects"])
THEMES: dict[str, dict[str, Any]] = WORLD["themes"]

STRANGERS = 0.35
"""How often one or two objects of other themes are there as well."""

SIZES = (15, 34)
OPACITY = (0.38, 1.0)
NOISE = 14.0
"""Longer side in pixels, paint strength, standard deviation of the pixel noise (of 255)."""


@dataclass(frozen=True)
class Thing:
    """One object: its COCO name, colour word, longer side in pixels, paint strength and box."""

    name: str
    color: str
    size: int
    opacity: float
    box: tuple[int, int, int, int]
    """x, y, width, height in pixels, as COCO's bbox."""


@dataclass(frozen=True)
class Scene:
    """What is in one picture; `missing` is the usual companion that a break scene was robbed of."""

    split: str
    index: int
    theme: str
    things: tuple[Thing, ...]
    missing: str | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """The categories that are there, in the order of `NAMES`."""
        present = {thing.name for thing in self.things}
        return tuple(name for name in NAMES if name in present)

    @property
    def companions(self) -> dict[str, float]:
        """The usual companions of the theme, there or not, and how usual each is."""
        usual: dict[str, float] = THEMES[self.theme]["companions"]
        return usual


def stream(split: str, index: int, purpose: int) -> np.random.Generator:
    """The random numbers for one purpose of one scene; no two splits share any."""
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}: the pocket world has {', '.join(SPLITS)}")
    if index < 0:
        raise ValueError(f"a scene's number is 0 or more, got {index}")
    return np.random.default_rng([SPLITS.index(split), index, purpose])


def _population(theme: str, missing: str | None, rng: np.random.Generator) -> list[str]:
    usual = THEMES[theme]["companions"]
    foreign = [name for name in NAMES if name not in usual]
    there = [name for name, share in usual.items() if rng.random() < share and name != missing]
    strangers = int(rng.integers(1, 3)) if rng.random() < STRANGERS or not there else 0
    there += [foreign[i] for i in rng.choice(len(foreign), strangers, replace=False)]
    rng.shuffle(there)
    return there


def _overlap(a: tuple[int, int, int, int], b: tuple[int, int, int, int]) -> int:
    width = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
    height = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
    return max(0, width) * max(0, height)


def _place(
    width: int, height: int, taken: list[tuple[int, int, int, int]], rng: np.random.Generator
) -> tuple[int, int, int, int]:
    """The first free one of 30 random positions, else the one that covers the least."""
    best, least = (0, 0, width, height), float("inf")
    xs = rng.integers(0, SIDE - width + 1, 30).tolist()
    ys = rng.integers(0, SIDE - height + 1, 30).tolist()
    for x, y in zip(xs, ys, strict=True):
        covered = sum(_overlap((x, y, width, height), other) for other in taken)
        if covered < least:
            best, least = (x, y, width, height), covered
        if not covered:
            break
    return best


def scene(split: str, index: int) -> Scene:
    """Scene number `index` of a split.

    In `break` one of the theme's two most usual companions is never there; everything else is as in
    the other splits.
    """
    rng = stream(split, index, 0)
    shares = np.array([about["share"] for about in THEMES.values()])
    theme = list(THEMES)[int(rng.choice(len(THEMES), p=shares / shares.sum()))]
    missing = list(THEMES[theme]["companions"])[int(rng.integers(2))] if split == "break" else None
    things: list[Thing] = []
    for name in _population(theme, missing, rng):
        color = list(COLORS)[int(rng.integers(len(COLORS)))]
        size, opacity = int(rng.integers(*SIZES)), float(rng.uniform(*OPACITY))
        width, height = sprite(name, color, size).size
        box = _place(width, height, [thing.box for thing in things], rng)
        things.append(Thing(name, color, size, opacity, box))
    return Scene(split, index, theme, tuple(things), missing)


@cache
def _fade(opacity: int) -> list[int]:
    return [value * opacity // 255 for value in range(256)]


def render(view: Scene) -> Image.Image:
    """The picture of a scene: 96 x 96 RGB."""
    rng = stream(view.split, view.index, 1)
    image = backdrop(view.theme, rng)
    for thing in view.things:
        picture = sprite(thing.name, thing.color, thing.size)
        alpha = picture.getchannel("A").point(_fade(int(255 * thing.opacity)))
        image.paste(picture, thing.box[:2], alpha)
    grain = rng.standard_normal((SIDE, SIDE, 3), dtype=np.float32) * NOISE
    return Image.fromarray(np.clip(np.asarray(image) + grain, 0, 255).astype(np.uint8))
