import copy
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from advdpnp.attacks import PGD
from advdpnp.baselines import METHODS, PGDAT, LinearNet, Standard, make_net
from advdpnp.data import load_dataset
from advdpnp.prototypes import PrototypeNet
from advdpnp.runs import Ledger, config_hash, make_config
from advdpnp.training import AdvDPNP, Trainer, perturbed

WORKER = """
import sys, torch
torch.set_num_threads(1)
from advdpnp.runs import Ledger, make_config
Ledger(sys.argv[1], device="cpu").run(make_config("Adv-DPNP", "quick", device="cpu", epochs=3, steps=2))
"""
CONFIG = dict(method="Adv-DPNP", preset="quick", device="cpu", epochs=3, steps=2)


def worker(folder):
    return subprocess.Popen([sys.executable, "-c", WORKER, str(folder)], stderr=subprocess.PIPE, text=True)


def numbers(folder):
    "What a run came to, without the clock."
    record = Ledger(folder, device="cpu").result(make_config(**CONFIG))
    history = [{k: v for k, v in line.items() if k != "seconds"} for line in record["history"]]
    return (
        history,
        *[(record[which]["sha256"], record[which]["metrics"], record[which]["logits"]) for which in ("best", "last")],
        record["best"]["curve"],
    )


@pytest.fixture(scope="module")
def through(tmp_path_factory):
    "A run that nobody disturbed."
    folder = tmp_path_factory.mktemp("through")
    process = worker(folder)
    _, log = process.communicate()
    assert process.returncode == 0, log
    return numbers(folder), log


def test_same_seed_same_bits(through, tmp_path):
    assert worker(tmp_path).wait() == 0
    assert numbers(tmp_path) == through[0]


def test_killed_by_the_system_twice(through, tmp_path):
    "Kill -9 in the first epoch, kill -9 some time after the second, and let the third process finish."
    run = tmp_path / "runs/digits/Adv-DPNP-cifar_resnet8-quick-s0,epochs=3,steps=2"
    metrics = lambda: len((run / "metrics.jsonl").read_text().splitlines()) if (run / "metrics.jsonl").exists() else 0
    for reached in (lambda: (run / "config.json").exists(), lambda: metrics() >= 2):
        process = worker(tmp_path)
        while not reached():
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not (run / "result.json").exists()
    assert worker(tmp_path).wait() == 0
    assert numbers(tmp_path) == through[0]


def test_killed_at_every_write(tmp_path, monkeypatch):
    "The process ends at its n-th file, before or after it is in place, for every n; a new one ends as if it had not."
    config = make_config("DPNP", "quick", device="cpu", epochs=2, test_images=50, autoattack_images=2, check_images=10)
    real = os.replace
    count = 0

    class Killed(BaseException):
        pass

    def run(folder, die_at=None, after=False):
        nonlocal count
        count = 0

        def replace(source, target):
            nonlocal count
            count += 1
            if count == die_at and not after:
                raise Killed
            real(source, target)
            if count == die_at:
                raise Killed

        monkeypatch.setattr(os, "replace", replace)
        return Ledger(folder, device="cpu", quiet=True).run(config)

    essence = lambda record: (
        [(record[w]["sha256"], record[w]["metrics"]) for w in ("best", "last")]
        + [record["best"]["curve"], [line["loss"] for line in record["history"]]]
    )
    expected = essence(run(tmp_path / "through"))
    writes = count
    assert writes > 11  # config, four files an epoch, that it is trained, the verdicts of every attack, result
    for n in range(1, writes + 1):
        folder = tmp_path / str(n)
        with pytest.raises(Killed):
            run(folder, die_at=n, after=n % 2 == 0)
        assert essence(run(folder)) == expected


def test_log_has_a_line_an_epoch(through):
    lines = [line for line in through[1].splitlines() if "epoch" in line]
    assert len(lines) == 3
    for n, line in enumerate(lines, 1):
        assert f"Adv-DPNP s0 epoch {n}/3 17/17" in line
        for word in ("loss", "consistency", "val clean", "robust", "left"):
            assert word in line


def trainer(digits, folder=None, **settings):
    torch.manual_seed(0)
    net = PrototypeNet("cifar_resnet8", 10, mean=digits.mean, std=digits.std)
    return Trainer(net, AdvDPNP(eps=0.2, steps=1), digits, folder=folder, device="cpu", quiet=True,
                   **(dict(epochs=2, val_attack=PGD(0.2, steps=1)) | settings))


