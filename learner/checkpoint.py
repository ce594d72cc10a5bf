"""Checkpoints: nested dicts of tensors and numbers as one atomic folder of safetensors and JSON. No pickle.

    <folder>/checkpoint-00000007/
        manifest.json         format, size and CRC-32 of the other two, and the score, if there is one
        state.json            step and the nested dicts; an array is {"$torch": 3} or {"$numpy": 3}
        tensors.safetensors   the arrays, by number

A checkpoint is written beside, flushed to disk and renamed, so that it is either whole or not there. Its number
only rises. One that was damaged later is found by its checksum, and the one before it is used.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import shutil
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from isal.isal_zlib import crc32  # zlib's checksum, many times as fast
from torch import Tensor

from gsa.errors import FormatError, Unavailable, UsageError

FORMAT = "gsa-checkpoint/1"
MANIFEST, TREE, TENSORS = "manifest.json", "state.json", "tensors.safetensors"
MAX_MANIFEST_BYTES = 1 << 16
MAX_TREE_BYTES = 1 << 28
_log = logging.getLogger(__name__)
_NAME = re.compile(r"checkpoint-(\d{8})")
_TEMPORARY = ".tmp-"


@dataclass(frozen=True)
class Restored:
    """A checkpoint that was read whole."""

    step: int
    state: dict[str, Any]
    path: Path
    damaged: tuple[str, ...] = ()  # newer ones that were passed over, and why: for people to read


class Checkpoints:
    """Owns a folder of checkpoints and keeps the newest `keep` whole ones, and that of the best score besides. One
    writer at a time."""

    def __init__(self, folder: str | Path, keep: int = 2) -> None:
        if keep < 1:
            raise UsageError(f"keep must be at least 1 checkpoint, not {keep}.")
        self.folder, self.keep = Path(folder), keep
        self._damaged: set[Path] = set()

    def paths(self) -> list[Path]:
        """The checkpoints, oldest first."""
        if not self.folder.is_dir():
            return []
        return sorted(p for p in self.folder.iterdir() if _NAME.fullmatch(p.name) and p.is_dir())

    def save(self, step: int, state: Mapping[str, Any], score: float | None = None) -> Path:
        """Writes `state` and removes what is too old. It is durable when this returns.

        A state is a dict with str keys; leaves are torch tensors, numpy arrays, int, float, str, bool, None;
        lists may hold any of them (a tuple comes back as a list). Raises Unavailable where the disk refuses.
        """
        temporary = self.folder / f"{_TEMPORARY}{uuid.uuid4().hex}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._remove_leftovers()
            temporary.mkdir()
            _write(temporary, step, state, score)
            path = self.folder / f"checkpoint-{self._next_number():08d}"
            os.rename(temporary, path)
            _sync(self.folder)
            self._rotate(path)
            return path
        except (OSError, safetensors.SafetensorError) as error:
            raise Unavailable(f"Cannot write a checkpoint to {self.folder}: {error}. Free some space.") from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def load(self) -> Restored | None:
        """The newest whole checkpoint, tensors on the CPU; None where there is none. Logs which it passed over.

        Raises FormatError where there are some and all are damaged.
        """
        damaged: list[str] = []
        for path in reversed(self.paths()):
            try:
                step, state = read(path)
                for sentence in damaged:
                    _log.warning("%s Using %s instead, of step %d.", sentence, path.name, step)
                return Restored(step, state, path, tuple(damaged))
            except FormatError as error:
                damaged.append(str(error))
                self._damaged.add(path)
        if damaged:
            raise FormatError(f"No checkpoint in {self.folder} can be read: {' '.join(damaged)}")
        return None

    def best(self) -> Path | None:
        """The checkpoint of the highest score, the newer of equals; None where none has a score."""
        scores = [(score, path) for path in self.paths() if (score := _score(path)) is not None]
        return max(scores)[1] if scores else None

    def _next_number(self) -> int:
        paths = self.paths()
        return int(paths[-1].name.rpartition("-")[2]) + 1 if paths else 0

    def _rotate(self, newest: Path) -> None:
        """Damaged ones do not count as kept: they must not push the last good one out."""
        whole = [p for p in self.paths() if p not in self._damaged]
        best = self.best()
        for path in {*whole[: -self.keep], *self._damaged}:
            if path not in (newest, best) and path.is_dir():
                leftover = self.folder / f"{_TEMPORARY}{uuid.uuid4().hex}"
                os.rename(path, leftover)  # so that a half-deleted one is never taken for a checkpoint
                shutil.rmtree(leftover)
        self._damaged.clear()

    def _remove_leftovers(self) -> None:
        for path in self.folder.glob(f"{_TEMPORARY}*"):
            shutil.rmtree(path, ignore_errors=True)


def read(path: Path) -> tuple[int, dict[str, Any]]:
    """(step, state) of one checkpoint folder. Raises FormatError where anything is not as `save` wrote it."""
    try:
        manifest = _manifest(path)
        for name in (TREE, TENSORS):
            _check(path / name, manifest["files"][name])
        tree = json.loads((path / TREE).read_bytes())
        step, state = tree["step"], _join(tree["state"], safetensors.torch.load_file(path / TENSORS))
    except FormatError:
        raise
    except (OSError, ValueError, KeyError, TypeError, RecursionError, safetensors.SafetensorError) as error:
        raise FormatError(f"Checkpoint {path} is damaged: {type(error).__name__}: {error}.") from None
    if type(step) is not int or not isinstance(state, dict):
        raise FormatError(f"Checkpoint {path} is damaged: it lacks the step or the state.")
    return step, state


def _write(folder: Path, step: int, state: Mapping[str, Any], score: float | None) -> None:
    arrays = _Arrays()
    tree = json.dumps({"step": int(step), "state": _split(state, arrays, "")}, separators=(",", ":")).encode()
    if len(tree) > MAX_TREE_BYTES:
        raise UsageError(f"A checkpoint's numbers take {len(tree)} bytes as JSON: keep long lists as arrays.")
    (folder / TREE).write_bytes(tree)
    safetensors.torch.save_file(arrays.tensors, folder / TENSORS)
    files = {name: {"bytes": (folder / name).stat().st_size, "crc32": _crc(folder / name)} for name in (TREE, TENSORS)}
    (folder / MANIFEST).write_text(json.dumps({"format": FORMAT, "files": files, "score": score}, indent=1))
    for name in (TREE, TENSORS, MANIFEST):
        _sync(folder / name)
    _sync(folder)


class _Arrays:
    """The tensors of a state by number, each on the CPU with memory of its own, as safetensors requires."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._storages: set[int] = set()

    def add(self, tensor: Tensor) -> int:
        own = tensor.detach().cpu().contiguous()
        if own.untyped_storage().data_ptr() in self._storages:  # a view of one that is already here
            own = own.clone()
        self._storages.add(own.untyped_storage().data_ptr())
        self.tensors[str(len(self.tensors))] = own
        return len(self.tensors) - 1


