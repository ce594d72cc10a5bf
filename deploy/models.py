"""What a model is made of, and where it lies: sizes, layer tables, and the released weights as a folder of ours."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from deploy.progress import console
from gsa.agent.sizes import PRESETS, Preset, preset
from gsa.errors import UsageError

if TYPE_CHECKING:
    from torch import nn

    from gsa.agent.world_model import WorldModel

    Module = TypeVar("Module", bound=nn.Module)

PURPOSE = {
    "tiny": "a CPU, minutes: the demo and tests",
    "small": "a CPU for hours, or any GPU",
    "reference-small": "a GPU; the reference's own default",
    "paper": "a large GPU; the paper's results, and its released weights",
}
TRAINED_BYTES = 16  # of a float32 weight, its gradient and Adam's two moments


def folder(path: Path, out: Path | None = None, stoch: int | None = None) -> Path:
    """The folder of a world model: `path` itself, or what a file of released weights is converted to, once."""
    if not path.is_file():
        return path
    from gsa.agent.released import STOCH, convert

    converted = convert(path, out, stoch or STOCH)
    console.print(f"{path} as a world model: {converted}", soft_wrap=True)
    return converted


def show_sizes(action_dim: int) -> int:
    """Prints the named sizes."""
    print(f"{'size':16} {'world model':>12} {'behaviour':>11} {'prior':>11}   for")
    for name, size in PRESETS.items():
        model, behaviour, prior = (parameters(part) for part in networks(size, action_dim))
        print(f"{name:16} {model:12,} {behaviour:11,} {prior:11,}   {PURPOSE[name]}")
    return 0


def show(size: str, action_dim: int) -> int:
    """Prints the layers of a named size. Takes no memory: nothing is filled with numbers."""
    model, behaviour, prior = networks(preset(size), action_dim)
    _print(model)
    print(f"behaviour, {action_dim} actions: {parameters(behaviour):,} parameters in {', '.join(_parts(behaviour))}")
    print(f"prior actor: {parameters(prior):,} parameters")
    return 0


def show_saved(path: Path) -> int:
    """Prints the layers of a saved world model, by its description."""
    from gsa import config as configs
    from gsa.agent import storage
    from gsa.agent.sizes import WorldModelConfig
    from gsa.agent.world_model import KIND, WorldModel

    about = storage.describe(path, KIND)
    _print(unfilled(WorldModel, configs.from_dict(WorldModelConfig, about["config"], f"{path}/{KIND}.json")))
    return 0


def networks(size: Preset, action_dim: int) -> tuple[WorldModel, nn.Module, nn.Module]:
    """World model, behaviour and prior actor of a size, without memory for their weights."""
    from gsa.agent.agent import Agent
    from gsa.agent.prior_actor import PriorActor
    from gsa.agent.world_model import WorldModel

    if action_dim < 1:
        raise UsageError(f"--action-dim must be at least 1, not {action_dim}.")
    model = unfilled(WorldModel, size.world_model)
    behaviour = unfilled(lambda: Agent(model, size.behaviour, action_dim).behaviour)
    return model, behaviour, unfilled(PriorActor, size.prior, action_dim)


def unfilled(make: Callable[..., Module], *arguments: object) -> Module:
    """A network without memory for its weights."""
    import torch

    with torch.device("meta"):
        return make(*arguments)


def parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _print(model: WorldModel) -> None:
    for name, kind, shapes, count in _rows(model):
        print(f"{name:22} {kind:16} {shapes:40} {count:>12,}")
    for name in _parts(model):
        print(f"{name:80} {parameters(getattr(model, name)):>12,}")
    total, seen = parameters(model), model.config.observation
    vectors = "".join(f", {name} [{length}]" for name, length in seen.vectors)
    print(f"world model: {total:,} parameters; sees {', '.join(seen.images)}{vectors}".replace("sees , ", "sees "))
    gigabytes = TRAINED_BYTES * total / 1e9
    print(f"trained in float32: {gigabytes:.1f} GB for weights, gradients and Adam's moments; activations come on top")


def _rows(model: nn.Module) -> Iterator[tuple[str, str, str, int]]:
    """Name, kind, shapes of its own weights and their number, for each layer that has any."""
    for name, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        if own:
            shapes = " ".join(str(list(p.shape)) for p in own.values())
            yield name, type(module).__name__, shapes, sum(p.numel() for p in own.values())


def _parts(model: nn.Module) -> list[str]:
    return [name for name, part in model.named_children() if parameters(part)]
