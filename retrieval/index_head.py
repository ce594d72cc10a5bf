"""What index.json says of a feature index: its key, and how much of its files counts. Read strictly, as any file."""

from __future__ import annotations

import json
import re
import secrets
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from gsa import config as configs
from gsa.errors import FormatError, UsageError
from retrieval.files import replace_file
from retrieval.store import TrajectoryStore

VERSION = 2
MAX_DIM = 1 << 20
MAX_BYTES = 1 << 26  # of index.json


@dataclass(frozen=True)
class Part:
    """The features of one embodiment."""

    embodiment: str
    rows: int = 0


@dataclass(frozen=True)
class Head:
    """What index.json says."""

    store: str  # id
    encoder: str  # hash of its weights
    seen: int = 0  # catalog rows that were considered
    fingerprint: str = ""  # of these rows
    generation: str = field(default_factory=lambda: secrets.token_hex(4))  # of its files
    dim: int = 0  # D; 0 where nothing is encoded yet
    parts: tuple[Part, ...] = ()
    unseen: tuple[str, ...] = ()  # embodiments that the encoder cannot see, each with its reason
    unread: tuple[str, ...] = ()  # damaged trajectories, each with its reason
    version: int = VERSION
    format: str = "gsa-index"

    @classmethod
    def load(cls, folder: Path) -> Head:
        """UsageError where there is no index; FormatError where it is none, damaged or of another version."""
        path = folder / "index.json"
        try:
            with path.open("rb") as file:
                data = json.loads(file.read(MAX_BYTES))
        except FileNotFoundError:
            raise UsageError(f"There is no feature index in {folder}; run gsa index.") from None
        except (OSError, ValueError, RecursionError) as error:
            raise FormatError(f"{path} is not a feature index: {error}.") from None
        if not isinstance(data, dict) or data.get("format") != "gsa-index":
            raise FormatError(f"{path} is not a feature index.")
        if data.get("version") != VERSION:
            raise FormatError(f"{path} has index format version {data.get('version')}; this version reads {VERSION}.")
        try:
            head = configs.from_dict(cls, data)
        except UsageError as error:
            raise FormatError(f"{path} is not a feature index: {error}") from None
        head._check(path)
        return head

    def _check(self, path: Path) -> None:
        names = [part.embodiment for part in self.parts]
        sizes = [self.seen, self.dim, *(part.rows for part in self.parts)]
        sane = all(0 <= n <= np.iinfo(np.int64).max for n in sizes) and self.dim <= MAX_DIM
        if not sane or len(set(names)) < len(names) or not re.fullmatch("[0-9a-f]{8}", self.generation):
            raise FormatError(f"{path} is not a feature index: its sizes or names are absurd.")

    def save(self, folder: Path) -> None:
        with replace_file(folder / "index.json") as file:
            file.write(json.dumps(configs.to_dict(self), indent=1).encode())

    def problem(self, store: TrajectoryStore, encoder_hash: str) -> str:
        """Why it cannot be used for a store and an encoder; empty where it can, for the rows it has seen."""
        if self.store != store.id:
            return "is of another store"
        if self.encoder != encoder_hash:
            return "was made by another encoder"
        if self.seen > len(store) or self.fingerprint != store.catalog.fingerprint(self.seen):
            return "is of an earlier state of the store"
        return ""

    def path(self, folder: Path, i: int, what: str) -> Path:
        return folder / f"{self.generation}-{i}.{what}"
