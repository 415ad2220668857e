"What a training run promises: the same bits however often it was interrupted, and attacks on the network as it is."
import contextlib
import copy
import io
import json
import os
import shutil
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import small_preactivation  # noqa: F401, registers a network
import timm
import torch
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import advdpnp.training
from advdpnp.attacks import CW, FGSM, PGD
from advdpnp.autoattack import AutoAttack
from advdpnp.backbones import cifar_resnet8
from advdpnp.core import seeded
from advdpnp.data import Dataset, load_dataset, to_float
from advdpnp.methods import METHODS, PGDAT, AdvDPNP, Standard, make_net
from advdpnp.prototypes import LinearNet, PrototypeNet
from advdpnp.runs import Ledger, config_hash, make_config
from advdpnp.still import Still, frozen_copy
from advdpnp.training import Recorded, Step, Trainer, Watched, load_state, perturbed

TINY = dict(train_images=200, val_size=50, test_images=20, autoattack_images=1, check_images=5)
CONFIG = make_config("Adv-DPNP", "quick", device="cpu", epochs=5, steps=1, **TINY)


@pytest.fixture
def few(digits):
    "Digits with 200 images to train on."
    return replace(digits, x_train=digits.x_train[:200], y_train=digits.y_train[:200])


def small(channels=1):
    "A backbone with batch-norms. No strided 1x1 convolution: those of so few channels crash on CPUs, see oneDNN 6035."
    return cifar_resnet8(width=4, in_chans=channels, num_classes=0, avg_down=True)


def trainer(digits, folder=None, backbone=None, method=AdvDPNP(eps=0.2, steps=1), **settings):
    torch.manual_seed(0)
    net = PrototypeNet(backbone or small(), 10, mean=digits.mean, std=digits.std)
    usual = dict(epochs=2, batch_size=32, val_size=40, val_attack=PGD(0.2, steps=1), device="cpu", quiet=True)
    return Trainer(net, method, digits, folder=folder, **usual | settings)


def same_weights(one, other):
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


# Killed, and continued


def numbers(folder, config):
    "What a run came to, without the clock."
    record = Ledger(folder, device="cpu").result(config)
    history = [{k: v for k, v in line.items() if k != "seconds"} for line in record["history"]]
    return history, record["best"]["curve"], [
        (record[which]["sha256"], record[which]["metrics"], record[which]["logits"]) for which in ("best", "last")]


@pytest.fixture(scope="module")
def through(tmp_path_factory):
    "A run in a process of two threads; its log."
    folder, log, threads = tmp_path_factory.mktemp("through"), io.StringIO(), torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with contextlib.redirect_stderr(log):
            Ledger(folder, device="cpu").run_all([CONFIG], jobs=1)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    return log.getvalue()


def test_log_has_a_line_an_epoch(through):
    lines = [line for line in through.splitlines() if "Adv-DPNP s0 epoch" in line]
    assert len(lines) == 5
    for n, line in enumerate(lines, 1):
        assert f"epoch {n}/5 2/2" in line
        for word in ("loss", "consistency", "val clean", "robust", "left"):
            assert word in line


def test_killed_at_every_write(digits, tmp_path, monkeypatch):
    "What is on disk when a file is about to take its place, for every file: from there a run ends as if nothing was."
    config = make_config("standard", "quick", 1, "cpu", epochs=2, lr=2.0, **TINY)  # the first epoch is the best
    monkeypatch.setattr("advdpnp.runs.load_dataset", lambda *where: digits)  # reading it anew takes as long as the run
    attacks = [FGSM(0.2), PGD(0.2), CW(0.2, steps=5), AutoAttack(0.2, steps=2, targets=1, queries=5)]
    monkeypatch.setattr("advdpnp.runs.attacks_of", lambda config: attacks)
    ledger = lambda folder: Ledger(folder, device="cpu", quiet=True)
    move, moments = os.replace, []

    def replace(source, target):
        moments.append((tmp_path / str(len(moments)), Path(target).name))
        shutil.copytree(tmp_path / "through", moments[-1][0])
        move(source, target)

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", replace)
        ledger(tmp_path / "through").run(config)
    names = [name for _, name in moments]
    assert {"config.json", "last.safetensors", "best.safetensors", "metrics.jsonl", "state.pt", "trained.json",
            "result-best.json", "result.json"} <= {*names}

    def trained(folder):
        state = load_state(ledger(folder).folder(config) / "state.pt")
        return [line["loss"] for line in state["history"]], [ledger(folder).sha256(config, w) for w in ("best", "last")]

    for folder, name in moments:
        # the file that never took its place
        assert [*folder.rglob(".*.part*")] or name == "best.safetensors" and [*folder.rglob("best.new.*")], name
        assert ledger(folder).train(config) and trained(folder) == trained(tmp_path / "through"), name
        if name.startswith("result"):
            assert ledger(folder).measure(config)
            assert numbers(folder, config) == numbers(tmp_path / "through", config), name
    next(folder.rglob("result.json")).write_text("{half")
    with pytest.raises(ValueError, match="result.json is damaged"):
        ledger(folder).run(config)


