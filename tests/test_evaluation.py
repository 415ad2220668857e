"Evaluations and their records, of linear models that are fitted in one step."
import dataclasses
import json
import linecache
import math
import runpy
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from advdpnp.attacks import CW, FGSM, PGD
from advdpnp.autoattack import AutoAttack
from advdpnp.data import Loader
from advdpnp.evaluation import (OtherEvaluation, Resume, accuracy, as_dataset, check_table, evaluate, make_plan,
                                images_of, packed, percent, report, robustbench_info, standard_attacks, unpacked,
                                verdicts_in, wilson)
from advdpnp.sanity import failed, slack

RESULTS = Path(__file__).parent.parent / "data/results"


def fitted(digits):
    "A linear classifier of the digits."
    x, y = Loader(digits.x_train, digits.y_train, 1).take(torch.arange(len(digits.y_train)))
    ones = torch.ones(len(x), 1)
    target = 10 * nn.functional.one_hot(y, 10).float()
    inputs = torch.cat([x.flatten(1), ones], 1).double()
    weight = torch.linalg.solve(inputs.T @ inputs + torch.eye(65), inputs.T @ target.double()).float()
    linear = nn.Linear(64, 10)
    linear.load_state_dict(dict(weight=weight[:-1].T.contiguous(), bias=weight[-1]))
    return nn.Sequential(nn.Flatten(), linear).eval()


@pytest.fixture
def model(digits):
    return fitted(digits)


class Invert:
    "Somebody's attack: RobustBench's conventions, and no more."
    eps, name = 1.0, "invert"

    def __init__(self, strength=1.0):
        self.strength = strength

    def __call__(self, model, x, y):
        return x + self.strength * (1 - 2 * x)


@pytest.mark.parametrize("k, n", [(0, 1), (1, 1), (0, 500), (3, 500), (250, 500), (499, 500), (8231, 10000)])
def test_wilson_is_the_formula(k, n):
    p, z = k / n, 1.959964
    middle, half = p + z**2 / (2 * n), z * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    expected = np.clip([(middle - half) / (1 + z**2 / n), (middle + half) / (1 + z**2 / n)], 0, 1)
    assert wilson(k, n) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("correct, n", [(1, 0), (-1, 5), (6, 5)])
def test_no_proportion(correct, n):
    with pytest.raises(ValueError, match="is no proportion"):
        wilson(correct, n)


def test_record_adds_up_and_the_model_is_untouched(model, digits):
    model.train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    record = evaluate(model, digits, [FGSM(0.1), PGD(0.1, steps=3)], images=100, quiet=True)
    assert model.training and all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert json.loads(json.dumps(record)) == record
    assert record["n"] == 100 and record["data_sha256"] == digits.sha256
    metrics = record["metrics"]
    assert list(metrics) == list(verdicts_in(record)) == ["clean", "fgsm", "pgd3", "worst"]
    for name, m in metrics.items():
        assert m["accuracy"] == m["correct"] and m["low"] <= m["accuracy"] <= m["high"] and m["n"] == 100
        assert m == accuracy(verdicts_in(record)[name]) | {k: m[k] for k in m.keys() & {"attack"}}
    lower = min(metrics["fgsm"]["accuracy"], metrics["pgd3"]["accuracy"])
    assert metrics["worst"]["accuracy"] <= lower <= metrics["clean"]["accuracy"]
    assert metrics["pgd3"]["attack"] == dict(name="pgd3", images=100, eps=0.1, step_size=0.025, steps=3,
                                             random_start=True, restarts=1, norm="linf", seed=0) | {"class": "PGD"}
    names = [check["name"] for check in record["checks"]]
    assert len(set(names)) == len(names) >= 12
    assert "evaluation mode" in failed(record["checks"])  # it was given in training mode


