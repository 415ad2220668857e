import json

import pytest
import torch
from scipy.stats import binomtest

from advdpnp.attacks import FGSM, PGD
from advdpnp.evaluation import evaluate, robustness_curve, wilson
from advdpnp.training import AdvDPNP, Trainer, full_precision


@pytest.mark.parametrize("correct, n", [(0, 1), (1, 1), (0, 500), (3, 500), (250, 500), (499, 500), (500, 500), (8231, 10000)])
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
    assert metrics["worst"]["accuracy"] <= min(metrics["fgsm"]["accuracy"], metrics["pgd3"]["accuracy"]) <= metrics["clean"]["accuracy"]
    assert metrics["pgd3"]["attack"] == dict(eps=0.1, step_size=0.025, steps=3, random_start=True, seed=0)


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
        def __call__(self, model, x, y, generator=None):
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
    curve = robustness_curve(net, digits, [0.1, 0.5], images=100, quiet=True)
    clean = evaluate(net, digits, images=100, quiet=True)["metrics"]["clean"]["accuracy"]
    assert curve["eps"] == [0, 0.1, 0.5] and curve["accuracy"][0] == clean and curve["n"] == 100
    assert clean > 60 and curve["accuracy"][0] > curve["accuracy"][1] > curve["accuracy"][2] and curve["accuracy"][2] < 5


def test_a_user_s_precision_is_respected_and_restored():
    before = torch.backends.cudnn.conv.fp32_precision
    try:
        torch.backends.cudnn.conv.fp32_precision = "tf32"
        with full_precision():
            assert torch.backends.cudnn.conv.fp32_precision == "ieee"
        assert torch.backends.cudnn.conv.fp32_precision == "tf32"
    finally:
        torch.backends.cudnn.conv.fp32_precision = before