@pytest.mark.parametrize("settings", [{}, dict(awp=0.005, ema=0.9)])
def test_time_limit_and_exact_resume_in_the_middle_of_an_epoch(few, tmp_path, monkeypatch, settings):
    through = trainer(few, **settings)
    through.fit()
    stopped, craft, left = trainer(few, tmp_path, save_every=0.0, **settings), AdvDPNP.craft, iter(range(7))

    def interrupted(*batch):
        if next(left, None) is None:
            raise KeyboardInterrupt
        return craft(*batch)

    with monkeypatch.context() as patched:
        patched.setattr(AdvDPNP, "craft", interrupted)
        with pytest.raises(KeyboardInterrupt):
            stopped.fit()
    resumed = trainer(few, tmp_path, **settings)
    assert (resumed.epoch, resumed.batch) == (1, 2)  # 5 batches an epoch
    assert resumed.fit(time_limit=0) is False
    assert resumed.fit() is True
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2] and lines[-1]["loss"] == through.history[-1]["loss"]
    read = trainer(few, tmp_path, **settings)
    for other in (resumed, read):
        assert all(same_weights(through.weights(which), other.weights(which)) for which in ("best", "last"))
        # where training has ended and where that was read: the averages, if there are any
        assert same_weights(other.net.state_dict(), through.weights("last")) and not other.net.training


def test_a_folder_of_another_run_is_refused_and_untouched(few, tmp_path):
    trainer(few, tmp_path).fit(time_limit=0)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    for settings, message in [(dict(lr=0.05), "lr is 0.1 there, 0.05 here"),
                              (dict(epochs=3), "epochs is 2 there, 3 here"), (dict(seed=4), "seed is 0 there, 4 here")]:
        with pytest.raises(ValueError, match=f"holds another run: .*{message}.*Choose another folder"):
            trainer(few, tmp_path, **settings)
    torch.manual_seed(0)
    wider = PrototypeNet(small(), 10, norm=5.0, mean=few.mean, std=few.std)
    with pytest.raises(ValueError, match="net.head is .*norm=2.4.* there, .*norm=5"):
        Trainer(wider, AdvDPNP(eps=0.2, steps=1), few, folder=tmp_path, epochs=2, batch_size=32, val_size=40,
                val_attack=PGD(0.2, steps=1), device="cpu")
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_a_damaged_state_is_named(few, tmp_path):
    trainer(few, tmp_path).fit(time_limit=0)
    path = tmp_path / "state.pt"
    whole = path.read_bytes()
    for damaged in (whole[:-500], whole[:10000] + bytes(200) + whole[10200:], b""):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="state.pt is damaged .*: move .* away"):
            trainer(few, tmp_path)


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_state(few, tmp_path):
    t = trainer(few, tmp_path, epochs=3)
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
    assert torch.isfinite(trainer(few, tmp_path, epochs=3).weights("last")["head.directions"]).all()


def test_weights_can_be_read_by_others(few, tmp_path):
    trainer(few, tmp_path, epochs=1).fit()
    (tmp_path / "any").touch()
    assert {path.stat().st_mode for path in tmp_path.iterdir() if path.suffix} == {(tmp_path / "any").stat().st_mode}


# What is trained on


def test_the_test_images_are_never_seen(digits):
    t = trainer(digits)
    test = {image.tobytes() for image in digits.x_test} - {image.tobytes() for image in digits.x_train}
    for loader in (t.loader, t.val_loader):
        assert not test & {image.numpy().tobytes() for image in loader.x}


def test_global_randomness_is_left_alone(few):
    t, state = trainer(few, epochs=1), torch.get_rng_state()
    t.fit()
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_takes_a_step_on_colour_images(method):
    rng = np.random.default_rng(0)
    data = Dataset("colour", rng.integers(0, 256, (40, 16, 16, 3), dtype=np.uint8), np.arange(40) % 4,
                   rng.integers(0, 256, (8, 16, 16, 3), dtype=np.uint8), np.arange(8) % 4)
    cls = METHODS[method]
    net = make_net(method, small(channels=3), 4, data.mean, data.std)
    before = net.backbone.conv1.weight.detach().clone()
    t = Trainer(net, cls(**dict(eps=8 / 255, steps=1) if cls.adversarial else {}), data, epochs=1,
                batch_size=16, device="cpu", quiet=True)
    assert t.fit() and t.config["flip"] and t.config["padding"] == 2
    assert not torch.equal(before, net.backbone.conv1.weight)


def test_a_network_of_other_classes_or_channels_is_refused(few):
    for net, message in ((LinearNet(small(), 12, few.mean, few.std), "the network has 12 classes, digits has 10"),
                         (LinearNet(small(channels=3), 10), r"images are \(2, 1, 8, 8\), expected 3 channels")):
        with pytest.raises(ValueError, match=message):
            Trainer(net, Standard(), few, batch_size=32, device="cpu", quiet=True).fit()