def test_time_limit_and_exact_resume_in_the_middle_of_an_epoch(digits, tmp_path):
    class Clock:
        "Stops a run after a number of batches."
        def __init__(self, batches): self.batches = batches
        def craft(self, net, x, y, generator):
            if self.batches == 0:
                raise KeyboardInterrupt
            self.batches -= 1
            return AdvDPNP(eps=0.2, steps=1).craft(net, x, y, generator)
        loss = AdvDPNP(eps=0.2, steps=1).loss

    through = trainer(digits)
    through.fit()
    stopped = trainer(digits, tmp_path, save_every=0.0)
    stopped.update.method = Clock(13)
    with pytest.raises(KeyboardInterrupt):
        stopped.fit()
    resumed = trainer(digits, tmp_path)
    assert (resumed.epoch, resumed.batch) == (1, 4)  # 9 batches an epoch
    assert resumed.fit(time_limit=0) is False
    assert resumed.fit() is True
    assert all(torch.equal(v, resumed.weights("last")[k]) for k, v in through.weights("last").items())
    assert all(torch.equal(v, resumed.weights("best")[k]) for k, v in through.weights("best").items())
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2] and lines[-1]["loss"] == through.history[-1]["loss"]


def test_the_test_images_are_never_seen(digits):
    t = trainer(digits)
    test = {image.tobytes() for image in digits.x_test} - {image.tobytes() for image in digits.x_train}
    for loader in (t.loader, t.val_loader):
        assert not test & {image.numpy().tobytes() for image in loader.x}


def test_global_randomness_is_left_alone(digits):
    t, state = trainer(digits), torch.get_rng_state()
    t.fit()
    assert torch.equal(torch.get_rng_state(), state)


def test_bits_do_not_depend_on_who_trains(tmp_path):
    "Side by side in two processes, or one after the other in this one: the same weights."
    configs = [make_config(method, "quick", device="cpu", epochs=1, test_images=50, autoattack_images=2,
                           check_images=10) for method in ("standard", "DPNP")]
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        together = Ledger(tmp_path / "together", device="cpu", quiet=True).run_all(configs, jobs=2)
        alone = Ledger(tmp_path / "alone", device="cpu", quiet=True).run_all(configs, jobs=1)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert [r["last"]["sha256"] for r in together] == [r["last"]["sha256"] for r in alone]


def test_a_checkpoint_that_was_not_measured_is_refused(tmp_path):
    ledger = Ledger(tmp_path, device="cpu", quiet=True)
    config = make_config("standard", "quick", device="cpu", epochs=1, test_images=50, autoattack_images=2,
                         check_images=10)
    ledger.run(config)
    path = ledger.folder(config) / "best.safetensors"
    ledger.model(config)
    path.write_bytes(path.read_bytes()[:-4] + b"oops")
    with pytest.raises(ValueError, match="is not the file that was measured"):
        ledger.model(config)
    (ledger.folder(config) / "result.json").write_text("{half")
    with pytest.raises(ValueError, match="result.json is damaged"):
        ledger.run(config)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_takes_a_step_on_colour_images(method):
    from advdpnp.data import Dataset
    import numpy as np

    rng = np.random.default_rng(0)
    data = Dataset("colour", rng.integers(0, 256, (40, 16, 16, 3), dtype=np.uint8), np.arange(40) % 4,
                   rng.integers(0, 256, (8, 16, 16, 3), dtype=np.uint8), np.arange(8) % 4)
    cls = METHODS[method]
    net = make_net(method, "cifar_resnet8", 4, data.mean, data.std)
    before = net.backbone.conv1.weight.detach().clone()
    t = Trainer(net, cls(**({"eps": 8 / 255, "steps": 1} if "eps" in cls.__dataclass_fields__ else {})), data, epochs=1,
                batch_size=16, device="cpu", quiet=True)
    assert t.fit() and t.config["flip"] and t.config["padding"] == 2
    assert not torch.equal(before, net.backbone.conv1.weight)


def test_a_folder_of_another_run_is_refused_and_untouched(digits, tmp_path):
    trainer(digits, tmp_path).fit()
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    for settings, message in [(dict(lr=0.05), "lr is 0.1 there, 0.05 here"),
                              (dict(epochs=3), "epochs is 2 there, 3 here"), (dict(seed=4), "seed is 0 there, 4 here")]:
        with pytest.raises(ValueError, match=f"holds another run: .*{message}.*Choose another folder"):
            trainer(digits, tmp_path, **settings)
    torch.manual_seed(0)
    wider = PrototypeNet("cifar_resnet8", 10, norm=5.0, mean=digits.mean, std=digits.std)
    with pytest.raises(ValueError, match="net.head is .*norm=2.4.* there, .*norm=5"):
        Trainer(wider, AdvDPNP(eps=0.2, steps=1), digits, folder=tmp_path, epochs=2,
                val_attack=PGD(0.2, steps=1), device="cpu")
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


