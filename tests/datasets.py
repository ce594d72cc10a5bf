"""Datasets of each format, made from plays of the counting environment, by the formats' own libraries where these
install: what an importer reads can be held against what was played, step by step."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import gymnasium as gym
import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from minari.data_collector import EpisodeBuffer
from minari.dataset.minari_storage import MinariStorage

from tests.counting import counting

FPS = 20


@dataclass(frozen=True, eq=False)
class Play:
    """One played episode, in our alignment."""

    pixels: np.ndarray  # [T+1, 64, 64, 3]
    state: np.ndarray  # [T+1, 3] float32: step, seed, last action × 100
    action: np.ndarray  # [T, 2]
    reward: np.ndarray  # [T]
    seed: int


def play(seed: int, steps: int = 8) -> Play:
    """Actions are drawn by the seed. The step, the seed and the last action show in the image, as grey bars that lossy
    codecs keep, and in the state."""
    environment, rng = counting(steps), np.random.default_rng(seed)
    pixels, actions, rewards = [environment.reset(seed)["pixels"]], [], []
    for _ in range(steps):
        step = environment.step(np.round(rng.uniform(-1, 1, 2), 1).astype(np.float32))
        pixels.append(step.observation["pixels"])
        actions.append(step.action)
        rewards.append(step.reward)
    code = np.stack(pixels)[:, 0, 0].astype(np.int16)
    state = np.stack([code[:, 0], code[:, 1], code[:, 2] - 128], 1).astype(np.float32)
    return Play(np.stack([bars(c) for c in code]), state, np.stack(actions), np.asarray(rewards, np.float32), seed)


def bars(code: np.ndarray) -> np.ndarray:
    """Step, seed and last action as three grey bars of an image, in steps of 10 and more."""
    image = np.zeros((64, 64, 3), np.uint8)
    image[:, :24], image[:, 24:40], image[:, 40:] = code[0] * 10, code[1] * 10, code[2]
    return image


def seen(image: np.ndarray) -> tuple[int, int, float]:
    """Step, seed and last action that an image tells, whatever its size."""
    width = image.shape[1]
    bar = [image[:, round(width * at)].mean() for at in (0.18, 0.5, 0.82)]
    return round(bar[0] / 10), round(bar[1] / 10), round((bar[2] - 128) / 10) / 10


def assert_aligned(found: Any, played: Play, steps: int | None = None, name: str = "pixels") -> None:
    """What was ingested is what was played: each image shows its step and the action that led to it."""
    steps = len(played.action) if steps is None else steps
    assert len(found) == steps
    for t in range(steps + 1):
        step, seed, action = seen(found.observation[name][t])
        assert (step, seed) == (t, played.seed)
        assert t == 0 or action == round(float(found.action[t - 1, 0]), 1)
    np.testing.assert_allclose(found.action, played.action[:steps], atol=1e-6)


def write_robomimic(path: Path, plays: Sequence[Play], next_obs: bool = True, **options: Any) -> None:
    """As robomimic's documentation describes it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        kwargs = {"robots": ["Panda"], "control_freq": FPS}
        data.attrs["env_args"] = json.dumps({"env_name": "Lift", "env_type": 1, "env_kwargs": kwargs})
        data.attrs["total"] = sum(len(p.action) for p in plays)
        for i, p in enumerate(plays):
            demo = data.create_group(f"demo_{i}")
            demo.attrs["num_samples"] = len(p.action)
            demo["actions"], demo["rewards"] = p.action.astype(np.float64), p.reward.astype(np.float64)
            demo["dones"], demo["states"] = np.eye(1, len(p.action), len(p.action) - 1)[0], np.zeros((len(p.action), 9))
            for group, rows in (("obs", slice(None, -1)), *([("next_obs", slice(1, None))] if next_obs else [])):
                demo.create_dataset(f"{group}/agentview_image", data=p.pixels[rows], **options)
                demo[f"{group}/robot0_joint_pos"] = p.state[rows].astype(np.float64)


def write_minari(
    path: Path, plays: Sequence[Play], data_format: str = "hdf5", jpeg: bool = True, scale: float = 1.0,
    ends: bool = False, env: str | None = None,
) -> Path:  # fmt: skip
    """A dataset by Minari itself, its actions in [-scale, scale]; returns the folder of its data."""
    (path / "data").mkdir(parents=True)
    space = gym.spaces.Dict({
        "image": gym.spaces.Box(0, 255, (64, 64, 3), np.uint8),
        "state": gym.spaces.Box(-np.inf, np.inf, (3,), np.float32),
    })  # fmt: skip
    storage = MinariStorage.new(
        path / "data", space, gym.spaces.Box(-scale, scale, (2,), np.float32),
        gym.spec(env) if env else None, data_format, jpeg_encoding=jpeg,
    )  # fmt: skip
    storage.update_metadata({"dataset_id": "test/counting-v0", "minari_version": "0.5.4"})
    for p in plays:
        last = np.eye(1, len(p.action), len(p.action) - 1, dtype=bool)[0]
        storage.update_episodes([EpisodeBuffer(
            observations={"image": list(p.pixels), "state": list(p.state)}, actions=list(p.action * np.float32(scale)),
            rewards=list(p.reward), terminations=list(last & ends), truncations=list(last & (not ends)), infos={},
        )])  # fmt: skip
    return path / "data"


