"Our attacks against the authors' own code, and what they must survive."
import copy
import dataclasses

import foolbox
import pytest
import torch
import torchattacks
from pyautoattack.autopgd_base import APGDAttack, APGDAttack_targeted
from pyautoattack.fab_pt import FABAttack_PT
from pyautoattack.fab_projections import projection_l2, projection_linf
from pyautoattack.square import SquareAttack
from pyautoattack import AutoAttack as Official
from timm.models.convmixer import ConvMixer
from torch import nn

from advdpnp.attacks import PGD, ThreatModel, correct, cross_entropy, standing_after, untouched
from advdpnp.autoattack import APGD, APGDT, FABT, AutoAttack, Rows, Square, apgd, draw_square, first_squares
from advdpnp.autoattack import onto_hyperplane, push_square, square_side, targeted_dlr
from advdpnp.baselines import PGDAT, LinearNet, Standard
from advdpnp.data import Loader, seeded
from advdpnp.prototypes import PrototypeNet
from advdpnp.training import AdvDPNP, Trainer

EPS, N = 0.2, 60


@pytest.fixture(scope="module")
def models(digits):
    "Undefended, two defended ResNets, and an architecture that is no ResNet."
    mixer = ConvMixer(dim=32, depth=3, kernel_size=3, patch_size=2, in_chans=1, num_classes=0)
    torch.manual_seed(0)
    nets = {"standard": (LinearNet("cifar_resnet8", 10, digits.mean, digits.std), Standard()),
            "PGD-AT": (LinearNet("cifar_resnet8", 10, digits.mean, digits.std), PGDAT(EPS, 4)),
            "Adv-DPNP": (PrototypeNet("cifar_resnet8", 10, mean=digits.mean, std=digits.std), AdvDPNP(EPS, 4)),
            "ConvMixer": (LinearNet(mixer, 10, digits.mean, digits.std), PGDAT(EPS, 4))}
    for net, method in nets.values():
        Trainer(net, method, digits, epochs=10, batch_size=64, lr=0.1, padding=0, val_size=200,
                val_attack=PGD(EPS, steps=2), device="cpu", quiet=True).fit()
    return {name: net.eval() for name, (net, _) in nets.items()}


@pytest.fixture(scope="module")
def loader(digits):
    return Loader(digits.x_test[:N], digits.y_test[:N], 250)


def stands(net, x, y):
    with torch.no_grad():
        return net(x).argmax(1) == y


