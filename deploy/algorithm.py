"""The distributed run as an RLlib Algorithm: workers, replay service, learner and evaluator under one driver.

RLlib gives the shell: worker groups that restart their dead, metrics, callbacks, Tune. The data path is ours:
episodes go worker → replay → learner by reference, weights learner → workers by Redis; neither passes here.
"""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import ray
from ray.rllib.algorithms.algorithm import Algorithm
from ray.rllib.algorithms.algorithm_config import AlgorithmConfig
from ray.rllib.env.env_runner_group import EnvRunnerGroup

from actors.rollout import MAX_FAULTS
from deploy import parts
from deploy.config import FinetuneConfig
from deploy.env_runner import GSAEnvRunner
from deploy.faults import FaultLog, Warnings
from deploy.progress import console
from deploy.provenance import source_hash
from deploy.ray_actors import end_process, start_evaluator, start_learner, start_replay, wait_until_alive
from deploy.ray_links import ScoredSaves
from gsa.errors import GsaError
from gsa.metrics import RunLog, read_log

ROUND_S = 1.0  # between two looks around; nothing waits for the driver
DEADLINE_S = 60.0
START_S, START_WORKER_S = 180.0, 10.0  # for workers to come up: those of a node import on the same cores
STOP_S = 10.0  # for workers to hand over what they have finished; one that is cut off never does
AVERAGED = ("_ms", "version")  # of workers' stats; the others add up
SILENT_S = 180.0  # a process that answers nothing for so long is killed, and started anew
AWAY = (ray.exceptions.RayActorError, ray.exceptions.OutOfMemoryError, ray.exceptions.GetTimeoutError)


class GSAConfig(AlgorithmConfig):
    """RLlib's settings for a GSA run: `GSAConfig().for_run(config, run, redis_url).build_algo()`."""

    def __init__(self, algo_class: Any = None) -> None:
        super().__init__(algo_class=algo_class or GSA)
        self.finetune: FinetuneConfig | None = None
        self.run = Path()
        self.architecture: parts.Architecture | None = None
        self.redis_url = ""
        self.replay_name = ""
        self.sources = ""
        self.env_runner_cls = GSAEnvRunner
        self.create_local_env_runner = False
        self.merge_env_runner_states = self.broadcast_env_runner_states = False
        self._dont_auto_sync_env_runner_states = True
        self.restart_failed_env_runners, self.max_num_env_runner_restarts = True, 1_000_000
        self.delay_between_env_runner_restarts_s, self.env_runner_health_probe_timeout_s = 1.0, 0.05
        self.validate_env_runners_after_construction = False  # RLlib waits for ever; wait_until_alive does not
        self.num_learners = 1  # our learner's place in Tune's resource request

    def for_run(self, config: FinetuneConfig, run: Path, redis_url: str) -> GSAConfig:
        """Everything that a run's processes need to know."""
        self.finetune, self.run, self.redis_url = config, run, redis_url
        self.architecture, self.sources = parts.Architecture.load(run), source_hash()
        self.replay_name = f"gsa-replay-{self.architecture.run}"
        self.num_env_runners = config.workers
        return self


