"Our attacks against the authors' own code, and what they must survive."
import copy
import dataclasses
import functools

import pytest
import torch
import torchattacks
from pyautoattack import AutoAttack as Official
from pyautoattack.autopgd_base import APGDAttack, APGDAttack_targeted
from pyautoattack.fab_projections import projection_l2, projection_linf
from pyautoattack.fab_pt import FABAttack_PT
from pyautoattack.square import SquareAttack
from timm.models.convmixer import ConvMixer
from torch import nn

import advdpnp.attacks
from advdpnp.attacks import CW, PGD, Draws, ThreatModel, correct, cross_entropy, goes_on_with, margin, robust_to
from advdpnp.autoattack import APGD, APGDT, FABT, APGDSearch, AutoAttack, Square, draw_proposal, onto_hyperplane
from advdpnp.autoattack import push_square, square_side, stripes, targeted_dlr
from advdpnp.core import seeded
from advdpnp.data import Loader
from advdpnp.methods import METHODS
from advdpnp.prototypes import LinearNet
from advdpnp.still import Still
from advdpnp.training import Trainer

EPS, N = 0.2, 32


@pytest.fixture(scope="module")
def mixer(digits):
    "An architecture that is no ResNet, defended."
    torch.manual_seed(0)
    backbone = ConvMixer(dim=32, depth=3, kernel_size=3, patch_size=2, in_chans=1, num_classes=0)
    net = LinearNet(backbone, 10, digits.mean, digits.std)
    Trainer(net, METHODS["PGD-AT"](eps=EPS, steps=2), digits, epochs=5, batch_size=64, lr=0.1, padding=0, val_size=200,
            val_attack=PGD(EPS, steps=2), device="cpu", quiet=True).fit()
    return net.eval()


@pytest.fixture(scope="module")
def linear(digits):
    "A ResNet with a linear layer, defended."
    torch.manual_seed(0)
    net = LinearNet("cifar_resnet8", 10, digits.mean, digits.std)
    Trainer(net, METHODS["PGD-AT"](eps=EPS, steps=2), digits, epochs=5, batch_size=64, lr=0.1, padding=0, val_size=200,
            val_attack=PGD(EPS, steps=2), device="cpu", quiet=True).fit()
    return net.eval()


@pytest.fixture(scope="module")
def loader(digits):
    return Loader(digits.x_test[:N], digits.y_test[:N], 250)


@pytest.fixture
def net(request):
    "One of the trained networks."
    return request.getfixturevalue(request.param)


def right_images(net, loader):
    "24 images that the network classifies correctly, in float64, where rounding decides nothing; and their labels."
    x, y = loader.take(correct(net, loader).nonzero()[:24, 0])
    return x.double(), y


def robust(net, x, y):
    with torch.no_grad():
        return net(x).argmax(1) == y


REFERENCES = {  # at a fraction of the standard length, to be quick
    "apgd-ce": (dict(steps=30), lambda net, **kw: APGDAttack(net, n_iter=30, loss="ce", **kw)),
    "apgd-t": (dict(steps=15), lambda net, **kw: APGDAttack_targeted(net, n_iter=15, **kw)),
    "fab-t": (dict(steps=8), lambda net, **kw: FABAttack_PT(net, n_iter=8, targeted=True, **kw)),
    "square": (dict(queries=250), lambda net, **kw: SquareAttack(net, n_queries=250, resc_schedule=False, **kw)),
}
OURS = {attack.name: attack for attack in (APGD, APGDT, FABT, Square)}


@pytest.mark.parametrize("attack, norm, eps", [*((attack, "linf", EPS) for attack in REFERENCES),
                                               ("fab-t", "l2", 1.0), ("square", "l2", 1.0)])  # APGD in l2: see below