def test_worst_case_is_taken_image_by_image(digits):
    "Two attacks that break different halves: each leaves 50%, together they leave nothing."

    class Right(nn.Module):
        "Always right on the images it is given, unless their first pixel is at its largest."
        def __init__(self):
            super().__init__()
            self.labels = torch.from_numpy(digits.y_test)
            self.images = torch.from_numpy(digits.x_test).permute(0, 3, 1, 2).float().div(255)

        def forward(self, x):
            nearest = torch.cdist(x.flatten(1)[:, 1:], self.images.flatten(1)[:, 1:]).argmin(1)
            right = nn.functional.one_hot(self.labels[nearest], 10).float()
            return torch.where((x[:, 0, 0, 0] >= 0.5)[:, None], right.roll(1, 1), right)

    class Half(PGD):
        def search(self, still, x, y, draws):
            x = x.clone()
            hit = y % 2 == self.seed
            x[hit, 0, 0, 0] = 0.5
            return x

    class Odd(Half):
        name = "odd"

    class Even(Half):
        name = "even"

    metrics = evaluate(Right(), digits, [Even(0.5, seed=0), Odd(0.5, seed=1)], images=100, quiet=True)["metrics"]
    assert metrics["clean"]["accuracy"] == 100
    assert metrics["even"]["correct"] + metrics["odd"]["correct"] == 100 and 30 < metrics["even"]["correct"] < 70
    assert metrics["worst"]["correct"] == 0


def test_sanity_checks_are_of_the_attack_in_the_record(model, digits, monkeypatch):
    trusted = []
    monkeypatch.setattr("advdpnp.sanity.sanity",
                        lambda model, few, seen, attack, *rest: trusted.append(attack) or {})
    slow = PGD(0.1, step_size=0.01)
    for attacks in ([FGSM(0.1), slow, CW(0.1)], [PGD(0.05, steps=3), slow], [FGSM(0.3, norm="l2")]):
        evaluate(model, digits, attacks, images=5, quiet=True)
    assert trusted == [slow, slow, PGD(0.3, norm="l2")]


def test_autoattack_on_fewer_images(model, digits):
    record = evaluate(model, digits, [PGD(0.1, steps=3), AutoAttack(0.1, steps=3, queries=10)], images=90,
                      limits=dict(autoattack=30), quiet=True)
    counts = dict(clean=90, pgd3=90, autoattack=30, worst=30)
    assert {name: m["n"] for name, m in record["metrics"].items()} == counts
    assert {name: len(v) for name, v in verdicts_in(record).items()} == counts
    assert list(record["metrics"]["autoattack"]["stages"]) == ["apgd-ce", "apgd-t", "fab-t", "square"]
    assert record["metrics"]["worst"]["correct"] <= record["metrics"]["autoattack"]["correct"]
    assert "worst is over the 30 that all attacks saw" in report(record)  # never silently


def test_anyone_s_attack_and_anyone_s_model(digits):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).eval()
    record = evaluate(model, digits, [Invert(), *standard_attacks(0.1)[:3]], images=50, quiet=True)
    assert list(record["metrics"]) == ["clean", "invert", "fgsm", "pgd20", "cw", "worst"]


def test_anyone_s_images(model, digits):
    x, y = Loader(digits.x_test, digits.y_test, 1).take(torch.arange(30))
    y = y.clamp(max=8)  # no image of the last class: the model says how many there are
    ours = evaluate(model, (digits.x_test[:30], y.numpy()), [FGSM(0.1)], quiet=True)
    for pair in ((x, y), (x.numpy(), y.numpy()), (x.double(), y.int())):
        theirs = evaluate(model, pair, [FGSM(0.1)], quiet=True)
        assert theirs["verdicts"] == ours["verdicts"] and theirs["data_sha256"] == ours["data_sha256"]


class Items(torch.utils.data.Dataset):
    "Somebody's data set, which gives pictures."
    def __init__(self, x, y):
        self.x, self.y = x, y

    def __len__(self):
        return len(self.y)

    def __getitem__(self, i):
        return PIL.Image.fromarray(self.x[i, ..., 0]), int(self.y[i])


