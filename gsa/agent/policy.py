"""Acting: the filter, the policy and the prior actor under a schedule made elsewhere."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gsa.agent import observation as observations
from gsa.agent import rssm, storage
from gsa.agent.agent import Agent
from gsa.agent.behaviour import Actor
from gsa.agent.prior_actor import PriorActor, cameras
from gsa.agent.rssm import State, Transition
from gsa.agent.sizes import IMAGE_SHAPE, BehaviourConfig, WorldModelConfig
from gsa.agent.unroll import unroll
from gsa.errors import SpecMismatch, UsageError
from gsa.schema import Controller

Rngs = Sequence[np.random.Generator]


class _Networks:
    """The networks as acting takes them, made once for all the steps under the same weights: to the bit what the
    modules give, without what a module does at every call."""

    def __init__(self, nets: Any) -> None:
        """nets: the modules of a GuidedPolicy by name, those that it has."""
        self.encoder = nets["encoder"].ready() if "encoder" in nets else None
        self.vector_encoder = unroll(nets["vector_encoder"]) if "vector_encoder" in nets else None
        self.transition, self.posterior = Transition(nets["cell"]), nets["posterior"].ready()
        self.actor = nets["actor"].ready()


class _Staged(dict[str, np.ndarray]):
    """Published weights, and what acting makes of them."""

    def __init__(
        self, tensors: Mapping[str, np.ndarray], weights: dict[str, Tensor], copies: dict[str, Tensor],
        networks: _Networks,
    ) -> None:  # fmt: skip
        super().__init__(tensors)
        self.weights, self.copies, self.networks = weights, copies, networks  # copies: those of memory of their own


class GuidedPolicy:
    """Acts in E environments at once. Each keeps its own latent, previous action and frames.

    Random numbers come from each environment's own generator, so what one environment sees and does never changes the
    draws of another. Runs on the CPU in float32.
    """

    def __init__(
        self, model: WorldModelConfig, behaviour: BehaviourConfig, action_dim: int, envs: int = 1,
        prior: PriorActor | None = None,
    ) -> None:  # fmt: skip
        if prior is not None and prior.action_dim != action_dim:
            raise SpecMismatch(f"The prior actor has {prior.action_dim} action dimensions, the task {action_dim}.")
        if prior is not None:
            prior.observation.require(model.observation.specs(), "The prior actor", "the world model")
        self.model, self.action_dim, self.envs = model, action_dim, envs
        self.prior = None if prior is None else prior.cpu().eval().requires_grad_(False)
        self.encoder, self.vector_encoder = observations.encoders(model)
        self.cell = rssm.RecurrentCell(
            model.deter, model.latent, model.max_action_dim, model.hidden, model.blocks, model.gates
        )
        self.posterior = rssm.Head(model.deter + model.features, model.hidden, 1, model.stoch, model.classes)
        self.actor = Actor(model, behaviour, action_dim)
        names = ("encoder", "vector_encoder", "cell", "posterior", "actor")
        modules = {name: getattr(self, name) for name in names}
        self._nets = nn.ModuleDict({k: v for k, v in modules.items() if v is not None}).requires_grad_(False)
        self._networks = _Networks(self._nets)
        self._staged: _Staged | None = None  # what it acts by
        self._retired: list[_Staged] = []  # what it acted by before that: `stage` lets go of it, which takes long
        self.state = State(torch.zeros(envs, model.deter), torch.zeros(envs, model.latent))
        self._previous_action = torch.zeros(envs, model.max_action_dim)
        self._frames: np.ndarray | None = None
        self._fresh = np.ones(envs, bool)
        self._choose = {
            int(Controller.RANDOM): self._random, int(Controller.PRIOR): self._prior,
            int(Controller.POLICY): self._policy,
        }  # fmt: skip
        self._vectors: np.ndarray | None = None
        if prior is not None:
            seen = prior.observation
            self._frames = np.zeros((envs, *IMAGE_SHAPE[:2], prior.config.frames, seen.channels), np.uint8)
            if seen.vectors:
                self._vectors = np.zeros((envs, seen.length), np.float32)

    def load_tensors(self, tensors: Mapping[str, np.ndarray]) -> None:
        """Takes over published weights between two steps; latents stay. All of them are checked before any is used.

        What `stage` gave is taken over by a switch of references. Raises SpecMismatch when a name, shape or dtype
        is not that of Agent.acting_tensors.
        """
        staged = tensors if isinstance(tensors, _Staged) else self.stage(tensors)
        if staged is self._staged:
            return
        storage.use(self._nets, staged.weights)
        if self._staged is not None:
            self._retired.append(self._staged)
        self._staged, self._networks = staged, staged.networks

    @torch.no_grad()
    def stage(self, tensors: Mapping[str, np.ndarray]) -> _Staged:
        """Makes published weights ready for `load_tensors`, in one other thread, while this one acts. float32 arrays
        that are read-only are used where they are, but for convolutions; the others are copied to where those lie that
        were acted by before the present ones, which are of no use after this. Raises SpecMismatch as above."""
        seen = storage.views(self._nets, tensors, "The policy")
        room = dict[str, Tensor]()
        with contextlib.suppress(IndexError):
            room = self._retired.pop().copies
        weights, copies = dict[str, Tensor](), dict[str, Tensor]()
        for name, tensor in seen.items():
            if tensor.dtype == torch.float32 and tensor.ndim < 4 and not tensors[name].flags.writeable:
                weights[name] = tensor
                continue
            if name not in room:
                # As convolutions take them; torch would rearrange them for every batch.
                layout = torch.channels_last if tensor.ndim == 4 else torch.contiguous_format
                room[name] = torch.empty(tensor.shape, memory_format=layout)
            weights[name] = copies[name] = room[name].copy_(tensor)
        parameters = {
            id(p): nn.Parameter(weights[name], requires_grad=False) for name, p in self._nets.named_parameters()
        }
        return _Staged(tensors, weights, copies, _Networks(copy.deepcopy(self._nets, parameters)))

    @torch.no_grad()
    def load_prior(self, tensors: Mapping[str, np.ndarray]) -> None:
        """Takes over the prior actor's weights, which are published once, apart. Raises SpecMismatch as above."""
        if self.prior is None:
            raise UsageError("This policy was made without a prior actor.")
        storage.use(self.prior, storage.from_arrays(self.prior, tensors, "The prior actor"))

    @torch.inference_mode()
    def begin(self, env: int) -> None:
        """A new episode in environment `env`: forgets its latent, previous action and frames."""
        for tensor in (*self.state, self._previous_action):
            tensor[env] = 0
        self._fresh[env] = True

    @torch.inference_mode()
    def act(
        self, observation: Mapping[str, np.ndarray], controller: np.ndarray, rngs: Rngs,
        sample: bool = True, slots: Sequence[int] | None = None,
    ) -> np.ndarray:  # fmt: skip
        """One action for each of N environments: float32 [N, A] in [-1, 1].

        observation: name → uint8 [N, 64, 64, 3] or float32 [N, V]; what the model does not see is ignored, and what it
        lacks is a SpecMismatch. controller [N] of Controller: who chooses; rngs: N generators; slots: which of the E
        environments these are, ascending; all of them unless told.
        The policy samples, or acts by its mean without `sample`. The filter sees every observation and assumes that
        what is returned is executed.
        """
        which = np.arange(self.envs) if slots is None else np.asarray(slots)
        self.model.observation.require(observation, "The policy", "the observation", (len(which),))
        state = self._filter(which, observation, rngs)
        self._remember(which, observation)
        action = np.zeros((len(which), self.action_dim), np.float32)
        chosen = controller.tolist()
        for who, choose in self._choose.items():
            rows = [row for row, one in enumerate(chosen) if one == who]
            if rows:
                action[rows] = choose(rows, which, state, [rngs[row] for row in rows], sample)
        np.minimum(np.maximum(action, -1, out=action), 1, out=action)  # np.clip takes several times as long
        self.executed(action, which)
        return action

    def executed(self, action: np.ndarray, slots: Sequence[int] | np.ndarray | None = None) -> None:
        """Tells the filter what was executed [N, A] in `slots`, where that is not what `act` returned: a person took
        over."""
        which = slice(None) if slots is None else np.asarray(slots)
        self._previous_action.numpy()[which, : self.action_dim] = action

    def memory(self) -> dict[str, Any]:
        """What it remembers of the episodes under way, without its weights. The arrays are the live ones."""
        return {
            "deter": self.state.deter, "stoch": self.state.stoch, "previous_action": self._previous_action,
            "frames": self._frames, "fresh": self._fresh,
        }  # fmt: skip

    def recall(self, memory: Mapping[str, Any]) -> None:
        """Takes back what `memory` gave."""
        self.state = State(memory["deter"].clone(), memory["stoch"].clone())
        self._previous_action = memory["previous_action"].clone()
        self._fresh = memory["fresh"].copy()
        self._frames = None if memory["frames"] is None else memory["frames"].copy()

    def _filter(self, which: np.ndarray, observation: Mapping[str, np.ndarray], rngs: Rngs) -> State:
        """The latents [N, …] of the environments `which`, having seen the observation."""
        uniform = np.empty((len(rngs), self.model.stoch), np.float32)
        for row, rng in zip(uniform, rngs, strict=True):
            rng.random(dtype=np.float32, out=row)
        seen = {name: torch.from_numpy(_writable(observation[name])) for name in self.model.observation.names}
        inputs = observations.prepare(self.model.observation, seen)
        features = observations.encode(self._networks.encoder, self._networks.vector_encoder, inputs)
        slots = torch.from_numpy(which)
        everyone = len(which) == self.envs
        before = (*self.state, self._previous_action)
        deter, stoch, previous_action = before if everyone else (x.index_select(0, slots) for x in before)
        state = rssm.filter_step(
            self._networks.transition, self._networks.posterior, State(deter, stoch), previous_action, features,
            torch.from_numpy(uniform), self.model.unimix,
        )  # fmt: skip
        if everyone:
            self.state = state
            return state
        for kept, new in zip(self.state, state, strict=True):
            kept.index_copy_(0, slots, new)
        return state

    def _remember(self, which: np.ndarray, observation: Mapping[str, np.ndarray]) -> None:
        """Keeps what the prior actor sees: the last frames and the present vectors."""
        if self.prior is None or self._frames is None:
            return
        seen = self.prior.observation
        pixels, fresh = cameras(observation, seen), self._fresh[which]
        frames = np.concatenate([self._frames[which, :, :, 1:], pixels[:, :, :, None]], 3)
        frames[fresh] = pixels[fresh, :, :, None]
        self._frames[which] = frames
        if self._vectors is not None:
            self._vectors[which] = np.concatenate([observation[name] for name, _ in seen.vectors], -1)
        self._fresh[which] = False

    def _random(self, rows: list[int], which: np.ndarray, state: State, rngs: Rngs, sample: bool) -> np.ndarray:
        return np.stack([rng.uniform(-1, 1, self.action_dim) for rng in rngs]).astype(np.float32)

    def _prior(self, rows: list[int], which: np.ndarray, state: State, rngs: Rngs, sample: bool) -> np.ndarray:
        if self.prior is None or self._frames is None:
            raise UsageError("The schedule asks for the prior actor, and this policy was made without one.")
        frames = torch.from_numpy(self._frames[which[rows]]).flatten(3)
        vectors = None if self._vectors is None else torch.from_numpy(self._vectors[which[rows]])
        return self.prior(frames, vectors).numpy()

    def _policy(self, rows: list[int], which: np.ndarray, state: State, rngs: Rngs, sample: bool) -> np.ndarray:
        if len(rows) < len(which):
            state = State(*(x[rows] for x in state))
        mean, std = (x.numpy() for x in self._networks.actor(state))
        if not sample:
            return mean
        noise = np.empty_like(mean)
        for row, rng in zip(noise, rngs, strict=True):
            rng.standard_normal(dtype=np.float32, out=row)
        return mean + std * noise


