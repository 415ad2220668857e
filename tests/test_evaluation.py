import json
import signal
import subprocess
import sys
import time

import pytest
import torch
from scipy.stats import binomtest

from advdpnp.attacks import CW, FGSM, PGD, full_precision
from advdpnp.autoattack import AutoAttack
from advdpnp.data import Loader
from advdpnp.evaluation import evaluate, robustbench_info, standard_attacks, wilson
from advdpnp.sanity import failed, robustness_curve
from advdpnp.training import AdvDPNP, Trainer


@pytest.mark.parametrize("correct, n", [(0, 1), (1, 1), (0, 500), (3, 500), (250, 500), (499, 500), (500, 500),
                                        (8231, 10000)])
def test_wilson_against_scipy(correct, n):
    interval = binomtest(correct, n).proportion_ci(0.95, method="wilson")
    assert wilson(correct, n) == pytest.approx((interval.low, interval.high), abs=1e-9)


@pytest.mark.parametrize("correct, n", [(1, 0), (-1, 5), (6, 5)])
def test_no_proportion(correct, n):
    with pytest.raises(ValueError, match="is no proportion"):
        wilson(correct, n)


def test_record_adds_up_and_the_model_is_untouched(net, digits):
    net.train()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    record = evaluate(net, digits, [FGSM(0.1), PGD(0.1, steps=3)], images=100, quiet=True)
    assert net.training and all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert json.loads(json.dumps(record)) == record
    assert record["n"] == 100 and record["data_sha256"] == digits.sha256
    metrics = record["metrics"]
    assert list(metrics) == ["clean", "fgsm", "pgd3", "worst"]
    for m in metrics.values():
        assert m["accuracy"] == m["correct"] and m["low"] <= m["accuracy"] <= m["high"] and m["n"] == 100
    lower = min(metrics["fgsm"]["accuracy"], metrics["pgd3"]["accuracy"])
    assert metrics["worst"]["accuracy"] <= lower <= metrics["clean"]["accuracy"]
    assert metrics["pgd3"]["attack"] == dict(name="pgd3", images=100, eps=0.1, step_size=0.025, steps=3,
                                             random_start=True, restarts=1, norm="linf", seed=0) | {"class": "PGD"}
    names = [check["name"] for check in record["checks"]]
    assert len(set(names)) == len(names) >= 12
    assert "evaluation mode" in failed(record["checks"])  # it was given in training mode


def test_worst_case_is_taken_image_by_image(digits):
    "Two attacks that break different halves: each leaves 50%, together they leave nothing."

    class Right(torch.nn.Module):
        "Always right on the images it is given, unless their first pixel is at its largest."
        def __init__(self):
            super().__init__()
            self.labels = torch.from_numpy(digits.y_test)
            self.images = torch.from_numpy(digits.x_test).permute(0, 3, 1, 2).float().div(255)

        def forward(self, x):
            nearest = torch.cdist(x.flatten(1)[:, 1:], self.images.flatten(1)[:, 1:]).argmin(1)
            right = torch.nn.functional.one_hot(self.labels[nearest], 10).float()
            return torch.where((x[:, 0, 0, 0] >= 0.5)[:, None], right.roll(1, 1), right)

    class Half(PGD):
        def search(self, model, x, y, generator=None):
            x = x.clone()
            hit = y % 2 == self.seed
            x[hit, 0, 0, 0] = 0.5
            return x

    class Odd(Half):
        name = "odd"

    class Even(Half):
        name = "even"

    metrics = evaluate(Right(), digits, [Even(0.5, seed=0), Odd(0.5, seed=1)], quiet=True)["metrics"]
    assert metrics["clean"]["accuracy"] == 100
    assert metrics["even"]["correct"] + metrics["odd"]["correct"] == 500 and 200 < metrics["even"]["correct"] < 300
    assert metrics["worst"]["correct"] == 0


def test_budget_curve_starts_at_clean_and_ends_at_nothing(net, digits):
    Trainer(net, AdvDPNP(eps=0.2, steps=2), digits, epochs=3, batch_size=64, padding=0, device="cpu", quiet=True).fit()
    curve = robustness_curve(net, Loader(digits.x_test[:100], digits.y_test[:100], 100), PGD(0.2), [0.1, 0.5])
    clean = evaluate(net, digits, images=100, quiet=True)["metrics"]["clean"]["accuracy"]
    assert curve["eps"] == [0, 0.1, 0.5] and curve["accuracy"][0] == clean and curve["n"] == 100
    assert clean > 60
    assert curve["accuracy"][0] > curve["accuracy"][1] > curve["accuracy"][2]
    assert curve["accuracy"][2] < 5


