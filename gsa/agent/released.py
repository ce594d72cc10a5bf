"""The paper's released weights, dmcontrol.pt and metaworld.pt: checked, read without running anything in them, and
converted to a world model of ours.

A released file is what torch.save makes of {"wm": {"encoder": …, "rssm": …, "decoder": …}}, three dicts of tensors;
what else it may hold is left alone. A pickle is a program, so it is read only after every name that it calls was
found among the few that plain tensors need, and by torch's own reader of weights.
"""

from __future__ import annotations

import hashlib
import pickletools
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gsa.agent import storage
from gsa.agent.sizes import WorldModelConfig
from gsa.agent.world_model import KIND, WorldModel
from gsa.errors import FormatError, SpecMismatch, Unavailable, UsageError

STOCH = 32  # latent variables of the released models; a file tells only their product with the classes
PARTS = ("encoder", "rssm", "decoder")
MAX_PICKLE_BYTES = 1 << 22  # names, shapes and nothing else: a released file has 30 kB
CALLED = {
    "collections OrderedDict", "torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_parameter",
    "torch FloatStorage", "torch DoubleStorage", "torch HalfStorage", "torch BFloat16Storage",
}  # fmt: skip
CALLING = {"STACK_GLOBAL", "INST", "OBJ", "EXT1", "EXT2", "EXT4", "NEWOBJ", "NEWOBJ_EX"}  # opcodes never needed
MODULES = {  # the reference's name of each module to ours
    "encoder._conv_model.0": "encoder.first", "encoder._conv_model.1._norm": "encoder.net.0",
    "encoder._conv_model.3": "encoder.net.2", "encoder._conv_model.4._norm": "encoder.net.3",
    "encoder._conv_model.6": "encoder.net.5", "encoder._conv_model.7._norm": "encoder.net.6",
    "encoder._conv_model.9": "encoder.net.8", "encoder._conv_model.10._norm": "encoder.net.9",
    "rssm._gru._in_deter": "cell.deter", "rssm._gru._in_stoch": "cell.stoch", "rssm._gru._in_action": "cell.action",
    "rssm._gru._dynlayers.0": "cell.mix", "rssm._gru._dynlayers.1": "cell.norm", "rssm._gru._dyngru": "cell.gate",
    "rssm._prior.0": "prior.first", "rssm._prior.1": "prior.net.0", "rssm._prior.3": "prior.net.2",
    "rssm._prior.4": "prior.net.3", "rssm._prior.6": "prior.net.5",
    "rssm._posterior.0": "posterior.first", "rssm._posterior.1": "posterior.net.0",
    "rssm._posterior.3": "posterior.net.2",
    "decoder._fc_deter": "decoder.deter", "decoder._fc_stoch": "decoder.stoch",
    "decoder._conv_model.0": "decoder.first", "decoder._conv_model.1._norm": "decoder.net.0",
    "decoder._conv_model.3": "decoder.net.2", "decoder._conv_model.4._norm": "decoder.net.3",
    "decoder._conv_model.6": "decoder.net.5", "decoder._conv_model.7._norm": "decoder.net.6",
    "decoder._conv_model.9": "decoder.last",
}  # fmt: skip


def convert(path: str | Path, folder: str | Path | None = None, stoch: int = STOCH) -> Path:
    """The folder of the world model that a released file becomes: `folder`, or the file's name without its suffix.

    A folder that was made from this very file before is taken as it is. Raises what `read` raises, UsageError where the
    folder holds another world model, Unavailable where it cannot be written.
    """
    path = Path(path)
    folder = path.with_suffix("") if folder is None else Path(folder)
    source = {"file": path.name, "sha256": _sha256(path), "stoch": stoch}
    if (folder / f"{KIND}.json").exists():
        if storage.describe(folder, KIND)["meta"].get("source") == source:
            return folder
        raise UsageError(f"{folder} holds another world model than {path}; give another --out, or delete it.")
    model = read(path, stoch)
    try:
        model.save(folder, {"source": source})
    except OSError as error:
        raise Unavailable(f"Cannot write {path}, converted, to {folder}: {error.strerror}; give an --out.") from None
    return folder


def read(path: str | Path, stoch: int = STOCH) -> WorldModel:
    """The world model in a released file, on the CPU in float32.

    Raises UsageError where there is no file, FormatError where it is damaged or more than plain weights, SpecMismatch,
    with every name and shape that differs, where it is of another architecture.
    """
    path = Path(path)
    _require_plain(path)
    found = dict(_named(path, _load(path)))
    if (size := sum(t.numel() * t.element_size() for t in found.values())) > path.stat().st_size:
        raise FormatError(f"{path} is damaged: its tensors claim {size} bytes, more than it has.")
    ours = {_our_name(name): tensor for name, tensor in found.items()}
    with torch.device("meta"):
        model = WorldModel(_config(path, ours, stoch))
    _require_same(path, model, ours)
    model.load_state_dict({k: v.to(torch.float32, copy=True) for k, v in ours.items()}, assign=True)
    if broken := [name for name, value in model.named_parameters() if not torch.isfinite(value).all()]:
        raise FormatError(f"{path} has values that are not finite in {', '.join(broken)}.")
    return model