class GSA(Algorithm):
    """The driver. It watches and writes down; it holds no data, no weights and nobody's time."""

    @classmethod
    def get_default_config(cls) -> GSAConfig:
        return GSAConfig()

    def setup(self, config: GSAConfig) -> None:
        """Starts the processes. RLlib's own learner and connectors are not built: see docs/decisions."""
        self._set_up_metrics()
        self.config = config
        finetune = config.finetune
        if finetune is None or config.architecture is None:
            raise GsaError("GSAConfig needs for_run(...) before it is built.")
        self.finetune = finetune
        self.callbacks = [cls() for cls in _as_list(config.callbacks_class)]
        self.replay = start_replay(finetune, config.run, config.replay_name, config.sources)
        wait_until_alive({"The replay service": self.replay})
        self.learner = start_learner(finetune, config.run, self.replay, config.redis_url, config.sources)
        self.evaluator = start_evaluator(finetune, config.architecture, config.redis_url, config.sources)
        self.env_runner_group = EnvRunnerGroup(config=config, local_env_runner=False, tune_trial_id=self.trial_id)
        workers = self.env_runner_group._worker_manager.actors()
        named = {f"Worker {i}": actor for i, actor in workers.items()}
        wait_until_alive(named, START_S + START_WORKER_S * len(named))
        wait_until_alive({"The learner": self.learner, "The evaluator": self.evaluator})
        self._evaluated = self._episodes = 0
        self._go_on_logging(config.run)
        self.faults, self._warnings = FaultLog(config.run), Warnings()
        self.frames, self.done = 0, False
        self.latest: dict[str, float] = {}
        self.trouble = ""
        self.told = threading.Event()  # to stop: nobody is waited for any more
        self._evaluation: Any = None
        self._saves = ScoredSaves(self._begin_save)
        self._restarts = 0
        self._answered: dict[str, float] = {}  # part → when it answered last
        self._where: dict[str, tuple[str, int]] = {}  # part → its node, and its process there
        self._heard = dict.fromkeys(self.env_runner_group.healthy_env_runner_ids(), time.monotonic())
        self._living: list[str] = []  # workers that answered in the last round
        self._deaths: dict[int, int] = {}  # of each worker since it last made an agent step

    def training_step(self) -> None:
        """One look around: what workers, replay service, learner and evaluator report, written to the run's log."""
        time.sleep(ROUND_S)
        for warning in self._warnings.take():
            self.faults.write(self.frames, "the run", warning, "", aloud=True)
        report = self._ask("the replay service", self.replay, "report", self._episodes, self._living)
        if report is None:
            return
        self.frames, self.done = report["frames"], report["complete"]
        values = {**report["stats"], **self._workers(), **self._learner()}
        for row in report["episodes"]:
            self.log.write(int(row["frames"]), parts.episode_metrics(row))
        self._episodes = report["cursor"]
        if evaluated := self._evaluate(final=self.done):
            values |= evaluated
        self._saves.offer(evaluated.get("eval/score"))
        self.latest |= values
        self.log.write(self.frames, values)
        for name, value in values.items():
            self.metrics.log_value(tuple(name.split("/")), value, window=1)

    def save_now(self, within_s: float) -> bool:
        """Saves what the learner has learned; all else is on disk already. False where it is not in time: then the
        checkpoint before it stands."""
        try:
            ray.get(self.learner.save.remote(self.frames, self._saves.score, wait=True), timeout=within_s)
        except ray.exceptions.RayError:
            if place := self._where.get("the learner"):
                end_process(*place)  # it may hang; Ray would leave it behind
            return False
        finally:
            self.log.close()
        return True

    def finish(self) -> Path:
        """Saves the agent and ends every process in order."""
        folder = Path(ray.get(self.learner.finish.remote(), timeout=180))
        self.log.close()
        return folder

    def cleanup(self) -> None:
        """Ends what was started; also after a failure. Workers may hand over what is finished, if there is time."""
        if group := getattr(self, "env_runner_group", None):
            if not self.told.is_set():
                group.foreach_env_runner(lambda runner: runner.stop(), local_env_runner=False, timeout_seconds=STOP_S)
            group._worker_manager.clear()  # group.stop() would wait without end for one whose node is gone
        if warnings := getattr(self, "_warnings", None):
            warnings.close()
        for name in ("evaluator", "learner", "replay"):
            if actor := getattr(self, name, None):
                ray.kill(actor)
        for place in getattr(self, "_where", {}).values():
            end_process(*place)  # one that hangs would be left behind

    def restore_env_runners(self, group: EnvRunnerGroup) -> list[int]:
        """RLlib's hook before each step. A worker gives back its old leases itself; weights come from Redis."""
        back = group.probe_unhealthy_env_runners()
        self._restarts += len(back)
        self._heard |= dict.fromkeys(back, time.monotonic())
        return back

    def save_checkpoint(self, checkpoint_dir: str) -> dict[str, str]:
        """For Tune: where the run lies."""
        return {"run": str(self.config.run)}

    def load_checkpoint(self, checkpoint: Any) -> None:
        raise GsaError("A GSA run is not restored from an RLlib checkpoint: gsa finetune --resume goes on with it.")

    def _go_on_logging(self, run: Path) -> None:
        """Opens the run's log where it ends: each collected episode has one row in it."""
        rows = read_log(run) if (run / "metrics.jsonl").exists() else []
        self.log = RunLog(run, resume_rows=len(rows))
        self._episodes = sum("episode/steps" in row for row in rows)
        last = max((row["frames"] for row in rows if "eval/score" in row), default=0)
        self._evaluated = last - last % self.finetune.eval_every_frames

    def _learner(self) -> dict[str, float]:
        """What the learner counted; nothing while Ray restarts it. Tells what is wrong with the broadcast when it
        begins, and when it is over."""
        report = self._ask("the learner", self.learner, "report")
        if report is None:
            return {"driver/learner_unanswered": 1.0}
        stats, trouble = report["stats"], report["trouble"]
        for warning in report["warnings"]:
            self.faults.write(self.frames, "the learner", warning, "", aloud=True)
        if trouble and trouble != self.trouble:
            self.faults.write(self.frames, "the broadcast", trouble, "", aloud=True)
        elif trouble != self.trouble:
            console.print("The weight broadcast works again.")
        self.trouble = trouble
        return stats

    def _begin_save(self, score: float | None) -> Any:
        return self.learner.save.remote(self.frames, score, wait=False)

    def _workers(self) -> dict[str, float]:
        """What the workers counted, together; asks each for more; kills the one that stays silent."""
        group = self.env_runner_group
        values: dict[str, list[float]] = {}
        self._living = []
        for result in group._worker_manager.fetch_ready_async_reqs(tags="start", timeout_seconds=0.0):
            worker = result.actor_id
            self._heard[worker] = time.monotonic()
            if not result.ok:
                self._count_death(worker, result.get())
                continue
            self.faults.back(self.frames, f"worker-{worker}")
            name, stats, faults, error, self._where[f"worker-{worker}"] = result.get()
            self._living.append(name)
            for fault in faults:
                self.faults.write(self.frames, f"worker-{worker}", fault)
            if error:
                raise GsaError(error)
            if stats.get("worker/agent_steps"):
                self._deaths.pop(worker, None)
            for name, value in stats.items():
                values.setdefault(name, []).append(value)
        group.foreach_env_runner_async("start", tag="start")
        for worker in group.healthy_env_runner_ids():
            if time.monotonic() - self._heard.setdefault(worker, time.monotonic()) > SILENT_S:
                self._kill(f"worker-{worker}")
                self._heard[worker] = time.monotonic()
        together = {k: sum(v) / (len(v) if k.endswith(AVERAGED) else 1) for k, v in values.items()}
        alive = float(group.num_healthy_remote_env_runners())
        seen = {"workers": alive, "worker_restarts": self._restarts, "faults": self.faults.count}
        return {**together, **{f"driver/{name}": float(value) for name, value in seen.items()}}

    def _count_death(self, worker: int, error: Exception) -> None:
        """RLlib starts it anew, elsewhere if its node is gone; until there is room for it the others take over what it
        had leased. One that dies again and again before it makes a step ends the run."""
        place, did = f"worker-{worker}", "Its episodes are dropped; Ray starts it again."
        self.replay.release.remote(place)
        self._deaths[worker] = self._deaths.get(worker, 0) + 1
        self.faults.lost(self.frames, place, how_it_ended(error), did, again=True)
        if self._deaths[worker] >= MAX_FAULTS:
            raise GsaError(
                f"Worker {worker} died {MAX_FAULTS} times in a row before its first agent step: its process crashed "
                "or was killed. Is there memory enough?"
            )

    def _evaluate(self, final: bool) -> dict[str, float]:
        """Starts an evaluation when one is due; returns the one that has ended."""
        if self._evaluation is not None:
            ready, _ = ray.wait([self._evaluation], timeout=0)
            if not ready:
                self._ask("the evaluator", self.evaluator, "report")
                return {}
            reference, self._evaluation = self._evaluation, None
            try:
                return ray.get(reference, timeout=DEADLINE_S)
            except ray.exceptions.RayError as error:
                did = "This evaluation is left out."
                self.faults.write(self.frames, "the evaluator", how_it_ended(error), did, aloud=True)
                return {"driver/evaluation_errors": 1.0}
        every = self.finetune.eval_every_frames
        if not final and self.frames >= self._evaluated + every:
            self._evaluated = self.frames - self.frames % every
            self._evaluation = self.evaluator.evaluate.remote(self.finetune.eval_episodes)
        return {}

    def _ask(self, part: str, actor: Any, method: str, *arguments: Any) -> Any:
        """One call with a deadline. One that Ray is restarting answers None; one that hangs is killed."""
        try:
            answer = ray.get(self._awaited(getattr(actor, method).remote(*arguments)), timeout=0)
        except ray.exceptions.RayTaskError as error:
            raise (error.cause if isinstance(error.cause, GsaError) else error.as_instanceof_cause()) from None
        except AWAY as error:
            if not self.told.is_set():
                hangs = isinstance(error, ray.exceptions.GetTimeoutError)
                did = f"It is killed after {SILENT_S:.0f} s." if hangs else "Ray starts it again; the others go on."
                self.faults.lost(self.frames, part, how_it_ended(error), did)
                if hangs and time.monotonic() - self._answered.get(part, time.monotonic()) > SILENT_S:
                    self._kill(part)
                    self._answered[part] = time.monotonic()
            return None
        self._answered[part], self._where[part] = time.monotonic(), answer["where"]
        self.faults.back(self.frames, part)
        return answer

    def _awaited(self, reference: Any) -> Any:
        """The reference once its object is there, the deadline has come, or the run was told to stop."""
        end = time.monotonic() + DEADLINE_S
        while not ray.wait([reference], timeout=0.5)[0] and time.monotonic() < end and not self.told.is_set():
            pass
        return reference

    def _kill(self, part: str) -> None:
        """Ends a process that hangs; Ray starts it again."""
        if part in self._where:
            said = f"It has not answered for {SILENT_S:.0f} s."
            self.faults.write(self.frames, part, said, "It is killed; Ray starts it again.", aloud=True)
            end_process(*self._where[part])


def how_it_ended(error: Exception) -> str:
    """What became of a process of Ray's that does not answer, as a sentence."""
    if isinstance(error, ray.exceptions.GetTimeoutError):
        return f"It does not answer within {DEADLINE_S:.0f} s."
    if isinstance(error, ray.exceptions.RayTaskError):
        return f"It failed: {str(error.cause).rstrip('.')}."
    if isinstance(error, ray.exceptions.OutOfMemoryError) or "running low on memory" in str(error):
        return "Its process was killed, as its node was short of memory."
    if isinstance(error, ray.exceptions.ActorUnavailableError):
        return "Its process ended, or cannot be reached."
    return "Its process ended, or its node is gone."


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]