NAMES = ["standard", "PGD-AT", "Adv-DPNP", "ConvMixer"]
REFERENCES = {  # at a third of the standard length, to be quick
    "apgd-ce": (APGD(EPS, steps=30), lambda net: APGDAttack(net, n_iter=30, eps=EPS, loss="ce", seed=0)),
    "apgd-t": (APGDT(EPS, steps=30), lambda net: APGDAttack_targeted(net, n_iter=30, eps=EPS, seed=0)),
    "fab-t": (FABT(EPS, steps=30), lambda net: FABAttack_PT(net, n_iter=30, eps=EPS, targeted=True, seed=0)),
    "square": (Square(EPS, queries=1000),
               lambda net: SquareAttack(net, n_queries=1000, eps=EPS, seed=0, resc_schedule=False)),
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("attack", REFERENCES)
def test_each_attack_against_the_official_one(models, loader, name, attack):
    net, (ours, official) = models[name], REFERENCES[attack]
    x, y = loader.take(torch.arange(N))
    right = correct(net, loader)
    mine = standing_after(net, loader, ours, right, quiet=True)
    theirs = stands(net, official(net).perturb(x.clone(), y.clone()), y)
    # in images: random starts decide a few of 60
    gap, allowed = mine.sum().item() - theirs.sum().item(), 1 if attack == "fab-t" else 4
    assert abs(gap) <= allowed, f"{mine.sum()} against {theirs.sum()}"
    assert (mine != theirs).sum() <= 8  # and they are the same images


@pytest.mark.parametrize("name", ["PGD-AT", "ConvMixer"])
@pytest.mark.parametrize("norm, eps", [("linf", 0.1), ("l2", 0.5)])
@pytest.mark.parametrize("targeted", [False, True])
def test_apgd_from_the_same_start_ends_where_the_official_one_does(
    models, loader, monkeypatch, name, norm, eps, targeted
):
    "Step sizes, momentum, checkpoints and returns to the best point: a change to any of them ends elsewhere."
    net = copy.deepcopy(models[name]).double()  # otherwise rounding turns some signs
    x, y = loader.take(correct(models[name], loader).nonzero()[:, 0])
    x, target = x.double(), (y + 1) % 10
    threat = ThreatModel(eps, norm)
    start = threat.random_start(x, seeded("cpu", 1))
    monkeypatch.setattr(ThreatModel, "random_start", lambda *_: start)
    loss = (
        (lambda logits, r: targeted_dlr(logits, r.y, r.target))
        if targeted
        else (lambda logits, r: cross_entropy(logits, r.y))
    )
    with untouched(net, seeded("cpu", 0)):
        mine, left = apgd(net, loss, x, y, threat, 50, seeded("cpu", 0), target=target)
    make = APGDAttack_targeted if targeted else APGDAttack
    official = make(net, n_iter=50, norm={"linf": "Linf", "l2": "L2"}[norm], eps=eps, seed=0, device="cpu")
    official.init_hyperparam(x)
    official.loss, official.y_target = "dlr-targeted" if targeted else "ce", target
    theirs = official.attack_single_run(x, y, x_init=start)[0]
    apart = (mine - theirs)[left].abs().amax((1, 2, 3))
    assert len(left) >= 20
    # at its first checkpoint it compares the first loss with 0, and it keeps losses in float32
    same = 0.8 if targeted or norm == "l2" else 0.95
    assert (apart < 1e-6).double().mean() >= same, apart


@pytest.mark.parametrize("name", ["Adv-DPNP", "ConvMixer"])
def test_the_cascade_against_the_official_one(models, digits, name):
    net, few = models[name], Loader(digits.x_test[:20], digits.y_test[:20], 250)
    x, y = few.take(torch.arange(20))
    standing = correct(net, few)
    for stage in AutoAttack(EPS).attacks:
        standing = standing_after(net, few, stage, standing, quiet=True)
    x_adv, _ = Official(net, eps=EPS, seed=0).run_standard_evaluation(x, y, batch_size=250)
    assert abs(int(standing.sum()) - int(stands(net, x_adv, y).sum())) <= 1
    assert torch.equal(standing_after(net, few, AutoAttack(EPS), correct(net, few), quiet=True) | ~standing,
                       torch.ones(20, dtype=torch.bool))


@pytest.mark.parametrize("name", NAMES)
def test_pgd_against_torchattacks_and_foolbox(models, digits, name):
    net, all_ = models[name], Loader(digits.x_test, digits.y_test, 500)
    x, y = all_.take(torch.arange(500))
    right = correct(net, all_)
    robust = lambda x_adv: 100 * (stands(net, x_adv, y) & right).double().mean().item()
    same = PGD(EPS, random_start=False)(net, x, y)
    theirs = torchattacks.PGD(net, eps=EPS, alpha=EPS / 4, steps=20, random_start=False)(x, y)
    assert (same - theirs).abs().max() < 1e-6 or abs(robust(same) - robust(theirs)) <= 0.2  # the very same images
    foolbox_net = foolbox.PyTorchModel(net, bounds=(0, 1))
    attack = foolbox.attacks.LinfPGD(abs_stepsize=EPS / 4, steps=20)
    found = {"ours": [], "any iterate": [], "torchattacks": [], "foolbox": []}
    for seed in range(6):  # one random start is worth a point or two
        found["ours"].append(robust(PGD(EPS, seed=seed)(net, x, y)))
        standing = standing_after(net, all_, PGD(EPS), right, seed, quiet=True)
        found["any iterate"].append(100 * standing.double().mean().item())
        torch.manual_seed(seed)
        found["torchattacks"].append(robust(torchattacks.PGD(net, eps=EPS, alpha=EPS / 4, steps=20)(x, y)))
        found["foolbox"].append(robust(attack(foolbox_net, x, y, epsilons=EPS)[1]))
    mean = {name: sum(values) / len(values) for name, values in found.items()}
    assert abs(mean["ours"] - mean["torchattacks"]) <= 1 and abs(mean["ours"] - mean["foolbox"]) <= 1, found
    assert mean["any iterate"] <= mean["ours"] + 0.3, found


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


@pytest.mark.parametrize("attack", [APGD(1.0, "l2", steps=20), APGDT(1.0, "l2", steps=20), FABT(1.0, "l2", steps=20),
                                    Square(1.0, "l2", queries=400)], ids=lambda a: a.name)
def test_l2(models, loader, attack):
    net = models["PGD-AT"]
    x, y = loader.take(torch.arange(N))
    references = {
        "apgd-ce": lambda seed: APGDAttack(net, n_iter=20, norm="L2", eps=1.0, loss="ce", seed=seed),
        "apgd-t": lambda seed: APGDAttack_targeted(net, n_iter=20, norm="L2", eps=1.0, seed=seed),
        "fab-t": lambda seed: FABAttack_PT(net, n_iter=20, norm="L2", eps=1.0, targeted=True, seed=seed),
        "square": lambda seed: SquareAttack(net, norm="L2", n_queries=400, eps=1.0, seed=seed, resc_schedule=False),
    }
    right, seeds = correct(net, loader), range(3)  # 60 images: random starts alone move one run by several
    mine = sum(standing_after(net, loader, attack, right, seed, quiet=True).sum().item() for seed in seeds) / len(seeds)
    theirs = sum(stands(net, references[attack.name](seed).perturb(x.clone(), y.clone()), y).sum().item()
                 for seed in seeds) / len(seeds)
    assert abs(mine - theirs) <= 3, (mine, theirs)


def test_square_asks_only_what_it_does_not_know(models, loader):
    "Skipping known answers changes nothing: the search that asks everything ends with the same images."
    net = models["PGD-AT"]
    x, y = loader.take(correct(net, loader).nonzero()[:40, 0])
    attack, asked = Square(EPS, queries=600), []

    class Counting(nn.Module):
        def forward(self, x):
            asked.append(len(x))
            return net(x)

    thrifty = attack.search(Counting(), x, y, seeded("cpu", 3))

    def wasteful():  # the published loop
        generator = seeded("cpu", 3)
        draws = torch.rand(attack.queries, 5 + x.shape[1], generator=generator).tolist()
        with torch.no_grad(), untouched(net, generator):
            z = first_squares(x, ThreatModel(EPS), generator)
            lead = lambda z: (net(z).scatter(1, y[:, None], -torch.inf).amax(1) - net(z).gather(1, y[:, None])[:, 0])
            best = lead(z)
            for query, draw in enumerate(draws, 1):
                square = draw_square(draw, square_side(query, 8, 8, "linf"), x.shape[1:], "linf")
                new = push_square(Rows(x=x, z=z, low=(x - EPS).clamp(min=0), high=(x + EPS).clamp(max=1)), EPS, square)
                m = lead(new)
                better = (m > best) & (best <= 0)
                z = torch.where(better.view(-1, 1, 1, 1), new, z)
                best = torch.where(better, m, best)
        return z

    assert (thrifty - wasteful()).abs().flatten(1).amax(1).lt(1e-6).double().mean() > 0.9  # rounding decides a few
    assert sum(asked) < 0.8 * 600 * len(x)


@pytest.mark.parametrize("classes", [2, 3, 4, 5])
@pytest.mark.parametrize("attack", [AutoAttack(0.1, steps=5, queries=20), AutoAttack(0.5, "l2", steps=5, queries=20)])
def test_few_classes_and_a_single_image(classes, attack):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(48, classes))
    x = torch.rand(7, 3, 4, 4)
    y = net(x).argmax(1)
    for part in (slice(0, 1), slice(0, 7)):
        x_adv = attack(net, x[part], y[part])
        assert ThreatModel(attack.eps, attack.norm).length(x_adv - x[part]).max() <= attack.eps + 1e-5
        assert 0 <= x_adv.min() and x_adv.max() <= 1 and torch.isfinite(x_adv).all()
    assert torch.equal(attack(net, x, (y + 1) % classes), x)  # right nowhere


