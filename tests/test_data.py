import hashlib
import http.client
import os
import pickle
import subprocess
import sys
import tarfile
import tracemalloc
import urllib.error
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import PIL.Image
import pytest
import scipy.io
import scipy.stats
import torch
import torchvision

import advdpnp
from advdpnp import data
from advdpnp.core import pick_device, replacing, seeded
from advdpnp.data import Dataset, Loader, Stream, at_most, averaged, hold_out, load_dataset, random_crop_flip

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


def killed(function):
    "Call `function`, which ends its process with status 9 and cleans nothing up, in a child; whether it did."
    child = os.fork()
    if child == 0:
        try:
            function()
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


def md5(path):
    return hashlib.md5(path.read_bytes()).hexdigest()


def no_network(*args, **kwargs):
    raise urllib.error.URLError("no route to host")


@pytest.fixture
def offline(monkeypatch):
    "torchvision finds no network."
    monkeypatch.setattr(torchvision.datasets.utils, "_urlretrieve", no_network)
    monkeypatch.setattr(torchvision.datasets.utils, "_get_redirect_url", no_network)


def published(folder, name, monkeypatch, n=60):
    "Write n training and n test images as the published files of a data set, and teach torchvision their md5."
    classes = 100 if name == "cifar100" else 10
    arrays = dict(x_train=images(n), y_train=np.arange(n) % classes, x_test=images(n), y_test=np.arange(n) % classes)
    x_train, y_train, x_test, y_test = arrays.values()
    folder.mkdir(exist_ok=True)
    if name == "svhn":
        split_list = dict(torchvision.datasets.SVHN.split_list)
        # .mat files hold HWCN and call the digit 0 "10"
        for split, x, y in (("train", x_train, y_train), ("test", x_test, y_test)):
            path = folder / f"{split}_32x32.mat"
            scipy.io.savemat(path, {"X": x.transpose(1, 2, 3, 0), "y": np.where(y == 0, 10, y)[:, None]})
            split_list[split] = [split_list[split][0], path.name, md5(path)]
        monkeypatch.setattr(torchvision.datasets.SVHN, "split_list", split_list)
        return arrays | dict(class_names=tuple("0123456789"))
    reader = {"cifar10": torchvision.datasets.CIFAR10, "cifar100": torchvision.datasets.CIFAR100}[name]
    base, key = folder / reader.base_folder, "fine_labels" if name == "cifar100" else "labels"
    base.mkdir()
    flat = lambda x: x.transpose(0, 3, 1, 2).reshape(len(x), -1)  # NCHW: all red, all green, all blue
    train, test = [file for file, _ in reader.train_list], reader.test_list[0][0]
    for file, x, y in [*zip(train, np.array_split(x_train, len(train)), np.array_split(y_train, len(train))),
                       (test, x_test, y_test)]:
        (base / file).write_bytes(pickle.dumps({"data": flat(x), key: y.tolist()}))
    names, meta = [f"class {k}" for k in range(classes)], reader.meta["filename"]
    (base / meta).write_bytes(pickle.dumps({reader.meta["key"]: names}))
    monkeypatch.setattr(reader, "train_list", [[file, md5(base / file)] for file in train])
    monkeypatch.setattr(reader, "test_list", [[test, md5(base / test)]])
    monkeypatch.setattr(reader, "meta", reader.meta | dict(md5=md5(base / meta)))
    return arrays | dict(class_names=tuple(names))


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "svhn"])
def test_published_files(tmp_path, monkeypatch, offline, name):
    arrays = published(tmp_path, name, monkeypatch)
    first = load_dataset(name, tmp_path)
    for key, value in arrays.items():
        assert np.array_equal(getattr(first, key), value)
    assert first.flip == (name != "svhn")
    monkeypatch.setattr(data, "official_arrays", lambda *a: pytest.fail("the archive was not used"))
    second = load_dataset(name, tmp_path)
    assert second.sha256 == first.sha256 and second.class_names == first.class_names
    x, y = Loader(second.x_train, second.y_train, 60).take(torch.arange(60))
    assert torch.equal(x, torch.from_numpy(arrays["x_train"]).permute(0, 3, 1, 2) / 255)
    assert y.tolist() == arrays["y_train"].tolist()


