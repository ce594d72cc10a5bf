"""Importers given thousands of damaged and lying datasets: each ends in episodes or in an error of ours.

A dataset of a format is made once; each input is a copy of it with one file mutated by the seed: bits and bytes,
lengths, truncation, repetition, numbers and texts in JSON, and, where a container has checksums, what is inside it.
Inputs run in a process with the address space of an importer's child, but without one, many to a process, so that
a crash or an error that is not ours shows with its seed.
"""

from __future__ import annotations

import io
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

SECONDS = 10  # for one input
INTERESTING = (0, 1, 2, 127, 128, 255, 2**15, 2**16, 2**24, 2**31 - 1, 2**31, 2**32 - 1, 2**62, 2**63 - 1, 2**64 - 1)
LIES = (
    b"-1", b"0", b"1e999", b"1e308", b"99999999999999999999", b"NaN", b"null", b"true", b"[]", b"{}", b'"../../../etc"',
    b'"/etc/passwd"', b'"\\u0000"', b'"{0.__class__}"', b'"float16"', b'"object"', b'"O"', b'"uint8"', b"[" * 3000,
    b"4611686018427387904",
)  # fmt: skip


def run(format: str, inputs: int, first: int = 0) -> dict[str, Any]:
    """Tries the seeds first ≤ s < first + inputs. Counts of what became of them, and the peak of memory in MB."""
    counts: Counter[str] = Counter()
    peak, seed, unexpected = 0.0, first, []
    with tempfile.TemporaryDirectory() as folder:
        make_dataset(format, Path(folder) / "whole")
        while seed < first + inputs:
            command = [sys.executable, "-m", "tests.fuzz", format, folder, str(seed), str(first + inputs)]
            found = subprocess.run(command, capture_output=True, text=True, check=False)
            for line in found.stdout.splitlines():
                told, _, rest = line.partition(" ")
                if told == "peak":
                    peak = max(peak, float(rest))
                else:
                    seed += 1
                    counts[told] += 1
                    unexpected += [f"seed {seed - 1}: {rest}"] if told == "unexpected" else []
            if found.returncode < 0:
                hung = -found.returncode == signal.SIGALRM
                counts["hung" if hung else "crashed"] += 1
                unexpected.append(f"seed {seed}: {'hung' if hung else f'signal {-found.returncode}'}")
                seed += 1
            elif found.returncode:
                raise RuntimeError(found.stderr)
    names = ("refused", "read", "unexpected", "crashed", "hung")
    outcomes = {name: counts[name] for name in names}
    return {"format": format, "inputs": inputs, **outcomes, "peak_mb": peak, "seeds": unexpected}


def make_dataset(format: str, folder: Path) -> None:
    from tests import datasets

    plays = [datasets.play(seed, 4) for seed in (1, 2)]
    folder.mkdir()
    if format in ("npz", "exorl"):
        from tests.test_ingest import record, save

        place = folder / ("dmcontrol/walker" if format == "npz" else "walker/proto/buffer")
        names = ("20240101T000000-ab-0-9.npz", "20240101T000000-ab-1-9.npz")
        for i, name in enumerate(names if format == "npz" else ("episode_000000_9.npz", "episode_000001_9.npz")):
            save(place, name, **record(i))
    elif format == "robomimic":
        datasets.write_robomimic(folder / "image.hdf5", plays)
    elif format == "robomimic-gzip":
        datasets.write_robomimic(folder / "image.hdf5", plays, compression="gzip", chunks=(2, 64, 64, 3))
    elif format.startswith("minari"):
        _, data_format, encoding = format.split("-")
        datasets.write_minari(folder, plays, data_format, encoding == "jpeg")
    elif format == "lerobot":
        datasets.write_lerobot(folder, plays)
    elif format == "lerobot-images":
        datasets.write_lerobot(folder, plays, embedded=True)
    elif format == "store":
        from retrieval.store import TrajectoryStore
        from tests.trajectories import counting, counting_spec

        with TrajectoryStore.create(folder / "s") as store:
            for i in range(3):
                store.append(counting(i, 9, counting_spec()), counting_spec())


