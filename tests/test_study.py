"Studies: variants trained alike, compared on images that none of them has seen."
import dataclasses
import json
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from pages import ROOT, run_page

from advdpnp.attacks import FGSM, PGD
from advdpnp.core import read_json
from advdpnp.data import load_dataset
from advdpnp.evaluation import evaluate, verdicts_in
from advdpnp.methods import PGDAT, TRADES, AdvDPNP, DualBranchLinear
from advdpnp.runs import at_work, make_config
from advdpnp.study import LinearHead, Study, Variant, accuracies, differences, draw_differences, held_out, with_head

RESULTS = ROOT / "data/results"


@pytest.fixture
def study(tmp_path):
    "Two variants, three epochs, 200 digits."
    images = held_out(load_dataset("digits"), 150, 200)
    config = make_config("PGD-AT", "quick", device="cpu", epochs=3, val_size=40)
    net, method = with_head("cifar_resnet8", images, LinearHead), PGDAT(eps=0.2, steps=1)
    variants = {"first": Variant(net, method), "second, faster": Variant(net, method, dict(lr=0.8))}
    return Study("figure0", config, images, variants, "first", tmp_path, torch.device("cpu"), [0, 1],
                 [PGD(0.2, steps=3)])


def same_numbers(a, b):
    gone = ("seconds", "training_seconds", "history")
    clean = lambda r: {k: {**v, "seconds": 0} if k in ("best", "last") else v for k, v in r.items() if k not in gone}
    return clean(a) == clean(b)


@pytest.mark.parametrize("trained", [None, 300])
def test_no_image_is_in_both_parts(trained):
    data = load_dataset("digits")
    images = held_out(data, 200, trained)
    test = {x.tobytes() for x in data.x_test}
    first, second = ({x.tobytes() for x in part} for part in (images.x_train, images.x_test))
    assert not first & second and not (first | second) & test
    assert len(images.x_test) == 200 and len(images.x_train) == (trained or len(data.x_train) - 200)
    shares = [np.bincount(y, minlength=10) / len(y) for y in (data.y_train, images.y_train, images.y_test)]
    assert all(np.abs(share - shares[0]).max() < 0.02 for share in shares)


@pytest.mark.parametrize("compared, trained", [(0, 100), (100, 0), (1000, 1000)])
def test_parts_that_cannot_be(compared, trained):
    with pytest.raises(ValueError, match="to train on and .* to compare with"):
        held_out(load_dataset("digits"), compared, trained)


def test_an_interrupted_run_gives_the_same_record(study, tmp_path):
    whole = study.run("first", 0)
    again, tries = dataclasses.replace(study, data_dir=tmp_path / "again"), 0
    while not (found := again.run("first", 0, deadline=time.monotonic() + 0.05 * (tries + 1))):
        tries += 1
        assert tries < 100
    assert tries and same_numbers(found, whole)
    assert [line["robust"] for line in found["history"]] == [line["robust"] for line in whole["history"]]


def test_best_and_last_epoch_are_measured_each_with_its_weights(study):
    both = dataclasses.replace(study, measured=("best", "last"))
    record = both.run("second, faster", 2)
    for which in both.measured:
        found = evaluate(both.net("second, faster", 2, which), both.images, both.attacks, check_images=100, quiet=True)
        assert found["verdicts"] == record[which]["verdicts"]
    assert record["best"]["verdicts"] != record["last"]["verdicts"]


def test_two_at_a_time_give_the_same_records(study, tmp_path):
    alone = study.records(jobs=1)
    together = dataclasses.replace(study, data_dir=tmp_path / "together").records(jobs=2)
    assert all(same_numbers(a, b) for a, b in zip(alone, together, strict=True))
    assert [(r["method"], r["seed"]) for r in alone] == study.asked


def test_settings_of_a_variant_are_used_and_said(study):
    records = study.records(jobs=1)
    assert [r["trained_with"]["lr"] for r in records] == [study.config["lr"], 0.8] * 2
    assert records[0]["last"]["metrics"] != records[1]["last"]["metrics"]


def test_a_result_with_runs_missing_is_taken_up_elsewhere(study, tmp_path):
    first = dataclasses.replace(study, seeds=[0])
    records = first.records(jobs=1)
    figure = draw_differences(differences(records, "first"), ["clean", "worst"])
    study.write(records, differences(records, "first"), figure)
    names = lambda folder: sorted(p.name for p in (folder / "results").iterdir())
    assert names(tmp_path) == [f"figure0.quick.{end}" for end in ("csv", "json", "png")]
    elsewhere = dataclasses.replace(study, data_dir=tmp_path / "elsewhere")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "results").rename(tmp_path / "elsewhere/results")
    whole = elsewhere.records(jobs=1)
    assert whole[:2] == records and not elsewhere.folder("first", 0).exists()
    elsewhere.write(whole, differences(whole, "first"), figure)
    assert len(read_json(f"{elsewhere.stem}.json")) == 4


def other(study, name="second, faster", **change):
    "The study with something else in one of its variants."
    changed = dataclasses.replace(study.variants[name], **change)
    return dataclasses.replace(study, variants=study.variants | {name: changed})