def test_an_archive_that_is_not_to_be_mirrored_is_trained_on_in_a_folder(few, tmp_path):
    np.savez(tmp_path / "letters.npz", x_train=few.x_train, y_train=few.y_train, x_test=few.x_test,
             y_test=few.y_test, flip=False)
    trainer(load_dataset("letters", tmp_path), tmp_path / "run", epochs=1).fit()
    assert json.loads((tmp_path / "run/config.json").read_text())["flip"] is False


def test_a_stream_trains_like_the_images_it_is_made_of(few):
    "Batches from elsewhere, through the same trainer: bytes or floats, the same weights."
    x, y = torch.from_numpy(few.x_train[:128]).permute(0, 3, 1, 2), torch.from_numpy(few.y_train[:128])
    held, nets = replace(few, x_test=few.x_test[:40], y_test=few.y_test[:40]), []
    for batches in ([(x[i : i + 64], y[i : i + 64]) for i in (0, 64)],
                    [(x[i : i + 64].float() / 255, y[i : i + 64].int()) for i in (0, 64)]):
        t = trainer(held, stream=batches, method=PGDAT(eps=0.2, steps=2), val_size=None)
        assert t.fit() and [line["epoch"] for line in t.history] == [1, 2]
        nets.append(t.weights("last"))
    assert same_weights(*nets)


def test_timms_loader_of_a_folder_of_images(tmp_path):
    import PIL.Image
    from timm.data import create_dataset, create_loader

    rng = np.random.default_rng(0)
    for label in ("cat", "dog"):
        (tmp_path / label).mkdir()
        for i in range(8):
            PIL.Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(tmp_path / label / f"{i}.png")
    loader = create_loader(create_dataset("", tmp_path), (3, 32, 32), 4, is_training=True, use_prefetcher=False,
                           # images stay in [0, 1]
                           mean=(0, 0, 0), std=(1, 1, 1), num_workers=0, persistent_workers=False)
    held = load_dataset(f"{tmp_path}/")
    held = held.__class__("held", held.x_test[:0, :32, :32], held.y_test[:0], held.x_test[:, :32, :32], held.y_test)
    torch.manual_seed(0)
    net = make_net("Adv-DPNP", small(channels=3), 2, (0.5,) * 3, (0.25,) * 3)
    t = Trainer(net, AdvDPNP(eps=8 / 255, steps=1), held, stream=loader, epochs=1, device="cpu", quiet=True)
    assert t.fit() and np.isfinite(t.history[0]["loss"]) and len(t.loader) == 4


# A step


class Operations(TorchDispatchMode):
    "Inside, writes down every operation, and where the tensors are that come from outside."

    def __init__(self):
        super().__init__()
        self.seen, self.made = [], []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        given = [leaf for leaf in tree_leaves((args, kwargs)) if torch.is_tensor(leaf)]
        inside = {tensor.untyped_storage().data_ptr() for tensor in self.made}
        result = operation(*args, **(kwargs or {}))
        outside = [tensor.data_ptr() for tensor in given if tensor.untyped_storage().data_ptr() not in inside]
        self.seen.append((operation, *outside))
        self.made += [leaf for leaf in tree_leaves(result) if torch.is_tensor(leaf)
                      and leaf.untyped_storage().data_ptr() not in {t.untyped_storage().data_ptr() for t in given}]
        return result


@pytest.mark.parametrize("method", METHODS)
def test_a_step_draws_nothing_reads_nothing_and_does_the_same_at_the_same_places_every_time(batch, few, method):
    cls, (x, y) = METHODS[method], batch
    torch.manual_seed(0)
    net, method = make_net(method, small(), 10, few.mean, few.std), cls(**dict(steps=2) if cls.adversarial else {})
    step, noise, state, seen = Step(net, method, x), method.draw(x, seeded("cpu", 0)), torch.get_rng_state(), []
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    for _ in range(4):
        with Operations() as operations, Watched() as watched:
            step(x, y, noise)
        seen.append(operations.seen)
        assert watched.why is None
        optimizer.step()
    assert len(seen[0]) > 100 and seen[1] == seen[2] == seen[3]
    assert len({place for _, *places in seen[1] for place in places}) > 30  # parameters, buffers, and those of the copy
    assert torch.equal(torch.get_rng_state(), state)


def replace_graphs(monkeypatch):
    "In place of a graph: a recording does again what it was given, on the same tensors. Counts how often it does."
    replayed = []
    monkeypatch.setattr(advdpnp.training, "has_graphs", lambda device: True)
    monkeypatch.setattr(advdpnp.training, "aside", lambda run: run())
    monkeypatch.setattr(advdpnp.training, "record", lambda run, parameters: lambda: (replayed.append(1), run())[1])
    monkeypatch.setattr(Still, "compile_copy", lambda still, x: None)
    return replayed


