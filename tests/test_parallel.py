"Several processes train as one."
import json
import os
import subprocess
import sys
import time

import pytest
import small_preactivation  # noqa: F401, registers a network
import torch
from children import start_two
from torch import nn

import advdpnp.parallel
from advdpnp.attacks import PGD
from advdpnp.core import seeded
from advdpnp.data import load_dataset
from advdpnp.methods import METHODS, make_net
from advdpnp.parallel import my_rows, noise_of_my_rows, share, share_batch_norms, together
from advdpnp.runs import Ledger, make_config
from advdpnp.training import Trainer


def grouped():
    "A backbone with GroupNorm: there is no batch-norm for several processes on CPUs."
    net = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.ReLU(),
                        nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.GroupNorm(4, 16), nn.ReLU(),
                        nn.AdaptiveAvgPool2d(1), nn.Flatten())
    net.num_features = 16
    return net


def make_trainer(method="Adv-DPNP", folder=None, **settings):
    "In double precision, in which rounding cannot flip a sign of the attack's gradient."
    digits, cls = load_dataset("digits"), METHODS[method]
    torch.manual_seed(0)
    net = make_net(method, grouped(), 10, digits.mean, digits.std).double()
    return Trainer(net, cls(**dict(eps=0.2, steps=2) if cls.adversarial else {}), digits, folder=folder,
                   device="cpu", quiet=True, **dict(epochs=1, batch_size=64, padding=1, val_size=600, lr=0.05,
                                                    val_attack=PGD(0.2, steps=1)) | settings)


STEPS = [("Adv-DPNP", {}), ("Adv-DPNP", dict(awp=0.005, ema=0.9)), ("TRADES", {}), ("MART", {}), ("DPNP", {})]


def five_steps(method, settings):
    "Losses and terms of five steps, and the weights after them."
    trainer = make_trainer(method, **settings)
    batches = zip(range(5), trainer.loader.epoch(0))
    lines = [{name: value.item() for name, value in trainer.step(x, y).items()} for _, (x, y) in batches]
    return lines, trainer.weights("last")


def interrupted_run(folder):
    "An epoch and some batches, then a new trainer that goes on."
    stopped = make_trainer(folder=folder, epochs=2)
    stopped._late = lambda deadline: (stopped.epoch, stopped.batch) == (1, 3)
    assert not stopped.fit()
    trainer = make_trainer(folder=folder, epochs=2)
    assert (trainer.epoch, trainer.batch) == (1, 3) and trainer.fit()
    return trainer.history, trainer.weights("last"), trainer.weights("best")


def everything(folder):
    "What two processes do together; the first tells."
    told = [five_steps(*case) for case in STEPS], interrupted_run(folder / "run")
    if share()[0] == 0:
        torch.save(told, folder / "told.pt")


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    "What two processes gave."
    folder = tmp_path_factory.mktemp("two")
    processes = start_two(everything, folder)
    for process in processes:
        process.join(300)
    assert [process.exitcode for process in processes] == [0, 0]
    return torch.load(folder / "told.pt")


def assert_same_weights(one, two):
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=0, atol=1e-7, msg=name)


@pytest.mark.parametrize("case", range(len(STEPS)), ids=[f"{method} {settings}" for method, settings in STEPS])
def test_two_processes_have_the_losses_and_the_weights_of_one(two, case):
    (lines, weights), (two_lines, two_weights) = five_steps(*STEPS[case]), two[0][case]
    assert len(lines) == 5 and abs(lines[-1]["loss"] - lines[0]["loss"]) > 1e-3  # it did learn
    for one, both in zip(lines, two_lines, strict=True):
        assert both == pytest.approx(one, abs=1e-7)
    assert_same_weights(weights, two_weights)


def test_two_processes_that_were_interrupted_end_as_one_that_was_not(two):
    trainer = make_trainer(epochs=2)
    trainer.fit()
    history, last, best = two[1]
    for one, both in zip(trainer.history, history, strict=True):
        assert both | dict(seconds=0) == pytest.approx(one | dict(seconds=0), abs=1e-6)
    assert_same_weights(trainer.weights("last"), last)
    assert_same_weights(trainer.weights("best"), best)


def endless(folder=None):
    "Trains at a constant rate."
    return make_trainer(folder=folder, epochs=1000, schedule="drops", save_every=0.0 if folder else 60.0)


def train_endlessly(folder):
    endless(folder).fit()


