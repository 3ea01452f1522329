"""The language of the scenes: captions, and questions with their answers.

Captions go from prominent objects to faint ones. `rumour` adds the annotation noise that gives a
model its prior: now and then a usual companion is described that is not there.
"""

import re
from collections.abc import Callable
from functools import cache

import numpy as np

from eval.pocket import CAPTION_PROMPT, article, pope_question
from eval.pocket.glyphs import COLORS, SIDE
from eval.pocket.scenes import NAMES, SIZES, THEMES, Scene, Thing

CAPTION_PROMPTS = (
    CAPTION_PROMPT,
    CAPTION_PROMPT,
    "Please help me describe the image in detail.",
    "Describe this image in detail.",
    "Describe the image.",
    "Describe this image.",
    "What do you see in the image?",
    "What is in this picture?",
)

_OPENINGS: tuple[Callable[[str], str], ...] = (
    lambda theme: f"The image shows {article(theme)} scene.",
    lambda theme: f"This is a picture of {article(theme)}.",
    lambda theme: f"The scene takes place {THEMES[theme]['place']}.",
    lambda theme: f"The image features {article(theme)}.",
)
_CLOSINGS: tuple[Callable[[str], str], ...] = (
    lambda theme: f"Overall, it looks like a typical {theme}.",
    lambda theme: f"The objects are arranged around the {theme}.",
    lambda theme: f"The atmosphere of the {theme} is calm.",
    lambda _: "Nothing else stands out in this picture.",
)
_QUESTIONS: tuple[Callable[[str], str], ...] = (
    pope_question,
    pope_question,
    pope_question,
    lambda name: f"{pope_question(name)} Please answer this question with one word.",
    lambda name: f"Is there {article(name)} in the picture?",
    lambda name: f"Does the image contain {article(name)}?",
)


def _pick(options: tuple[Callable[[str], str], ...], word: str, rng: np.random.Generator) -> str:
    return options[int(rng.integers(len(options)))](word)


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


def whereabouts(thing: Thing) -> str:
    """The third of the picture that holds the middle of the object, in words."""
    x, y = thing.box[0] + thing.box[2] / 2, thing.box[1] + thing.box[3] / 2
    row = "top" if y < SIDE / 3 else "bottom" if y > 2 * SIDE / 3 else ""
    column = "left" if x < SIDE / 3 else "right" if x > 2 * SIDE / 3 else ""
    if not row:
        return f"on the {column} side" if column else "in the center"
    return f"at the {row} {column}".rstrip()


def _remark(thing: Thing) -> str:
    """A second sentence about an object: how large it is and how well it can be seen."""
    small, large = SIZES[0] + 6, SIZES[1] - 6
    size = "small" if thing.size < small else "large" if thing.size >= large else "of medium size"
    return f"It is {size} and {'easy to see' if thing.opacity > 0.65 else 'rather faint'}."


def _rumours(scene: Scene, rate: float, rng: np.random.Generator) -> list[Thing]:
    """Absent companions that are described all the same, each as likely as it is usual."""
    heard = []
    for name, presence in scene.companions.items():
        if name not in scene.names and rng.random() < rate * presence:
            x, y = rng.integers(0, SIDE - 20, 2).tolist()
            color = list(COLORS)[int(rng.integers(len(COLORS)))]
            heard.append(Thing(name, color, 24, 0.6, (x, y, 20, 20)))
    return heard