def test_sanity_checks_are_of_the_attack_in_the_record(net, digits, monkeypatch):
    trusted = []
    monkeypatch.setattr("advdpnp.evaluation.sanity",
                        lambda model, few, seen, attack, *rest: trusted.append(attack) or {})
    slow = PGD(0.1, step_size=0.01)
    for attacks in ([FGSM(0.1), slow, CW(0.1)], [PGD(0.05, steps=3), slow], [FGSM(0.3, norm="l2")]):
        evaluate(net, digits, attacks, images=5, quiet=True)
    assert trusted == [slow, slow, PGD(0.3, norm="l2")]


def test_autoattack_on_fewer_images(net, digits):
    record = evaluate(net, digits, [PGD(0.1, steps=3), AutoAttack(0.1, steps=3, queries=10)], images=90,
                      limits=dict(autoattack=30), quiet=True)
    assert {name: m["n"] for name, m in record["metrics"].items()} == dict(clean=90, pgd3=90, autoattack=30, worst=30)
    assert list(record["metrics"]["autoattack"]["stages"]) == ["apgd-ce", "apgd-t", "fab-t", "square"]
    assert record["metrics"]["worst"]["correct"] <= record["metrics"]["autoattack"]["correct"]


def test_anyone_s_attack_and_anyone_s_model(digits):
    "An attack with eps and a name, and a plain module: RobustBench's conventions, and no more."
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10)).eval()

    class Invert:
        eps, name = 1.0, "invert"

        def __call__(self, model, x, y, generator=None):
            return 1 - x

    record = evaluate(model, digits, [Invert(), *standard_attacks(0.1)[:3]], quiet=True)
    assert list(record["metrics"]) == ["clean", "invert", "fgsm", "pgd20", "cw", "worst"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("compiled", [torch.jit.script, lambda net: torch.jit.freeze(torch.jit.script(net))],
                         ids=["TorchScript", "frozen"])
def test_a_compiled_model_is_attacked_as_the_model(digits, compiled):
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Flatten(),
                              torch.nn.Linear(144, 10)).eval()
    ours, theirs = (
        evaluate(model, digits, standard_attacks(0.02)[:2], images=50, quiet=True)["metrics"]
        for model in (net, compiled(net))
    )
    assert {name: m["correct"] for name, m in ours.items()} == {name: m["correct"] for name, m in theirs.items()}


def test_a_model_that_is_right_nowhere(digits):
    class Wrong(torch.nn.Module):
        def forward(self, x):
            return torch.nn.functional.one_hot(torch.full((len(x),), 3), 10).float() * x.flatten(1).sum(1, keepdim=True)

    from dataclasses import replace
    never = replace(digits, y_test=digits.y_test * 0)
    record = evaluate(Wrong().eval(), never, standard_attacks(0.1), images=20, quiet=True)
    assert {m["correct"] for m in record["metrics"].values()} == {0}


@pytest.mark.parametrize("settings, message", [
    (dict(images=0), "images is 0: expected at least 1"),
    (dict(images=-490), "images is -490"),
    (dict(batch_size=0), "batch_size is 0"),
    (dict(check_images=0), "check_images is 0"),
    (dict(limits=dict(fgsm=-3)), "the limit of fgsm is -3"),
])
def test_numbers_of_images_that_cannot_be(net, digits, settings, message):
    with pytest.raises(ValueError, match=message):
        evaluate(net, digits, standard_attacks(0.1)[:1], quiet=True, **settings)


def test_a_model_and_an_attack_that_would_spoil_the_record(net, digits):
    class Clean(FGSM):
        name = "clean"

    with pytest.raises(ValueError, match="an attack is named clean"):
        evaluate(net, digits, [Clean(0.1)], images=20, quiet=True)
    net.head.directions.data[0] = float("nan")
    with pytest.raises(ValueError, match="logits are not finite for 20 of 20 test images"):
        evaluate(net, digits, standard_attacks(0.1)[:1], images=20, quiet=True)