@pytest.mark.parametrize("name, file", [("cifar10", "cifar-10-batches-py/data_batch_3"),
                                        ("cifar10", "cifar-10-batches-py/batches.meta"),
                                        ("cifar100", "cifar-100-python/test"), ("svhn", "train_32x32.mat")])
@pytest.mark.parametrize("damage", ["missing", "truncated", "damaged"])
def test_a_bad_published_file_is_named(tmp_path, monkeypatch, offline, name, file, damage):
    published(tmp_path, name, monkeypatch)
    path = tmp_path / file
    whole, good = path.read_bytes(), md5(path)
    path.write_bytes(whole[:-1] if damage == "truncated" else whole[:30] + bytes([whole[30] ^ 1]) + whole[31:])
    says = f"{file} is damaged .md5 {md5(path)}, expected {good}."
    if damage == "missing":
        path.unlink()
        says = f"{file} is missing"
    with pytest.raises(OSError, match=f"{name} could not be downloaded.*put {name}.npz or the published files into "
                                      f"{tmp_path}, where now {says}$"):
        load_dataset(name, tmp_path)
    assert not list(tmp_path.glob("**/*.npz"))
    path.write_bytes(whole)
    assert len(load_dataset(name, tmp_path).x_train) == 60


def test_half_a_download_is_seen_and_fetched_again(tmp_path, monkeypatch):
    published(tmp_path / "server", "cifar10", monkeypatch)
    archive = tmp_path / "server/cifar-10-python.tar.gz"
    folder = tmp_path / "data"
    reader = torchvision.datasets.CIFAR10
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(tmp_path / "server" / reader.base_folder, reader.base_folder)
    monkeypatch.setattr(reader, "tgz_md5", md5(archive))
    monkeypatch.setattr(torchvision.datasets.utils, "_get_redirect_url", lambda url, **_: url)

    def stopping_at(part, error=None):
        def retrieve(url, path, **_):
            Path(path).write_bytes(archive.read_bytes()[:part])
            if error:
                raise error
        monkeypatch.setattr(torchvision.datasets.utils, "_urlretrieve", retrieve)

    stopping_at(1000)  # the server hangs up
    with pytest.raises(
        OSError, match="cifar10 could not be downloaded .File not found or corrupted.*data_batch_1 is missing"
    ):
        load_dataset("cifar10", folder)
    for error in (KeyboardInterrupt(), http.client.IncompleteRead(b"")):
        stopping_at(1000, error)
        with pytest.raises((KeyboardInterrupt, OSError)):
            load_dataset("cifar10", folder)
        assert [path.name for path in folder.iterdir()] == [archive.name]  # the half, and nothing made of it
    stopping_at(None)
    assert len(load_dataset("cifar10", folder).x_train) == 60


def test_an_interrupted_conversion_leaves_no_archive(tmp_path, monkeypatch, offline):
    arrays, savez = published(tmp_path, "svhn", monkeypatch), np.savez
    before = sorted(tmp_path.iterdir())

    def half(path, **arrays):
        savez(path, **arrays)
        path.write_bytes(path.read_bytes()[:1000])
        stop()

    monkeypatch.setattr(np, "savez", half)
    for error in (KeyboardInterrupt(), OSError(28, "No space left on device")):
        stop = Mock(side_effect=error)
        with pytest.raises(type(error)):
            load_dataset("svhn", tmp_path)
        assert sorted(tmp_path.iterdir()) == before
    stop = lambda: os._exit(9)
    assert killed(lambda: load_dataset("svhn", tmp_path))
    assert len(list(tmp_path.iterdir())) == len(before) + 1 and not (tmp_path / "svhn.npz").exists()
    with pytest.raises(ValueError, match="There are: digits, cifar10, cifar100, svhn$"):  # what was left is no data set
        load_dataset("svnh", tmp_path)
    monkeypatch.setattr(np, "savez", savez)
    assert np.array_equal(load_dataset("svhn", tmp_path).x_test, arrays["x_test"])


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


@pytest.mark.parametrize("damage", [lambda b: b[:-200], lambda b: b[:1000],
                                    lambda b: b[:5000] + bytes(50) + b[5050:], lambda b: b"", lambda b: b"no archive"])
def test_damaged_archive(archive, damage):
    path = archive[0] / "mine.npz"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match="mine.npz is damaged or not an .npz archive"):
        load_dataset("mine", path.parent)