def without_bias(d, k):
    return LinearHead(d, k, bias=False)


def test_records_of_other_settings_are_not_taken(study):
    records = dataclasses.replace(study, seeds=[0]).records(jobs=1)
    study.write(records, differences(records, "first"), draw_differences(differences(records, "first"), ["clean"]))
    assert [*study.kept()] == study.asked[:2]
    assert dataclasses.replace(study, config=study.config | dict(epochs=4)).kept() == {}
    assert dataclasses.replace(study, measured=("best", "last")).kept() == {}
    for attacks in ([FGSM(0.2)], [PGD(0.2, steps=3, restarts=2)]):
        assert dataclasses.replace(study, attacks=attacks).kept() == {}
    for images in (held_out(load_dataset("digits"), 100, 200), held_out(load_dataset("digits"), 150, 200, after=300)):
        assert dataclasses.replace(study, images=images).kept() == {}
    head = with_head("cifar_resnet8", study.images, without_bias)
    for change in (dict(settings=dict(lr=0.4)), dict(settings={}), dict(method=TRADES(eps=0.2)), dict(net=head),
                   dict(settings=dict(lr=0.8, val_size=50))):
        assert [*other(study, **change).kept()] == [("first", 0)]


def test_a_run_that_was_measured_otherwise_is_measured_again(study):
    before = study.run("first", 0)
    again = dataclasses.replace(study, attacks=[PGD(0.2, steps=4)], measured=("best", "last"))
    after = again.run("first", 0)
    assert again.is_of(after) and not study.is_of(after) and not again.is_of(before)
    assert after["history"] == before["history"]
    assert dataclasses.replace(study, measured=()).run("first", 0) == after  # nothing to measure: nothing is written


def test_a_run_that_fails_leaves_the_others(study, capsys):
    failing = other(study, settings=dict(lr=1e9))
    with pytest.raises(TimeoutError, match="nothing can be compared yet: 2 of 4 runs are done"):
        failing.records(jobs=1)
    assert {*failing.failed} == {("second, faster", 0), ("second, faster", 1)}
    assert "second, faster s0 failed: the " in capsys.readouterr().out
    assert all(failing.folder("first", seed).joinpath("result.json").exists() for seed in (0, 1))


def test_a_run_is_one_process_s_at_a_time(study):
    with at_work(study.folder("first", 0)), pytest.raises(RuntimeError, match="another process is at work on"):
        study.run("first", 0)
    assert study.run("first", 0)["seed"] == 0


def test_a_run_that_is_not_begun_claims_no_folder(study):
    with pytest.raises(TimeoutError, match="0 of 4 runs"):
        study.records(jobs=1, minutes=1e-6)
    assert not study.folder("first", 0).exists()


@pytest.mark.parametrize("jobs", [0, -1, "two", 1.5])
def test_jobs_that_cannot_be(study, jobs):
    with pytest.raises(ValueError, match="jobs is .*expected"):
        study.records(jobs=jobs)


def test_fewer_seeds_lose_no_record(study):
    records = study.records(jobs=1)
    for asked in (study, dataclasses.replace(study, seeds=[1])):
        rows = differences(found := asked.records(jobs=1), "first")
        assert found == records
        asked.write(found, rows, draw_differences(rows, ["clean"]))
    assert len(study.kept()) == 4


def test_what_cannot_be_compared_is_said(study):
    study.run("first", 0)
    study.run("second, faster", 1)
    with pytest.raises(TimeoutError, match="nothing can be compared yet: 2 of 4 runs are done"):
        study.records(jobs=1, minutes=1e-6)


def test_a_folder_of_another_variant_is_refused(study):
    study.run("first", 0)
    changed = {"first": dataclasses.replace(study.variants["first"], method=PGDAT(eps=0.1, steps=1))}
    with pytest.raises(ValueError, match="holds another run: method"):
        dataclasses.replace(study, variants=changed).run("first", 0)


def test_seeds_that_only_one_has_are_left_out(study):
    records = study.records(jobs=1)
    fewer = records[:3]  # the second variant has seed 0 alone
    rows = differences(fewer, "first")
    assert {*rows["seeds"]} == {1}
    pd.testing.assert_frame_equal(rows, differences(records[:2], "first"))
    assert accuracies(fewer)["seeds"].tolist() == [2, 1]


def test_differences_are_those_of_the_verdicts(study):
    records = study.records(jobs=1)
    rows = differences(records, "first").set_index("metric")
    name = next(k for k in verdicts_in(records[0]["last"]) if k.startswith("pgd"))
    right = [verdicts_in(r["last"])[name].double().mean().item() for r in records]
    assert rows.loc[name, "difference"] == pytest.approx(50 * (right[1] - right[0] + right[3] - right[2]))
    assert rows.loc[name, "low"] <= rows.loc[name, "difference"] <= rows.loc[name, "high"]


