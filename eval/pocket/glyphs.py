"""Line drawings of the pocket world's objects and rooms, made with Pillow.

A glyph is a list of strokes on the unit square: (shape, coordinates, paint). The paint "body" is
the object's own colour with a dark edge, "flat" the same without the edge, "dark" a shade of it,
and any other paint a fixed colour.
"""

import math
from functools import cache

import numpy as np
from PIL import Image, ImageDraw

Stroke = tuple[str, tuple[float, ...], str]
Rgb = tuple[int, int, int]

SIDE = 96
"""Width and height in pixels of a scene, and of the sheet that a glyph is drawn on."""

COLORS: dict[str, Rgb] = {
    "red": (214, 48, 42),
    "blue": (44, 92, 214),
    "green": (52, 160, 74),
    "yellow": (238, 210, 48),
    "purple": (142, 68, 173),
    "pink": (244, 150, 190),
    "white": (245, 245, 245),
    "black": (34, 34, 34),
}
"""No orange: CHAIR counts "orange" as the fruit."""

_PAINTS: dict[str, Rgb] = {
    "tyre": (20, 20, 20),
    "glass": (196, 228, 250),
    "pale": (250, 250, 250),
    "screen": (40, 50, 70),
    "stop": (255, 40, 40),
    "wait": (255, 220, 40),
    "go": (40, 230, 90),
    "beak": (250, 160, 30),
    "leaf": (40, 130, 60),
    "petal": (240, 120, 160),
}


def _row(
    shape: str, xs: tuple[float, ...], y: float, w: float, h: float, paint: str
) -> list[Stroke]:
    return [(shape, (x, y, x + w, y + h), paint) for x in xs]


def _octagon(x: float, y: float, r: float) -> tuple[float, ...]:
    turns = (math.pi / 8 + k * math.pi / 4 for k in range(8))
    return tuple(v for t in turns for v in (x + r * math.cos(t), y + r * math.sin(t)))


def _leaning_oval(x: float, y: float, a: float, b: float, lean: float) -> tuple[float, ...]:
    points = []
    for k in range(24):
        u, v = a * math.cos(k * math.pi / 12), b * math.sin(k * math.pi / 12)
        points += [
            x + u * math.cos(lean) - v * math.sin(lean),
            y + u * math.sin(lean) + v * math.cos(lean),
        ]
    return tuple(points)


