"A model held still: the same function, folded only where that is exact, and nothing is left behind."
import copy
import threading
import types
from concurrent.futures import ThreadPoolExecutor

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune

import advdpnp.backbones  # noqa: F401, registers its networks
from advdpnp.attacks import PGD
from advdpnp.prototypes import PrototypeNet
from advdpnp.still import (Still, folding_pairs, frozen_copy, full_precision, held_still, modules_of, named_tensors,
                           products_in, unwrapped)

X, Y = torch.rand(16, 1, 12, 12, generator=torch.Generator().manual_seed(0)), torch.arange(16) % 4


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


class Switched(nn.Module):
    "A convolution and two batch-norms, of which a switch chooses one."

    def __init__(self):
        super().__init__()
        self.conv, self.norms, self.which = nn.Conv2d(1, 4, 3), nn.ModuleList([nn.BatchNorm2d(4), nn.BatchNorm2d(4)]), 0

    def forward(self, x):
        return self.norms[self.which](self.conv(x)).mean((2, 3))


class Looks(nn.Module):
    "Looks at its own batch-norm in another way, so that it cannot be folded."

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x):
        scale = getattr(self.norm, "weight", torch.zeros(4))
        return self.norm(self.conv(x)).mean((2, 3)) * (1 + scale)


def flat(*layers):
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())


NETWORKS = {  # to the pairs that may be folded
    "resnet": (lambda: timm.create_model("cifar_resnet8", in_chans=1), 9),
    # the first batch-norm of a block takes what the shortcut takes, too
    "pre-activation": (lambda: flat(nn.Conv2d(1, 8, 3), Block(8), Block(8)), 2),
    "in-place": (lambda: flat(nn.Conv2d(1, 8, 3), nn.ReLU(inplace=True), nn.BatchNorm2d(8)), 0),
    "shared norm": (SharedNorm, 0),
    "gated norm": (lambda: flat(nn.Conv2d(1, 8, 3), Gated(8)), 0),
    "no statistics": (lambda: flat(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8, track_running_stats=False)), 0),
    "biased and grouped": (lambda: flat(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(),
                                        nn.Conv2d(8, 8, 3, groups=4, stride=2), nn.BatchNorm2d(8)), 2),
    "weight norm": (lambda: flat(nn.utils.parametrizations.weight_norm(nn.Conv2d(1, 8, 3)), nn.BatchNorm2d(8)), 0),
    "switched": (Switched, 1),
    "our own": (lambda: PrototypeNet("cifar_resnet8", 4, mean=(0.5,), std=(0.25,)), 9),
}


def train(net, steps=4):
    optimizer = torch.optim.SGD(net.parameters(), lr=0.3)
    for _ in range(steps):
        net.train()
        optimizer.zero_grad()
        F.cross_entropy(net(X), Y).backward()
        optimizer.step()
    return net


def assert_same(still, net):
    "In evaluation mode."
    with torch.no_grad():
        plain = frozen_copy(net)(X)
        torch.testing.assert_close(still(X), plain, rtol=1e-3, atol=1e-3 * plain.abs().max().item())


@pytest.mark.parametrize("name", NETWORKS)
def test_copied_untrained_and_still_the_same_function_after_training(name):
    "Untrained batch-norms do next to nothing, which would hide a wrong pair."
    make, pairs = NETWORKS[name]
    torch.manual_seed(0)
    net = make()
    still = Still(net, X)
    assert len(still.pairs) == pairs
    train(net)
    still.refresh()
    assert_same(still, net)
    assert_same(Still(net, X), net)
    assert still.same_as_model(X)


@pytest.mark.parametrize("change", [
    lambda net: nn.utils.parametrizations.weight_norm(net.conv1),
    lambda net: setattr(net, "fc", nn.Linear(64, 3)),
    lambda net: prune.l1_unstructured(net.layer1[0].conv1, "weight", 0.5),
])
def test_a_copy_that_cannot_follow_is_an_error(change):
    net = timm.create_model("cifar_resnet8", in_chans=1)
    still = Still(net, X)
    change(net)
    with pytest.raises(RuntimeError, match="the model has other weights than when it was copied"):
        still.refresh()
    with held_still(net, X) as new, torch.no_grad():  # a new one is right
        torch.testing.assert_close(new(X), net.eval()(X), rtol=1e-3, atol=1e-3)


