"What the checks say about whole evaluations. The zoo of false defences is in nbs/64_sanity.ipynb."
import json
from pathlib import Path

import pytest
import torch
from torch import nn

from advdpnp.attacks import CW, FGSM, PGD
from advdpnp.autoattack import AutoAttack
from advdpnp.data import Loader
from advdpnp.evaluation import evaluate, images_of
from advdpnp.sanity import check_attacks, check_budget, check_mode, check_square, check_steps, failed, robustness_curve
from test_evaluation import fitted


@pytest.fixture(scope="module")
def linear(digits):
    return fitted(digits)


class Around(nn.Module):
    def __init__(self, net, change):
        super().__init__()
        self.net, self.change = net, change

    def forward(self, x):
        return self.change(self.net, x)


@pytest.mark.parametrize("change, named", [
    (lambda net, x: net(x) * 10_000, {"logit range", "gradients"}),
    (lambda net, x: net((x * 4).round() / 4), {"gradients", "budget"}),
    (lambda net, x: net((x + 0.3 * torch.randn_like(x)).clamp(0, 1)), {"deterministic"}),
    (lambda net, x: net((x + 0.3 * torch.randn_like(x)).clamp(0, 1)) + 1e4, {"deterministic"}),
    (lambda net, x: net(x).softmax(1), {"logits"}),
    (lambda net, x: net(x) - net(x).mean(0), {"batch-independent"}),
    (lambda net, x: net(x.detach()), {"gradients", "budget"}),
], ids=["times 10,000", "quantised", "random", "random and far from zero", "softmax", "batch", "cut off"])
def test_a_false_defence_is_named(linear, digits, change, named):
    record = evaluate(Around(linear, change).eval(), digits, [FGSM(0.2), PGD(0.2)], images=100,
                      twin=linear, quiet=True)
    assert named <= set(failed(record["checks"]))


@pytest.mark.parametrize("batch_size", [3, 10, 200])
def test_checks_see_every_image_whatever_the_batch(linear, digits, batch_size):
    attack = PGD(0.2, step_size=0.004)  # too small a step
    record = evaluate(Around(linear, lambda net, x: net(x) - net(x).mean(0)).eval(), digits, [attack], images=20,
                      check_images=20, batch_size=batch_size, quiet=True)
    assert {"batch-independent", "steps"} <= {*failed(record["checks"])} and record["path"]["n"] == 20


def test_an_undefended_model_is_found_weak_and_honest(linear, digits):
    record = evaluate(linear, digits, [FGSM(0.2), PGD(0.2)], images=100, twin=linear, quiet=True)
    assert failed(record["checks"]) == [] and record["metrics"]["worst"]["accuracy"] < 10
    record = evaluate(linear, digits, [FGSM(0.2)], images=50, quiet=True)
    given = {check["name"]: check["passed"] for check in record["checks"]}
    assert given["twin"] is None and given["transfer"] is None  # not run is not passed


def test_budget_curve_starts_at_clean_and_ends_at_nothing(linear, digits):
    record = evaluate(linear, digits, images=100, quiet=True)
    places, clean = images_of(record, digits), record["metrics"]["clean"]["accuracy"]
    few = Loader(digits.x_test[places], digits.y_test[places], 100)
    curve = robustness_curve(linear, few, PGD(0.2), [0.05, 0.5])
    assert curve["eps"] == [0, 0.05, 0.5] and curve["accuracy"][0] == clean > 60 and curve["n"] == 100
    assert curve["accuracy"][0] > curve["accuracy"][1] > curve["accuracy"][2] and curve["accuracy"][2] < 5


@pytest.mark.parametrize("outcomes, name, fails", [
    (check_attacks(dict(clean=99, noise=98, fgsm=97.5, pgd20=10, cw=8, worst=8), 500), "one step", True),
    (check_attacks(dict(clean=99, noise=98, fgsm=80, pgd20=70, cw=68, worst=68), 500), "one step", False),
    (check_attacks(dict(clean=99, noise=60, fgsm=80, pgd20=70, cw=68, worst=68), 500), "noise", True),
    (check_attacks(dict(clean=99, noise=98, fgsm=60, pgd20=70, cw=60, worst=60), 500), "iterations", True),
    (check_attacks(dict(clean=99, noise=98, fgsm=90, pgd20=88, cw=60, worst=60), 500), "loss", True),
    (check_attacks(dict(clean=99, noise=98, fgsm=90, pgd20=60, cw=60, worst=60, transfer=50), 500), "transfer", True),
    ([check_steps(dict(steps=list(range(5)), standing=[99, 90, 80, 79.6, 79.4], n=1000))], "steps", True),
    ([check_steps(dict(steps=list(range(5)), standing=[99, 90, 80, 79.6, 79.6], n=1000))], "steps", False),
    ([check_budget(dict(eps=[0, 0.1, 0.5], accuracy=[99, 60, 20], n=1000), 12)], "budget", True),
    ([check_budget(dict(eps=[0, 0.1, 0.2, 0.5], accuracy=[99, 60, 65, 0], n=1000), 12)], "budget", True),
    ([check_budget(dict(eps=[0, 0.1, 0.5], accuracy=[99, 60, 0], n=1000), 12)], "budget", False),
    ([check_square({"apgd-t": 50.0, "fab-t": 49.9, "square": 49.0}, 1000)], "square", True),
    ([check_square({"apgd-t": 50.0, "fab-t": 49.9, "square": 49.8}, 1000)], "square", False),
])
def test_where_the_line_is(outcomes, name, fails):
    passed, = [check["passed"] for check in outcomes if check["name"] == name]
    assert passed is (not fails)


