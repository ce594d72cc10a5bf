"""store.json: what a store is, which format it has, and which embodiments are in it."""

from __future__ import annotations

import json
import uuid
import warnings
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gsa.errors import FormatError, UsageError
from gsa.schema import Spec
from retrieval.files import replace_file
from retrieval.layout import Layout, require_codec

FORMAT = "gsa-store"
VERSION = 1
NAME = "store.json"
MAX_BYTES = 16 << 20  # of store.json


@dataclass
class Manifest:
    """The content of store.json. Embodiments are only ever added; a spec's place in the list is its code."""

    id: str
    codec: str
    specs: dict[str, Spec] = field(default_factory=dict)
    layouts: list[Layout] = field(init=False)  # by code

    def __post_init__(self) -> None:
        self.layouts = [Layout.of(spec) for spec in self.specs.values()]

    @classmethod
    def new(cls, codec: str) -> Manifest:
        return cls(str(uuid.uuid4()), require_codec(codec))

    @staticmethod
    def exists(folder: Path) -> bool:
        return (folder / NAME).exists()

    @classmethod
    def load(cls, folder: Path) -> Manifest:
        """Raises UsageError where there is no store, FormatError where it is not one that this version reads."""
        path = folder / NAME
        try:
            with path.open("rb") as file:
                text = file.read(MAX_BYTES)
            data = json.loads(text)
        except (FileNotFoundError, NotADirectoryError):
            raise UsageError(f"There is no trajectory store at {folder}: it has no {NAME}.") from None
        except (OSError, ValueError, RecursionError) as error:
            raise FormatError(f"{path} cannot be read: {error}.") from None
        if not isinstance(data, Mapping) or data.get("format") != FORMAT:
            raise FormatError(f"{path} is not of a trajectory store.")
        if data.get("version") != VERSION:
            raise FormatError(
                f"The store {folder} has format version {data.get('version')}; this version of GSA reads {VERSION}. "
                "Use the GSA that wrote it, or export it from there."
            )
        try:
            if data["crc"] != _crc(data):
                raise FormatError("it does not have its checksum")
            specs = [Spec.from_json(spec) for spec in data["embodiments"]]
            if len({s.embodiment for s in specs}) < len(specs):
                raise FormatError("it has an embodiment twice")
            return cls(str(data["id"]), require_codec(data["codec"]), {s.embodiment: s for s in specs})
        except (KeyError, TypeError, ValueError, OverflowError, UsageError, FormatError) as error:
            raise FormatError(f"{path} is damaged: {error}.") from None

    def save(self, folder: Path) -> None:
        data = {
            "format": FORMAT, "version": VERSION, "id": self.id, "codec": self.codec,
            "embodiments": [spec.to_json() for spec in self.specs.values()],
        }  # fmt: skip
        with replace_file(folder / NAME) as file:
            file.write(json.dumps(data | {"crc": _crc(data)}, indent=1).encode())

    def reload(self, folder: Path) -> None:
        """Picks up the embodiments that another process entered."""
        now = Manifest.load(folder)
        self.layouts, self.specs = now.layouts, now.specs

    def code(self, embodiment: str) -> int:
        return list(self.specs).index(embodiment)

    def add(self, spec: Spec, folder: Path) -> None:
        """Enters an embodiment, durably. SpecMismatch if it is known with another spec; a warning if only the
        renderer differs, as its pixels may."""
        known = self.specs.get(spec.embodiment)
        if known == spec:
            return
        if known is None:
            layout = Layout.of(spec)
            Manifest(self.id, self.codec, self.specs | {spec.embodiment: spec}).save(folder)
            self.specs[spec.embodiment] = spec
            self.layouts.append(layout)
            return
        known.require_same(spec, f"{spec.embodiment} in the store {folder}", "the new one")
        if known.renderer != spec.renderer:
            warnings.warn(
                f"{spec.embodiment} in {folder} was rendered with '{known.renderer}', what is added with "
                f"'{spec.renderer}': their pixels differ.",
                stacklevel=3,
            )


def _crc(data: Mapping[str, Any]) -> int:
    """CRC-32 of what store.json says, however it is indented."""
    return zlib.crc32(json.dumps({k: v for k, v in data.items() if k != "crc"}, sort_keys=True).encode())