class Policy:
    """A trained policy for one environment: `act` on each observation, `reset` before each episode."""

    def __init__(self, agent: Agent, seed: int = 0) -> None:
        self._policy = GuidedPolicy(agent.world_model.config, agent.config, agent.action_dim)
        self._policy.load_tensors(agent.acting_tensors())
        self._rngs = [np.random.default_rng(seed)]
        self.action_dim = agent.action_dim

    def act(self, observation: Mapping[str, np.ndarray] | np.ndarray, sample: bool = False) -> np.ndarray:
        """float32 [A] in [-1, 1] for what the world model sees: name → uint8 [64, 64, 3] or floats [V].

        An image alone will do where it sees nothing else. Raises SpecMismatch, naming both sides, and UsageError for
        NaN; the latent is then as it was.
        """
        what = self._policy.model.observation
        if not isinstance(observation, Mapping):
            observation = {what.names[0]: observation}
        vectors = dict(what.vectors)
        seen = {k: np.asarray(v, np.float32 if k in vectors else None) for k, v in observation.items()}
        what.require(seen, "The policy", "the observation")
        for name in vectors:
            if not np.all(np.isfinite(seen[name])):  # it would stay in the latent for the rest of the episode
                raise UsageError(f"The observation's '{name}' has NaN or infinite values.")
        alone = {name: value[None] for name, value in seen.items()}
        return self._policy.act(alone, np.array([Controller.POLICY], np.uint8), self._rngs, sample)[0]

    def reset(self) -> None:
        self._policy.begin(0)


def load_policy(folder: str | Path, seed: int = 0) -> Policy:
    """The policy of an agent's folder. `seed` decides the latents' random draws."""
    return Policy(Agent.load(folder), seed)


def _writable(array: np.ndarray) -> np.ndarray:
    """torch.from_numpy warns on read-only arrays, such as those from shared memory, and wants positive strides."""
    return array if array.flags.writeable and array.flags.c_contiguous else array.copy()
