"Every loss against an independent computation in float64 NumPy."
import numpy as np
import pytest
import torch

from advdpnp import losses
from advdpnp.methods import DPNP, MART, METHODS, PGDAT, TRADES, AdvDPNP, DualBranchLinear, Method, Standard, make_net
from advdpnp.methods import split_name
from advdpnp.prototypes import LinearNet, PrototypeHead
from advdpnp.still import Still


def log_softmax(z):
    shifted = z - z.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def cross_entropy(z, y):
    return -log_softmax(z)[np.arange(len(y)), y].mean()


def kl(z, z_adv):
    p, q = log_softmax(z), log_softmax(z_adv)
    return (np.exp(p) * (p - q)).sum(axis=1).mean()


def alignment(f, y, c):
    return np.mean([0.5 * np.sum((f[i] - c[y[i]]) ** 2) for i in range(len(y))])


def repulsion(c):
    nearest = []
    for k in range(len(c)):
        others = [c[k] @ c[j] / np.linalg.norm(c[k]) / np.linalg.norm(c[j]) for j in range(len(c)) if j != k]
        nearest.append(max(others))
    return np.mean(nearest)


def cosine(a, b):
    return a @ b / np.linalg.norm(a) / np.linalg.norm(b)


def mart(z, z_adv, y, beta):
    total = 0
    for clean, adv, label in zip(np.exp(log_softmax(z)), np.exp(log_softmax(z_adv)), y):
        boosted = -np.log(adv[label]) - np.log(1.0001 - max(adv[k] for k in range(len(adv)) if k != label))
        total += boosted + beta * sum(p * np.log(p / q) for p, q in zip(clean, adv)) * (1 - clean[label])
    return total / len(y)


@pytest.fixture(params=range(5))
def case(request):
    rng = np.random.default_rng(request.param)
    b, d, k = rng.integers(1, 40), rng.integers(2, 30), rng.integers(2, 12)
    f, f_adv, y = rng.normal(size=(b, d)), rng.normal(size=(b, d)) * 2, rng.integers(0, k, b)
    torch.manual_seed(request.param)
    head = PrototypeHead(d, k, norm=float(rng.uniform(0.5, 5))).double()
    return head, f, f_adv, y


def same(ours, reference):
    assert ours.item() == pytest.approx(reference, rel=1e-9, abs=1e-12)


def test_terms_and_total(case):
    head, f, f_adv, y = case
    c = head.directions.detach().numpy()
    c = head.norm.item() * c / np.linalg.norm(c, axis=1, keepdims=True)
    tf, tf_adv, ty = torch.from_numpy(f), torch.from_numpy(f_adv), torch.from_numpy(y)
    z, z_adv = f @ c.T, f_adv @ c.T
    expected = dict(ce=cross_entropy(z, y), alignment=alignment(f, y, c), repulsion=repulsion(c),
                    adv_ce=cross_entropy(z_adv, y),
                    adv_alignment=alignment(f_adv, y, c), consistency=kl(z, z_adv))
    same(losses.positive_alignment(tf, ty, head.prototypes), expected["alignment"])
    same(losses.negative_repulsion(head.prototypes), expected["repulsion"])
    same(losses.consistency(head(tf), head(tf_adv)), expected["consistency"])

    terms = losses.clean_terms(head, tf, ty) | losses.adversarial_terms(head, tf, tf_adv, ty)
    total = losses.weighted_sum(terms, AdvDPNP(alignment=0.7, repulsion=0.4, consistency=2.5).weights)
    assert terms.keys() == expected.keys()
    for name, value in expected.items():
        same(terms[name], value)
    same(total, expected["ce"] + 0.7 * expected["alignment"] + 0.4 * expected["repulsion"]
         + expected["adv_ce"] + 0.7 * expected["adv_alignment"] + 2.5 * expected["consistency"])