def test_a_network_that_takes_another_path_is_not_what_was_copied():
    net = train(Switched())
    nn.init.constant_(net.norms[1].weight, 3.0)
    still = Still(net, X)
    net.which = 1
    still.refresh()
    assert not still.same_as_model(X)
    assert_same(Still(net, X), net)


def test_a_network_that_looks_at_its_batch_norms_is_not_folded():
    net = train(Looks())
    assert folding_pairs(net.eval(), X[:1])
    still = Still(net, X)
    assert still.pairs == []
    assert_same(still, net)


def test_refreshing_keeps_every_place_in_memory():
    net = timm.create_model("cifar_resnet8", in_chans=1)
    still = Still(net, X)
    places = {name: t.data_ptr() for name, t in named_tensors(still.copy).items()}
    train(net, 2)
    still.refresh()
    assert places == {name: t.data_ptr() for name, t in named_tensors(still.copy).items()}


def test_the_user_s_model_is_left_alone():
    net = timm.create_model("cifar_resnet8", in_chans=1).train()
    net.bn1.eval()
    hooks = len(net._forward_pre_hooks)
    before, modes = copy.deepcopy(net.state_dict()), [m.training for m in net.modules()]
    with pytest.raises(ZeroDivisionError), held_still(net, X) as still:
        still(X)
        1 / 0
    assert modes == [m.training for m in net.modules()] and all(p.requires_grad for p in net.parameters())
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert len(net._forward_pre_hooks) == hooks and not any("forward" in vars(m) for m in net.modules())


@pytest.mark.parametrize("in_place", [False, True], ids=["copied", "in place"])
def test_six_threads_get_what_they_get_alone(in_place):
    torch.manual_seed(0)
    net = timm.create_model("cifar_resnet8", in_chans=1).train()
    if in_place:
        net.fc = nn.utils.weight_norm(net.fc)  # its weight is computed, so the network cannot be copied
    net(X)
    attack = lambda seed: PGD(0.1, steps=3, seed=seed)(net, X, Y)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    alone = [attack(seed) for seed in range(6)]
    with ThreadPoolExecutor(6) as pool:
        together = list(pool.map(attack, range(6)))
    assert all(torch.equal(a, b) for a, b in zip(alone, together))
    assert net.training and all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_models_that_were_compiled_or_scripted():
    net = train(timm.create_model("cifar_resnet8", in_chans=1))
    compiled = torch.compile(net)  # not yet compiled: that happens at its first call
    still = Still(compiled, X)
    assert_same(still, net)
    train(net, 1)
    still.refresh()
    assert_same(still, net)
    scripted = torch.jit.script(nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten()).eval())
    with torch.no_grad():
        torch.testing.assert_close(Still(scripted, X)(X), scripted(X))


class LeNet(nn.Module):
    "Flattens with `view`, which wants the usual memory layout."

    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(1, 4, 5), nn.Linear(4 * 8 * 8, 4)

    def forward(self, x):
        x = F.relu(self.conv(x))
        return self.fc(x.view(len(x), -1))


class InPlace(nn.Module):
    "Changes its input."

    def forward(self, x):
        x -= 0.5
        return torch.stack([x.flatten(1).sum(1), -x.flatten(1).sum(1)], 1)


@pytest.mark.parametrize("make", [LeNet, InPlace, lambda: LeNet().double()], ids=["view", "in place", "float64"])
def test_models_that_people_bring(make):
    x = X.contiguous(memory_format=torch.channels_last)
    before = x.clone()
    x_adv = PGD(0.1, steps=3)(make(), x, Y % 2)
    assert torch.equal(x, before) and x_adv.dtype == x.dtype and 0 < (x_adv - x).abs().max() <= 0.1 + 1e-6


def test_logits_are_float32_or_wider():
    linear = nn.Sequential(nn.Flatten(), nn.Linear(144, 4))
    assert Still(linear)(X).dtype == torch.float32
    assert Still(copy.deepcopy(linear).double())(X.double()).dtype == torch.float64
    assert Still(copy.deepcopy(linear).bfloat16())(X).dtype == torch.float32


def test_half_precision_networks_are_not_folded():
    net = timm.create_model("cifar_resnet8", in_chans=1).eval().bfloat16()
    assert folding_pairs(net, X[:1].bfloat16()) == []


