"""The world model: a block RSSM trained on images and actions alone (method, section 3)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gsa import config as configs
from gsa.agent import latents, observation, rssm, storage
from gsa.agent.layers import StateMLP, seeded
from gsa.agent.precision import autocast, full
from gsa.agent.rssm import State, States
from gsa.agent.sizes import PIXELS, WorldModelConfig
from gsa.agent.unroll import unroll
from gsa.agent.vision import Decoder, squared_error
from gsa.errors import SpecMismatch
from gsa.schema import Batch

KIND = "world_model"
Noise = torch.Generator | Tensor  # what draws the latents; or the numbers it would draw, [B, T, S] in [0, 1)
NOT_ARCHITECTURE = ("precision", "free_nats", "recon_scale", "dyn_scale", "rep_scale")


@dataclass(frozen=True, eq=False)
class TensorBatch:
    """A schema.Batch on a device. Row t holds what led to observation t."""

    observation: Mapping[str, Tensor]  # name → [B, T, …]: images [64, 64, 3] uint8, vectors [V] float32
    previous_action: Tensor  # [B, T, A] float32
    action_mask: Tensor  # [B, A] float32
    reward: Tensor  # [B, T] float32
    reward_mask: Tensor  # [B, T] bool
    discount: Tensor  # [B, T] float32
    is_first: Tensor  # [B, T] bool
    valid: Tensor  # [B, T] bool
    whole: bool = False  # every row is known to be valid, without asking the device

    @classmethod
    def from_batch(cls, batch: Batch, device: torch.device | str = "cpu") -> TensorBatch:
        """On the CPU nothing is copied."""
        seen = {k: torch.as_tensor(v, device=device) for k, v in batch.observation.items()}
        names = [name for name in cls.__dataclass_fields__ if name not in ("observation", "whole")]
        rest = {k: torch.as_tensor(getattr(batch, k), device=device) for k in names}
        return cls(seen, **rest, whole=bool(batch.valid.all()))

    def tensors(self) -> list[Tensor]:
        rest = (getattr(self, name) for name in self.__dataclass_fields__ if name not in ("observation", "whole"))
        return [*(self.observation[name] for name in sorted(self.observation)), *rest]


class WorldModel(nn.Module):
    """Encoder, recurrent core with prior and posterior heads, decoder; encoder and decoder of images, of vectors, or
    of both. With images alone it is the paper's model."""

    def __init__(self, config: WorldModelConfig) -> None:
        super().__init__()
        c = self.config = config
        self.encoder, self.vector_encoder = observation.encoders(c)
        self.cell = rssm.RecurrentCell(c.deter, c.latent, c.max_action_dim, c.hidden, c.blocks, c.gates)
        self.prior = rssm.Head(c.deter, c.hidden, 2, c.stoch, c.classes)
        self.posterior = rssm.Head(c.deter + c.features, c.hidden, 1, c.stoch, c.classes)
        self.decoder: Decoder | None = None
        self.vector_decoder: StateMLP | None = None
        if c.observation.images:
            self.decoder = Decoder(c.deter, c.latent, c.hidden, c.depth, c.blocks, c.observation.channels)
        if c.observation.vectors:
            self.vector_decoder = StateMLP(c.deter, c.latent, c.observation.length, 1, c.hidden, c.blocks)

    @classmethod
    def create(cls, config: WorldModelConfig, seed: int, device: torch.device | str = "cpu") -> WorldModel:
        """A fresh model whose weights depend on `seed` alone."""
        with seeded(seed):
            return cls(config).to(device)

    @property
    def device(self) -> torch.device:
        return self.cell.norm.weight.device

    def autocast(self) -> Any:
        """The precision that loss and imagination run in."""
        return autocast(self.device, self.config.precision)

    def encode(self, seen: Mapping[str, Tensor]) -> Tensor:
        """An observation, name → [..., shape of one], to features [..., F]."""
        what = self.config.observation
        shape = observation.lead(what, seen)
        what.require(seen, "The world model", "the observation", tuple(shape))
        return self._encode(observation.prepare(what, seen)).unflatten(0, shape)

    def _encode(self, inputs: observation.Inputs) -> Tensor:
        images = None if self.encoder is None else self.encoder.encode
        return observation.encode(images, self.vector_encoder, inputs)

    @torch.inference_mode()
    def features(self, seen: Mapping[str, np.ndarray]) -> np.ndarray:
        """What retrieval compares: an observation {name: [N, …]} to features [N, F] float32, on the CPU.

        Always in float32, whatever the precision of training is: equal weights must give equal features. SpecMismatch
        where the model cannot see it.
        """
        tensors = {k: torch.from_numpy(np.require(v, requirements=["C", "W"])).to(self.device) for k, v in seen.items()}
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            return self.encode(tensors).float().cpu().numpy()

    def observe(self, features: Tensor, previous_action: Tensor, is_first: Tensor, noise: Noise) -> States:
        """The filter over whole sequences.

        features [B, T, F], previous_action [B, T, A] float32, is_first [B, T] bool.
        """
        if previous_action.shape[-1] != self.config.max_action_dim:
            raise SpecMismatch(
                f"Actions padded to {previous_action.shape[-1]}; this world model has max_action_dim "
                f"{self.config.max_action_dim}."
            )
        uniform = noise if isinstance(noise, Tensor) else self.draw(features.shape[:-1], noise)
        unimix = self.config.unimix
        return rssm.scan(self.cell, self.posterior, features, previous_action, is_first, uniform, unimix)

    def imagine(self, state: State, actions: Tensor, generator: torch.Generator) -> State:
        """Open loop: from a state of [N, …] under actions [N, H, A] to states of [N, H, …]."""
        dream, states = Dream(self), []
        uniform = self.draw(actions.shape[:-1], generator)
        for action, noise in zip(actions.unbind(1), uniform.unbind(1), strict=True):
            state = dream(state, action, noise)
            states.append(state)
        return State(torch.stack([s.deter for s in states], 1), torch.stack([s.stoch for s in states], 1))

    def draw(self, shape: torch.Size | tuple[int, ...], generator: torch.Generator) -> Tensor:
        """Uniform numbers [..., S] that the latents are sampled with."""
        dtype = self.cell.norm.weight.dtype
        return torch.rand(*shape, self.config.stoch, generator=generator, device=self.device, dtype=dtype)

    def decode(self, state: State) -> dict[str, Tensor]:
        """The observations that states of [..., D] stand for: images uint8 [..., 64, 64, 3], vectors float32."""
        images = None if self.decoder is None else self.decoder.image(*state)
        vectors = None if self.vector_decoder is None else self.vector_decoder(*state)
        return observation.split(self.config.observation, images, vectors)

    def loss(
        self, batch: TensorBatch, noise: Noise, groups: Mapping[str, Tensor] | None = None
    ) -> tuple[Tensor, States, dict[str, Tensor]]:
        """The training loss (a scalar), the inferred states of [B, T, …] with gradient, and metrics.

        `groups`, name → bool [B], are sequences whose parts of the loss are wanted apart: as metrics "part/name".
        """
        shape, what = batch.is_first.shape, self.config.observation
        what.require(batch.observation, "The world model", "the batch", tuple(shape))
        inputs = observation.prepare(what, batch.observation)
        with self.autocast():
            features = self._encode(inputs).view(*shape, -1)
            action = batch.previous_action * batch.action_mask[:, None]  # what a padded dimension holds is no action
            states = self.observe(features, action, batch.is_first, noise)
            prior_logits = self.prior(states.deter)
            errors = self._errors(states.state, inputs)
        parts = {
            **{name: value.view(shape) for name, value in errors.items()},
            **divergences(states.logits, prior_logits, self.config),
        }
        means = {name: masked_mean(value, batch.valid) for name, value in parts.items()}
        c = self.config
        loss = c.recon_scale * means["recon"] + c.dyn_scale * means["dyn"] + c.rep_scale * means["rep"]
        for name, rows in (groups or {}).items():
            chosen = batch.valid & rows[:, None]
            means |= {f"{part}/{name}": masked_mean(parts[part].detach(), chosen) for part in ("recon", "dyn", "rep")}
        return loss, states, {"loss": loss.detach(), **{k: v.detach() for k, v in means.items()}}

    def _errors(self, state: State, inputs: observation.Inputs) -> dict[str, Tensor]:
        """Squared error of what is decoded, summed over an observation, [N]: of images and vectors together and, where
        there are both, of each."""
        parts = {}
        if self.decoder is not None and inputs.patches is not None:
            parts["image_error"] = squared_error(self.decoder(*state), inputs.patches)
        if self.vector_decoder is not None and inputs.vectors is not None:
            parts["vector_error"] = (full(self.vector_decoder(*state.flatten())) - inputs.vectors).square().sum(-1)
        total = torch.stack(list(parts.values())).sum(0)
        return {"recon": total, **(parts if len(parts) > 1 else {})}

    def architecture_hash(self) -> str:
        """Equal for models that can take each other's weights."""
        return config_hash(self.config)

    def encoder_hash(self) -> str:
        """Equal for models that give the same features: the key of a feature index."""
        seen = self.config.observation
        digest = hashlib.sha256(b"" if seen == PIXELS else repr(seen).encode())
        weights = self.encoder.state_dict() if self.encoder is not None else {}
        if self.vector_encoder is not None:
            weights |= self.vector_encoder.state_dict(prefix="vectors.")
        for name, value in weights.items():
            digest.update(name.encode() + str(list(value.shape)).encode())
            digest.update(value.detach().float().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def save(self, folder: str | Path, meta: Mapping[str, Any] | None = None) -> None:
        """Writes world_model.safetensors and world_model.json; `meta` is anything JSON."""
        storage.save(folder, KIND, self.state_dict(), configs.to_dict(self.config), dict(meta or {}))

    @classmethod
    def load(cls, folder: str | Path, device: torch.device | str = "cpu") -> WorldModel:
        """Raises UsageError when there is none, FormatError when it is damaged."""
        about, tensors = storage.load(folder, KIND)
        config = configs.from_dict(WorldModelConfig, about["config"], f"{folder}/{KIND}.json")
        return storage.build(lambda: cls(config), tensors, f"The world model in {folder}").to(device)


class Dream:
    """Steps by the prior, without images; the model's weights must not change meanwhile."""

    def __init__(self, model: WorldModel) -> None:
        self._transition, self._prior = rssm.Transition(model.cell), unroll(model.prior.layers())
        self._shape, self._unimix = model.prior.shape, model.config.unimix

    def __call__(self, state: State, action: Tensor, uniform: Tensor) -> State:
        """The next state from one of [N, …], the padded action [N, A] and uniform numbers [N, S]."""
        deter = self._transition(state, action)
        logits = self._prior(deter).unflatten(-1, self._shape)
        return State(deter, latents.sample(logits, uniform, self._unimix).flatten(-2))


def config_hash(config: WorldModelConfig) -> str:
    """A hash of what decides names and shapes of the weights and what they compute."""
    data = {k: v for k, v in configs.to_dict(config).items() if k not in NOT_ARCHITECTURE}
    if config.observation == PIXELS:
        del data["observation"]  # pixels alone are what goes without saying
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def divergences(posterior: Tensor, prior: Tensor, config: WorldModelConfig) -> dict[str, Tensor]:
    """The two halves of the KL balance, clipped at the free bits per step (paper, Eq. 2), and what to watch.

    Logits [B, T, S, K] → each [B, T] in nats.
    """
    q, p = latents.log_probs(posterior, config.unimix), latents.log_probs(prior, config.unimix)
    dyn = latents.kl_divergence(q.detach(), p)
    return {
        "dyn": dyn.clamp(min=config.free_nats),
        "rep": latents.kl_divergence(q, p.detach()).clamp(min=config.free_nats),
        "kl": dyn.detach(),
        "posterior_entropy": latents.entropy(q.detach()),
        "prior_entropy": latents.entropy(p.detach()),
    }


def masked_mean(value: Tensor, mask: Tensor) -> Tensor:
    """The mean of [B, T] where the mask is True; 0 where it never is."""
    weight = mask.to(value.dtype)
    return (value * weight).sum() / weight.sum().clamp(min=1)