@pytest.mark.parametrize("change, message", [
    (dict(x_train=None), "lacks x_train"),
    (dict(y_train=None, x_test=None, y_test=None), "lacks y_train, x_test, y_test: an archive holds x_train"),
    (dict(x_train=np.zeros((60, 32, 32, 3), np.float32)),
     "x_train is float32 .60, 32, 32, 3., expected uint8 .*: np.asarray.255 . x..round...astype.np.uint8. makes it so"),
    (dict(x_test=np.zeros((12, 32, 32), np.uint8)), "x_test is uint8 .* expected uint8"),
    (dict(x_test=np.zeros((12, 3, 32, 32), np.uint8)), r"x_test is \(12, 3, 32, 32\), which looks like \(N, C, H, W\)"),
    (dict(x_test=np.zeros((12, 16, 32, 3), np.uint8)), r"test images are \(16, 32, 3\), training images \(32, 32, 3\)"),
    (dict(x_test=np.zeros((0, 32, 32, 3), np.uint8), y_test=np.arange(0)), r"expected int64 \(0,\) and at least one"),
    (dict(y_train=np.arange(59) % 3), r"y_train is int64 \(59,\), expected int64 \(60,\)"),
    (dict(y_test=np.arange(12) / 3), r"y_test is float64 \(12,\), expected int64 \(12,\)"),
    (dict(y_test=np.array(["a", "b", "c"] * 4)), r"y_test is <U1 \(12,\), expected int64 \(12,\)"),
    (dict(y_test=np.full((12, 3), 1 / 3)), r"y_test is float64 \(12, 3\), expected int64 \(12,\)"),
    (dict(x_test=np.ones((12, 32, 32, 3), np.uint8)), "the largest value of x_test is 1: these look like images in"),
    (dict(y_test=np.arange(12) % 3 - 1), "labels from -1 to 2, expected 0 to 2"),
    (dict(y_train=np.arange(60) % 3 + 1, y_test=np.arange(12) % 3 + 1), "labels from 1 to 3: they count from 0, or"),
    (dict(y_train=np.arange(60) % 3 + 1, y_test=np.arange(12) % 3 + 1, class_names=["a", "b", "c"]),
     "labels from 1 to 3, expected 0 to 2: they count from 0, so subtract 1"),
    (dict(class_names=np.array(["a", "b"])), "labels from 0 to 2, expected 0 to 1"),
    (dict(class_names=np.array(["a", "b", "c"], object)), "mine.npz holds Python objects, which are not read"),
    (dict(mean=33.3, std=78.6), r"mean is \[33.3\] and std \[78.6\], expected 3 of each, of images in \[0, 1\]"),
    (dict(mean=np.full(3, 0.5)), "expected 3 of each"),
    (dict(mean=np.full(3, 0.5), std=np.array([0.2, 0.2, 0])), "expected 3 of each, of images in"),
])
def test_bad_archive(archive, change, message):
    folder, arrays = archive
    np.savez(folder / "mine.npz", **{k: v for k, v in (arrays | change).items() if v is not None})
    with pytest.raises(ValueError, match=message):
        load_dataset("mine", folder)


def test_an_archive_may_hold_more_or_less(archive):
    folder, arrays = archive
    more = dict(class_names=["a", "b", "c"], mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6), flip=False)
    np.savez(folder / "mine.npz", **arrays, **more)
    mine = load_dataset(folder / "mine.npz")
    assert (mine.class_names, mine.mean, mine.std, mine.flip) == (("a", "b", "c"), *list(more.values())[1:])
    np.savez(folder / "mine.npz", x_test=arrays["x_test"], y_test=arrays["y_test"])
    mine = load_dataset(f"{folder}/mine.npz")
    assert repr(mine) == "Dataset('mine': 0 training and 12 test images, 32x32x3, 3 classes)"
    np.testing.assert_allclose(mine.mean, (arrays["x_test"] / 255).mean((0, 1, 2)))
    with pytest.raises(ValueError, match="sume.npz is not there: expected an .npz archive with x_train"):
        load_dataset(folder / "sume.npz")


@pytest.fixture
def pets(tmp_path):
    "Two cats and a dog as grey pictures in folders, and their pixels."
    x = images(3, 8, 1)
    for name, image in zip(("cat/1.png", "cat/2.png", "dog/3.png"), x):
        path = tmp_path / "pets" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        PIL.Image.fromarray(image.squeeze()).save(path)
    return tmp_path / "pets", x