FORMATS = (
    "npz", "exorl", "robomimic", "robomimic-gzip", "minari-hdf5-raw", "minari-hdf5-jpeg", "minari-arrow-raw",
    "minari-arrow-jpeg", "minari-parquet-raw", "lerobot", "lerobot-images", "store",
)  # fmt: skip


def child(format: str, folder: Path, first: int, last: int) -> None:
    """Tells of each seed in a line what became of it."""
    from retrieval.formats.isolated import ADDRESS_SPACE

    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    warnings.simplefilter("ignore")
    for seed in range(first, last):
        signal.alarm(SECONDS)
        print(attempt(format, folder, seed), flush=True)
        signal.alarm(0)
        if seed == last - 1 or seed % 50 == 0:
            print(f"peak {peak_mb():.0f}", flush=True)


def peak_mb() -> float:
    """The most memory this program has held. Not getrusage's, which begins with what the one that started it held."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1e3


def attempt(format: str, folder: Path, seed: int) -> str:
    from gsa.errors import GsaError
    from retrieval.formats.registry import formats
    from retrieval.formats.source import Options

    copy = folder / f"input-{os.getpid()}"
    shutil.copytree(folder / "whole", copy)
    mutate(copy, random.Random(f"{format} {seed}"))
    outcome = "read"
    try:
        kind = format.partition("-")[0]
        path = next(copy.rglob("store.json"), copy / "s").parent if kind == "store" else copy
        options = Options() if kind == "store" else Options(embodiment="test/counter")
        source = formats()[kind].open(path, options)
        try:
            for index in range(min(len(source), 20)):
                try:
                    source.entry(index)
                    check(source.load(index).trajectory)
                except GsaError:
                    outcome = "refused"
        finally:
            source.close()
    except (GsaError, MemoryError):
        outcome = "refused"
    except Exception as error:
        outcome = f"unexpected {type(error).__name__}: {str(error)[:200]!r}"
    finally:
        shutil.rmtree(copy)
    return outcome


def check(trajectory: object) -> None:
    """What was read is a trajectory: its own checks ran; it may be touched from end to end."""
    for array in trajectory.observation.values():  # type: ignore[attr-defined]
        assert np.asarray(array).sum() >= -np.inf


def mutate(folder: Path, rng: random.Random) -> None:
    """Changes one file of a dataset, or leaves one out."""
    path = rng.choice(sorted(p for p in folder.rglob("*") if p.is_file()))
    content = path.read_bytes()
    if rng.random() < 0.01:
        path.unlink()
    elif path.suffix == ".json":
        path.write_bytes(lie(content, rng) if rng.random() < 0.8 else damage(content, rng))
    elif path.suffix == ".npz" and rng.random() < 0.7:
        path.write_bytes(inside_zip(content, rng))
    elif path.suffix == ".hdf5" and rng.random() < 0.4:
        inside_hdf5(path, rng)
    elif path.suffix == ".parquet" and rng.random() < 0.5:
        inside_parquet(path, rng)
    else:
        path.write_bytes(damage(content, rng))


def damage(content: bytes, rng: random.Random) -> bytes:
    """Some of: bits, bytes, words, cuts, repetitions."""
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        if len(data) < 9:
            break
        at = rng.randrange(len(data) - 8) if rng.random() < 0.6 else rng.randrange(min(len(data) - 8, 2048))
        end = min(len(data), at + rng.choice((1, 4, 64, 1000)))
        kind = rng.randrange(8)
        if kind == 0:
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            data[at] = rng.randrange(256)
        elif kind in (2, 3):
            width, order = rng.choice((2, 4, 8)), rng.choice(("little", "big"))
            data[at : at + width] = (rng.choice(INTERESTING) % (1 << 8 * width)).to_bytes(width, order)
        elif kind == 4:
            del data[at:]
        elif kind == 5:
            del data[at:end]
        elif kind == 6:
            data[at:at] = data[at:end] * rng.choice((1, 2, 50))
        else:
            data[at:end] = bytes(end - at)
    return bytes(data)


def lie(content: bytes, rng: random.Random) -> bytes:
    """A number or text in JSON becomes another."""
    places = list(re.finditer(rb'-?\d+(\.\d+)?|"[^"]*"|true|false|null', content))
    for place in sorted(rng.sample(places, min(len(places), rng.choice((1, 1, 2, 5)))), key=lambda m: -m.start()):
        content = content[: place.start()] + rng.choice(LIES) + content[place.end() :]
    return content


def inside_zip(content: bytes, rng: random.Random) -> bytes:
    """Damages an array of an npz, and packs it soundly."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    name = rng.choice(list(members))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        members[name] = rng.choice((damage, _other_array))(members[name], rng)
        out = io.BytesIO()
        with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
            for key, value in members.items():
                archive.writestr(key, value)
    return out.getvalue()


