"""Pictures from files, as a model gets them: upright, in RGB, eight bits a channel.

The pixels are those of `transformers.image_utils.load_image`: turned as EXIF says, then converted
by Pillow, which drops transparency. Where that would lose the picture, it is read by a stated rule
(16 bits, floats) or refused, and `docs/images.md` says what becomes of each kind of file.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

from eval.errors import EvalError

MAX_PIXELS = 89_478_485
"""Pillow's own limit; `pixel_limit` sets another."""
MAX_ASPECT = 200
"""Qwen2-VL's limit. Processors that scale the short side would make a huge image of a line."""
NEARLY_BLACK = 16
"""A 16-bit or float image whose values stay below this part of the range is not scaled rightly."""
TOO_LARGE = (Image.DecompressionBombError, Image.DecompressionBombWarning)
# how files begin that are often found under an image's name
BEGINNINGS = {
    b"version https://git-lfs": "it is a Git LFS pointer: fetch the file itself (git lfs pull)",
    b"<!doctype html": "it is a web page, so the download failed: fetch it again",
    b"<html": "it is a web page, so the download failed: fetch it again",
    b"<svg": "it is an SVG drawing: convert it to PNG",
    b"<?xml": "it is XML, not pixels: convert a drawing to PNG, fetch an error page again",
    b"%pdf": "it is a PDF document: convert the page to PNG",
}


class UnreadableImageError(EvalError):
    """An image that cannot be shown to a model as it is meant to be seen; says why."""


@contextmanager
def pixel_limit(pixels: int) -> Iterator[None]:
    """Within, images of up to so many pixels are read, and larger ones refused by us alone."""
    before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, pixels
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            yield
    finally:
        Image.MAX_IMAGE_PIXELS = before


def read_image(path: Path) -> Image.Image:
    """The image in a file, upright and in RGB; the first frame where there are several.

    UnreadableImageError where there is none, where it is broken, and where the conversion would
    leave one colour of a picture that has more.

    Example: `{"type": "image", "image": read_image(Path("scan.tif"))}` in a chat.
    """
    try:
        with _whole_files_only(), Image.open(path) as image:
            _check_size(path, image)
            picture = _rgb(path, image)
            _say_frames(image)
    except (MemoryError, UnreadableImageError):
        raise
    except FileNotFoundError:
        raise UnreadableImageError(f"no such image: {path}") from None
    except TOO_LARGE:
        raise _too_large(path) from None
    except UnidentifiedImageError:
        raise _unreadable(path, _not_an_image(path)) from None
    # decoders raise whatever they stumble over in a damaged file
    except Exception as error:
        raise _unreadable(path, str(error) or type(error).__name__) from error
    return picture


def pixel_count(path: Path) -> int:
    """Width times height as the head of the file tells; 0 where it cannot be read."""
    try:
        with Image.open(path) as image:
            return image.width * image.height
    except Exception:
        return 0


@contextmanager
def _whole_files_only() -> Iterator[None]:
    """Within, Pillow does not fill up with grey what a file lacks (a model's code may set that)."""
    before, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, False
    try:
        yield
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = before


def _unreadable(path: Path, reason: str) -> UnreadableImageError:
    return UnreadableImageError(f"{path} is not a readable image: {reason}")


def _too_large(path: Path) -> UnreadableImageError:
    return UnreadableImageError(
        f"{path} has more pixels than max_pixels allows ({Image.MAX_IMAGE_PIXELS}); if the file is "
        f"to be trusted, raise the limit, for example --set max_pixels=500000000"
    )


def _check_size(path: Path, image: Image.Image) -> None:
    if Image.MAX_IMAGE_PIXELS and image.width * image.height > Image.MAX_IMAGE_PIXELS:
        raise _too_large(path)
    short, long = sorted(image.size)
    if long > MAX_ASPECT * short:
        raise UnreadableImageError(
            f"{path} is {image.width} x {image.height} pixels: no side may be more than "
            f"{MAX_ASPECT} times as long as the other; crop it or leave it out"
        )


def _rgb(path: Path, image: Image.Image) -> Image.Image:
    upright = ImageOps.exif_transpose(image)
    deep = upright.mode in ("I", "F") or upright.mode.startswith("I;16")
    rgb = _eight_bits(path, image, upright) if deep else upright.convert("RGB")
    if _one_colour(rgb) and not _one_colour(upright if deep else upright.convert("RGBA")):
        raise UnreadableImageError(
            f"{path} would be of one colour only: what it shows lies in "
            f"{'steps finer than 8 bits' if deep else 'its transparency, which is dropped'}; "
            f"{'stretch its values' if deep else 'put it on a background'} and save it anew"
        )
    return rgb


def _eight_bits(path: Path, image: Image.Image, upright: Image.Image) -> Image.Image:
    """Grey values of 0 to 65535, or floats of 0 to 1, as RGB of eight bits, rounded."""
    values, white = np.asarray(upright), 1.0 if upright.mode == "F" else 65535.0
    low, high = float(values.min()), float(values.max())
    if not (low >= 0 and high <= white):  # also for NaN
        raise UnreadableImageError(
            f"{path} holds values of {low:g} to {high:g}; which of them is white is not known. "
            f"Expected floats of 0 to 1 or integers of 0 to 65535: scale it and save it anew"
        )
    if low < high < white / NEARLY_BLACK:
        raise UnreadableImageError(
            f"{path} holds values of up to {high:g}, where white is {white:g}: it would be nearly "
            f"black (12 bits in a file of 16?). Stretch its values and save it anew"
        )
    grey = np.rint(values * np.float32(255 / white)).astype(np.uint8)
    # PhotometricInterpretation of a TIFF: 0 is white. Pillow heeds it for 8 bits alone.
    if getattr(image, "tag_v2", {}).get(262) == 0:
        grey = 255 - grey
    return Image.fromarray(grey).convert("RGB")


def _one_colour(image: Image.Image) -> bool:
    extrema = image.getextrema()
    bands = extrema if isinstance(extrema[0], tuple) else (extrema,)
    return all(low == high for low, high in bands)


def _say_frames(image: Image.Image) -> None:
    """A warning for animations and pages; a phone's JPEG with a depth map (MPO) is neither."""
    if image.format not in ("MPO", "PSD") and getattr(image, "is_animated", False):
        warnings.warn(
            f"there are images with several frames or pages ({image.format}): the model sees the "
            f"first",
            stacklevel=2,
        )


def _not_an_image(path: Path) -> str:
    """What a file is that Pillow does not know, and what to do about it."""
    with path.open("rb") as file:
        head = file.read(64)
    if not head.strip(b"\0 \r\n\t"):
        return "it is empty" if not head else "it begins with zeros or blanks only: fetch it again"
    if head[4:8] == b"ftyp":
        kind = head[8:12].decode("ascii", "replace")
        return f"Pillow lacks a plugin for its kind ({kind}: HEIC or AVIF?): convert it to JPEG"
    start = head.lstrip(b"\xef\xbb\xbf \r\n\t").lower()
    reasons = (reason for begin, reason in BEGINNINGS.items() if start.startswith(begin))
    return next(reasons, f"Pillow knows no image that begins with {head[:12]!r}")