@pytest.fixture
def stand_in(monkeypatch):
    return replace_graphs(monkeypatch)


def without_seconds(trainer):
    return [{name: value for name, value in line.items() if name != "seconds"} for line in trainer.history]


@pytest.mark.parametrize("method", METHODS)
def test_a_replayed_run_is_the_plain_run_to_the_bit(few, tmp_path, monkeypatch, method):
    "Weights, averages, metrics and crafted images, over 20 steps with changing rates and across an interruption."
    cls, crafted = METHODS[method], []
    craft = cls.craft
    monkeypatch.setattr(cls, "craft", lambda *args: (crafted.append(craft(*args).clone()), crafted[-1])[1])

    def start(folder=None):
        torch.manual_seed(0)
        net = make_net(method, small(), 10, few.mean, few.std)
        settings = dict(eps=0.2, steps=1) if cls.adversarial else {}
        return Trainer(net, cls(**settings), few, folder=folder, device="cpu", quiet=True, epochs=4, batch_size=32,
                       val_size=40, val_attack=PGD(0.2, steps=1), ema=0.9, keep_going=True)

    plain = start()
    assert plain.fit() and plain.one_step.why == "a cpu runs it as it is" and len(crafted) == 20
    images, crafted[:] = [*crafted], []
    replayed = replace_graphs(monkeypatch)
    interrupted = start(tmp_path / "run")
    interrupted._late = lambda deadline: (interrupted.epoch, interrupted.batch) == (1, 4)
    assert not interrupted.fit() and len(replayed) == 9 - Recorded.first
    resumed = start(tmp_path / "run")
    assert resumed.fit() and len(replayed) == 20 - 2 * Recorded.first
    assert without_seconds(resumed) == without_seconds(plain)
    for which in ("best", "last"):
        assert same_weights(plain.weights(which), resumed.weights(which))
    assert same_weights(plain.net.state_dict(), resumed.net.state_dict())
    assert len(crafted) == 20 and all(torch.equal(one, other) for one, other in zip(images, crafted))


def test_the_size_that_comes_again_is_recorded(few, monkeypatch):
    "Here every fourth batch is smaller, so the first that could be recorded is."
    replayed = replace_graphs(monkeypatch)
    x, y = to_float(torch.from_numpy(few.x_train)), torch.from_numpy(few.y_train)
    stream = [(x[:n], y[:n]) for n in (16, 16, 16, 7)]
    torch.manual_seed(0)
    net = make_net("standard", small(), 10, few.mean, few.std)
    t = Trainer(net, METHODS["standard"](), few, device="cpu", quiet=True, stream=stream, epochs=4,
                val_attack=PGD(0.2, steps=1))
    assert t.fit() and t.one_step.given[0].shape[0] == 16 and len(replayed) == 8