GLYPHS: dict[str, list[Stroke]] = {
    "cup": [("ring", (0.5, 0.35, 0.92, 0.75), "dark"), ("box", (0.12, 0.25, 0.65, 0.9), "body")],
    "bowl": [("lower", (0.04, 0.1, 0.96, 0.9), "body"), ("box", (0.35, 0.86, 0.65, 0.95), "dark")],
    "bottle": [
        ("box", (0.42, 0.03, 0.58, 0.36), "body"),
        ("round", (0.28, 0.33, 0.72, 0.97), "body"),
        ("box", (0.28, 0.55, 0.72, 0.72), "dark"),
    ],
    "oven": [
        ("box", (0.06, 0.06, 0.94, 0.94), "body"),
        ("box", (0.2, 0.4, 0.8, 0.84), "dark"),
        *_row("oval", (0.2, 0.4, 0.6), 0.14, 0.14, 0.14, "dark"),
    ],
    "car": [
        ("poly", (0.22, 0.5, 0.34, 0.25, 0.68, 0.25, 0.8, 0.5), "body"),
        ("box", (0.03, 0.48, 0.97, 0.74), "body"),
        *_row("oval", (0.14, 0.62), 0.62, 0.24, 0.26, "tyre"),
    ],
    "truck": [
        ("box", (0.02, 0.1, 0.62, 0.76), "body"),
        ("poly", (0.62, 0.34, 0.84, 0.34, 0.98, 0.54, 0.98, 0.76, 0.62, 0.76), "body"),
        ("poly", (0.68, 0.4, 0.81, 0.4, 0.9, 0.54, 0.68, 0.54), "glass"),
        *_row("oval", (0.1, 0.34, 0.7), 0.66, 0.22, 0.26, "tyre"),
    ],
    "traffic light": [
        ("box", (0.3, 0.02, 0.7, 0.8), "body"),
        ("box", (0.46, 0.8, 0.54, 0.99), "dark"),
        ("oval", (0.39, 0.07, 0.61, 0.28), "stop"),
        ("oval", (0.39, 0.31, 0.61, 0.52), "wait"),
        ("oval", (0.39, 0.55, 0.61, 0.76), "go"),
    ],
    "stop sign": [
        ("box", (0.46, 0.6, 0.54, 0.99), "dark"),
        ("poly", _octagon(0.5, 0.37, 0.36), "body"),
        ("box", (0.25, 0.31, 0.75, 0.42), "pale"),
        ("line", (0.27, 0.365, 0.73, 0.365), "dark"),
    ],
    "umbrella": [
        ("upper", (0.03, 0.05, 0.97, 0.99), "body"),
        ("thick", (0.5, 0.5, 0.5, 0.95), "dark"),
        ("hook", (0.32, 0.82, 0.52, 0.98), "dark"),
    ],
    "boat": [
        ("poly", (0.03, 0.66, 0.97, 0.66, 0.8, 0.93, 0.2, 0.93), "body"),
        ("thick", (0.48, 0.05, 0.48, 0.66), "dark"),
        ("poly", (0.54, 0.08, 0.54, 0.58, 0.9, 0.58), "pale"),
    ],
    "surfboard": [
        ("poly", _leaning_oval(0.5, 0.5, 0.48, 0.15, -1.1), "body"),
        ("line", (0.3, 0.89, 0.7, 0.11), "dark"),
    ],
    "kite": [
        ("poly", (0.5, 0.02, 0.82, 0.34, 0.5, 0.72, 0.18, 0.34), "body"),
        ("line", (0.5, 0.02, 0.5, 0.72), "dark"),
        ("line", (0.18, 0.34, 0.82, 0.34), "dark"),
        ("line", (0.5, 0.72, 0.38, 0.84, 0.58, 0.9, 0.45, 0.99), "dark"),
    ],
    "laptop": [
        ("box", (0.16, 0.14, 0.84, 0.62), "dark"),
        ("box", (0.22, 0.2, 0.78, 0.56), "glass"),
        ("poly", (0.16, 0.64, 0.84, 0.64, 0.99, 0.86, 0.01, 0.86), "body"),
    ],
    "keyboard": [
        ("box", (0.02, 0.3, 0.98, 0.74), "body"),
        *[
            stroke
            for y in (0.37, 0.5, 0.63)
            for stroke in _row(
                "bar", (0.08, 0.225, 0.37, 0.515, 0.66, 0.805), y, 0.09, 0.06, "dark"
            )
        ],
    ],
    "clock": [
        ("oval", (0.06, 0.06, 0.94, 0.94), "body"),
        ("thick", (0.5, 0.5, 0.5, 0.18), "dark"),
        ("thick", (0.5, 0.5, 0.74, 0.6), "dark"),
    ],
    "chair": [
        ("box", (0.2, 0.05, 0.32, 0.95), "body"),
        ("box", (0.2, 0.5, 0.8, 0.62), "body"),
        ("box", (0.68, 0.6, 0.8, 0.95), "body"),
    ],
    "bench": [
        ("box", (0.02, 0.26, 0.98, 0.36), "body"),
        ("box", (0.02, 0.42, 0.98, 0.52), "body"),
        ("box", (0.02, 0.6, 0.98, 0.7), "body"),
        *_row("bar", (0.1, 0.8), 0.26, 0.08, 0.66, "dark"),
    ],
    "dog": [
        ("oval", (0.12, 0.38, 0.74, 0.7), "body"),
        ("oval", (0.6, 0.16, 0.94, 0.5), "body"),
        ("poly", (0.64, 0.2, 0.58, 0.46, 0.72, 0.36), "dark"),
        *_row("bar", (0.18, 0.3, 0.54, 0.64), 0.62, 0.07, 0.33, "flat"),
        ("thick", (0.14, 0.48, 0.03, 0.24), "flat"),
    ],
    "bird": [
        ("oval", (0.2, 0.38, 0.78, 0.74), "body"),
        ("oval", (0.62, 0.2, 0.88, 0.46), "body"),
        ("poly", (0.86, 0.28, 0.99, 0.34, 0.86, 0.4), "beak"),
        ("poly", (0.22, 0.5, 0.01, 0.34, 0.04, 0.62), "flat"),
        ("poly", (0.36, 0.46, 0.6, 0.46, 0.4, 0.1), "dark"),
        ("line", (0.46, 0.72, 0.44, 0.95), "dark"),
        ("line", (0.56, 0.72, 0.58, 0.95), "dark"),
    ],
    "bicycle": [
        ("ring", (0.02, 0.46, 0.44, 0.88), "dark"),
        ("ring", (0.56, 0.46, 0.98, 0.88), "dark"),
        ("thick", (0.23, 0.67, 0.4, 0.34, 0.7, 0.34, 0.5, 0.67, 0.23, 0.67), "flat"),
        ("thick", (0.77, 0.67, 0.68, 0.22, 0.82, 0.2), "flat"),
        ("bar", (0.3, 0.26, 0.46, 0.32), "dark"),
    ],
    "couch": [
        ("round", (0.1, 0.2, 0.9, 0.7), "body"),
        ("box", (0.1, 0.52, 0.9, 0.82), "body"),
        *_row("round", (0.01, 0.81), 0.4, 0.18, 0.46, "body"),
        ("line", (0.5, 0.22, 0.5, 0.8), "dark"),
    ],
    "tv": [
        ("box", (0.03, 0.12, 0.97, 0.74), "body"),
        ("bar", (0.1, 0.19, 0.9, 0.67), "screen"),
        ("bar", (0.45, 0.74, 0.55, 0.86), "dark"),
        ("bar", (0.28, 0.86, 0.72, 0.93), "dark"),
    ],
    "vase": [
        ("line", (0.5, 0.42, 0.34, 0.2), "leaf"),
        ("line", (0.5, 0.42, 0.5, 0.12), "leaf"),
        ("line", (0.5, 0.42, 0.66, 0.2), "leaf"),
        ("oval", (0.25, 0.11, 0.43, 0.29), "petal"),
        ("oval", (0.41, 0.03, 0.59, 0.21), "petal"),
        ("oval", (0.57, 0.11, 0.75, 0.29), "petal"),
        (
            "poly",
            (
                0.4,
                0.4,
                0.6,
                0.4,
                0.56,
                0.52,
                0.74,
                0.74,
                0.62,
                0.97,
                0.38,
                0.97,
                0.26,
                0.74,
                0.44,
                0.52,
            ),
            "body",
        ),
    ],
    "cat": [
        ("oval", (0.3, 0.46, 0.82, 0.96), "body"),
        ("oval", (0.12, 0.2, 0.56, 0.6), "body"),
        ("poly", (0.14, 0.34, 0.16, 0.06, 0.32, 0.24), "body"),
        ("poly", (0.36, 0.24, 0.52, 0.06, 0.54, 0.34), "body"),
        ("tail", (0.66, 0.3, 0.98, 0.9), "flat"),
        *_row("oval", (0.22, 0.4), 0.34, 0.06, 0.08, "dark"),
    ],
}