def test_images_and_labels_come_in_many_kinds(model, digits):
    x8, y = digits.x_test[:30], digits.y_test[:30]
    x = torch.from_numpy(x8).permute(0, 3, 1, 2) / 255
    ours = as_dataset((x8, y), model)
    tensors = torch.utils.data.TensorDataset(x, torch.from_numpy(y))
    for given in ((x.half(), y), (x.double(), y), (x8.transpose(0, 3, 1, 2), y.tolist()),
                  (torch.from_numpy(x8), torch.from_numpy(y).to(torch.uint8)), [x8 / 255, np.eye(10)[y]],
                  (x * (1 + 1e-7) - 3e-8, y.astype(float)), ([*x], y), tensors, Items(x8, y),
                  torch.utils.data.DataLoader(tensors, 7), [(x[:2], y[:2]), (x[2:], y[2:])], Loader(x8, y, 4),
                  ((x[i : i + 4], y[i : i + 4]) for i in range(0, 30, 4))):
        assert as_dataset(given, model).sha256 == ours.sha256
    four = torch.rand(2, 4, 8, 8)
    flat = nn.Sequential(nn.Flatten(), nn.Linear(256, 10)).eval()
    assert as_dataset((four, [0, 1]), flat).sha256 == as_dataset(
        ((255 * four).round().to(torch.uint8).permute(0, 2, 3, 1).numpy(), [0, 1]), flat).sha256
    shuffled = torch.utils.data.DataLoader(tensors, 7, shuffle=True)
    before = torch.get_rng_state()
    assert as_dataset(shuffled, model).sha256 == as_dataset(shuffled, model).sha256 != ours.sha256
    assert torch.equal(torch.get_rng_state(), before)


IMAGES, LABELS = torch.rand(4, 1, 8, 8), [0, 1, 2, 3]


@pytest.mark.parametrize("data, message", [
    ((255 * IMAGES, LABELS), "images range from .*: expected floats in .0, 1., so divide by 255"),
    ((IMAGES - 0.5, LABELS), "normalise inside the model"),
    ((IMAGES + torch.tensor([0, 0, 0, float("nan")])[:, None, None, None], LABELS), "images are not numbers .NaN."),
    (((IMAGES > 0.5).to(torch.uint8), LABELS), "not multiplied by 255"),
    (((IMAGES > 2).to(torch.uint8), LABELS), "not multiplied by 255"),
    (((255 * IMAGES).long(), LABELS), r"images are int64 of shape \(4, 1, 8, 8\): expected floats in"),
    ((IMAGES[0], LABELS), r"images are float32 of shape \(1, 8, 8\)"),
    ((torch.rand(4, 8, 8), LABELS), r"images are float32 of shape \(4, 8, 8\)"),
    ((torch.rand(4, 3, 8, 1), LABELS), r"of shape \(4, 3, 8, 1\): expected"),
    ((IMAGES[:0], []), r"of shape \(0, 1, 8, 8\): expected"),
    ((IMAGES, LABELS[:3]), r"y_test is int64 \(3,\), expected int64 \(4,\)"),
    ((IMAGES, [1, 2, 10, 4]), "labels from 1 to 10, expected 0 to 9: they count from 0, so subtract 1"),
    ((IMAGES, [0, -1, 2, 4]), "labels from -1 to 4, expected 0 to 9"),
    ((IMAGES, [0.5, 1, 2, 3]), "labels are float64 of shape .4,.: expected whole numbers of shape .4,."),
    ((IMAGES, ["a", "b", "c", "d"]), "labels are <U1"),
    ((IMAGES, np.full((4, 10), 0.1)), r"labels are float64 of shape \(4, 10\)"),
    ("cifar10", "the data set is 'cifar10', the name of one, which load_dataset takes"),
    (IMAGES, "the data set is Tensor: expected a Dataset, a pair"),
    (dict(x=IMAGES, y=LABELS), "the data set is dict"),
    ([(IMAGES, LABELS, LABELS)], "a batch of the data set is tuple"),
    (torch.utils.data.TensorDataset(IMAGES, IMAGES, IMAGES), "a batch of the data set is tuple"),
    ([], "gives no batches"),
    ([(IMAGES, LABELS), (torch.rand(4, 1, 9, 9), LABELS)], "images are of the shapes .8, 8, 1., .9, 9, 1."),
], ids=lambda value: None)
def test_data_that_cannot_be_right(model, data, message):
    with pytest.raises(ValueError, match=message):
        evaluate(model, data, quiet=True)


def by_class(digits):
    "The test images of digits sorted by class."
    order = np.argsort(digits.y_test, kind="stable")
    return replace(digits, x_test=digits.x_test[order], y_test=digits.y_test[order])


