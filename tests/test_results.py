"The page of results: what it says is what the records say."
import ast
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from advdpnp.comparison import by_seed, compare, holm, paired
from advdpnp.evaluation import verdicts_in
from advdpnp.runs import CHOSEN
from advdpnp.study import differences
from advdpnp.tables import accuracies, corruption_rows, geometry_rows, with_last

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "data/results"


@pytest.fixture(scope="module")
def page():
    "The variables at the end, each table that is shown today with what is stored, and the prose on one line."
    names, tables, prose = {}, [], []
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT / "nbs")
        for cell in json.loads(Path("results.ipynb").read_text())["cells"]:
            source = "".join(cell["source"])
            if cell["cell_type"] == "markdown":
                prose.append(source)
                continue
            assert len(source.splitlines()) <= 15
            *lines, last = ast.parse(source).body
            shows = isinstance(last, ast.Expr)
            exec(compile(ast.Module(lines if shows else [*lines, last], []), "results", "exec"), names)
            if shows:
                stored = "".join(cell["outputs"][0]["data"]["text/markdown"])
                tables.append((eval(compile(ast.Expression(last.value), "results", "eval"), names).data, stored))
        yield names, tables, " ".join("\n".join(prose).split())


def test_tables_are_those_of_the_records(page):
    names, tables, prose = page
    assert len(tables) > 10
    for today, stored in tables:
        assert today == stored