def test_pictures_in_folders(pets, monkeypatch):
    folder, x = pets
    grey = load_dataset(folder)
    assert (grey.name, grey.class_names, grey.y_test.tolist(), grey.flip) == ("pets", ("cat", "dog"), [0, 0, 1], True)
    assert np.array_equal(grey.x_test, x) and grey.x_train.shape == (0, 8, 8, 1)
    (folder / "10").mkdir(), (folder / "2").mkdir()  # classes without a picture
    assert load_dataset(f"{folder}/").class_names == ("10", "2", "cat", "dog")
    PIL.Image.fromarray(images(1, 8)[0]).save(folder / "dog/4.png")  # one in colour
    assert np.array_equal(load_dataset(folder).x_test[:3], x.repeat(3, axis=3))
    monkeypatch.chdir(folder.parent)
    with pytest.raises(ValueError, match="pets is a folder: with a slash, pets/, its images are read"):
        load_dataset("pets")


@pytest.mark.parametrize("name, content, message", [
    ("dog/4.png", np.zeros((2, 8), np.uint8), "images of 2 sizes: 8x8 .3, such as .*cat/1.png., 8x2 .1, such as "
     ".*dog/4.png.: expected one size, so resize or crop all to one"),
    ("dog/4.png", np.zeros((8, 8), np.uint16), "4.png has more than 8 bits a channel .mode I;16.: expected 8"),
    ("dog/4.png", b"half a picture", "4.png is damaged or no image"),
])
def test_a_bad_picture_is_named(pets, name, content, message):
    path = pets[0] / name
    path.write_bytes(content) if isinstance(content, bytes) else PIL.Image.fromarray(content).save(path)
    with pytest.raises(ValueError, match=message):
        load_dataset(pets[0])


def test_a_folder_without_pictures(tmp_path):
    with pytest.raises(ValueError, match="nothing is no folder of images: expected one sub-folder a class"):
        load_dataset(tmp_path / "nothing")
    (tmp_path / "cat").mkdir()
    with pytest.raises(ValueError, match="is no folder of images: there are none in its sub-folders"):
        load_dataset(tmp_path)


def test_a_killed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "x.npz"
    path.write_bytes(b"old")

    def write_half():
        with replacing(path) as part:
            part.write_bytes(b"half")
            os._exit(9)

    assert killed(write_half)
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


def part(dataset, kept):
    return replace(dataset, x_train=dataset.x_train[kept], y_train=dataset.y_train[kept])


@pytest.mark.parametrize("kept, size, message", [
    (slice(None), 1297, "cannot hold 1297 of 1297 images out: expected 10 to 1287"),
    (slice(None), 9, "cannot hold 9 of 1297 images out: expected 10 to 1287"),
    (slice(0), None, "digits has no training images"),
    (slice(19), None, "digits has 19 training images: expected at least two of each of 10 classes"),
    ("all but one 3", None, "class 3 of digits has 1 training image: expected at least 2, one to hold out"),
])
def test_too_few_to_hold_out(digits, kept, size, message):
    if kept == "all but one 3":
        kept = np.sort(np.append(np.where(digits.y_train != 3)[0], np.where(digits.y_train == 3)[0][0]))
    with pytest.raises(ValueError, match=message):
        hold_out(part(digits, kept), size)


def test_one_of_each_class_is_held_out_where_a_tenth_is_less(digits):
    held = hold_out(part(digits, slice(60)))
    assert len(held.x_test) == 10 and len(hold_out(digits).x_test) == 129


def fingerprint(*tensors):
    "The first digits of a hash of what tensors or arrays hold."
    return data.hash_of(*map(np.asarray, tensors))[:12]


def test_splits_and_subsets_are_those_of_earlier_versions(digits):
    "Numbers in records are about these images, so they must never change."
    assert digits.sha256.startswith("30e8ab77f5ec9427")
    assert hold_out(digits).sha256.startswith("a32b4957e117")
    assert hold_out(digits, 200, seed=1).sha256.startswith("93ed76467621")
    assert at_most(digits, train=300).sha256.startswith("750ad48be913")
    assert at_most(digits, 300, seed=1).sha256.startswith("0cfe3c457e9f")
    assert at_most(digits, test=50).sha256.startswith("29edb51ecc9c")
    assert averaged(digits, 4).sha256.startswith("8e8174addb3a")