def test_other_forms(case):
    head, f, f_adv, y = case
    c = head.prototypes.detach().numpy()
    tf, tf_adv, ty = torch.from_numpy(f), torch.from_numpy(f_adv), torch.from_numpy(y)
    pairs = [cosine(c[j], c[k]) for j in range(len(c)) for k in range(len(c)) if j != k]
    same(losses.mean_repulsion(head.prototypes), np.mean(pairs))
    rivals = [max((k for k in range(len(c)) if k != label), key=lambda k: features @ c[k])
              for features, label in zip(f, y)]
    same(losses.sample_repulsion(tf, ty, head.prototypes),
         np.mean([cosine(c[label], c[k]) for label, k in zip(y, rivals)]))
    same(losses.half_distance(tf, tf_adv), np.mean([0.5 * sum((a - b) ** 2) for a, b in zip(f, f_adv)]))


def test_methods_from_images(digits, net, batch):
    "The methods' own losses, from images, in evaluation mode so that the reference sees the same features."
    x, y = batch[0].double(), batch[1]
    x_adv = (x + 0.1 * torch.randn(x.shape, dtype=torch.float64,
                                   generator=torch.Generator().manual_seed(0))).clamp(0, 1)
    torch.manual_seed(0)
    linear = LinearNet("cifar_resnet8", 10, mean=digits.mean, std=digits.std).double().eval()
    net = net.double().eval()
    with torch.no_grad():
        z, z_adv = linear(x).numpy(), linear(x_adv).numpy()
        f, f_adv, c = net.features(x).numpy(), net.features(x_adv).numpy(), net.head.prototypes.numpy()
        y_np = y.numpy()
        same(Standard().loss(linear, x, x, y)[0], cross_entropy(z, y_np))
        same(PGDAT(eps=0.1).loss(linear, x, x_adv, y)[0], cross_entropy(z_adv, y_np))
        same(MART(eps=0.1, beta=3.0).loss(linear, x, x_adv, y)[0], mart(z, z_adv, y_np, 3))
        same(DualBranchLinear(eps=0.1, consistency=2.0, clean_weight=0.5).loss(linear, x, x_adv, y)[0],
             0.5 * cross_entropy(z, y_np) + cross_entropy(z_adv, y_np) + 2 * kl(z, z_adv))
        same(TRADES(eps=0.1, beta=6.0).loss(linear, x, x_adv, y)[0], cross_entropy(z, y_np) + 6 * kl(z, z_adv))
        clean = cross_entropy(f @ c.T, y_np) + 0.3 * alignment(f, y_np, c) + 0.2 * repulsion(c)
        same(DPNP(alignment=0.3, repulsion=0.2).loss(net, x, x, y)[0], clean)
        same(AdvDPNP(eps=0.1, alignment=0.3, repulsion=0.2, consistency=4.0).loss(net, x, x_adv, y)[0],
             clean + cross_entropy(f_adv @ c.T, y_np) + 0.3 * alignment(f_adv, y_np, c) + 4 * kl(f @ c.T, f_adv @ c.T))


def test_trades_ascends_its_own_divergence(digits, batch):
    "Against a plain transcription of the published algorithm, from the same noise."
    x, y = batch
    torch.manual_seed(0)
    model = LinearNet("cifar_resnet8", 10, mean=digits.mean, std=digits.std).eval()
    generator = torch.Generator().manual_seed(5)
    noise = torch.randn(x.shape, generator=generator)
    reference = (x + 0.001 * noise).clamp(0, 1)
    for _ in range(5):
        reference = reference.detach().requires_grad_()
        divergence = torch.nn.functional.kl_div(model(reference).log_softmax(1), model(x).softmax(1).detach(),
                                                reduction="sum")
        gradient, = torch.autograd.grad(divergence, reference)
        reference = reference.detach() + 0.05 * gradient.sign()
        reference = torch.min(torch.max(reference, x - 0.2), x + 0.2).clamp(0, 1)
    ours = TRADES(eps=0.2, steps=5).craft(Still(model, x), x, y, noise)
    assert (ours - reference).abs().mean() < 1e-3  # a sign may flip where the gradient is all but zero