def test_findings_are_those_of_the_records(page):
    names, tables, prose = page
    records, over_runs, over_images = (names[name] for name in ("records", "over_runs", "over_images"))

    def apart(rows, column, method):
        return over_runs(*(rows.loc[rows["method"] == name, column] for name in ("Adv-DPNP", method)))

    better, worse, undecided = (lambda d: d[1] > 0), (lambda d: d[2] < 0), (lambda d: d[1] <= 0 <= d[2])
    first = accuracies(records("table1.small"))
    mart, trades = (apart(first, "clean", method) for method in ("MART", "TRADES"))
    assert better(mart) and undecided(trades)
    assert f"**At 16×16 it is higher than MART's, by {mart[0]:.1f} points at the best epoch" in prose
    assert all(undecided(apart(first, "clean", method)) for method in ("PGD-AT", "dual-branch linear"))
    last, readme = accuracies(records("table1.small"), "last"), (ROOT / "README.md").read_text().replace("−", "-")
    ahead, behind = apart(last, "clean", "PGD-AT"), apart(last, "clean", "dual-branch linear")
    assert (f"At the last epoch it is also {ahead[0]:.1f} points higher than PGD-AT's, and {-behind[0]:.1f} lower than "
            "that of dual-branch linear.**") in prose
    assert better(apart(last, "clean", "PGD-AT")) and worse(apart(last, "clean", "dual-branch linear"))
    linear, trades = ([apart(last, name, method) for name in ("clean", "cw", "pgd20")]
                      for method in ("dual-branch linear", "TRADES"))
    assert worse(linear[0]) and better(linear[1]) and all(map(undecided, trades))
    assert (f"is {-linear[0][0]:.1f} points better on clean images and {linear[1][0]:.1f} points worse under C&W. "
            f"PGD-AT is {ahead[0]:.1f} points worse on clean images") in prose
    lost = apart(last, "cw", "PGD-AT")
    assert worse(lost) and f"and {-lost[0]:.1f} points better under C&W. From TRADES no difference is dec" in prose
    assert f"clean {ahead[0]:.1f} points higher, C&W {-lost[0]:.1f} lower" in readme
    assert f"at the last epoch clean {trades[0][0]:+.1f}, C&W {trades[1][0]:+.1f}; at the best" in readme
    spread = {which: accuracies(records("table1.small"), which).groupby("method")[["clean", "cw"]].std()
              for which in ("best", "last")}
    means = {which: accuracies(records("table1.small"), which).groupby("method")[["clean", "cw"]].mean()
             for which in ("best", "last")}
    adversarial = ["PGD-AT", "TRADES", "MART", "dual-branch linear", "Adv-DPNP"]
    assert (spread["last"] < spread["best"]).loc[adversarial].all().all()  # seeds differ less at the last epoch
    assert (means["last"] > means["best"] - 0.15).loc[adversarial].all().all()  # and nothing is lost
    runs = [r for r in records("table1.small") if r["method"] in adversarial]
    early = [{which: r[which]["metrics"]["clean"]["accuracy"] for which in ("best", "last")} for r in runs
             if r["best"]["epoch"] < r["last"]["epoch"]]
    lost = max(r["last"] - r["best"] for r in early)
    assert f"In {len(early)} of {len(runs)} runs" in prose and f"is up to {lost:.1f} points lower" in prose
    attacked = apart(first, "autoattack", "TRADES")
    assert undecided(attacked) and f"Under AutoAttack TRADES is {-attacked[0]:.1f} points ahead" in prose
    assert f"AutoAttack {attacked[0]:+.1f}; all undecided" in readme
    assert better(apart(first, "pgd20", "dual-branch linear")) and worse(apart(first, "pgd20", "MART"))
    assert all(undecided(apart(first, "autoattack", method)) for method in adversarial[:-1])

    corrupted = corruption_rows(records("table4.small"))
    ahead = apart(corrupted, "mean", "standard")
    assert worse(ahead) and f"undefended networks are {-ahead[0]:.0f} points better,** about as far as on" in prose
    assert f"undefended networks are {-ahead[0]:.0f} points ahead" in readme
    assert abs(ahead[0] - apart(first, "clean", "standard")[0]) < 2
    assert all(better(apart(corrupted, "mean", method)) for method in ("PGD-AT", "MART"))
    assert all(undecided(apart(corrupted, "mean", method)) for method in ("TRADES", "dual-branch linear"))

    features = geometry_rows(records("table5.small"))
    ahead = {name: [method for method in adversarial[:-1] if better(apart(features, name, method))]
             for name in ("clean_fisher", "clean_silhouette", "means_smallest")}
    assert [*ahead.values()] == [["TRADES", "MART", "dual-branch linear"], ["MART"], ["MART"]]
    assert not any(worse(apart(features, "clean_silhouette", method)) for method in adversarial[:-1])
    index = {method: apart(features, "clean_davies_bouldin", method) for method in adversarial[:-1]}  # less is better
    assert [method for method in index if better(index[method])] == ["PGD-AT", "TRADES"]
    assert not any(map(worse, index.values()))
    nearest = [apart(features, "means_smallest", method)[0] for method in ("MART", "TRADES")]
    assert [round(degrees) for degrees in nearest] == [1, -4] and "one degree further apart than MART" in prose

    rows = {r["method"]: r["best"]["metrics"] for r in records("table6.small")}
    change = lambda row, metric: over_images(rows[row][metric], rows["Adv-DPNP"][metric])
    clean, robust = (change("no consistency", metric) for metric in ("clean", "autoattack"))
    assert better(clean) and worse(robust)
    assert f"{clean[0]:.1f} points better on clean images and {-robust[0]:.1f} points worse under AutoAttack" in prose
    assert all(undecided(change(row, metric)) for metric in rows["Adv-DPNP"]
               for row in ("both branches move prototypes", "batch statistics shared"))
    strong, free = "alignment = 0.3", "alignment of features only = 0.3"
    assert worse(change(strong, "cw")) and undecided(change(free, "cw"))
    points, low, high = over_images(rows[free]["cw"], rows[strong]["cw"])
    said = f"{points:.1f} points better"
    other = {row: r["best"].get("subset") for r in records("table6.small") for row in [r["method"]]}
    assert {row for row, subset in other.items() if subset} == {row for row in other if "features only" in row}
    assert low > 0 and f"it looks {said} than that [{low:+.1f}, {high:+.1f}]" in prose
    assert f"under C&W that is {said} [{low:+.1f}, {high:+.1f}]" in (ROOT / "nbs/table6.ipynb").read_text()
    assert all(undecided(change("alignment of features only", metric)) for metric in ("clean", "cw", "autoattack"))

    more_classes, numbers = ({r["method"]: r["best"]["metrics"] for r in records(name)}
                             for name in ("table2.small", "table3.small.svhn10k"))
    behind = over_images(*(more_classes[method]["pgd20"] for method in ("Adv-DPNP", "dual-branch linear")))
    assert worse(behind) and f"Under PGD-20 it is {-behind[0]:.1f} points behind dual-branch linear." in prose
    behind = over_images(*(numbers[method]["autoattack"] for method in ("Adv-DPNP", "TRADES")))
    assert worse(behind) and f"**No: TRADES is {-behind[0]:.1f} points better under AutoAttack;**" in prose
    assert undecided(over_images(*(numbers[method]["clean"] for method in ("Adv-DPNP", "TRADES"))))
    assert undecided(over_images(*(numbers[method]["autoattack"] for method in ("Adv-DPNP", "dual-branch linear"))))
    ahead = over_images(*(numbers[method]["clean"] for method in ("Adv-DPNP", "dual-branch linear")))
    assert worse(ahead) and f"Dual-branch linear is {-ahead[0]:.1f} points better on clean images; under Auto" in prose


