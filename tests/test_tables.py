"Tables and pictures from the records that are in the repository."
import json
import re
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from pages import ROOT, run_page

from advdpnp import plots, tables
from advdpnp.core import read_json
from advdpnp.evaluation import accuracy, packed, verdicts_in

RESULTS = ROOT / "data/results"
MISSING = {"table1.fast.partial": {"standard", "PGD-AT", "MART", "DPNP"}}
STEMS = sorted(path.stem for path in RESULTS.glob("table*.json"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "A data folder with the records of the repository, and nothing else in it."
    folder = tmp_path_factory.mktemp("kept")
    (folder / "results").mkdir()
    for path in [*RESULTS.glob("table*.json"), *RESULTS.glob("figure2.*.json")]:
        shutil.copy(path, folder / "results")
    shutil.copytree(ROOT / "data/reported", folder / "reported")
    return folder


@pytest.mark.parametrize("stem", STEMS)
def test_a_table_is_made_again_from_its_records(folder, stem):
    "Records that were made before are found by today's settings, and give the numbers and texts that are there."
    name, preset, *dataset = stem.removesuffix(".partial").split(".")
    table = tables.make_table(int(name[5:]), preset, *dataset, time_limit=0, device="cpu", data_dir=folder, quiet=True,
                              use_results=True)
    assert table.stem.name == stem
    assert {run.split(",")[0] for run in table.left} == MISSING.get(stem, set())
    suffixes = [".json", ".csv", ".last.csv", ".md"] if table.kind == "result" else [".json", ".csv", ".md"]
    assert [path.name for path in table.files] == [f"{stem}{suffix}" for suffix in suffixes]
    for path in table.files:
        assert path.read_bytes() == (RESULTS / path.name).read_bytes(), path.name


@pytest.mark.parametrize("preset", ["quick", "small"])
def test_verdicts_in_records_add_up(preset):
    for name in ("table7", "figure2"):
        for record in read_json(RESULTS / f"{name}.{preset}.json"):
            assert len(verdicts_in(record)["worst"]) == record["n"]  # they fit its numbers, or there is an error


def test_the_bars_that_the_method_must_meet():
    table = pd.read_csv(RESULTS / "table1.quick.csv").set_index("method")
    assert list(table.index) == ["standard", "PGD-AT", "TRADES", "MART", "DPNP", "dual-branch linear", "Adv-DPNP"]
    assert {"clean", "fgsm", "pgd20", "cw", "autoattack", "worst", "clean_std", "flags", "n_seeds"} <= {*table.columns}
    ours = table.loc["Adv-DPNP"]
    assert ours.pgd20 >= table.loc["standard"].pgd20 + 40
    # no worse than chance explains: an image is 0.2 points
    assert ours.clean >= table.loc[["PGD-AT", "TRADES", "MART", "dual-branch linear"]].clean.max() - 1.5
    assert table.loc[["standard", "DPNP"]].pgd20.max() < 10 and table.clean.min() > 90
    for record in read_json(RESULTS / "table1.quick.json"):
        assert record["best"]["curve"]["accuracy"][-1] < 15  # a budget of 0.5 leaves nothing


PICTURES = {1: ("training", "budget", "steps"), 4: ("corruptions",), 6: ("rows",), 7: ("front",)}


@pytest.mark.parametrize("number", tables.TABLES)
def test_a_page_shows_what_is_there(folder, monkeypatch, capsys, number):
    monkeypatch.chdir(ROOT / "nbs")
    monkeypatch.setattr(tables, "fronts_apart", lambda records: "")  # takes its time, and is compared above
    page = run_page(f"table{number}", preset="quick", data_dir=str(folder), device="cpu", use_results=True)
    table, shown = page["table"], capsys.readouterr().out
    assert table.left == [] and "| Adv-DPNP |" in shown and str(table.files[0]) in shown
    pictures = PICTURES.get(1 if number < 4 else number, ())
    assert [path.name for path in table.files if path.suffix == ".png"] == [
        f"table{number}.quick.{name}.png" for name in pictures]
    assert all(path.stat().st_size > 1000 for path in table.files if path.suffix == ".png")
    if number in (2, 3):  # on the digits these are the runs of table 1
        assert table.files[1].read_bytes() == (RESULTS / "table1.quick.csv").read_bytes()
    assert not (folder / "runs").exists()


def test_a_page_without_records_has_no_empty_headings(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT / "nbs")
    page = run_page("table1", preset="quick", data_dir=str(tmp_path), device="cpu", minutes=1e-9)
    assert page["table"].files == [] and len(page["table"].left) == 7
    assert capsys.readouterr().out.startswith("No run is finished.") and list((tmp_path).rglob("*.png")) == []


def test_an_unknown_parameter_stops_a_page(tmp_path):
    with pytest.raises(ValueError, match="unknown parameter 'datset': did you mean 'dataset'"):
        run_page("table1", data_dir=str(tmp_path), datset="cifar10")
    assert list(tmp_path.iterdir()) == []


def test_figure_2_is_made_again_from_its_records(folder, monkeypatch):
    monkeypatch.chdir(ROOT / "nbs")
    page = run_page("figure2", preset="quick", data_dir=str(folder), device="cpu", use_results=True)
    assert page["left"] == 0
    for suffix in (".json", ".csv"):
        assert (folder / f"results/figure2.quick{suffix}").read_bytes() == (
            RESULTS / f"figure2.quick{suffix}").read_bytes()


def test_every_picture_that_is_kept_is_linked_from_somewhere():
    pages = "".join(path.read_text() for path in [*ROOT.glob("nbs/*.ipynb"), ROOT / "README.md"])
    assert [path.name for path in RESULTS.glob("*.png") if f"data/results/{path.name}" not in pages] == []


# What is asked for


@pytest.mark.parametrize("number, given, message", [
    (8, {}, "unknown table 8"),
    (6, dict(methods="no alignement"), "did you mean 'no alignment'"),
    (1, dict(methods="TRADE"), "did you mean 'TRADES'"),
    (1, dict(seeds="0-2"), "seeds are '0-2': expected whole numbers, such as 0 or 0,1,2"),
    (1, dict(dataset="photos/"), "dataset is 'photos/': expected a name, such as cifar10"),
])
def test_what_cannot_be_asked_for(number, given, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        tables.table_runs(number, "quick", device="cpu", **given)


def test_lists_are_taken_where_text_with_commas_is():
    runs = lambda **given: tables.table_runs(1, "quick", device="cpu", **given)
    assert runs(methods=["TRADES", "MART"], seeds=[0, 1]) == runs(methods="TRADES, MART", seeds="0, 1")


def test_a_row_that_changes_nothing_is_left_out():
    rows = [row for row, _ in tables.table_runs(7, "small", device="cpu")]
    assert {"TRADES", "TRADES beta=3"} <= {*rows} and "TRADES beta=6" not in rows  # which is what was chosen
    rows = [row for row, _ in tables.table_runs(6, "small", device="cpu")]
    assert "α = 5" in rows and "α = 2.5" not in rows
    assert [row for row, _ in tables.table_runs(6, "small", methods="α = 2.5", device="cpu")] == ["α = 2.5"]


def test_everything_that_is_finished_may_be_shown():
    plan = tables.plan_table(1, "quick", methods="TRADES+EMA", seeds="7", device="cpu")
    assert [*plan.asked] == [("TRADES+EMA", 7)] and {("TRADES", 7), ("Adv-DPNP+AWP+EMA", 2)} <= plan.shown.keys()
    assert tables.plan_table(1, "quick", "moons", device="cpu").name == "table1.quick.moons"


# Numbers


def test_a_mean_is_over_the_same_images_or_is_not_shown():
    one, two = json.loads(json.dumps(read_json(RESULTS / "table1.quick.json")[:2])), []
    for seed in (0, 1):
        two += [record | dict(seed=seed) for record in json.loads(json.dumps(one))]
    two[2]["best"]["metrics"]["worst"]["n"] = 32  # a second seed of the first row
    first, second = tables.readable(two).splitlines()[2:]
    assert re.search(r"\d+\.\d, \d+\.\d \(n = 64, 32\)", first) and re.search(r"± 0.0 \(n = 64\)", second)
    assert tables.tabulate(two)["mixed_n"].tolist() == ["worst", ""]
    assert "worst case (n = 64)" in tables.readable(one) and "(n = 64)" not in tables.readable(one).splitlines()[2]


def test_a_network_with_prototypes_is_attacked_at_them():
    records = read_json(RESULTS / "table1.quick.json")
    known = tables.tabulate(records)["prototype"].notna().tolist()
    assert known == [tables.METHODS[record["method"]].prototypes for record in records]


def test_corruptions_of_other_images_are_not_put_into_one_table():
    records = read_json(RESULTS / "table4.quick.json")
    records[1]["n"] = 100
    with pytest.raises(ValueError, match="different corrupted images .*n = 100; .*n = 500.*: move corruptions.json"):
        tables.corruption_text(records)


def test_numbers_that_a_reader_adds_are_shown(tmp_path):
    (tmp_path / "reported").mkdir()
    (tmp_path / "reported/mine.csv").write_text("dataset,arch,method,checkpoint,metric,value,std,source\n"
                                                "moons,MLP,Adv-DPNP (paper),best,clean,12.5,,a page\n")
    assert tables.published("moons", tmp_path).splitlines()[-1] == "| Adv-DPNP (paper) | MLP | best | 12.50 | a page |"
    assert tables.published("digits", tmp_path) == tables.published("moons", tmp_path / "nowhere") == ""


def test_the_precision_of_training_is_said_of_all_records():
    record = read_json(RESULTS / "table1.quick.json")[0]
    other = record | dict(device="a GPU", trained_with=record["trained_with"] | dict(tf32=True, device="a GPU"))
    assert tables.setting([record, other]).endswith(
        "; trained in float32; CPU, 1 thread, or trained in float32 (convolutions in TF32); a GPU.")


# Fronts


def test_six_networks_are_not_better_than_one_for_being_six():
    draw = np.random.default_rng(1)
    alike = lambda count: draw.random((2, count, 1, 2000)) < np.array([50, 25])[:, None, None, None] / 100
    gaps = [tables.front_gap(alike(6), alike(1), resamples=1)["points"] for _ in range(40)]
    assert abs(np.mean(gaps)) < 0.5


def test_several_seeds_count_with_their_mean_and_not_their_best():
    sweep = read_json(RESULTS / "table7.quick.json")
    row = next(record for record in sweep if record["method"] == "TRADES")
    none = {which: accuracy(torch.zeros(row["n"], dtype=torch.bool)) for which in ("clean", "worst", "autoattack")}
    worse = row | none | dict(seed=1, verdicts=" ".join(3 * [packed(torch.zeros(row["n"], dtype=torch.bool))]))
    np.testing.assert_allclose(tables.verdicts_of([row, worse]).mean(2), tables.verdicts_of([row])[:, :, 0] / 2)


def test_equal_accuracies_make_the_front_of_the_better_one():
    assert tables.hull(np.array([[50, 20], [50, 25], [30, 25.0]])).tolist() == [1]


def test_the_interval_of_three_seeds_holds_the_truth():
    "Two equal methods whose seeds differ: the interval over images and seeds excludes zero in about one of twenty."
    random, missed = np.random.default_rng(2), 0
    for _ in range(60):
        accuracies = [np.array([50, 25])[:, None] + 5 * random.standard_normal((1, 3)) for _ in "ab"]
        a, b = (random.random((2, 1, 3, 200)) < each[:, None, :, None] / 100 for each in accuracies)
        found = tables.front_gap(a, b, resamples=60, splits=2)
        missed += not found["low"] <= 0 <= found["high"]
    assert missed <= 8


def test_a_seed_that_some_rows_lack_is_not_in_the_fronts():
    "A run that stops in its second seed has that seed of some rows; what it says of the first does not change."
    sweep = read_json(RESULTS / "table7.quick.json")
    begun = [r | dict(seed=1) for r in sweep if r["config"]["method"] in ("PGD-AT", "TRADES")]
    assert tables.fronts_apart(sweep + begun) == tables.fronts_apart(sweep)
    apart = [r | dict(seed=1) for r in sweep if r["config"]["method"] == "Adv-DPNP"]
    rest = [r for r in sweep if r["config"]["method"] != "Adv-DPNP"]
    assert tables.fronts_apart(rest + apart) == ""


def test_a_damaged_record_leaves_a_table_of_the_others(tmp_path, monkeypatch):
    done = {r["method"]: r for r in read_json(RESULTS / "table1.quick.json")}

    def result(self, config, kind="result"):
        if config["method"] == "TRADES":
            raise ValueError("result.json is damaged")
        return done[config["method"]] if config["method"] == "MART" else None

    monkeypatch.setattr(tables.Ledger, "result", result)
    with pytest.raises(ValueError, match="result.json is damaged"):
        tables.make_table(1, "quick", methods="MART, TRADES", time_limit=0, device="cpu", data_dir=tmp_path, quiet=True)
    assert {r["method"] for r in read_json(tmp_path / "results/table1.quick.partial.json")} == {"MART"}


def test_rows_are_drawn_beside_adv_dpnp_wherever_it_stands():
    records = read_json(RESULTS / "table6.quick.json")
    bands = lambda figure: [patch.get_width() for ax in figure.axes for patch in ax.patches]
    assert bands(plots.draw_rows(records[1:3])) == []
    assert bands(plots.draw_rows(records)) == pytest.approx(bands(plots.draw_rows(records[::-1])))
    first, metrics = records[0], records[0]["best"]["metrics"]
    short = first | dict(best=dict(metrics={name: metrics[name] for name in metrics if name != "autoattack"}))
    assert len(plots.draw_rows([short, *records[1:]]).axes) == 2


def test_bars_of_several_seeds_are_their_standard_deviation():
    row = next(r for r in read_json(RESULTS / "table7.quick.json") if r["method"] == "TRADES")
    other = row | dict(seed=1, clean=row["clean"] | dict(accuracy=row["clean"]["accuracy"] - 2))
    assert plots.reach([row, other], "clean") == pytest.approx((2**0.5, 2**0.5))
    assert plots.reach([row], "clean")[0] == pytest.approx(row["clean"]["accuracy"] - row["clean"]["low"])


def test_a_smaller_request_does_not_take_seeds_from_a_table(tmp_path):
    (tmp_path / "results").mkdir()
    kept = tmp_path / "results/table1.quick.json"
    first = read_json(RESULTS / "table1.quick.json")
    more = [record | dict(seed=4, config=record["config"] | dict(seed=4)) for record in first]
    kept.write_text(json.dumps(first + more))
    table = tables.make_table(1, "quick", seeds="0", use_results=True, device="cpu", data_dir=tmp_path, quiet=True)
    assert len(table.records) == 2 * len(first) and {r["seed"] for r in json.loads(kept.read_text())} == {0, 4}


def test_records_of_other_files_are_named(tmp_path):
    records = read_json(RESULTS / "table1.quick.json")
    records[2]["data_sha256"] = "0" * 64
    done = {(record["method"], 0): record for record in records}
    plan = tables.plan_table(1, "quick", device="cpu")
    with pytest.raises(ValueError, match=f"{records[2]['method']}, seed 0 on others than the rest"):
        tables.write_table(plan, tables.Ledger(tmp_path, "cpu"), done)


@pytest.mark.parametrize("text, message", [
    ("dataset,arch,method,checkpoint,metrics,value,std,source\n", "mine.csv lacks the columns metric: expected"),
    (",".join(tables.REPORTED) + '\nmoons,a,b,best,clean,"80,1",,c\n', "mine.csv: value is '80,1': expected a number"),
])
def test_published_numbers_that_cannot_be_read(tmp_path, text, message):
    (tmp_path / "reported").mkdir()
    (tmp_path / "reported/mine.csv").write_text(text)
    with pytest.raises(ValueError, match=re.escape(message)):
        tables.published("moons", tmp_path)