@pytest.mark.parametrize("damage", [lambda b: b[:-500], lambda b: b[:20000] + bytes(200) + b[20200:], lambda b: b""])
def test_a_damaged_state_is_named(digits, tmp_path, damage):
    trainer(digits, tmp_path).fit(time_limit=0)
    path = tmp_path / "state.pt"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match="state.pt is damaged .*: delete"):
        trainer(digits, tmp_path)


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_state(digits, tmp_path):
    t = trainer(digits, tmp_path, epochs=3)
    t.epochs = 1
    t.fit()
    good = (tmp_path / "state.pt").read_bytes()
    t.epochs, t.lr = 3, float("inf")
    t.save_every = 0.0  # it tries to save after the very step that breaks the network
    with pytest.raises(
        FloatingPointError,
        match=r"the network is not finite at epoch 2, batch 1: loss .*, ce .*A lower learning rate may help",
    ):
        t.fit()
    assert (tmp_path / "state.pt").read_bytes() == good
    assert torch.isfinite(trainer(digits, tmp_path, epochs=3).weights("last")["head.directions"]).all()


@pytest.mark.parametrize("make, message", [
    (lambda: make_config("ADVDPNP", "quick", device="cpu"),
     "unknown method 'ADVDPNP'.*There are: standard, PGD-AT, TRADES, MART, DPNP, dual-branch linear, Adv-DPNP"),
    (lambda: make_config("Trades", "quick", device="cpu"), "did you mean 'TRADES'"),
    (lambda: make_config("TRADES", "qiuck", device="cpu"), "unknown preset 'qiuck': did you mean 'quick'"),
    (lambda: make_config("TRADES", "quick", device="cpu", alignment=1), "unknown parameter 'alignment'"),
    (lambda: make_config("PGD-AT", "quick", device="cpu", epoch=1), "unknown parameter 'epoch': did you mean 'epochs'"),
    (lambda: make_config("TRADES", "quick", device="cpu", beta=float("nan")), "beta is nan"),
    (lambda: make_config("TRADES", "quick", device="cpu", beta=-1.0), "beta is -1.0: expected a finite weight"),
    (lambda: make_config("dual-branch linear", "quick", device="cpu", consistency=-1.0),
     "consistency is -1.0: expected a finite weight"),
    (lambda: make_config("PGD-AT", "quick", device="cpu", eps=8.0), "eps is 8.0: expected 0 to 1"),
    (lambda: make_config("PGD-AT", "quick", device="cpu", epochs=0), "epochs is 0: expected at least 1"),
])
def test_bad_configurations(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_bad_runs_leave_nothing(tmp_path):
    ledger = Ledger(tmp_path, device="cpu")
    for changes, message in [(dict(dataset="digitz"), "unknown data set 'digitz': did you mean 'digits'"),
                             (dict(arch="cifar_resnet9"), "unknown architecture 'cifar_resnet9'"),
                             (dict(eps=-0.1), "eps is -0.1"), (dict(schedule="cosine"), "unknown schedule"),
                             (dict(norm=-2.0), "norm is -2.0"), (dict(val_size=5000), "cannot hold 5000")]:
        with pytest.raises(ValueError, match=message):
            ledger.run(make_config("Adv-DPNP", "quick", device="cpu", **changes))
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(FileNotFoundError, match="train this run first"):
        ledger.model(make_config("Adv-DPNP", "quick", device="cpu"))


def test_configurations_that_differ_have_folders_and_hashes_that_differ(tmp_path):
    ledger = Ledger(tmp_path, device="cpu")
    configs = [make_config("Adv-DPNP", "quick", device="cpu", **c)
               for c in ({}, dict(norm=5.0), dict(lr=0.3), dict(lr=0.3, norm=5.0), dict(seed=1))]
    assert len({ledger.folder(c) for c in configs}) == len({config_hash(c) for c in configs}) == len(configs)
    assert ledger.folder(configs[0]) == tmp_path / "runs/digits/Adv-DPNP-cifar_resnet8-quick-s0"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_trains_in_bf16_and_resumes(digits, tmp_path):
    torch.manual_seed(0)
    make = lambda: Trainer(PrototypeNet("cifar_resnet8", 10, mean=digits.mean, std=digits.std),
                           AdvDPNP(eps=0.2, steps=2), digits,
                           epochs=4, device="cuda", precision="bf16", folder=tmp_path, quiet=True)
    assert make().fit(time_limit=0) is False
    resumed = make()
    assert resumed.fit() and resumed.history[-1]["clean"] > 50


def test_weight_perturbation_and_averages_survive_an_interruption(tmp_path):
    digits = load_dataset("digits")

    def trainer(folder):
        torch.manual_seed(0)
        net = LinearNet("cifar_resnet8", 10, digits.mean, digits.std)
        return Trainer(net, PGDAT(0.2, steps=2), digits, epochs=2, batch_size=128, padding=0, val_size=200,
                       awp=0.005, ema=0.9,
                       val_attack=PGD(0.2, steps=2), folder=folder, quiet=True, device="cpu")

    whole = trainer(tmp_path / "whole")
    whole.fit()
    while not trainer(tmp_path / "parts").fit(time_limit=0.7):
        pass
    parts = trainer(tmp_path / "parts")
    for which in ("best", "last"):
        assert all(torch.equal(value, parts.weights(which)[name]) for name, value in whole.weights(which).items())
    for net in (whole.net, parts.net):  # the averages, where training has ended and where that was read
        assert all(torch.equal(value, net.state_dict()[name]) for name, value in whole.weights("last").items())


def test_averaged_weights_are_the_running_mean():
    digits, seen = load_dataset("digits"), []
    torch.manual_seed(0)
    net = LinearNet("cifar_resnet8", 10, digits.mean, digits.std)
    trainer = Trainer(net, Standard(), digits, epochs=1, batch_size=256, padding=0, val_size=200, ema=0.7,
                      val_attack=PGD(0.2, steps=1), quiet=True, device="cpu")
    trainer.update.optimizer.register_step_post_hook(lambda *_: seen.append(net.head.weight.detach().clone()))
    trainer.fit()
    mean = seen[0]
    for weight in seen[1:]:
        mean = 0.7 * mean + 0.3 * weight
    assert len(seen) == 4 and torch.allclose(trainer.weights("last")["head.weight"], mean, atol=1e-6)


def test_a_partly_frozen_network_takes_a_step_with_perturbed_weights(digits):
    t = trainer(digits, awp=0.01, epochs=1)
    frozen = t.net.backbone.layer1[0].conv1.weight.requires_grad_(False)
    before = frozen.clone()
    t.fit()
    assert torch.equal(t.net.backbone.layer1[0].conv1.weight, before)


def test_a_network_of_other_classes_or_channels_is_refused(digits):
    for net, message in ((LinearNet("cifar_resnet8", 12, digits.mean, digits.std),
                          "the network has 12 classes, digits has 10"),
                         (LinearNet("cifar_resnet8", 10), r"images are \(128, 1, 8, 8\), expected 3 channels")):
        with pytest.raises(ValueError, match=message):
            Trainer(net, Standard(), digits, device="cpu", quiet=True).fit()


def test_weights_can_be_read_by_others(digits, tmp_path):
    trainer(digits, tmp_path, epochs=1).fit()
    (tmp_path / "any").touch()
    assert {path.stat().st_mode for path in tmp_path.iterdir() if path.suffix} == {(tmp_path / "any").stat().st_mode}


def test_an_archive_that_is_not_to_be_mirrored_is_trained_on_in_a_folder(digits, tmp_path):
    np.savez(tmp_path / "letters.npz", x_train=digits.x_train, y_train=digits.y_train, x_test=digits.x_test,
             y_test=digits.y_test, flip=False)
    trainer(load_dataset("letters", tmp_path), tmp_path / "run", epochs=1).fit()
    assert json.loads((tmp_path / "run/config.json").read_text())["flip"] is False


def test_weight_perturbation_is_a_gradient_at_another_place():
    "Against the step written out by hand, on a network without batch-norm."
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3)).double()
    x, y = torch.randn(20, 6, dtype=torch.float64), torch.randint(3, (20,))
    loss = lambda: torch.nn.functional.cross_entropy(net(x), y)
    by_hand = copy.deepcopy(net)
    for weight, gradient in zip((by_hand[0].weight, by_hand[2].weight),
                                torch.autograd.grad(loss(), (net[0].weight, net[2].weight))):
        weight.data += 0.01 * weight.norm() / gradient.norm() * gradient  # biases stay
    expected = torch.autograd.grad(torch.nn.functional.cross_entropy(by_hand(x), y), list(by_hand.parameters()))
    before = [p.detach().clone() for p in net.parameters()]
    with perturbed(net, loss, 0.01):
        loss().backward()
    assert all(torch.equal(p, b) for p, b in zip(net.parameters(), before))
    assert all(torch.allclose(p.grad, e) for p, e in zip(net.parameters(), expected))
