"""Folders of npz files: which robot each file is of, by a spec.json, by what the user says, or by the folders' names.

spec.json                       what `gsa collect` and `gsa store export` write: the spec, and "source"
dmcontrol/<domain>/…            the paper's pools; metaworld/<task>/… too
<domain>/<algorithm>/buffer/    ExORL's
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from gsa.errors import FormatError, UsageError
from gsa.schema import ArraySpec, Spec
from retrieval.formats import images, npz
from retrieval.formats.source import Entry, Loaded, Options, adapt, bounds_from, make

IDS_IN_NAMES = "ids_in_names"  # in a spec.json: the second part of each file's name tells its trajectory's id


@dataclass(frozen=True)
class Description:
    """What is known of the episodes of a folder."""

    spec: Spec
    source: str
    ids_in_names: bool = False


class NpzFolder:
    """A file, or all npz files below a folder. Loading them is safe from several threads."""

    notes: Sequence[str] = ()

    def __init__(self, path: Path, options: Options, exorl: bool = False) -> None:
        found = [path] if path.is_file() else sorted(p for p in path.rglob("*.npz") if p.is_file())
        self._root = path.parent if path.is_file() else path
        self._files, self._options, self._exorl = found, options, exorl
        self._bounds = bounds_from(options, None)
        self._descriptions: dict[Path, Description | FormatError | None] = {}
        if len(options.keys) > 1 or set(options.keys.values()) - {"observation"}:
            raise UsageError("An npz has one observation: --observations NAME=observation gives it another name.")

    def __len__(self) -> int:
        return len(self._files)

    def name(self, index: int) -> str:
        return str(self._files[index].relative_to(self._root))

    def entry(self, index: int) -> Entry:
        path = self._files[index]
        content, size = npz.directory(path)
        return Entry(self.name(index), self._id(path, content), size)

    def load(self, index: int) -> Loaded:
        path = self._files[index]
        episode = npz.read_npz(path)
        known = self._described(path.parent) or self._by_folder(path, episode)
        (name,) = self._options.keys or known.spec.observation
        observation, (spec_then,) = episode.observation, known.spec.observation.values()
        if observation.ndim == 4 and self._options.resize:
            observation = images.stack(observation, len(observation), self._options.resize)
            spec_then = ArraySpec(observation.shape[1:], "uint8")
        spec = adapt(replace(known.spec, observation={name: spec_then}), self._options)
        return make(
            spec, {name: observation}, episode.action, episode.discount, episode.reward, source=known.source,
            id=self._id(path, npz.directory(path)[0]), options=self._options, bounds=self._bounds, clip=True,
        )  # fmt: skip

    def close(self) -> None:
        pass

    def _id(self, path: Path, content: str) -> str:
        known = self._described(path.parent)
        parts = path.stem.split("-")
        return id_of(parts[1]) if known is not None and known.ids_in_names and len(parts) == 4 else content

    def _described(self, folder: Path) -> Description | None:
        if folder not in self._descriptions:
            try:
                self._descriptions[folder] = _describe(folder, self._root)
            except FormatError as error:
                self._descriptions[folder] = error
        found = self._descriptions[folder]
        if isinstance(found, FormatError):
            raise FormatError(str(found))
        return found

    def _by_folder(self, path: Path, episode: npz.Episode) -> Description:
        """What the folders' names say, or the user."""
        embodiment, source, repeat = _named(path, self._exorl)
        if not (embodiment or self._options.embodiment):
            raise FormatError(
                f"What robot {path.name} is of is not known: it is neither below dmcontrol/<domain> nor "
                "metaworld/<task>. Put a spec.json beside it, or say --embodiment."
            )
        image = episode.observation.ndim == 4
        spec = Spec(
            embodiment or self._options.embodiment,
            {"pixels" if image else "state": ArraySpec(episode.observation.shape[1:], str(episode.observation.dtype))},
            episode.action.shape[1], repeat, renderer="faithful" if image and embodiment else "",
        )  # fmt: skip
        return Description(spec, source or self._options.embodiment)


def name_part(id: str) -> str:
    """An id as hexadecimal digits: those of most ids as they are; others are encoded, which their odd number tells."""
    if re.fullmatch("([0-9a-f]{2}){1,50}", id):
        return id
    content = id.encode()
    return f"0{content.hex()}" if len(content) <= 50 else hashlib.blake2b(content, digest_size=16).hexdigest()


def id_of(digits: str) -> str:
    """The id that `name_part` made the digits of. FormatError if it made none."""
    try:
        return bytes.fromhex(digits[1:]).decode() if len(digits) % 2 else digits
    except ValueError:
        raise FormatError(f"Its name has '{digits[:40]}' for an id.") from None


def _named(path: Path, exorl: bool) -> tuple[str, str, int]:
    """Embodiment, source and action repeat by the folders' names; empty where they say nothing."""
    folders = path.resolve().parent.parts
    if exorl and len(folders) > 2 and folders[-1] == "buffer":
        return f"dmc/{folders[-3]}", f"exorl/{folders[-3]}/{folders[-2]}", 1
    pairs = [pair for pair in itertools.pairwise(folders) if pair[0] in ("dmcontrol", "metaworld")]
    if not pairs:
        return "", "", 1
    benchmark, name = pairs[-1]
    return (
        (f"dmc/{name}", f"dmc/{name}", 2) if benchmark == "dmcontrol" else ("metaworld/sawyer", f"metaworld/{name}", 2)
    )


def _describe(folder: Path, root: Path) -> Description | None:
    """The nearest spec.json from `folder` up to `root`."""
    for place in (folder, *folder.parents):
        path = place / "spec.json"
        if path.is_file():
            try:
                data = json.loads(path.read_bytes())
            except (OSError, ValueError, RecursionError) as error:
                raise FormatError(f"{path} cannot be read: {error}.") from None
            spec = Spec.from_json(data)
            if len(spec.observation) != 1:
                raise FormatError(f"An npz holds one observation; its {path} has {', '.join(spec.observation)}.")
            return Description(spec, str(data.get("source", spec.embodiment)), bool(data.get(IDS_IN_NAMES, False)))
        if place == root:
            break
    return None