def _split(value: Any, arrays: _Arrays, where: str) -> Any:
    """`value` as JSON, its arrays moved to `arrays`."""
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str) or key.startswith("$"):
                raise UsageError(f"A checkpoint's keys are strings without a leading '$', not {key!r} in '{where}'.")
        return {key: _split(v, arrays, f"{where}/{key}") for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_split(v, arrays, f"{where}/{i}") for i, v in enumerate(value)]
    if isinstance(value, Tensor):
        return {"$torch": arrays.add(value)}
    if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
        return {"$numpy": arrays.add(torch.from_numpy(np.array(value, order="C")))}
    if isinstance(value, np.generic):
        return _split(value.item(), arrays, where)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise UsageError(f"A checkpoint cannot hold {where} of type {type(value).__name__}: use arrays, numbers, strings.")


def _join(tree: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The inverse of `_split`."""
    if isinstance(tree, list):
        return [_join(v, tensors) for v in tree]
    if not isinstance(tree, dict):
        return tree
    if tree.keys() == {"$torch"}:
        return tensors[str(tree["$torch"])]
    if tree.keys() == {"$numpy"}:
        return tensors[str(tree["$numpy"])].numpy()
    return {key: _join(v, tensors) for key, v in tree.items()}


def _manifest(path: Path) -> dict[str, Any]:
    """The manifest, checked. It names no files of its own choice: a hostile one cannot point elsewhere."""
    file = path / MANIFEST
    if file.stat().st_size > MAX_MANIFEST_BYTES:
        raise FormatError(f"Checkpoint {path} is damaged: its manifest is too large.")
    manifest = json.loads(file.read_bytes())
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        found = manifest.get("format") if isinstance(manifest, dict) else None
        raise FormatError(f"Checkpoint {path} has format {found!r:.80}; this version reads {FORMAT!r}.")
    if manifest.keys() != {"format", "files", "score"}:
        raise FormatError(f"Checkpoint {path} is damaged: its manifest lacks a part.")
    return manifest


def _score(path: Path) -> float | None:
    """The score in a checkpoint's manifest; None where there is none to read."""
    try:
        score = _manifest(path).get("score")
    except (OSError, ValueError, FormatError):
        return None
    return float(score) if isinstance(score, (int, float)) and math.isfinite(score) else None


def _check(file: Path, entry: Mapping[str, Any]) -> None:
    size = file.stat().st_size
    if size != entry["bytes"] or (file.name == TREE and size > MAX_TREE_BYTES):
        raise FormatError(f"Checkpoint file {file} is damaged: it has {size} bytes instead of {entry['bytes']!r:.20}.")
    if _crc(file) != entry["crc32"]:
        raise FormatError(f"Checkpoint file {file} is damaged: its checksum does not match.")


def _crc(file: Path) -> int:
    crc = 0
    with file.open("rb") as stream:
        while chunk := stream.read(1 << 23):
            crc = crc32(chunk, crc)
    return crc


def _sync(path: Path) -> None:
    """Flushes a file or a folder's entries to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
