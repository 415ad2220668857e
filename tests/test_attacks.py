import pytest
import torch
from torch import nn
from torch.nn import functional as F

import advdpnp.attacks
from advdpnp.attacks import CW, FGSM, PGD, Draws, PrototypePGD, ThreatModel, check_inside, correct, margin
from advdpnp.attacks import prototype_distances, robust_to
from advdpnp.autoattack import APGD, FABT, AutoAttack, Square
from advdpnp.data import Loader
from advdpnp.evaluation import evaluate
from advdpnp.still import Still


class Linear(nn.Module):
    "Two classes, logits linear in the pixels."

    def __init__(self, shape):
        super().__init__()
        self.layer = nn.Linear(shape.numel(), 2)

    def forward(self, x):
        return self.layer(x.flatten(1))


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 8, 8), (3, 5, 7)])
@pytest.mark.parametrize("attack", [FGSM(0.1), PGD(0.1), PGD(0.1, step_size=0.01, steps=30, random_start=False),
                                    CW(0.1)])
def test_reaches_the_optimum_of_a_linear_model(shape, attack):
    torch.manual_seed(0)
    model, x, y = Linear(torch.Size(shape)), torch.rand(20, *shape), torch.randint(2, (20,))
    wrong_minus_right = model.layer.weight[1 - y] - model.layer.weight[y]
    optimum = (x + 0.1 * wrong_minus_right.view_as(x).sign()).clamp(0, 1)
    x_adv = attack(model, x, y)
    torch.testing.assert_close(x_adv, optimum, rtol=0, atol=1e-6)
    assert F.cross_entropy(model(x_adv), y) > F.cross_entropy(model(x), y)


@pytest.mark.parametrize("eps", [0.0, 2 / 255, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("make", [FGSM, lambda eps: PGD(eps, steps=7), lambda eps: PGD(eps, step_size=eps, steps=3)])
def test_iterates_stay_inside(net, batch, eps, make):
    x, y = batch[0][:16], batch[1][:16]
    seen = []
    net.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach().clone()))  # copied with the network
    seen.append(make(eps)(net, x, y))
    assert len(seen) > 3
    for images in seen:  # some looks are at the first image alone
        assert (images - x[: len(images)]).abs().max() <= eps + 1e-6
        assert images.min() >= 0 and images.max() <= 1
    if eps == 0:
        assert torch.equal(seen[-1], x)


class Careless(nn.Module):
    "A model with everything an attack could disturb: batch-norm, dropout, a frozen part, a mixed mode."

    def __init__(self, channels):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(channels, 8, 3), nn.BatchNorm2d(8)
        self.drop, self.out = nn.Dropout(0.5), nn.Linear(8, 5)
        self.frozen = nn.Parameter(torch.zeros(()), requires_grad=False)

    def forward(self, x):
        return self.out(self.drop(self.norm(self.conv(x)).relu().mean((2, 3)))) + self.frozen


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [1, 2, 9])
@pytest.mark.parametrize("attack", [FGSM(0.1), PGD(0.1, steps=3), CW(0.1, steps=3),
                                    PGD(0.1, steps=3, restarts=2), PGD(0.5, steps=3, norm="l2"),
                                    AutoAttack(0.1, steps=3, queries=5),
                                    AutoAttack(0.5, "l2", steps=3, queries=5)], ids=repr)