def test_full_precision_puts_back_settings_of_both_generations():
    cuda, cudnn = torch.backends.cuda, torch.backends.cudnn
    newer = lambda: (cuda.matmul.fp32_precision, cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision)
    older = lambda: (torch.get_float32_matmul_precision(), cuda.matmul.allow_tf32, cudnn.allow_tf32)
    usual = newer(), older()
    torch.set_float32_matmul_precision("high")
    before = newer(), older()
    with full_precision():
        assert (newer(), older()) == (("ieee",) * 3, ("highest", False, False))
    assert (newer(), older()) == before
    cuda.matmul.fp32_precision = "ieee"  # by its newer name alone: the older cannot be read now
    with full_precision():
        assert older() == ("highest", False, False)
    assert newer() == ("ieee", *before[0][1:])
    torch.set_float32_matmul_precision(usual[1][0])
    cuda.matmul.fp32_precision = usual[0][0]
    assert (newer(), older()) == usual
    with full_precision(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert (torch.ones(1, 1) @ torch.ones(1, 1)).dtype == torch.bfloat16  # what one asks for inside still holds
    with torch.autocast("cpu", dtype=torch.bfloat16), full_precision():
        assert (torch.ones(1, 1) @ torch.ones(1, 1)).dtype == torch.float32


class Hooked(nn.Module):
    "Features through a hook, as in many tutorials: after a deep copy the hook still writes into the original."

    def __init__(self):
        super().__init__()
        self.body, self.head, self.kept = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU()), nn.Linear(4, 4), {}
        self.body[1].register_forward_hook(lambda module, inputs, output: self.kept.update(features=output))

    def forward(self, x):
        self.body(x)
        return self.head(self.kept["features"].mean((2, 3)))


class Itself(LeNet):
    "A copy of it is itself."

    def __deepcopy__(self, memo):
        return self


def patched():
    net = LeNet()
    old = net.forward
    net.forward = lambda x: 2 * old(x)
    return net


@pytest.mark.parametrize("make", [Hooked, Itself, patched])
def test_models_whose_copy_would_use_the_original_are_attacked_in_place(make):
    torch.manual_seed(0)
    net = make().train()
    with torch.no_grad():
        y = net(X).argmax(1)
    with held_still(net, X) as still:
        assert not still.copied
    x_adv = PGD(1.0, steps=30, step_size=0.1)(net, X, y)
    assert F.cross_entropy(net(x_adv), y) > F.cross_entropy(net(X), y) + 0.01
    assert net.training and all(p.requires_grad for p in net.parameters())


class WideBlock(nn.Module):
    "A pre-activation block of a WideResNet, as in RobustBench's models."

    def __init__(self, inputs, outputs):
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(inputs), nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        self.bn2, self.conv2 = nn.BatchNorm2d(outputs), nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, bias=False) if inputs != outputs else None

    def forward(self, x):
        out = F.relu(self.bn1(x))
        short = x if self.shortcut is None else self.shortcut(out)
        return self.conv2(F.relu(self.bn2(self.conv1(out)))) + short


def test_pairs_do_not_depend_on_where_tensors_lie():
    "Many tensors of one size come and go in a pass; a freed one's place is taken by another."
    torch.manual_seed(0)
    net = flat(nn.Conv2d(1, 8, 3), WideBlock(8, 8), WideBlock(8, 16), WideBlock(16, 16), nn.BatchNorm2d(16), nn.ReLU())
    train(net, 2)
    expected = [(f"{i}.conv1", f"{i}.bn2") for i in (1, 2, 3)]
    for _ in range(10):
        still = Still(net, X)
        assert still.pairs == expected
    assert_same(still, net)


class TwoNames(nn.Module):
    "Its first layers go by two names."

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 4)
        self.stem = nn.Sequential(self.conv, self.norm, nn.ReLU())

    def forward(self, x):
        return self.head(self.stem(x).mean((2, 3)))


def test_modules_with_two_names_are_not_folded():
    net = TwoNames()
    still = Still(net, X)
    assert still.pairs == []
    train(net)
    still.refresh()
    assert_same(still, net)


def test_images_reach_a_network_of_mixed_types_as_they_are():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("mean", torch.full((1, 1, 1), 0.5))
            self.last = nn.Linear(144, 4).bfloat16()

        def forward(self, x):
            self.seen = x
            return self.last(((x - self.mean) * 4).bfloat16().flatten(1))

    still = Still(Mixed())
    still(X)
    assert torch.equal(still.seen, X)