def test_what_is_said_of_full_size_holds(page):
    names, tables, prose = page
    full, readme = names["records"]("table1.fast.partial"), (ROOT / "README.md").read_text().replace("−", "-")
    one, ended = {r["method"]: r for r in full}, {r["method"]: r for r in with_last(full)}
    apart = lambda rows, other: {row.metric: row for row in rows[rows["b"] == other].itertuples()}
    best, last = compare(one, "Adv-DPNP").rows, compare(ended, "Adv-DPNP", "last").rows
    assert not any(row.low > 0 or row.high < 0 for row in best[best["metric"] == "autoattack"].itertuples())
    trades, later = apart(best, "TRADES"), apart(last, "TRADES")
    linear = apart(compare(one, "dual-branch linear").rows, "TRADES")
    assert all(rows[metric].low > 0 for rows in (trades, later, linear) for metric in ("clean", "cw"))
    assert (f"Adv-DPNP is {trades['clean'].difference:.1f} points better than TRADES on clean images and "
            f"{trades['cw'].difference:.1f} under C&W. The linear layer is better by "
            f"{linear['clean'].difference:.1f} and {linear['cw'].difference:.1f}; under PGD-20 it is level") in prose
    assert linear["pgd20"].low < 0 < linear["pgd20"].high
    assert (f"by {later['clean'].difference:.1f} points on clean images, and {later['cw'].difference:.1f} under C&W"
            in prose)
    assert f"clean {later['clean'].difference:+.1f}, C&W {later['cw'].difference:+.1f} at the last, AutoAtt" in readme
    behind = apart(best, "dual-branch linear")
    assert behind["clean"].high < 0 < min(behind["pgd20"].low, behind["cw"].low)
    assert (f"Adv-DPNP gives {-behind['clean'].difference:.1f} points on clean images for "
            f"{behind['pgd20'].difference:.1f} under PGD-20 and {behind['cw'].difference:.1f} under C&W") in prose
    assert (f"(one seed) clean {behind['clean'].difference:+.1f}, C&W {behind['cw'].difference:+.1f}." in readme)