def test_a_subset_has_every_class_and_a_smaller_one_lies_inside(model, digits):
    data = by_class(digits)
    how = dict(attacks=[FGSM(0.1), PGD(0.1, steps=2)], quiet=True, check_images=10)
    large, small = (evaluate(model, data, images=n, **how) for n in (50, 20))
    places = images_of(large, data)
    assert np.bincount(data.y_test[places]).tolist() == [5] * 10
    assert np.array_equal(images_of(small, data), places[:20])
    right = verdicts_in(large)["clean"].tolist()
    assert verdicts_in(small)["clean"].tolist() == right[:20]
    assert large["subset"] == dict(order="stratified", seed=0, of=500) and large["remarks"] == []
    limited = evaluate(model, data, limits=dict(pgd2=20), **how)
    assert np.array_equal(images_of(limited, data)[:50], places) and limited["n"] == 500
    verdicts = verdicts_in(limited)
    assert verdicts["clean"][:50].tolist() == right and len(verdicts["worst"]) == 20
    whole = evaluate(model, data, **how)
    assert whole["subset"] is None and np.array_equal(images_of(whole, data), np.arange(500))
    assert verdicts_in(whole)["clean"][places].tolist() == right
    with pytest.raises(ValueError, match="the record is of other data than digits"):
        images_of(whole, digits)
    before = {key: value for key, value in small.items() if key not in ("subset", "remarks")}  # of an earlier version
    assert np.array_equal(images_of(before, data), np.arange(20)) and report(before)


def test_a_subset_that_lacks_classes_says_so(model, digits):
    record = evaluate(model, by_class(digits), [FGSM(0.1), PGD(0.1, steps=1)], images=20, limits=dict(pgd1=8),
                      quiet=True)
    said, = record["remarks"]
    assert said.startswith("The 8 of 500 test images that are used have none of class ") and said in report(record)


def test_a_model_that_always_says_the_same_is_at_chance(digits):
    class Lazy(nn.Module):
        def forward(self, x):
            return 0.01 * x.flatten(1)[:, :10] + torch.eye(10)[0]

    data = by_class(digits)
    record = evaluate(Lazy().eval(), data, [FGSM(0.01), PGD(0.01)], images=50, quiet=True)
    assert {m["accuracy"] for m in record["metrics"].values()} == {10}
    chance = 100 * np.bincount(data.y_test).max() / 500
    few = evaluate(Lazy().eval(), data, [FGSM(0.01)], images=1, quiet=True)
    budget, = (check for check in few["checks"] if check["name"] == "budget")
    assert f"down to {min(100, chance + slack(1)):.1f}%" in budget["expected"]


def test_a_budget_wider_than_all_images(model, digits):
    with pytest.raises(ValueError, match="eps is 128.*: no two images of 64 pixels are further apart than 8"):
        evaluate(model, digits, [PGD(128, norm="l2")], quiet=True)


def test_numbers_of_other_libraries(model, digits):
    record = evaluate(model, digits, [FGSM(0.1)], images=np.int64(20), limits=dict(fgsm=np.int32(10)),
                      check_images=np.int64(5), batch_size=np.int64(7), quiet=True)
    assert json.loads(json.dumps(record)) == record and record["metrics"]["fgsm"]["n"] == 10


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("compiled", [torch.jit.script, lambda net: torch.jit.freeze(torch.jit.script(net))],
                         ids=["TorchScript", "frozen"])
def test_a_compiled_model_is_attacked_as_the_model(digits, compiled):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 10)).eval()
    ours, theirs = (evaluate(model, digits, standard_attacks(0.02)[:2], images=50, quiet=True)["verdicts"]
                    for model in (net, compiled(net)))
    assert ours == theirs


def test_a_model_that_cannot_be_copied_is_left_as_it_was(digits):
    class Alone(nn.Sequential):
        def __deepcopy__(self, memo):
            raise TypeError("there is one of me")

    net = Alone(*fitted(digits)).train()
    ours, theirs = (evaluate(model, digits, [FGSM(0.1)], images=50, quiet=True) for model in (fitted(digits), net))
    assert ours["copied"] and not theirs["copied"]
    assert ours["verdicts"] == theirs["verdicts"] and net.training and all(p.requires_grad for p in net.parameters())


