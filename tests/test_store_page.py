"""The page and the picture of a store: every trajectory asked for is on it, whatever it senses."""

from __future__ import annotations

import base64
import io
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from deploy import cli
from gsa.errors import UsageError
from gsa.schema import ArraySpec, Controller, Spec, Trajectory
from reports.store_page import FRAMES, choose, write_store_page
from retrieval.store import TrajectoryStore

ARMS = Spec(
    "lab/arms",
    {
        "front": ArraySpec((48, 64, 3), "uint8"), "wrist": ArraySpec((32, 32, 1), "uint8"),
        "joints": ArraySpec((7,), "float32"),
    },
    7, renderer="camera-2",
)  # fmt: skip
BLIND = Spec("lab/blind", {"state": ArraySpec((39,), "float32")}, 3)


def episode(spec: Spec, index: int, steps: int = 40) -> Trajectory:
    """Images are as bright as their step: row t of a picture is t everywhere."""
    rng = np.random.default_rng(index)
    steps_on = np.arange(steps + 1)
    observation = {
        k: np.ones((steps + 1, *v.shape), v.dtype) * steps_on.astype(v.dtype).reshape(-1, *[1] * len(v.shape))
        for k, v in spec.observation.items()
    }
    action = rng.uniform(-1, 1, (steps, spec.action_dim)).astype(np.float32)
    who = np.where(np.arange(steps) < steps // 4, Controller.PRIOR, Controller.POLICY).astype(np.uint8)
    return Trajectory(
        spec.embodiment, observation, action, np.ones(steps, np.float32), np.ones(steps, np.float32), who,
        source=f"<b>{index % 2}</b>", id=f"{spec.embodiment}-{index}",
    )  # fmt: skip


@pytest.fixture
def store(tmp_path: Path) -> TrajectoryStore:
    store = TrajectoryStore.create(tmp_path / "pool", "lz4")
    for spec in (ARMS, BLIND):
        for i in range(5):
            store.append(episode(spec, i), spec)
    return store


def test_a_page_shows_each_trajectory_from_start_to_end(store: TrajectoryStore, tmp_path: Path) -> None:
    page = write_store_page(tmp_path / "page.html", store, [1, 7]).read_text()
    assert "row 1 · &lt;b&gt;1&lt;/b&gt; · 40 steps · return 40.0 · 25% prior · 75% policy" in page
    assert "lab/arms-1</span>" in page
    assert "row 7" in page
    assert "row 2 ·" not in page
    assert "image 48×64×3 uint8" in page
    assert "camera-2" in page
    for word in ("<script", "http:", "https:"):
        assert word not in page
    pictures = [
        Image.open(io.BytesIO(base64.b64decode(m))) for m in re.findall(r'src="data:image/png;base64,(.*?)"', page)
    ]
    assert len(pictures) == 3 + 2  # two cameras and the joints; the state and the actions
    shown = np.asarray(pictures[0])[:, :, 0]
    assert shown[0, 0] == 0
    assert shown[-1, -1] == 40
    assert len({*shown[0].tolist()} - {255}) == FRAMES


def test_a_picture_has_a_row_for_each_camera(store: TrajectoryStore, tmp_path: Path) -> None:
    one = Image.open(write_store_page(tmp_path / "one.png", store, [1]))
    two = Image.open(write_store_page(tmp_path / "two.png", store, [1, 2]))
    assert one.width == two.width
    assert two.height > 1.7 * one.height
    with pytest.raises(UsageError, match="no images"):
        write_store_page(tmp_path / "none.png", store, [7])


def test_some_of_each_embodiment_are_chosen_or_of_what_is_asked_for(store: TrajectoryStore) -> None:
    chosen = choose(store, 2)
    assert [store.spec(row).embodiment for row in chosen] == ["lab/arms"] * 2 + ["lab/blind"] * 2
    assert choose(store, 2) == chosen
    assert choose(store, 9, "lab/blind", "<b>1") == [6, 8]
    with pytest.raises(UsageError, match="'2' in its name"):
        choose(store, 3, source="2")


def test_the_command_says_what_is_wrong_and_shows_what_is_damaged(
    store: TrajectoryStore, tmp_path: Path, capsys
) -> None:
    store.close()
    pool, page = str(store.path), tmp_path / "page.html"
    assert cli.main(["store", "show", pool, "--out", str(page), "--rows", "10"]) == 2
    assert "rows 0 to 9, not 10" in capsys.readouterr().err
    assert cli.main(["store", "show", pool, "--out", str(tmp_path / "page.gif")]) == 2
    assert ".html or .png" in capsys.readouterr().err
    with (store.path / "shards" / "000000.arrow").open("r+b") as file:
        file.seek(int(store.catalog.column("start")[0]))
        file.write(bytes(3000))
    assert cli.main(["store", "show", pool, "--out", str(page), "--rows", "0", "1"]) == 0
    assert "is damaged" in page.read_text()
    assert "row 1 ·" in page.read_text()
    assert cli.main(["store", "verify", pool]) == 1
    assert "trajectory 0" in capsys.readouterr().out