def test_the_seed_decides(models, batch):
    x, y = batch
    attack = AutoAttack(EPS, steps=4, queries=20)
    assert torch.equal(attack(models["PGD-AT"], x, y), attack(models["PGD-AT"], x, y))
    assert not torch.equal(attack(models["PGD-AT"], x, y), dataclasses.replace(attack, seed=1)(models["PGD-AT"], x, y))


def test_a_model_without_gradients_meets_square(models, loader):
    "Nothing to differentiate is not an error: the gradient attacks find nothing, and Square does."
    class Opaque(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = models["standard"]

        def forward(self, x):
            with torch.no_grad():
                return self.net(x)

    net = Opaque().eval()
    right = correct(net, loader)
    left = {stage.name: int(standing_after(net, loader, stage, right, quiet=True).sum())
            for stage in AutoAttack(EPS, steps=5, queries=500).attacks}
    assert left["fab-t"] == int(right.sum()) and left["square"] < 0.3 * int(right.sum())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu(models, loader, digits):
    net, there = models["PGD-AT"], Loader(digits.x_test[:N], digits.y_test[:N], 250, device="cuda")
    attack = AutoAttack(EPS, steps=10, queries=100)
    here = standing_after(net, loader, attack, correct(net, loader), quiet=True)
    net.cuda()
    far = standing_after(net, there, attack, correct(net, there), quiet=True)
    net.cpu()
    assert abs(int(here.sum()) - int(far.sum())) <= 2
