"""One fine-tuning run from start to report: prepare on disk, run in one process or many, evaluate, report."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from pathlib import Path

from rich.table import Table

from actors.hosting import Host
from deploy import models, parts, rehearsal, stages
from deploy.config import FinetuneConfig, config_of
from deploy.forecast import forecast
from deploy.processes import Budget, stop_on
from deploy.progress import bar, console
from gsa import config as configs
from gsa.agent.sizes import ObservationConfig, WorldModelConfig, preset
from gsa.errors import EnvironmentFault, UsageError
from reports.card import write_agent_card
from retrieval.files import replace_file
from retrieval.retriever import RehearsalSet
from retrieval.store import TrajectoryStore

STOP_S = 28.0  # from SIGTERM to the end of the driver: machines are taken away after 30

# What a run that goes on may be told anew: where and how it is run and watched, never what it does.
MAY_CHANGE = (
    "workers", "env_timeout_s", "redis_url", "ray_address", "final_episodes", "checkpoint_every_frames",
    "checkpoint_every_s", "keep_checkpoints",
)  # fmt: skip


def finetune(config: FinetuneConfig, resume: bool = False) -> Path:
    """The whole run; returns its folder. With `resume`, goes on with the run that is in it.

    SIGTERM stops the fine-tuning within an update: it is saved, and Stopped is raised; where that takes
    longer than STOP_S this process ends by itself.
    """
    config = config.resolved()
    if config.world_model is not None:
        config = replace(config, world_model=models.folder(config.world_model))
    assert config.out is not None, "only resolved configs have a folder"
    with ExitStack() as services:
        redis_url, budget = "", Budget(STOP_S, config.out)
        services.callback(budget.cancel)  # the last to be called

        def launch() -> None:
            nonlocal redis_url
            if not config.local:
                from deploy import distributed

                redis_url = distributed.launch(config, services)

        run = prepare(config, launch, resume)
        if "fine-tune" not in stages_done(run):
            with (
                stage(run, "fine-tune"),
                stop_on(signal.SIGTERM, begin=budget.begin) as stop,
                bar("fine-tune") as progress,
            ):
                if config.local:
                    from deploy.local import run_local

                    run_local(config, run, progress, stop)
                else:
                    from deploy.distributed import run_distributed

                    run_distributed(config, run, redis_url, progress, stop)
    finish(config, run)
    return run


def prepare(config: FinetuneConfig, launch: Callable[[], None], resume: bool = False) -> Path:
    """Checks everything, then writes the run folder up to where collecting begins: rehearsal set and prior actor.

    `launch` is called when all is checked and nothing written yet: what it needs may be missing too. With `resume`,
    what the folder has already stays as it is.
    """
    from actors.guidance import find_guide
    from actors.rendering import choose_backend

    assert config.out is not None, "only resolved configs have a folder"
    choose_backend()
    if not config.local:
        _require_redis(config.redis_url)
    run = config.out.resolve()
    if not resume and run.exists() and any(run.iterdir()):
        raise UsageError(f"{run} already has a run in it: go on with it by --resume, or choose another --out.")
    with ExitStack() as stack:
        if config.guide is not None:
            find_guide(config.guide)
        env = stack.enter_context(closing(parts.host(config)))
        config.replay(env.spec.action_repeat, env.task.episode_steps)
        _require_first_frame(env)
        if not config.uses_pool:
            size = preset(config.model)
            architecture = replace(
                size.world_model, max_action_dim=config.max_action_dim,
                observation=ObservationConfig.of(env.spec.observation),
            )  # fmt: skip
            forecast(config, architecture, config.model, env.spec, env.task.episode_steps).say()
            launch()
            _begin(config, run, architecture, config.model, env.spec.action_dim)
            return run
        assert config.store is not None and config.world_model is not None
        model = stages.load_world_model(config.world_model)
        stages.require_fits(model, env.spec, f"the task {env.task.name}")
        store = stack.enter_context(TrajectoryStore.open(config.store))
        if config.rehearses:
            stages.require_embodiment(store, env, model)
        size_name = stages.size_of(model)
        forecast(config, model.config, size_name, env.spec, env.task.episode_steps).say()
        launch()
        _begin(config, run, model.config, size_name, env.spec.action_dim)
        done = stages_done(run)
        if config.rehearses and "retrieve" not in done:
            kind = "random" if config.method == "random-rehearsal" else "nearest"
            with stage(run, "retrieve"):
                found = rehearsal.rehearse(
                    store, config.world_model, model, env, kind, config.retrieve_k, config.queries, config.seed, run
                )
        if config.guides and "clone prior" not in done:
            from learner.clone import clone_prior

            with stage(run, "clone prior"), bar("clone") as progress:
                cache = config.world_model / "priors"
                found = RehearsalSet.load(run / "rehearsal.json")
                network, seen = preset(size_name).prior, model.config.observation
                clone_prior(store, found.rows, network, config.clone.for_size(size_name), cache, progress, seen).save(
                    run / "prior"
                )
    return run


def finish(config: FinetuneConfig, run: Path) -> None:
    """Evaluates what the run made and writes its report."""
    from deploy.evaluate import final_evaluation

    write_agent_card(run)  # once the weights are there, and again with scores
    if "evaluate" not in stages_done(run):
        with stage(run, "evaluate"), bar("evaluate") as progress:
            final_evaluation(config, run, progress)
        write_agent_card(run)
    report(run)


def report(run: Path) -> None:
    """Writes and prints the report of a run."""
    from reports.report import write_report

    summary = write_report(run)
    table = Table(title=summary.task, title_justify="left")
    for column in ("policy", "score", "95 % interval", "return", "episodes"):
        table.add_column(column, justify="left" if column == "policy" else "right")
    for p in summary.policies:
        low, high = p.interval
        table.add_row(p.label, f"{p.score:.1f}", f"[{low:.1f}, {high:.1f}]", f"{p.returns:.1f}", str(p.episodes))
    console.print(table)
    console.print(summary.verdict, soft_wrap=True)
    console.print(f"Report: {summary.html}", soft_wrap=True)


def resume(folder: Path, changes: Callable[[FinetuneConfig], FinetuneConfig]) -> Path:
    """Goes on with the run in `folder`, under its own settings but for what `changes` makes of them.

    Raises UsageError where there is no run, or where a change would make it another run.
    """
    # The password of a Redis is never kept; FinetuneConfig's own default looks for it in the environment.
    before = replace(config_of(folder), redis_url=os.environ.get("GSA_REDIS_URL"))
    now = replace(changes(before), out=folder)
    ours, theirs = configs.to_dict(before), configs.to_dict(now)
    if different := [f"{k} {ours[k]} → {theirs[k]}" for k in ours if ours[k] != theirs[k] and k not in MAY_CHANGE]:
        raise UsageError(f"Another run would come of it: {'; '.join(different)}. Start one with another --out.")
    return finetune(now, resume=True)


def stages_done(folder: Path) -> set[str]:
    """The stages of a run that have ended."""
    path = folder / "stages.json"
    return {row["stage"] for row in json.loads(path.read_text())} if path.exists() else set()


@contextmanager
def stage(folder: Path, name: str) -> Iterator[None]:
    """Times a stage and adds it to the folder's stages.json."""
    started = time.perf_counter()
    yield
    path = folder / "stages.json"
    done = json.loads(path.read_text()) if path.exists() else []
    done.append({"stage": name, "seconds": round(time.perf_counter() - started, 1)})
    with replace_file(path) as file:
        file.write(json.dumps(done, indent=1).encode())