def test_batches_are_those_of_earlier_versions(digits):
    "A run that began with an earlier version goes on with the same images."
    loader = Loader(digits.x_train, digits.y_train, 500, train=True, padding=1, flip=True, seed=5)
    (x, y), (last, _) = [*loader.epoch(0)][0], [*loader.epoch(3, start=1)][0]
    assert [fingerprint(x, y), fingerprint(last)] == ["e57d1cd01797", "e0652abf7817"]
    crops = random_crop_flip(torch.from_numpy(digits.x_train), 2, True, seeded("cpu", 1, 2))
    assert fingerprint(crops) == "702075584f91"
    pictures = torch.utils.data.TensorDataset(torch.from_numpy(digits.x_test).permute(0, 3, 1, 2),
                                              torch.from_numpy(digits.y_test))
    stream = Stream(torch.utils.data.DataLoader(pictures, 100, shuffle=True), seed=4)
    assert fingerprint(*next(stream.epoch(3, start=2))) == "102c26cf472f"


def test_crops_are_uniform_flips_are_half_and_each_image_has_its_own():
    n, p = 100_000, 2
    places = [(row, column, flip) for row in range(2 * p + 1) for column in range(2 * p + 1) for flip in (False, True)]
    x = np.arange(1, 26, dtype=np.uint8).reshape(5, 5)  # every crop of it tells its offsets and its side
    crops = {}
    for i, (row, column, flip) in enumerate(places):
        crop = np.pad(x, p)[row : row + 5, column : column + 5]
        crops[(crop[:, ::-1] if flip else crop).tobytes()] = i
    assert len(crops) == 50
    out = random_crop_flip(torch.from_numpy(x)[..., None].expand(n, 5, 5, 1), p, True, seeded("cpu", 0))
    drawn = np.array([crops[image.tobytes()] for image in out.numpy()])
    assert scipy.stats.chisquare(np.bincount(drawn, minlength=50)).pvalue > 0.001
    assert scipy.stats.binomtest(int((drawn % 2).sum()), n).pvalue > 0.001
    # neighbours in a batch know nothing of each other
    pairs = np.bincount(50 * drawn[::2] + drawn[1::2], minlength=2500)
    assert scipy.stats.chisquare(pairs).pvalue > 0.001
    content = random_crop_flip(torch.arange(100, dtype=torch.uint8).view(100, 1, 1, 1).expand(100, 5, 5, 1), p, True,
                               seeded("cpu", 0))
    assert torch.equal(content.amax((1, 2, 3)), torch.arange(100, dtype=torch.uint8))  # every image is still itself


def test_batches_depend_on_seed_epoch_and_place_alone(digits):
    make = lambda seed=0: Loader(digits.x_train, digits.y_train, 100, train=True, padding=1, flip=True, seed=seed)
    whole, late = list(make().epoch(3)), list(make().epoch(3, start=9))
    assert len(whole) == 12
    assert all(torch.equal(a, c) and torch.equal(b, d) for (a, b), (c, d) in zip(whole[9:], late, strict=True))
    assert not torch.equal(next(make().epoch(4))[0], whole[0][0])
    assert not torch.equal(next(make(1).epoch(3))[0], whole[0][0])
    labels = torch.cat([y for _, y in whole])
    assert len(labels) == 1200 and (torch.bincount(labels) > 90).all()


class Longer(list):
    "Says that it holds two batches, however many there are."
    __len__ = lambda self: 2


X, Y = torch.rand(4, 1, 8, 8), torch.arange(4)


@pytest.mark.parametrize("batches, message", [
    (Longer([(X, Y)] * 3), "the stream goes on after 2 batches, which is its length: expected an epoch"),
    (Longer([]), "the stream ended after 0 batches, its length is 2"),
    (Longer([(X, Y)]), "the stream ended after 1 batches, its length is 2"),
    ([(2 + X.round(), Y)], r"is torch.float32 \(4, 1, 8, 8\) from 2 to 3, expected \(B, C, H, W\), uint8 or floats"),
    ([(X - 0.5, Y)], "normalise inside the model"),
    ([(X[0], Y)], r"is torch.float32 \(1, 8, 8\)"),
    ([((255 * X).long(), Y)], "is torch.int64"),
    ([(X, Y), (X + 1, Y)], "normalise inside the model"),
    ([(X, Y), (X * torch.nan, Y)], "normalise inside the model"),
    ([(X, Y.float())], r"labels of a batch of the stream are torch.float32 \(4,\): expected whole numbers"),
    ([(X, torch.eye(4).long())], "expected whole numbers, one for each of 4 images"),
    ([dict(image=X, label=Y)], "is a dict of image, label: expected a pair of tensors"),
    ([(X, Y, Y)], "is a tuple of Tensor, Tensor, Tensor: expected a pair"),
    ([(X.numpy(), Y.numpy())], "is a tuple of ndarray, ndarray: expected a pair"),
    (iter([(X, Y)]), "the stream has no length"),
])
def test_a_bad_stream(batches, message):
    with pytest.raises(ValueError, match=message):
        list(Stream(batches).epoch())


