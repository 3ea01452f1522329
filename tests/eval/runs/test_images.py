"""Each row of the tables in docs/images.md: what becomes of a file when it is asked about."""

import contextlib
import io
import json
import random
import re
import struct
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from zlib import compress, crc32

import numpy as np
import pytest
from PIL import Image, ImageFile
from transformers.image_utils import load_image

from eval.errors import EvalError
from eval.reports import table
from eval.runs import generate, runner
from eval.runs.images import MAX_PIXELS, UnreadableImageError, pixel_count, pixel_limit, read_image
from eval.runs.samples import Sample
from eval.support import tiny
from tests.eval.conftest import Settings

Save = Callable[[Path], None]
ORIENTATION = 274
PHOTOMETRIC = 262
DEEP_RAMP = np.arange(65536, dtype=np.uint16).reshape(256, 256)


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


COLOURS = Image.fromarray(noise(20, 30, 3))
CLEAR = Image.fromarray(noise(20, 30, 4))


def pixels(path: Path) -> np.ndarray:
    return np.asarray(read_image(path))


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[ORIENTATION] = orientation
    return tags


def frames(path: Path, **more: Any) -> None:
    COLOURS.save(path, save_all=True, append_images=[COLOURS.rotate(180)], **more)


# as transformers' own loader reads them
LIKE_THE_LOADER: dict[str, tuple[str, Save]] = {
    "capital suffix": ("a.JPG", lambda path: COLOURS.save(path)),
    "no suffix": ("a", lambda path: COLOURS.save(path, "PNG")),
    "a wrong suffix": ("a.png", lambda path: COLOURS.save(path, "JPEG")),
    "webp": ("a.webp", lambda path: COLOURS.save(path)),
    "grey": ("a.png", lambda path: COLOURS.convert("L").save(path)),
    "grey with alpha": ("a.png", lambda path: CLEAR.convert("LA").save(path)),
    "one bit": ("a.png", lambda path: COLOURS.convert("1").save(path)),
    "palette": ("a.png", lambda path: COLOURS.convert("P").save(path)),
    "palette with a clear colour": (
        "a.png",
        lambda path: COLOURS.convert("P").save(path, transparency=3),
    ),
    "alpha": ("a.png", lambda path: CLEAR.save(path)),
    "webp with alpha": ("a.webp", lambda path: CLEAR.save(path, lossless=True)),
    "a clear colour": ("a.png", lambda path: COLOURS.save(path, transparency=(1, 2, 3))),
    "cmyk jpeg": ("a.jpg", lambda path: COLOURS.convert("CMYK").save(path)),
    "cmyk tiff": ("a.tif", lambda path: COLOURS.convert("CMYK").save(path)),
    "grey, 0 is white": (
        "a.tif",
        lambda path: COLOURS.convert("L").save(path, tiffinfo={PHOTOMETRIC: 0}),
    ),
    "animated gif": ("a.gif", frames),
    "animated png": ("a.png", frames),
    "animated webp": ("a.webp", frames),
    "pages": ("a.tif", frames),
    "two pictures of a phone": ("a.jpg", lambda path: frames(path, format="MPO")),
    "turned jpeg": ("a.jpg", lambda path: COLOURS.save(path, exif=exif(6))),
    "turned png": ("a.png", lambda path: COLOURS.save(path, exif=exif(5))),
    "turned webp": ("a.webp", lambda path: COLOURS.save(path, exif=exif(8))),
    "turned tiff": ("a.tif", lambda path: COLOURS.save(path, tiffinfo={ORIENTATION: 3})),
    "a line": ("a.png", lambda path: COLOURS.crop((0, 0, 30, 1)).save(path)),
    "three rows": ("a.png", lambda path: COLOURS.crop((0, 0, 30, 3)).save(path)),
    "one pixel": ("a.png", lambda path: COLOURS.crop((0, 0, 1, 1)).save(path)),
}