def _require_plain(path: Path) -> None:
    """Looks through the file without unpickling: nothing compressed, nothing larger than the file, no foreign call."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            if any(e.compress_type != zipfile.ZIP_STORED for e in entries):
                raise FormatError(f"{path} is compressed, as torch.save never does: not a file of released weights.")
            pickles = [e for e in entries if e.filename.endswith("/data.pkl")]
            if len(pickles) != 1 or pickles[0].file_size > MAX_PICKLE_BYTES:
                raise FormatError(
                    f"{path} is not a file of released weights: it has no list of tensors, or a huge one."
                )
            program = archive.read(pickles[0])
        for opcode, argument, _ in pickletools.genops(program):
            if opcode.name in CALLING or (opcode.name == "GLOBAL" and argument not in CALLED):
                what = f"'{argument}'" if argument else f"what it does not name ({opcode.name})"
                raise FormatError(f"{path} wants to call {what:.80}, which weights never need: it was not opened.")
    except OSError as error:
        raise UsageError(f"Cannot read {path}: {error.strerror}.") from None
    except (zipfile.BadZipFile, ValueError, EOFError, NotImplementedError, RuntimeError) as error:
        raise FormatError(f"{path} is damaged or not a file of torch.save: {error}.") from None


def _load(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # a damaged pickle may raise anything
        reason = str(error).strip().partition("\n")[0]
        raise FormatError(f"{path} is damaged: {type(error).__name__}: {reason:.200}") from None


def _named(path: Path, content: Any) -> Iterator[tuple[str, Tensor]]:
    """The tensors of the three parts, by "part.name". FormatError where the layout is another."""
    parts = content.get("wm") if isinstance(content, dict) else None
    if not isinstance(parts, dict) or not all(isinstance(parts.get(part), dict) for part in PARTS):
        raise FormatError(f"{path} is not a file of released weights: it lacks wm/{', wm/'.join(PARTS)}.")
    for part in PARTS:
        for name, tensor in parts[part].items():
            if not isinstance(tensor, Tensor) or not tensor.is_floating_point() or tensor.layout != torch.strided:
                raise FormatError(f"{path} is not a file of released weights: wm/{part}/{name} is no array of floats.")
            yield f"{part}.{name}", tensor


def _our_name(name: str) -> str:
    """Ours for a name of the reference; the same where it has none."""
    module, _, leaf = name.rpartition(".")
    if module in MODULES:
        return f"{MODULES[module]}.{leaf}"
    outer, _, number = module.rpartition(".")
    return f"{MODULES[outer]}.{number}.{leaf}" if outer in MODULES else name


def _config(path: Path, tensors: Mapping[str, Tensor], stoch: int) -> WorldModelConfig:
    """The sizes, from the shapes. The reference splits its gates flat."""
    shapes = {}
    for name, rank in (("cell.norm.weight", 1), ("cell.stoch.0.weight", 2), ("cell.action.0.weight", 2),
                       ("cell.gate.weight", 3), ("encoder.first.weight", 4)):  # fmt: skip
        if name not in tensors or tensors[name].ndim != rank:
            raise SpecMismatch(f"{path} is of another architecture: {_their_name(name)} is not there or no weight.")
        shapes[name] = tensors[name].shape
    (deter,), (hidden, latent) = shapes["cell.norm.weight"], shapes["cell.stoch.0.weight"]
    if stoch < 1 or latent % stoch:
        raise SpecMismatch(f"{path} has a latent of {latent} numbers, which are not {stoch} variables: give --stoch.")
    return WorldModelConfig(
        deter=deter, hidden=hidden, stoch=stoch, classes=latent // stoch, depth=shapes["encoder.first.weight"][0],
        blocks=shapes["cell.gate.weight"][0], max_action_dim=shapes["cell.action.0.weight"][1], gates="flat",
    )  # fmt: skip


def _require_same(path: Path, model: WorldModel, tensors: Mapping[str, Tensor]) -> None:
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    wrong = [f"{_their_name(name)} is missing" for name in expected if name not in tensors]
    for name, value in tensors.items():
        if name not in expected:
            wrong.append(f"{_their_name(name)} is unknown")
        elif tuple(value.shape) != expected[name]:
            wrong.append(f"{_their_name(name)} is {list(value.shape)} and not {list(expected[name])}")
    if wrong:
        raise SpecMismatch(f"{path} is of another architecture: {'; '.join(sorted(wrong))}.")


def _their_name(name: str) -> str:
    theirs = {ours: module for module, ours in MODULES.items()}
    module, _, leaf = name.rpartition(".")
    if module in theirs:
        return f"{theirs[module]}.{leaf}"
    outer, _, number = module.rpartition(".")
    return f"{theirs[outer]}.{number}.{leaf}" if outer in theirs else name


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UsageError(f"Cannot read {path}: {error.strerror}.") from None