def test_leaves_no_trace(channels, size, attack):
    torch.manual_seed(0)
    model = Careless(channels).train()
    model.norm.eval()
    x = torch.rand(size, channels, 8, 8)
    with torch.no_grad():
        y = model.eval()(x).argmax(1)  # right, so that there is something to attack
    model.train().norm.eval()
    model(x).sum().backward()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    gradients = {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
    flags, modes = [p.requires_grad for p in model.parameters()], [m.training for m in model.modules()]
    x_before, random_state = x.clone(), torch.get_rng_state()

    x_adv = attack(model, x, y)

    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    for name, p in model.named_parameters():
        assert (p.grad is None) if gradients[name] is None else torch.equal(p.grad, gradients[name])
    assert flags == [p.requires_grad for p in model.parameters()] and modes == [m.training for m in model.modules()]
    assert torch.equal(x, x_before) and not x.requires_grad and not x_adv.requires_grad
    assert x_adv.shape == x.shape
    assert not torch.equal(x_adv, x) or isinstance(attack, AutoAttack)  # which gives back what it did not break


def test_a_failing_model_is_put_back_too():
    class Broken(Careless):
        def forward(self, x):
            raise RuntimeError("broken")

    model = Broken(1).train()
    with pytest.raises(RuntimeError, match="broken"):
        FGSM(0.1)(model, torch.rand(2, 1, 8, 8), torch.tensor([0, 1]))
    assert model.training and model.conv.weight.requires_grad


def test_random_starts_come_from_the_seed_and_the_image(net, batch):
    x, y = batch
    attack = PGD(0.1, steps=0)
    assert torch.equal(attack(net, x, y), attack(net, x, y))
    assert not torch.equal(attack(net, x, y), PGD(0.1, steps=0, seed=1)(net, x, y))
    runs = [Draws(0, range(4)).start(attack.threat, x[:4], run) for run in (0, 1)]
    assert not torch.equal(*runs)
    noise = (runs[0] - x[:4]).flatten(1)
    assert not torch.equal(noise[0], noise[1])


@pytest.mark.parametrize("norm, eps", [("linf", 0.1), ("l2", 1.0)])
def test_draws_do_not_depend_on_the_batch(norm, eps):
    x, threat = torch.rand(10, 1, 8, 8), ThreatModel(eps, norm)
    whole = Draws(3, range(10)).start(threat, x, 7)
    for rows in ([4], [9, 2], [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]):
        assert torch.equal(Draws(3, rows).start(threat, x[rows], 7), whole[rows])
    right = torch.tensor([True, False] * 5)
    assert torch.equal(Draws(3, range(10)).take(right).start(threat, x[right], 7), whole[right])


def test_the_batch_size_changes_no_verdict(net, digits):
    verdicts = []
    for size in (100, 33, 7):
        loader = Loader(digits.x_test[:100], digits.y_test[:100], size)
        verdicts.append(robust_to(net, loader, PGD(0.02, steps=3), correct(net, loader), quiet=True))
    assert all(torch.equal(verdicts[0], other) for other in verdicts)


def test_gradients_of_the_caller_do_not_matter(net, batch):
    x, y = batch
    expected = PGD(0.1, steps=3)(net, x, y)
    with torch.no_grad():
        assert torch.equal(PGD(0.1, steps=3)(net, x, y), expected)
    tracked = PGD(0.1, steps=3)(net, x.clone().requires_grad_(), y)
    assert torch.equal(tracked, expected) and not tracked.requires_grad


@pytest.mark.parametrize("attack", [FGSM(0.1), PGD(0.1), APGD(0.1), FABT(0.1)], ids=lambda attack: attack.name)
def test_where_there_are_no_gradients_no_attack_pretends(net, batch, attack):
    x, y = batch
    with torch.inference_mode(), pytest.raises(RuntimeError,
                                               match="attacks need gradients, and torch.inference_mode forbids them"):
        attack(net, x, y)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("attack", [PGD(0.1, steps=2), PGD(1.0, steps=2, norm="l2"), APGD(1.0, steps=3, norm="l2"),
                                    Square(0.1, queries=5), Square(1.0, queries=5, norm="l2")])
def test_images_keep_their_precision(batch, attack, dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).to(dtype)
    x = batch[0].to(dtype)
    x_adv = attack(model, x, batch[1])
    assert x_adv.dtype == dtype and x_adv.min() >= 0 and x_adv.max() <= 1
    if dtype in (torch.float16, torch.bfloat16):  # eps is a few steps of these types, and holds exactly
        assert ThreatModel(attack.eps, attack.norm).length(x_adv.double() - x.double()).max() <= attack.eps * (1 + 1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("eps", [2 / 255, 8 / 255])
def test_half_precision_stays_inside_and_still_breaks(dtype, eps):
    torch.manual_seed(0)
    model, x, y = Linear(torch.Size((3, 8, 8))).to(dtype), torch.rand(40, 3, 8, 8).to(dtype), torch.randint(2, (40,))
    for attack in (PGD(eps), FGSM(eps), Square(eps, queries=20)):
        assert (attack(model, x, y).double() - x.double()).abs().max() <= eps * (1 + 1e-6)
    wide = PGD(eps)(model.float(), x.float(), y)
    share = (PGD(eps)(model.to(dtype), x, y).float() - x.float()).abs().mean() / (wide - x.float()).abs().mean()
    assert share > 0.7  # rounding towards the image takes little away


def test_labels_may_come_from_inference_mode(net, batch):
    with torch.inference_mode():
        y = net.eval()(batch[0]).argmax(1)
    for attack in (PGD(0.1, steps=1), CW(0.1, steps=1), FGSM(0.1)):
        attack(net, batch[0], y)


def test_an_attack_has_a_seed_of_its_own_in_an_evaluation(defended, digits):
    found = [evaluate(defended, digits, [PGD(0.2, steps=1, seed=seed)], quiet=True) for seed in (0, 0, 1)]
    assert found[0]["verdicts"] == found[1]["verdicts"] != found[2]["verdicts"]
    again = evaluate(defended, digits, [PGD(0.2, steps=1)], quiet=True,
                     seed=found[2]["metrics"]["pgd1"]["attack"]["seed"])
    assert again["verdicts"].split()[1] == found[2]["verdicts"].split()[1]


def test_prototypes_are_asked_for_in_an_evaluation_too(digits):
    with pytest.raises(ValueError, match="has no prototypes to attack: expected a PrototypeNet"):
        evaluate(Linear(torch.Size((1, 8, 8))), (digits.x_test[:4].astype("float32") / 255, digits.y_test[:4] % 2),
                 [PrototypePGD(0.1)], quiet=True)


def test_l2_where_every_image_has_fallen_and_where_there_is_none():
    never = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    nn.init.zeros_(never[1].weight)
    never[1].bias.data = torch.arange(10.0)  # it says 9
    x, y = torch.rand(4, 1, 8, 8), torch.zeros(4, dtype=torch.int64)
    for steps in (0, 2):
        found = PGD(1.0, norm="l2", restarts=2, steps=steps).search(Still(never), x, y, Draws(0, range(4)))
        assert found.shape == x.shape
    assert PGD(1.0)(never, x[:0], y[:0]).shape == (0, 1, 8, 8)


def test_more_steps_are_stronger(net, batch):
    x, y = batch
    loss = lambda attack: F.cross_entropy(net(attack(net, x, y)), y).item()
    net.eval()
    noise, one, many = loss(PGD(0.2, steps=0)), loss(FGSM(0.2)), loss(PGD(0.2))
    assert noise < one < many


IMAGES, LABELS = torch.rand(2, 1, 8, 8), torch.tensor([0, 1])


@pytest.mark.parametrize("x, y, message", [
    (IMAGES * 2, LABELS, r"expected \[0, 1\]: normalise inside"),
    (IMAGES - 0.5, LABELS, r"expected \[0, 1\]"),
    (IMAGES * float("nan"), LABELS, "images range from nan"),
    ((IMAGES * 255).byte(), LABELS, "images are torch.uint8"),
    (IMAGES[0], LABELS, r"of shape \(1, 8, 8\), expected floats of shape \(B, C, H, W\)"),
    (IMAGES, LABELS.float(), "labels are torch.float32"),
    (IMAGES, LABELS[:1], r"labels are torch.int64 of shape \(1,\), expected int64 of shape \(2,\)"),
    (IMAGES, torch.tensor([0, 10]), "labels range from 0 to 10, expected 0 to 9"),
    (IMAGES, torch.tensor([-1, 3]), "labels range from -1 to 3"),
])
def test_bad_batches(net, x, y, message):
    with pytest.raises(ValueError, match=message):
        PGD(0.1)(net, x, y)


@pytest.mark.parametrize("make, message", [
    (lambda: PGD(-0.1), "eps is -0.1: expected 0 to 1"),
    (lambda: FGSM(8), r"eps is 8: expected 0 to 1, the scale of the images \(8/255, not 8\)"),
    (lambda: PGD(0.1, steps=-1), "steps is -1"),
    (lambda: PGD(0.1, step_size=-1), "step_size is -1"),
    (lambda: ThreatModel(0.1, "l1"), "unknown norm 'l1': did you mean"),
])
def test_bad_attacks(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_reaches_the_optimum_in_l2(net):
    "On a linear model, and far from 0 and 1, the best image is eps along the difference of the weights."
    torch.manual_seed(0)
    model, x, y = Linear(torch.Size((1, 8, 8))), torch.full((20, 1, 8, 8), 0.5), torch.randint(2, (20,))
    uphill = (model.layer.weight[1 - y] - model.layer.weight[y]).view_as(x)
    optimum = x + 0.3 * uphill / uphill.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    torch.testing.assert_close(PGD(0.3, norm="l2", steps=40)(model, x, y), optimum, rtol=0, atol=1e-3)


def test_search_finds_at_least_what_the_last_iterate_finds(net, digits):
    loader = Loader(digits.x_test[:100], digits.y_test[:100], 40)
    right = correct(net, loader)
    x, y = loader.take(right.nonzero()[:, 0])
    for attack in (PGD(0.1), CW(0.1, steps=20), PrototypePGD(0.1)):
        verdicts = robust_to(net, loader, attack, right, quiet=True)
        last = net.eval()(attack(net, x, y)).argmax(1) == y
        assert verdicts.sum() <= last.sum() + 1 and not (verdicts & ~right).any()


def test_restarts_only_help(net, digits):
    loader = Loader(digits.x_test[:100], digits.y_test[:100], 100)
    right = correct(net, loader)
    once, often = (robust_to(net, loader, PGD(0.03, steps=2, restarts=n), right, quiet=True) for n in (1, 8))
    assert not (often & ~once).any()
    starts = [start for start, _ in PGD(0.03, restarts=3).starts(torch.rand(2, 1, 8, 8), Draws(0, range(2)))]
    assert not any(torch.equal(starts[i], starts[j]) for i, j in ((0, 1), (0, 2), (1, 2)))


def test_squared_distances_are_twice_the_margin(net, batch):
    x, y = batch
    with torch.no_grad():
        logits, own, other = prototype_distances(net.eval(), x, y)
    torch.testing.assert_close(own**2 - other**2, 2 * margin(logits, y), rtol=1e-3, atol=1e-3)


def test_prototype_attack_refuses_a_model_without(batch):
    with pytest.raises(ValueError, match="has no prototypes to attack"):
        PrototypePGD(0.1)(Careless(1), batch[0], batch[1] % 5)


def test_an_interrupted_attack_goes_on(net, digits):
    loader = Loader(digits.x_test[:60], digits.y_test[:60], 20)
    right, kept = correct(net, loader), []

    def keep(done, verdicts):
        kept.append((done, verdicts.clone()))
        if done == 1 and len(kept) == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        robust_to(net, loader, PGD(0.05, steps=2), right, quiet=True, keep=keep)
    rest = robust_to(net, loader, PGD(0.05, steps=2), right, quiet=True, begin=kept[0])
    assert torch.equal(rest, robust_to(net, loader, PGD(0.05, steps=2), right, quiet=True))
    assert robust_to(net, loader, PGD(0.05), torch.zeros_like(right), quiet=True).sum() == 0  # nothing to attack


class Elsewhere:
    "Somebody else's attack: a function of model, images and labels."

    name, eps = "elsewhere", 0.1

    def __init__(self, change):
        self.change = change

    def __call__(self, model, x, y):
        return self.change(x)


def test_attacks_of_others_are_judged_and_measured(net, digits):
    loader = Loader(digits.x_test[:40], digits.y_test[:40], 20)
    right = correct(net, loader)
    assert torch.equal(robust_to(net, loader, Elsewhere(lambda x: x), right, quiet=True), right)
    with pytest.raises(RuntimeError, match=r"elsewhere went 0.5.* allowed are 0.1 and \[0, 1\]"):
        robust_to(net, loader, Elsewhere(lambda x: (x + 0.5).clamp(0, 1)), torch.ones_like(right), quiet=True)
    with pytest.raises(RuntimeError, match=r"to values from -0.05"):
        check_inside(torch.zeros(1, 1, 2, 2) - 0.05, torch.zeros(1, 1, 2, 2), PGD(0.1))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu(net, batch):
    x, y = (t.cuda() for t in batch)
    net, state = net.cuda(), torch.cuda.get_rng_state()
    x_adv = PGD(0.1)(net, x, y)
    assert x_adv.is_cuda and (x_adv - x).abs().max() <= 0.1 + 1e-6
    assert torch.equal(torch.cuda.get_rng_state(), state)


class Noise(advdpnp.attacks.Attack):
    "An attack without a name or a budget."

    def perturb(self, still, x, y, draws):
        return x


def test_what_cannot_be_meant_is_refused(digits):
    with pytest.raises(ValueError, match="step_size is 10: expected at most 1"):
        PGD(8 / 255, 10)
    with pytest.raises(ValueError, match="step_size is nan"):
        PGD(8 / 255, step_size=float("nan"))
    with pytest.raises(ValueError, match="has no eps"):
        advdpnp.attacks.as_attack(Noise())
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).eval()
    with pytest.raises(ValueError, match="shuffles and augments"):
        correct(net, Loader(digits.x_test, digits.y_test, 128, train=True))


def test_an_attack_that_was_made_with_another_model_is_refused(digits):
    torchattacks = pytest.importorskip("torchattacks")
    one, other = (nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).eval() for _ in range(2))
    loader = Loader(digits.x_test[:20], digits.y_test[:20], 20)
    right = correct(other, loader)
    with pytest.raises(ValueError, match="was made with another model"):
        robust_to(other, loader, torchattacks.PGD(one, eps=0.1), right, quiet=True)
    for model in (other, nn.Sequential(other)):
        robust_to(model, loader, torchattacks.PGD(other, eps=0.1), right, quiet=True)


def test_distances_to_prototypes_are_those_of_their_formula():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Module()
            self.head.prototypes = nn.Parameter(torch.randn(5, 7, generator=torch.Generator().manual_seed(0)))
            self.head.forward = lambda features: features @ self.head.prototypes.T

        def features(self, x):
            return x

    net, y = Net(), torch.tensor([0, 1, 2])
    x = torch.cat([torch.randn(2, 7, generator=torch.Generator().manual_seed(1)), net.head.prototypes[2:3].detach()])
    x.requires_grad_()
    _, own, other = prototype_distances(net, x, y)
    expected = (x[:, None] - net.head.prototypes).norm(dim=2)
    assert torch.allclose(own, expected[range(3), y], atol=1e-5)
    assert torch.autograd.grad((other - own).sum(), x)[0].isfinite().all()  # also where a feature is its prototype


class Tied(nn.Module):
    "Where the mean is above a half, both classes have the same logit."

    def forward(self, x):
        return torch.stack([(x.mean((1, 2, 3)) > 0.5).float(), torch.ones(len(x))], 1)


def test_a_tie_that_is_lost_counts_for_square():
    x, y = torch.full((4, 1, 8, 8), 0.45), torch.ones(4, dtype=torch.long)
    x_adv = Square(0.2, queries=200)(Tied(), x, y)
    assert (Tied()(x_adv).argmax(1) != y).all()