def write_lerobot(
    path: Path, plays: Sequence[Play], cameras: Sequence[str] = ("observation.images.top",), per_file: int = 2,
    codec: str = "libx264", scale: float = 1.0, embedded: bool = False,
) -> None:  # fmt: skip
    """Version 3's documented layout: `per_file` episodes in each parquet and mp4 file. `embedded`: images in the
    parquet files, as PNGs, in place of videos. A second camera sees the image upside down."""
    groups = [plays[i : i + per_file] for i in range(0, len(plays), per_file)]
    episodes, index = [], 0
    for file, group in enumerate(groups):
        rows, seconds = [], 0.0
        for p in group:
            number, length = len(episodes), len(p.pixels)
            rows += [_frame(p, t, index + t, number, scale, cameras if embedded else ()) for t in range(length)]
            videos = {} if embedded else {
                f"videos/{c}/{k}": v for c in cameras for k, v in (
                    ("chunk_index", 0), ("file_index", file), ("from_timestamp", seconds),
                    ("to_timestamp", seconds + length / FPS),
                )
            }  # fmt: skip
            episodes.append({
                "episode_index": number, "tasks": [f"count to {length}"], "length": length, "data/chunk_index": 0,
                "data/file_index": file, "dataset_from_index": index, "dataset_to_index": index + length, **videos,
                "meta/episodes/chunk_index": 0, "meta/episodes/file_index": 0,
            })  # fmt: skip
            index, seconds = index + length, seconds + length / FPS
        _parquet(path / "data" / "chunk-000" / f"file-{file:03d}.parquet", rows, len(group[0].pixels))
        for i, camera in enumerate(() if embedded else cameras):
            frames = np.concatenate([p.pixels for p in group])
            out = path / "videos" / camera / "chunk-000" / f"file-{file:03d}.mp4"
            write_video(out, frames[:, ::-1, ::-1] if i else frames, codec)
    _parquet(path / "meta" / "episodes" / "chunk-000" / "file-000.parquet", episodes)
    _write_meta(path, plays, cameras, scale, "image" if embedded else "video")


def write_video(path: Path, frames: np.ndarray, codec: str = "libx264") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=FPS, options={"g": "2", "crf": "20"})
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt, stream.time_base = "yuv420p", Fraction(1, FPS)
        for t, image in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
            frame.pts = t
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    if os.sched_getscheduler(0) != os.SCHED_OTHER:  # SVT-AV1 makes root's process a real-time one, and its children
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))


def _frame(p: Play, t: int, index: int, number: int, scale: float, embedded: Sequence[str]) -> dict[str, Any]:
    """A row of the data: the action at an observation; at the last one the person still holds the stick."""
    action = (p.action[t] if t < len(p.action) else np.full(2, 0.7)) * scale
    pictures = {
        c: {"bytes": _png(p.pixels[t, ::-1, ::-1] if i else p.pixels[t]), "path": None} for i, c in enumerate(embedded)
    }
    return {
        "action": action.astype(np.float32).tolist(), "observation.state": p.state[t].tolist(), **pictures,
        "next.reward": float(p.reward[t]) if t < len(p.action) else 99.0, "next.done": t == len(p.action),
        "timestamp": np.float32(t / FPS), "frame_index": t, "episode_index": number, "index": index, "task_index": 0,
    }  # fmt: skip


def _png(image: np.ndarray) -> bytes:
    import io

    from PIL import Image

    out = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(image)).save(out, "PNG")
    return out.getvalue()


def _parquet(path: Path, rows: list[dict[str, Any]], group: int = 1 << 20) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.Table.from_pylist(rows)
    pq.write_table(table, path, row_group_size=group)


def _write_meta(path: Path, plays: Sequence[Play], cameras: Sequence[str], scale: float, dtype: str) -> None:
    features: dict[str, Any] = {
        c: {"dtype": dtype, "shape": [64, 64, 3], "names": ["height", "width", "channels"]} for c in cameras
    }
    features |= {
        "action": {"dtype": "float32", "shape": [2], "names": None},
        "observation.state": {"dtype": "float32", "shape": [3], "names": None},
        "next.reward": {"dtype": "float32", "shape": [1], "names": None},
        "next.done": {"dtype": "bool", "shape": [1], "names": None},
        "timestamp": {"dtype": "float32", "shape": [1], "names": None},
    } | {
        k: {"dtype": "int64", "shape": [1], "names": None}
        for k in ("frame_index", "episode_index", "index", "task_index")
    }
    info = {
        "codebase_version": "v3.0", "robot_type": "so100", "fps": FPS,
        "total_episodes": len(plays), "features": features,
        "data_path": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
        "video_path": "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4",
    }  # fmt: skip
    (path / "meta" / "info.json").write_text(json.dumps(info))
    (path / "meta" / "stats.json").write_text(json.dumps({"action": {"min": [-scale] * 2, "max": [scale] * 2}}))
