"""The commands around a suite: flags only; what they do is in `suite`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from tyro.conf import Positional, subcommand


@dataclass(frozen=True)
class SuiteRun:
    """Run a suite, or what is left of it: nothing that is done is done again. Exit code 1 if a trial failed."""

    suite: Positional[Path]
    """A YAML file such as suites/smoke.yaml, or the folder of a suite that was begun."""
    out: Path | None = None
    """The suite's folder; default runs/<name of the suite>."""
    only: tuple[str, ...] = ()
    """Only trials with a name like one of these patterns: '*--gsa--*'."""
    max_hours: float = 0.0
    """Stop after so many hours: nothing more is begun, what runs is saved in time. 0: run to the end."""
    ray_address: str | None = None
    """A running Ray cluster ("auto" or host:port) whose nodes share the suite's folder; default: one of our own."""
    dry_run: bool = False
    """Only check the file and say what it will take."""

    def __call__(self) -> int:
        from deploy import suite, suite_progress

        config, folder = suite_progress.load(self.suite, self.out)
        return suite.run(config, folder, self.only, self.max_hours, self.ray_address, self.dry_run)


@dataclass(frozen=True)
class SuiteStatus:
    """How a suite stands, while it runs or after: by its folder alone."""

    suite: Positional[Path]
    """Its YAML file, or its folder."""
    out: Path | None = None
    """The suite's folder, where the file is given; default runs/<name of the suite>."""

    def __call__(self) -> int:
        from deploy import suite_progress

        return suite_progress.status(*suite_progress.load(self.suite, self.out))


@dataclass(frozen=True)
class SuiteReport:
    """Compare what is done so far: report.html and report.json in the suite's folder."""

    suite: Positional[Path]
    """Its YAML file, or its folder."""
    out: Path | None = None
    """The suite's folder, where the file is given; default runs/<name of the suite>."""

    def __call__(self) -> int:
        from deploy import suite_progress
        from reports.suite_page import write_suite_report

        page, said = write_suite_report(suite_progress.load(self.suite, self.out)[1])
        print(said)
        print(page)
        return 0


@dataclass(frozen=True)
class Suite:
    """Compare methods over tasks and seeds: many trials on one pool and one pre-trained world model."""

    what: Annotated[
        Annotated[SuiteRun, subcommand("run")]
        | Annotated[SuiteStatus, subcommand("status")]
        | Annotated[SuiteReport, subcommand("report")],
        tyro.conf.arg(name=""),
    ]

    def __call__(self) -> int:
        return self.what()
