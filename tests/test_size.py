"What is large stays quick and small: many records, many images, many classes."
import json
import os
import resource
import sys
import time
from pathlib import Path

import numpy as np
import torch
from children import start
from typer.testing import CliRunner

from advdpnp.attacks import FGSM, PGD
from advdpnp.cli import app
from advdpnp.core import write_json
from advdpnp.data import Dataset, Loader, at_most
from advdpnp.evaluation import evaluate
from advdpnp.geometry import geometry
from advdpnp.methods import AdvDPNP
from advdpnp.prototypes import PrototypeNet
from advdpnp.runs import Ledger, make_config
from advdpnp.training import Trainer

DATA = Path(__file__).parent.parent / "data"


def test_ten_thousand_records_are_listed_in_four_seconds(tmp_path):
    record = json.loads((DATA / "results/table1.quick.json").read_text())[0]
    ledger, configs = Ledger(tmp_path, "cpu"), [make_config("standard", "quick", s, "cpu") for s in range(10_000)]
    write_json(tmp_path / "result.json", record)
    for config in configs:
        folder = ledger.folder(config)
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps({"run": config}))
        os.link(tmp_path / "result.json", folder / "result.json")
    began = time.process_time()  # other processes do not count
    listed = CliRunner().invoke(app, ["runs", "--data-dir", str(tmp_path)]).stdout.splitlines()
    seconds = time.process_time() - began
    assert len(listed) == 10_000 and all("finished  clean" in line for line in listed)
    assert seconds < 4  # on a machine of today: 1.5
    began = time.process_time()
    assert ledger.missing(configs[::10], "result") == []
    assert time.process_time() - began < 1


def many(folder, images, classes, limit):
    "Loader, steps, geometry and evaluation of many images and classes; fails if memory grows by more than `limit`."
    torch.set_num_threads(1)
    peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    before = peak()
    x, y = np.random.default_rng(0).integers(0, 256, (images, 8, 8, 1), np.uint8), np.arange(images) % classes
    data = Dataset("many", x, y, x[: images // 2], y[: images // 2])
    torch.manual_seed(0)
    net = PrototypeNet("cifar_resnet8", classes, mean=data.mean, std=data.std)
    t = Trainer(net, AdvDPNP(eps=0.2, steps=1), at_most(data, images - classes), epochs=1, device="cpu", quiet=True,
                val_size=classes, val_attack=PGD(0.2, steps=1), folder=folder)
    for batch, _ in zip(t.loader.epoch(0), range(3)):
        t.step(*batch)
    t._save()
    net.eval()
    evaluate(net, data, [], quiet=True)
    evaluate(net, at_most(data, test=500), [FGSM(0.2)], check_images=5, quiet=True)
    geometry(net, Loader(x[: 2 * classes], y[: 2 * classes], 500), PGD(0.2, steps=1))
    assert peak() - before < limit, f"{(peak() - before) / 2**20:.0f} MiB"


def test_many_images_of_many_classes_fit_into_memory(tmp_path):
    "A tenth of a million images of a thousand classes; by hand with ten times as many, it stays below 8 GiB."
    process = start(many, tmp_path, 100_000, 1000, 900 * 2**20)
    process.join()
    assert process.exitcode == 0