def test_what_limits_the_comparison_at_full_size(page):
    names, tables, prose = page
    full = {r["method"]: r for r in names["records"]("table1.fast.partial")}
    settings = {(r["config"]["lr"], r["config"]["weight_decay"]) for r in full.values()}
    assert settings == {(0.1, 5e-4)} == {(CHOSEN["small"][method]["lr"], CHOSEN["small"][method]["weight_decay"])
                                         for method in ("Adv-DPNP", "dual-branch linear")}
    assert (CHOSEN["small"]["TRADES"]["lr"], CHOSEN["small"]["TRADES"]["weight_decay"]) == (0.2, 2e-3)
    trials = pd.read_csv(RESULTS / "figure1.small.csv").set_index(["method", "lr", "weight_decay"]).sort_index()
    found = lambda method, lr, decay, **more: trials.loc[(method, lr, decay)].query(
        " and ".join(f"{key} == {value}" for key, value in more.items()))[["clean", "robust"]].iloc[0]
    ours = found("Adv-DPNP", 0.1, 5e-4, norm=2.5, alignment=0.01, repulsion=0.1, consistency=3)
    assert (found("TRADES", 0.1, 5e-4, beta=6) < ours).all() and (found("TRADES", 0.2, 2e-3, beta=6) > ours).all()
    weights = {method: r["config"].get("consistency") for method, r in full.items()}
    assert weights["Adv-DPNP"] == 3 and weights["dual-branch linear"] == 1
    assert {method: r["best"]["epoch"] for method, r in full.items()} == {
        "TRADES": 14, "dual-branch linear": 14, "Adv-DPNP": 15}
    assert {*full} - {r["method"] for r in with_last([*full.values()])} == {"dual-branch linear"}
    before, after = full["dual-branch linear"]["history"][-2:]
    assert (f"its last epoch is {after['clean'] - before['clean']:.1f} points better than its best one on clean "
            f"images, and {before['robust'] - after['robust']:.1f} worse under PGD-10") in prose
    for r in full.values():
        before, after = r["history"][-2:]
        assert before["clean"] < after["clean"]
        assert f"| {r['method']}, ours | 15 of 15 | {after['clean']:.1f} | {after['robust']:.1f} |" in prose


def test_what_the_attacks_say_at_full_size(page):
    names, tables, prose = page
    full, worst = names["records"]("table1.fast.partial"), {}
    for r in full:
        seen = {name: verdicts.numpy() for name, verdicts in verdicts_in(r["best"]).items()}
        others = [seen[name] for name in seen if name not in ("clean", "autoattack", "worst")]
        worst[r["method"]] = np.logical_and.reduce(others)
        assert worst[r["method"]][:1000].sum() - seen["autoattack"].sum() in (5, 6)
        if r["method"] == "Adv-DPNP":
            luck = [100 * part.mean() for part in (seen["pgd20"][:1000], seen["pgd20"][1000:])]
            assert f"Under PGD-20 it has {luck[0]:.1f}% there and {luck[1]:.1f}% on the other 9,000" in prose
        if r["method"] == "TRADES":
            luck = [100 * part.mean() for part in (seen["pgd20"][:1000], seen["pgd20"][1000:])]
            assert f"TRADES has {luck[0]:.1f}% and {luck[1]:.1f}%." in prose
    ahead = {method: 100 * (worst["Adv-DPNP"].mean() - found.mean()) for method, found in worst.items()}
    assert (f"is {ahead['TRADES']:.1f} points better than TRADES's and {ahead['dual-branch linear']:.1f} better than "
            "the linear layer's") in prose
    large = {r["method"]: r["best"]["curve"]["accuracy"][-2] for r in full}
    assert max(large, key=large.get) == "TRADES" and min(large, key=large.get) == "dual-branch linear"
    reported = pd.read_csv(ROOT / "data/reported/baselines.csv").query(
        "dataset == 'cifar10' and arch == 'ResNet-18' and checkpoint == 'best'")
    edges = lambda rows, metric: [f"{edge:.0f}" for edge in (
        rows.loc[rows["metric"] == metric, "value"].agg(["min", "max"]))]
    trades = reported[reported["method"] == "TRADES"]
    assert f"TRADES with a ResNet-18 has {' to '.join(edges(trades, 'autoattack'))}%." in prose
    assert f"Its clean accuracy is {' to '.join(edges(trades, 'clean'))}%" in prose
    assert f"have {' to '.join(edges(reported, 'autoattack'))} under AutoAttack" in (ROOT / "README.md").read_text()


