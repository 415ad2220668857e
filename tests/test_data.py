import pickle
import subprocess
import sys

import numpy as np
import pytest
import scipy.io
import torch
import torchvision

from advdpnp import data
from advdpnp.data import Dataset, Loader, hold_out, load_dataset, pick_device, random_crop_flip, replacing, seeded

RNG = np.random.default_rng(0)


def images(n, size=32, channels=3):
    return RNG.integers(0, 256, (n, size, size, channels), dtype=np.uint8)


@pytest.fixture
def archive(tmp_path):
    "A small data set of one's own, as an archive."
    arrays = dict(x_train=images(60), y_train=np.arange(60) % 3, x_test=images(12), y_test=np.arange(12) % 3)
    np.savez(tmp_path / "mine.npz", **arrays)
    return tmp_path, arrays


def test_own_archive(archive):
    folder, arrays = archive
    mine = load_dataset("mine", folder)
    assert (mine.name, mine.num_classes, mine.channels, mine.flip) == ("mine", 3, 3, True)
    for key, value in arrays.items():
        assert np.array_equal(getattr(mine, key), value)
    np.testing.assert_allclose(mine.mean, (arrays["x_train"] / 255).mean((0, 1, 2)))
    np.testing.assert_allclose(mine.std, (arrays["x_train"] / 255).std((0, 1, 2)))


def published_cifar(folder, name, x_train, y_train, x_test, y_test, monkeypatch):
    "Write the files of CIFAR's Python version, with these images."
    reader = {"cifar10": torchvision.datasets.CIFAR10, "cifar100": torchvision.datasets.CIFAR100}[name]
    base, key = folder / reader.base_folder, "labels" if name == "cifar10" else "fine_labels"
    base.mkdir()
    flat = lambda x: x.transpose(0, 3, 1, 2).reshape(len(x), -1)
    files = [f for f, _ in reader.train_list]
    for file, x, y in [*zip(files, np.split(x_train, len(files)), np.split(y_train, len(files))), (reader.test_list[0][0], x_test, y_test)]:
        (base / file).write_bytes(pickle.dumps({"data": flat(x), key: y.tolist()}))
    names = [f"class {k}" for k in range(10 if name == "cifar10" else 100)]
    (base / reader.meta["filename"]).write_bytes(pickle.dumps({reader.meta["key"]: names}))
    monkeypatch.setattr(reader, "_check_integrity", lambda self: True)
    monkeypatch.setattr(torchvision.datasets.cifar, "check_integrity", lambda *a: True)
    return names


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_published_cifar_files(tmp_path, monkeypatch, name):
    k = 10 if name == "cifar10" else 100
    x_train, x_test, y_train, y_test = images(2 * k), images(k), np.arange(2 * k) % k, np.arange(k)
    names = published_cifar(tmp_path, name, x_train, y_train, x_test, y_test, monkeypatch)
    first = load_dataset(name, tmp_path)
    assert np.array_equal(first.x_train, x_train) and np.array_equal(first.y_test, y_test) and first.class_names == tuple(names)
    monkeypatch.setattr(data, "official_arrays", lambda *a: pytest.fail("the archive was not used"))
    second = load_dataset(name, tmp_path)
    assert second.sha256 == first.sha256 and second.class_names == first.class_names


def test_published_svhn_files(tmp_path, monkeypatch):
    x, y = images(30), np.arange(30) % 10
    for split in ("train", "test"):  # .mat files hold HWCN and call the digit 0 "10"
        scipy.io.savemat(tmp_path / f"{split}_32x32.mat", {"X": x.transpose(1, 2, 3, 0), "y": np.where(y == 0, 10, y)[:, None]})
    monkeypatch.setattr(torchvision.datasets.SVHN, "_check_integrity", lambda self: True)
    monkeypatch.setattr(torchvision.datasets.svhn, "check_integrity", lambda *a: True)
    monkeypatch.setattr(torchvision.datasets.svhn, "download_url", lambda *a: None)
    svhn = load_dataset("svhn", tmp_path)
    assert np.array_equal(svhn.x_train, x) and np.array_equal(svhn.y_test, y) and not svhn.flip


def test_unknown_name_leaves_nothing(archive):
    folder, _ = archive
    before = sorted(folder.iterdir())
    with pytest.raises(ValueError, match="unknown data set 'cifar-10': did you mean 'cifar10'.*mine"):
        load_dataset("cifar-10", folder)
    assert sorted(folder.iterdir()) == before
    with pytest.raises(ValueError, match="did you mean 'digits'"):
        load_dataset("digit", folder / "nowhere")
    assert not (folder / "nowhere").exists()


