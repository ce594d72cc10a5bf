"""Images of whatever source as [H, W, 3] uint8, resized by area averaging."""

from __future__ import annotations

import io
from collections.abc import Iterable
from typing import Any

import numpy as np

from gsa.errors import FormatError
from retrieval.formats.extras import need
from retrieval.formats.source import image_size

ENCODED_BYTES = 1 << 26  # of one image as it lies in a file


def stack(frames: Iterable[np.ndarray], count: int, resize: int) -> np.ndarray:
    """`count` images [H, W, C], [C, H, W] or [H, W] uint8, one after the other, → [count, H, W, 3] uint8.

    Only one of them is in memory at full size. FormatError if they are fewer, more or not alike.
    """
    out, rows = np.empty((0, 0, 0, 3), np.uint8), 0
    for frame in frames:
        image = resized(channels_last(frame), resize)
        if rows == 0:
            out = np.empty((count, *image.shape), np.uint8)
        if rows >= count or image.shape != out.shape[1:]:
            raise FormatError(f"Image {rows} is {list(image.shape)}; {count} of {list(out.shape[1:])} are needed.")
        out[rows], rows = image, rows + 1
    if rows < count:
        raise FormatError(f"There are {rows} images; {count} are needed.")
    return out


def channels_last(image: np.ndarray) -> np.ndarray:
    """One image as [H, W, 3]: channels are moved last, grey is repeated, alpha left out."""
    if image.dtype != np.uint8 or image_size(image.shape) is None:
        raise FormatError(f"An image is {list(image.shape)} {image.dtype}; [H, W, 3] uint8 is needed.")
    if image.ndim == 2:
        image = image[..., None]
    elif image.shape[2] not in (1, 3, 4):
        image = image.transpose(1, 2, 0)
    return np.repeat(image, 3, axis=2) if image.shape[2] == 1 else image[..., :3]


def resized(image: np.ndarray, resize: int) -> np.ndarray:
    """[H, W, 3] → [resize, resize, 3], each pixel the mean of the area it covers; 0 leaves it."""
    if not resize or image.shape[:2] == (resize, resize):
        return image
    pil = need("PIL.Image", "lerobot")
    return np.asarray(pil.fromarray(np.ascontiguousarray(image)).resize((resize, resize), pil.Resampling.BOX))


def decoded(content: Any) -> np.ndarray:
    """A JPEG or PNG → [H, W, 3] uint8. FormatError for anything else, or for one of more than 4096 a side."""
    pil = need("PIL.Image", "lerobot")
    if len(content) > ENCODED_BYTES:
        raise FormatError(f"An image takes {len(content)} bytes.")
    try:
        with pil.open(io.BytesIO(bytes(content)), formats=("JPEG", "PNG")) as image:
            if image_size((image.height, image.width)) is None:
                raise FormatError(f"An image of {image.width} × {image.height} is not supported.")
            return np.asarray(image.convert("RGB"))
    except (OSError, ValueError, SyntaxError, EOFError, pil.DecompressionBombError) as error:
        raise FormatError(f"An image cannot be decoded: {error}.") from None