@pytest.mark.filterwarnings("ignore:there are images with several frames")
@pytest.mark.parametrize("kind", LIKE_THE_LOADER)
def test_a_run_shows_the_pixels_that_the_snippet_of_the_readme_shows(
    kind: str, tmp_path: Path
) -> None:
    name, save = LIKE_THE_LOADER[kind]
    path = tmp_path / name
    save(path)
    assert read_image(path).mode == "RGB"
    assert np.array_equal(pixels(path), np.asarray(load_image(str(path))))
    processor = generate.prepare(tiny.processor(), "tiny")
    shown = generate.encode(processor, [Sample("chair", "test", "1", path, "Is it ?", {})])
    parts = [{"type": "image", "url": str(path)}, {"type": "text", "text": "Is it ?"}]
    snippet = processor.apply_chat_template(
        [{"role": "user", "content": parts}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    assert shown["pixel_values"].equal(snippet["pixel_values"])
    assert shown["input_ids"].equal(snippet["input_ids"])


# what turns the stored picture upright, by the number of its orientation
UPRIGHT: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda stored: stored,
    2: lambda stored: stored[:, ::-1],
    3: lambda stored: stored[::-1, ::-1],
    4: lambda stored: stored[::-1],
    5: lambda stored: stored.swapaxes(0, 1),
    6: lambda stored: stored[::-1].swapaxes(0, 1),
    7: lambda stored: stored[::-1, ::-1].swapaxes(0, 1),
    8: lambda stored: stored[:, ::-1].swapaxes(0, 1),
}


@pytest.mark.parametrize("deep", [False, True], ids=["8 bits", "16 bits"])
@pytest.mark.parametrize("orientation", UPRIGHT)
def test_a_turned_picture_is_turned_upright(orientation: int, deep: bool, tmp_path: Path) -> None:
    stored = noise(4, 6) if deep else noise(4, 6, 3)
    saved = stored.astype(np.uint16) * 257 if deep else stored
    Image.fromarray(saved).save(tmp_path / "a.png", exif=exif(orientation))
    found = pixels(tmp_path / "a.png")
    assert np.array_equal(found[..., 0] if deep else found, UPRIGHT[orientation](stored))


def test_cmyk_of_a_jpeg_is_not_inverted(tmp_path: Path) -> None:
    orange = Image.new("RGB", (8, 8), (250, 120, 10))
    orange.convert("CMYK").save(tmp_path / "a.jpg", quality=100)
    assert np.abs(pixels(tmp_path / "a.jpg") - np.array([250, 120, 10], int)).max() <= 3


def rounded(values: np.ndarray, white: float) -> np.ndarray:
    return np.floor(values.astype(np.float64) * 255 / white + 0.5).astype(int)


@pytest.mark.parametrize(
    ("name", "values", "white"),
    [
        ("a.png", DEEP_RAMP, 65535),
        ("a.tif", DEEP_RAMP, 65535),
        ("a.tif", DEEP_RAMP.astype(">u2"), 65535),
        ("a.tif", DEEP_RAMP.astype(np.int32), 65535),
        ("a.tif", (DEEP_RAMP / 65535).astype(np.float32), 1),
        ("a.png", DEEP_RAMP >> 2, 65535),
    ],
    ids=["png", "tiff", "big endian", "32-bit", "float", "14 bits in 16"],
)
def test_deep_grey_is_scaled_by_the_range_of_its_type(
    name: str, values: np.ndarray, white: float, tmp_path: Path
) -> None:
    Image.fromarray(values).save(tmp_path / name)
    found = pixels(tmp_path / name)
    assert np.array_equal(found[..., 0], rounded(values, white))
    assert np.array_equal(found, np.repeat(found[..., :1], 3, axis=2))


def test_deep_grey_of_a_pgm(tmp_path: Path) -> None:
    (tmp_path / "a.pgm").write_bytes(b"P5 256 256 65535\n" + DEEP_RAMP.astype(">u2").tobytes())
    assert np.array_equal(pixels(tmp_path / "a.pgm")[..., 0], rounded(DEEP_RAMP, 65535))


@pytest.mark.parametrize("values", [DEEP_RAMP, (DEEP_RAMP / 65535).astype(np.float32)])
def test_deep_grey_whose_0_is_white(values: np.ndarray, tmp_path: Path) -> None:
    Image.fromarray(values).save(tmp_path / "a.tif", tiffinfo={PHOTOMETRIC: 0})
    assert np.array_equal(pixels(tmp_path / "a.tif")[..., 0], 255 - rounded(DEEP_RAMP, 65535))


def test_a_deep_picture_of_one_value_stays_one(tmp_path: Path) -> None:
    Image.fromarray(np.full((4, 4), 257 * 9, np.uint16)).save(tmp_path / "a.png")
    assert np.array_equal(pixels(tmp_path / "a.png"), np.full((4, 4, 3), 9))


def written(data: bytes) -> Save:
    return lambda path: path.write_bytes(data) and None


def grey(values: np.ndarray) -> Save:
    return lambda path: Image.fromarray(values).save(path)


def cut(form: str, **more: Any) -> Save:
    def save(path: Path) -> None:
        data = io.BytesIO()
        COLOURS.save(data, form, **more)
        path.write_bytes(data.getvalue()[: len(data.getvalue()) * 9 // 10])

    return save


SLOPE = np.linspace(0, 1, 900, dtype=np.float32).reshape(30, 30)
HIDDEN = np.zeros((20, 30, 4), np.uint8)
HIDDEN[5:15, 5:15, 3] = 255

UNREADABLE: dict[str, tuple[str, Save, str]] = {
    "missing": ("a.jpg", lambda _: None, "no such image: .*a.jpg"),
    "empty": ("a.jpg", written(b""), "it is empty"),
    "blank": ("a.jpg", written(bytes(500)), "begins with zeros or blanks only"),
    "text": (
        "a.jpg",
        written(b"a cat on a mat"),
        "knows no image that begins with b'a cat on a m'",
    ),
    "web page": ("a.jpg", written(b"\n<!DOCTYPE html><p>404"), "it is a web page"),
    "lfs": ("a.jpg", written(b"version https://git-lfs.github.com/spec/v1\n"), "Git LFS pointer"),
    "svg": ("a.png", written(b"<svg xmlns='http://www.w3.org/2000/svg'/>"), "an SVG drawing"),
    "pdf": ("a.png", written(b"%PDF-1.7\n"), "it is a PDF document"),
    "heic": ("a.heic", written(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic"), "heic: HEIC or AVIF"),
    "folder": ("a.jpg", lambda path: path.mkdir(), "Is a directory"),
    "link to itself": ("a.jpg", lambda path: path.symlink_to(path), "symbolic links|Symlink loop"),
    "link to nothing": ("a.jpg", lambda path: path.symlink_to("b.jpg"), "no such image"),
    "cut jpeg": ("a.jpg", cut("JPEG"), "truncated"),
    "cut progressive jpeg": ("a.jpg", cut("JPEG", progressive=True), "truncated"),
    "cut png": ("a.png", cut("PNG"), "truncated|broken"),
    "cut gif": ("a.gif", cut("GIF"), "truncated"),
    "cut webp": ("a.webp", cut("WEBP"), "not a readable image"),
    "cut tiff": ("a.tif", cut("TIFF"), "not a readable image"),
    "12 bits in 16": ("a.png", grey(DEEP_RAMP >> 4), "nearly black.*Stretch"),
    "float to 255": ("a.tif", grey(SLOPE * 255), "values of 0 to 255; which of them is white"),
    "float below 0": ("a.tif", grey(SLOPE * 2 - 1), "values of -1 to 1; which of them is white"),
    "float with a hole": ("a.tif", grey(np.where(SLOPE > 0.5, np.nan, SLOPE)), "of nan to nan"),
    "dim float": ("a.tif", grey(SLOPE / 100), "values of up to 0.01, where white is 1"),
    "32 bits": ("a.tif", grey(np.arange(900, dtype=np.int32).reshape(30, 30) * 99), "0 to 89001;"),
    "fine steps": ("a.png", grey((SLOPE * 90 + 40000).astype(np.uint16)), "finer than 8 bits"),
    "shape in the alpha": ("a.png", grey(HIDDEN), "lies in its transparency"),
    "wide": ("a.png", grey(noise(1, 201)), "201 x 1 pixels: no side may be more than 200 times"),
    "tall": ("a.png", grey(noise(201, 1)), "1 x 201 pixels"),
}


@pytest.mark.parametrize("kind", UNREADABLE)
def test_what_cannot_be_shown_says_why(kind: str, tmp_path: Path) -> None:
    name, save, reason = UNREADABLE[kind]
    save(tmp_path / name)
    with pytest.raises(UnreadableImageError, match=reason) as caught:
        read_image(tmp_path / name)
    assert str(tmp_path / name) in str(caught.value)


def test_grey_is_not_filled_in_for_what_a_file_lacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Code of models and data sets likes to set this for the whole process."""
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    cut("JPEG")(tmp_path / "a.jpg")
    with pytest.raises(UnreadableImageError, match="truncated"):
        read_image(tmp_path / "a.jpg")
    assert ImageFile.LOAD_TRUNCATED_IMAGES


RAMP = Image.linear_gradient("L")


KEPT = {
    "PNG": ["1", "L", "P", "LA", "RGB", "RGBA", "I;16"],
    "TIFF": ["1", "L", "P", "LA", "RGB", "RGBA", "CMYK", "I;16", "I", "F"],
    "JPEG": ["L", "RGB", "CMYK"],
    "WEBP": ["L", "RGB", "RGBA"],
    "GIF": ["L", "P"],
}


@pytest.mark.parametrize(("form", "mode"), [(form, m) for form, ms in KEPT.items() for m in ms])
def test_a_ramp_stays_a_ramp(form: str, mode: str, tmp_path: Path) -> None:
    """In every mode that a format keeps."""
    wide = np.asarray(RAMP).astype(np.uint16) * 257
    deep = {"I;16": wide, "I": wide.astype(np.int32), "F": (wide / 65535).astype(np.float32)}
    picture = Image.fromarray(deep[mode]) if mode in deep else RAMP.convert(mode)
    picture.save(tmp_path / "a", form)
    found = pixels(tmp_path / "a")
    assert found.min() <= 1
    assert found.max() == 255
    if mode != "1":
        assert np.abs(found[..., 0] - np.asarray(RAMP, int)).max() <= 3


def one_bit_png(side: int) -> bytes:
    """A black square as it lies in a file; Pillow would take seconds to write the largest."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", crc32(kind + data))

    rows = bytes(side * (1 + side // 8))
    head = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    parts = [chunk(b"IHDR", head), chunk(b"IDAT", compress(rows, 1)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def test_a_huge_image_is_refused_and_the_limit_can_be_raised(tmp_path: Path) -> None:
    path = tmp_path / "map.png"
    path.write_bytes(one_bit_png(20000))
    with pixel_limit(MAX_PIXELS):
        with pytest.raises(UnreadableImageError, match=r"max_pixels allows \(89478485\).*--set"):
            read_image(path)
        assert pixel_count(path) == 0
    with pixel_limit(400_000_000):
        assert pixel_count(path) == 400_000_000
    path.write_bytes(one_bit_png(1600))
    with pixel_limit(1600 * 1600):
        assert read_image(path).size == (1600, 1600)


@pytest.mark.parametrize("over", [1, 1.5, 5], ids=["just", "where Pillow warns", "where it stops"])
def test_there_is_one_limit_of_pixels(over: float, tmp_path: Path) -> None:
    """Pillow warns from its limit on, and raises an error from twice that."""
    COLOURS.save(tmp_path / "a.png")
    before = Image.MAX_IMAGE_PIXELS
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pixel_limit(600):
            assert read_image(tmp_path / "a.png").size == (30, 20)
        with (
            pixel_limit(int(600 / over) - 1),
            pytest.raises(UnreadableImageError, match="more pixels than max_pixels"),
        ):
            read_image(tmp_path / "a.png")
    assert before == Image.MAX_IMAGE_PIXELS


@pytest.mark.parametrize("form", ["GIF", "PNG", "WEBP", "TIFF"])
def test_of_several_frames_the_first_is_shown_and_that_is_said(form: str, tmp_path: Path) -> None:
    frames(tmp_path / "a", format=form)
    with pytest.warns(UserWarning, match=rf"several frames or pages \({form}\)"):
        read_image(tmp_path / "a")


def test_the_second_picture_in_a_phones_jpeg_is_no_frame(tmp_path: Path) -> None:
    frames(tmp_path / "a.jpg", format="MPO")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_image(tmp_path / "a.jpg")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "form", ["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "JPEG2000", "TGA", "ICO", "PCX", "DDS"]
)
def test_damaged_bytes_give_a_picture_or_a_reason(form: str, tmp_path: Path) -> None:
    data, path, rng = io.BytesIO(), tmp_path / "a", random.Random(form)
    COLOURS.save(data, form)
    for turn in range(60):
        damaged = bytearray(data.getvalue())
        reach = len(damaged) if turn % 2 else min(len(damaged), 150)
        for _ in range(rng.randrange(1, 6)):
            damaged[rng.randrange(reach)] = rng.randrange(256)
        path.write_bytes(damaged)
        with pixel_limit(10**6), contextlib.suppress(UnreadableImageError):
            assert read_image(path).mode == "RGB"


@pytest.fixture
def strange_coco(tmp_path: Path) -> tuple[Path, dict[str, int]]:
    """A COCO folder with a readable image and one of every kind that can be a file."""
    folder = tmp_path / "coco"
    folder.mkdir()
    kinds = {kind: number for number, kind in enumerate(UNREADABLE, 2)}
    for kind in ("missing", "folder", "link to itself", "link to nothing"):
        del kinds[kind]
    COLOURS.save(folder / "1.png")
    for kind, number in kinds.items():
        name, save, _ = UNREADABLE[kind]
        save(folder / f"{number}{Path(name).suffix}")
    images = [{"id": int(path.stem), "file_name": path.name} for path in folder.iterdir()]
    truth = {"images": images, "categories": [{"id": 1, "name": "dog"}], "annotations": []}
    (folder / "instances_test.json").write_text(json.dumps(truth))
    (folder / "captions_test.json").write_text(json.dumps(truth))
    return folder, kinds


@pytest.fixture
def loaded(settings: Settings) -> Any:
    return generate.load_model(settings())


def test_a_run_over_strange_images_lists_each_with_its_reason(
    strange_coco: tuple[Path, dict[str, int]], settings: Settings, loaded: Any, tmp_path: Path
) -> None:
    folder, kinds = strange_coco
    config = settings(
        data=str(folder), tasks=["chair"], chair={"images": None, "max_new_tokens": 2}
    )
    out = tmp_path / "out"
    metrics = runner.run(config, out, load=lambda _: loaded)
    assert (metrics["answered"], metrics["skipped"]) == (1, len(kinds))
    names = {number: kind for kind, number in kinds.items()}
    rows = [json.loads(line) for line in (out / "skipped.jsonl").read_text().splitlines()]
    assert sorted(int(row["id"]) for row in rows) == sorted(kinds.values())
    assert all(re.search(UNREADABLE[names[int(row["id"])]][2], row["reason"]) for row in rows)
    said = table.markdown([out])
    assert f"{len(kinds)} of {len(kinds) + 1} samples skipped, see skipped.jsonl" in said


def test_a_run_whose_images_are_all_too_large_says_so(
    settings: Settings, loaded: Any, tmp_path: Path
) -> None:
    config = settings(tasks=["chair"], max_pixels=9)
    with pytest.raises(
        EvalError, match=r"all 5 samples were skipped, .*max_pixels .*skipped\.json"
    ):
        runner.run(config, tmp_path / "out", load=lambda _: loaded)


def test_frames_are_a_note_of_the_run(
    settings: Settings, loaded: Any, strange_coco: tuple[Path, dict[str, int]], tmp_path: Path
) -> None:
    folder, _ = strange_coco
    frames(folder / "1.png", format="GIF")  # the suffix does not count
    config = settings(
        data=str(folder), tasks=["chair"], chair={"images": None, "max_new_tokens": 2}
    )
    runner.run(config, tmp_path / "out", load=lambda _: loaded)
    assert "several frames or pages (GIF): the model sees the first" in table.markdown(
        [tmp_path / "out"]
    )