def test_a_stream_tells_its_sampler_the_epoch_and_seeds_the_generator():
    class Batches(list):
        sampler = Mock()

    stream = Stream(Batches([(X, Y), ((255 * X).to(torch.uint8), Y.int())]))
    torch.manual_seed(0)
    before = torch.get_rng_state()
    _, (x, y) = stream.epoch(3)
    assert torch.equal(torch.get_rng_state(), before)  # without a seed the generator is left alone
    assert (x.dtype, y.dtype, float(x.max()) <= 1) == (torch.float32, torch.int64, True)
    stream.batches.sampler.set_epoch.assert_called_once_with(3)
    stream.seed = 0
    drawn = [torch.rand(1).item() for _ in range(2) for _ in stream.epoch(3)]
    assert drawn[:2] == drawn[2:] and drawn[0] != drawn[1]


def test_importing_loads_no_scikit_learn():
    code = "import sys, advdpnp.prototypes, advdpnp.data; sys.exit('sklearn' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_gpu_that_is_not_there():
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(RuntimeError, match="device is 'cuda' but this PyTorch .* sees no GPU"):
        pick_device("cuda")


def test_a_view_with_channels_reversed_is_read_as_it_looks():
    x, y = images(6, 4), np.arange(6)
    reversed_, copied = (Loader(a, y, 6).take(torch.arange(6))[0] for a in (x[..., ::-1], x[..., ::-1].copy()))
    assert torch.equal(reversed_, copied)


def test_hash_sees_every_array():
    x, y = images(6, 4, 1), np.arange(6) % 2
    base = Dataset("a", x, y, x, y)
    assert base.sha256 == Dataset("b", x.copy(), y, x, y).sha256
    for key in ("x_train", "x_test"):
        assert base.sha256 != Dataset("a", **({"x_train": x, "y_train": y, "x_test": x,
                                               "y_test": y} | {key: 255 - x})).sha256
    assert base.sha256 != Dataset("a", x, y, x, y[::-1].copy()).sha256


def test_averaged_images_are_the_rounded_means_of_squares():
    x, y = images(40), np.arange(40) % 4
    small = averaged(Dataset("svhn", x, y, x[:5], y[:5], mean=(0, 0, 0), std=(1, 1, 1)), 8)
    exact = x.reshape(40, 8, 4, 8, 4, 3).mean((2, 4))
    assert (small.x_train.dtype, small.x_train.shape, small.x_test.shape) == (np.uint8, (40, 8, 8, 3), (5, 8, 8, 3))
    assert np.abs(small.x_train - exact).max() <= 0.5 and np.array_equal(small.x_train[:5], small.x_test)
    np.testing.assert_allclose(small.mean, (small.x_train / 255).mean((0, 1, 2)))  # measured anew
    assert (small.name, small.flip, averaged(small, 8)) == ("svhn-8px", False, small)
    assert averaged(Dataset("mine", np.full_like(x, 255), y, x, y), 1).x_train.min() == 255  # nothing overflows


@pytest.mark.parametrize("side", [0, -8, 5, 64])
def test_a_side_that_does_not_divide(side):
    x, y = images(4), np.arange(4)
    with pytest.raises(
        ValueError,
        match=f"mine, 32x32, to {side}x{side}: expected square images and one of the sides 1, 2, 4, 8, 16, 32",
    ):
        averaged(Dataset("mine", x, y, x, y), side)
    with pytest.raises(ValueError, match="mine, 32x16, to 8x8: expected square images"):
        averaged(Dataset("mine", x[:, :, :16], y, x[:, :, :16], y), 8)


