"""Files from strangers: an error of ours, bounded memory, nothing executed, nothing read that is not the dataset's."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gsa.errors import FormatError, GsaError, UsageError
from retrieval.formats.isolated import ADDRESS_SPACE, Isolated
from retrieval.formats.registry import formats, open_source
from retrieval.formats.source import Options
from retrieval.ingest import ingest
from retrieval.store import TrajectoryStore
from tests import fuzz
from tests.datasets import assert_aligned, play, write_lerobot, write_minari, write_robomimic, write_video

PLAYS = [play(1, 4), play(2, 4)]
TOP = "observation.images.top"
START = f"videos/{TOP}/from_timestamp"
DISCRETE = '{"type": "Discrete", "dtype": "int64", "n": 3, "start": 0}'


@pytest.fixture
def store(tmp_path: Path) -> Iterator[TrajectoryStore]:
    with TrajectoryStore.create(tmp_path / "store") as writable:
        yield writable


# HDF5


def replaced(path: str, **how: Any) -> Callable[[h5py.File, Path], None]:
    """A dataset of the file in another shape."""

    def change(file: h5py.File, elsewhere: Path) -> None:
        del file[path]
        file.create_dataset(path, **how)

    return change


def linked(path: str, make: Callable[[Path], Any]) -> Callable[[h5py.File, Path], None]:
    def change(file: h5py.File, elsewhere: Path) -> None:
        del file[path]
        file[path] = make(elsewhere)

    return change


def external(file: h5py.File, elsewhere: Path) -> None:
    """Pixels that are the bytes of another file."""
    del file["data/demo_0/obs/agentview_image"]
    where = [(str(elsewhere), 0, 4 * 64 * 64 * 3)]
    file.create_dataset("data/demo_0/obs/agentview_image", (4, 64, 64, 3), "u1", external=where)


def virtual(file: h5py.File, elsewhere: Path) -> None:
    del file["data/demo_0/obs/agentview_image"]
    layout = h5py.VirtualLayout((4, 64, 64, 3), "u1")
    layout[:] = h5py.VirtualSource(str(elsewhere), "data/demo_0/obs/agentview_image", (4, 64, 64, 3), "u1")
    file.create_virtual_dataset("data/demo_0/obs/agentview_image", layout)


IMAGES, ACTIONS = "data/demo_0/obs/agentview_image", "data/demo_0/actions"
HDF5: dict[str, tuple[Callable[[h5py.File, Path], None], str]] = {
    "a link to another file": (linked("data/demo_0", lambda p: h5py.ExternalLink(str(p), "/data/demo_0")), "link"),
    "a link to a secret": (linked(IMAGES, lambda p: h5py.ExternalLink("/etc/passwd", "/")), "link"),
    "a link in a circle": (linked("data/demo_0/obs", lambda p: h5py.SoftLink("/data/demo_0")), "link"),
    "pixels in another file": (external, "another file"),
    "a virtual dataset": (virtual, "another file"),
    "a bomb of zeros": (replaced(IMAGES, shape=(1 << 19, 64, 64, 3), dtype="u1", chunks=(64, 64, 64, 3),
                                 compression="gzip"), r"\[524288, 64, 64, 3\]"),
    "a bomb of actions": (replaced(ACTIONS, shape=(1 << 20, 4096), dtype="f8", chunks=(1, 4096)), "too much"),
    "an absurd shape": (replaced(IMAGES, shape=(1 << 50, 64, 64, 3), dtype="u1", chunks=(1, 64, 64, 3)), "shape"),
    "an absurd image": (replaced(IMAGES, shape=(4, 1 << 20, 1 << 20, 3), dtype="u1", chunks=(1, 64, 64, 3)), "no obs"),
    "an absurd chunk": (replaced(IMAGES, shape=(4, 4096, 4096, 3), dtype="u1", chunks=(4, 4096, 4096, 3)), "4096"),
    "rows of a gigabyte": (replaced(ACTIONS, shape=(4, 1 << 28), dtype="f4", chunks=(1, 1 << 20)), "too much|dim"),
    "compound actions": (replaced(ACTIONS, data=np.zeros(4, "f4,i2")), "numbers"),
    "actions as texts": (replaced(ACTIONS, data=np.asarray([b"a"] * 4)), "numbers"),
    "ragged actions": (replaced(ACTIONS, shape=(4,), dtype=h5py.vlen_dtype(np.float32)), "numbers"),
    "references": (replaced(ACTIONS, shape=(4,), dtype=h5py.ref_dtype), "numbers"),
    "complex actions": (replaced(ACTIONS, data=np.zeros((4, 2), np.complex64)), "numbers"),
    "a scalar": (replaced(ACTIONS, data=1.0), "numbers"),
    "NaN actions": (replaced(ACTIONS, data=np.full((4, 2), np.nan)), "NaN"),
    "infinite actions": (replaced(ACTIONS, data=np.full((4, 2), np.inf)), "outside"),
    "actions outside": (replaced(ACTIONS, data=np.full((4, 2), 7.0)), r"reach 7.*--action-low"),
    "one row too many": (replaced(ACTIONS, data=np.zeros((5, 2))), "rows|needed"),
    "NaN rewards": (replaced("data/demo_0/rewards", data=np.full(4, np.nan)), "reward has NaN"),
    "steps out of order": (replaced("data/demo_0/next_obs/agentview_image", data=PLAYS[0].pixels[:-1]), "in sequence"),
    "a group for a dataset": (lambda f, p: (f.pop(ACTIONS), f.create_group(ACTIONS)), "not a dataset"),
    "no observations": (lambda f, p: f.pop("data/demo_0/obs"), "no obs"),
    "env_args that are none": (lambda f, p: f["data"].attrs.__setitem__("env_args", "[" * 100_000), "env_args"),
}  # fmt: skip


def test_hostile_hdf5_is_named_and_the_rest_ingested(tmp_path: Path, store: TrajectoryStore) -> None:
    folder = tmp_path / "pool"
    write_robomimic(folder / "a.hdf5", PLAYS[:1])
    write_robomimic(tmp_path / "secret.hdf5", PLAYS[1:])
    for i, (change, _) in enumerate(HDF5.values()):
        write_robomimic(folder / f"b{i:02}.hdf5", PLAYS[1:])
        with h5py.File(folder / f"b{i:02}.hdf5", "r+") as file:
            change(file, tmp_path / "secret.hdf5")
    (folder / "c.hdf5").write_bytes((folder / "a.hdf5").read_bytes()[:-3000])
    report = ingest(folder, store)
    failed = dict(report.failed)
    for i, (name, (_, reason)) in enumerate(HDF5.items()):
        said = next((why for where, why in failed.items() if where.startswith(f"b{i:02}.hdf5")), "ingested")
        assert re.search(reason, said), (name, said)
    assert any(where.startswith("c.hdf5") for where in failed)
    assert (report.added, len(failed)) == (1, len(HDF5) + 1)
    assert_aligned(store.read(0), PLAYS[0])
    assert store.verify() == []


# LeRobot


def info(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "meta" / "info.json"
        told = json.loads(path.read_text())
        for key, value in changes.items():
            told[key] = value(told[key]) if callable(value) else value
        path.write_text(json.dumps(told))

    return change


def column(place: str, name: str, values: Callable[[pa.Table], Any]) -> Callable[[Path], None]:
    """A column of the episodes' table or of the data in other words."""

    def change(folder: Path) -> None:
        path = folder / ("meta/episodes" if place == "episodes" else "data") / "chunk-000" / "file-000.parquet"
        table = pq.read_table(path)
        made = pa.array(values(table))
        pq.write_table(table.set_column(table.column_names.index(name), name, made), path)

    return change


