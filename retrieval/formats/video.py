"""Frames of a video file, by their times. Decoded by FFmpeg through PyAV."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from gsa.errors import FormatError
from retrieval.formats import images
from retrieval.formats.extras import need

MAX_SIDE = 4096
LEAD_S = 60.0  # decoded before the first frame asked for, at most: seeking lands on a key frame before it


def frames_at(path: Path, times: Sequence[float], tolerance_s: float, resize: int) -> np.ndarray:
    """The frames shown at those ascending times, in seconds: [len(times), H, W, 3] uint8.

    FormatError if for one of them no frame is within `tolerance_s`.
    """
    return images.stack(_at(path, times, tolerance_s), len(times), resize)


def _at(path: Path, times: Sequence[float], tolerance_s: float) -> Iterator[np.ndarray]:
    """The nearest frame to each time."""
    av, wanted = need("av", "lerobot"), 0
    try:
        with av.open(str(path), format="mp4", options={"enable_drefs": "0", "use_absolute_path": "0"}) as container:
            stream = container.streams.video[0] if container.streams.video else None
            if stream is None or stream.codec_context is None:
                raise FormatError(f"{path.name} has no video, or one of an unknown codec.")
            if not 0 < max(stream.width, stream.height) <= MAX_SIDE:
                raise FormatError(f"{path.name} is {stream.width} × {stream.height}; {MAX_SIDE} a side at most.")
            stream.thread_type = "NONE" if len(times) < 2 else "SLICE"
            container.seek(max(0, int(times[0] / stream.time_base) - 1), stream=stream)  # to the key frame before
            for frame in container.decode(stream):
                if frame.time is None or max(frame.width, frame.height) > MAX_SIDE:
                    raise FormatError(f"A frame of {path.name} has no time, or another size.")
                if frame.time < times[0] - LEAD_S:
                    raise FormatError(f"{path.name} has no key frame in the {LEAD_S:.0f} s before {times[0]:.3f} s.")
                if times[wanted] < frame.time - tolerance_s:
                    raise FormatError(
                        f"{path.name} has no frame at {times[wanted]:.3f} s: the next is {frame.time:.3f}."
                    )
                image = None
                while wanted < len(times) and abs(times[wanted] - frame.time) <= tolerance_s:
                    image = frame.to_ndarray(format="rgb24") if image is None else image
                    yield image
                    wanted += 1
                if wanted == len(times):
                    return
    except (av.FFmpegError, OSError, ValueError, OverflowError, EOFError) as error:
        raise FormatError(f"{path.name} cannot be decoded: {error}.") from None
    raise FormatError(f"{path.name} ends before {times[wanted]:.3f} s.")
