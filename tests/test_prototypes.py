import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from advdpnp.losses import clean_terms, negative_repulsion, weighted_sum
from advdpnp.prototypes import (Classifier, LinearNet, PrototypeHead, PrototypeNet, auto_norm, make_backbone,
                                regular_simplex)

OPTIMISERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.5, momentum=0.9, weight_decay=0.1),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.5, momentum=0.9, weight_decay=0.1, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.1, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.5),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.5, weight_decay=0.1),
}


@pytest.mark.parametrize("optimiser", OPTIMISERS)
@pytest.mark.parametrize("norm", [1.0, 2.5, 7.0])
def test_norm_survives_any_optimiser(optimiser, norm):
    torch.manual_seed(0)
    head = PrototypeHead(64, 10, norm)
    step = OPTIMISERS[optimiser](head.parameters())
    start = head.prototypes.detach().clone()
    for _ in range(100):
        loss = F.cross_entropy(head(torch.randn(16, 64)),
                               torch.randint(10, (16,))) + negative_repulsion(head.prototypes)
        step.zero_grad()
        loss.backward()
        step.step()
    assert (head.prototypes - start).norm() > 0.1  # they did move
    assert (head.prototypes.double().norm(dim=1) / norm - 1).abs().max() < 1e-6


def test_repulsion_alone_reaches_the_simplex():
    torch.manual_seed(7)
    head, steps = PrototypeHead(64, 10, norm=1.0), 400
    for step in range(steps):
        gradient, = torch.autograd.grad(negative_repulsion(head.prototypes), head.directions)
        with torch.no_grad():
            head.directions -= (1 - step / steps) * gradient
    cosines = (head.prototypes @ head.prototypes.T)[~torch.eye(10, dtype=bool)]
    assert (cosines + 1 / 9).abs().max() < 0.01


@pytest.mark.parametrize("num_classes, confidence", [(3, 0.9), (10, 0.99)])
def test_closed_form_predicts_the_confidence_training_reaches(num_classes, confidence):
    "Well-separated blobs, a small network whose features can take any sign, the clean branch of the loss."
    torch.manual_seed(0)
    y = torch.arange(num_classes).repeat(40)
    x = 4 * torch.randn(num_classes, 20)[y] + 0.1 * torch.randn(len(y), 20)
    backbone = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 16))
    head = PrototypeHead(16, num_classes, auto_norm(num_classes, confidence))
    optimiser = torch.optim.Adam([*backbone.parameters(), *head.parameters()], lr=1e-2)
    for step in range(400):
        for group in optimiser.param_groups:
            group["lr"] = 1e-2 * (1 - step / 400)
        total = weighted_sum(clean_terms(head, backbone(x), y), dict(ce=1.0, alignment=3.0, repulsion=3.0))
        optimiser.zero_grad()
        total.backward()
        optimiser.step()
    reached = F.softmax(head(backbone(x)), 1)[torch.arange(len(y)), y]
    assert abs(reached.mean().item() - confidence) < 0.2 * (1 - confidence)
    assert reached.std() < 0.2 * (1 - confidence)


def test_linear_and_nearest_prototype_classification_agree():
    torch.manual_seed(0)
    head, features = PrototypeHead(16, 10), torch.randn(200, 16)
    assert torch.equal(head(features).argmax(1), torch.cdist(features, head.prototypes).argmin(1))


def test_a_model_is_an_ordinary_module(net, batch):
    x, _ = batch
    net.eval()
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert torch.equal(other(x), net(x))
    torch.manual_seed(1)
    other = PrototypeNet("cifar_resnet8", 10, mean=(0.0,), std=(1.0,)).eval()
    other.load_state_dict(net.state_dict())
    assert torch.equal(other(x), net(x))


@pytest.mark.parametrize("arguments, message", [
    (dict(num_classes=1), "num_classes is 1"),
    (dict(norm=0), "norm is 0: expected a positive number"),
    (dict(norm=float("nan")), "norm is nan"),
    (dict(norm="large"), "norm is 'large': expected a positive number or 'auto'"),
])
def test_bad_heads(arguments, message):
    with pytest.raises(ValueError, match=message):
        PrototypeHead(**(dict(in_features=8, num_classes=10) | arguments))


def test_bad_architecture_names_the_nearest():
    with pytest.raises(ValueError, match="unknown architecture 'resnet181'.*'resnet18'"):
        PrototypeNet("resnet181", 10)


@pytest.mark.parametrize("make, message", [
    (lambda: auto_norm(10, confidence=0.05), "expected more than chance, 1/10, and less than 1"),
    (lambda: regular_simplex(10, 5), "10 classes need 9 dimensions to be equally far apart, not 5"),
    (lambda: make_backbone(nn.Flatten()), "Flatten does not say how many features it returns"),
    (lambda: Classifier(nn.Flatten(), nn.Identity(), (0.1, 0.2), (1.0,)), "mean has 2 and std 1 numbers"),
    (lambda: PrototypeNet("cifar_resnet8", 10)(torch.rand(2, 1, 8, 8)), "expected 3 channels"),
    (lambda: Classifier(nn.Identity(), nn.Linear(4, 2))(torch.rand(2, 1, 2, 2)), "Identity returns features"),
])
def test_bad_networks(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_prototype_norm_is_saved_with_the_weights():
    head, other = PrototypeHead(2, 3, norm=2.0), PrototypeHead(2, 3, norm=7.0)
    other.load_state_dict(head.state_dict())
    assert torch.equal(other(torch.eye(2)), head(torch.eye(2)))


@pytest.mark.parametrize("mean, std", [((125.3,), (63.0,)), ((0.5,), (0.0,)), (0.5, float("nan"))])
def test_statistics_of_another_scale_are_refused(mean, std):
    with pytest.raises(ValueError, match="expected means from 0 to 1 and positive deviations"):
        LinearNet("cifar_resnet8", 10, mean=mean, std=std)


def test_one_number_is_for_all_channels():
    net = PrototypeNet("cifar_resnet8", 10, mean=0.5, std=0.25).eval()
    assert net(torch.rand(2, 1, 8, 8)).shape == (2, 10)