@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_process_ends_the_other_and_one_alone_goes_on(killed, tmp_path):
    processes = start_two(train_endlessly, tmp_path)
    until = time.monotonic() + 300
    while not (tmp_path / "state.pt").exists():
        assert all(process.is_alive() for process in processes) and time.monotonic() < until
        time.sleep(0.02)
    processes[killed].kill()
    for process in processes:
        process.join(300)
    assert processes[killed].exitcode == -9 and processes[1 - killed].exitcode == 1  # it does not wait for ever
    alone, through = endless(tmp_path), endless()
    end = divmod(alone.epoch * len(alone.loader) + alone.batch + 2, len(alone.loader))
    assert end > (0, 2)
    for trainer in (alone, through):
        trainer._late = lambda deadline, trainer=trainer: (trainer.epoch, trainer.batch) == end
        assert not trainer.fit()
    assert_same_weights(through.weights("last"), alone.weights("last"))


FEW = dict(epochs=1, train_images=200, val_size=50, steps=1, test_images=20, autoattack_images=1, check_images=5,
           arch="test_efficientnet_gn")


def test_the_command_under_torchrun_writes_one_record(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "advdpnp",
               "train", "PGD-AT", "--preset", "quick", "--device", "cpu", "--data-dir", tmp_path / "two", "--quiet",
               *(word for key, value in FEW.items() for word in ("--set", f"{key}={value}"))]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    path, = (tmp_path / "two").rglob("result.json")
    record = json.loads(path.read_text())
    assert record["trained_with"]["processes"] == 2 and len(record["history"]) == 1
    assert done.stdout.count("PGD-AT on digits") == 1  # one process reports
    assert not [*path.parent.glob(".*.part*")]
    alone = Ledger(tmp_path / "one", "cpu", quiet=True)
    config = make_config("PGD-AT", "quick", device="cpu", **FEW)
    assert alone.train(config) and alone.folder(config).name == path.parent.name
    assert record["config_hash"] == alone.measure(config, kind="geometry")["config_hash"]
    # later, flipped signs of the attack have grown
    loss = json.loads((alone.folder(config) / "metrics.jsonl").read_text())["loss"]
    assert record["history"][0]["loss"] == pytest.approx(loss, abs=0.02)


# What one process can show


@pytest.fixture
def as_process(monkeypatch):
    "Makes this process one of several, for what does not speak to the others."
    return lambda rank, processes: monkeypatch.setattr(advdpnp.parallel, "share", lambda: (rank, processes))


def test_a_batch_that_cannot_be_shared(as_process):
    as_process(0, 3)
    with pytest.raises(ValueError, match="a batch of 64 cannot be shared by 3 processes: expected a multiple of 3"):
        my_rows(64)


@pytest.mark.parametrize("backbone, name", [("cifar_resnet8", "backbone.bn1"),
                                            ("test_preactresnet", "backbone.stages.0.blocks.0.norm1")])
def test_a_network_with_batch_norm_needs_one_process_or_gpus(as_process, digits, backbone, name):
    net = make_net("Adv-DPNP", backbone, 10, digits.mean, digits.std)
    assert share_batch_norms(net) is net
    as_process(0, 2)
    with pytest.raises(ValueError, match=f"{name} is a batch-norm, and several processes on CPUs cannot share its "
                                         f"statistics: expected one process, GPUs, or a network without batch-norm"):
        Trainer(net, METHODS["Adv-DPNP"](), digits, device="cpu", quiet=True)
    plain = make_net("Adv-DPNP", grouped(), 10, digits.mean, digits.std)
    assert share_batch_norms(plain) is plain


@pytest.mark.parametrize("method", METHODS)
def test_random_starts_are_those_of_the_whole_batch(as_process, method):
    x, method = torch.rand(12, 1, 4, 4), METHODS[method]()
    whole = method.draw(x, seeded("cpu", 0))
    for rank in range(3):
        as_process(rank, 3)
        noise = noise_of_my_rows(method, x[my_rows(12)], seeded("cpu", 0))
        assert noise is whole is None or torch.equal(noise, whole[4 * rank : 4 * rank + 4])


def test_every_process_has_random_numbers_of_its_own_for_what_the_network_draws(monkeypatch, digits):
    "Such as dropout, which would otherwise drop the same features for every process's images."
    trainer, seeds = make_trainer(), []
    monkeypatch.setattr("advdpnp.training.seed_globally", lambda device, seed: seeds.append(seed))
    x, y = next(trainer.loader.epoch(0))
    trainer.step(x, y)
    for rank in range(4):
        trainer.batch = 0
        monkeypatch.setattr("advdpnp.training.share", lambda: (rank, 1))
        trainer.step(x, y)
    assert len(set(seeds)) == 4 and seeds[0] == seeds[1]


def test_processes_that_torchrun_did_not_start_are_told_so(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with pytest.raises(ValueError, match="WORLD_SIZE is 2, but torchrun did not start this process"), together("cpu"):
        pass


def test_more_processes_than_gpus_are_told_how_many_there_are(monkeypatch):
    for name, value in dict(WORLD_SIZE="4", LOCAL_RANK="3").items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(RuntimeError, match="there are 2 GPUs here"), together("cuda"):
        pass
