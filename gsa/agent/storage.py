"""Networks in a folder: <kind>.safetensors for the weights, <kind>.json for what they are. No pickle."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from gsa.errors import FormatError, SpecMismatch, UsageError
from gsa.schema import BFLOAT16

FORMAT = 1
MAX_ABOUT_BYTES = 1 << 24
M = TypeVar("M", bound=nn.Module)


def save(folder: str | Path, kind: str, tensors: Mapping[str, Tensor], config: Mapping[str, Any], meta: Any) -> None:
    """Writes both files, each whole or not at all. The JSON comes last and names the weights by their checksum."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights = folder / f"{kind}.safetensors"
    temporary = weights.with_suffix(".tmp")
    save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, temporary)
    checksum = _sha256(temporary)
    _publish(temporary, weights)
    temporary = folder / f"{kind}.json.tmp"
    about = {"kind": kind, "format": FORMAT, "config": config, "sha256": checksum, "meta": meta}
    temporary.write_text(json.dumps(about, indent=1))
    _publish(temporary, folder / f"{kind}.json")


def describe(folder: str | Path, kind: str) -> dict[str, Any]:
    """The JSON half: kind, format, config, sha256, meta. Reads no weights."""
    path = Path(folder) / f"{kind}.json"
    try:
        if path.stat().st_size > MAX_ABOUT_BYTES:
            raise FormatError(f"{path} is damaged: no description is so long.")
        about = json.loads(path.read_bytes())
    except OSError as error:
        raise UsageError(f"There is no {kind.replace('_', ' ')} in {folder}: {error.strerror}: {path.name}.") from None
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path} is damaged: {error}.") from None
    if not isinstance(about, dict) or about.get("kind") != kind:
        raise FormatError(f"{path} does not describe a {kind.replace('_', ' ')}.")
    if about.get("format") != FORMAT:
        raise FormatError(f"{path} has format {about.get('format')!r:.40}; this version of GSA reads format {FORMAT}.")
    if not isinstance(about.get("config"), dict) or not isinstance(about.get("meta"), dict):
        raise FormatError(f"{path} is damaged: it lacks the config or the meta data.")
    return about


def load(folder: str | Path, kind: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What `describe` gives, and the weights on the CPU. Raises FormatError when they are not the ones described."""
    about = describe(folder, kind)
    path = Path(folder) / f"{kind}.safetensors"
    try:
        if _sha256(path) != about.get("sha256"):
            raise FormatError(f"{path} is not the file that {kind}.json describes: damaged or half replaced.")
        return about, load_file(path)
    except OSError as error:
        raise FormatError(f"Cannot read {path}: {error.strerror}.") from None
    except SafetensorError as error:
        raise FormatError(f"{path} is damaged: {error}.") from None


def build(make: Callable[[], M], tensors: Mapping[str, Tensor], what: str) -> M:
    """The module that `make` makes, of `tensors` instead of random numbers: however large a config says it is, no more
    memory is taken than they have. Raises SpecMismatch as `fill` does."""
    try:
        with torch.device("meta"):
            module = make()
    except (RuntimeError, TypeError) as error:  # sizes that overflow
        raise SpecMismatch(f"{what} cannot be made as it is described: {error!s:.200}.") from None
    own = module.state_dict()
    _require_same(own, tensors, what)
    module.load_state_dict({k: tensors[k].to(v.dtype, copy=True) for k, v in own.items()}, assign=True)
    return module


def fill(module: nn.Module, tensors: Mapping[str, Tensor], what: str) -> None:
    """Copies `tensors` into the module's own. Raises SpecMismatch, naming the first, unless names and shapes agree."""
    own = module.state_dict()
    _require_same(own, tensors, what)
    with torch.no_grad():
        for name, value in own.items():
            value.copy_(tensors[name])


def to_array(tensor: Tensor, bf16: bool, out: np.ndarray | None = None) -> np.ndarray:
    """A copy on the CPU as float32; with `bf16`, where the tensor has two or more axes, as BFLOAT16: biases and norms
    are never rounded. Into `out`, if that is given, which an earlier call returned for the tensor."""
    if out is not None:
        _shared(out).copy_(tensor)
        return out
    dtype = torch.bfloat16 if bf16 and tensor.ndim >= 2 else torch.float32
    copy = torch.empty(tensor.shape, dtype=dtype).copy_(tensor)
    return copy.numpy() if dtype == torch.float32 else copy.view(torch.int16).numpy().view(BFLOAT16)


def from_arrays(module: nn.Module, arrays: Mapping[str, np.ndarray], what: str) -> dict[str, Tensor]:
    """float32 tensors for `use`. Read-only arrays, which nobody will change, are shared; others are copied. Raises
    SpecMismatch as `views` does."""
    seen = views(module, arrays, what)
    return {name: tensor.to(torch.float32, copy=arrays[name].flags.writeable) for name, tensor in seen.items()}


def views(module: nn.Module, arrays: Mapping[str, np.ndarray], what: str) -> dict[str, Tensor]:
    """The arrays' memory as tensors of float32 or bfloat16, which are not to be written to. Raises SpecMismatch, naming
    the first, unless names, shapes and dtypes are those of the module."""
    _require_same(module.state_dict(), arrays, what)
    for name, array in arrays.items():
        if array.dtype not in (np.float32, BFLOAT16):
            raise SpecMismatch(f"{what}: '{name}' is {array.dtype}, float32 or bfloat16 expected.")
    return {name: _shared(array) for name, array in arrays.items()}


def use(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Puts the tensors in place of the module's own: a switch of references. They are what `from_arrays` gave."""
    for name, own in itertools.chain(module.named_parameters(), module.named_buffers()):
        own.data = tensors[name]


class _Writable:
    """The memory of an array, said to be writable: torch warns of others, and we write to none."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array
        self.__array_interface__ = {**array.__array_interface__, "data": (array.__array_interface__["data"][0], False)}


def _shared(array: np.ndarray) -> Tensor:
    """The array's memory as a tensor."""
    bits = array.view(np.int16) if array.dtype == BFLOAT16 else array
    tensor = torch.from_numpy(bits if bits.flags.writeable else np.asarray(_Writable(bits)))
    return tensor.view(torch.bfloat16) if array.dtype == BFLOAT16 else tensor


def _require_same(
    own: Mapping[str, Tensor], tensors: Mapping[str, Tensor] | Mapping[str, np.ndarray], what: str
) -> None:
    if different := sorted(own.keys() ^ tensors.keys()):
        side = "lacks" if different[0] in own else "has a foreign"
        raise SpecMismatch(f"{what} {side} '{different[0]}' ({len(different)} names differ): another architecture.")
    for name, value in own.items():
        if value.shape != tensors[name].shape:
            raise SpecMismatch(
                f"{what}: '{name}' is {list(tensors[name].shape)}, {list(value.shape)} expected: another size."
            )


def _publish(temporary: Path, path: Path) -> None:
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
