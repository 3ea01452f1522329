"""The pocket world on disk: pictures and COCO-format annotations, drawn on demand.

`python -m eval.pocket.world SPLIT COUNT FOLDER` does from the command line what `write` does.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

from eval.pocket import SPLITS, WORLD
from eval.pocket.glyphs import SIDE
from eval.pocket.language import caption
from eval.pocket.scenes import Scene, Thing, render, scene, stream

VERSION = "2"
"""Changes with every change of the drawing, so that folders of an older world are drawn again."""

CAPTIONS = 5


def image_id(view: Scene) -> int:
    """A positive number that no other scene of any split has."""
    return (SPLITS.index(view.split) + 1) * 10_000_000 + view.index + 1


def file_name(view: Scene) -> str:
    """As COCO names its files, but PNG."""
    return f"{image_id(view):012d}.png"


def _head(split: str, views: list[Scene]) -> dict[str, Any]:
    info = {"description": f"pocket world, {split} split", "version": VERSION}
    images: list[dict[str, Any]] = [
        {"id": image_id(view), "file_name": file_name(view), "width": SIDE, "height": SIDE}
        for view in views
    ]
    return {"info": info, "licenses": [], "images": images}


def _annotation(thing: Thing) -> dict[str, Any]:
    x, y, width, height = thing.box
    corners = [x, y, x + width, y, x + width, y + height, x, y + height]
    return {
        "category_id": WORLD["objects"][thing.name]["id"],
        "bbox": [x, y, width, height],
        "area": width * height,
        "iscrowd": 0,
        "segmentation": [corners],
    }


def instances(split: str, views: list[Scene]) -> dict[str, Any]:
    """The content of COCO's instances file; the outline of an object is its box."""
    rows: list[dict[str, Any]] = []
    for view in views:
        for thing in view.things:
            rows.append({"id": len(rows) + 1, "image_id": image_id(view), **_annotation(thing)})
    categories = [
        {"id": about["id"], "name": name, "supercategory": about["kind"]}
        for name, about in WORLD["objects"].items()
    ]
    return _head(split, views) | {"annotations": rows, "categories": categories}


def captions(split: str, views: list[Scene]) -> dict[str, Any]:
    """The content of COCO's captions file: five true captions per scene."""
    rows: list[dict[str, Any]] = []
    for view in views:
        rng = stream(view.split, view.index, 2)
        for _ in range(CAPTIONS):
            text = caption(view, rng)
            rows.append({"id": len(rows) + 1, "image_id": image_id(view), "caption": text})
    return _head(split, views) | {"annotations": rows}


def _complete(split: str, count: int, folder: Path) -> bool:
    """Whether the folder holds all that `write` makes of these arguments."""
    for kind in ("captions", "instances"):
        path = folder / "annotations" / f"{kind}_{split}.json"
        try:
            written = json.loads(path.read_text(encoding="utf-8"))
            images = [image["file_name"] for image in written["images"]]
            version = written["info"]["version"]
        except (FileNotFoundError, json.JSONDecodeError, KeyError, TypeError):
            return False
        expected = [file_name(Scene(split, index, "", ())) for index in range(count)]
        if version != VERSION or images != expected:
            return False
    return all((folder / "images" / name).is_file() for name in expected)


def write(split: str, count: int, folder: Path) -> None:
    """Draw the first `count` scenes of a split: images/*.png and COCO-format annotations/*.json.

    A folder that is complete is left alone, one that is not is written again. Files take their
    names only when they are complete, the annotations last. Raises ValueError for an unknown split
    or a count below 1.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}: the pocket world has {', '.join(SPLITS)}")
    if count < 1:
        raise ValueError(f"count is the number of scenes, at least 1, got {count}")
    if _complete(split, count, folder):
        return
    views = [scene(split, index) for index in range(count)]
    for part in ("images", "annotations"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    for view in views:
        path = folder / "images" / file_name(view)
        partial = path.with_suffix(f".{os.getpid()}")
        render(view).save(partial, format="PNG", compress_level=1)
        os.replace(partial, path)
    for kind, content in (("instances", instances), ("captions", captions)):
        path = folder / "annotations" / f"{kind}_{split}.json"
        partial = path.with_suffix(f".{os.getpid()}")
        partial.write_text(json.dumps(content(split, views)), encoding="utf-8")
        os.replace(partial, path)


if __name__ == "__main__":
    if len(sys.argv) != 4 or not sys.argv[2].isdigit():
        raise SystemExit(f"usage: python -m eval.pocket.world {{{','.join(SPLITS)}}} COUNT FOLDER")
    write(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
