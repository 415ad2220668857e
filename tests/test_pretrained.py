"Networks are saved into folders, built again from them, and shared on the hub."
import json
import shutil
from types import SimpleNamespace

import huggingface_hub
import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import nn

from advdpnp.core import packed_weights, read_weights
from advdpnp.prototypes import Classifier, LinearNet, PrototypeNet

X = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("cls, more", [(PrototypeNet, {}), (PrototypeNet, dict(norm=2.5)), (LinearNet, {})])
def test_a_network_comes_back_from_its_folder(tmp_path, cls, more):
    torch.manual_seed(0)
    net = cls("cifar_resnet8", 10, mean=(0.3,), std=(0.4,), **more)
    net(torch.rand(32, 1, 8, 8))  # its statistics are part of it
    net.save_pretrained(tmp_path / "mine")
    before = torch.get_rng_state()
    again = cls.from_pretrained(tmp_path / "mine")
    assert torch.equal(again(X), net.eval()(X)) and not again.training
    assert torch.equal(torch.get_rng_state(), before)
    assert type(Classifier.from_pretrained(str(tmp_path / "mine"))) is cls
    said = json.loads((tmp_path / "mine/config.json").read_text())
    assert said["backbone"] == "cifar_resnet8" and said["num_classes"] == 10 and said["mean"] == [0.3]
    card = (tmp_path / "mine/README.md").read_text()
    assert f"from advdpnp import {cls.__name__}" in card and "license: apache-2.0" in card


def test_half_precision_in_the_file_is_float32_in_the_network(tmp_path):
    net = PrototypeNet("cifar_resnet8", 10, mean=(0.3,), std=(0.4,)).half()
    net.save_pretrained(tmp_path)
    assert read_weights(tmp_path / "model.safetensors")["head.directions"].dtype == torch.float16
    again = PrototypeNet.from_pretrained(tmp_path)
    assert {value.dtype for value in again.state_dict().values()} == {torch.float32, torch.int64}
    assert torch.equal(again(X), net.float().eval()(X))


def test_a_folder_says_nothing_of_the_torch_that_wrote_it(tmp_path):
    "So that any version reads it: names, types, shapes, numbers and their checksum, and what the network is made of."
    LinearNet("cifar_resnet8", 10, mean=(0.3,), std=(0.4,)).save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "np") as file:  # without torch
        assert file.metadata().keys() == {"sha256"}
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"F32", "I64"}
    assert json.loads((tmp_path / "config.json").read_text()) == dict(
        backbone="cifar_resnet8", num_classes=10, mean=[0.3], std=[0.4])


def test_a_card_that_is_there_stays(tmp_path):
    (tmp_path / "README.md").write_text("of my own")
    LinearNet("cifar_resnet8", 10).save_pretrained(tmp_path)
    LinearNet("cifar_resnet8", 10).save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "of my own"


class Longer(PrototypeNet):
    "Takes an argument that no configuration of ours has."

    def __init__(self, backbone, num_classes, more, **others):
        super().__init__(backbone, num_classes, **others)


def test_numbers_of_numpy_are_kept(tmp_path):
    net = PrototypeNet("cifar_resnet8", np.arange(5).max() + 1, norm=np.float32(2.5))
    net.save_pretrained(tmp_path)
    again = PrototypeNet.from_pretrained(tmp_path)
    assert again.head.num_classes == 5 and torch.equal(again.head.prototypes, net.head.prototypes)


def test_a_wrong_configuration_is_blamed_and_not_the_weights(tmp_path):
    PrototypeNet("cifar_resnet8", 5).save_pretrained(tmp_path)
    said = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(said | dict(mean="abc")))
    with pytest.raises(ValueError, match=r"config\.json is damaged or of another network"):
        PrototypeNet.from_pretrained(tmp_path)


def test_what_cannot_be_built_again_or_would_destroy_something_is_refused(tmp_path):
    own = nn.Sequential(nn.Flatten(), nn.Linear(64, 20))
    own.num_features = 20
    with pytest.raises(ValueError, match="PrototypeNet was given its backbone as a module, .* expected a timm name"):
        PrototypeNet(own, 10, mean=(0.3,), std=(0.4,)).save_pretrained(tmp_path / "own")
    assert not (tmp_path / "own").exists()
    changed = LinearNet("cifar_resnet8", 10)
    changed.head = nn.Linear(64, 5)
    for net in (Longer("cifar_resnet8", 10, "more", mean=(0.5,), std=(0.5,)), changed):
        with pytest.raises(ValueError, match=f"this {type(net).__name__} could not be built again from a folder"):
            net.save_pretrained(tmp_path / "own")
        assert not (tmp_path / "own").exists()
    (tmp_path / "config.json").write_text('{"run": {"method": "TRADES"}}')
    with pytest.raises(ValueError, match="holds something else .*expected another folder"):
        LinearNet("cifar_resnet8", 10).save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_a_network_is_pushed_to_the_hub_and_comes_back_from_there(tmp_path, monkeypatch):
    "With a folder in place of the hub."
    net, hub = LinearNet("cifar_resnet8", 10, mean=(0.3,), std=(0.4,)).eval(), tmp_path / "hub"

    class Api:
        def __init__(self, token=None, **_):
            pass

        def create_repo(self, repo_id, **_):
            return SimpleNamespace(repo_id=repo_id)

        def upload_folder(self, repo_id, folder_path, **_):
            shutil.copytree(folder_path, hub / repo_id)

    monkeypatch.setattr(huggingface_hub.hub_mixin, "HfApi", Api)
    there = lambda repo_id, filename, **_: str(hub / repo_id / filename)
    monkeypatch.setattr("advdpnp.saved.hf_hub_download", there)
    net.push_to_hub("me/mine")
    files = sorted(path.name for path in (hub / "me/mine").iterdir())
    assert files == ["README.md", "config.json", "model.safetensors"]
    assert torch.equal(LinearNet.from_pretrained("me/mine")(X), net(X))


