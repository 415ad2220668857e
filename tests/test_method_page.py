"The page that shows the whole method gives the package's numbers."
import json
import re
from pathlib import Path

import pytest
import torch

from advdpnp import losses
from advdpnp.attacks import PGD
from advdpnp.methods import AdvDPNP
from advdpnp.prototypes import PrototypeNet
from advdpnp.still import Still

PAGE = Path(__file__).parent.parent / "nbs/00_method.ipynb"
CELLS = ["".join(cell["source"]) for cell in json.loads(PAGE.read_text())["cells"] if cell["cell_type"] == "code"]
WEIGHTS = ("alignment", "repulsion", "consistency")  # those of the method that are not 1


@pytest.fixture(scope="module")
def page():
    "What the page defines, up to the loss of a step."
    names = {}
    for cell in CELLS[:1 + next(i for i, cell in enumerate(CELLS) if "def dual_branch" in cell)]:
        exec(cell, names)
    return names


@pytest.fixture
def setup(page):
    "A network of the page, the package's around the same weights, 64 images, their labels and adversarial copies."
    torch.manual_seed(1)
    theirs = page["PrototypeNet"]().double()
    theirs.backbone.num_features = 64
    ours = PrototypeNet(theirs.backbone, 10, norm=theirs.norm, mean=(0.0,), std=(1.0,)).double()
    ours.head.directions = theirs.directions  # the backbone is shared, too
    x, y = page["x_train"][:64].double(), page["y_train"][:64]
    return theirs, ours, x, page["pgd"](theirs, x, y), y


def method(page):
    return AdvDPNP(eps=0.2, steps=5, **{name: page["WEIGHTS"][name] for name in WEIGHTS})


def test_the_page_is_short_and_needs_one_name_of_the_package():
    lines = [line for cell in CELLS for line in cell.splitlines() if line.strip()]
    assert len(lines) < 120 and max(map(len, lines)) <= 120
    imports = [line for line in lines if re.match(r"\s*(from|import) .*advdpnp", line)]
    assert imports == ["from advdpnp.data import load_dataset"]
    assert not any(cell.startswith(("#| export", "#| default_exp")) for cell in CELLS)


def test_prototypes_and_logits_are_the_head(setup):
    theirs, ours, x, *_ = setup
    torch.testing.assert_close(theirs.prototypes, ours.head.prototypes)
    torch.testing.assert_close(theirs.eval()(x), ours.eval()(x))


def test_each_term_is_the_package_s(page, setup):
    theirs, _, x, x_adv, y = setup
    f, f_adv, C = theirs.backbone(x), theirs.backbone(x_adv), theirs.prototypes
    z, z_adv = f @ C.T, f_adv @ C.T
    of = dict(positive_alignment=(f, y, C), negative_repulsion=(C,), consistency=(z, z_adv))
    for name, arguments in of.items():
        torch.testing.assert_close(page[name](*arguments), getattr(losses, name)(*arguments))


def test_the_step_has_the_package_s_loss_terms_and_gradients(page, setup):
    theirs, ours, x, x_adv, y = setup
    loss, terms = method(page).loss(ours, x, x_adv, y)
    assert page["WEIGHTS"] == method(page).weights
    shown = page["dual_branch"](theirs, x, x_adv, y)
    assert shown.keys() == terms.keys()
    for name in terms:
        torch.testing.assert_close(shown[name], terms[name])
    parameters = list(theirs.parameters())
    expected = torch.autograd.grad(loss, parameters)
    for found, gradient in zip(torch.autograd.grad(page["total"](shown), parameters), expected, strict=True):
        torch.testing.assert_close(found, gradient)


def test_adversarial_images_are_the_package_s(page, setup, monkeypatch):
    theirs, ours, x, _, y = setup
    noise = torch.rand(x.shape, generator=torch.Generator().manual_seed(0)).to(x.dtype)
    monkeypatch.setattr(torch, "rand_like", lambda _: noise)
    crafted = method(page).craft(Still(ours, x), x, y, 2 * noise - 1)
    torch.testing.assert_close(page["pgd"](theirs.train(), x, y), crafted)
    assert theirs.training
    noise = torch.full_like(x, 0.5)  # no random start
    torch.testing.assert_close(page["pgd"](theirs, x, y, steps=20), PGD(0.2, random_start=False)(ours, x, y))
