"Folders of pictures as people have them: every file is read, or named with the reason why not."
import io
import os
import struct
import zlib

import numpy as np
import PIL.Image
import pytest

from advdpnp.data import load_dataset, read_folder

RNG = np.random.default_rng(0)


def picture(*shape):
    "A random picture."
    return PIL.Image.fromarray(RNG.integers(0, 256, shape or (8, 8, 3), dtype=np.uint8))


def fill(root, *names, make=picture):
    "Files in folders, each a picture."
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        make().save(root / name, format="PNG")
    return root


@pytest.fixture
def pets(tmp_path):
    return fill(tmp_path / "pets", "cat/0.png", "cat/1.png", "dog/0.png")


def png(width, height, bits, colour, data=b""):
    "A PNG file, from its header."
    chunk = lambda kind, body: struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0))
            + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b""))


def saved(image, kind, **how):
    file = io.BytesIO()
    image.save(file, kind, **how)
    return file.getvalue()


def test_every_file_is_read_or_named(pets):
    fill(pets, ".ipynb_checkpoints/0.png", "__MACOSX/._0.png", "cat/.hidden/0.png", "cat/deeper/2.PNG", "dog/1.image",
         "dog/bare")
    for name in ("notes.txt", "Thumbs.db", "cat/.DS_Store", "cat/labels.csv", "dog/clip.mp4"):
        (pets / name).write_bytes(b"words")
    os.symlink(pets, pets / "cat/loop")
    (pets / "empty").mkdir()
    os.mkfifo(pets / "dog/pipe")
    read = load_dataset(f"{pets}/")
    assert read.class_names == ("cat", "dog", "empty") and np.bincount(read.y_test, minlength=3).tolist() == [3, 3, 0]
    assert read.about[0] == "pets, classes and their test images: 0 = cat (3), 1 = dog (3), 2 = empty (0)"
    said = " ".join(read.notes)
    assert "Classes without an image: empty." in said
    for name in (".ipynb_checkpoints/ (1 files)", "__MACOSX/ (1 files)", "Thumbs.db", "notes.txt", "cat/.DS_Store",
                 "cat/.hidden/ (1 files)", "cat/labels.csv", "dog/clip.mp4", "cat/loop", "dog/pipe"):
        assert name in said
    assert all(note in repr(read) for note in read.notes)


@pytest.mark.parametrize("names, order", [
    (["10", "2", "0"], ["0", "2", "10"]),
    (["00", "01", "10"], ["00", "01", "10"]),
    (["-1", "1", "0"], ["-1", "0", "1"]),
    (["10", "2", "cat"], ["10", "2", "cat"]),
    (["b", "C", "a"], ["C", "a", "b"]),
    (["class10", "class2"], ["class10", "class2"]),
])
def test_classes_are_in_order(tmp_path, names, order):
    fill(tmp_path / "x", *(f"{name}/0.png" for name in names))
    assert read_folder(tmp_path / "x").class_names == tuple(order)


def test_links_at_the_top(pets):
    os.symlink("..", pets / "up")
    os.symlink("nothing", pets / "nowhere")
    os.symlink(pets / "cat", pets / "kitten")  # a class that lies elsewhere is one
    read = read_folder(pets)
    assert read.class_names == ("cat", "dog", "kitten") and read.y_test.tolist() == [0, 0, 1, 2, 2]
    assert read.notes == ("Left out, a link to nothing: nowhere.",
                          "Left out, a link back to a folder that it lies in: up.")


@pytest.mark.parametrize("names, said", [(["1", "2", "3"], "folder 1 is class 0, folder 2 is class 1"),
                                         (["0", "1", "3"], "gap: folder 3 is class 2 ("), (["0", "1"], ""),
                                         (["10", "2", "cat"], "")])
def test_numbers_with_a_gap_are_said(tmp_path, names, said):
    notes = read_folder(fill(tmp_path / "x", *(f"{name}/0.png" for name in names))).notes
    assert said in " ".join(notes) and bool(notes) == bool(said)


@pytest.mark.parametrize("two", [("1", "01"), ("Cat", "cat"), ("caf\u00e9", "cafe\u0301")])
def test_two_folders_of_one_class(tmp_path, two):
    with pytest.raises(ValueError, match="would be one class: expected one folder a class"):
        read_folder(fill(tmp_path / "x", *(f"{name}/0.png" for name in two)))