def saved(folder, weights=lambda _: None, **settings):
    "A saved network, with another configuration and with changed weights."
    torch.manual_seed(0)
    PrototypeNet("cifar_resnet8", 10, mean=(0.3,), std=(0.4,)).save_pretrained(folder)
    about = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(about | settings))
    tensors = read_weights(folder / "model.safetensors")
    if weights(tensors) is not None:
        (folder / "model.safetensors").write_bytes(packed_weights(tensors))
    return folder


def without(folder, name, text=None):
    saved(folder)
    (folder / name).unlink() if text is None else (folder / name).write_text(text)
    return folder


def flipped(folder):
    path = saved(folder) / "model.safetensors"
    held = bytearray(path.read_bytes())
    held[-100] ^= 1
    path.write_bytes(held)
    return folder


def linear(folder):
    LinearNet("cifar_resnet8", 10).save_pretrained(folder)
    return folder


WRONG = {
    "no configuration": (lambda f: without(f, "config.json"), r"holds no saved network \(config.json not there\)"),
    "no weights": (lambda f: without(f, "model.safetensors"), r"holds no saved network \(model.safetensors not there"),
    "empty": (lambda f: f.mkdir() or f, r"\(config.json and model.safetensors not there\): expected a folder that"),
    "a run's": (lambda f: without(f, "config.json", '{"run": {}}'), "config.json lacks backbone, num_classes, mean"),
    "no object": (lambda f: without(f, "config.json", "[]"), "config.json holds a list: expected a JSON object"),
    "no JSON": (lambda f: without(f, "config.json", "{"), "config.json is damaged"),
    "unknown backbone": (lambda f: saved(f, backbone="resnet_8"), "config.json: unknown backbone 'resnet_8'"),
    "of a hub": (lambda f: saved(f, backbone="hf-hub:a/b"), "config.json: unknown backbone 'hf-hub:a/b'"),
    "a file": (lambda f: saved(f, backbone="local-dir:/etc"), "unknown backbone 'local-dir:/etc'"),
    "no name": (lambda f: saved(f, backbone=["resnet18"]), "unknown backbone"),
    "other backbone": (lambda f: saved(f, backbone="cifar_resnet18"), "damaged or of another network .*Missing key"),
    "other shape": (lambda f: saved(f, lambda w: w.update(mean=torch.zeros(1, 3, 1, 1)) or w), "size mismatch for m"),
    "more classes": (lambda f: saved(f, num_classes=10**12), r"with 1000000000000 classes, in the .* is \(10, 64\)"),
    "no classes": (lambda f: saved(f, num_classes="ten"), "with 'ten' classes"),
    "more channels": (lambda f: saved(f, mean=[0.1] * 3, std=[1.0] * 3), "damaged or of another network"),
    "huge norm": (lambda f: saved(f, norm=10**400), "damaged or of another network"),
    "words": (lambda f: saved(f, mean="abc", std="abc"), "damaged or of another network"),
    "no mean": (lambda f: saved(f, mean=None), "damaged or of another network"),
    "a layer less": (lambda f: saved(f, lambda w: w.pop("backbone.conv1.weight")), "Missing key.*backbone.conv1"),
    "no head": (lambda f: saved(f, lambda w: w.pop("head.directions")), "head.directions is missing"),
    "a changed bit": (flipped, "model.safetensors is damaged"),
    "a pickle": (lambda f: without(f, "model.safetensors", "PK"), "model.safetensors is damaged"),
    "linear": (linear, "is a LinearNet: expected LinearNet.from_pretrained"),
    "nowhere": (lambda f: f / "nothing", "nothing' is no folder here, and the Hugging Face hub did not give it"),
    "not had": (lambda f: "user/name", r"'user/name' is no folder here, and .* \(LocalEntryNotFoundError\): expected"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_what_is_no_network_gets_a_sentence(tmp_path, monkeypatch, kind):
    make, message = WRONG[kind]
    name = make(tmp_path / "mine")
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as found:
        PrototypeNet.from_pretrained(name, cache_dir=tmp_path / "cache", local_files_only=True)
    assert "advdpnp" in str(found.traceback[-1].path)
    said = str(found.value)
    assert "\n" not in said and len(said) < 700