def _other_array(content: bytes, rng: random.Random) -> bytes:
    out = io.BytesIO()
    np.lib.format.write_array(out, strange(rng), allow_pickle=True)
    return out.getvalue()


def strange(rng: random.Random) -> np.ndarray:
    """An array that does not belong anywhere."""
    shape = tuple(rng.choice((0, 1, 2, 4, 5, 9, 10, 64)) for _ in range(rng.randrange(5)))
    dtype = rng.choice(("u1", "i8", "f2", "f4", "f8", "c8", "?", "S3", "U2", "O", "M8[s]", "f4,i2"))
    if dtype == "O":
        return np.full(shape, None, object)
    array = np.zeros(shape, dtype)
    if dtype[0] == "f" and "," not in dtype:
        array[...] = rng.choice((np.nan, np.inf, -5, 0.5))
    return array


def inside_hdf5(path: Path, rng: random.Random) -> None:
    """Replaces a dataset or group by something of another kind."""
    import h5py

    with h5py.File(path, "r+") as file:
        names: list[str] = []
        file.visit(names.append)
        name = rng.choice(names)
        kinds: list[Callable[[], object]] = [
            lambda: file.create_dataset(name, data=_hdf5_array(rng)),
            lambda: file.__setitem__(name, h5py.ExternalLink("/etc/passwd", "/")),
            lambda: file.__setitem__(name, h5py.SoftLink(rng.choice(("/", f"/{name}", "/nowhere", "/data")))),
            lambda: file.create_dataset(name, shape=(rng.choice((5, 2**20, 2**40)), 64, 64), dtype="u1", chunks=True),
            lambda: file.create_dataset(name, shape=(4, 2**15, 2**15), dtype="f4", chunks=(1, 2**10, 2**10)),
            lambda: file.create_dataset(name, shape=(5, 64), dtype="u1", external=[("/etc/passwd", 0, 320)]),
            lambda: file.create_dataset(name, shape=(4,), dtype=h5py.vlen_dtype(np.uint8)),
            lambda: file.create_dataset(name, data=np.nan),
            lambda: file.create_group(name),
            lambda: file.create_dataset(name, shape=None, dtype="f4"),
        ]  # fmt: skip
        del file[name]
        rng.choice(kinds)()


def _hdf5_array(rng: random.Random) -> np.ndarray:
    array = strange(rng)
    return array if array.dtype.kind in "uifcbS" else np.zeros((4, 2))


def inside_parquet(path: Path, rng: random.Random) -> None:
    """Gives a column another type or other values."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pq.read_table(path)
    at, rows = rng.randrange(table.num_columns), table.num_rows
    other = rng.choice((
        [None] * rows, [float("nan")] * rows, [-1] * rows, [2**62] * rows, ["../../x"] * rows, [[1.0] * 3] * rows,
        [[]] * rows, [[[0.5, 0.5]]] * rows, [b"\x89PNG"] * rows, [{"bytes": b"", "path": "/etc/passwd"}] * rows,
        list(range(rows))[::-1], [1e300] * rows,
    ))  # fmt: skip
    name = table.column_names[at]
    changed = table.remove_column(at) if rng.random() < 0.1 else table.set_column(at, name, pa.array(other))
    pq.write_table(changed, path, compression=rng.choice(("none", "snappy", "zstd")))


if __name__ == "__main__":
    if len(sys.argv) == 3:
        print(json.dumps(run(sys.argv[1], int(sys.argv[2])), indent=1))
    else:
        child(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