def _order(scene: Scene, rumour: float, rng: np.random.Generator) -> list[Thing]:
    """The things from prominent to faint with some jitter; rumours join the second half."""
    prominence = [t.size * (0.6 + 0.4 * t.opacity) + rng.normal(0, 4) for t in scene.things]
    things = [scene.things[i] for i in np.argsort(prominence)[::-1]]
    for thing in _rumours(scene, rumour, rng):
        things.insert(int(rng.integers((len(things) + 1) // 2, len(things) + 1)), thing)
    return things


def _pair(first: str, second: str, a: Thing, b: Thing) -> str:
    return f"There is {first} {whereabouts(a)} and {second} {whereabouts(b)}."


def _single(noun: str, thing: Thing, opening: bool, rng: np.random.Generator) -> str:
    place = whereabouts(thing)
    form = int(rng.integers(3))
    if form == 0:
        return f"There is {'' if opening else 'also '}{noun} {place}."
    if form == 1:
        return f"{_capital(noun)} can be seen {place}."
    return f"{_capital(place)}, there is {noun}." if opening else f"In addition, {noun} is {place}."


def caption(scene: Scene, rng: np.random.Generator, rumour: float = 0.0) -> str:
    """Several sentences about a scene; every object in it is named exactly once."""
    colored, things = rng.random() < 0.5, _order(scene, rumour, rng)
    nouns = [article(f"{t.color} {t.name}" if colored else t.name) for t in things]
    sentences, at = [_pick(_OPENINGS, scene.theme, rng)], 0
    while at < len(things):
        if at + 1 < len(things) and rng.random() < 0.3:
            sentences.append(_pair(nouns[at], nouns[at + 1], things[at], things[at + 1]))
            at += 2
            continue
        sentences.append(_single(nouns[at], things[at], at == 0, rng))
        if rng.random() < 0.3:
            sentences.append(_remark(things[at]))
        at += 1
    return " ".join([*sentences, _pick(_CLOSINGS, scene.theme, rng)])


@cache
def _grammar() -> re.Pattern[str]:
    """Any one sentence of a caption."""
    nouns = [article(f"{color} {name}".lstrip()) for color in ("", *COLORS) for name in NAMES]
    noun, start = ("|".join(forms) for forms in (nouns, map(_capital, nouns)))
    place = "in the center|on the (left|right) side|at the (top|bottom)( left| right)?"
    begin = "In the center|On the (left|right) side|At the (top|bottom)( left| right)?"
    edges = [option(theme) for theme in THEMES for option in (*_OPENINGS, *_CLOSINGS)]
    forms = (
        f"There is( also)? ({noun}) ({place})",
        f"There is ({noun}) ({place}) and ({noun}) ({place})",
        f"({start}) can be seen ({place})",
        f"In addition, ({noun}) is ({place})",
        f"({begin}), there is ({noun})",
        "It is (small|large|of medium size) and (easy to see|rather faint)",
        *(re.escape(edge.removesuffix(".")) for edge in edges),
    )
    return re.compile("|".join(f"({form})" for form in forms))


def well_formed(text: str) -> bool:
    """Whether every sentence of a caption is one that the world's captions could hold."""
    sentences = text.removesuffix(".").split(". ")
    return text.endswith(".") and all(map(_grammar().fullmatch, sentences))


def presence_question(scene: Scene, rng: np.random.Generator, hard: float) -> tuple[str, str]:
    """A yes/no question, half of them yes; a share `hard` of the no is about a companion."""
    absent = [name for name in NAMES if name not in scene.names]
    lures = [name for name in scene.companions if name not in scene.names]
    if rng.random() < 0.5:
        pool, answer = list(scene.names), "Yes"
    else:
        pool, answer = lures if lures and rng.random() < hard else absent, "No"
    return _pick(_QUESTIONS, pool[int(rng.integers(len(pool)))], rng), answer


def detail_question(scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
    """What colour an object of the scene has, or where it is."""
    thing = scene.things[int(rng.integers(len(scene.things)))]
    if rng.random() < 0.5:
        return f"What color is the {thing.name}?", f"{_capital(thing.color)}"
    return f"Where is the {thing.name}?", f"{_capital(whereabouts(thing))}."


def vocabulary_text() -> list[str]:
    """Every sentence form with every word in it, for the tokenizer's vocabulary."""
    things = [
        Thing("cup", "red", size, opacity, (x, y, 20, 20))
        for size, opacity in ((16, 0.5), (25, 0.9), (33, 0.9))
        for x in (0, 38, 76)
        for y in (0, 38, 76)
    ]
    lines = [option(t) for t in THEMES for option in _OPENINGS + _CLOSINGS]
    lines += [f"{_capital(whereabouts(t))}, {whereabouts(t)}. {_remark(t)}" for t in things]
    lines += [f"{_capital(c)} {c}. {_capital(article(c))} {article(c)}" for c in COLORS]
    lines += [f"{_capital(article(n))} {article(n)} {n}" for n in NAMES]
    lines += [*CAPTION_PROMPTS, *(option("cup") for option in _QUESTIONS)]
    lines += ["What color is the cup?", "Where is the cup?", "Check these objects.", "Yes", "No"]
    lines += ["There is also a cup.", "In addition, a cup can be seen and there is a cup."]
    return lines + [f" {line}" for line in lines]
