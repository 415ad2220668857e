import functools
import os
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("MPLBACKEND", "agg")
# small networks: threads would cost more than they give, most of all on a busy machine
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

from advdpnp.data import load_dataset, to_float
from advdpnp.prototypes import PrototypeNet


@pytest.fixture(scope="session")
def digits():
    return load_dataset("digits")


@pytest.fixture
def batch(digits):
    "64 digits and their labels."
    return to_float(torch.from_numpy(digits.x_train[:64])), torch.from_numpy(digits.y_train[:64])


@pytest.fixture
def net(digits):
    torch.manual_seed(0)
    return PrototypeNet("cifar_resnet8", digits.num_classes, mean=digits.mean, std=digits.std)


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
