"""Episodes as films: frames to an H.264 file that every browser plays, and several policies side by side."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from gsa.errors import UsageError

SMALLEST_SIDE = 256  # pixels: 64×64 frames are shown enlarged, without smoothing
LABEL_HEIGHT = 32  # even, as yuv420p needs


def write_mp4(path: str | Path, frames: np.ndarray | Sequence[np.ndarray], fps: float) -> Path:
    """Writes frames [N, H, W, 3] uint8 as an mp4, enlarged by a whole factor to at least 256 pixels of height.

    The file appears only when it is whole. Raises UsageError for no frames or frames of another shape.
    """
    import imageio_ffmpeg

    film = np.asarray(frames)
    if film.ndim != 4 or film.shape[-1] != 3 or film.dtype != np.uint8 or not len(film):
        raise UsageError(f"A film needs frames [N, H, W, 3] uint8 with N ≥ 1, not {list(film.shape)} {film.dtype}.")
    factor = max(1, -(-SMALLEST_SIDE // film.shape[1]))
    height, width = film.shape[1] * factor, film.shape[2] * factor
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.mp4")
    # Odd sides are padded by one pixel: chroma is stored at half the resolution.
    even = ["-vf", "pad=ceil(iw/2)*2:ceil(ih/2)*2", "-movflags", "+faststart", "-threads", "1"]
    writer = imageio_ffmpeg.write_frames(
        str(temporary), (width, height), fps=fps, codec="libx264", quality=None, macro_block_size=1,
        output_params=["-crf", "20", *even], ffmpeg_log_level="error",
    )  # fmt: skip
    try:
        writer.send(None)
        for frame in film:
            writer.send(np.ascontiguousarray(_enlarge(frame, factor)))
        writer.close()
        os.replace(temporary, path)
    finally:
        writer.close()
        temporary.unlink(missing_ok=True)
    return path


def side_by_side(episodes: Mapping[str, np.ndarray]) -> np.ndarray:
    """Episodes {label: [N, H, W, 3]} of equal H and W as one film with a label over each; short ones hold still."""
    films = {label: np.asarray(film) for label, film in episodes.items()}
    if not films or any(not len(film) for film in films.values()):
        raise UsageError("A film side by side needs at least one episode, and each at least one frame.")
    if len({film.shape[1:] for film in films.values()}) > 1:
        raise UsageError(f"Films side by side need one size: {[list(f.shape[1:]) for f in films.values()]}.")
    longest = max(map(len, films.values()))
    columns = []
    for label, film in films.items():
        factor = max(1, -(-SMALLEST_SIDE // film.shape[1]))
        held = np.concatenate([film, np.repeat(film[-1:], longest - len(film), axis=0)])
        shown = _enlarge(held, factor)
        header = np.broadcast_to(_label(label, shown.shape[2]), (longest, LABEL_HEIGHT, shown.shape[2], 3))
        columns.append(np.concatenate([header, shown], axis=1))
    return np.concatenate(columns, axis=2)


def _enlarge(frames: np.ndarray, factor: int) -> np.ndarray:
    """[..., H, W, 3] with every pixel repeated `factor` times both ways."""
    return frames.repeat(factor, axis=-3).repeat(factor, axis=-2)


def _label(text: str, width: int) -> np.ndarray:
    """A bar of text, [LABEL_HEIGHT, width, 3] uint8."""
    from PIL import Image, ImageDraw

    bar = Image.new("RGB", (width, LABEL_HEIGHT), (24, 27, 32))
    ImageDraw.Draw(bar).text((8, LABEL_HEIGHT // 2), text, fill=(235, 238, 242), anchor="lm", font_size=16)
    return np.asarray(bar)