@pytest.mark.parametrize("train, test", [("train", "test"), ("Training", "Testing"), ("train", "val"),
                                         ("train", "valid"), ("train", "validation")])
def test_two_splits_are_a_data_set_to_train_on(tmp_path, train, test):
    fill(tmp_path / "pets", *(f"{train}/{name}/{i}.png" for name in ("cat", "dog") for i in range(3)),
         f"{test}/dog/0.png")
    (tmp_path / "pets" / test / "cat").mkdir()
    read = load_dataset(tmp_path / "pets")
    assert (read.name, read.class_names, read.y_train.tolist(), read.y_test.tolist()) == (
        "pets", ("cat", "dog"), [0, 0, 0, 1, 1, 1], [1])
    assert read.about[0] == "pets, classes and their training + test images: 0 = cat (3 + 0), 1 = dog (3 + 1)"
    assert read.notes == ((f"{test} is tested on: there is no test.",) if test[0] == "v" else ())


def test_of_three_splits_one_is_named_as_not_used(tmp_path):
    read = read_folder(fill(tmp_path / "pets", *(f"{split}/{name}/0.png" for split in ("train", "val", "test", "extra")
                                                 for name in ("cat", "dog"))))
    assert (len(read.y_train), len(read.y_test)) == (2, 2)
    assert any("val/ (2 files)" in note and "test is tested on" in note for note in read.notes)
    assert any("extra/ (2 files)" in note and "beside train and test" in note for note in read.notes)


def test_a_class_may_be_called_train(tmp_path):
    assert read_folder(fill(tmp_path / "x", "bus/0.png", "test/0.png", "train/0.png")).class_names == (
        "bus", "test", "train")


@pytest.mark.parametrize("names, message", [
    (["train/cat/0.png", "train/dog/0.png", "test/cat/0.png"], "dog is in train alone: expected the same classes"),
    (["train/cat/0.png", "test/Cat/0.png"], "Cat is in test alone, cat is in train alone"),
    (["train/cat/0.png", "val/cat/0.png", "valid/cat/0.png"], "holds val and valid: expected one of them"),
    (["train/cat/0.png", "train/dog/0.png"], "holds train and nothing to test on"),
    (["train/0.png", "test/0.png"], "test and train hold no folders: expected one folder a class in each"),
    (["train/cat/0.png", "train/dog/0.png", "test/0.png"], "test holds 1 images and no folders: expected one folder"),
    (["0.png", "1.png"], "holds 2 images and no folders: expected one folder a class, such as .*cat/[01].png"),
    (["pets/cat/0.png", "pets/dog/0.png"], "pets hold the folders cat, dog: expected one folder a class"),
    (["seg_train/cat/0.png", "seg_train/dog/0.png", "seg_test/cat/0.png", "seg_test/dog/0.png"],
     "seg_test, seg_train hold the folders cat, dog: expected one folder a class, or train and test"),
])
def test_a_layout_that_cannot_be_right(tmp_path, names, message):
    with pytest.raises(ValueError, match=message):
        read_folder(fill(tmp_path / "x", *names))


DEEP = RNG.integers(0, 65536, (8, 8, 3)).astype(">u2")
ROWS = b"".join(b"\0" + row.tobytes() for row in DEEP)
GIF = saved(picture(), "GIF", save_all=True, append_images=[picture()])