def test_each_attack_breaks_the_images_that_the_official_one_breaks(defended, loader, attack, norm, eps):
    settings, official = REFERENCES[attack]
    x, y = loader.take(torch.arange(N))
    mine = robust_to(defended, loader, OURS[attack](eps, norm, **settings), correct(defended, loader), quiet=True)
    reference = official(defended, norm={"linf": "Linf", "l2": "L2"}[norm], eps=eps, seed=0)
    theirs = robust(defended, reference.perturb(x.clone(), y.clone()), y)
    # in images: random starts decide a few; FAB has none
    assert (mine != theirs).sum() <= (1 if attack == "fab-t" else 6), f"{mine.sum()} against {theirs.sum()}"


@pytest.mark.parametrize("net", ["defended", "mixer"], indirect=True)
@pytest.mark.parametrize("norm, eps", [("linf", 0.1), ("l2", 0.5)])
@pytest.mark.parametrize("targeted", [False, True])
def test_apgd_from_the_same_start_ends_where_the_official_one_does(net, loader, monkeypatch, norm, eps, targeted):
    "Step sizes, momentum, checkpoints and returns to the best point: a change to any of them ends elsewhere."
    x, y = right_images(net, loader)
    target, threat = (y + 1) % 10, ThreatModel(eps, norm)
    start = threat.start(x, threat.ball(x.shape, seeded("cpu", 1)))
    double, our_move = copy.deepcopy(net).double(), APGDSearch.move

    def compare_the_first_loss_with_0(search, alpha):  # as the authors' code does
        our_move(search, alpha)
        if alpha == 1:
            search.rows.loss_before = torch.zeros_like(search.rows.loss_before)

    monkeypatch.setattr(APGDSearch, "move", compare_the_first_loss_with_0)
    loss = lambda z, rows: targeted_dlr(z, rows.y, rows.target) if targeted else cross_entropy(z, rows.y)
    mine = APGDSearch(Still(double), x, y, threat, loss, start, target=target).run(40)
    make = APGDAttack_targeted if targeted else APGDAttack
    official = make(double, n_iter=40, norm={"linf": "Linf", "l2": "L2"}[norm], eps=eps, seed=0, device="cpu")
    official.init_hyperparam(x)
    official.loss, official.y_target = "dlr-targeted" if targeted else "ce", target
    monkeypatch.setattr(torch, "zeros", functools.partial(torch.zeros, dtype=torch.float64))  # it keeps losses there
    theirs = official.attack_single_run(x, y, x_init=start)[0]
    index, best = mine.found.index[~mine.found.over], mine.rows.best[~mine.found.over]
    apart = (best - theirs[index]).abs().amax((1, 2, 3))
    assert len(index) >= 10
    assert (apart < 1e-6).double().mean() >= 0.95, apart


def test_the_cascade_against_the_official_one(mixer, digits):
    few = Loader(digits.x_test[:20], digits.y_test[:20], 250)
    x, y = few.take(torch.arange(20))
    attack, verdicts = AutoAttack(EPS, steps=20, queries=300), correct(mixer, few)
    for stage in attack.stages:
        verdicts = robust_to(mixer, few, stage, verdicts, quiet=True)
    official = Official(mixer, eps=EPS, seed=0)
    for one in (official.apgd, official.apgd_targeted, official.fab):
        one.n_iter = 20
    official.square.n_queries = 300
    x_adv, _ = official.run_standard_evaluation(x, y, batch_size=250)
    assert (verdicts != robust(mixer, x_adv, y)).sum() <= 1
    assert torch.equal(robust_to(mixer, few, attack, correct(mixer, few), quiet=True), verdicts)  # as one attack


