"""The paper's released weights: the same numbers as the reference's own modules give, and nothing run from a file."""

import contextlib
import io
import os
import pickle
import zipfile

import numpy as np
import pytest
import torch

from gsa.agent import released, storage
from gsa.agent.sizes import PIXELS, WorldModelConfig
from gsa.agent.world_model import WorldModel
from gsa.errors import FormatError, SpecMismatch, UsageError
from tests import reference

SIZES = WorldModelConfig(**reference.SMALL, blocks=8, max_action_dim=21, gates="flat")


@pytest.fixture(scope="module")
def golden():
    with np.load(reference.GOLDEN) as file:
        return dict(file)


@pytest.fixture(scope="module")
def weights():
    return reference.checkpoint(reference.golden_shapes())


@pytest.fixture
def path(weights, tmp_path):
    torch.save(weights, tmp_path / "dmcontrol.pt")
    return tmp_path / "dmcontrol.pt"


def assert_same(found, expected):
    np.testing.assert_array_equal(found["index"], expected["index"])
    for name in reference.COMPARED:
        assert np.abs(expected[name]).max() > 0.1, f"{name} says nothing"
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-5, atol=1e-5, err_msg=name)


def test_every_output_is_the_references(path, golden):
    model = released.read(path)
    assert model.config == SIZES
    assert model.config.observation == PIXELS
    found = reference.ours(model)
    found["image"] = found["image"][:, ::3, :, ::4, ::4]
    assert_same(found, golden)


def test_gates_split_by_block_would_not_be_the_references(path, golden):
    """The two layouts have the same shapes: only the numbers tell them apart."""
    model = released.read(path)
    model.cell.gates = "per-block"
    assert np.abs(reference.ours(model)["deter"] - golden["deter"]).max() > 0.01


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [reference.SMALL, {**reference.SMALL, "deter": 1024, "hidden": 512, "depth": 32}])
def test_the_golden_numbers_are_what_the_reference_gives_now(sizes, golden, tmp_path):
    if reference.VARIABLE not in os.environ:
        pytest.skip(f"{reference.VARIABLE} names no checkout of the reference")
    parts = reference.modules(**sizes)
    torch.save({"wm": {name: part.state_dict() for name, part in parts.items()}}, tmp_path / "live.pt")
    expected = reference.outputs(parts)
    assert_same(reference.ours(released.read(tmp_path / "live.pt")), expected)
    if sizes == reference.SMALL:
        expected["image"] = expected["image"][:, ::3, :, ::4, ::4]
        for name, value in expected.items():
            np.testing.assert_allclose(value, golden[name], rtol=1e-5, atol=1e-5)


def test_a_converted_copy_is_an_ordinary_world_model_and_made_once(path):
    folder = released.convert(path)
    assert folder == path.with_suffix("")
    model = WorldModel.load(folder)
    plain = released.read(path)
    assert model.config == plain.config
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))
    source = storage.describe(folder, "world_model")["meta"]["source"]
    assert source["file"] == "dmcontrol.pt"
    written = (folder / "world_model.safetensors").stat().st_mtime_ns
    assert released.convert(path) == folder
    assert (folder / "world_model.safetensors").stat().st_mtime_ns == written


def test_a_copy_of_another_file_is_not_taken_for_this_ones(path, weights):
    folder = released.convert(path)
    weights = {"wm": {**weights["wm"], "encoder": {k: v + 1 for k, v in weights["wm"]["encoder"].items()}}}
    torch.save(weights, path)
    with pytest.raises(UsageError, match=r"another world model than .*dmcontrol\.pt; give another --out"):
        released.convert(path)
    assert released.convert(path, folder.parent / "other") == folder.parent / "other"


def test_a_fine_tuned_files_other_heads_are_left_alone_and_half_precision_is_widened(weights, tmp_path):
    half = {part: {k: v.half() for k, v in tensors.items()} for part, tensors in weights["wm"].items()}
    torch.save({"wm": half, "actor": {"mlp.weight": torch.ones(3)}}, tmp_path / "snapshot.pt")
    model = released.read(tmp_path / "snapshot.pt")
    assert all(p.dtype == torch.float32 and p.requires_grad for p in model.parameters())
    expected = weights["wm"]["encoder"]["_conv_model.0.weight"].half().float()
    assert torch.equal(model.encoder.first.weight, expected)


def test_other_variables_can_be_told(path):
    assert released.read(path, stoch=16).config.classes == 8
    with pytest.raises(SpecMismatch, match="latent of 128 numbers, which are not 7 variables: give --stoch"):
        released.read(path, stoch=7)


def changed(weights, part, **changes):
    tensors = {**weights["wm"][part], **changes}
    return {"wm": {**weights["wm"], part: {k: v for k, v in tensors.items() if v is not None}}}


