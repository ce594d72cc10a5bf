"""The formats by name, how each is recognised, and which of them are read in a process of their own."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gsa.errors import UsageError, unknown
from retrieval.formats.isolated import Isolated
from retrieval.formats.source import Options, Source
from retrieval.manifest import Manifest

HDF5_SIGNATURE = b"\x89HDF\r\n\x1a\n"
MINARI_FILE = "main_data.hdf5"
LOOK_AT = 10_000  # files of a folder when telling what is in it


@dataclass(frozen=True)
class Format:
    """How sources of a format are told from others and opened."""

    title: str
    recognises: Callable[[Path], bool]
    open: Callable[[Path, Options], Source]
    isolated: bool = False  # parsed by C libraries that hostile files may crash


def formats() -> dict[str, Format]:
    """In the order in which they are tried. The codecs are imported only when one is used."""
    return {
        "store": Format("a trajectory store", Manifest.exists, _stores),
        "lerobot": Format("a LeRobot dataset", _is_lerobot, _lerobot, isolated=True),
        "minari": Format("a Minari dataset", lambda path: minari_data(path) is not None, _minari, isolated=True),
        "robomimic": Format("robomimic HDF5", _is_robomimic, _robomimic, isolated=True),
        "exorl": Format("ExORL npz", _is_exorl, lambda path, options: _npz(path, options, exorl=True)),
        "npz": Format("npz files", _has_npz, _npz),
    }


def open_source(path: str | Path, format: str = "auto", options: Options | None = None) -> Source:
    """The episodes at `path`, a file or folder. UsageError where there are none, or none of that format."""
    path, options, known = Path(path), options or Options(), formats()
    if format != "auto" and format not in known:
        raise unknown("format", format, ("auto", *known))
    if not path.exists():
        raise UsageError(f"There is nothing to ingest at {path}: no such file or folder.")
    name = detect(path) if format == "auto" else format
    source = Isolated(path, name, options) if known[name].isolated else known[name].open(path, options)
    if not len(source):
        source.close()
        raise UsageError(f"There is nothing to ingest at {path}: no {name} in it. Seen: {seen(path)}.")
    return source


def detect(path: Path) -> str:
    """The name of the format at `path`. UsageError that says what was seen there."""
    for name, format in formats().items():
        if format.recognises(path):
            return name
    raise UsageError(
        f"There is nothing to ingest at {path}: it is none of {', '.join(f.title for f in formats().values())}. "
        f"Seen: {seen(path)}. If it is one of them, say --format."
    )


def seen(path: Path) -> str:
    """What kinds of files are at `path`, for messages: "3 .csv files and 1 .txt file"."""
    if path.is_file():
        return f"a file of {path.stat().st_size} bytes that begins with {path.open('rb').read(8)!r}"
    files = (p for p in path.rglob("*") if p.is_file())
    kinds = Counter(p.suffix.lower() or p.name for p in itertools.islice(files, LOOK_AT))
    told = [f"{count} {kind} {'files' if count > 1 else 'file'}" for kind, count in kinds.most_common(5)]
    return " and ".join([", ".join(told[:-1]), told[-1]] if len(told) > 1 else told) or "no file in it"


def hdf5_files(path: Path) -> list[Path]:
    """The file, or the HDF5 files below a folder."""
    files = [path] if path.is_file() else sorted(p for e in ("hdf5", "h5") for p in path.rglob(f"*.{e}") if p.is_file())
    return [p for p in files if _begins(p, HDF5_SIGNATURE)]


def minari_data(path: Path) -> Path | None:
    """The folder with a Minari dataset's metadata.json: `path` or its data/."""
    for folder in (path, path / "data", path.parent if path.name == MINARI_FILE else path):
        if "data_format" in _json(folder / "metadata.json"):
            return folder
    return None


def _is_lerobot(path: Path) -> bool:
    return "codebase_version" in _json(path / "meta" / "info.json")


def _is_robomimic(path: Path) -> bool:
    return any(file.name != MINARI_FILE for file in hdf5_files(path))


def _is_exorl(path: Path) -> bool:
    """By its folder `buffer` or its first file's name, episode_<index>_<length>.npz."""
    first = path if path.is_file() else next(path.rglob("*.npz"), path)
    parts = first.stem.split("_")
    return first.suffix == ".npz" and len(parts) == 3 and parts[0] == "episode" and all(p.isdigit() for p in parts[1:])


def _has_npz(path: Path) -> bool:
    return path.suffix == ".npz" if path.is_file() else next(path.rglob("*.npz"), None) is not None


def _begins(path: Path, signature: bytes) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(len(signature)) == signature
    except OSError:
        return False


def _json(path: Path) -> dict[str, Any]:
    """A small JSON object; an empty one where there is none."""
    try:
        if not path.is_file() or path.stat().st_size > 1 << 26:
            return {}
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _stores(path: Path, options: Options) -> Source:
    from retrieval.formats.stores import StoreSource

    return StoreSource(path, options)


def _npz(path: Path, options: Options, exorl: bool = False) -> Source:
    from retrieval.formats.npz_folder import NpzFolder

    return NpzFolder(path, options, exorl)


def _lerobot(path: Path, options: Options) -> Source:
    from retrieval.formats.lerobot import LeRobot

    return LeRobot(path, options)


def _minari(path: Path, options: Options) -> Source:
    from retrieval.formats.minari import open_minari

    folder = minari_data(path)
    if folder is None:
        raise UsageError(f"There is no Minari dataset at {path}: no metadata.json with a data_format.")
    return open_minari(folder, options)


def _robomimic(path: Path, options: Options) -> Source:
    from retrieval.formats.robomimic import Robomimic

    return Robomimic(hdf5_files(path), path, options)
