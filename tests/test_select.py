"""Selection of descriptors: the paper's algorithms on scripted errors, the record, resume, the plot."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from training_tools import SMALL, SMOOTH, toy_snapshot

from gpurho.cli import main
from gpurho.datasets import Dataset, write_dataset
from gpurho.errors import SettingsError, StoreError
from gpurho.pipelines import select as module
from gpurho.pipelines.select import select
from gpurho.selection import SearchSettings, Sizes, converge_series, select_scalar_product, select_smooth

SHARED = {k: v for k, v in SMALL.items() if not k.startswith("n_") and k != "family"}
SHARED |= {"points_per_snapshot": 200, "epochs": 2, "width": 8, "checkpoint_steps": 4}
SEARCH = SearchSettings(
    tolerance=0.01, distance_step=3, max_distances=6, angle_step=2, max_angle_atoms=4, neighbors=(1, 2), stop="both"
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    snapshots = [toy_snapshot(i, points=8) for i in range(4)]
    return write_dataset(tmp_path_factory.mktemp("data") / "toy.h5", snapshots)


def run(data: Dataset, out: Path, **changes):
    options = {"search": SEARCH, "test": [0], "validation": [1], "progress": False, "threads": 1, **SHARED}
    return select(data, out, **options | changes)


# -- the algorithms -----------------------------------------------------------------------------------------------


def algorithm(errors: list[float], eta: float) -> int | None:
    """The loop of Algorithms 2 and 3 as it is printed, in units of m; None where it does not end within `errors`."""
    large = math.inf
    found = {0: large, -1: large}
    d1 = d2 = large
    m = 0
    while d1 >= eta and d2 >= eta:
        m += 1
        if m > len(errors):
            return None
        found[m] = errors[m - 1]
        d1, d2 = abs(found[m] - found[m - 1]), abs(found[m] - found[m - 2])
    return m - 2


@pytest.mark.parametrize("seed", range(60))
def test_series_is_the_printed_loop(seed: int) -> None:
    rng = np.random.default_rng(seed)
    errors = (1 + 3 * np.exp(-np.arange(12) / rng.uniform(0.5, 4)) + rng.normal(0, 0.03, 12)).tolist()
    tolerance = float(rng.uniform(0.002, 0.05))
    asked: list[int] = []

    def error(size: int) -> float:
        asked.append(size)
        return errors[size // 10 - 1]

    size, value = converge_series(error, 10, 120, tolerance, "either")
    assert asked == list(range(10, 10 * len(asked) + 1, 10))
    assert value == errors[size // 10 - 1]
    # The tolerance is a share of the last error: as a number it is the paper's eta there.
    m = algorithm(errors[: len(asked)], tolerance * errors[len(asked) - 1])
    if m is None:
        assert len(asked) == 12
        assert value == min(errors)
    else:
        assert size == 10 * max(m, 1)
        assert algorithm(errors[: len(asked) - 1], tolerance * errors[len(asked) - 2]) is None


@pytest.mark.parametrize(
    ("errors", "stop", "size", "asked"),
    [
        ([4, 2, 1.5, 1.49, 1.2, 1.2], "either", 20, 4),  # one small step ends it
        ([4, 2, 1.5, 1.49, 1.2, 1.195, 1.19], "both", 50, 7),  # two in a row do
        ([4, 2, 3, 1, 0.5, 0.4], "either", 60, 6),  # nothing near: the smallest
        ([4, 2, 1.5, 2.0, 0.1, 0.2], "either", 20, 4),  # like the last but one
        ([1.0, 1.001, 1, 1, 1, 1], "either", 10, 2),  # nothing to step back to
        ([1.0, 1.001, 1, 1, 1, 1], "both", 10, 3),
        ([6, 5, 4, 3, 2, 3], "both", 50, 6),
    ],
)
def test_where_a_series_ends(errors: list[float], stop: str, size: int, asked: int) -> None:
    seen = []
    most = 70 if len(errors) == 7 else 60
    found = converge_series(lambda s: (seen.append(s), errors[s // 10 - 1])[1], 10, most, 0.02, stop)
    assert found == (size, errors[size // 10 - 1])
    assert len(seen) == asked


def curve(limits: dict[int, float], asked: list) -> object:
    """Errors that fall with M to 2 at M = 60, and with M_a, to `limits` for each k, at M_a = 15."""

    def measure(series: str, sizes: Sizes) -> float:
        m, atoms, k = sizes["n_distances"], sizes["n_angle_atoms"], sizes["n_angle_neighbors"]
        asked.append((series, m, atoms, k))
        if not atoms:
            return 2 + 0.3 * max(0, 60 - m) / 10
        assert m == 60
        return limits[k] + 0.2 * max(0, 15 - atoms) / 5

    return measure


def test_the_papers_choice_for_aluminium() -> None:
    # M = 60, then k = 3 as the smallest of k = 2, 3, 4, converged at M_a = 15: 105 descriptors.
    asked: list = []
    settings = SearchSettings(tolerance=0.01, stop="both")
    sizes = select_scalar_product(curve({2: 1.5, 3: 1.2, 4: 1.4}, asked), settings)
    assert sizes == {"n_distances": 60, "n_angle_atoms": 15, "n_angle_neighbors": 3}
    assert [a[1] for a in asked if a[0] == "distances"] == [10, 20, 30, 40, 50, 60, 70, 80]
    for k in (2, 3, 4):
        assert [a[2:] for a in asked if a[0] == f"k = {k}"] == [(5 * n, k) for n in range(1, 6)]


def test_k_stops_where_the_next_adds_nothing() -> None:
    asked: list = []
    settings = SearchSettings(tolerance=0.01, stop="both")
    sizes = select_scalar_product(curve({2: 1.5, 3: 1.495, 4: 1.0}, asked), settings)
    assert sizes == {"n_distances": 60, "n_angle_atoms": 15, "n_angle_neighbors": 2}  # k - 1, as printed
    assert not any(a[3] == 4 for a in asked)


def test_angles_that_do_not_help_are_left_out() -> None:
    settings = SearchSettings(tolerance=0.01, stop="both", neighbors=(1,))
    sizes = select_scalar_product(curve({1: 2.5}, []), settings)
    assert sizes == {"n_distances": 60, "n_angle_atoms": 0, "n_angle_neighbors": 0}


def test_angles_need_no_more_atoms_than_there_are_distances() -> None:
    seen = []

    def measure(series: str, sizes: Sizes) -> float:
        seen.append(sizes["n_angle_atoms"])
        return 1.0 / (1 + sum(sizes.values()))

    select_scalar_product(measure, SearchSettings(distance_step=3, max_distances=3, tolerance=0.01))
    assert max(seen) == 3


def test_smooth_sizes_grow_while_it_pays_and_again_when_others_have_grown() -> None:
    best = {"cutoff": 5.0, "n_basis": 5, "l_max": 3, "n_radial": 16}
    asked = []

    def measure(series: str, sizes: Sizes) -> float:
        asked.append((series, dict(sizes)))
        gain = sum(min(sizes[n], best[n]) / best[n] for n in ("n_basis", "l_max", "n_radial"))
        # A wider cutoff pays with five channels only.
        return 10.0 - gain - (min(sizes["cutoff"], 5.0) if sizes["n_basis"] == 5 else 0.0)

    assert select_smooth(measure, SearchSettings(tolerance=0.005)) == best
    assert asked[0] == ("start", {"cutoff": 4.0, "n_basis": 3, "l_max": 2, "n_radial": 12})
    first = [series for series, _ in asked]
    assert first.index("n_basis") < len(first) - 1 - first[::-1].index("cutoff")


def test_smooth_sizes_end_at_their_limits() -> None:
    def measure(series: str, sizes: Sizes) -> float:
        assert sizes["n_basis"] <= sizes["n_radial"]
        assert all(sizes[name] <= most[name] for name in most)
        return 1.0 / sum(sizes.values())

    most = {"cutoff": 4.5, "n_basis": 6, "l_max": 3, "n_radial": 5}
    start = {"n_radial": 4}
    found = select_smooth(measure, SearchSettings(tolerance=0.001, start=start, steps={"n_radial": 1}, most=most))
    assert found == {"cutoff": 4.5, "n_basis": 5, "l_max": 3, "n_radial": 5}


@pytest.mark.parametrize(
    "wrong",
    [
        {"tolerance": 0.0},
        {"tolerance": 1.5},
        {"angle_tolerance": -1.0},
        {"stop": "never"},
        {"distance_step": 0},
        {"distance_step": 2.5},
        {"distance_step": 10, "max_distances": 9},
        {"neighbors": ()},
        {"neighbors": (2, 2)},
        {"start": {"width": 3}},
        {"steps": {"cutoff": 0}},
    ],
)
def test_searches_that_cannot_be(wrong: dict) -> None:
    with pytest.raises(SettingsError) as caught:
        SearchSettings(**wrong)
    assert "\n" not in str(caught.value)


# -- training the candidates --------------------------------------------------------------------------------------


def test_record_choice_and_plot(data: Dataset, tmp_path: Path) -> None:
    from PIL import Image

    out = tmp_path / "found.json"
    result = run(data, out, repeats=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["found.json", "found.png"]
    record = json.loads(out.read_text())
    assert record["format"] == "gpurho-selection"
    assert len(record["candidates"]) == len(result.candidates) == 6
    sizes = [tuple(c.sizes.values()) for c in result.candidates]
    assert sizes == [(3, 0, 0), (6, 0, 0), (m := result.choice.sizes["n_distances"], 2, 1), *sizes[3:]]
    for c in result.candidates:
        assert c.n_features == c.sizes["n_distances"] + c.sizes["n_angle_atoms"] * c.sizes["n_angle_neighbors"]
        assert min(c.rmse, c.spread, c.feature_seconds, c.network_seconds, c.train_seconds) > 0
    with_angles = [c for c in result.candidates if c.sizes["n_angle_atoms"]]
    assert all(c.sizes["n_distances"] == m for c in with_angles)
    assert result.settings == {"family": "scalar-product", **result.choice.sizes}
    assert str(result).splitlines()[-1].startswith("choice: --set family=scalar-product --set n_distances=")
    with Image.open(out.with_suffix(".png")) as image:
        assert image.width > 1000
        assert len(image.convert("L").getcolors()) > 50  # more than an empty frame

    figure = result.plot()
    lines = {line.get_label(): line for line in figure.axes[0].get_lines()}
    np.testing.assert_allclose(lines["choice"].get_xydata(), [[result.choice.n_features, 1e3 * result.choice.rmse]])
    handles, labels = figure.axes[0].get_legend_handles_labels()
    assert {"distances (set I)", "angles, k = 1", "angles, k = 2"} <= set(labels)
    drawn = handles[labels.index("distances (set I)")].lines[0].get_xydata()
    first = [c for c in result.candidates if c.series == "distances"]
    np.testing.assert_allclose(drawn, [[c.n_features, 1e3 * c.rmse] for c in first])

    # The same again comes from the record alone, and draws the same.
    before = out.read_bytes()
    again = run(data, out, repeats=2)
    assert out.read_bytes() == before
    assert again.candidates == result.candidates


def test_errors_are_those_of_the_trained_networks(data: Dataset, tmp_path: Path) -> None:
    from gpurho.pipelines.train import train

    result = run(data, tmp_path / "a.json", plot=False)
    c = result.candidates[-1]
    options = module.COMMON_BUDGET | module.BUDGETS["scalar-product"] | SHARED | c.sizes
    trained = train(
        data, tmp_path / "m.safetensors", test=[0], validation=[1], progress=False, family="scalar-product", **options
    )
    assert c.rmse == pytest.approx(trained.history[-1]["validation_rmse"], rel=1e-6)


def test_smooth_family_with_learned_channels(data: Dataset, tmp_path: Path) -> None:
    shared = {k: v for k, v in SMOOTH.items() if k not in ("family", "cutoff", "n_radial", "n_basis", "l_max")}
    search = SearchSettings(
        tolerance=0.99, start={"cutoff": 4.0, "n_radial": 4, "n_basis": 1, "l_max": 1}, most={"cutoff": 4.2}
    )
    options = shared | SHARED | {"search": search, "family": "smooth", "test": [0], "validation": [1], "threads": 1}
    options["progress"] = False
    del options["cutoff"]
    result = select(data, tmp_path / "s.json", **options)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["s.json", "s.png"]
    assert [c.series for c in result.candidates] == ["start", "n_basis", "l_max", "n_radial"]
    assert result.choice.sizes == {"cutoff": 4.0, "n_basis": 1, "l_max": 1, "n_radial": 4}
    plain = select(data, tmp_path / "s.json", **options, contraction=None)
    assert plain.candidates[0].rmse != result.candidates[0].rmse
    assert len(json.loads((tmp_path / "s.json").read_text())["candidates"]) == 8


def test_an_interrupted_search_goes_on(data: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    undisturbed = run(data, tmp_path / "a.json", plot=False)
    trained = []
    original = module.Trainer.run

    def counted(self, on_step=None):
        trained.append(self.step)

        def stop(trainer, loss):
            if len(trained) == 3 and trainer.step == 5:
                raise KeyboardInterrupt

        return original(self, stop if interrupt else on_step)

    monkeypatch.setattr(module.Trainer, "run", counted)
    interrupt = True
    with pytest.raises(KeyboardInterrupt):
        run(data, tmp_path / "b.json")
    assert len(json.loads((tmp_path / "b.json").read_text())["candidates"]) == 2
    assert len(list(tmp_path.glob(".b.*.checkpoint"))) == 1
    interrupt = False
    result = run(data, tmp_path / "b.json", plot=False)
    assert len(trained) == len(undisturbed.candidates) + 1
    assert [c.rmse for c in result.candidates] == [c.rmse for c in undisturbed.candidates]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.json", "b.json"]


def test_a_killed_command_goes_on(data: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "k.json"
    words = ["select", str(data.path), "--out", str(out), "--stop", "both", "--tolerance", "0.01"]
    settings = {**SHARED, "epochs": 4, "distance_step": 3, "max_distances": 6, "angle_step": 2, "max_angle_atoms": 4}
    settings |= {"neighbors": [1, 2], "threads": 1, "test_fraction": 0.25, "validation_fraction": 0.3}
    for name, value in settings.items():
        words += ["--set", f"{name}={json.dumps(value) if not isinstance(value, str) else value}"]
    process = subprocess.Popen([sys.executable, "-m", "gpurho", *words, "--quiet"], stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not out.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    first = json.loads(out.read_text())["candidates"]
    assert main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found["candidates"]) == 6
    record = json.loads(out.read_text())["candidates"]
    assert all(record[key] == value for key, value in first.items())
    assert found["settings"]["family"] == "scalar-product"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["k.json", "k.png"]
    assert main(words) == 0
    text = capsys.readouterr().out
    assert "choice: --set family=scalar-product" in text
    assert f"record {out}, plot {out.with_suffix('.png')}" in text


def test_other_settings_are_measured_anew_in_the_same_record(data: Dataset, tmp_path: Path) -> None:
    search = SearchSettings(distance_step=3, max_distances=3, max_angle_atoms=1, neighbors=(1,))
    first = run(data, tmp_path / "a.json", search=search, plot=False)
    second = run(data, tmp_path / "a.json", search=search, plot=False, seed=5)
    assert first.candidates[0].rmse != second.candidates[0].rmse
    assert len(json.loads((tmp_path / "a.json").read_text())["candidates"]) == 4


def test_what_is_refused(data: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for wrong in (
        {"family": "rough"},
        {"n_distances": 4},
        {"family": "smooth", "cutoff": 5.0},
        {"nonsense": 1},
        {"repeats": 0},
        {"contraction": [[[1.0]]]},
    ):
        with pytest.raises(SettingsError):
            run(data, tmp_path / "a.json", **wrong)
    for name in ("a.txt", "none/a.json"):
        with pytest.raises(SettingsError):
            run(data, tmp_path / name)
    for text in ("{}", "text", '{"format": "gpurho-selection", "format_version": 1, "candidates": {"a": {}}}'):
        (tmp_path / "foreign.json").write_text(text)
        with pytest.raises(StoreError, match=r"foreign\.json"):
            run(data, tmp_path / "foreign.json")
        assert (tmp_path / "foreign.json").read_text() == text
    assert sorted(p.name for p in tmp_path.iterdir()) == ["foreign.json"]
    assert main(["select", str(data.path), "--out", str(tmp_path / "b.json"), "--tolerance", "2"]) == 1
    assert main(["select", str(tmp_path / "no.h5"), "--out", str(tmp_path / "b.json")]) == 1
    assert main(["select", str(data.path), "--out", str(tmp_path / "b.json"), "--set", "n_distances=3"]) == 1
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 3
    assert all(line.startswith("gpurho: ") for line in errors)
