"All that a run does, on a device apart: what mixes devices fails as it would on a GPU, and results are the CPU's."

from dataclasses import replace

import numpy as np
import pytest
import torch
from apart import Apart, Device, device_apart
from torch.utils._pytree import tree_leaves

import advdpnp.runs
from advdpnp.attacks import FGSM, PGD, PrototypePGD
from advdpnp.autoattack import AutoAttack
from advdpnp.backbones import cifar_resnet8
from advdpnp.corruptions import corrupted_images, corruption_accuracy
from advdpnp.data import Loader
from advdpnp.evaluation import evaluate
from advdpnp.geometry import geometry
from advdpnp.methods import METHODS, make_net
from advdpnp.runs import Ledger, make_config
from advdpnp.still import Still
from advdpnp.training import Trainer


def without_times(found):
    if isinstance(found, dict):
        return {key: without_times(value) for key, value in found.items()
                if key not in ("seconds", "device", "training_seconds", "trained_with")}
    return [without_times(value) for value in found] if isinstance(found, list) else found


@pytest.fixture
def few(digits):
    "84 images to train on, and two of each class to test on."
    two = np.concatenate([np.flatnonzero(digits.y_test == k)[:2] for k in range(10)])
    return replace(digits, x_train=digits.x_train[:84], y_train=digits.y_train[:84], x_test=digits.x_test[two],
                   y_test=digits.y_test[two])


def small_net(few, method):
    torch.manual_seed(0)
    backbone = cifar_resnet8(width=4, in_chans=1, num_classes=0, avg_down=True)  # see oneDNN 6035: no strided 1x1 here
    return make_net(method, backbone, 10, few.mean, few.std)


def test_the_device_is_apart():
    with device_apart():
        x, here = torch.zeros(2, device="meta"), torch.zeros(2)
        with pytest.raises(RuntimeError, match="two devices"):
            x + here
        with pytest.raises(RuntimeError, match="two devices"):
            here[torch.zeros(2, dtype=torch.int64, device="meta")]
        with pytest.raises(RuntimeError, match="another device"):
            x.uniform_(generator=torch.Generator().manual_seed(3))
        with pytest.raises((TypeError, RuntimeError)):
            x.numpy()
        reads = Device.reads
        assert isinstance(x + 1, Apart)
        assert not isinstance(x.cpu(), Apart)
        assert (x + 1).sum().item() == 2
        assert Device.reads == reads + 2


def test_a_frozen_copy_is_on_its_device_and_folds_what_it_folds_elsewhere(few):
    x = torch.rand(8, 1, 8, 8)
    net = small_net(few, "Adv-DPNP")
    plain = Still(net, x)
    with device_apart():
        still = Still(net.to("meta"), x.to("meta"))
        still.refresh()
        assert all(isinstance(tensor, Apart) for tensor in still.static.values())
        assert still.pairs == plain.pairs and len(still.pairs) == 9
        assert torch.equal(still(x.to("meta")).detach().cpu(), plain(x))


@pytest.mark.parametrize("method", METHODS)
def test_training_stays_on_its_device_and_no_step_reads_a_number_back(few, method):
    cls = METHODS[method]

    def trained(device):
        trainer = Trainer(small_net(few, method), cls(**dict(eps=0.1, steps=2) if cls.adversarial else {}), few,
                          epochs=1, batch_size=32, val_size=20, awp=0.01, ema=0.9, device=device, quiet=True,
                          val_attack=PGD(0.1, steps=2))
        step, reads = trainer.step, []

        def counted(x, y):
            before = Device.reads
            step(x, y)
            reads.append(Device.reads - before)

        trainer.step = counted
        assert trainer.fit() and reads[1:] == [0]  # in the first, folding looks whether it may
        return without_times(trainer.history), trainer.weights("best")

    with device_apart():
        history, weights = trained("meta")
    plain, plain_weights = trained("cpu")
    assert history == plain and all(torch.equal(weights[name], plain_weights[name]) for name in plain_weights)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_evaluation_stays_on_its_device(few, norm, tmp_path):
    eps = 0.1 if norm == "linf" else 1.0

    def measured(device):
        net, twin = (small_net(few, "Adv-DPNP").to(device) for _ in range(2))
        attacks = [FGSM(eps, norm=norm), PrototypePGD(eps, norm=norm, steps=3),
                   AutoAttack(eps, norm, steps=3, targets=2, queries=10)]
        found = dict(evaluated=evaluate(net, few, attacks, check_images=5, twin=twin, quiet=True))
        if norm == "linf":
            loader = Loader(few.x_test, few.y_test, 10, device=device)
            found["geometry"] = geometry(net, loader, PGD(eps, steps=2))
            images = corrupted_images(few, tmp_path, ["gaussian_noise", "contrast"], quiet=True)
            found["corruptions"] = corruption_accuracy(net, images, quiet=True)
        return without_times(found)

    with device_apart():
        found = measured("meta")
    expected = measured("cpu")
    # one channel can be laid out in two ways, and convolutions round accordingly
    numbers = tree_leaves(expected.pop("geometry", {}))
    assert tree_leaves(found.pop("geometry", {})) == pytest.approx(numbers, rel=1e-4, abs=2e-3)
    assert found == expected


@pytest.mark.filterwarnings("ignore:.*copying from a non-meta parameter")
def test_a_run_goes_on_on_its_device(tmp_path, monkeypatch):
    late = lambda self, deadline: deadline < float("inf") and (self.epoch, self.batch) == (1, 1)
    monkeypatch.setattr(Trainer, "_late", late)
    some_images = lambda ledger, config, few: Loader(data.x_test[:10], data.y_test[:10], 5, device=ledger.device)
    monkeypatch.setattr(advdpnp.runs, "some_images", some_images)
    data = advdpnp.load_dataset("digits")

    def run(device):
        config = make_config("Adv-DPNP", "quick", 0, device=device, epochs=2, steps=1, train_images=200, val_size=20,
                             test_images=10, autoattack_images=1, check_images=1)
        assert not Ledger(tmp_path / device, device, quiet=True).train(config, time_limit=60)
        assert Ledger(tmp_path / device, device, quiet=True).train(config)
        return without_times(Ledger(tmp_path / device, device, quiet=True).measure(config, kind="tradeoff"))

    with device_apart():
        found = run("meta")
    assert found == run("cpu")