def test_every_name_and_shape_that_differs_is_listed(weights, tmp_path):
    wrong = changed(weights, "rssm", **{
        "_prior.0.bias": None, "_prior.3.weight": torch.zeros(3, 5), "_ensemble.weight": torch.zeros(2),
    })  # fmt: skip
    torch.save(wrong, tmp_path / "wrong.pt")
    with pytest.raises(SpecMismatch) as error:
        released.read(tmp_path / "wrong.pt")
    for difference in ("rssm._prior.0.bias is missing", "rssm._prior.3.weight is [3, 5] and not [24, 24]",
                       "rssm._ensemble.weight is unknown"):  # fmt: skip
        assert difference in str(error.value)
    for name in ("_gru._dyngru.weight", "_gru._in_stoch.0.weight"):
        for value in (None, torch.zeros(())):
            torch.save(changed(weights, "rssm", **{name: value}), tmp_path / "wrong.pt")
            with pytest.raises(SpecMismatch, match="is not there or no weight"):
                released.read(tmp_path / "wrong.pt")


@pytest.mark.parametrize(
    "content", [[], {"wm": []}, {"wm": {"encoder": {}, "rssm": {}}}, {"model": {}},
                {"wm": {"encoder": {"a": 1}, "rssm": {}, "decoder": {}}},
                {"wm": {"encoder": {"a": torch.zeros(2, dtype=torch.int64)}, "rssm": {}, "decoder": {}}}],
)  # fmt: skip
def test_another_layout_is_one_sentence(content, tmp_path):
    torch.save(content, tmp_path / "other.pt")
    with pytest.raises(FormatError, match=r"not a file of released weights|call 'torch LongStorage'"):
        released.read(tmp_path / "other.pt")


class Hostile:
    def __init__(self, target, *arguments):
        self.call = (target, arguments)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_no_code_in_a_file_is_run(weights, tmp_path, protocol):
    witness = tmp_path / "witness"
    for attack in (Hostile(os.mkdir, str(witness)), Hostile(bytearray, 10**12), Hostile(eval, "1")):
        torch.save({**weights, "extra": attack}, tmp_path / "hostile.pt", pickle_protocol=protocol)
        with pytest.raises(FormatError, match=r"wants to call .* it was not opened"):
            released.read(tmp_path / "hostile.pt")
        assert not witness.exists()
    (tmp_path / "bare.pt").write_bytes(pickle.dumps(Hostile(os.mkdir, str(witness))))
    with pytest.raises(FormatError, match=r"not a file of torch\.save"):
        released.read(tmp_path / "bare.pt")
    assert not witness.exists()


def test_a_file_that_claims_more_than_it_has_is_refused_before_memory_is_taken(weights, tmp_path):
    wide = torch.zeros(1).expand(10**9)  # a billion weights in four bytes
    torch.save(changed(weights, "rssm", **{"_gru._dynlayers.1.weight": wide}), tmp_path / "wide.pt")
    with pytest.raises(FormatError, match=r"claim 40.* bytes, more than it has"):
        released.read(tmp_path / "wide.pt")
    torch.save(changed(weights, "rssm", **{"_prior.0.bias": torch.full((24,), float("nan"))}), tmp_path / "nan.pt")
    with pytest.raises(FormatError, match=r"not finite in prior\.first\.bias"):
        released.read(tmp_path / "nan.pt")


def test_a_compressed_bomb_is_refused_unread(tmp_path):
    with zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb/data.pkl", b"\0" * 10**7)
    with pytest.raises(FormatError, match="compressed"):
        released.read(tmp_path / "bomb.pt")
    with zipfile.ZipFile(tmp_path / "huge.pt", "w") as archive:
        archive.writestr("huge/data.pkl", b"N" * (released.MAX_PICKLE_BYTES + 1))
    with pytest.raises(FormatError, match="a huge one"):
        released.read(tmp_path / "huge.pt")


def test_a_file_torn_or_flipped_anywhere_is_an_error_or_the_same_shapes(path):
    """Cut at a hundred places: never anything but one sentence. Bits flipped in the list of tensors: the same, or it
    opens with the shapes it should have."""
    data, rng = path.read_bytes(), np.random.default_rng(0)
    for end in [0, 1, *rng.integers(0, len(data), 60).tolist()]:
        path.write_bytes(data[:end])
        with pytest.raises((FormatError, SpecMismatch)):
            released.read(path)
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        start = next(e.header_offset for e in archive.infolist() if e.filename.endswith("data.pkl"))
    for _ in range(60):
        torn = bytearray(data)
        torn[start + int(rng.integers(0, 12_000))] ^= 1 << int(rng.integers(8))
        path.write_bytes(torn)
        with contextlib.suppress(FormatError, SpecMismatch):
            assert released.read(path).config.deter == SIZES.deter


def test_a_missing_file_is_said(tmp_path):
    for call in (released.read, released.convert):
        with pytest.raises(UsageError, match=r"Cannot read .*No such file"):
            call(tmp_path / "nowhere.pt")