def test_pgd_from_the_image_finds_what_torchattacks_and_foolbox_find(defended, loader, monkeypatch):
    monkeypatch.setattr("numba.config.DISABLE_JIT", 0)  # see conftest.py: foolbox cannot be imported with it
    import foolbox

    x, y = right_images(defended, loader)
    double = copy.deepcopy(defended).double()
    mine = PGD(EPS, random_start=False)(double, x, y)
    theirs = torchattacks.PGD(double, eps=EPS, alpha=EPS / 4, steps=20, random_start=False)(x, y)
    assert (mine - theirs).abs().max() < 1e-9
    attack = foolbox.attacks.LinfPGD(abs_stepsize=EPS / 4, steps=20, random_start=False)
    theirs = attack(foolbox.PyTorchModel(double, bounds=(0, 1)), x, y, epsilons=EPS)[1]
    assert (mine - theirs).abs().max() < 1e-6  # eps is a float32 there


def test_foolbox_leaves_a_model_where_it_is(digits, monkeypatch):
    monkeypatch.setattr("numba.config.DISABLE_JIT", 0)  # see conftest.py: foolbox cannot be imported with it
    import foolbox

    made, seen = foolbox.PyTorchModel, []
    monkeypatch.setattr(foolbox, "PyTorchModel", lambda *a, **how: seen.append(how["device"]) or made(*a, **how))
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).eval()
    loader = Loader(digits.x_test[:20], digits.y_test[:20], 20)
    attack = foolbox.attacks.LinfPGD()
    attack.eps = 0.1
    robust_to(net, loader, attack, correct(net, loader), quiet=True)
    assert seen and {str(device) for device in seen} == {"cpu"}


@pytest.mark.parametrize("norm, reference", [("linf", projection_linf), ("l2", projection_l2)])
def test_projection_against_the_official_one(norm, reference):
    random = seeded("cpu", 0)
    x, w = torch.rand(300, 40, generator=random), torch.randn(300, 40, generator=random)
    b = (w * x).sum(1) + torch.randn(300, generator=random)
    ours, theirs = onto_hyperplane(x, w, b - (w * x).sum(1), norm), reference(x, w, b)
    reached = ((w * ours).sum(1) - (b - (w * x).sum(1))).abs() < 1e-3
    length = ThreatModel(1.0, norm).length
    assert reached.sum() > 200
    assert (length(ours) - length(theirs))[reached].abs().max() < 1e-3


SHORT = [attack for norm, eps in (("linf", EPS), ("l2", 1.0)) for attack in (
    APGD(eps, norm, steps=10), APGDT(eps, norm, steps=5), FABT(eps, norm, steps=5), Square(eps, norm, queries=60))]


@pytest.mark.parametrize("attack", SHORT, ids=lambda attack: f"{attack.name}-{attack.norm}")
def test_neither_the_batch_size_nor_when_a_row_leaves_changes_an_image(defended, loader, monkeypatch, attack):
    x, y = right_images(defended, loader)
    still, draws = Still(copy.deepcopy(defended).double()), Draws(0, torch.arange(len(x)))
    found = attack.search(still, x, y, draws)
    broken = ~robust(still, found, y)
    assert 0 < broken.sum() and torch.equal(found[~broken], x[~broken])  # where nothing is found, the image itself
    in_sevens = [attack.search(still, x[i], y[i], draws.take(i)) for i in torch.arange(len(x)).split(7)]
    torch.testing.assert_close(torch.cat(in_sevens), found, rtol=0, atol=1e-7)

    of_a_gpu = functools.partial(goes_on_with, device=torch.device("cuda"))
    for rule in (lambda left, now, device: left, lambda left, now, device: of_a_gpu(left, now)):
        monkeypatch.setattr(advdpnp.attacks, "goes_on_with", rule)
        torch.testing.assert_close(attack.search(still, x, y, draws), found, rtol=0, atol=1e-7)