def test_all_variants_have_the_same_backbone():
    images = held_out(load_dataset("digits"), 100, 100)
    heads = LinearHead, lambda d, k: LinearHead(d, k, bias=False)
    nets = [with_head("cifar_resnet8", images, head)(3) for head in heads]
    states = [net.backbone.state_dict() for net in nets]
    assert all(torch.equal(a, b) for a, b in zip(states[0].values(), states[1].values(), strict=True))


def test_a_linear_head_trains_in_the_precision_of_prototypes(batch):
    "Under bfloat16, logits of both heads are float32: otherwise a study would compare number types."
    x, y = batch
    images = held_out(load_dataset("digits"), 100, 100)
    net = with_head("cifar_resnet8", images, LinearHead)(0)
    settings = dict(eps=0.2, consistency=3.0)
    with torch.autocast("cpu", torch.bfloat16):
        losses = [method.loss(net.eval(), x, x.flip(0), y)[0].item() for method in (
            DualBranchLinear(**settings), AdvDPNP(**settings, alignment=0.0, repulsion=0.0, clean_only_update=False))]
        assert net.head(net.features(x)).dtype == net.head(net.features(x), detach=True).dtype == torch.float32
    assert losses[0] == losses[1]


def test_a_linear_head_can_be_held_constant(batch):
    x, y = batch
    images = held_out(load_dataset("digits"), 100, 100)
    net = with_head("cifar_resnet8", images, LinearHead)(0).eval()
    moved = lambda **settings: torch.autograd.grad(
        AdvDPNP(eps=0.2, alignment=0.0, repulsion=0.0, **settings).loss(net, x, (x + 0.1).clamp(0, 1), y)[0],
        [net.head.weight, net.head.bias])
    logits = net(x)
    clean = torch.autograd.grad(torch.nn.functional.cross_entropy(logits, y), [net.head.weight, net.head.bias])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(moved(), clean))
    assert not any(torch.allclose(a, b, rtol=0.1, atol=0) for a, b in zip(moved(clean_only_update=False), clean))


@pytest.mark.parametrize("page", ["figure3", "figure4", "figure6"])
def test_pages_of_studies_say_that_time_was_too_short(page, tmp_path):
    with pytest.raises(TimeoutError, match="nothing can be compared yet: 0 of"):
        run_page(page, data_dir=str(tmp_path), preset="quick", minutes=0.0001, jobs=1, device="cpu")


def test_each_task_of_a_page_says_that_time_was_too_short(tmp_path, capsys):
    with pytest.raises(TimeoutError, match="no task can be compared yet: the same command goes on"):
        run_page("figure5", data_dir=str(tmp_path), preset="quick", minutes=0.0001, jobs=1, device="cpu")
    said = capsys.readouterr().out.splitlines()
    assert [line.split(": ")[0] for line in said] == ["classes", "groups", "tenth"]
    assert all("nothing can be compared yet: 0 of 16 runs are done" in line for line in said)


@pytest.mark.parametrize("page, files", [
    ("figure4", {"figure4": 9}),
    ("figure5", {f"figure5-{task}{end}": n for task in ("classes", "groups", "tenth")
                 for end, n in (("", 4), ("-search", 16))})])
def test_pages_of_studies_write_what_they_find(page, files, tmp_path, monkeypatch):
    kept = read_json(RESULTS / "figure3.quick.json")

    def made_up(study, name, seed, deadline):
        first, second = (kept[(len(name) + seed + more) % len(kept)] for more in (0, 1))
        return first | dict(method=name, seed=seed, best=second["last"])

    monkeypatch.setattr(Study, "run", made_up)
    run_page(page, data_dir=str(tmp_path), preset="quick", jobs=1, device="cpu")
    for name, variants in files.items():
        records = read_json(tmp_path / f"results/{name}.quick.json")
        assert len({r["method"] for r in records}) == variants
        assert len(records) == variants * (1 if name.endswith("search") else 3)
        assert {*pd.read_csv(tmp_path / f"results/{name}.quick.csv")["variant"]} <= {r["method"] for r in records}
        assert (tmp_path / f"results/{name}.quick.png").stat().st_size > 5000


@pytest.mark.parametrize("path", sorted(RESULTS.glob("figure3.*.json")), ids=lambda p: p.name)
def test_kept_differences_are_those_of_the_records(path):
    kept, records = pd.read_csv(path.with_suffix(".csv")), read_json(path)
    today = differences(records, "dual-branch linear")
    pd.testing.assert_frame_equal(kept, today, check_exact=False, rtol=1e-6)
    for record in records:
        assert all(len(v) == record["last"]["n"] for v in verdicts_in(record["last"]).values())
        assert len(record["history"]) == record["epochs"] and json.dumps(record)
        assert Path(record["config"]["dataset"]).name == record["config"]["dataset"]


@pytest.mark.parametrize("path", sorted(RESULTS.glob("figure[3-6]*.json")), ids=lambda p: p.name)
def test_records_of_studies_name_a_clean_commit_and_a_processor(path):
    for record in read_json(path):
        assert record["commit"] and not record["commit"].endswith("-dirty") and record["processor"]
    assert len({(r["method"], r["seed"]) for r in read_json(path)}) == len(read_json(path))
