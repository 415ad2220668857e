"Several processes train as one."
import json
import os
import re
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest
import torch

from advdpnp.baselines import METHODS, PGDAT, make_net
from advdpnp.data import load_dataset
from advdpnp.training import AdvDPNP, Trainer

import small_preactivation  # noqa: F401, isort: skip: registers a network

ENV = {**os.environ, "OMP_NUM_THREADS": "1"}
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]

SCRIPT = """
import json, sys, torch
from advdpnp.parallel import share, together
from test_parallel import trained
with together("cpu"):
    lines = trained(*sys.argv[1:])
    if share()[0] == 0:
        print("LINES", json.dumps(lines))
"""


def trained(method, backbone, awp):
    "Losses of ten steps in double precision, in which rounding cannot flip a sign of the attack's gradient."
    digits = load_dataset("digits")
    torch.manual_seed(0)
    net = make_net(method, backbone, 10, digits.mean, digits.std).double()
    loss = METHODS[method](**({} if method in ("standard", "DPNP") else dict(eps=0.2, steps=2)))
    trainer = Trainer(net, loss, digits, epochs=1, batch_size=64, padding=1, val_size=200, lr=0.05, awp=float(awp),
                      device="cpu", quiet=True)
    lines = []
    for _, (x, y) in zip(range(10), trainer.loader.epoch(0)):
        lines.append({name: value.item() for name, value in trainer.step(x, y).items()})
    return lines


@pytest.mark.parametrize("method, backbone, awp", [
    ("Adv-DPNP", "cifar_resnet8", 0.0), ("Adv-DPNP", "cifar_resnet8", 0.005), ("TRADES", "cifar_resnet8", 0.0),
    ("MART", "cifar_preactresnet18", 0.0),
])
def test_two_processes_have_the_losses_of_one(method, backbone, awp, tmp_path):
    if backbone == "cifar_preactresnet18":
        backbone = "test_preactresnet"
        (tmp_path / "script.py").write_text("import small_preactivation\n" + SCRIPT)
    else:
        (tmp_path / "script.py").write_text(SCRIPT)
    path = {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent)])}
    done = subprocess.run([*TORCHRUN, tmp_path / "script.py", method, backbone, str(awp)], capture_output=True,
                          text=True, env=ENV | path)
    assert done.returncode == 0, done.stderr[-3000:]
    two = json.loads(re.search(r"LINES (.*)", done.stdout)[1])
    one = trained(method, backbone, awp)
    assert one[0].keys() == two[0].keys()
    for a, b in zip(one, two, strict=True):
        for name in a:
            assert abs(a[name] - b[name]) < 1e-5, name
    assert abs(one[-1]["loss"] - one[0]["loss"]) > 1e-3  # they did learn


def train(folder, *more, processes=2, **kwargs):
    start = TORCHRUN if processes == 2 else [sys.executable]
    command = [*start, "-m", "advdpnp", "train", "PGD-AT", "--preset", "quick", "--device", "cpu", "--data-dir",
               folder, "--quiet", "--set", "epochs=2", "--set", "test_images=60", "--set", "autoattack_images=4",
               "--set", "check_images=20", *more]
    return subprocess.Popen([*map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            env=ENV, **kwargs)


def test_the_command_under_torchrun_writes_one_record(tmp_path):
    process = train(tmp_path / "two")
    out, log = process.communicate()
    assert process.returncode == 0, log[-3000:]
    result, = (tmp_path / "two").rglob("result.json")
    record = json.loads(result.read_text())
    assert record["trained_with"]["processes"] == 2 and len(record["history"]) == 2
    assert out.count("sanity checks failed") == 1  # one process reports
    assert not list((tmp_path / "two").rglob("*.part*")) and not list((tmp_path / "two").rglob("running"))
    process = train(tmp_path / "one", processes=1)
    process.communicate()
    alone = json.loads(next((tmp_path / "one").rglob("result.json")).read_text())
    assert alone["config_hash"] == record["config_hash"] and alone["trained_with"]["processes"] == 1
    # later, flipped signs of the attack have grown
    assert alone["history"][0]["loss"] == pytest.approx(record["history"][0]["loss"], abs=0.02)


def test_a_killed_worker_ends_the_job_and_leaves_a_state_to_go_on_from(tmp_path):
    process = train(tmp_path, "--set", "epochs=40", start_new_session=True)
    deadline = time.monotonic() + 120
    while not list(tmp_path.rglob("state.pt")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.2)
    workers = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(workers[-1]), signal.SIGKILL)
    _, log = process.communicate(timeout=120)
    assert process.returncode != 0 and "SIGKILL" in log
    folder = next(tmp_path.rglob("state.pt")).parent
    assert not (folder / "result.json").exists()
    epochs = len((folder / "metrics.jsonl").read_text().splitlines())
    process = train(tmp_path, "--set", "epochs=40", "--time-limit", "8s", processes=1)
    out, log = process.communicate()
    assert process.returncode == 0, log[-3000:]
    assert len((folder / "metrics.jsonl").read_text().splitlines()) > epochs  # it went on