def test_without_pgd_or_cw_some_checks_are_not_run():
    outcomes = check_attacks(dict(clean=99, noise=98, fgsm=60, worst=60), 500)
    assert [check["name"] for check in outcomes if check["passed"] is None] == ["iterations", "loss", "transfer"]


def defined_on_the_page(*names):
    "What cells of nbs/64_sanity.ipynb define, with the page's imports."
    cells = json.loads((Path(__file__).parent.parent / "nbs/64_sanity.ipynb").read_text())["cells"]
    sources = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    known = {"torch": torch, "nn": nn}
    for source in sources:
        if source.startswith(("#| export\nimport", *(f"{kind} {name}" for name in names for kind in ("def", "class")))):
            exec(source.split("\n\ntests = ")[0], known)
    return [known[name] for name in names]


def test_attacks_find_what_was_planted(defended, digits):
    "After Zimmermann et al., on a prototype network: a readout with a known adversarial example for every image."
    x, _ = Loader(digits.x_test, digits.y_test, 1).take(torch.arange(60))
    _, reverse_test = defined_on_the_page("Planted", "reverse_test")
    counts = reverse_test(defended, x, AutoAttack(0.2, steps=20, queries=50))
    assert counts["tests"] >= 48
    assert counts["found"] >= 0.99 * counts["tests"]
    assert counts["noise"] < 0.5 * counts["tests"]


# False alarms, and alarms that were not raised


def test_noise_is_noise_for_an_attack_that_starts_at_the_image(digits):
    says = lambda whole: (255 * whole).sum((1, 2, 3)).round().long() % 10

    class Brittle(nn.Module):
        "Right about images as they are, by chance about all others, and without gradients."

        def forward(self, x):
            whole = (x * 255).round() / 255
            off = ((x - whole).abs().flatten(1).amax(1) > 1e-4).long()
            return 5 * nn.functional.one_hot((says(whole) + off) % 10, 10).float()

    x = torch.from_numpy(digits.x_test[:100]).permute(0, 3, 1, 2) / 255
    for start in (False, True):
        record = evaluate(Brittle(), (x, says(x)), [FGSM(0.05), PGD(0.05, random_start=start)], quiet=True)
        noise = next(check for check in record["checks"] if check["name"] == "noise")
        assert noise["passed"] is start, noise  # its worst case is all images, or next to none


@pytest.mark.parametrize("norm, eps", [("linf", 0.005), ("linf", 0.02), ("l2", 0.1)])
def test_a_small_budget_is_no_fault_of_the_attack(linear, digits, norm, eps):
    "PGD is optimal on a linear model, which four times this budget does not break."
    record = evaluate(linear, digits, [FGSM(eps, norm=norm), PGD(eps, norm=norm)], images=100, twin=linear, quiet=True)
    assert "twin" not in failed(record["checks"])


def test_attacks_of_several_budgets_are_not_compared(linear, digits):
    for attacks in ([FGSM(0.1), PGD(0.005)], [FGSM(0.02), PGD(0.02), CW(0.1)], [PGD(0.02), FGSM(1.0, norm="l2")]):
        checks = evaluate(linear, digits, attacks, images=60, quiet=True)["checks"]
        assert not {"iterations", "loss", "one step"} & {*failed(checks)}


def test_half_precision_rounds_otherwise_in_another_batch():
    torch.manual_seed(2)
    layers = nn.Flatten(), nn.Linear(3072, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10)
    model, x = nn.Sequential(*layers).bfloat16(), torch.rand(64, 3, 32, 32)
    record = evaluate(model, (x, model(x.bfloat16()).argmax(1)), [PGD(0.01, steps=1)], quiet=True)
    said = {check["name"]: check for check in record["checks"]}
    assert said["batch-independent"]["passed"] and said["precision"]["found"] == "computes in bfloat16"


def test_autocast_inside_a_model_is_said(linear, digits):
    class Mixed(nn.Module):
        def forward(self, x):
            with torch.autocast("cpu", torch.bfloat16):
                return linear(x)

    checks = evaluate(Mixed(), digits, [FGSM(0.1)], images=20, quiet=True)["checks"]
    assert "computes in bfloat16" in next(check["found"] for check in checks if check["name"] == "precision")


def test_dropout_of_attention_and_recurrence_counts_as_training_mode():
    net = nn.Sequential(nn.Flatten(), nn.LSTM(64, 10, dropout=0.5, num_layers=2)).eval()
    net[1].train()
    assert "changed: 1" in check_mode(net)["found"]


def test_any_pgd_is_compared_with_one_step(linear, digits):
    record = evaluate(linear, digits, [FGSM(0.1), PGD(0.1, steps=40), CW(0.1, steps=40)], images=50, quiet=True)
    passed = {check["name"]: check["passed"] for check in record["checks"]}
    assert passed["iterations"] and passed["loss"] is not None