@pytest.mark.parametrize("changes", [dict(std=(0.9,)), dict(last=nn.Tanh())], ids=["std", "layer"])
def test_a_folder_goes_on_with_the_same_network_alone(few, tmp_path, changes):
    "Neither is seen in names, shapes and number of the weights."
    def start(std=few.std, last=nn.ReLU()):
        torch.manual_seed(0)
        backbone = nn.Sequential(nn.Conv2d(1, 4, 3), last, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        backbone.num_features = 4
        net = PrototypeNet(backbone, 10, mean=few.mean, std=std)
        return Trainer(net, METHODS["DPNP"](), few, device="cpu", quiet=True, epochs=2, batch_size=32, val_size=40,
                       val_attack=PGD(0.2, steps=1), folder=tmp_path)

    first = start()
    first._late = lambda deadline: first.epoch == 1
    assert not first.fit()
    with pytest.raises(ValueError, match="holds a run of another network"):
        start(**changes).fit()
    assert start().fit()


class Forgetful(nn.BatchNorm2d):
    "Averages over all batches: it reads how many there were."

    def __init__(self, channels):
        super().__init__(channels, momentum=None)


class Elsewhere(nn.Module):
    "Copies something to another device."

    def forward(self, x):
        x.detach().to("meta")
        return x


@pytest.mark.parametrize("part, why", [
    (nn.Dropout(0.1), "draws random numbers"),
    (Forgetful(16), "reads numbers"),
    (Elsewhere(), "moves numbers"),
    (nn.Identity(), None),
], ids=["dropout", "batch-norm without momentum", "another device", "plain"])
def test_a_step_that_draws_or_reads_is_run_as_it_is(few, stand_in, part, why):
    backbone = nn.Sequential(nn.Conv2d(1, 16, 3), part, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    backbone.num_features = 16
    t = trainer(few, backbone=backbone)
    assert t.fit()
    assert (why in t.one_step.why and not stand_in) if why else (t.one_step.why is None and len(stand_in) == 7)


def test_perturbed_weights_an_odd_batch_and_replaced_tensors_are_not_replayed(few, stand_in):
    t = trainer(few, awp=0.01)
    assert t.fit() and "perturbed" in t.one_step.why and not stand_in
    t = trainer(few)
    batches = [*t.loader.epoch(0)]
    for x, y in batches[:4]:
        t.step(x, y)
    assert len(stand_in) == 1
    t.step(batches[4][0][:20], batches[4][1][:20])
    assert len(stand_in) == 1  # as it is
    t.step(*batches[4])
    assert len(stand_in) == 2
    first, layer = t.one_step.again, t.net.backbone.conv1
    layer.weight = nn.Parameter(layer.weight.detach().clone())
    t.step(*batches[4])
    assert t.one_step.again is not first and len(stand_in) == 3  # recorded anew, at the new places


def test_a_recording_that_fails_costs_a_warning(few, stand_in, monkeypatch):
    "The end of a recording that has failed fails, too, and says less."
    def fail(run, parameters):
        try:
            raise RuntimeError("operation not permitted when stream is capturing\nadvice")
        except RuntimeError:
            raise RuntimeError("operation failed due to a previous error during capture")

    monkeypatch.setattr(advdpnp.training, "record", fail)
    t = trainer(few)
    with pytest.warns(UserWarning, match="run as it is, which is slower: recording failed .operation not permitted"):
        assert t.fit()
    assert not stand_in


@pytest.mark.filterwarnings("ignore:torch.compile does not work here")
def test_a_copy_is_compiled_where_that_works_and_follows_its_network(few, batch, monkeypatch):
    (x, _), compiled = batch, torch.compile
    net = trainer(few).net.eval()
    monkeypatch.setattr(torch, "compile", lambda model, dynamic: compiled(model, dynamic=dynamic, backend="aot_eager"))
    still = Still(net, x)
    still.compile_copy(x)
    assert still.run is not still.copy
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(1.1)
    still.refresh()
    assert still.same_as_model(x) and torch.allclose(still(x), net(x), atol=1e-4)
    images = PGD(0.2)(still, x, batch[1])
    torch.testing.assert_close(images, PGD(0.2)(Still(net, x), x, batch[1]), atol=1e-5, rtol=0)
    with torch.no_grad():
        assert torch.equal(still(x[:7]), still.copy(x[:7]))  # another size is not compiled
    monkeypatch.setattr(torch, "compile", lambda model, dynamic: lambda x: 1 / 0)
    other = Still(net, x)
    with pytest.warns(UserWarning, match="torch.compile does not work here, so attacks are slower: division by zero"):
        other.compile_copy(x)
    monkeypatch.setattr(torch, "compile", lambda model, dynamic: lambda x: model(x).flip(1))
    other.compile_copy(x)
    assert other.run is other.copy  # a compiler that is wrong is not used


@pytest.mark.filterwarnings("error:TensorFloat32")
def test_where_gradients_cannot_be_compiled_training_goes_on(few, monkeypatch):
    def refused(graph, examples):
        raise NotImplementedError("no gradients here")

    def backend(graph, examples):
        warnings.warn("TensorFloat32 tensor cores for float32 matrix multiplication available but not enabled.")
        return aot_autograd(fw_compiler=lambda graph, examples: graph.forward, bw_compiler=refused)(graph, examples)

    plain, compiled = Still.compile_copy, torch.compile
    replace_graphs(monkeypatch)
    monkeypatch.setattr(Still, "compile_copy", plain)
    monkeypatch.setattr(torch, "compile", lambda model, dynamic: compiled(model, dynamic=dynamic, backend=backend))
    t = trainer(few)
    with pytest.warns(UserWarning, match="does not work here, so attacks are slower: .*no gradients here"):
        assert t.fit()
    assert t.one_step.still.run is t.one_step.still.copy


def grouped():
    net = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.ReLU(), nn.Conv2d(8, 16, 3, stride=2),
                        nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    net.num_features = 16
    return net


BACKBONES = {  # to the number of batch-norms that are folded
    "resnet": (small, 9),
    "pre-activation": (lambda: timm.create_model("test_preactresnet", in_chans=1, num_classes=0), 0),
    "group-norm": (grouped, 0),
}


@pytest.mark.parametrize("name", BACKBONES)
def test_every_step_attacks_the_network_as_it_is(few, monkeypatch, name):
    backbone, pairs = BACKBONES[name]
    t, craft, steps = trainer(few, backbone=backbone()), AdvDPNP.craft, []
    t.net.double()  # so that rounding flips no sign of the attack's gradient

    def watched(self, still, x, y, noise):
        assert len(still.pairs) == pairs and still.same_as_model(x, tolerance=1e-9)
        x_adv = craft(self, still, x, y, noise)
        afresh = craft(self, Still(frozen_copy(t.net)), x, y, noise)
        assert (x_adv != afresh).double().mean() < 1e-3
        steps.append(frozen_copy(t.net)(x))
        return x_adv

    monkeypatch.setattr(AdvDPNP, "craft", watched)
    assert t.fit()
    assert len(steps) == 10 and not any(torch.equal(a, b) for a, b in zip(steps, steps[1:]))  # and it did change
    assert t.one_step.still.same_as_model(t.val_loader.take(torch.arange(40))[0])


class Switching(nn.Module):
    "Has two batch-norms, and an attribute says which one is used."

    num_features, which = 8, 0

    def __init__(self):
        super().__init__()
        self.conv, self.norms = nn.Conv2d(1, 8, 3), nn.ModuleList([nn.BatchNorm2d(8), nn.BatchNorm2d(8)])

    def forward(self, x):
        return self.norms[self.which](self.conv(x)).relu().mean((2, 3))


def test_a_network_that_changes_its_way_of_computing_is_not_attacked_as_another(few, tmp_path):
    t = trainer(few, tmp_path, backbone=Switching())
    step = t.step

    def switching(x, y):
        t.net.backbone.which = int((t.epoch, t.batch) >= (1, 2))
        return step(x, y)

    t.step = switching
    with pytest.raises(RuntimeError, match="the frozen copy that is attacked does not say what the network says"):
        t.fit()
    assert len(t.history) == len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 1  # the first epoch was fine
    t = trainer(few, backbone=Switching())
    t.step(*next(t.loader.epoch(0)))
    t.net.backbone.more = nn.Linear(2, 2)
    with pytest.raises(RuntimeError, match="the model has other weights than when it was copied"):
        t.step(*next(t.loader.epoch(0)))


@pytest.mark.filterwarnings("ignore:.*weight_norm")
def test_a_network_that_cannot_be_copied_is_attacked_itself(few, monkeypatch):
    backbone, craft, modes = grouped(), AdvDPNP.craft, []
    backbone[3] = nn.utils.weight_norm(backbone[3])  # its weight is computed, and is no parameter

    def watched(self, still, x, y, noise):
        modes.append((still.copied, t.net.training, any(p.requires_grad for p in t.net.parameters())))
        return craft(self, still, x, y, noise)

    monkeypatch.setattr(AdvDPNP, "craft", watched)
    t = trainer(few, backbone=backbone)
    assert t.fit() and t.history[1]["loss"] < t.history[0]["loss"]
    assert modes == [(False, False, False)] * 10 and all(p.requires_grad for p in t.net.parameters())


@pytest.mark.parametrize("method", [name for name in METHODS if METHODS[name].adversarial])
def test_bf16_trains_float32_weights_on_images_inside_the_ball(few, monkeypatch, method):
    cls, eps, far = METHODS[method], 8 / 255, []
    craft = cls.craft

    def watched(self, still, x, y, noise):
        x_adv = craft(self, still, x, y, noise)
        kinds = {name: tensor.dtype for name, tensor in still.static.items() if tensor.is_floating_point()}
        assert {kinds.pop(name) for name in [*kinds] if name.startswith("backbone.")} == {torch.bfloat16}
        assert {*kinds.values()} == {x_adv.dtype} == {torch.float32}
        assert 0 <= x_adv.min() and x_adv.max() <= 1
        far.append((x_adv - x).abs().max().item())
        return x_adv

    monkeypatch.setattr(cls, "craft", watched)
    torch.manual_seed(0)
    net = make_net(method, small(), 10, few.mean, few.std)
    t = Trainer(net, cls(eps=eps, steps=5), few, epochs=2, batch_size=32, val_size=40, precision="bf16",
                val_attack=PGD(eps, steps=1), device="cpu", quiet=True)
    assert t.fit() and t.history[1]["loss"] < t.history[0]["loss"]
    assert len(far) == 10 and 0.99 * eps < max(far) <= eps + 1e-6
    floats = [value for value in t.net.state_dict().values() if value.is_floating_point()]
    assert {value.dtype for value in [*floats, *(p.grad for p in net.parameters())]} == {torch.float32}


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))]


