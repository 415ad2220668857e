"The rule that defines the dual branch: adversarial images never reach the prototypes, to the last bit."
import copy
from itertools import product

import pytest
import torch

from advdpnp.losses import CONSISTENCIES, REPULSIONS, adversarial_terms, clean_terms, weighted_sum
from advdpnp.methods import AdvDPNP
from advdpnp.prototypes import PrototypeHead
from advdpnp.training import Trainer

WEIGHTS = dict(alignment=0.3, repulsion=0.2, consistency=2.0)
METHOD = AdvDPNP(eps=0.2, steps=1, **WEIGHTS)


def on_prototypes(loss, head):
    return torch.autograd.grad(loss, head.directions)[0]


def clean_loss(head, features, y, method=METHOD):
    terms = clean_terms(head, features, y, method.cross_entropy, method.repulsion_form, method.alignment_moves)
    return weighted_sum(terms, method.weights)


def rule_holds_for_features(seed, method=METHOD):
    torch.manual_seed(seed)
    head, y, features = PrototypeHead(32, 7), torch.randint(7, (50,)), torch.randn(50, 32, requires_grad=True)
    clean, whole = on_prototypes(clean_loss(head, features, y, method), head), []
    for scale in (0.1, 1, 30):
        adv_features = (scale * torch.randn(50, 32)).requires_grad_()
        clean_branch = clean_terms(head, features, y, method.cross_entropy, method.repulsion_form,
                                   method.alignment_moves)
        terms = clean_branch | adversarial_terms(head, features, adv_features, y, method.cross_entropy,
                                                 method.consistency_form, method.clean_only_update,
                                                 method.alignment_moves)
        whole.append(on_prototypes(weighted_sum(terms, method.weights), head))
    return all(torch.equal(clean, gradient) for gradient in whole)


def rule_holds_for_images(net, x, y, training, seed, **settings):
    torch.manual_seed(seed)
    net.train(training)
    x_adv = (x + 0.3 * torch.randn_like(x)).clamp(0, 1)
    loss, _ = AdvDPNP(eps=0.2, **WEIGHTS, **settings).loss(net, x, x_adv, y)
    return torch.equal(on_prototypes(clean_loss(net.head, net.features(x), y), net.head), on_prototypes(loss, net.head))


@pytest.mark.parametrize("seed", range(10))
def test_given_features(seed):
    assert rule_holds_for_features(seed)


@pytest.mark.parametrize("repulsion, consistency", [*product(REPULSIONS, CONSISTENCIES)])
def test_whatever_the_form_of_the_terms(repulsion, consistency):
    forms = dict(repulsion_form=repulsion, consistency_form=consistency, label_smoothing=0.1)
    assert rule_holds_for_features(0, AdvDPNP(eps=0.2, **WEIGHTS, **forms))
    assert not rule_holds_for_features(0, AdvDPNP(eps=0.2, **WEIGHTS, **forms, clean_only_update=False))
    assert rule_holds_for_features(0, AdvDPNP(eps=0.2, **WEIGHTS, **forms, alignment_moves="features"))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_given_images(net, batch, training, seed):
    assert rule_holds_for_images(net, *batch, training, seed)


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_in_the_steps_of_a_trainer(net, digits, precision):
    "What is left in the prototypes' gradient after a real step is the clean branch's gradient before it."
    trainer = Trainer(net, METHOD, digits, epochs=1, batch_size=64, precision=precision, device="cpu", quiet=True)
    moved = []
    for _, (x, y) in zip(range(4), trainer.loader.epoch(0)):
        before = copy.deepcopy(net).train()
        trainer.step(x, y)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            clean = clean_loss(before.head, before.features(x), y)
        assert torch.equal(net.head.directions.grad, on_prototypes(clean, before.head))
        moved.append(not torch.equal(net.head.directions, before.head.directions))
    assert all(moved)


def test_a_shared_batch_breaks_it_through_batch_norm(net, batch):
    assert not rule_holds_for_images(net, *batch, training=True, seed=0, shared_batch=True)


def test_without_detaching_the_logits_it_fails(net, batch, monkeypatch):
    forward = PrototypeHead.forward
    monkeypatch.setattr(PrototypeHead, "forward", lambda self, features, detach=False: forward(self, features))
    assert not rule_holds_for_features(0)
    assert not rule_holds_for_images(net, *batch, training=True, seed=0)


def test_without_detaching_the_alignment_it_fails(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "detach", lambda self: self)
    head, y = PrototypeHead(32, 7), torch.randint(7, (50,))
    terms = adversarial_terms(head, torch.randn(50, 32), torch.randn(50, 32), y)
    assert on_prototypes(terms["adv_alignment"], head).abs().max() > 0


def test_both_branches_move_the_backbone(net, batch):
    x, y = batch
    loss, terms = AdvDPNP(eps=0.2).loss(net, x, 1 - x, y)
    weight = net.backbone.conv1.weight
    for name in ("ce", "adv_ce", "adv_alignment", "consistency"):
        gradient, = torch.autograd.grad(terms[name], weight, retain_graph=True)
        assert gradient.abs().max() > 0, name