def test_subsets_are_stratified_nested_and_fixed():
    y = np.repeat([0, 1, 2], [700, 250, 50])  # classes of different sizes
    x = np.arange(1000, dtype=np.uint32).view(np.uint8).reshape(1000, 1, 1, 4)[..., :3]  # an image is its number
    whole, before = Dataset("mine", x, y, x, y), set()
    for size in (3, 10, 99, 500, 1000):
        part = at_most(whole, train=size)
        numbers = {image.tobytes() for image in part.x_train}
        assert len(numbers) == size and before <= numbers
        assert np.abs(np.bincount(part.y_train, minlength=3) - size * np.array([0.7, 0.25, 0.05])).max() <= 1
        assert at_most(part, train=size).sha256 == part.sha256 == at_most(whole, train=size).sha256
        before = numbers
    assert at_most(whole, train=99, seed=1).sha256 != at_most(whole, train=99).sha256
    part, more = at_most(whole, test=7), at_most(whole, test=40)
    assert {i.tobytes() for i in part.x_test} <= {i.tobytes() for i in more.x_test} and len(part.x_test) == 7
    assert np.bincount(more.y_test).tolist() == [28, 10, 2] and more.notes == ()
    assert part.num_classes == 3 and part.x_train is x
    assert part.notes == ("The 7 of 1000 test images that are used have none of class 2.",)
    for size in (dict(train=2), dict(train=-5), dict(test=0)):
        with pytest.raises(ValueError, match="cannot keep .* images of mine: expected . or more, or None for all"):
            at_most(whole, **size)


def train_on(dataset, method):
    "An epoch of a few batches, and its validation; whether every parameter of the network has moved."
    from advdpnp.methods import make_net

    kind = advdpnp.METHODS[method]
    torch.manual_seed(0)
    net = make_net(method, "cifar_resnet8", dataset.num_classes, dataset.mean, dataset.std)
    before = {name: value.clone() for name, value in net.named_parameters()}
    few = at_most(dataset, train=2 * dataset.num_classes + 32)
    trainer = advdpnp.Trainer(net, kind(**(dict(eps=8 / 255, steps=2) if kind.adversarial else {})), few, epochs=1,
                              batch_size=32, val_size=dataset.num_classes, val_attack=advdpnp.FGSM(8 / 255),
                              device="cpu", quiet=True)
    assert trainer.fit() and np.isfinite(list(trainer.history[0].values())).all()
    return [name for name, value in net.named_parameters() if torch.equal(value, before[name])] == []


