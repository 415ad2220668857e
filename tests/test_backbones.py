import numpy as np
import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

import advdpnp
from advdpnp.backbones import CifarPreActResNet, CifarResNet

FEATURES = {"cifar_resnet8": 64, "cifar_resnet8_w24": 96, "cifar_resnet18": 512, "cifar_preactresnet18": 512,
            "cifar_wrn28_10": 640, "cifar_wrn34_10": 640}


class Reference(nn.Module):
    "Pre-activation ResNet as in the papers: x + W2 relu(bn(W1 relu(bn(x)))), and a last bn and relu before pooling."

    def __init__(self, blocks, widths, stem, classes, in_chans=3):
        super().__init__()
        self.stem, self.blocks = nn.Conv2d(in_chans, stem, 3, 1, 1, bias=False), nn.ModuleList()
        for stage, width in enumerate(widths):
            for block in range(blocks):
                stride = 2 if stage and not block else 1
                before = width if block else [stem, *widths][stage]
                layers = dict(bn1=nn.BatchNorm2d(before), conv1=nn.Conv2d(before, width, 3, stride, 1, bias=False),
                              bn2=nn.BatchNorm2d(width), conv2=nn.Conv2d(width, width, 3, 1, 1, bias=False))
                if stride > 1 or before != width:
                    layers["shortcut"] = nn.Conv2d(before, width, 1, stride, bias=False)
                self.blocks.append(nn.ModuleDict(layers))
        self.bn, self.linear = nn.BatchNorm2d(widths[-1]), nn.Linear(widths[-1], classes)

    def features(self, x):
        x = self.stem(x)
        for block in self.blocks:
            out = F.relu(block["bn1"](x))
            x = block["shortcut"](out) if "shortcut" in block else x
            x = x + block["conv2"](F.relu(block["bn2"](block["conv1"](out))))
        return F.relu(self.bn(x)).mean((2, 3))

    def forward(self, x):
        return self.linear(self.features(x))


def theirs(name):
    "The reference's name of a parameter or buffer of ours, without a block's number."
    for ours, reference in (("norm1", "bn1"), ("norm2", "bn2"), ("downsample.conv", "shortcut"), ("stem.conv", "stem"),
                            ("head.fc", "linear")):
        name = name.replace(ours, reference)
    return "bn." + name.removeprefix("norm.") if name.startswith("norm.") else name


def with_our_weights(reference, model):
    depth = len(model.stages[0].blocks)
    state = {}
    for name, value in model.state_dict().items():
        if name.startswith("stages."):
            _, stage, _, block, rest = name.split(".", 4)
            name = f"blocks.{int(stage) * depth + int(block)}.{rest}"
        state[theirs(name)] = value
    state["linear.weight"] = state["linear.weight"].flatten(1)  # timm's is a 1x1 convolution
    reference.load_state_dict(state)  # every name and shape, none left over
    return reference


@pytest.mark.parametrize("name, blocks, widths, stem, parameters", [
    ("cifar_preactresnet18", 2, (64, 128, 256, 512), 64, 11_172_170),
    ("cifar_wrn28_10", 4, (160, 320, 640), 16, 36_479_194),
    ("cifar_wrn34_10", 5, (160, 320, 640), 16, 46_160_474),
])
def test_preactivation_networks_have_the_papers_layers(name, blocks, widths, stem, parameters):
    with torch.device("meta"):  # shapes alone
        model, reference = timm.create_model(name, num_classes=10), Reference(blocks, widths, stem, 10)
        with_our_weights(reference, model)
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in reference.parameters()) == parameters


@pytest.mark.parametrize("blocks, widths, stem", [(2, (8, 16, 32, 64), 8), (5, (16, 32, 64), 8)])
def test_preactivation_networks_compute_what_the_papers_say(blocks, widths, stem):
    "PreActResNet-18 and WideResNet-34 made narrow."
    torch.manual_seed(0)
    model = CifarPreActResNet((blocks,) * len(widths), widths, stem, num_classes=10)
    for module in model.modules():  # batch-norms that do something
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
            nn.init.uniform_(module.running_mean, -0.5, 0.5)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    reference = with_our_weights(Reference(blocks, widths, stem, 10), model)
    x = torch.rand(2, 3, 16, 16)
    for training in (False, True):
        model.train(training), reference.train(training)
        with torch.no_grad():
            logits, expected = model(x), reference(x)
        assert expected.std() > 0.01 * expected.abs().max()
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


@pytest.mark.parametrize("name, channels, side", [
    ("cifar_resnet8", 1, 8), ("cifar_resnet8", 3, 16), ("cifar_resnet8_w24", 3, 16), ("cifar_resnet18", 3, 16),
    ("cifar_preactresnet18", 1, 8), ("cifar_wrn28_10", 1, 8), ("cifar_wrn34_10", 3, 16),
])
def test_what_timm_and_we_expect_of_a_backbone(name, channels, side):
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=0, in_chans=channels)
        x, expected = torch.rand(2, channels, side, side), (2, FEATURES[name])
        maps = model.forward_features(x)
        assert model.num_features == FEATURES[name] and maps.shape[:2] == expected
        assert model(x).shape == expected
        assert model.forward_head(maps).shape == model.forward_head(maps, pre_logits=True).shape == expected
        model.reset_classifier(7)
        assert model(x).shape == (2, 7)
        assert model.get_classifier() is model.get_submodule(model.pretrained_cfg["classifier"])
        assert isinstance(model.get_submodule(model.pretrained_cfg["first_conv"]), nn.Conv2d)
        model.reset_classifier(0)
        assert model(x).shape == expected


def test_every_name_is_tested_here():
    assert sorted(timm.list_models("cifar_*")) == sorted(FEATURES)


def test_an_odd_width_is_refused():
    with pytest.raises(ValueError, match="channels begin with 15: expected an even number"):
        CifarResNet((1, 1, 1), (15, 30, 60))


def test_no_pretrained_weights_are_promised():
    with pytest.raises(RuntimeError, match="No pretrained weights exist for cifar_resnet8"):
        timm.create_model("cifar_resnet8", pretrained=True)


@pytest.mark.parametrize("name, size", [("vit_tiny_patch16_224", dict(img_size=64, depth=4)),
                                        ("convnext_atto", dict(depths=(1, 1, 2, 1)))])
def test_one_training_step_of_another_family(name, size):
    "Any timm model is a backbone: a step of Adv-DPNP and an evaluation, on two images of 64 pixels each."
    rng, _ = np.random.default_rng(0), torch.manual_seed(0)
    x, y = rng.integers(0, 256, (4, 64, 64, 3), dtype=np.uint8), np.arange(4) % 2
    backbone = timm.create_model(name, num_classes=0, **size)
    net = advdpnp.PrototypeNet(backbone, 2, mean=(0.5,) * 3, std=(0.5,) * 3)
    before = {key: value.clone() for key, value in net.named_parameters()}
    noise = advdpnp.Dataset("noise", x, y, x, y)
    trainer = advdpnp.Trainer(net, advdpnp.AdvDPNP(eps=8 / 255, steps=1), noise, epochs=1, batch_size=2, val_size=2,
                              lr=0.01, padding=8, val_attack=advdpnp.FGSM(8 / 255), device="cpu", quiet=True)
    assert trainer.fit()
    moved = [key for key, value in net.named_parameters() if not torch.equal(value, before[key])]
    assert "head.directions" in moved and len(moved) > 0.9 * len(before)
    assert all(torch.isfinite(value).all() for value in net.parameters()) and np.isfinite(trainer.history[0]["adv_ce"])
