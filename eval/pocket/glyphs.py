"""Line drawings of the pocket world's objects and rooms, made with Pillow after `world.yaml`."""

from functools import cache

import numpy as np
from PIL import Image, ImageDraw

from eval.pocket import WORLD

Rgb = tuple[int, int, int]

SIDE = 96
"""Width and height in pixels of a scene, and of the sheet that a glyph is drawn on."""

COLORS: dict[str, Rgb] = {name: tuple(rgb) for name, rgb in WORLD["colors"].items()}
PAINTS: dict[str, Rgb] = {name: tuple(rgb) for name, rgb in WORLD["paints"].items()}


def _shade(color: Rgb) -> Rgb:
    """The dark companion of a colour; black gets a grey one, so that inner lines stay visible."""
    if sum(color) < 200:
        return (80, 80, 80)
    red, green, blue = (int(v * 0.45) for v in color)
    return (red, green, blue)


def _stroke(draw: ImageDraw.ImageDraw, stroke: str, color: Rgb) -> None:
    shape, paint, *unit = stroke.split()
    xy = [float(v) * SIDE for v in unit]
    dark = _shade(color)
    fill = {"body": color, "flat": color, "dark": dark}.get(paint) or PAINTS[paint]
    edge = dark if paint in ("body", "pale") else fill
    thin, thick = SIDE // 24, SIDE // 12
    if shape == "box":
        draw.rectangle(xy, fill=fill, outline=edge, width=thin)
    elif shape == "bar":
        draw.rectangle(xy, fill=fill)
    elif shape == "round":
        draw.rounded_rectangle(xy, SIDE * 0.06, fill=fill, outline=edge, width=thin)
    elif shape == "oval":
        draw.ellipse(xy, fill=fill, outline=edge, width=thin)
    elif shape == "ring":
        draw.ellipse(xy, outline=fill, width=thick)
    elif shape == "poly":
        draw.polygon(xy, fill=fill, outline=edge)
    elif shape in ("upper", "lower"):
        start = 180 if shape == "upper" else 0
        draw.pieslice(xy, start, start + 180, fill=fill, outline=edge, width=thin)
    elif shape in ("hook", "tail"):
        start, end = (0, 180) if shape == "hook" else (270, 80)
        draw.arc(xy, start, end, fill=fill, width=thick)
    else:
        draw.line(xy, fill=fill, width=thick if shape == "thick" else thin)


@cache
def _sheet(name: str, color: str) -> Image.Image:
    image = Image.new("RGBA", (SIDE, SIDE), (0, 0, 0, 0))
    draw = ImageDraw.Draw(image)
    for stroke in WORLD["objects"][name]["strokes"]:
        _stroke(draw, stroke, COLORS[color])
    return image.crop(image.getbbox())


@cache
def sprite(name: str, color: str, size: int) -> Image.Image:
    """The object as an RGBA picture whose longer side is `size` pixels."""
    sheet = _sheet(name, color)
    scale = size / max(sheet.size)
    width, height = (max(4, round(v * scale)) for v in sheet.size)
    return sheet.resize((width, height), Image.Resampling.LANCZOS)


def _jitter(color: Rgb, rng: np.random.Generator, amount: int = 14) -> Rgb:
    red, green, blue = np.clip(np.array(color) + rng.integers(-amount, amount + 1, 3), 0, 255)
    return (int(red), int(green), int(blue))


def _darker(color: Rgb, amount: int) -> Rgb:
    return (max(0, color[0] - amount), max(0, color[1] - amount), max(0, color[2] - amount))


def backdrop(theme: str, rng: np.random.Generator) -> Image.Image:
    """An empty room or place of the theme, its colours and horizon varied by `rng`."""
    about = WORLD["themes"][theme]
    wall, floor, pattern = (
        _jitter(about["wall"], rng),
        _jitter(about["floor"], rng),
        about["pattern"],
    )
    horizon = int(SIDE * rng.uniform(0.42, 0.6))
    image = Image.new("RGB", (SIDE, SIDE), wall)
    draw = ImageDraw.Draw(image)
    draw.rectangle((0, horizon, SIDE, SIDE), fill=floor)
    if pattern == "lane":
        for x in range(-4, SIDE, 20):
            draw.rectangle((x, horizon + 14, x + 10, horizon + 17), fill=(220, 220, 200))
    elif pattern == "sea":
        draw.rectangle((0, horizon - 12, SIDE, horizon), fill=(70, 140, 196))
    elif pattern == "grass":
        for x in rng.integers(0, SIDE, 14).tolist():
            draw.line((x, horizon, x + 2, horizon - 6), fill=_darker(floor, 40))
    elif pattern == "panels":
        for x in range(0, SIDE, 10):
            draw.rectangle((x, 0, x + 4, horizon), fill=_darker(wall, 14))
    else:
        for y in range(6, horizon, 12 if pattern == "tiles" else 9):
            draw.line((0, y, SIDE, y), fill=_darker(wall, 20))
        for x in range(6, SIDE, 12) if pattern == "tiles" else ():
            draw.line((x, 0, x, horizon), fill=_darker(wall, 20))
    return image