def test_settings_for_comparison(batch, net):
    "Each changes what it says, and nothing else."
    x, y = batch
    net, x_adv = net.eval(), (x + 0.05).clamp(0, 1)
    loss, terms = AdvDPNP().loss(net, x, x_adv, y)
    both, both_terms = AdvDPNP(clean_only_update=False).loss(net, x, x_adv, y)
    assert both.item() == pytest.approx(loss.item(), rel=1e-6)  # the same value, another gradient
    pull = lambda total: torch.autograd.grad(total, net.head.directions)[0]
    assert not torch.allclose(pull(both), pull(loss), rtol=0.1)
    shared, _ = AdvDPNP(shared_batch=True).loss(net, x, x_adv, y)
    assert shared.item() == pytest.approx(loss.item(), rel=1e-5)  # in evaluation mode batches do not matter
    features_only, same_terms = AdvDPNP(alignment_moves="features").loss(net, x, x_adv, y)
    assert features_only.item() == loss.item() and same_terms == terms
    assert torch.equal(pull(features_only), pull(AdvDPNP(alignment=0.0).loss(net, x, x_adv, y)[0]))
    on_backbone = lambda total: torch.autograd.grad(total, [*net.backbone.parameters()])
    assert all(map(torch.equal, on_backbone(AdvDPNP(alignment_moves="features").loss(net, x, x_adv, y)[0]),
                   on_backbone(AdvDPNP().loss(net, x, x_adv, y)[0])))
    with pytest.raises(ValueError, match="thing that alignment moves"):
        AdvDPNP(alignment_moves="prototypes")
    half = AdvDPNP(clean_weight=0.5)
    assert half.weights == AdvDPNP().weights | dict(ce=0.5, alignment=0.005)
    smoothed = AdvDPNP(label_smoothing=0.1).loss(net, x, x_adv, y)[1]
    assert smoothed["ce"] != terms["ce"] and smoothed["consistency"] == terms["consistency"]


def test_defaults_are_those_for_photographs():
    method = AdvDPNP()
    assert (method.eps, method.steps, method.alignment, method.repulsion, method.consistency) == (8 / 255, 10, 0.01,
                                                                                                 0.1, 3.0)


@pytest.mark.parametrize("make, message", [
    (lambda: AdvDPNP(alignment=float("nan")), "alignment is nan: expected a finite weight"),
    (lambda: TRADES(beta=-1.0), "beta is -1.0: expected a finite weight"),
    (lambda: AdvDPNP(steps=0), "steps is 0: expected at least 1"),
    (lambda: PGDAT(eps=8), "eps is 8: expected 0 to 1"),
    (lambda: Method(label_smoothing=-3), "label_smoothing is -3: expected 0 to 1"),
    (lambda: AdvDPNP(repulsion_form="max"), "unknown form of repulsion 'max'"),
    (lambda: AdvDPNP(consistency_form="kk"), "unknown form of consistency 'kk': did you mean 'kl'"),
    (lambda: split_name("TRADES+EMA+AWP"), r"write it 'TRADES\+AWP\+EMA'"),
    (lambda: split_name("TRADES+AMP"), "did you mean 'AWP'"),
    (lambda: make_net("PGDAT", "cifar_resnet8", 10, (0.5,), (0.5,)), "did you mean 'PGD-AT'"),
])
def test_bad_methods(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_what_methods_need(digits):
    for name, method in METHODS.items():
        net = make_net(name, "cifar_resnet8", 10, digits.mean, digits.std)
        assert hasattr(net.head, "prototypes") == method.prototypes
        assert method.adversarial == ("eps" in method.__dataclass_fields__)


def test_settings_of_methods_are_python_s_own_numbers():
    assert PGDAT(steps=10.0).steps == 10 and type(PGDAT(steps=np.int64(3)).steps) is int
    with pytest.raises(ValueError, match="consistency is 'kl'"):
        AdvDPNP(consistency="kl")