def test_failed_download_says_where_to_put_the_files(tmp_path, monkeypatch):
    def fail(*args):
        raise OSError("no route to host")

    monkeypatch.setattr(data, "official_arrays", fail)
    with pytest.raises(OSError, match="cifar10 could not be downloaded.*put cifar10.npz or the published files into"):
        load_dataset("cifar10", tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("damage", [lambda b: b[:-200], lambda b: b[:1000], lambda b: b[:5000] + bytes(50) + b[5050:], lambda b: b"", lambda b: b"no archive"])
def test_damaged_archive(archive, damage):
    path = archive[0] / "mine.npz"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match="mine.npz is damaged or not an .npz archive"):
        load_dataset("mine", path.parent)


@pytest.mark.parametrize("change, message", [
    (dict(x_train=None), "lacks x_train"),
    (dict(x_train=np.zeros((60, 32, 32, 3), np.float32)), "x_train is float32"),
    (dict(x_test=np.zeros((12, 32, 32), np.uint8)), "x_test is uint8 .* expected uint8"),
    (dict(y_train=np.arange(59) % 3), r"y_train is int64 \(59,\), expected int64 \(60,\)"),
    (dict(y_test=np.arange(12) % 3 - 1), "labels from -1 to 2"),
    (dict(class_names=np.array(["a", "b"])), "labels from 0 to 2, expected 0 to 1"),
])
def test_bad_archive(archive, change, message):
    folder, arrays = archive
    np.savez(folder / "mine.npz", **{k: v for k, v in (arrays | change).items() if v is not None})
    with pytest.raises(ValueError, match=message):
        load_dataset("mine", folder)


def test_a_killed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "x.npz"
    path.write_bytes(b"old")
    code = f"""
import os
from advdpnp.data import replacing
with replacing({str(path)!r}) as part:
    part.write_bytes(b"half")
    os._exit(9)
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == 9
    assert path.read_bytes() == b"old"
    with pytest.raises(KeyError), replacing(path) as part:
        part.write_bytes(b"half")
        raise KeyError
    assert path.read_bytes() == b"old"
    with replacing(path) as part:
        part.write_bytes(b"new")
    assert path.read_bytes() == b"new"


def test_held_out_images_are_stratified_disjoint_and_fixed(digits):
    held, again, other = hold_out(digits, 200), hold_out(digits, 200), hold_out(digits, 200, seed=1)
    assert held.sha256 == again.sha256 != other.sha256
    assert np.array_equal(np.sort(np.concatenate([held.y_train, held.y_test])), np.sort(digits.y_train))
    share = np.bincount(held.y_test) / np.bincount(digits.y_train)
    assert share.max() - share.min() < 0.02
    assert (held.mean, held.class_names) == (digits.mean, digits.class_names)


def test_augmentation_is_uniform_over_places_and_sides():
    n, p = 40000, 2
    x = torch.zeros(n, 5, 5, 1, dtype=torch.uint8)
    x[:, 2, 1] = 1
    out = random_crop_flip(x, p, True, seeded("cpu", 0)).float().mean(0)[..., 0]
    expected = torch.zeros(5, 5)
    for row in range(-p, p + 1):
        for column in range(-p, p + 1):
            for start in (1, 3):  # as it is, or mirrored
                if 0 <= start + column < 5:
                    expected[2 + row, start + column] += 1 / (2 * 25)
    sigma = (expected * (1 - expected) / n).sqrt()
    assert ((out - expected).abs() <= 5 * sigma + 1e-9).all()


def test_images_of_a_batch_are_augmented_independently():
    x = torch.arange(25, dtype=torch.uint8).view(1, 5, 5, 1).expand(200, -1, -1, -1)
    out = random_crop_flip(x, 2, True, seeded("cpu", 0))
    assert len({image.numpy().tobytes() for image in out}) > 40  # of 50 possible


def test_batches_depend_on_seed_epoch_and_place_alone(digits):
    make = lambda seed=0: Loader(digits.x_train, digits.y_train, 100, train=True, padding=1, flip=True, seed=seed)
    whole, late = list(make().epoch(3)), list(make().epoch(3, start=9))
    assert len(whole) == 12 and all(torch.equal(a, c) and torch.equal(b, d) for (a, b), (c, d) in zip(whole[9:], late, strict=True))
    assert not torch.equal(next(make().epoch(4))[0], whole[0][0]) and not torch.equal(next(make(1).epoch(3))[0], whole[0][0])
    labels = torch.cat([y for _, y in whole])
    assert len(labels) == 1200 and (torch.bincount(labels) > 90).all()


def test_a_gpu_that_is_not_there():
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(RuntimeError, match="device is 'cuda' but this PyTorch .* sees no GPU"):
        pick_device("cuda")


def test_hash_sees_every_array():
    x, y = images(6, 4, 1), np.arange(6) % 2
    base = Dataset("a", x, y, x, y)
    assert base.sha256 == Dataset("b", x.copy(), y, x, y).sha256
    for key in ("x_train", "x_test"):
        assert base.sha256 != Dataset("a", **({"x_train": x, "y_train": y, "x_test": x, "y_test": y} | {key: 255 - x})).sha256
    assert base.sha256 != Dataset("a", x, y, x, y[::-1].copy()).sha256