@pytest.mark.parametrize("device", DEVICES)  # a CPU tells whether the test itself is right
def test_a_gpu_trains_in_bf16_and_resumes(digits, tmp_path, device):
    make = lambda: trainer(digits, tmp_path, backbone="cifar_resnet8", method=AdvDPNP(eps=0.2, steps=2),
                           epochs=4, batch_size=64, val_size=200, device=device, precision="bf16")
    assert make().fit(time_limit=0) is False
    resumed = make()
    assert resumed.fit() and resumed.history[-1]["clean"] > 50


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_never_waits_inside_an_epoch(digits):
    t = trainer(digits, backbone="cifar_resnet8", method=AdvDPNP(eps=0.2, steps=3), epochs=1, batch_size=64,
                precision="bf16", device="cuda", ema=0.99)
    batches = t.loader.epoch(0)
    for _ in range(Recorded.first + 1):  # folding looks whether it may, and the step is recorded
        t.step(*next(batches))
    assert t.one_step.again is not None
    torch.cuda.set_sync_debug_mode("error")
    try:
        for x, y in batches:
            t.step(x, y)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_step_is_recorded_on_its_own_gpu(few, stand_in, monkeypatch):
    "Which may not be the current one: streams and recordings belong to one."
    current = []
    monkeypatch.setattr(torch.cuda, "device", lambda device: (current.append(str(device)), contextlib.nullcontext())[1])
    t = trainer(few)
    batches = [*t.loader.epoch(0)][:4]
    t.one_step = Recorded(Step(t.net, t.method, batches[0][0]), torch.device("cuda:1"))
    for x, y in batches:
        t.step(x, y)
    assert current == ["cuda:1"] * 4 and len(stand_in) == 1