def truncated_video(folder: Path) -> None:
    path = folder / "videos" / TOP / "chunk-000" / "file-000.mp4"
    path.write_bytes(path.read_bytes()[:-700])


def short_video(folder: Path) -> None:
    write_video(folder / "videos" / TOP / "chunk-000" / "file-000.mp4", PLAYS[0].pixels[:2])


def playlist(folder: Path) -> None:
    """A text that FFmpeg may take for a list of files to play."""
    path = folder / "videos" / TOP / "chunk-000" / "file-000.mp4"
    path.write_text("ffconcat version 1.0\nfile /etc/passwd\n")


def features(**changes: Any) -> Callable[[Path], None]:
    return info(features=lambda told: told | changes)


LEROBOT: dict[str, tuple[Callable[[Path], None], str]] = {
    "version 2": (info(codebase_version="v2.1"), "version v2.1; version 3 is needed"),
    "no speed": (info(fps=0), "positive number"),
    "a speed of NaN": (info(fps=float("nan")), "positive number"),
    "features as a list": (info(features=[]), "features"),
    "a path for a feature": (features(**{"../../../x": {"dtype": "video", "shape": [64, 64, 3]}}), "cannot be"),
    "a huge camera": (features(**{TOP: {"dtype": "video", "shape": [1 << 30, 1 << 30, 3]}}), "1073741824"),
    "huge actions": (features(action={"dtype": "float32", "shape": [1 << 40]}), "action"),
    "actions of texts": (features(action={"dtype": "string", "shape": [2]}), "no action"),
    "a dtype that is none": (features(action={"dtype": "evil", "shape": [2]}), "action"),
    "deep JSON": (lambda f: (f / "meta" / "info.json").write_text("[" * 100_000), "cannot be read"),
    "an endless episode": (column("episodes", "length", lambda t: [1 << 60] * len(t)), "steps"),
    "an empty episode": (column("episodes", "length", lambda t: [0] * len(t)), "steps"),
    "a negative file": (column("episodes", "data/file_index", lambda t: [-1] * len(t)), "chunk|not what"),
    "a file as text": (column("episodes", "data/file_index", lambda t: ["../../x"] * len(t)), "not what"),
    "a start at infinity": (column("episodes", START, lambda t: [np.inf] * len(t)), "not what"),
    "a start after the end": (column("episodes", START, lambda t: [1e6] * len(t)), "ends before|frame"),
    "other episodes' rows": (column("data", "episode_index", lambda t: [7] * len(t)), "in order"),
    "rows out of order": (column("data", "frame_index", lambda t: list(range(len(t)))[::-1]), "in order"),
    "times that are NaN": (column("data", "timestamp", lambda t: np.full(len(t), np.nan, "f4")), "decoded|frame"),
    "times out of step": (column("data", "timestamp", lambda t: t["timestamp"].to_numpy() + 0.04), "frame|ends"),
    "gaps": (column("data", "action", lambda t: [None] * len(t)), "numbers|gaps"),
    "actions of three": (column("data", "action", lambda t: [[0.0] * 3] * len(t)), "gaps"),
    "NaN actions": (column("data", "action", lambda t: [[float("nan")] * 2] * len(t)), "NaN"),
    "a truncated video": (truncated_video, "decoded|ends|no video"),
    "a short video": (short_video, "ends before"),
    "a list of files for a video": (playlist, "decoded"),
}  # fmt: skip


