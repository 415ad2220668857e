"The networks in the repository are what their cards say."
import json
import re
from pathlib import Path

import pytest

from advdpnp.data import averaged, load_dataset
from advdpnp.evaluation import accuracy
from advdpnp.weights import IMAGES, load_weights, remeasured

DATA = Path(__file__).parent.parent / "data"
NAMES = sorted(path.parent.name for path in DATA.glob("weights/*/config.json"))


def test_there_are_some():
    assert "Adv-DPNP-cifar10-small" in NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_network_can_be_loaded_by_name_and_its_card_speaks_of_it(name):
    said = json.loads((DATA / "weights" / name / "config.json").read_text())
    card = (DATA / "weights" / name / "README.md").read_text()
    net = load_weights(name, DATA)  # compares the sha256
    assert not net.training and said["sha256"]["best.safetensors"] in card and f'load_weights("{name}")' in card
    for metric in ("clean", "pgd20"):
        assert re.search(rf"as published, 1000 images.*{said['measured'][metric]['accuracy']:.1f} ", card)


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
