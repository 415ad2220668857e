"The networks in the repository are what their cards say, and what cannot be published is refused."
import json
import re
import shutil
from pathlib import Path

import pytest

from advdpnp.core import write_json
from advdpnp.data import averaged, load_dataset
from advdpnp.evaluation import accuracy
from advdpnp.hub import IMAGES, card, load_weights, publish, remeasured
from advdpnp.runs import Ledger, make_config

from conftest import TINY

DATA = Path(__file__).parent.parent / "data"
NAMES = sorted(path.parent.name for path in DATA.glob("weights/*/config.json"))


def test_there_are_some():
    assert "Adv-DPNP-cifar10-small" in NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_network_can_be_loaded_by_name_and_its_card_speaks_of_it(name):
    said = json.loads((DATA / "weights" / name / "config.json").read_text())
    text = (DATA / "weights" / name / "README.md").read_text()
    net = load_weights(name, DATA)  # compares the sha256
    assert not net.training and said["sha256"]["best.safetensors"] in text
    assert f'from advdpnp.hub import load_weights\nnet = load_weights("{name}")' in text
    for metric in ("clean", "pgd20"):
        assert re.search(rf"as published, 1000 images.*{said['measured'][metric]['accuracy']:.1f} ", text)


@pytest.mark.parametrize("name", NAMES)
def test_the_card_in_the_repository_is_the_one_that_would_be_written_today(name):
    said = json.loads((DATA / "weights" / name / "config.json").read_text())
    ledger = Ledger(DATA, "cpu", use_results=True)
    record = ledger.kept(said["run"])
    written = card(name, record, said["measured"], said["sha256"]["best.safetensors"])
    assert written == (DATA / "weights" / name / "README.md").read_text()


@pytest.mark.parametrize("name", NAMES)
def test_a_network_is_as_accurate_as_its_card_says(name, packed):
    said = json.loads((DATA / "weights" / name / "config.json").read_text())
    config = said["run"]
    dataset = load_dataset(config["dataset"], packed(config["dataset"]))
    images = averaged(dataset, config["side"]) if config["side"] else dataset
    found = remeasured(load_weights(name, DATA), images, config)
    assert len(found["clean"]) == IMAGES
    for metric in ("clean", "pgd20"):
        assert abs(accuracy(found[metric])["accuracy"] - said["measured"][metric]["accuracy"]) <= 0.5


def test_outside_a_clone_one_sentence_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="there are no networks in .*data/weights: .* takes as data_dir$"):
        load_weights("Adv-DPNP-cifar10-small")
    with pytest.raises(ValueError, match="did you mean 'Adv-DPNP-cifar10-small'"):
        load_weights("Adv-DPNP-cifar10-smal", DATA)


def test_what_is_not_finished_not_ours_or_taken_is_not_published(tmp_path):
    ledger = Ledger(tmp_path, "cpu", quiet=True)
    enough = TINY | dict(epochs=4, train_images=1000)  # that rounding moves next to nothing
    config, other = (make_config("DPNP", "quick", seed, "cpu", **enough) for seed in (0, 1))
    with pytest.raises(ValueError, match="is not a finished run: train and measure it first"):
        publish(ledger, config, "ours")
    record = ledger.run(config)
    folder = publish(ledger, config, "ours")
    shutil.copy(ledger.folder(config) / "best.safetensors", folder)
    with pytest.raises(ValueError, match="its sha256 differs"):
        load_weights("ours", tmp_path)
    # a record that another machine made, of weights that are not here
    write_json(tmp_path / "results/table1.quick.json", [record | dict(config=other)])
    ledger.use_results = True
    with pytest.raises(ValueError, match="holds another run: choose another name"):
        publish(ledger, other, "ours")
    with pytest.raises(ValueError, match="is of other weights, measured elsewhere"):
        publish(ledger, other, "theirs")