def test_a_batch_that_cannot_be_shared(monkeypatch, digits):
    import advdpnp.parallel
    monkeypatch.setattr(advdpnp.parallel, "share", lambda: (0, 3))
    with pytest.raises(ValueError, match="a batch of 64 cannot be shared by 3 processes: expected a multiple of 3"):
        advdpnp.parallel.my_rows(64)


@pytest.mark.parametrize("settings", [dict(affine=False), dict(track_running_stats=False), dict(momentum=None)])
def test_a_batch_norm_that_cannot_be_shared(monkeypatch, settings):
    import advdpnp.parallel
    monkeypatch.setattr(advdpnp.parallel, "share", lambda: (0, 2))
    net = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 1), torch.nn.BatchNorm2d(2, **settings))
    with pytest.raises(ValueError, match="cannot be shared by processes on a CPU"):
        advdpnp.parallel.share_batch_norms(net)


def test_every_process_of_several_gpus_has_a_seed_of_its_own(monkeypatch):
    import advdpnp.parallel
    monkeypatch.setattr(advdpnp.parallel, "seeded", lambda device, *key: key)
    seeds = []
    for rank in range(4):
        monkeypatch.setattr(advdpnp.parallel, "share", lambda: (rank, 4))
        seeds.append(advdpnp.parallel.generator_of_my_rows(types.SimpleNamespace(is_cuda=True, device="cuda"), 0, 5))
    assert seeds == [(0, 5, rank) for rank in range(4)]


def test_a_stream_trains_like_the_images_it_is_made_of(digits):
    "Batches of a timm loader over a folder of images, through the same trainer."
    x, y = torch.from_numpy(digits.x_train[:256]).permute(0, 3, 1, 2), torch.from_numpy(digits.y_train[:256])
    nets = []
    for batches in ([(x[i : i + 64], y[i : i + 64]) for i in range(0, 256, 64)],
                    [(x[i : i + 64].float() / 255, y[i : i + 64].int()) for i in range(0, 256, 64)]):
        torch.manual_seed(0)
        net = make_net("PGD-AT", "cifar_resnet8", 10, digits.mean, digits.std)
        trainer = Trainer(net, PGDAT(0.2, 2), digits, stream=batches, epochs=2, device="cpu", quiet=True)
        assert trainer.fit() and [line["epoch"] for line in trainer.history] == [1, 2]
        nets.append(trainer.weights("last"))
    assert all(torch.equal(a, b) for a, b in zip(*(net.values() for net in nets)))  # uint8 or floats: the same


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
    net = make_net("Adv-DPNP", "cifar_resnet8", 2, (0.5,) * 3, (0.25,) * 3)
    trainer = Trainer(net, AdvDPNP(8 / 255, 1), held, stream=loader, epochs=1, device="cpu", quiet=True)
    assert trainer.fit() and np.isfinite(trainer.history[0]["loss"]) and len(trainer.loader) == 4


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_never_waits_inside_an_epoch(digits):
    net = make_net("Adv-DPNP", "cifar_resnet8", 10, digits.mean, digits.std)
    trainer = Trainer(net, AdvDPNP(0.2, 3), digits, epochs=1, batch_size=64, precision="bf16",
                      device="cuda", quiet=True)
    batches = list(trainer.loader.epoch(0))
    trainer.step(*batches[0])  # folding looks once whether it may
    torch.cuda.set_sync_debug_mode("error")
    try:
        for x, y in batches[1:6]:
            trainer.step(x, y)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_compiled_network_trains_like_the_plain_one(digits):
    losses = []
    for compiled in (False, True):
        torch.manual_seed(0)
        net = make_net("Adv-DPNP", "cifar_resnet8", 10, digits.mean, digits.std).double()
        trainer = Trainer(net, AdvDPNP(0.2, 1), digits, epochs=1, batch_size=64, compile=compiled,
                          device="cpu", quiet=True)
        lines = []
        for _, (x, y) in zip(range(3), trainer.loader.epoch(0)):
            lines.append(trainer.step(x, y)["loss"].item())
        losses.append(lines)
        assert all("_orig_mod" not in name for name in net.state_dict())
        assert (net.backbone._compiled_call_impl is not None) == compiled
    np.testing.assert_allclose(*losses, atol=1e-5)