def test_everything_runs_in_true_float32(digits):
    class Watching(nn.Module):
        seen = set()

        def __init__(self):
            super().__init__()
            self.net = fitted(digits)

        def forward(self, x):
            Watching.seen.add((torch.backends.cudnn.conv.fp32_precision, torch.is_autocast_enabled("cpu")))
            return self.net(x)

    before = torch.backends.cudnn.conv.fp32_precision
    try:
        torch.backends.cudnn.conv.fp32_precision = "tf32"
        with torch.autocast("cpu"):
            evaluate(Watching().eval(), digits, [PGD(0.1, steps=2)], images=20, twin=Watching().eval(), quiet=True)
        assert torch.backends.cudnn.conv.fp32_precision == "tf32" and Watching.seen == {("ieee", False)}
    finally:
        torch.backends.cudnn.conv.fp32_precision = before


def test_a_model_that_is_right_nowhere(model, digits):
    with torch.no_grad():
        model[1].bias[3] += 1000
    attacks = [FGSM(0.1), PGD(0.1), AutoAttack(0.1, steps=3, queries=5)]
    record = evaluate(model, replace(digits, y_test=digits.y_test * 0), attacks, images=20, quiet=True)
    assert {m["correct"] for m in record["metrics"].values()} == {0}


@pytest.mark.parametrize("settings, message", [
    (dict(images=0), "images is 0: expected at least 1"),
    (dict(images=-490), "images is -490"),
    (dict(batch_size=0), "batch_size is 0"),
    (dict(check_images=0), "check_images is 0"),
    (dict(limits=dict(fgsm=-3)), "the limit of fgsm is -3"),
    (dict(limits=dict(pgd=3)), "unknown attack with a limit 'pgd'"),
    (dict(attacks=[FGSM(0.1), FGSM(0.2)]), "attacks named fgsm, fgsm: expected different names"),
    (dict(attacks=[FGSM(0.0)]), "eps is 0: nothing to attack with"),
    (dict(twin=nn.Sequential(nn.Flatten(), nn.Linear(64, 7))), "the twin has another number of classes"),
])
def test_arguments_that_do_not_go_together(model, digits, settings, message):
    with pytest.raises(ValueError, match=message):
        evaluate(model, digits, **dict(attacks=[FGSM(0.1)], quiet=True) | settings)


@pytest.mark.parametrize("name", ["clean", "worst"])
def test_an_attack_that_would_spoil_the_record(model, digits, name):
    attack = type("Spoiler", (FGSM,), dict(name=name))(0.1)
    with pytest.raises(ValueError, match=f"an attack is named {name}"):
        evaluate(model, digits, [attack], images=20, quiet=True)


def test_a_model_that_would_spoil_the_record(model, digits):
    model[1].weight.data[0] = float("nan")
    with pytest.raises(ValueError, match="logits are not finite for 20 of 20 test images"):
        evaluate(model, digits, [FGSM(0.1)], images=20, quiet=True)


KILLED = """
import sys, time
sys.path.insert(0, sys.argv[2])
import advdpnp.evaluation
from test_evaluation import fitted, how
from advdpnp.data import load_dataset

def write_and_wait(path, value, write=advdpnp.evaluation.write_json):
    write(path, value)
    if value["stages"].get("autoattack/apgd-t", [0])[0] == 1:
        time.sleep(60)

advdpnp.evaluation.write_json = write_and_wait
digits = load_dataset("digits")
advdpnp.evaluation.evaluate(fitted(digits), digits, **how, resume=sys.argv[1])
"""
how = dict(attacks=[AutoAttack(0.07, steps=3, targets=2, queries=20)], images=24, batch_size=6, quiet=True)


def test_killed_it_goes_on_from_its_state_file(model, digits, tmp_path):
    state, stages = tmp_path / "state", {}
    killed = subprocess.Popen([sys.executable, "-c", KILLED, state, Path(__file__).parent])
    while stages.get("autoattack/apgd-t", [0])[0] < 1:
        assert killed.poll() is None
        time.sleep(0.05)
        stages = json.loads(state.read_text())["stages"] if state.exists() else {}
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    resumed, whole = evaluate(model, digits, **how, resume=state), evaluate(model, digits, **how)
    assert list(json.loads(state.read_text())["stages"]) == [f"autoattack/{s.name}" for s in how["attacks"][0].stages]
    assert resumed["metrics"] == whole["metrics"] and resumed["verdicts"] == whole["verdicts"]
    assert 0 < whole["metrics"]["autoattack"]["correct"] < whole["metrics"]["clean"]["correct"]


