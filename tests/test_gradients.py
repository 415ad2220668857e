"The rule that defines the dual branch: adversarial images never reach the prototypes, to the last bit."
import pytest
import torch

from advdpnp.losses import AdvDPNPLoss
from advdpnp.prototypes import PrototypeHead
from advdpnp.training import AdvDPNP

WEIGHTS = dict(alignment=0.3, repulsion=0.2, consistency=2.0)


def on_prototypes(loss, head):
    return torch.autograd.grad(loss, head.directions)[0]


def clean_gradient(net, x, y):
    loss = AdvDPNPLoss(**WEIGHTS)
    return on_prototypes(loss.total(loss.clean_branch(net.head, net.features(x), y)), net.head)


def rule_holds_for_features(seed):
    torch.manual_seed(seed)
    head, loss, y = PrototypeHead(32, 7), AdvDPNPLoss(**WEIGHTS), torch.randint(7, (50,))
    features = torch.randn(50, 32, requires_grad=True)
    clean = on_prototypes(loss.total(loss.clean_branch(head, features, y)), head)
    whole = [on_prototypes(loss(head, features, (scale * torch.randn(50, 32)).requires_grad_(), y)[0], head)
             for scale in (0.1, 1, 30)]
    return all(torch.equal(clean, gradient) for gradient in whole)


def rule_holds_for_images(net, x, y, training, seed, **settings):
    torch.manual_seed(seed)
    net.train(training)
    x_adv = (x + 0.3 * torch.randn_like(x)).clamp(0, 1)
    loss, _ = AdvDPNP(eps=0.2, **WEIGHTS, **settings).loss(net, x, x_adv, y)
    return torch.equal(clean_gradient(net, x, y), on_prototypes(loss, net.head))


@pytest.mark.parametrize("seed", range(10))
def test_given_features(seed):
    assert rule_holds_for_features(seed)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("seed", range(5))
def test_given_images(net, batch, training, seed):
    assert rule_holds_for_images(net, *batch, training, seed)


def test_a_shared_batch_breaks_it_through_batch_norm(net, batch):
    assert not rule_holds_for_images(net, *batch, training=True, seed=0, shared_batch=True)


def test_without_detaching_the_logits_it_fails(net, batch, monkeypatch):
    forward = PrototypeHead.forward
    monkeypatch.setattr(PrototypeHead, "forward", lambda self, features, detach=False: forward(self, features))
    assert not rule_holds_for_features(0)
    assert not rule_holds_for_images(net, *batch, training=True, seed=0)


def test_without_detaching_the_alignment_it_fails(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "detach", lambda self: self)
    head, loss, y = PrototypeHead(32, 7), AdvDPNPLoss(alignment=1.0, consistency=0.0), torch.randint(7, (50,))
    features, adv_features = torch.randn(50, 32), torch.randn(50, 32)
    terms = loss.adversarial_branch(head, features, adv_features, y)
    assert on_prototypes(terms["adv_alignment"], head).abs().max() > 0


def test_both_branches_move_the_backbone(net, batch):
    x, y = batch
    loss, terms = AdvDPNP(eps=0.2).loss(net, x, 1 - x, y)
    weight = net.backbone.conv1.weight
    for name in ("ce", "adv_ce", "adv_alignment", "consistency"):
        gradient, = torch.autograd.grad(terms[name], weight, retain_graph=True)
        assert gradient.abs().max() > 0, name
