"Models compared on the same images: against other implementations, in simulations, and what is refused."
import copy
import itertools
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy.stats import norm
from typer.testing import CliRunner

from advdpnp.cli import app
from advdpnp.comparison import compare, dumbbell, holm, mcnemar, paired, read_models
from advdpnp.core import read_json, write_json
from advdpnp.evaluation import packed, verdicts_in

TABLE = Path(__file__).parent.parent / "data/results/table1.quick.json"


def test_mcnemar_and_holm_are_those_of_statsmodels():
    tables = pytest.importorskip("statsmodels.stats.contingency_tables", reason="statsmodels is not installed")
    from statsmodels.stats.multitest import multipletests

    for only_a, only_b in itertools.product((0, 1, 5, 30), (0, 2, 30, 41)):
        if only_a + only_b:
            expected = tables.mcnemar([[7, only_a], [only_b, 9]], exact=True).pvalue
            assert mcnemar(only_a, only_b) == pytest.approx(expected, rel=1e-9)
    random = np.random.default_rng(0)
    for n in (1, 2, 7, 40):
        p = random.random(n) ** 3
        p[: n // 3] = p[0]  # ties
        assert holm(list(p)) == pytest.approx(multipletests(p, method="holm")[1], rel=1e-12)


def drawn(random, seeds, images, effect, better=0.0):
    "Verdicts of two models; A is better by `better` on the scale of difficulties, seeds differ by `effect`."
    difficulty = random.standard_normal(images)
    noise = lambda: 0.8 * random.standard_normal((seeds, images)) + effect * random.standard_normal((seeds, 1))
    return difficulty + better + noise() > 0, difficulty + noise() > 0


def truth(better, effect):
    "The difference in accuracy over all images and seeds, in points."
    spread = (1 + 0.8**2 + effect**2) ** 0.5
    return 100 * (norm.cdf(better / spread) - 0.5)


@pytest.mark.parametrize("seeds, images, effect, better, most", [
    (1, 1000, 0.0, 0.0, 0.98), (1, 1000, 0.0, 0.3, 0.98), (1, 64, 0.0, 0.0, 0.98), (1, 64, 0.0, 0.5, 0.98),
    (3, 1000, 0.1, 0.3, 0.98), (3, 64, 0.3, 0.0, 0.98),
    (3, 1000, 0.0, 0.0, 0.995), (3, 64, 0.1, 0.0, 0.995),  # where seeds hardly differ, three of them say so too late
    (2, 1000, 0.1, 0.3, 1), (2, 1000, 1.0, 0.3, 1)])
def test_an_interval_holds_the_truth_as_often_as_it_says(seeds, images, effect, better, most):
    random, held, draws = np.random.default_rng(1), 0, 1500
    for _ in range(draws):
        found = paired(*drawn(random, seeds, images, effect, better))
        held += found["low"] <= truth(better, effect) <= found["high"]
    assert 0.93 <= held / draws <= most


def test_an_interval_that_knows_nothing_of_seeds_is_too_narrow():
    random, ours, images_alone = np.random.default_rng(2), 0, 0
    for _ in range(600):
        a, b = drawn(random, 3, 1000, 0.1)
        found, d = paired(a, b), (a.astype(float) - b).mean(0)
        reach = 1.96 * 100 * d.std(ddof=1) / len(d) ** 0.5
        ours += found["low"] <= 0 <= found["high"]
        images_alone += abs(100 * d.mean()) <= reach
    assert images_alone < 0.85 * 600 < 0.93 * 600 <= ours


def test_a_p_value_below_five_per_cent_and_an_interval_without_zero_go_together():
    random, agree = np.random.default_rng(3), 0
    for i in range(300):
        found = paired(*drawn(random, 1 + 2 * (i % 2), 300, 0.0, 0.2))
        agree += (found["p"] < 0.05) == (not found["low"] <= 0 <= found["high"])
    assert agree >= 285  # an exact test is a little stricter


def test_the_order_of_models_changes_signs_alone():
    a, b = drawn(np.random.default_rng(4), 3, 200, 0.1, 0.3)
    there, back = paired(a, b), paired(b, a)
    assert there["difference"] == -back["difference"] and there["p"] == pytest.approx(back["p"])
    assert (there["low"], there["high"]) == pytest.approx((-back["high"], -back["low"]))


@pytest.fixture
def runs():
    "The records of a table, by method."
    return read_models([TABLE])


def run(*words):
    return CliRunner().invoke(app, ["compare", *map(str, words)])


def test_the_command_compares_a_table(tmp_path, runs):
    done = run(TABLE, "--to", "Adv-DPNP", "--output", tmp_path / "found")
    assert done.exit_code == 0, done.output
    rows = pd.read_csv(tmp_path / "found.csv")
    assert {*rows["a"]} == {"Adv-DPNP"} and {*rows["b"]} == {*runs} - {"Adv-DPNP"}
    expected = compare(runs, "Adv-DPNP").rows
    assert np.allclose(rows["difference"], expected["difference"]) and (rows["metric"] == expected["metric"]).all()
    for r in rows.itertuples():  # accuracies are those of the records
        assert r.accuracy_b == pytest.approx(runs[r.b][0]["best"]["metrics"][r.metric]["accuracy"])
    assert (tmp_path / "found.md").read_text() == compare(runs, "Adv-DPNP").text() + "\n"
    assert (tmp_path / "found.png").read_bytes().startswith(b"\x89PNG") and "found.png" in done.stdout
    assert "is there already" in run(TABLE, "--output", tmp_path / "found").stderr
    assert run(TABLE, "--epoch", "last").stdout != run(TABLE).stdout


def test_a_picture_is_drawn_of_any_names(runs):
    record, = runs["TRADES"]
    figure = dumbbell(compare({"$\\frac{": record, "<b>\n" + "x" * 200: runs["MART"][0]}))
    figure.canvas.draw()
    assert all(len(label.get_text()) <= 70 for label in figure.axes[0].get_yticklabels())


def changed(record, **changes):
    record = copy.deepcopy(record)
    record["best"] |= changes
    return record


def test_what_cannot_be_compared_is_refused(runs):
    (ours,), (theirs,) = runs["Adv-DPNP"], runs["TRADES"]
    eps = copy.deepcopy(theirs)
    eps["best"]["metrics"]["pgd20"]["attack"]["eps"] = 0.1
    old = copy.deepcopy(theirs)
    del old["best"]["verdicts"]
    damaged = copy.deepcopy(theirs)
    damaged["best"]["metrics"]["clean"]["correct"] -= 1
    for other, said in ((changed(theirs, data_sha256="0"), "data_sha256"),
                        (changed(theirs, subset=dict(order="stratified", seed=0, of=1797)), "subset"),
                        (eps, "eps is 0.2 there, 0.1 here"), (theirs | dict(seed=5), "no seed in common"),
                        (old, "no verdicts of single images"), (damaged, "the record is damaged")):
        with pytest.raises(ValueError, match=said):
            compare(dict(ours=ours, theirs=other))
    with pytest.raises(ValueError, match="did you mean 'theirs'"):
        compare(dict(ours=ours, theirs=theirs), to="their")


def test_a_pair_that_cannot_be_compared_leaves_the_others(runs):
    "One seed more or less, fewer images, and a record without verdicts."
    alone, others = runs["Adv-DPNP"][0], {name: runs[name] for name in ("TRADES", "MART")}
    three = {name: [records[0] | dict(seed=seed) for seed in range(3)] for name, records in others.items()}
    found = compare({"Adv-DPNP": [alone]} | three)
    assert {*found.rows.loc[(found.rows["a"] == "TRADES"), "seeds"]} == {3}
    assert "Adv-DPNP and MART share 1 of 3 seeds." in found.notes
    fewer = copy.deepcopy(others["TRADES"][0])
    seen = {name: verdicts[:32] for name, verdicts in verdicts_in(fewer["best"]).items()}
    counts = {len(verdicts) for verdicts in verdicts_in(fewer["best"]).values()}
    fewer["best"]["verdicts"] = " ".join(map(packed, seen.values()))
    for name, verdicts in seen.items():
        fewer["best"]["metrics"][name] |= dict(n=32, correct=int(verdicts.sum()))
        fewer["best"]["metrics"][name].get("attack", {}).update(images=32)
    found = compare(dict(ours=alone, fewer=fewer, mart=others["MART"][0]), to="ours")
    assert {*found.rows.loc[found.rows["b"] == "fewer", "images"]} == {32}
    assert {*found.rows.loc[found.rows["b"] == "mart", "images"]} == counts
    assert f"Under clean, ours and fewer share 32 of {max(counts)} images." in found.notes
    with pytest.raises(ValueError, match="two records are of the same seed"):
        compare(dict(ours=[alone, alone], mart=others["MART"]))
    old = copy.deepcopy(others["TRADES"][0])
    del old["best"]["verdicts"]
    found = compare(dict(ours=alone, old=old, mart=others["MART"][0]), to="ours")
    assert {*found.rows["b"]} == {"mart"} and any("old: the record" in note for note in found.notes)


def test_files_that_are_no_records_are_refused(tmp_path):
    (tmp_path / "cut.json").write_text(TABLE.read_text()[:3000])
    (tmp_path / "text.json").write_text("hello")
    write_json(tmp_path / "other.json", dict(a=1))
    (tmp_path / "other_list.json").write_text(json.dumps([1, 2]))
    for name, said in (("cut", "is damaged"), ("text", "is damaged"), ("other", "is not a record"),
                       ("other_list", "is not a record"), ("nowhere", "nowhere.json")):
        done = run(TABLE, tmp_path / f"{name}.json", "--output", tmp_path / "out")
        assert done.exit_code == 1 and said in done.stderr and done.stderr.count("\n") == 1, (name, done.stderr)
    one = read_json(TABLE)[0]
    (tmp_path / "one.json").write_text(json.dumps(one))
    assert "expected two or more" in run(tmp_path / "one.json").stderr
    assert "unknown epoch" in run(TABLE, "--epoch", "first").stderr
    assert not [path for path in tmp_path.glob("*out*")]


def test_worst_cases_of_other_budgets_are_not_compared(runs):
    "Of other attacks, too: nothing but the worst case would tell."
    ours, theirs = (copy.deepcopy(runs[name][0]) for name in ("PGD-AT", "TRADES"))
    for metric in theirs["best"]["metrics"].values():
        if "attack" in metric:
            metric["attack"]["eps"] = 0.1
    renamed = {f"my {name}" if "attack" in metric else name: metric
               for name, metric in theirs["best"]["metrics"].items()}
    theirs["best"]["metrics"] = renamed
    with pytest.raises(ValueError, match="cannot be compared under worst: budgets"):
        compare(dict(ours=ours, theirs=theirs))


def test_worst_cases_under_other_attacks_are_not_compared(runs):
    (ours,), (theirs,) = runs["MART"], runs["TRADES"]
    theirs = copy.deepcopy(theirs)
    metrics = theirs["best"]["metrics"]
    theirs["best"]["metrics"] = {name.replace("pgd20", "pgd50"): metric for name, metric in metrics.items()}
    found = compare(dict(ours=ours, theirs=theirs))
    assert "worst" not in {*found.rows["metric"]} and "autoattack" in {*found.rows["metric"]}
    assert "The attack pgd50 was run on theirs only; so it is not compared in the worst case." in found.notes


def test_corruptions_of_other_draws_are_not_compared():
    record = read_json(TABLE.with_name("table4.quick.json"))[0]
    record = {key: value for key, value in record.items() if key != "config"}
    with pytest.raises(ValueError, match="recipe_seed"):
        compare(dict(a=record, b=record | dict(recipe_seed=7)))


def test_models_without_records_are_refused(runs):
    with pytest.raises(ValueError, match="has no records"):
        compare(dict(a=[], b=runs["TRADES"]))
    with pytest.raises(ValueError, match="add data_sha256=dataset.sha256"):
        compare(dict(a=dict(accuracy={}), b=dict(accuracy={})))