def _require_redis(url: str | None) -> None:
    """Raises UsageError or Unavailable if the run could not have its Redis server."""
    import redis

    from deploy.redis_server import find_binary
    from gsa.redis_link import RedisLink

    if url is None:
        find_binary()
        return
    link = RedisLink(url, "check", "check")
    try:
        link.check_subscriber()
    except redis.RedisError as error:
        link.raise_if_refused(error)
        raise UsageError(f"The Redis server of --redis-url does not answer: {str(error).rstrip('.')}.") from None
    finally:
        link.close()


def _require_first_frame(env: Host) -> None:
    """Raises UsageError if the environment shows nothing: better now than in every worker."""
    try:
        env.reset(rehearsal.QUERY_SEED)
    except EnvironmentFault as fault:
        raise UsageError(f"The task cannot be begun. {fault} `gsa doctor` checks rendering.") from fault


def _begin(config: FinetuneConfig, run: Path, model: WorldModelConfig, size: str, action_dim: int) -> None:
    """The run folder with its resolved config (without the password in a Redis URL) and its architecture."""
    behaviour = replace(preset(size).behaviour, learn_end=config.learn_end)
    if config.imagination_starts is not None:
        behaviour = replace(behaviour, imagination_starts=config.imagination_starts)
    run.mkdir(parents=True, exist_ok=True)
    configs.save(replace(config, redis_url=None), run / "config.yaml")
    if not (run / parts.ARCHITECTURE).exists():  # a run that goes on keeps its name
        prior = preset(size).prior if config.guides else None
        parts.Architecture(parts.unique_name(run), model, behaviour, prior, action_dim).save(run)