def test_what_is_said_of_the_authors_code_holds(page):
    names, tables, prose = page
    record = json.loads((RESULTS / "benchmark.cpu.json").read_text())
    cascades = [row for row in record["verdicts"]["agreement"] if row["attack"] == "cascade"]
    assert len(cascades) == 4 and all(abs(row["ours"] - row["official"]) < 0.5 for row in cascades)
    photos, found = record["photos"]["images"], record["photos"]["races"]["cascade, pyautoattack"]
    assert found["differ"] == 0 and f"On {photos} test images of CIFAR-10" in prose
    assert f"both leave {found['ours']:.1f}%, and the verdicts are the same on every image" in prose


def test_what_is_said_of_records_holds(page):
    names, tables, prose = page
    first, corrupted = (names["records"](f"table{number}.small") for number in (1, 4))
    both = {r["best"]["sha256"] for r in first} & {r["sha256"] for r in corrupted}
    assert f"Tables 4 and 5 have {len(both)} of table 1's {len(first)} networks" in prose
    minutes = [r["training_seconds"] / 60 for r in first if names["method_of"](r["method"]).adversarial]
    assert f"takes {min(minutes):.0f} to {max(minutes):.0f} minutes on one core" in prose
    cascades = [row for row in names["verdicts"]["agreement"] if row["attack"] == "cascade"]
    assert len(cascades) == 4 and max(abs(row["ours"] - row["official"]) for row in cascades) < 0.5
    found = pd.read_csv(RESULTS / "figure2.small.csv")
    assert ((found["low"] < 0) & (found["high"] > 0)).all()
    assert "every interval against dual-branch linear with the same settings holds zero" in prose
    quick = pd.read_csv(RESULTS / "figure2.quick.csv").query("high < 0")
    assert len(quick) == 1 and f"is {-quick['points'].item():.1f} points worse in the worst case" in prose


def test_what_a_study_found_is_what_its_records_say(page):
    "Each step of figure 3, compared with the variant it was made from."
    *_, prose = page
    records = json.loads((RESULTS / "figure3.small.json").read_text())
    order = list(dict.fromkeys(r["method"] for r in records))
    made_from = dict(zip(order[1:], order)) | dict.fromkeys(["… alignment of both", "Adv-DPNP"], "… repulsion")
    made_from |= {"… of the fixed norm α": "… rows of one learned norm", order[-1]: "Adv-DPNP"}
    steps = pd.concat([differences([r for r in records if r["method"] in pair], pair[1])
                       for pair in made_from.items()])
    steps = steps[steps["metric"].isin(["clean", "worst"])].set_index(["variant", "metric"])
    assert len(steps) == 24 and "24 differences in all" in prose
    adjusted = dict(zip(steps.index, holm(steps["p"])))
    assert min(adjusted.values()) > 0.05 and "None of them is clear after the adjustment" in prose
    points = {run: f"{abs(row['difference']):.1f}" for run, row in steps.iterrows()}
    one = "… rows of one learned norm"
    nearest = min(adjusted, key=adjusted.get)
    assert nearest == (one, "worst") and f"costs {points[nearest]} points of the worst case" in prose
    assert f"an adjusted p-value of {adjusted[nearest]:.2f}" in prose
    undecided = {name for name, row in steps.iterrows() if row["low"] <= 0 <= row["high"]}
    assert undecided == {*steps.index} - {(one, "clean"), (one, "worst")}
    widest = max((steps["high"] - steps["low"]).loc[[*undecided]])
    assert f"its interval is up to {widest:.1f} points wide" in prose
    linear = differences(records, "dual-branch linear").set_index(["variant", "metric"])
    behind = [linear.loc[(name, "worst"), "adjusted"] < 0.05 for name in order[1:]]
    assert behind[:3] == [False] * 3 and order[4] == one and sum(behind) == 8 and len(behind) == 12
    assert "Of the nine variants from there on, eight are clearly behind" in prose
    assert "of the three before it, none" in prose
    back, whole = (-linear.loc[(name, "worst"), "difference"] for name in (order[-1], "Adv-DPNP"))
    assert f"a norm for each class is {back:.1f} points behind" in prose and abs(back - whole) < 0.2
    behind = [linear.loc["Adv-DPNP", metric] for metric in ("clean", "worst")]
    assert all(row["high"] < 0 and row["adjusted"] < 0.05 for row in behind)
    clean, worst = (f"{-row['difference']:.1f}" for row in behind)
    assert f"by {clean} points in clean accuracy and by {worst} in the worst case" in prose
    assert f"by {clean} points clean and {worst} in the worst case" in (ROOT / "README.md").read_text()
    assert {r["seed"] for r in records} == {0, 1, 2}
    free = steps.loc["Adv-DPNP, both branches move it"]
    assert (free["low"] < 0).all() and (free["high"] > 0).all()
    assert "**No gain seen** (figure 3: three seeds)" in (ROOT / "README.md").read_text()


