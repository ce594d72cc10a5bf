"""Does a policy come sooner with a pool? Methods of one code, on pixel tasks, at an equal budget, from equal seeds.

`suites/evidence.yaml` names everything: pool, pre-training, tasks, methods, seeds, budget, variants. This runs what is
left of it (`gsa suite run`, for `--hours` at most), measures beside each finished gsa run how far what it rehearsed is
from what it met and from an expert (Wasserstein distances of latent states, in each quarter of the run), and beside
every run how well its world model fits what it met last, its body's part of the pool and an expert, and computes the
results: mean and interquartile mean of normalised scores with stratified bootstrap intervals over seeds, relative
gain over scratch, probability of improvement, frames to scratch's final result. Only tasks and seeds are compared for
which every method is done. Nothing here is a race: there are no rivals but the methods.

`suites/pilots.yaml` (scratch alone) is what tasks and budget are chosen by; what was run of it is kept in pilots.json.
Finished trials are kept in benchmarks/results/evidence/, a file each, with the pre-trained world model: on another
machine, or in an empty folder, the suite goes on from them. Until all are there the result is partial, and says so.
Trials that `gsa suite run suites/evidence.yaml --out runs/again --only …` ran a second time are kept beside them, and
their mean is held against the interval of the first ones.

    python -m benchmarks.sample_efficiency [--quick] [--save] [--hours H]

--quick runs no trial and measures nothing new. --save also keeps what is finished and writes docs/results.md anew.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks import harness
from benchmarks.evidence import analysis, page
from deploy.provenance import surroundings
from deploy.suite_config import SuiteConfig, Trial
from gsa import config as configs
from gsa.errors import UsageError

if TYPE_CHECKING:
    from gsa.agent.world_model import WorldModel
    from reports.shift import Sample
    from retrieval.store import TrajectoryStore

ROOT = Path(__file__).parent.parent
SUITE, FOLDER = ROOT / "suites" / "evidence.yaml", ROOT / "runs" / "evidence"
AGAIN = ROOT / "runs" / "again"  # trials that were run a second time, to compare
KEPT, POOL = harness.RESULTS / "evidence", harness.RESULTS / "pool.json"
PILOTS, PILOTS_FOLDER = harness.RESULTS / "pilots.json", ROOT / "runs" / "pilots"
WORLD_MODEL = ("world_model.json", "world_model.safetensors", "config.yaml", "metrics.jsonl")
EXPERT = {"metaworld": ("scripted-0", 10), "dmc": ("planner-1", 5)}
SEQUENCES, LENGTH, STATES, REPEATS = 64, 32, 300, 10  # of the Wasserstein distances, see `gsa shift`
QUARTERS = 4


def main() -> int:
    options = harness.arguments(__doc__, {"--hours": 0.0})
    suite = configs.load(SuiteConfig, SUITE)
    planned = suite.trials(FOLDER)
    if not options.quick:
        restore(KEPT, FOLDER)
        if options.hours > 0:
            from deploy import suite as suites

            suites.run(suite, FOLDER, (), options.hours, None, False)
        for trial in planned:
            observe(FOLDER, trial)
    trials, repeated = gather(KEPT, FOLDER, planned), gather(KEPT / "again", AGAIN, suite.trials(AGAIN))
    if options.save:
        keep(KEPT, FOLDER, trials)
        keep_trials(KEPT / "again", repeated)
        keep_pilots(PILOTS, PILOTS_FOLDER)
    found = analysis.analyse(trials, suite, repeated)
    found["planned"] = len(planned)
    code = harness.finish("sample_efficiency", found, analysis.goals(found, len(planned)), options)
    if options.save:
        page.write()
    return code


def restore(kept: Path, folder: Path) -> None:
    """Gives the suite's folder what was finished elsewhere: results, and the world model unless it has one."""
    for path in sorted((kept / "results").glob("*.json")):
        _copy(path, folder / "results" / path.name)
    model = folder / "world_model"
    if (kept / "world_model").exists() and not model.exists():
        shutil.copytree(kept / "world_model", model)
        from deploy.run import stage

        with stage(folder, "pre-train"):
            pass