def test_a_state_file_of_another_evaluation_is_refused(model, digits, tmp_path):
    first = dict(attacks=[Invert(0.0)], images=100, resume=tmp_path / "state", quiet=True)
    evaluate(model, digits, **first)
    for changed in (dict(seed=1), dict(images=90), dict(attacks=[FGSM(0.1)]), dict(attacks=[Invert(0.5)])):
        with pytest.raises(OtherEvaluation, match="is of another evaluation"):
            evaluate(model, digits, **first | changed)
    with torch.no_grad():
        model[1].bias[0] += 1
    with pytest.raises(OtherEvaluation, match=r"another evaluation \(logits, probe differ\): move it away"):
        evaluate(model, digits, **first)


def test_verdicts_of_a_model_that_only_looks_the_same_are_not_taken_up(model, digits, tmp_path):
    "The same logits on clean images: one has no gradient, one breaks under noise."
    class Cut(nn.Module):
        def forward(self, x):
            return model(x.detach())

    class Brittle(nn.Module):
        def forward(self, x):
            return model(x) * (1 if torch.equal(x, (x * 255).round() / 255) else -1)

    first = dict(attacks=[PGD(0.1)], images=40, resume=tmp_path / "state", quiet=True)
    evaluate(model, digits, **first)
    for other in (Cut(), Brittle()):
        with pytest.raises(OtherEvaluation, match=r"\(probe differ\)"):
            evaluate(other, digits, **first)


def test_verdicts_of_an_attack_whose_code_has_changed_are_not_taken_up(model, digits, tmp_path):
    (tmp_path / "theirs.py").write_text("def attack(model, x, y):\n    return x\n\nattack.eps = 0.1\n")
    first = dict(images=40, resume=tmp_path / "state", quiet=True)
    load = lambda: runpy.run_path(str(tmp_path / "theirs.py"))["attack"]
    evaluate(model, digits, [load()], **first)
    (tmp_path / "theirs.py").write_text("def attack(model, x, y):\n    return 1 - x\n\nattack.eps = 0.1\n")
    linecache.checkcache()
    with pytest.raises(OtherEvaluation, match=r"\(code differ\)"):
        evaluate(model, digits, [load()], **first)


def test_a_deadline_stops_after_the_batch_with_everything_kept(model, digits, tmp_path):
    with pytest.raises(TimeoutError, match="time is up in fgsm: .*state goes on from there"):
        evaluate(model, digits, [FGSM(0.1), PGD(0.1)], images=60, batch_size=20, resume=tmp_path / "state",
                 deadline=time.monotonic(), quiet=True)
    kept = Resume(tmp_path / "state", json.loads((tmp_path / "state").read_text())["key"])
    assert kept.begin("fgsm")[0] == 1 and kept.begin("pgd20") == (0, None) and kept.seconds > kept.before > 0
    with pytest.raises(TimeoutError, match="time is up before the sanity checks"):
        evaluate(model, digits, images=60, deadline=time.monotonic(), quiet=True)


def test_attacks_from_an_iterator_or_none(model, digits):
    found = evaluate(model, digits, iter([FGSM(0.1)]), images=20, quiet=True)
    assert list(found["metrics"]) == ["clean", "fgsm", "worst"] and "checks" in found
    assert list(evaluate(model, digits, images=20, quiet=True)["metrics"]) == ["clean"]


def test_an_ensemble_of_one_s_own_is_called_as_it_is(model, digits):
    class Ensemble(Invert):
        attacks = [FGSM(0.1)]

    record = evaluate(model, digits, [Ensemble(0.0)], images=20, quiet=True)
    assert record["metrics"]["invert"]["correct"] == record["metrics"]["clean"]["correct"]
    assert {check["name"]: check["passed"] for check in record["checks"]}["square"] is None