def _shade(color: Rgb) -> Rgb:
    """The dark companion of a colour; black gets a grey one, so that inner lines stay visible."""
    if sum(color) < 200:
        return (80, 80, 80)
    red, green, blue = (int(v * 0.45) for v in color)
    return (red, green, blue)


def _stroke(draw: ImageDraw.ImageDraw, stroke: Stroke, color: Rgb) -> None:
    shape, unit, paint = stroke
    xy = [v * SIDE for v in unit]
    dark = _shade(color)
    fill = {"body": color, "flat": color, "dark": dark}.get(paint) or _PAINTS[paint]
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
    for stroke in GLYPHS[name]:
        _stroke(draw, stroke, COLORS[color])
    return image.crop(image.getbbox())


@cache
def sprite(name: str, color: str, size: int) -> Image.Image:
    """The object as an RGBA picture whose longer side is `size` pixels."""
    sheet = _sheet(name, color)
    scale = size / max(sheet.size)
    width, height = (max(4, round(v * scale)) for v in sheet.size)
    return sheet.resize((width, height), Image.Resampling.LANCZOS)


BACKDROPS: dict[str, tuple[Rgb, Rgb, str]] = {
    "kitchen": ((206, 214, 205), (176, 140, 108), "tiles"),
    "street": ((170, 188, 206), (112, 112, 116), "lane"),
    "beach": ((132, 190, 226), (226, 204, 150), "sea"),
    "office": ((196, 198, 212), (128, 134, 150), "blinds"),
    "park": ((160, 206, 232), (124, 178, 104), "grass"),
    "living room": ((222, 196, 178), (150, 112, 90), "panels"),
}
"""Theme to wall (or sky) colour, floor colour and pattern."""


def _jitter(color: Rgb, rng: np.random.Generator, amount: int = 14) -> Rgb:
    red, green, blue = np.clip(np.array(color) + rng.integers(-amount, amount + 1, 3), 0, 255)
    return (int(red), int(green), int(blue))


def _darker(color: Rgb, amount: int) -> Rgb:
    return (max(0, color[0] - amount), max(0, color[1] - amount), max(0, color[2] - amount))


def backdrop(theme: str, rng: np.random.Generator) -> Image.Image:
    """An empty room or place of the theme, its colours and horizon varied by `rng`."""
    wall, floor, pattern = BACKDROPS[theme]
    wall, floor = _jitter(wall, rng), _jitter(floor, rng)
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