def gather(kept: Path, folder: Path, planned: Sequence[Trial]) -> list[dict[str, Any]]:
    """The finished trials of the plan, with what was measured beside them. UsageError where one is not of this plan."""
    found = []
    for trial in planned:
        paths = [place / "results" / f"{trial.name}.json" for place in (folder, kept)]
        if path := next((path for path in paths if path.exists()), None):
            result = json.loads(path.read_text())
            if different := trial.unlike(result["settings"]):
                raise UsageError(f"{path} was made under other settings ({'; '.join(different)}): remove it.")
            found.append(result | _read(folder / "observed" / path.name))
    return found


def keep(kept: Path, folder: Path, trials: Sequence[Mapping[str, Any]]) -> None:
    """Writes the trials, the pool's report and the world model where they are committed."""
    keep_trials(kept, trials)
    for name in WORLD_MODEL:
        if (source := folder / "world_model" / name).exists():
            _copy(source, kept / "world_model" / name)
    before, report = _read(POOL), _read(folder / "collected" / "collect.json")
    if report:
        experts = before.get("experts", {}) | _read(folder / "experts" / "collect.json").get("sources", {})
        POOL.write_text(
            json.dumps({"record": "pool", **surroundings(), **before, **report, "experts": experts}, indent=1) + "\n"
        )


def keep_trials(kept: Path, trials: Sequence[Mapping[str, Any]]) -> None:
    for trial in trials:
        path = kept / "results" / f"{trial['name']}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(trial) + "\n")


def keep_pilots(kept: Path, folder: Path) -> None:
    """Adds what has been run of suites/pilots.yaml to the record of the pilots. None that is in it is lost."""
    record = _read(kept) or {"record": "pilots", "pilots": []}
    rows = {row["name"]: row for row in record["pilots"]}
    for path in sorted((folder / "results").glob("*.json")):
        rows[path.stem] = pilot(json.loads(path.read_text()))
    if rows:
        kept.write_text(json.dumps(record | {"pilots": list(rows.values())}, indent=1) + "\n")


def pilot(result: Mapping[str, Any]) -> dict[str, Any]:
    """A finished trial as a row of that record."""
    settings = result["settings"]
    updates = (result["frames"] - settings["warmup_frames"]) / 2 * settings["train_ratio"]
    return {
        "name": result["name"], "task": result["task"], "seed": result["seed"], "frames": result["frames"],
        "updates": round(updates / settings["batch"] / settings["length"]),
        "curve": [{key: round(row[key], 1) for key in ("frames", "score", "return")} for row in result["curve"]],
        "score": result["score"], "return": result["return"], "ended": "at its budget", "commit": result["commit"],
        "seconds": result["seconds"], "settings": settings,
    }  # fmt: skip


def observe(folder: Path, trial: Trial) -> None:
    """Precision, shift and model error of a finished trial whose run is still there, into FOLDER/observed."""
    run, out = folder / "trials" / trial.name, folder / "observed" / f"{trial.name}.json"
    done = (folder / "results" / out.name).exists()
    if out.exists() or not done or trial.variant:
        return
    found: dict[str, Any] = {}
    if (run / "rehearsal.json").exists():
        rehearsal = _read(run / "rehearsal.json")
        found["retrieval"] = {key: rehearsal[key] for key in ("kind", "k", "precision", "task_share")}
    if trial.method == "gsa" and (run / "online").exists():
        found["shift"] = shift(folder, trial)
    if (run / "agent").exists() and (run / "online").exists():
        found["model_error"] = model_error(folder, trial)
    if found:
        out.parent.mkdir(exist_ok=True)
        out.write_text(json.dumps(found) + "\n")