def in_ten_bits(x):
    "As TF32 rounds float32; gradients pass."
    rounded = ((x.detach().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)
    return x + (rounded - x).detach()


def rounded_copy(net, x):
    "What a GPU searches on: the factors of every product of the copy are rounded."
    still = Still(net, x)
    for module in still.copy.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.weight.copy_(in_ten_bits(module.weight))
            module.register_forward_pre_hook(lambda _, inputs: (in_ten_bits(inputs[0]),))
    return still


@pytest.mark.parametrize("net, eps", [("undefended", 0.05), ("defended", EPS), ("linear", EPS), ("mixer", EPS)],
                         indirect=["net"])
@torch.no_grad()
def test_a_search_in_ten_bits_breaks_as_many_images_and_only_such_as_are_broken(net, digits, eps):
    many = Loader(digits.x_test[:60], digits.y_test[:60], 60)
    right = correct(net, many)
    x, y = many.take(right.nonzero()[:, 0])
    assert (rounded_copy(net, x)(x) - net(x)).abs().max() > 1e-4  # it does round
    for attack in (PGD(eps), CW(eps, steps=40), APGD(eps, steps=20), APGDT(eps, steps=10, targets=3),
                   FABT(eps, steps=10, targets=3), Square(eps, queries=100)):
        exact = robust_to(Still(net, x), many, attack, right, quiet=True)
        rounded = robust_to(rounded_copy(net, x), many, attack, right, quiet=True)
        assert rounded.sum() <= exact.sum() + 1, attack.name
        found = attack.search(rounded_copy(net, x), x, y, Draws(0, torch.arange(len(x))))
        moved = (found != x).flatten(1).any(1)
        assert moved.any() and (net(found[moved]).argmax(1) != y[moved]).all(), attack.name


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("net, eps", [("undefended", 0.05), ("defended", EPS), ("linear", EPS), ("mixer", EPS)],
                         indirect=["net"])
def test_a_gpu_breaks_as_many_images_as_a_cpu(net, digits, eps):
    def survivors(device):
        many = Loader(digits.x_test[:200], digits.y_test[:200], 200, device=device)
        right = correct(net.to(device), many)
        return [int(robust_to(net, many, attack, right, quiet=True).sum())
                for attack in (PGD(eps), CW(eps), AutoAttack(eps, steps=50, queries=500))]

    for here, there in zip(survivors("cuda"), survivors("cpu")):
        assert here <= there + 3


def test_what_only_the_copy_gets_wrong_goes_on_being_attacked(defended, loader):
    x, y = loader.take(correct(defended, loader).nonzero()[:20, 0])
    draws = Draws(0, torch.arange(20))
    for attack in (PGD(EPS), APGD(EPS, steps=20), Square(EPS, queries=100)):
        still = Still(defended, x)
        honest = attack.search(still, x, y, draws)
        asked = []
        still.copy.register_forward_hook(lambda _, inputs, logits: (asked.append(len(inputs[0])), logits)[1])
        logits_of_copy = still.copy.head.forward
        still.copy.head.forward = lambda features: logits_of_copy(features).roll(1, 1)  # the copy is always wrong
        found = attack.search(still, x, y, draws)
        moved = (found != x).flatten(1).any(1)
        assert not robust(defended, found[moved], y[moved]).any() and len(asked) > 10
        assert moved.sum() < 20 and not torch.equal(honest, x)


def test_square_asks_only_what_it_does_not_know(defended, loader):
    "Skipping known answers changes nothing: the search that asks everything ends with the same images."
    x, y = right_images(defended, loader)
    still, draws, threat = Still(copy.deepcopy(defended).double()), Draws(3, torch.arange(len(x))), ThreatModel(EPS)
    attack, asked = Square(EPS, queries=200), []

    def counting(x):
        asked.append(len(x))
        return still(x)

    thrifty = attack.search(counting, x, y, draws)
    with torch.no_grad():  # the published loop
        z = stripes(x, threat, draws)
        best = margin(still(z), y)
        for query, draw in enumerate(torch.rand(attack.queries, 6, generator=draws.common()).tolist(), 1):
            new = push_square(z, x, threat, draw_proposal(draw, square_side(query, 8, 8, "linf"), x.shape[1:], "linf"))
            lead = margin(still(new), y)
            better = (lead > best) & (best <= 0)
            z, best = torch.where(better.view(-1, 1, 1, 1), new, z), torch.where(better, lead, best)
    expected = torch.where(best.view(-1, 1, 1, 1) > 0, z, x)
    torch.testing.assert_close(thrifty, expected, rtol=0, atol=1e-9)
    assert sum(asked) < 0.8 * 200 * len(x)


@pytest.mark.parametrize("classes", [2, 3, 4, 5])
@pytest.mark.parametrize("attack", [AutoAttack(0.1, steps=5, queries=20), AutoAttack(0.5, "l2", steps=5, queries=20)])
def test_few_classes_and_a_single_image(classes, attack):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(48, classes))
    x = torch.rand(7, 3, 4, 4)
    y = net(x).argmax(1)
    for part in (slice(0, 1), slice(0, 7)):
        x_adv = attack(net, x[part], y[part])
        assert attack.threat.length(x_adv - x[part]).max() <= attack.eps + 1e-5
        assert 0 <= x_adv.min() and x_adv.max() <= 1 and torch.isfinite(x_adv).all()
    assert torch.equal(attack(net, x, (y + 1) % classes), x)  # nothing is classified correctly
    assert torch.equal(dataclasses.replace(attack, eps=0.0)(net, x, y), x)