def test_what_is_said_of_overfitting_is_in_the_records(page):
    *_, prose = page
    records = json.loads((RESULTS / "figure4.small.json").read_text())
    seen = {which: {r["method"]: by_seed([r], which)[r["seed"]]["worst"].values.astype(float) for r in records}
            for which in ("best", "last")}
    assert {r["seed"] for r in records} == {0} and len(records) == 9 and "with one seed: there is little" in prose
    lost = {name: seen["best"][name] - seen["last"][name] for name in seen["best"]}
    points = {name: 100 * values.mean() for name, values in lost.items()}
    assert f"no method has lost more than {max(points.values()):.1f} points of its worst case" in prose
    linear, none = "linear, consistency of Adv-DPNP", "Adv-DPNP, no alignment"
    assert f"layer loses {points[linear]:.1f} points, and Adv-DPNP without alignment {points[none]:.1f}." in prose
    aligned = ("Adv-DPNP", "Adv-DPNP, alignment × 10", "Adv-DPNP, × 10, features only")
    pairs = [(none, linear), *((name, none) for name in aligned)]
    found = [paired(lost[name][None] / 2, lost[to][None] / 2) for name, to in pairs]
    assert all(pair["low"] <= 0 <= pair["high"] for pair in found)
    assert f"loses {-2 * found[0]['difference']:.1f} points less" in (ROOT / "nbs/figure4.ipynb").read_text()


def test_what_is_said_of_many_classes_is_in_the_records(page):
    *_, prose = page
    found = [differences(json.loads((RESULTS / f"figure5-{task}.quick.json").read_text()), "dual-branch linear")
             for task in ("classes", "groups", "tenth")]
    ours = [rows[(rows["metric"] == "worst") & (rows["variant"] != "TRADES")].set_index("variant") for rows in found]
    behind = pd.concat(ours)
    less = -behind["difference"][behind["difference"] < 0]
    assert len(behind) == 6 and set(behind["seeds"]) == {3} and len(less) == 5 and behind["difference"].max() == 0
    assert "are behind dual-branch linear in five of six comparisons, and level in one. None is clear" in prose
    alone = behind[behind["adjusted"] < 0.05]
    assert [*alone.index] == ["Adv-DPNP"] and (
        f"{-alone['difference'].item():.1f} points behind (p = {alone['adjusted'].item():.3f})" in prose)
    page5, smallest = (ROOT / "nbs/figure5.ipynb").read_text(), min(holm(behind["p"]))
    assert smallest > 0.05 and f"the smallest adjusted p-value is {smallest:.2f}" in page5
    assert f"by {less.min():.1f} to {less.max():.1f} points, and level in one" in page5
    early = []
    for task in ("classes", "groups", "tenth"):
        tried = pd.read_csv(RESULTS / f"figure5-{task}-search.quick.csv")
        best = tried.groupby(tried["variant"].str.replace(r", (beta|consistency) .*", "", regex=True))["worst"].max()
        early += [best["dual-branch linear"] - best[name] for name in ("Adv-DPNP", "Adv-DPNP, features only")]
    assert f"prototypes are {min(early):.0f} to {max(early):.0f} points behind" in page5
    clean = pd.concat([rows[(rows["metric"] == "clean")] for rows in found])
    assert (clean["low"] < 0).all() and (clean["high"] > 0).all()
    assert not list(RESULTS.glob("figure5-*.small.json")) and "CIFAR-100 has not been run" in prose