@pytest.mark.parametrize("name, content, message", [
    ("x.png", png(8, 8, 16, 2, ROWS), "more than 8 bits a channel"),
    ("x.png", png(8, 8, 16, 0, ROWS), "more than 8 bits a channel"),
    ("x.ppm", b"P6 8 8 65535\n" + DEEP.tobytes(), "more than 8 bits a channel"),
    ("x.tif", saved(PIL.Image.fromarray(DEEP[..., 0].astype(np.uint16)), "TIFF"), "more than 8 bits a channel"),
    ("x.tif", saved(PIL.Image.fromarray(DEEP[..., 0].astype(np.float32)), "TIFF"), "more than 8 bits a channel"),
    ("x.png", png(20_000, 20_000, 8, 2), "too large a picture to be unpacked"),
    ("x.png", png(10_000, 10_000, 8, 2), "too large a picture to be unpacked"),
    ("x", png(20_000, 20_000, 8, 2), "too large a picture to be unpacked"),
    ("x.jpg", saved(picture(64, 64, 3), "JPEG")[:900], "damaged or no image"),
    ("x.png", png(8, 8, 8, 2, ROWS[:9]), "damaged or no image"),
    ("x.png", b"", "damaged or no image"),
    ("x.JPEG", b"words", "damaged or no image"),
    ("x.gif", GIF, "holds 2 pictures: expected one"),
    ("x.webp", saved(picture(), "WEBP", save_all=True, append_images=[picture()]), "holds 2 pictures: expected one"),
])
def test_a_picture_that_cannot_be_used_is_named(tmp_path, name, content, message):
    (tmp_path / "pets/cat").mkdir(parents=True)
    (tmp_path / "pets/cat" / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"pets/cat/{name} .*{message}"):
        read_folder(tmp_path / "pets")


def test_a_link_to_nothing_is_named(pets):
    os.symlink("nothing", pets / "cat/2.png")
    os.symlink("3.png", pets / "cat/3.png")
    with pytest.raises(ValueError, match="cat/2.png is damaged or no image"):
        read_folder(pets)


def read_one(tmp_path, image, name="x.png", **how):
    "A picture, saved and read."
    (tmp_path / "x/one").mkdir(parents=True)
    image.save(tmp_path / "x/one" / name, **how)
    return read_folder(tmp_path / "x")


@pytest.mark.parametrize("mode, channels", [("1", 1), ("L", 1), ("LA", 1), ("P", 3), ("RGB", 3), ("RGBA", 3)])
def test_kinds_of_pictures(tmp_path, mode, channels):
    image = picture().convert(mode)
    read = read_one(tmp_path, image)
    assert np.array_equal(read.x_test[0], np.asarray(image.convert("L" if channels == 1 else "RGB")).reshape(8, 8, -1))
    assert read.notes == ()


def test_cmyk_becomes_rgb(tmp_path):
    image = PIL.Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    assert np.abs(read_one(tmp_path, image, "x.tif").x_test[0, 0, 0].astype(int) - [255, 0, 0]).max() < 3


def test_transparent_pixels_are_said(tmp_path):
    image = PIL.Image.new("RGBA", (8, 8), (10, 20, 30, 0))
    read = read_one(tmp_path, image)
    assert read.x_test[0, 0, 0].tolist() == [10, 20, 30] and "1 pictures have transparent pixels" in read.notes[0]


def test_a_palette_with_transparency(tmp_path):
    image = picture().convert("P")
    read = read_one(tmp_path, image, transparency=bytes([0] * 256))
    assert np.array_equal(read.x_test[0], np.asarray(image.convert("RGB"))) and "transparent" in read.notes[0]


def test_a_picture_is_turned_as_its_exif_says(tmp_path):
    image, exif = picture(4, 8, 3), PIL.Image.Exif()
    exif[0x0112] = 6  # the camera was held upright
    read = read_one(tmp_path, image, exif=exif)
    assert np.array_equal(read.x_test[0], np.rot90(np.asarray(image), -1)) and "1 pictures were turned" in read.notes[0]
    read = read_one(tmp_path / "tiff", image, "x.tif", exif=exif)
    assert np.array_equal(read.x_test[0], np.rot90(np.asarray(image), -1))


def test_sizes_are_counted(pets):
    fill(pets, "dog/1.png", "dog/2.png", make=lambda: picture(8, 9, 3))
    with pytest.raises(ValueError, match="images of 2 sizes: 8x8 .3, such as .*cat/0.png., 9x8 .2, such as .*1.png.: "
                                         "expected one size, so resize or crop"):
        read_folder(pets)


def test_of_many_classes_some_are_listed(tmp_path):
    line, = read_folder(fill(tmp_path / "x", *(f"c{k}/0.png" for k in range(100, 200)))).about
    assert line.count("(1)") == 40 and "0 = c100 (1)" in line and "99 = c199 (1)" in line