@pytest.mark.parametrize("attack", [AutoAttack(0.1, steps=2, queries=5), AutoAttack(0.5, "l2", steps=2, queries=5)])
@pytest.mark.parametrize("of_model, of_images", [(torch.float64, torch.float64), (torch.float64, torch.float32),
                                                 (torch.float32, torch.float64), (torch.bfloat16, torch.bfloat16)])
def test_any_precision(attack, of_model, of_images):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(48, 5)).to(of_model)
    x = torch.rand(7, 3, 4, 4).to(of_images)
    y = net(x.to(of_model)).argmax(1)
    x_adv = attack(net, x, y)
    assert x_adv.dtype == of_images and not torch.equal(x_adv, x)


def test_the_seed_decides(defended, batch):
    x, y = (values[:12] for values in batch)
    attack = AutoAttack(EPS, steps=2, targets=2, queries=20)
    assert torch.equal(attack(defended, x, y), attack(defended, x, y))
    assert not torch.equal(attack(defended, x, y), dataclasses.replace(attack, seed=1)(defended, x, y))
    assert {stage.seed for stage in dataclasses.replace(attack, seed=1).stages} == {1}


@pytest.mark.parametrize("make, message", [
    (lambda: AutoAttack(8), "eps is 8: expected 0 to 1, the scale of the images"),
    (lambda: AutoAttack(0.2, "l1"), "unknown norm 'l1'"),
    (lambda: AutoAttack(0.2, queries=0), "queries is 0: expected at least 1"),
    (lambda: APGD(0.2, steps=0), "steps is 0: expected at least 1"),
    (lambda: FABT(0.2, targets=0), "targets is 0: expected at least 1")])
def test_what_cannot_be_is_said(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_model_without_gradients_meets_square(undefended, loader):
    "Nothing to differentiate is not an error: the gradient attacks find nothing, and Square does."
    class Opaque(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = undefended

        def forward(self, x):
            with torch.no_grad():
                return self.net(x)

    net = Opaque().eval()
    right = correct(net, loader)
    left = {stage.name: int(robust_to(net, loader, stage, right, quiet=True).sum())
            for stage in AutoAttack(EPS, steps=2, targets=2, queries=300).stages}
    assert left["fab-t"] == int(right.sum()) and left["square"] < 0.3 * int(right.sum())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu(defended, loader, digits):
    there = Loader(digits.x_test[:N], digits.y_test[:N], 250, device="cuda")
    attack = AutoAttack(EPS, steps=10, queries=100)
    here = robust_to(defended, loader, attack, correct(defended, loader), quiet=True)
    defended.cuda()
    far = robust_to(defended, there, attack, correct(defended, there), quiet=True)
    assert abs(int(here.sum()) - int(far.sum())) <= 2