def test_what_is_said_of_trust_and_new_classes_is_in_the_records(page):
    *_, prose = page
    rows = pd.read_csv(RESULTS / "figure6.small.csv").set_index(["variant", "metric"])
    networks = {name.split(": ")[0] for name, metric in rows.index if metric == "fooled"}
    assert len(networks) == 3 and {*rows["seeds"]} == {3} and "with three seeds each" in prose
    for network in networks:
        for task in ("wrong", "attacked"):
            scores = {name: r["value"] for (name, metric), r in rows.iterrows()
                      if name.startswith(f"{network}: ") and metric == task}
            assert max(scores, key=scores.get) == f"{network}: softmax"
            assert scores[f"{network}: class mean"] < 52
            ours = rows.loc[(f"{network}: softmax", task)]
            assert ours["low"] <= 0 <= ours["high"]
        for name, metric in rows.index:
            assert metric != "fooled" or 70 < rows.loc[(name, metric), "value"] < 80
    ahead = [rows.loc[(f"{network}: prototype", task), "difference"] for network in networks - {"dual-branch linear"}
             for task in ("wrong", "attacked")]
    assert f"is {min(ahead):.0f} to {max(ahead):.0f} points better than that to the linear layer's nearest" in prose
    foreign = rows.xs("foreign", level=1)
    assert foreign["value"].idxmax() == "dual-branch linear: softmax"
    assert all(r["low"] <= 0 for name, r in foreign.iterrows() if name.endswith(": prototype"))
    others = rows[[metric in ("wrong", "attacked", "foreign", "fooled") and not name.startswith("dual")
                   for name, metric in rows.index]]
    clear = others[[p < 0.05 for p in holm(others["p"])]]
    assert len(others) == 32 and {(name.endswith(": prototype"), metric) for name, metric in clear.index} == {
        (True, "wrong"), (True, "attacked")} and len(clear) == 4 and (clear["difference"] > 0).all()
    ece = [rows.loc[(name, "ECE"), "value"] for name in ("dual-branch linear", "Adv-DPNP", "Adv-DPNP, features only")]
    assert (f"{ece[0]:.1f}% for the linear layer, {ece[1]:.1f}% for Adv-DPNP and {ece[2]:.1f}% for the third" in prose)
    attacked = rows.loc[("Adv-DPNP, features only", "ECE, attacked")]
    assert attacked["adjusted"] > 0.05 and f"that of the third network is {-attacked['difference']:.1f} points" in prose
    new = [(metric, r) for (name, metric), r in rows.iterrows() if ", mean" in metric and name != "dual-branch linear"]
    under = [r for metric, r in new if metric.endswith(", mean, PGD")]
    assert not any(r["low"] > 0 for _, r in new) and len(under) == 12 and sum(r["high"] < 0 for r in under) == 8
    assert all(r["difference"] < 0 for r in under) and "all twelve differences are negative" in prose
    below = [(name, metric.split(",")[0]) for (name, metric), r in rows.iterrows()
             if metric.endswith(", mean, PGD") and name != "dual-branch linear" and r["high"] < 0]
    assert below.count(("Adv-DPNP", "nearest mean")) == 3 and below.count(("Adv-DPNP", "one more row")) == 0
    assert sum(name != "Adv-DPNP" for name, _ in below) == 5 and "five of the third network's six" in prose
