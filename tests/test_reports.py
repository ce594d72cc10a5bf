"""The report is right about the numbers, safe to pass around, and there for a run of any degree of completeness."""

import functools
import json
import tempfile
from html.parser import HTMLParser
from itertools import combinations

import numpy as np
import pytest

from gsa.errors import UsageError
from gsa.schema import ArraySpec, Spec, Trajectory
from gsa.video import LABEL_HEIGHT, side_by_side, write_mp4
from reports import sheets
from reports.record import read_run
from reports.report import write_report
from reports.sheets import contact_sheet, frame_strip
from retrieval.retriever import Precision, RehearsalSet
from retrieval.store import TrajectoryStore

HOSTILE = '"><script>alert(1)</script><img src=x onerror=alert(2)>'
SCORES = {"random": [2.0, 4.0, 3.0], "prior": [20.0, 24.0, 22.0], "finetuned": [60.0, 70.0, 65.0]}


def evaluation(scores=SCORES, task="dmc/walker-walk"):
    policies = {
        name: {"scores": values, "returns": [10 * v for v in values], "frames": 20000 if name == "finetuned" else 0}
        for name, values in scores.items()
    }
    return json.dumps({"task": task, "policies": policies})


def metrics():
    rows = []
    for i in range(20):
        row = {"frames": 1000 * (i + 1), "time_s": 1e9 + 60.0 * i, "episode/score": 3.0 * i, "learner/nan": None}
        row["episode/guided_share"] = 1.0 if i < 5 else 0.2
        if i % 5 == 4:
            row |= {"eval/score": 3.0 * i, "eval/score_low": 3.0 * i - 2, "eval/score_high": 3.0 * i + 2}
        rows.append(json.dumps(row))
    return "\n".join(rows) + '\n{"frames": 210'  # torn by a crash


def rehearsal(
    path, rows=(0, 1, 2), sources=("dmc/walker/planner-walk", "dmc/walker/noise-1", "dmc/walker/noise-1"), k=5
):
    taken = RehearsalSet(
        rows=tuple(rows), distances=tuple(0.5 * i for i in range(len(rows))), sources=tuple(sources),
        embodiment="dmc/walker", k=k, store_id="s", encoder_hash="e", kind="nearest",
        precision=(Precision(len(rows), 0.5, 1.0),) if rows else (), task_share=0.25,
    )  # fmt: skip
    taken.save(path)
    return taken


def film(n=6, value=200, side=64):
    return np.full((n, side, side, 3), value, np.uint8)


TEXTS = {
    "config.yaml": "task: dmc/walker-walk\nmethod: gsa\nredis_url: redis://u:hunter2@h:1/0\n",
    "metrics.jsonl": metrics(),
    "evaluation.json": evaluation(),
    "stages.json": json.dumps([{"stage": "pre-train", "seconds": 200}]),
}
PARTS = (*TEXTS, "rehearsal.json", "contact_sheet.png", "video.mp4")


@functools.cache
def picture():
    with tempfile.TemporaryDirectory() as folder:
        return frame_strip(f"{folder}/x.png", {"x": film(1)}).read_bytes()


@functools.cache
def movie():
    with tempfile.TemporaryDirectory() as folder:
        return write_mp4(f"{folder}/x.mp4", film(), fps=10).read_bytes()


def make_run(folder, parts=PARTS):
    folder.mkdir(exist_ok=True)
    for name in parts:
        if name in TEXTS:
            (folder / name).write_text(TEXTS[name])
        elif name == "rehearsal.json":
            rehearsal(folder / name)
        else:
            (folder / name).write_bytes(picture() if name.endswith("png") else movie())
    return folder


