"Networks are saved into folders, built again from them, and shared on the hub."
import json
import shutil
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from torch import nn

from advdpnp.prototypes import LinearNet, PrototypeNet

X = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("cls, more", [(PrototypeNet, {}), (PrototypeNet, dict(norm=2.5)), (LinearNet, {})])
def test_a_network_comes_back_from_its_folder(tmp_path, cls, more):
    torch.manual_seed(0)
    net = cls("cifar_resnet8", 10, mean=(0.3,), std=(0.4,), **more)
    net(torch.rand(32, 1, 8, 8))  # its statistics are part of it
    net.save_pretrained(tmp_path / "mine")
    again = cls.from_pretrained(tmp_path / "mine")
    assert torch.equal(again(X), net.eval()(X)) and not again.training
    said = json.loads((tmp_path / "mine/config.json").read_text())
    assert said["backbone"] == "cifar_resnet8" and said["num_classes"] == 10 and said["mean"] == [0.3]
    card = (tmp_path / "mine/README.md").read_text()
    assert f"from advdpnp import {cls.__name__}" in card and "license: apache-2.0" in card


def test_what_cannot_be_built_again_or_would_destroy_something_is_refused(tmp_path):
    own = nn.Sequential(nn.Flatten(), nn.Linear(64, 20))
    own.num_features = 20
    with pytest.raises(ValueError, match="PrototypeNet was given its backbone as a module, .* expected a timm name"):
        PrototypeNet(own, 10, mean=(0.3,), std=(0.4,)).save_pretrained(tmp_path / "own")
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
    monkeypatch.setattr(huggingface_hub.hub_mixin, "hf_hub_download", there)
    net.push_to_hub("me/mine")
    files = sorted(path.name for path in (hub / "me/mine").iterdir())
    assert files == ["README.md", "config.json", "model.safetensors"]
    assert torch.equal(LinearNet.from_pretrained("me/mine")(X), net(X))
