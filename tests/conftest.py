import copy
import functools
import os
import signal
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("MPLBACKEND", "agg")
# small networks: threads would cost more than they give, most of all on a busy machine
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("NUMBA_DISABLE_JIT", "1")  # of an oracle: to compile one function takes longer than to run it

import pytest
import torch

import advdpnp
from advdpnp.data import to_float

# settings for `make_config`, with which a run takes a second or two
TINY = dict(epochs=1, train_images=200, val_size=50, steps=1, test_images=20, autoattack_images=1, check_images=5)

LONGEST = ("test_table1", "test_autoattack", "test_project", "test_cli")

# What a shell runs in the background ignores Ctrl-C, and so would all that the tests start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items):
    "The files that take longest come first, so that of two workers none is left with one of them at the end."
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))


@pytest.fixture(scope="session")
def digits():
    return advdpnp.load_dataset("digits")


@pytest.fixture
def batch(digits):
    "64 digits and their labels."
    return to_float(torch.from_numpy(digits.x_train[:64])), torch.from_numpy(digits.y_train[:64])


@pytest.fixture
def net(digits):
    "An untrained network for digits."
    torch.manual_seed(0)
    return advdpnp.PrototypeNet("cifar_resnet8", digits.num_classes, mean=digits.mean, std=digits.std)


def trained(digits, method, net):
    "A few seconds of training: above 90% on clean digits."
    advdpnp.Trainer(net, method, digits, epochs=5, batch_size=64, lr=0.1, padding=0, val_size=200,
                    val_attack=advdpnp.PGD(0.2, steps=2), device="cpu", quiet=True).fit()
    return net.eval()


@pytest.fixture(scope="session")
def _defended(digits):
    torch.manual_seed(0)
    net = advdpnp.PrototypeNet("cifar_resnet8", digits.num_classes, mean=digits.mean, std=digits.std)
    return trained(digits, advdpnp.AdvDPNP(eps=0.2, steps=2), net)


@pytest.fixture(scope="session")
def _undefended(digits):
    torch.manual_seed(0)
    net = advdpnp.LinearNet("cifar_resnet8", digits.num_classes, digits.mean, digits.std)
    return trained(digits, advdpnp.METHODS["standard"](), net)


@pytest.fixture
def defended(_defended):
    "A network for digits, trained with Adv-DPNP; the test may change it."
    return copy.deepcopy(_defended)


@pytest.fixture
def undefended(_undefended):
    "A network for digits with a linear layer, trained on clean images; the test may change it."
    return copy.deepcopy(_undefended)


@pytest.fixture(scope="session")
def packed(tmp_path_factory):
    "Unpacks a real data set into a folder, once."
    source = os.environ.get("ADVDPNP_DATASETS")
    if not source:
        pytest.skip("ADVDPNP_DATASETS names no folder with packed real data and their unpack.py")
    folder = tmp_path_factory.mktemp("real")

    @functools.cache
    def unpack(name):
        subprocess.run([sys.executable, Path(source) / "unpack.py", name, folder / name], check=True)
        return folder / name

    return unpack


@pytest.fixture
def here(request, tmp_path, monkeypatch):
    "A folder to be in, where `MODELS` of the test's file are somebody's module their_models."
    (tmp_path / "their_models.py").write_text(request.module.MODELS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])  # the command adds this folder
    sys.modules.pop("their_models", None)  # of another test
    return tmp_path


def files(folder):
    "The names of what is in a folder."
    return sorted(path.name for path in folder.iterdir() if "pycache" not in path.name)
