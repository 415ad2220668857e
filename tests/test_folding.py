"Batch-norms folded into convolutions while an attack lasts: the same function, or none is folded."
import copy

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune

import advdpnp.backbones  # noqa: F401, registers its networks
from advdpnp.attacks import PGD, batch_norms_after_convolutions, fold, folded, untouched
from advdpnp.data import seeded


class Block(nn.Module):
    "A pre-activation block as in the field's code: a batch-norm on its input, and a sum that is made in place."

    def __init__(self, width):
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(width), nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2, self.conv2 = nn.BatchNorm2d(width), nn.Conv2d(width, width, 3, padding=1, bias=False)

    def forward(self, x):
        out = self.conv1(F.relu(self.bn1(x)))
        out = self.conv2(F.relu(self.bn2(out)))
        out += x
        return out


class SharedNorm(nn.Module):
    "One batch-norm after two convolutions."

    def __init__(self):
        super().__init__()
        self.a, self.b, self.norm = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x):
        return self.norm(self.b(F.relu(self.norm(self.a(x))))).mean((2, 3))


class Gated(nn.BatchNorm2d):
    "Does more than a batch-norm does."

    def forward(self, x):
        return super().forward(x) + 0.5 * x


def flat(*layers):
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())


NETWORKS = {  # to the pairs that may be folded
    "resnet": (lambda: timm.create_model("cifar_resnet8", in_chans=1), 9),
    # the shortcut takes a convolution's output, too
    "pre-activation": (lambda: flat(nn.Conv2d(1, 8, 3), Block(8), Block(8)), 0),
    "in-place": (lambda: flat(nn.Conv2d(1, 8, 3), nn.ReLU(inplace=True), nn.BatchNorm2d(8)), 0),
    "shared norm": (SharedNorm, 0),
    "gated norm": (lambda: flat(nn.Conv2d(1, 8, 3), Gated(8)), 0),
    "no statistics": (lambda: flat(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8, track_running_stats=False)), 0),
    "biased and grouped": (lambda: flat(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(),
                                        nn.Conv2d(8, 8, 3, groups=4, stride=2), nn.BatchNorm2d(8)), 2),
    "weight norm": (lambda: flat(nn.utils.parametrizations.weight_norm(nn.Conv2d(1, 8, 3)), nn.BatchNorm2d(8)), 0),
}


def same_when_folded(net, x):
    net.eval()
    with torch.no_grad():
        plain = net(x)
        with folded(net, x):
            inside = net(x)
        assert torch.equal(net(x), plain)
    torch.testing.assert_close(inside, plain, rtol=1e-4, atol=1e-4 * plain.abs().max().item())


@pytest.mark.parametrize("name", NETWORKS)
def test_first_attacked_untrained_and_still_the_same_function_after_training(name):
    "Untrained batch-norms do next to nothing, which would hide a wrong pair."
    make, pairs = NETWORKS[name]
    torch.manual_seed(0)
    net, x, y = make(), torch.rand(16, 1, 12, 12), torch.arange(16) % 4
    PGD(0.1, steps=2)(net, x, y)  # here pairs are found
    optimizer = torch.optim.SGD(net.parameters(), lr=0.3)
    for _ in range(8):
        net.train()
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()
    assert len(batch_norms_after_convolutions(net.eval(), x)) == pairs
    same_when_folded(net, x)


def test_networks_that_change_after_the_first_attack():
    torch.manual_seed(0)
    x, y = torch.rand(8, 1, 12, 12), torch.arange(8) % 4
    make = lambda: timm.create_model("cifar_resnet8", in_chans=1).eval()
    for change in (lambda net: nn.utils.parametrizations.weight_norm(net.conv1),
                   lambda net: setattr(net, "bn1", copy.deepcopy(net.bn1)),
                   lambda net: setattr(net, "bn1", Gated(16)),
                   lambda net: prune.l1_unstructured(net.layer1[0].conv1, "weight", 0.5)):
        net = make()
        PGD(0.1, steps=1)(net, x, y)
        change(net)
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.running_mean, -0.5, 0.5)
        names = [*net.state_dict()]
        same_when_folded(net, x)
        assert [*net.state_dict()] == names


@pytest.mark.parametrize("where", ["in the model", "in the fold"])
def test_an_exception_leaves_no_trace(where, monkeypatch):
    net, x, y = timm.create_model("cifar_resnet8", in_chans=1), torch.rand(4, 1, 12, 12), torch.arange(4)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with untouched(net, seeded("cpu", 0)):
        pairs = batch_norms_after_convolutions(net, x)
    if where == "in the fold":
        broken = [*pairs[:3], (pairs[3][0], nn.BatchNorm2d(999).eval())]
        with pytest.raises(RuntimeError), fold(broken):
            pass
    else:
        calls = []
        door = net.layer2.register_forward_pre_hook(lambda *_: calls.append(1) or (1 / 0 if len(calls) > 2 else None))
        with pytest.raises(ZeroDivisionError):
            PGD(0.1, steps=5, random_start=False)(net, x, y)
        door.remove()
    after = net.state_dict()
    assert [*after] == [*before] and all(torch.equal(after[name], value) for name, value in before.items())
    assert not any("forward" in vars(module) for module in net.modules()) and net.training
    assert all(parameter.requires_grad for parameter in net.parameters())


def test_a_model_around_a_model_and_a_copy():
    torch.manual_seed(0)
    net, x = timm.create_model("cifar_resnet8", in_chans=1).eval(), torch.rand(4, 1, 12, 12)
    around = nn.Sequential(net, nn.Linear(10, 3)).eval()
    with torch.no_grad():
        plain, outer = net(x), around(x)
        with folded(net, x), folded(around, x):  # its batch-norms are folded already
            torch.testing.assert_close(net(x), plain, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(around(x), outer, rtol=1e-4, atol=1e-5)
        twin = copy.deepcopy(net)
        with folded(net, x):
            assert torch.equal(twin(x), plain)  # a copy is another network


def test_compiled_networks_are_left_alone():
    net, x = timm.create_model("cifar_resnet8", in_chans=1).eval(), torch.rand(4, 1, 12, 12)
    with folded(net, x):
        assert "forward" in vars(net.bn1)
    net._compiled_call_impl = lambda *args: None  # what `net.compile()` sets
    with folded(net, x):
        assert "forward" not in vars(net.bn1)