def test_robustbench_entry_is_of_the_standard_attack_on_the_whole_test_set(model, digits):
    attack = AutoAttack(8 / 255, steps=3, queries=5)
    record = evaluate(model, digits, [attack], images=30, quiet=True)
    with pytest.raises(ValueError, match="AutoAttack was run on 30 of 500 test images"):
        robustbench_info(record, "", "", "")
    whole = record | dict(subset=None)  # as if there were no more
    with pytest.raises(ValueError, match="not the standard AutoAttack: steps is 3 there, 100 here; queries is 5"):
        robustbench_info(whole, "", "", "")
    whole["metrics"]["autoattack"]["attack"] |= dict(steps=100, queries=5000)
    info = robustbench_info(whole, "A paper", "Some One", "ResNet-8")
    assert set(info) == {"link", "name", "authors", "additional_data", "number_forward_passes", "dataset",
                         "venue", "architecture", "eps", "clean_acc", "reported", "autoattack_acc"}
    assert info["eps"] == "8/255" and float(info["autoattack_acc"]) <= float(info["clean_acc"])
    with pytest.raises(ValueError, match="the record has clean: RobustBench needs autoattack"):
        robustbench_info(dict(metrics=dict(clean=record["metrics"]["clean"])), "", "", "")


@pytest.mark.parametrize("name", ["table1.quick.json", "table1.small.json"])
def test_records_made_before_are_read(name):
    record = json.loads((RESULTS / name).read_text())[-1]["best"]
    text = report(record)
    assert f"| clean | {record['metrics']['clean']['accuracy']:.2f} |" in text and "… after square" in text
    assert check_table(record["checks"])[0] in text


def test_tradeoff_records_made_before_are_read():
    record = json.loads((RESULTS / "figure2.quick.json").read_text())[0]
    for name in ("clean", "worst"):
        assert percent(verdicts_in(record)[name]) == pytest.approx(record[name]["accuracy"])


def test_verdicts_of_ten_thousand_images_are_small_and_stand_last(model, digits):
    verdicts = torch.rand(10_000) < 0.5
    assert 10 * len(packed(verdicts)) < 20_000  # clean, eight attacks, the worst case
    record = evaluate(model, digits, [FGSM(0.1)], images=20, quiet=True)
    assert [*record][-1] == "verdicts" and "\n" not in record["verdicts"]


@pytest.mark.parametrize("text", ["3:", "3:gA", "3:gA==gA==", "-3:gA==", "3:gAA=", "012", "x:gA==", "1e3:gA=="])
def test_damaged_verdicts_are_not_read(text):
    with pytest.raises(ValueError, match="verdicts"):
        unpacked(text)


@dataclasses.dataclass
class WithFunction:
    "Somebody's attack, with a function among its settings."
    eps: float = 0.2
    loss: object = F.cross_entropy
    name = "mine"

    def __call__(self, model, x, y):
        return x


def test_an_attack_of_somebody_else_may_hold_a_function(model, digits):
    record = evaluate(model, digits, [WithFunction()], images=20, check_images=5, quiet=True)
    attack = json.loads(json.dumps(record))["metrics"]["mine"]["attack"]
    assert attack["eps"] == 0.2 and "loss" not in attack


def test_no_limit_is_no_limit(digits):
    assert make_plan(digits, [FGSM(0.2)], limits=dict(fgsm=None)).limits["fgsm"] == len(digits.x_test)


def test_a_loader_with_a_generator_of_its_own_is_read_alike(model, digits):
    pairs = torch.utils.data.TensorDataset(torch.from_numpy(digits.x_test[:40]).permute(0, 3, 1, 2) / 255,
                                           torch.from_numpy(digits.y_test[:40]))
    loader = torch.utils.data.DataLoader(pairs, 8, shuffle=True, generator=torch.Generator().manual_seed(3))
    assert len({evaluate(model, loader, quiet=True)["data_sha256"] for _ in range(2)}) == 1


def test_budgets_that_differ_are_remarked(model, digits):
    record = evaluate(model, digits, [FGSM(0.1), PGD(0.5, norm="l2", steps=2)], images=20, check_images=5,
                      quiet=True)
    assert record["remarks"] == ["The sanity checks are of the budget 0.5 in l2 alone."]


def test_a_twin_of_other_images_is_called_the_twin(model, digits):
    with pytest.raises(ValueError, match="the twin cannot be asked about these images"):
        evaluate(model, digits, [FGSM(0.2)], images=20, twin=nn.Conv2d(3, 10, 8), quiet=True)