def test_scripted_models_are_attacked():
    scripted = torch.jit.script(nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten()).eval())
    x_adv = PGD(0.1, steps=2)(scripted, X, Y)
    assert 0 < (x_adv - X).abs().max() <= 0.1 + 1e-6


# Wrappers


class Scaled(nn.Module):
    "Normalises, and has whatever the model in it has: a wrapper as people write it."

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner((x - 0.5) / 0.05)

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)


def plain():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(400, 4)).eval()


def test_a_wrapper_that_passes_attributes_on_is_the_model():
    inner = plain()
    compiled, same = Scaled(torch.compile(inner, backend="eager")), Scaled(inner)
    assert unwrapped(compiled) is compiled
    with torch.no_grad(), held_still(compiled, X) as still:
        torch.testing.assert_close(still(X), same(X))


@pytest.mark.parametrize("wrap", [lambda model: torch.compile(model, backend="eager"), nn.DataParallel])
def test_hooks_of_a_wrapper_belong_to_the_model(wrap):
    normalise = lambda _, inputs: ((inputs[0] - 0.5) / 0.05,)
    model, same = wrap(plain()), plain()
    assert unwrapped(model) is not model
    for one in (model, same):
        one.register_forward_pre_hook(normalise)
    assert unwrapped(model) is model
    with torch.no_grad():
        y = same(X).argmax(1)
        with held_still(model, X) as still:
            torch.testing.assert_close(still(X), same(X))
    moved = PGD(0.02, seed=3)
    torch.testing.assert_close(moved(model, X, y), moved(same, X, y))


def test_a_network_that_draws_numbers_is_the_same_as_its_copy():
    class Noisy(nn.Module):
        def forward(self, x):
            return x + 0.1 * torch.randn_like(x)

    model = nn.Sequential(Noisy(), plain())
    still = Still(model, X)
    assert still.same_as_model(X)
    with torch.no_grad():
        model[1][4].weight.mul_(2)
    assert not still.same_as_model(X)


def test_a_function_finds_its_network_in_a_file_and_deep_in_a_dictionary(tmp_path, monkeypatch):
    (tmp_path / "their_nets.py").write_text("net = None\n")
    monkeypatch.syspath_prepend(tmp_path)
    import their_nets

    their_nets.net = plain().train()
    before, deep = their_nets.net[1].running_mean.clone(), {"a": {"b": {"c": [their_nets.net]}}}
    monkeypatch.setattr(their_nets, "inner", types.ModuleType("inner"), raising=False)
    their_nets.inner.net = their_nets.net
    for function in (lambda x: their_nets.net(x), lambda x: deep["a"]["b"]["c"][0](x),
                     lambda x: their_nets.inner.net(x), lambda x: torch.cat([their_nets.net(p) for p in x.split(8)])):
        PGD(0.1, steps=2)(function, X, Y)
        assert torch.equal(their_nets.net[1].running_mean, before) and their_nets.net.training
    assert modules_of(lambda x: F.relu(torch.stack([x]))) == []
    much = [[[[0.5 + i + j + k for i in range(100)] for j in range(100)] for k in range(100)] for _ in range(2)]
    assert modules_of(lambda x: x + much[0][0][0][0]) == []  # and in less than a second


def test_a_verdict_stays_in_true_float32_while_another_thread_searches():
    inside, seen = threading.Event(), threading.Event()

    def search():
        inside.wait(10)
        with products_in("tf32"):
            seen.set()

    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(search)
        with full_precision():
            inside.set()
            assert seen.wait(10)
            assert torch.backends.cuda.matmul.fp32_precision == "ieee"
            other.result()
            assert torch.backends.cuda.matmul.fp32_precision == "ieee"
    with products_in("tf32"):
        with full_precision():
            assert torch.backends.cuda.matmul.fp32_precision == "ieee"
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"


class Ensemble(nn.Module):
    "Its parts are in a list, so PyTorch does not see them."

    def __init__(self, parts):
        super().__init__()
        self.parts = parts

    def forward(self, x):
        return sum(part(x) for part in self.parts)


def test_networks_in_a_list_are_put_into_evaluation_mode():
    parts = [LeNet().train(), LeNet().train()]
    net, whole = Ensemble(parts).train(), [part.eval()(X) for part in copy.deepcopy(parts)]
    with held_still(net, X) as still, torch.no_grad():
        assert torch.allclose(still(X), sum(whole), atol=1e-5) and not still.copied
    assert all(part.training for part in parts)