@pytest.mark.parametrize("name, shapes, mean", [
    ("cifar10", (50_000, 10_000), (0.4914, 0.4822, 0.4465)),
    ("cifar100", (50_000, 10_000), (0.5071, 0.4865, 0.4409)),
    ("svhn10k", (8_001, 1_999), None),
])
def test_real_data(packed, name, shapes, mean):
    dataset = load_dataset(name, packed(name))
    assert (len(dataset.x_train), len(dataset.x_test)) == shapes and dataset.x_train.shape[1:] == (32, 32, 3)
    assert dataset.num_classes == (100 if name == "cifar100" else 10) and dataset.flip == (name != "svhn10k")
    if mean:
        np.testing.assert_allclose(dataset.mean, mean, atol=1e-4)
        assert (np.bincount(dataset.y_train) == 50_000 // dataset.num_classes).all()
    small = at_most(averaged(dataset, 16), train=1000)
    assert small.x_train.shape == (1000, 16, 16, 3) and small.flip == dataset.flip
    for method in advdpnp.METHODS:
        assert train_on(dataset, method), method


def test_real_published_files(packed, monkeypatch, offline):
    folder = packed("cifar100-official")
    assert data.wrong_files("cifar100", folder) == []  # the md5 are those of the published files
    published, archive = load_dataset("cifar100", folder), load_dataset("cifar100", packed("cifar100"))
    assert published.sha256 == archive.sha256 and published.class_names[:3] == ("apple", "aquarium_fish", "baby")


def test_a_data_set_takes_little_more_memory_than_its_arrays(digits):
    hold_out(digits)  # loads scikit-learn, which is not to be counted
    n = 200_000
    x, y = RNG.integers(0, 256, (n, 8, 8, 1), dtype=np.uint8), np.arange(n) % 10
    whole = Dataset("mine", x, y, x[:1000], y[:1000])
    for make in (lambda: Dataset("mine", x, y, x[:1000], y[:1000]), lambda: Dataset("mine", x, y, x, y),
                 lambda: Dataset("mine", torch.from_numpy(x).permute(0, 3, 1, 2), torch.from_numpy(y), x, y),
                 lambda: hold_out(whole, 1000), lambda: at_most(whole, train=150_000, test=100),
                 lambda: averaged(whole, 4)):
        tracemalloc.start()
        made = make()
        made.sha256
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        held = [a for a in (made.x_train, made.y_train, made.x_test, made.y_test)]
        new = sum(a.nbytes for a in held if not any(np.shares_memory(a, b) for b in (x, y)))
        assert peak < new + 0.1 * sum(a.nbytes for a in held)


@pytest.mark.parametrize("labels", [
    lambda y: y.tolist(), lambda y: tuple(y.tolist()), torch.from_numpy, lambda y: torch.from_numpy(y).int(),
    lambda y: [torch.tensor(k) for k in y], lambda y: y.astype(np.int32), lambda y: y.astype(np.uint8),
    lambda y: y.astype(np.float32), lambda y: np.eye(3)[y], lambda y: torch.eye(3, dtype=torch.int64)[y],
    lambda y: y[:, None],
])
def test_labels_of_any_kind(labels):
    x, y = images(6, 8), np.arange(6) % 3
    mine = Dataset("mine", x, labels(y), x, labels(y))
    assert mine.y_train.dtype == np.int64 and mine.sha256 == Dataset("mine", x, y, x, y).sha256


@pytest.mark.parametrize("given", [torch.from_numpy, lambda x: torch.from_numpy(x).permute(0, 3, 1, 2), list,
                                   lambda x: x.tolist() and [torch.from_numpy(image) for image in x]])
def test_images_of_any_kind(given):
    x, y = images(6, 8), np.arange(6) % 3
    assert Dataset("mine", given(x), y, given(x), y).sha256 == Dataset("mine", x, y, x, y).sha256


def test_ragged_lists_are_refused():
    x = images(4, 8)
    with pytest.raises(ValueError, match="labels are no array"):
        Dataset("mine", x, [[0, 1], [1], [0], [1]], x, [0, 1, 0, 1])
    with pytest.raises(ValueError, match="images are no array"):
        Dataset("mine", [x[0], x[1, :4]], [0, 1], x, [0, 1, 0, 1])


def test_a_stream_takes_what_rounding_does():
    (x, _), = Stream([(X * (1 + 2e-6) - 1e-6, Y)]).epoch()
    assert x.min() >= 0 and x.max() <= 1


def test_an_archive_that_is_one_array_and_labels_that_are_no_classes_get_a_sentence(tmp_path):
    np.save(tmp_path / "x.npy", np.zeros(3))
    (tmp_path / "x.npy").rename(tmp_path / "x.npz")
    with pytest.raises(ValueError, match="x.npz is damaged or not an .npz archive .it holds one array."):
        load_dataset("x", tmp_path)
    x, y = np.zeros((4, 8, 8, 1), np.uint8), np.array([0, 1, 2, 10**9])
    np.savez(tmp_path / "y.npz", x_train=x, y_train=y, x_test=x, y_test=y)
    with pytest.raises(ValueError, match="labels from 0 to 1000000000: expected numbers of classes"):
        load_dataset("y", tmp_path)


def test_a_rare_class_is_on_both_sides_of_a_split():
    y = np.zeros(1000, np.int64)
    y[:2] = 1
    x = np.arange(1000, dtype=np.uint16).view(np.uint8).reshape(1000, 1, 2, 1)
    held = hold_out(Dataset("mine", x, y, x[-2:], y[:2]))
    assert np.bincount(held.y_test).tolist() == [99, 1] and np.bincount(held.y_train).tolist() == [899, 1]
    assert len({image.tobytes() for image in [*held.x_train, *held.x_test]}) == 1000


def test_an_archive_that_does_not_fit_into_memory_is_not_called_damaged(archive, monkeypatch):
    folder, arrays = archive
    np.savez(folder / "mine.npz", **arrays)

    def full(file):
        raise MemoryError("Unable to allocate 170. GiB")

    monkeypatch.setattr(np, "load", full)
    with pytest.raises(ValueError, match="does not fit into memory, or is damaged"):
        load_dataset("mine", folder)
