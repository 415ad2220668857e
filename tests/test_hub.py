"The networks in the repository are what their cards say, and what cannot be published is refused."
import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

import advdpnp.hub
from advdpnp.core import packed_weights, read_json, sha256_of, write_json
from advdpnp.data import averaged, load_dataset
from advdpnp.evaluation import accuracy, verdicts_in
from advdpnp.hub import IMAGES, about, pack, publish, remeasured
from advdpnp.prototypes import Classifier, PrototypeNet
from advdpnp.runs import Ledger, make_config

from conftest import TINY

DATA = Path(__file__).parent.parent / "data"
NAMES = sorted(path.parent.name for path in DATA.glob("weights/*/config.json"))


def test_there_are_some():
    assert "Adv-DPNP-cifar10-small" in NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_is_small_and_its_record_is_of_its_weights(name):
    folder = DATA / "weights" / name
    said = read_json(folder / "record.json", "run", "sha256", "measured")
    assert said["sha256"] == {"model.safetensors": sha256_of(folder / "model.safetensors")}
    assert sum(path.stat().st_size for path in folder.iterdir()) < 24 * 2**20
    assert json.loads((folder / "config.json").read_text())["backbone"] == said["run"]["arch"]


@pytest.mark.parametrize("name", NAMES)
def test_the_card_in_the_repository_is_the_one_that_would_be_written_today(name, monkeypatch):
    monkeypatch.chdir(DATA.parent)
    folder, ledger = Path("data/weights") / name, Ledger(DATA, "cpu", use_results=True)
    said, net = read_json(folder / "record.json"), Classifier.from_pretrained(folder)
    text = about(ledger.kept(said["run"]), said["measured"], said["sha256"]["model.safetensors"])
    card = (folder / "README.md").read_text()
    assert card == str(net.generate_model_card(name=str(folder), about=text))
    names = {}
    exec(card.split("```python\n")[1].split("```")[0], names)  # what it says to type
    assert type(names["net"]) is type(net)


@pytest.mark.parametrize("name", NAMES)
def test_a_network_is_as_accurate_as_its_record_says(name, packed, monkeypatch):
    "A large one is not attacked again, which takes a core eight minutes."
    said = read_json(DATA / "weights" / name / "record.json")
    config = said["run"]
    dataset = load_dataset(config["dataset"], packed(config["dataset"]))
    images = averaged(dataset, config["side"]) if config["side"] else dataset
    large = "resnet18" in config["arch"]
    if large:
        monkeypatch.setattr(advdpnp.hub, "robust_to", lambda net, images, attack, right, quiet: right)
    found = remeasured(Classifier.from_pretrained(DATA / "weights" / name), images, config)
    assert len(found["clean"]) == IMAGES
    if large:  # instead, what was found before the weights were rounded
        kept = Ledger(DATA, "cpu", use_results=True).kept(config)["best"]
        found["pgd20"] = verdicts_in(kept)["pgd20"][:IMAGES]
    for metric in ("clean", "pgd20"):
        assert abs(accuracy(found[metric])["accuracy"] - said["measured"][metric]["accuracy"]) <= 0.5


def test_images_of_every_class_are_measured_where_they_are_sorted(digits, net, monkeypatch):
    order = np.argsort(digits.y_test, kind="stable")
    data, seen = dataclasses.replace(digits, x_test=digits.x_test[order], y_test=digits.y_test[order]), []
    monkeypatch.setattr(advdpnp.hub, "IMAGES", 50)
    monkeypatch.setattr(advdpnp.hub, "correct", lambda net, loader: seen.append(loader.y) or loader.y > 99)
    remeasured(net, data, dict(eps=0.1, eval_step_size=0.1))
    assert seen[0].bincount().tolist() == [5] * 10


def test_what_is_not_finished_not_ours_or_taken_is_not_published(tmp_path):
    ledger = Ledger(tmp_path, "cpu", quiet=True)
    enough = TINY | dict(epochs=4, train_images=1000)  # that rounding moves next to nothing
    config, other = (make_config("DPNP", "quick", seed, "cpu", **enough) for seed in (0, 1))
    with pytest.raises(ValueError, match="is not a finished run: train and measure it first"):
        publish(ledger, config, "ours")
    record = ledger.run(config)
    folder = publish(ledger, config, "ours")
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert sorted(files) == ["README.md", "config.json", "model.safetensors", "record.json"]
    # stopped after the record was written, it is published by the same call
    for name in ("README.md", "config.json", "model.safetensors"):
        (folder / name).unlink()
    publish(ledger, config, "ours")
    assert files == {path.name: path.read_bytes() for path in folder.iterdir()}
    PrototypeNet("cifar_resnet8", 10).save_pretrained(tmp_path / "weights/mine")
    with pytest.raises(ValueError, match="mine holds something else than this run"):
        publish(ledger, config, "mine")
    # a record that another machine made, of weights that are not here
    write_json(tmp_path / "results/table1.quick.json", [record | dict(config=other)])
    ledger.use_results = True
    with pytest.raises(ValueError, match="ours holds something else than this run: choose another name"):
        publish(ledger, other, "ours")
    with pytest.raises(ValueError, match="is of other weights, measured elsewhere"):
        publish(ledger, other, "theirs")


def test_an_older_pack_stays_until_the_new_one_is_whole(tmp_path):
    weights = tmp_path / "runs/digits/TRADES-net-quick-s0/best.safetensors"
    weights.parent.mkdir(parents=True)
    weights.write_bytes(packed_weights({"w": torch.randn(1000)}))
    made = pack("quick", tmp_path / "taken", tmp_path, size=100)
    before = b"".join(path.read_bytes() for path in made)
    assert made == sorted(made) and len(made) > 100  # `cat pack-*` puts them in order
    assert made == sorted((tmp_path / "taken").iterdir())
    with pytest.raises(ValueError, match="did you mean 'quick'"):
        pack("qiuck", tmp_path / "taken", tmp_path)
    for damage, message in ((weights.read_bytes()[:-9], "damaged"),
                            (packed_weights({"w": torch.tensor([1e6])}), "w has numbers above 65,504")):
        weights.write_bytes(damage)
        with pytest.raises(ValueError, match=message):
            pack("quick", tmp_path / "taken", tmp_path)
        assert b"".join(path.read_bytes() for path in sorted((tmp_path / "taken").iterdir())) == before