class Page(HTMLParser):
    """The tags, addresses and text of a page, as a browser would see them."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.addresses, self.texts = [], [], []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.addresses += [v for k, v in attrs if k in ("src", "srcset", "href", "poster", "data", "action")]
        assert not any(k.startswith("on") for k, _ in attrs)

    def handle_data(self, data):
        self.texts.append(data)


def report_text(folder):
    return " ".join(Page((folder / "report.html").read_text()).texts)


def test_a_whole_run_has_every_part_and_the_right_numbers(tmp_path):
    summary = write_report(make_run(tmp_path / "run"))
    page = Page(summary.html.read_text())
    assert not summary.notes
    assert page.tags.count("video") == 1
    assert page.tags.count("picture") == 3  # learning curve, guided share, contact sheet
    text = report_text(tmp_path / "run")
    for expected in (
        "65.0",
        "22.0",
        "20,000",
        "pre-train",
        "3 min 20 s",
        "dmc/walker/noise-1",
        "3 of 5 asked for",
        "50% of the task itself, chance 25%",
    ):
        assert expected in text
    data = json.loads(summary.json.read_text())
    assert data["policies"]["finetuned"]["score"] == pytest.approx(65.0)
    assert data["policies"]["finetuned"]["return"] == pytest.approx(650.0)
    assert 60 <= data["policies"]["finetuned"]["score_low"] < 65 < data["policies"]["finetuned"]["score_high"] <= 70
    assert data["frames"] == 20000
    assert data["seconds"] == pytest.approx(19 * 60)
    assert "After 20,000 frames the fine-tuned policy scores 65.0" in summary.verdict
    assert "22.0" in summary.verdict
    assert "do not tell" not in summary.verdict
    assert (tmp_path / "run" / "learning_curve.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "parts", [*combinations(PARTS, 1), *combinations(TEXTS, 2), *combinations(PARTS, 6)], ids="+".join
)
def test_a_partial_run_has_a_report_that_says_what_is_missing(tmp_path, parts):
    folder = make_run(tmp_path / "run", parts)
    if not {"config.yaml", "metrics.jsonl", "evaluation.json"} & set(parts):
        with pytest.raises(UsageError, match="is not a run"):
            write_report(folder)
        return
    summary = write_report(folder)
    assert ("Not evaluated yet" in report_text(folder)) == ("evaluation.json" not in parts)
    assert any("metrics" in note for note in summary.notes) == ("metrics.jsonl" not in parts)


@pytest.mark.parametrize("name", ["config.yaml", "metrics.jsonl", "evaluation.json", "stages.json", "rehearsal.json"])
@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\xfe\x00", b'{"policies": {"prior": {"scores": ["x"]}}}'])
def test_a_damaged_file_costs_its_own_part_only(tmp_path, name, content):
    folder = make_run(tmp_path / "run", TEXTS.keys() - {"metrics.jsonl"})  # no metrics: figures take their time
    (folder / name).write_bytes(content)
    write_report(folder)
    text = report_text(folder)
    assert ("65.0" in text) == (name != "evaluation.json")
    assert ("pre-train" in text) == (name != "stages.json")


def test_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(UsageError, match="no run folder"):
        write_report(tmp_path / "none")
    with pytest.raises(UsageError, match="is not a run"):
        write_report(tmp_path)


def test_the_page_asks_nothing_from_anywhere_and_runs_no_text_of_the_run(tmp_path):
    folder = make_run(tmp_path / "run")
    scores = {**SCORES, HOSTILE: [1.0, 2.0]}
    (folder / "evaluation.json").write_text(evaluation(scores, task=HOSTILE))
    (folder / "config.yaml").write_text(json.dumps({"method": HOSTILE, "store": HOSTILE, HOSTILE: 1}))
    (folder / "stages.json").write_text(json.dumps([{"stage": HOSTILE, "seconds": 1}]))
    (folder / "metrics.jsonl").write_text(json.dumps({"frames": 1, "time_s": 1.0, HOSTILE: 2.0}) + "\n")
    rehearsal(folder / "rehearsal.json", sources=(HOSTILE,) * 3)
    html = write_report(folder).html.read_text()
    page = Page(html)
    assert "script" not in page.tags
    assert page.addresses
    assert all(address.startswith("data:") for address in page.addresses)
    assert "url(" not in html
    assert "@import" not in html
    assert "alert(1)" in report_text(folder)  # shown as the text that it is


def test_passwords_in_the_settings_are_not_shown(tmp_path):
    folder = make_run(tmp_path / "run")
    html = write_report(folder).html.read_text()
    assert "redis://u:" in html
    assert "hunter2" not in html


def test_the_world_models_predictions_are_shown_while_they_are_there(tmp_path):
    folder = make_run(tmp_path / "run")
    (folder / "config.yaml").write_text(json.dumps({"world_model": str(tmp_path / "model")}))
    assert "foresees" not in write_report(folder).html.read_text()
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "open_loop.png").write_bytes(picture())
    assert "foresees" in write_report(folder).html.read_text()


def test_a_gym_tasks_score_is_its_return_and_has_no_bar_to_100(tmp_path):
    folder = make_run(tmp_path / "run", ("metrics.jsonl",))
    (folder / "evaluation.json").write_text(evaluation({"finetuned": [-2000.0, -1000.0]}, task="gym/Pendulum-v1"))
    page = Page(write_report(folder).html.read_text())
    assert "-1,500.0" in " ".join(page.texts)
    assert "svg" not in page.tags


def test_one_episode_has_no_interval_and_settles_nothing(tmp_path):
    folder = make_run(tmp_path / "run")
    (folder / "evaluation.json").write_text(evaluation({name: values[:1] for name, values in SCORES.items()}))
    summary = write_report(folder)
    assert "needs 2 episodes" in report_text(folder)
    assert "do not tell it from the prior alone and the random policy" in summary.verdict
    assert json.loads(summary.json.read_text())["policies"]["prior"]["score_low"] is None


def test_overlapping_intervals_are_called_unsettled(tmp_path):
    folder = make_run(tmp_path / "run")
    scores = {**SCORES, "prior": [40.0, 90.0, 50.0]}
    (folder / "evaluation.json").write_text(evaluation(scores))
    verdict = write_report(folder).verdict
    assert verdict.endswith("This many episodes do not tell it from the prior alone.")


def test_a_policy_that_was_not_evaluated_is_named(tmp_path):
    folder = make_run(tmp_path / "run")
    (folder / "evaluation.json").write_text(evaluation({"random": [1.0, 2.0], "finetuned": [3.0, 4.0]}))
    summary = write_report(folder)
    assert any("prior alone" in note for note in summary.notes)
    assert "prior" not in summary.verdict


def test_a_series_leaves_out_what_is_null_and_what_was_torn(tmp_path):
    record = read_run(make_run(tmp_path / "run"))
    assert len(record.series("learner/nan")) == 0
    assert list(record.series("eval/score").frames) == [5000, 10000, 15000, 20000]
    assert record.last_values()["episode/score"] == 57.0


# Contact sheets

COLOURS = np.array([(r, g, b) for r in (0, 80, 160, 240) for g in (0, 80, 160, 240) for b in (40, 120)], np.uint8)


@pytest.fixture
def coloured_store(tmp_path):
    """A store whose trajectory i begins with a frame of colour i."""
    spec = Spec("dmc/walker", {"pixels": ArraySpec((64, 64, 3), "uint8")}, action_dim=1)
    with TrajectoryStore.create(tmp_path / "pool") as store:
        store.add_spec(spec)
        for colour in COLOURS:
            pixels = np.zeros((3, 64, 64, 3), np.uint8)
            pixels[0] = colour
            action, discount = np.zeros((2, 1), np.float32), np.ones(2, np.float32)
            store.append(Trajectory("dmc/walker", {"pixels": pixels}, action, discount, source="dmc/walker/noise-1"))
        yield store


def colours_in_reading_order(path):
    """Numbers of the colours in a sheet, each where it is first met, row by row of thumbnails."""
    from PIL import Image

    image = np.asarray(Image.open(path).convert("RGB")).astype(int)
    at = {}
    for i, colour in enumerate(COLOURS):
        ys, xs = np.nonzero((np.abs(image - colour) <= 1).all(-1))
        if len(ys) > 1000:  # a thumbnail, not a blurred letter
            at[i] = (int(ys.min()) // 20, int(xs.min()))
    return sorted(at, key=at.__getitem__)


def test_a_sheet_shows_the_query_the_nearest_and_the_farthest_in_order(tmp_path, coloured_store):
    rows = tuple(int(r) for r in np.random.default_rng(0).permutation(31))
    taken = rehearsal(tmp_path / "r.json", rows, ["dmc/walker/noise-1"] * 31, k=31)
    query = np.broadcast_to(COLOURS[31], (1, 64, 64, 3))
    path = contact_sheet(tmp_path / "sheet.png", {"pixels": query}, coloured_store, taken, columns=4)
    assert colours_in_reading_order(path) == [31, *rows[:4], *rows[-4:]]


def test_a_sheet_of_few_shows_each_once(tmp_path, coloured_store):
    taken = rehearsal(tmp_path / "r.json", (3, 9, 1, 7, 5), ["a"] * 5, k=9)
    query = np.broadcast_to(COLOURS[[31, 30]][:, None, None], (2, 64, 64, 3))
    path = contact_sheet(tmp_path / "sheet.png", {"pixels": query}, coloured_store, taken, columns=4)
    assert colours_in_reading_order(path) == [31, 30, 3, 9, 1, 7, 5]


def test_a_sheet_of_nothing_says_so(tmp_path, coloured_store):
    nothing = rehearsal(tmp_path / "r.json", (), (), k=5)
    assert contact_sheet(tmp_path / "sheet.png", {"pixels": film(1)}, coloured_store, nothing).exists()
    assert "nothing in the pool fits" in sheets._title(nothing)


def test_several_cameras_are_drawn_side_by_side_and_numbers_as_bars():
    two = {"front": film(1, 9)[0], "hand": film(1, 200, 32)[0], "state": np.zeros(3, np.float32)}
    drawn = sheets.picture(two)
    assert drawn.shape == (64, 96, 3)
    assert (drawn[:, :64] == 9).all() and (drawn[:32, 64:] == 200).all() and (drawn[32:, 64:] == 255).all()
    low, high = (sheets.picture({"state": np.float32([0, value])}) for value in (-1e9, 1e9))
    ink = [np.flatnonzero((picture[:, 40] != 255).any(-1)) for picture in (low, high)]
    assert ink[0].min() >= 31 and ink[1].max() <= 32
    assert all(len(rows) > 28 for rows in ink)
    assert sheets.picture({"state": np.zeros(500, np.float32)}).shape[1] <= 64


# Films


def read_mp4(path):
    import imageio_ffmpeg

    reader = imageio_ffmpeg.read_frames(str(path))
    meta = next(reader)
    width, height = meta["size"]
    return meta, [np.frombuffer(frame, np.uint8).reshape(height, width, 3) for frame in reader]


def test_a_film_keeps_its_frames_their_order_and_their_rate(tmp_path):
    frames = np.concatenate([film(1, value) for value in (0, 60, 120, 180, 240)])
    meta, read = read_mp4(write_mp4(tmp_path / "film.mp4", frames, fps=5))
    assert meta["fps"] == 5
    assert meta["codec"] == "h264"
    assert [round(float(frame.mean()) / 60) for frame in read] == [0, 1, 2, 3, 4]
    assert read[0].shape == (256, 256, 3)


def test_a_film_of_odd_size_is_written(tmp_path):
    meta, read = read_mp4(write_mp4(tmp_path / "film.mp4", film(2, side=301), fps=5))
    assert len(read) == 2
    assert meta["size"] == (302, 302)


@pytest.mark.parametrize("frames", [np.zeros((0, 64, 64, 3), np.uint8), np.zeros((2, 64, 64)), np.zeros((2, 4, 4, 3))])
def test_what_is_no_film_is_refused(tmp_path, frames):
    with pytest.raises(UsageError, match="film needs frames"):
        write_mp4(tmp_path / "film.mp4", frames, fps=5)
    assert not list(tmp_path.iterdir())


def test_a_film_that_breaks_off_leaves_the_former_one(tmp_path, monkeypatch):
    path = write_mp4(tmp_path / "film.mp4", film(), fps=5)
    before = path.read_bytes()
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        write_mp4(path, film(3, 10), fps=5)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["film.mp4"]


def test_side_by_side_holds_the_last_frame_of_the_short_one():
    both = side_by_side({"short": film(2, 50), "long": film(5, 100)})
    assert both.shape == (5, 256 + LABEL_HEIGHT, 512, 3)
    assert (both[4, LABEL_HEIGHT:, :256] == 50).all()
    assert (both[4, LABEL_HEIGHT:, 256:] == 100).all()
    assert both[0, :LABEL_HEIGHT].max() > 200  # the labels


def test_side_by_side_needs_one_size():
    with pytest.raises(UsageError, match="one size"):
        side_by_side({"a": film(2), "b": film(2, side=32)})


def test_faults_are_counted_by_cause_and_shown(tmp_path):
    folder = make_run(tmp_path / "run")
    said = ["gym/X failed in step: no answer within 60 s.", "gym/X failed in step: QACC at 0.12."]
    rows = [said[0], said[1], said[1].replace("0.12", "4.5"), said[0], said[1]]
    (folder / "faults.jsonl").write_text("".join(json.dumps({"frames": 1, "fault": row}) + "\n" for row in rows))
    assert read_run(folder).faults == {said[1]: 3, said[0]: 2}
    assert "no answer within 60 s" in write_report(folder).html.read_text()