KILLED = """
import sys, torch
from advdpnp.autoattack import AutoAttack
from advdpnp.data import load_dataset
from advdpnp.evaluation import evaluate
from advdpnp.prototypes import PrototypeNet
torch.set_num_threads(1)
digits = load_dataset("digits")
torch.manual_seed(0)
net = PrototypeNet("cifar_resnet8", 10, mean=digits.mean, std=digits.std).eval()
record = evaluate(net, digits, [AutoAttack(0.002, queries=300)], images=100, batch_size=4, resume=sys.argv[1],
                  quiet=True)
print({name: m["correct"] for name, m in record["metrics"].items()}, record["metrics"]["autoattack"]["stages"])
"""


def test_killed_it_goes_on_from_its_state_file(tmp_path):
    run = lambda name, **kw: subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path / name)], stdout=subprocess.PIPE, text=True, **kw
    )
    whole = run("whole").communicate()[0]
    killed, state = run("state"), tmp_path / "state"
    while not (state.exists() and "apgd-t" in state.read_text()):
        assert killed.poll() is None
        time.sleep(0.02)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    before = json.loads(state.read_text())["stages"]
    assert list(before) == ["autoattack/apgd-ce", "autoattack/apgd-t"]
    assert run("state").communicate()[0] == whole != ""


def test_a_state_file_of_another_evaluation_is_refused(net, digits, tmp_path):
    evaluate(net, digits, [PGD(0.1, steps=2)], images=100, resume=tmp_path / "state", quiet=True)
    for changed in (dict(seed=1), dict(images=90), dict(attacks=[PGD(0.2, steps=2)])):
        with pytest.raises(ValueError, match="is of another evaluation"):
            evaluate(net, digits, **{**dict(attacks=[PGD(0.1, steps=2)], images=100, resume=tmp_path / "state",
                                            quiet=True), **changed})
    with torch.no_grad():
        net.head.directions.add_(0.1)
    with pytest.raises(ValueError, match=r"another evaluation \(logits differ\)"):
        evaluate(net, digits, [PGD(0.1, steps=2)], images=100, resume=tmp_path / "state", quiet=True)


def test_an_attack_of_other_settings_does_not_go_on_from_the_state(net, digits, tmp_path):
    class Mine:
        name, eps = "mine", 0.5

        def __init__(self, strength):
            self.strength = strength

        def __call__(self, model, x, y, generator=None):
            return (x + self.strength).clamp(0, 1)

    evaluate(net, digits, [Mine(0.0)], images=200, resume=tmp_path / "state.json", quiet=True)
    with pytest.raises(ValueError, match="is of another evaluation .attacks differ"):
        evaluate(net, digits, [Mine(0.5)], images=200, resume=tmp_path / "state.json", quiet=True)


def test_attacks_from_an_iterator_or_none(net, digits):
    found = evaluate(net, digits, iter([FGSM(0.1)]), images=20, quiet=True)
    assert list(found["metrics"]) == ["clean", "fgsm", "worst"] and "checks" in found
    assert list(evaluate(net, digits, images=20, quiet=True)["metrics"]) == ["clean"]


def test_an_ensemble_of_one_s_own_is_called_as_it_is(net, digits):
    class Ensemble:
        name, eps, attacks = "mine", 0.1, [FGSM(0.1)]

        def __call__(self, model, x, y, generator=None):
            return x

    record = evaluate(net, digits, [Ensemble()], images=20, quiet=True)
    assert record["metrics"]["mine"]["correct"] == record["metrics"]["clean"]["correct"]
    assert {check["name"]: check["passed"] for check in record["checks"]}["square"] is None


def test_robustbench_entry_has_the_leaderboard_s_keys(net, digits):
    record = evaluate(net, digits, [AutoAttack(8 / 255, steps=3, queries=5)], images=30, quiet=True)
    info = robustbench_info(record, "A paper", "Some One", "ResNet-8")
    assert set(info) == {"link", "name", "authors", "additional_data", "number_forward_passes", "dataset",
                         "venue", "architecture",
                         "eps", "clean_acc", "reported", "autoattack_acc"}
    assert info["eps"] == "8/255" and float(info["autoattack_acc"]) <= float(info["clean_acc"])


def test_a_user_s_precision_is_respected_and_restored():
    before = torch.backends.cudnn.conv.fp32_precision
    try:
        torch.backends.cudnn.conv.fp32_precision = "tf32"
        with full_precision():
            assert torch.backends.cudnn.conv.fp32_precision == "ieee"
        assert torch.backends.cudnn.conv.fp32_precision == "tf32"
    finally:
        torch.backends.cudnn.conv.fp32_precision = before
