"All that a run does, on a device apart: what mixes devices fails as it would on a GPU, and results are the CPU's."

from dataclasses import replace

import pytest
import torch
from apart import Apart, Device, device_apart

from advdpnp.attacks import FGSM, PGD, PrototypePGD
from advdpnp.autoattack import AutoAttack
from advdpnp.baselines import METHODS, make_net
from advdpnp.corruptions import corrupted_images, corruption_accuracy
from advdpnp.data import Loader
from advdpnp.evaluation import evaluate
from advdpnp.geometry import geometry
from advdpnp.runs import Ledger, make_config
from advdpnp.training import Trainer


def without_times(found):
    if isinstance(found, dict):
        return {key: without_times(value) for key, value in found.items()
                if key not in ("seconds", "device", "training_seconds", "trained_with")}
    return [without_times(value) for value in found] if isinstance(found, list) else found


@pytest.fixture
def few(digits):
    return replace(digits, x_train=digits.x_train[:128], y_train=digits.y_train[:128], x_test=digits.x_test[:40],
                   y_test=digits.y_test[:40])


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


@pytest.mark.parametrize("method", METHODS)
def test_training_stays_on_its_device_and_reads_nothing_inside_an_epoch(few, method):
    def trained(device):
        torch.manual_seed(0)
        net = make_net(method, "cifar_resnet8", 10, few.mean, few.std)
        settings = dict(eps=0.1, steps=2) if "eps" in METHODS[method].__dataclass_fields__ else {}
        trainer = Trainer(net, METHODS[method](**settings), few, epochs=1, batch_size=32, val_size=20, awp=0.01,
                          ema=0.9, device=device, quiet=True)
        step, reads = trainer.step, []

        def counted(x, y):
            before = Device.reads
            step(x, y)
            reads.append(Device.reads - before)

        trainer.step = counted
        assert trainer.fit() and reads[1:] == [0, 0]  # in the first, folding looks whether it may
        return without_times(trainer.history), trainer.weights("best")

    with device_apart():
        history, weights = trained("meta")
    plain, plain_weights = trained("cpu")
    assert history == plain and all(torch.equal(weights[name], plain_weights[name]) for name in plain_weights)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_evaluation_stays_on_its_device(few, norm, tmp_path):
    eps = 0.1 if norm == "linf" else 1.0

    def measured(device):
        torch.manual_seed(0)
        net, twin = (make_net("Adv-DPNP", "cifar_resnet8", 10, few.mean, few.std).to(device) for _ in range(2))
        attacks = [FGSM(eps, norm=norm), PrototypePGD(eps, norm=norm, steps=3),
                   AutoAttack(eps, norm, steps=5, targets=2, queries=30)]
        return without_times(dict(evaluated=evaluate(net, few, attacks, check_images=10, twin=twin, quiet=True),
                                  geometry=geometry(net, Loader(few.x_test, few.y_test, 10, device=device),
                                                    PGD(eps, norm=norm, steps=2)),
                                  corruptions=corruption_accuracy(net, images, quiet=True)))

    images = corrupted_images(few, tmp_path, quiet=True)
    with device_apart():
        found = measured("meta")
    assert found == measured("cpu")


def test_a_run_goes_on_on_its_device(tmp_path, monkeypatch):
    late = lambda self, deadline: deadline < float("inf") and (self.epoch, self.batch) == (1, 1)
    monkeypatch.setattr(Trainer, "_late", late)

    def run(device):
        config = make_config("Adv-DPNP", "quick", 0, device=device, epochs=2, steps=1, train_images=200, val_size=20,
                             test_images=10, autoattack_images=1, check_images=1)
        assert not Ledger(tmp_path / device, device, quiet=True).train(config, time_limit=60)
        assert Ledger(tmp_path / device, device, quiet=True).train(config)
        return without_times(Ledger(tmp_path / device, device, quiet=True).measure(config, kind="tradeoff"))

    with device_apart():
        found = run("meta")
    assert found == run("cpu")