def test_a_recording_that_fails_leaves_no_older_one(few, stand_in, monkeypatch):
    t = trainer(few)
    batches = [*t.loader.epoch(0)]
    for x, y in batches[:4]:
        t.step(x, y)
    assert t.one_step.again is not None
    monkeypatch.setattr(advdpnp.training, "record", lambda run, parameters: 1 / 0)
    t.net.backbone.conv1.weight = nn.Parameter(t.net.backbone.conv1.weight.detach().clone())
    with pytest.raises(ZeroDivisionError):
        t.step(*batches[4])
    assert t.one_step.again is None


class Unfit(nn.Module):
    "Waits for the device, which a recording cannot; nothing tells beforehand."

    def forward(self, x):
        torch.cuda.current_stream().synchronize()
        return x


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_goes_on_where_a_recording_fails(digits):
    backbone = nn.Sequential(nn.Conv2d(1, 16, 3), Unfit(), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    backbone.num_features = 16
    t = trainer(digits, backbone=backbone, device="cuda")
    with pytest.warns(UserWarning, match="run as it is, which is slower: recording failed"):
        assert t.fit()
    assert torch.cuda.current_stream() == torch.cuda.default_stream()


@pytest.mark.parametrize("device", DEVICES)  # on the CPU nothing is replayed, and the bounds are tried
@pytest.mark.parametrize("method", ["Adv-DPNP", "TRADES", "standard"])
def test_a_gpu_replays_what_it_would_do_step_by_step(digits, method, monkeypatch, device):
    "Images as strong as those that float32 finds, and losses within noise."
    cls, crafted = METHODS[method], []
    craft = cls.craft

    if device == "cpu":
        replace_graphs(monkeypatch)
    has_graphs, epochs = advdpnp.training.has_graphs, 20 if device == "cuda" else 4

    def losses(recorded):
        monkeypatch.setattr(advdpnp.training, "has_graphs", has_graphs if recorded else lambda device: False)
        torch.manual_seed(0)
        net = make_net(method, "cifar_resnet8", 10, digits.mean, digits.std)
        t = Trainer(net, cls(**dict(eps=0.2, steps=3) if cls.adversarial else {}), digits, epochs=epochs, batch_size=64,
                    val_size=200, precision="bf16", device=device, quiet=True)
        found = []
        for epoch in range(t.epochs):
            t.epoch, t.batch = epoch, 0
            for x, y in t.loader.epoch(epoch):
                found.append(t.step(x, y)["loss"])
        assert (t.one_step.again is not None) == recorded, t.one_step.why
        if cls.adversarial:
            t.one_step.still.refresh()
            x, y = t.val_loader.take(torch.arange(64))  # a batch, as it is compiled for
            exact, noise = Still(frozen_copy(t.net), x), t.method.draw(x, seeded(device, 0))
            loss = lambda images: nn.functional.cross_entropy(exact(images), y).item()
            longer = replace(t.method, steps=10)  # TRADES begins where its gradient is that of rounding
            strong = [craft(longer, still, x, y, noise) for still in (t.one_step.still, exact)]
            assert all((images - x).abs().max() <= 0.2 + 1e-6 for images in strong)
            crafted.append(tuple(map(loss, (x, *strong))))
        return torch.stack(found).cpu()

    plain, replayed = losses(False), losses(True)
    assert len(plain) == 17 * epochs
    assert torch.allclose(plain[:5], replayed[:5], rtol=0.05)  # two copies in bfloat16 differ by 0.02 here
    assert (plain[-60:].mean() - replayed[-60:].mean()).abs() < 3 * plain[-60:].std() / 60**0.5 + 0.05
    for clean, fast, exact in crafted:
        assert fast - clean > 0.8 * (exact - clean) > 0.02


def test_a_run_that_learns_nothing_stops_with_a_sentence_and_goes_on_if_asked_to(few, tmp_path):
    "It is judged after fifty steps, here of five an epoch."
    stuck = lambda **more: trainer(few, tmp_path, epochs=11, lr=1e-12, **more)
    for _ in range(2):  # asked again, it says so again
        with pytest.raises(RuntimeError, match=r"nothing is learnt: held-out robust accuracy is .* after epoch 10, "
                                               r"guessing gets 10.0%.*--keep-going"):
            stuck().fit()
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 10  # nothing is lost
    assert stuck(keep_going=True).fit()
    assert trainer(few, epochs=11, lr=1e-12, method=Standard()).fit()  # robustness is not what it learns
    assert trainer(few, epochs=11, lr=1e-12, ema=0.999).fit()  # the averages are still the first weights


# Extras


def test_averaged_weights_are_the_running_mean(few):
    "From those after the first step on, with the statistics of batch-norms; counters are the present ones."
    t, mean = trainer(few, ema=0.7, epochs=1), {}
    for x, y in t.loader.epoch(0):
        t.step(x, y)
        for name, value in t.net.state_dict().items():
            average = value.is_floating_point() and name in mean
            mean[name] = 0.7 * mean[name] + 0.3 * value if average else value.clone()
    state = t.state()["average"]
    assert state.keys() == t.net.state_dict().keys() and t.batch == 5
    for name, value in state.items():
        torch.testing.assert_close(value, mean[name], rtol=1e-5, atol=1e-6)
    assert same_weights(t.weights("last"), state) and t.judged is t.average
    assert not any(p.requires_grad for p in t.average.parameters()) and not t.average.training


def test_a_partly_frozen_network_takes_a_step_with_perturbed_weights(few):
    t = trainer(few, awp=0.01, epochs=1)
    frozen = t.net.backbone.layer1[0].conv1.weight.requires_grad_(False)
    before = frozen.clone()
    t.fit()
    assert torch.equal(t.net.backbone.layer1[0].conv1.weight, before)


def test_weight_perturbation_is_a_gradient_at_another_place():
    "Against the step written out by hand, on a network without batch-norm."
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    x, y = torch.randn(20, 6, dtype=torch.float64), torch.randint(3, (20,))
    loss = lambda: nn.functional.cross_entropy(net(x), y)
    by_hand = copy.deepcopy(net)
    for weight, gradient in zip((by_hand[0].weight, by_hand[2].weight),
                                torch.autograd.grad(loss(), (net[0].weight, net[2].weight))):
        weight.data += 0.01 * weight.norm() / gradient.norm() * gradient  # biases stay
    expected = torch.autograd.grad(nn.functional.cross_entropy(by_hand(x), y), list(by_hand.parameters()))
    before = [p.detach().clone() for p in net.parameters()]
    with perturbed(net, loss, 0.01):
        loss().backward()
    assert all(torch.equal(p, b) for p, b in zip(net.parameters(), before))
    assert all(torch.allclose(p.grad, e) for p, e in zip(net.parameters(), expected))


def test_weight_perturbation_leaves_the_statistics_of_one_pass(batch, few):
    "The pass that finds the direction counts for nothing: batch-norms have seen each branch once."
    t = trainer(few, awp=0.005)
    t.step(*batch)
    counts = [value.item() for name, value in t.net.state_dict().items() if name.endswith("num_batches_tracked")]
    assert counts == [2] * 9


# Configurations


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


def test_numbers_of_numpy_are_kept_in_a_checkpoint(few, tmp_path):
    trainer(few, lr=np.float64(0.1), folder=tmp_path).fit(time_limit=0)
    assert trainer(few, lr=np.float64(0.1), folder=tmp_path).fit()
    with pytest.raises(ValueError, match="epochs is 2.5: expected a whole number"):
        trainer(few, epochs=2.5)


def test_a_hook_that_changes_its_line_changes_nothing(few, tmp_path):
    trainer(few, tmp_path, on_epoch=lambda line: line.update(test=np.mean([1, 2]))).fit()
    assert "test" not in trainer(few, tmp_path).history[0]


class Own(torch.nn.Module):
    "A network of somebody's own, which normalises images in its own way; its head says where a function is."

    def __init__(self):
        super().__init__()
        self.backbone, self.head = torch.nn.Flatten(), torch.nn.Linear(64, 10)
        self.head.extra_repr = lambda: f"{len} at {hex(id(self)).upper().replace('X', 'x')}"

    def features(self, x):
        return self.backbone(x - 0.5)

    def forward(self, x):
        return self.head(self.features(x))


def own(digits, net, **settings):
    return Trainer(net, PGDAT(eps=0.2, steps=1), digits, epochs=2, batch_size=32, val_size=40, device="cpu", quiet=True,
                   **settings)


def test_a_network_of_one_s_own_is_saved_and_goes_on(few, tmp_path):
    own(few, Own(), folder=tmp_path).fit(time_limit=0)
    assert own(few, Own(), folder=tmp_path).fit()


def test_a_run_does_not_go_on_with_another_attack_of_somebody_else_s(few, tmp_path):
    class Theirs:
        def __init__(self, eps):
            self.eps = eps

        def __call__(self, model, x, y):
            return x

    trainer(few, val_attack=Theirs(0.1), folder=tmp_path).fit(time_limit=0)
    with pytest.raises(ValueError, match="holds another run"):
        trainer(few, val_attack=Theirs(0.3), folder=tmp_path)


def test_a_network_in_half_precision_is_refused_at_once(few):
    with pytest.raises(ValueError, match="the network has parameters of torch.bfloat16"):
        own(few, Own().bfloat16())