def shift(folder: Path, trial: Trial) -> list[dict[str, Any]]:
    """W1 from what was met in each quarter of the run, and from an expert, of what was retrieved, random draws and the
    pool: in the posterior states of the pre-trained world model."""
    from deploy.shift import latents
    from deploy.stages import load_world_model
    from reports.shift import compare
    from retrieval.retriever import RehearsalSet, random_rehearsal
    from retrieval.store import TrajectoryStore

    config = trial.config
    assert config.store is not None and config.world_model is not None and config.out is not None
    model = load_world_model(config.world_model)
    with ExitStack() as stack:
        pool, online, expert = (
            stack.enter_context(TrajectoryStore.open(path))
            for path in (config.store, config.out / "online", experts(folder))
        )
        retrieved = RehearsalSet.load(config.out / "rehearsal.json")
        embodiment = retrieved.embodiment
        drawn = random_rehearsal(pool, len(retrieved), embodiment, config.seed)
        others = {
            name: _states(latents, model, pool, np.array(rows, np.int64), i)
            for i, (name, rows) in enumerate(
                (("retrieved", retrieved.rows), ("random", drawn.rows), ("pool", pool.rows()))
            )
        }
        references = {
            f"online {i + 1}/{QUARTERS}": (online, rows)
            for i, rows in enumerate(np.array_split(online.rows(), QUARTERS))
        }
        references["expert"] = (expert, _of_task(expert, trial.task))
        found = []
        for i, (name, (store, rows)) in enumerate(references.items(), len(others)):
            sample = _states(latents, model, store, rows, i)
            for row in compare(name, sample, others, STATES, REPEATS, 0):
                if row.sample != row.reference:
                    found.append({
                        "from": name, "to": row.sample,
                        "distance": [row.exact.mean, row.exact.low, row.exact.high],
                        "of_the_pools": row.exact_ratio.mean,
                    })  # fmt: skip
    return found


def model_error(folder: Path, trial: Trial) -> list[dict[str, Any]]:
    """What the run's world model leaves at its end, and the pre-trained one, of what the run met in its last quarter,
    of the pool's trajectories of its body, and of an expert's: squared error of the images and KL of posterior from
    prior (nats), means over sequences drawn as training draws them. The same sequences of pool and expert for all."""
    from deploy.stages import load_world_model
    from gsa.agent.world_model import WorldModel
    from retrieval.store import TrajectoryStore

    config = trial.config
    assert config.store is not None and config.world_model is not None and config.out is not None
    models = {"pre-trained": load_world_model(config.world_model), "final": WorldModel.load(config.out / "agent")}
    with ExitStack() as stack:
        pool, online, expert = (
            stack.enter_context(TrajectoryStore.open(path))
            for path in (config.store, config.out / "online", experts(folder))
        )
        met = online.rows()
        body = online.spec(int(met[0])).embodiment
        places = {
            "met last": (online, np.array_split(met, QUARTERS)[-1]),
            "pool": (pool, pool.rows(body)),
            "expert": (expert, _of_task(expert, trial.task)),
        }
        return [
            {"model": name, "on": place, **_error(model, *where)}
            for name, model in models.items()
            for place, where in places.items()
        ]


def _error(model: WorldModel, store: TrajectoryStore, rows: np.ndarray) -> dict[str, float]:
    import torch

    from deploy.shift import draw, lots

    generator, sums = torch.Generator(model.device).manual_seed(0), np.zeros(2)
    refs = draw(store, rows, SEQUENCES, LENGTH, np.random.default_rng(0))
    for lot, batch in lots(model, store, refs, LENGTH):
        with torch.inference_mode():
            _, _, metrics = model.loss(batch, generator)
        sums += len(lot) * np.array([float(metrics["recon"]), float(metrics["kl"])])
    return dict(zip(("recon", "kl"), (sums / SEQUENCES).tolist(), strict=True))


def experts(folder: Path) -> Path:
    """A store of the suite's experts, collected where it is not there: none of it is in the pool."""
    from actors.collect import CollectPlan, collect
    from retrieval.store import TrajectoryStore

    suite, out = configs.load(SuiteConfig, SUITE), folder / "experts"
    plan = []
    for task in suite.tasks:
        behaviour, episodes = EXPERT[task.split("/", 1)[0]]
        plan.append((f"{task}/{behaviour}", episodes))
    path = out / "store"
    if not (out / "collect.json").exists():
        with TrajectoryStore.open(path, write=True) if path.exists() else TrajectoryStore.create(path) as store:
            collect(CollectPlan(tuple(plan)), out, suite.pool.seed + 1, store=store)
    return path


def _states(latents: Any, model: WorldModel, store: TrajectoryStore, rows: np.ndarray, seed: int) -> Sample:
    return latents(model, store, rows, SEQUENCES, LENGTH, [0, seed])[1]


def _of_task(store: TrajectoryStore, task: str) -> np.ndarray:
    return np.array([row for row in store.rows() if store.catalog.source(int(row)).startswith(f"{task}/")], np.int64)


def _copy(source: Path, target: Path) -> None:
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {}


if __name__ == "__main__":
    sys.exit(main())
