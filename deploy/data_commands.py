"""The commands that make, fill and search stores: flags only; what they do is in `pool` and `stages`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro
from tyro.conf import Positional, subcommand

from deploy.config import Imports
from retrieval.formats.source import Options


@dataclass(frozen=True)
class Collect:
    """Generate a pool of trajectories with scripted policies, planners, agents and noise; no reward is stored."""

    source: Annotated[tuple[str, ...], tyro.conf.arg(metavar="SOURCE:EPISODES")]
    """What to collect and how many episodes: metaworld/<task>/scripted-<sigma>:20, dmc/<task>/planner-<quality>:5,
    dmc/<task>/objectives-<quality>:5, <task>/noise-<beta>:10, <task>/agent:<folder>:5, <task>/mixed:25. A * in the
    task stands for many: 'metaworld/*/mixed:25'."""
    out: Path
    """Folder for the episodes, an npz file each, and the report; what is there already is kept."""
    store: Path | None = None
    """Collect straight into this store instead of files; created if it is not there."""
    codec: Literal["none", "lz4", "zstd"] = "none"
    """Compression of a new store."""
    seed: int = 0
    processes: int = 0
    """Parallel processes; 0: one a core. The pool is the same whatever their number."""
    render: Literal["fast", "faithful"] = "fast"
    with_reward: bool = False
    """Store rewards too."""
    imports: Imports = ()

    def __call__(self) -> int:
        from deploy import pool

        return pool.collect(self)


@dataclass(frozen=True)
class Ingest:
    """Read episodes of another format into a trajectory store. Goes on where it stopped; bad files are named."""

    source: Positional[Path]
    """A file or folder: npz, ExORL npz, Minari (HDF5, Arrow), LeRobot v3, robomimic HDF5, or another store."""
    store: Path
    """The store; created if it is not there."""
    format: Literal["auto", "npz", "exorl", "minari", "lerobot", "robomimic", "store"] = "auto"
    codec: Literal["none", "lz4", "zstd"] = "none"
    """Compression of a new store: none is the fastest to train from."""
    jobs: int = 0
    """Episodes decoded at a time; 0: what the machine does best, four at most."""
    options: Annotated[Options, tyro.conf.arg(name="")] = field(default_factory=Options)

    def __call__(self) -> int:
        from deploy import pool

        return pool.ingest(self.source, self.store, self.format, self.codec, self.options, self.jobs)


@dataclass(frozen=True)
class StoreInfo:
    """What a store holds."""

    store: Positional[Path]

    def __call__(self) -> int:
        from deploy import pool

        return pool.store_info(self.store)


@dataclass(frozen=True)
class StoreVerify:
    """Read everything and check every checksum. Exit code 1 if anything is damaged."""

    store: Positional[Path]

    def __call__(self) -> int:
        from deploy import pool

        return pool.store_verify(self.store)


@dataclass(frozen=True)
class StoreShow:
    """Draw trajectories for a person to look at, and what else is in the store, as a page or as one picture."""

    store: Positional[Path]
    out: Path
    """A file: .html for a page, .png for a picture of the images alone."""
    rows: tuple[int, ...] = ()
    """These rows; else some are drawn at random."""
    count: int = 6
    """Trajectories to draw of each embodiment."""
    embodiment: str = ""
    """Only this one's."""
    source: str = ""
    """Only of sources with this in their name."""
    seed: int = 0

    def __call__(self) -> int:
        from deploy import pool

        return pool.store_show(self)


@dataclass(frozen=True)
class StoreMerge:
    """Add the trajectories of other stores, such as a finished run's, that a store lacks. Goes on where it stopped."""

    sources: Positional[tuple[Path, ...]]
    """Stores, or folders of runs: their online stores."""
    into: Path
    """The store that takes them in; created if it is not there."""
    mix_renderers: bool = False
    """Take in images of an embodiment that were rendered otherwise than those that are there."""

    def __call__(self) -> int:
        from deploy import pool

        return pool.store_merge(self.sources, self.into, self.mix_renderers)


@dataclass(frozen=True)
class StoreExport:
    """Write a store's trajectories as the reference's npz files or as Minari datasets."""

    store: Positional[Path]
    out: Path
    """npz: a folder, what is there is kept. minari: a new folder with a dataset for each embodiment."""
    format: Literal["npz", "minari"] = "npz"
    embodiment: str = ""
    """Only this one's."""
    observation: str = ""
    """npz: which observation to write, where there are several."""

    def __call__(self) -> int:
        from deploy import pool

        return pool.store_export(self.store, self.out, self.format, self.embodiment, self.observation)


@dataclass(frozen=True)
class Store:
    """Look into a trajectory store, merge others into it, or export it."""

    what: Annotated[
        Annotated[StoreInfo, subcommand("info")]
        | Annotated[StoreVerify, subcommand("verify")]
        | Annotated[StoreShow, subcommand("show")]
        | Annotated[StoreMerge, subcommand("merge")]
        | Annotated[StoreExport, subcommand("export")],
        tyro.conf.arg(name=""),
    ]

    def __call__(self) -> int:
        return self.what()


@dataclass(frozen=True)
class Index:
    """Compute the encoder's feature of every first observation of a store, for retrieval. Adds what is new."""

    store: Path
    world_model: Path

    def __call__(self) -> int:
        from deploy import rehearsal

        return rehearsal.index(self.store, self.world_model)


@dataclass(frozen=True)
class Retrieve:
    """Retrieve the trajectories of a store that start most like a task, and draw their contact sheet."""

    task: str
    store: Path
    world_model: Path
    out: Path
    """Folder for rehearsal.json and contact_sheet.png."""
    k: int = 500
    """Trajectories to retrieve; fewer are taken where the pool has fewer."""
    queries: int = 1
    """First observations of the task to retrieve with; what is near to any of them is taken."""
    search: Literal["exact", "ivf", "hnsw"] = "exact"
    """ivf and hnsw may overlook some of the nearest; their recall is measured, printed and kept."""
    random: bool = False
    """Draw k trajectories of the embodiment at random instead."""
    seed: int = 0
    render: Literal["fast", "faithful"] = "fast"
    imports: Imports = ()

    def __call__(self) -> int:
        from deploy import rehearsal

        return rehearsal.retrieve(self)


@dataclass(frozen=True)
class Shift:
    """Measure how far what a run rehearses is from what it meets: Wasserstein distances between the latent states of
    its online data and those of retrieved, random and all trajectories of the pool."""

    run: Positional[Path | None] = None
    """Folder of a run: its online store, pool, world model and rehearsal set are compared. Flags go before it."""
    online: Path | None = None
    """Store of online data."""
    pool: Path | None = None
    """Store of the offline trajectories."""
    world_model: Path | None = None
    """The world model whose latents are compared; default: the pre-trained one that the run started from."""
    rehearsal: Path | None = None
    """rehearsal.json of what was retrieved."""
    expert: Path | None = None
    """Store of an expert's trajectories: distances are measured from them, too."""
    out: Path | None = None
    """Folder for shift.json and shift.png; default: the run's."""
    sequences: int = 128
    """Sequences drawn of each, as training draws them."""
    length: int = 64
    """Observation rows a sequence."""
    states: int = 500
    """States of each in a repeat, at most."""
    repeats: int = 20
    """How often half of the trajectories is drawn, for the intervals."""
    seed: int = 0

    def __call__(self) -> int:
        from deploy import shift

        return shift.shift(self)