@pytest.mark.parametrize("name", LEROBOT)
def test_hostile_lerobot(tmp_path: Path, name: str) -> None:
    """In this process: an error of ours, whatever is wrong."""
    change, reason = LEROBOT[name]
    write_lerobot(tmp_path / "lab", PLAYS)
    change(tmp_path / "lab")
    assert re.search(reason, faults("lerobot", tmp_path / "lab"))


# Minari


def metadata(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "metadata.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def in_hdf5(change: Callable[[h5py.File], Any]) -> Callable[[Path], None]:
    def act(folder: Path) -> None:
        with h5py.File(folder / "main_data.hdf5", "r+") as file:
            change(file)

    return act


def box(low: Any, high: Any, shape: Any = (2,), dtype: str = "float32") -> str:
    return json.dumps({"type": "Box", "dtype": dtype, "shape": shape, "low": low, "high": high})


def replace(path: str, value: Any) -> Callable[[h5py.File], None]:
    def change(file: h5py.File) -> None:
        del file[path]
        file[path] = value

    return change


def not_jpeg(file: h5py.File) -> None:
    del file["episode_0/observations/image"]
    file["episode_0/observations/image"] = np.full((5, 100), 7, np.uint8)


def big_jpeg(file: h5py.File) -> None:
    """An image that unpacks to 5000 × 5000."""
    import io

    from PIL import Image

    out = io.BytesIO()
    Image.new("L", (5_000, 5_000)).save(out, "PNG")
    content = np.frombuffer(out.getvalue(), np.uint8)
    del file["episode_0/observations/image"]
    file["episode_0/observations/image"] = np.stack([content] * 5)


MINARI: dict[str, tuple[Callable[[Path], None], str]] = {
    "an unknown format": (metadata(data_format="pickle"), "hdf5, arrow and parquet"),
    "a format as path": (metadata(data_format="../../x"), "hdf5, arrow and parquet"),
    "no space": (metadata(observation_space=None), "no observation_space"),
    "a space of code": (metadata(observation_space="__import__('os')"), "no observation_space"),
    "discrete actions": (metadata(action_space=DISCRETE), "continuous"),
    "huge actions": (metadata(action_space=box(-1, 1, (1 << 40,))), "actions|action space"),
    "bounds of text": (metadata(action_space=box("a", 1)), "action space"),
    "unbounded actions that leave the range": (
        lambda f: (metadata(action_space=box(-np.inf, np.inf))(f),
                   in_hdf5(lambda h: h["episode_0/actions"].__setitem__(0, 5))(f)), "reach 5"),
    "rewards too few": (in_hdf5(replace("episode_0/rewards", [0.0])), "not|rows"),
    "images that are no JPEG": (in_hdf5(not_jpeg), "cannot be decoded"),
    "an image that unpacks to much": (in_hdf5(big_jpeg), "not supported|cannot be decoded"),
    "a link elsewhere": (in_hdf5(replace("episode_0", h5py.ExternalLink("/etc/passwd", "/"))), "link"),
    "no file": (lambda f: (f / "main_data.hdf5").unlink(), "not readable"),
    "another file": (lambda f: (f / "main_data.hdf5").write_bytes(b"\x89HDF\r\n\x1a\n"), "not readable"),
}  # fmt: skip


@pytest.mark.parametrize("name", MINARI)
def test_hostile_minari(tmp_path: Path, name: str) -> None:
    change, reason = MINARI[name]
    folder = write_minari(tmp_path / "d", PLAYS)
    change(folder)
    assert re.search(reason, faults("minari", folder))


def faults(format: str, path: Path) -> str:
    """What is said of a dataset of which something is wrong; fails if nothing is."""
    said = []
    try:
        source = formats()[format].open(path, Options(embodiment="test/robot"))
        for index in range(len(source)):
            try:
                source.entry(index)
                source.load(index)
            except FormatError as error:
                said.append(str(error))
    except GsaError as error:
        said.append(str(error))
    assert said, "nothing was found"
    return " ".join(said)


# The process of their own


def test_a_reader_that_dies_costs_one_episode(tmp_path: Path) -> None:
    write_robomimic(tmp_path / "a.hdf5", PLAYS)
    with contextlib.closing(open_source(tmp_path / "a.hdf5")) as source:
        assert isinstance(source, Isolated)
        source._idle[0]._process.kill()
        with pytest.raises(FormatError, match="number 0 cannot be read: its reader died of signal 9"):
            source.load(0)
        assert_aligned(source.load(1).trajectory, PLAYS[1])


def test_a_table_that_aborts_the_parquet_library_is_an_error(tmp_path: Path) -> None:
    """Found by fuzzing: this table ends the process that reads it, whatever it catches."""
    fuzz.make_dataset("lerobot", tmp_path / "d")
    fuzz.mutate(tmp_path / "d", random.Random("lerobot 267"))
    with pytest.raises(FormatError):
        open_source(tmp_path / "d", "lerobot", Options(embodiment="test/robot"))


def test_a_silent_reader_is_not_waited_for(tmp_path: Path) -> None:
    write_robomimic(tmp_path / "a.hdf5", PLAYS)
    with contextlib.closing(Isolated(tmp_path / "a.hdf5", "robomimic", Options())) as source:
        source._idle[0]._patience_s = 0.2
        os.kill(source._idle[0]._process.pid, 19)  # SIGSTOP
        with pytest.raises(FormatError, match="said nothing"):
            source.load(0)


def test_readers_have_bounded_memory_and_end_with_their_source(tmp_path: Path) -> None:
    write_robomimic(tmp_path / "a.hdf5", PLAYS)
    source = Isolated(tmp_path / "a.hdf5", "robomimic", Options())
    process = source._idle[0]._process
    assert resource.prlimit(process.pid, resource.RLIMIT_AS) == (ADDRESS_SPACE, ADDRESS_SPACE)
    assert resource.prlimit(process.pid, resource.RLIMIT_CORE) == (0, 0)
    source.close()
    assert process.returncode is not None


def test_a_missing_library_is_named_with_its_extra(tmp_path: Path) -> None:
    write_robomimic(tmp_path / "a.hdf5", PLAYS)
    code = (
        "import sys; sys.modules['h5py'] = None\n"
        "from retrieval.formats.registry import formats\nfrom retrieval.formats.source import Options\n"
        "from pathlib import Path\n"
        f"formats()['robomimic'].open(Path({str(tmp_path / 'a.hdf5')!r}), Options())"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert f"{UsageError.__name__}: This needs h5py" in found.stderr
    assert "gsa-rl[robomimic]" in found.stderr


# Many of them


@pytest.mark.parametrize("format", fuzz.FORMATS)
def test_damaged_datasets_end_in_episodes_or_errors(format: str) -> None:
    """A few; benchmarks/fuzz.py tries 2000 of each. Libraries may crash or hang where a process of its own takes it."""
    found = fuzz.run(format, 25)
    assert found["unexpected"] == 0, found
    assert found["crashed"] + found["hung"] == 0 or formats()[format.partition("-")[0]].isolated, found
    assert found["peak_mb"] < 500, found
    assert found["refused"] > 0
