"Corruptions against the package imagecorruptions at our parameters, on photographs; files, interruptions, accuracy."
import ast
import functools
import hashlib
import inspect
import warnings
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import scipy.stats
import torch
from sklearn.datasets import load_sample_images
from torch import nn

from advdpnp import corruptions
from advdpnp.corruptions import PUBLISHED, SEVERITIES, STANDARD, clouds, corrupt, corrupted_images, corruption_accuracy
from advdpnp.corruptions import enlarge, smear
from advdpnp.data import Dataset, averaged, load_dataset

RNG = np.random.default_rng(0)
FIVE = range(1, 6)
FIXED = ("brightness", "contrast", "saturate", "gaussian_blur", "defocus_blur", "zoom_blur",
         "jpeg_compression", "pixelate")
DRAWN = ("gaussian_noise", "shot_noise", "impulse_noise", "speckle_noise", "glass_blur", "motion_blur", "snow",
         "fog", "spatter")


@pytest.fixture(scope="session")
def photos():
    "32-pixel pieces of scikit-learn's two photographs."
    pieces = []
    for image in load_sample_images().images:
        h, w = (side // 8 * 8 for side in image.shape[:2])
        small = image[:h, :w].reshape(h // 8, 8, w // 8, 8, 3).mean((1, 3))
        pieces += [small[i : i + 32, j : j + 32] for i in range(0, h // 8 - 31, 20) for j in range(0, w // 8 - 31, 16)]
    return np.stack(pieces).round().astype(np.uint8)


def in_pieces(n, shape, num_classes=10, name="mine"):
    "A data set of n random test images, and a few to train on."
    x, y = RNG.integers(0, 256, (n, *shape), dtype=np.uint8), np.arange(n) % num_classes
    return Dataset(name, x[:num_classes], y[:num_classes], x, y)


def ours(name, x, severity, seed):
    "One image, from the draws of `seed`, and cut off to whole numbers."
    found = getattr(corruptions, name)(x[None] / 255, SEVERITIES[name][severity - 1], np.random.RandomState(seed))[0]
    return (found.clip(0, 1) * 255 + 1e-6).astype(np.uint8)


@pytest.fixture(scope="session")
def oracle():
    return pytest.importorskip("imagecorruptions.corruptions")


def parameters(function):
    "The node that gives a corruption of the oracle its parameters: c = [...][severity - 1]."
    tree = ast.parse(inspect.getsource(function))
    return tree, next(
        node for node in ast.walk(tree) if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "c"
    )


@pytest.fixture(scope="session")
def theirs(oracle):
    "The oracle's corruptions, set to our parameters: theirs(name, image, severity)."

    def trimmed(image, zoom):  # the recipe for CIFAR keeps the middle; the oracle keeps a corner, or all
        big, h = oracle.clipped_zoom(image, zoom), image.shape[0]
        over = (len(big) - h) // 2
        return big[over : over + h, over : over + h]

    @functools.cache
    def function(name, severity):
        tree, node = parameters(getattr(oracle, name))
        how = SEVERITIES[name][severity - 1]
        node.value = ast.parse(f"np.arange(1, {how}, 0.01)" if name == "zoom_blur" else repr(how), mode="eval").body
        scope = vars(oracle) | dict(clipped_zoom=trimmed)
        exec(compile(ast.fix_missing_locations(tree), name, "exec"), scope)
        return scope[name]

    def run(name, x, severity, **settings):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # spatter without drops divides by zero
            return np.uint8(function(name, severity)(PIL.Image.fromarray(x), **settings))

    return run


def test_the_oracle_at_our_parameters_is_the_oracle_wherever_they_coincide(photos, oracle, theirs):
    scope, found = dict(np=np), set()
    for name in SEVERITIES:
        if name in ("elastic_transform", "frost"):  # other algorithms, and pictures of another size
            continue
        said = [eval(compile(ast.Expression(c), "", "eval"), scope)
                for c in parameters(getattr(oracle, name))[1].value.value.elts]
        for severity, how in enumerate(SEVERITIES[name], 1):
            how = np.arange(1, how, 0.01) if name == "zoom_blur" else how
            for k, c in enumerate(said, 1):
                if np.array_equal(c, how):
                    found.add((name, severity, k))
                    settings = dict(seed=3) if name == "impulse_noise" else {}
                    for x in photos[:4]:
                        np.random.seed(3)
                        untouched = np.uint8(getattr(oracle, name)(PIL.Image.fromarray(x), k, **settings))
                        np.random.seed(3)
                        assert np.array_equal(theirs(name, x, severity, **settings), untouched)
    assert found == {("gaussian_noise", 3, 1), ("impulse_noise", 3, 1), ("speckle_noise", 5, 2),
                     ("gaussian_blur", 5, 1), ("zoom_blur", 2, 1), ("zoom_blur", 3, 2), ("brightness", 2, 1),
                     ("brightness", 4, 2), ("brightness", 5, 3),
                     ("contrast", 3, 1), ("contrast", 4, 2), ("saturate", 1, 1), ("saturate", 2, 2)}


@pytest.mark.parametrize("severity", FIVE)
@pytest.mark.parametrize("name", FIXED)
def test_what_draws_nothing_agrees_pixel_by_pixel(photos, theirs, name, severity):
    off = corrupt(photos, name, severity).astype(int) - np.stack([theirs(name, x, severity) for x in photos])
    assert np.abs(off).max() <= 1 and np.abs(off).mean() < 0.1  # a whole number that falls just short of itself


@pytest.mark.parametrize("name, severity", [
    *((name, severity) for severity in FIVE
      for name in ("gaussian_noise", "shot_noise", "speckle_noise", "motion_blur", "snow", "fog")),
    ("spatter", 4), ("spatter", 5)])  # of mud, that is
def test_the_same_draws_give_the_same_pixels(photos, theirs, name, severity):
    for seed, x in enumerate(photos):
        np.random.seed(seed)
        off = np.abs(ours(name, x, severity, seed).astype(int) - theirs(name, x, severity))
        assert off.max() <= (2 if name == "snow" else 1) and off.mean() < 0.5  # the oracle rounds its flakes


@pytest.mark.parametrize("severity", FIVE)
@pytest.mark.parametrize("name", DRAWN)
def test_what_draws_agrees_in_distribution(photos, theirs, name, severity):
    many = np.tile(photos, (20, 1, 1, 1))
    np.random.seed(severity)
    seeds = lambda i: dict(seed=i) if name in ("impulse_noise", "glass_blur") else {}
    reference = np.stack([theirs(name, x, severity, **seeds(i)) for i, x in enumerate(many)])
    changes = [found.astype(float) - many for found in (corrupt(many, name, severity), reference)]
    for measure in (np.mean, np.std, lambda change, axes: (np.abs(change) > 20).mean(axes)):
        a, b = (measure(change, (1, 2, 3)) for change in changes)
        if name == "spatter" and severity < 4:  # drops are found by their edge, and the oracle's edges are Canny's
            assert a.mean() == pytest.approx(b.mean(), rel=0.25)
            continue
        apart = a - b  # of the same photograph
        assert abs(apart.mean()) < 4 * apart.std() / len(apart) ** 0.5 + 1e-9
        assert scipy.stats.ks_2samp(a, b).pvalue > 0.001


@pytest.mark.parametrize("side, decay", [(32, 3), (32, 2.5), (32, 2), (32, 1.75), (8, 2), (64, 3)])
def test_clouds_are_those_of_the_plasma_fractal(oracle, side, decay):
    for seed in range(3):
        np.random.seed(seed)
        expected = oracle.plasma_fractal(side, decay)
        np.testing.assert_allclose(clouds(1, side, decay, np.random.RandomState(seed))[0, :, :, 0], expected, atol=1e-5)


def test_every_image_has_its_own_cloud_as_large_as_alone():
    together, rng = clouds(200, 16, 2, np.random.RandomState(0)), np.random.RandomState(1)
    alone = np.concatenate([clouds(1, 16, 2, rng) for _ in range(200)])
    assert len(np.unique(together, axis=0)) == 200
    assert (together.min((1, 2, 3)) == 0).all()
    assert (together.max((1, 2, 3)) == 1).all()
    assert scipy.stats.ks_2samp(together.std((1, 2, 3)), alone.std((1, 2, 3))).pvalue > 0.001


@pytest.mark.parametrize("how", SEVERITIES["defocus_blur"])
@pytest.mark.parametrize("side", [32, 64])
def test_a_point_out_of_focus_is_the_disk(oracle, how, side):
    point = np.zeros((1, side, side, 1))
    point[0, 16, 16] = 1
    radius, edge = how
    blurred = corruptions.defocus_blur(point, how, None)[0, 8:25, 8:25, 0]
    np.testing.assert_allclose(blurred, oracle.disk(radius * side / 32, edge), atol=1e-6)


def test_fog_makes_no_image_brighter_than_its_own_brightest_pixel(photos):
    x = np.concatenate([photos // 4, photos])
    for severity in FIVE:
        assert (corrupt(x, "fog", severity).max((1, 2, 3)) <= x.max((1, 2, 3))).all()


@pytest.mark.parametrize("radius, sigma", [*SEVERITIES["motion_blur"], (8, 3), (14, 12)])
def test_a_smear_is_the_motion_blur_at_every_angle(photos, oracle, radius, sigma):
    angles = np.array([-133.7, -90.1, -61.3, -44.9, -20.2, 0, 7.7, 33.3, 44.4])
    x = photos[: len(angles)] / 255
    for found, image, angle in zip(smear(x, radius, sigma, angles), x, angles):
        np.testing.assert_allclose(found, oracle._motion_blur(image, radius, sigma, angle), atol=1e-5)


@pytest.mark.parametrize("side", [8, 32, 33])
@pytest.mark.parametrize("zoom", [1, 1.01, 1.06, 1.15, 1.25, 1.26, 1.75, 2.25])
def test_an_enlarged_image_is_the_middle_of_the_clipped_zoom(photos, oracle, zoom, side):
    x = np.pad(photos, ((0, 0), (0, 1), (0, 1), (0, 0)), mode="edge")[:, :side, :side] / 255
    for found, image in zip(enlarge(x, zoom), x):
        big = oracle.clipped_zoom(image, zoom)
        over = (len(big) - side) // 2
        np.testing.assert_allclose(found, big[over : over + side, over : over + side], atol=1e-9)


@pytest.mark.parametrize("severity", FIVE)
def test_the_skew_is_an_affine_map_between_the_same_points(photos, severity):
    cv2 = pytest.importorskip("cv2")
    skew = SEVERITIES["elastic_transform"][severity - 1][2]
    for seed, x in enumerate(photos):
        found = corruptions.elastic_transform(x[None] / 255, (0, 0, skew), np.random.RandomState(seed))[0]
        before = np.array([[26, 26], [26, 6], [6, 6]])  # rows and columns
        after = before + np.random.RandomState(seed).uniform(-32 * skew, 32 * skew, (3, 2))
        m = cv2.getAffineTransform(np.float32(before[:, ::-1]), np.float32(after[:, ::-1]))
        expected = cv2.warpAffine(np.float32(x / 255), m, (32, 32), borderMode=cv2.BORDER_REFLECT_101)
        # its weights have five bits
        assert np.abs(found - expected).max() < 0.03 and np.abs(found - expected).mean() < 0.003


@pytest.mark.parametrize("severity", FIVE)
def test_the_wobble_is_the_oracles(photos, oracle, severity):
    "Which wobbles by 0.16 alpha pixels, smoothed over 0.32 pixels."
    many = np.tile(photos, (20, 1, 1, 1))
    alpha = [250 * 0.05, 250 * 0.065, 250 * 0.085, 250 * 0.1, 250 * 0.12][severity - 1]
    np.random.seed(severity)
    a = corruptions.elastic_transform(many / 255, (alpha * 0.005, 0.01, 0),
                                      np.random.RandomState(severity)) - many / 255
    b = np.stack([oracle.elastic_transform(x, severity) for x in many]) / 255 - many / 255
    a, b = a.std((1, 2, 3)), b.std((1, 2, 3))
    assert abs((a - b).mean()) < 4 * (a - b).std() / len(a) ** 0.5 and scipy.stats.ks_2samp(a, b).pvalue > 0.001


def test_frost_is_as_bright_and_as_rough_as_on_the_published_windows(oracle):
    cv2, rng, black = pytest.importorskip("cv2"), np.random.RandomState(0), np.zeros((1000, 32, 32, 3))
    # the sixth is never drawn in the recipe
    pieces, files = [], sorted(Path(oracle.__file__).with_name("frost").iterdir())[:5]
    for file in files:
        window = cv2.resize(cv2.imread(str(file)), (0, 0), fx=0.2, fy=0.2)[..., ::-1] / 255
        pieces += [window[i : i + 32, j : j + 32]
                   for i, j in zip(*(rng.randint(side - 32, size=200) for side in window.shape[:2]))]
    photographed, drawn = np.array(pieces), corruptions.frost(black, (1, 1), rng)
    assert len(files) == 5
    np.testing.assert_allclose(drawn.mean((0, 1, 2)), photographed.mean((0, 1, 2)), atol=0.05)  # red, green and blue
    assert drawn.mean((1, 2, 3)).std() == pytest.approx(photographed.mean((1, 2, 3)).std(), rel=0.25)
    assert drawn.std((1, 2)).mean() == pytest.approx(photographed.std((1, 2)).mean(), rel=0.25)


@pytest.fixture(scope="module")
def cifar(packed):
    "500 real test images."
    return load_dataset("cifar10", packed("cifar10")).x_test[:500]


@pytest.mark.parametrize("name", STANDARD)
def test_damage_to_real_images_grows_with_severity(cifar, name):
    found = [corrupt(cifar, name, severity) for severity in FIVE]
    if name == "frost":  # it darkens and brightens, see the notebook
        left = [np.mean([np.corrcoef(a.ravel(), b.ravel())[0, 1] for a, b in zip(images, cifar)]) for images in found]
        assert 1 > left[0] > left[1] > left[4] and all(a > b - 0.005 for a, b in zip(left, left[1:]))
    elif name not in ("elastic_transform", "glass_blur"):
        psnr = [10 * np.log10(255**2 / ((images.astype(float) - cifar) ** 2).mean()) for images in found]
        assert psnr[0] < 45 and all(a > b - 0.1 for a, b in zip(psnr, psnr[1:])) and psnr[0] > psnr[-1] + 1
    else:
        assert all(5 < np.abs(images.astype(float) - cifar).std() < 50 for images in found)


SHAPES = [(8, 8, 3), (64, 64, 3), (24, 32, 3), (32, 24, 3), (8, 8, 1), (32, 32, 1), (24, 32, 1)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", STANDARD)
def test_images_of_any_size_black_and_white_ones_too(photos, name, shape):
    h, w, c = shape
    x = np.concatenate([np.tile(photos[-6:], (1, 2, 2, 1))[:, :h, :w, :c], np.zeros((1, *shape), np.uint8),
                        np.full((1, *shape), 255, np.uint8)])
    for severity in FIVE:
        raw = getattr(corruptions, name)(x / 255, SEVERITIES[name][severity - 1], np.random.RandomState(0))
        assert raw.shape == x.shape and np.isfinite(raw).all()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found = corrupt(x, name, severity)
        assert found.shape == x.shape and found.dtype == np.uint8
        if h > 8 or severity == 5:
            assert (found[:6] != x[:6]).any((1, 2, 3)).all()


def test_lengths_grow_with_the_image():
    point = np.zeros((1, 384, 384, 1))
    point[0, 192, 192] = 1
    spots = [(corruptions.defocus_blur(point, how, None) > 1e-9).sum() for how in SEVERITIES["defocus_blur"]]
    # pixels whose middle is within 18 of its own
    assert all(before < after for before, after in zip(spots, spots[1:])) and spots[-1] == 1009
    ramp = np.tile(np.arange(224) / 223, (1, 224, 1))[..., None]
    moved = corruptions.glass_blur(ramp, SEVERITIES["glass_blur"][0], np.random.RandomState(0)) - ramp
    assert 2 / 223 < np.abs(moved[:, 50:-50, 50:-50]).mean() < 14 / 223  # by up to 7 pixels, where 32 move by one


@pytest.mark.parametrize("images", [0, -480])
def test_numbers_of_images_that_cannot_be(digits, tmp_path, images):
    with pytest.raises(ValueError, match="expected at least 1, or None for all"):
        corrupted_images(digits, tmp_path, images=images)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["brightness", "contrast", "gaussian_blur", "defocus_blur", "zoom_blur", "pixelate",
                                  "fog", "snow", "motion_blur", "glass_blur"])
def test_a_grey_image_becomes_what_its_three_equal_channels_become(photos, name):
    grey = photos[..., 1:2]
    for severity in FIVE:
        colour = corrupt(grey.repeat(3, 3), name, severity).astype(int)
        assert np.abs(corrupt(grey, name, severity) - colour).max() <= 1


@pytest.mark.parametrize("name", [name for name in SEVERITIES if name not in STANDARD])
def test_extras_on_grey_images(photos, name):
    if name == "saturate":
        with pytest.raises(ValueError, match="saturate needs colour images, these have 1 channel"):
            corrupt(photos[..., :1], name, 1)
    else:
        assert corrupt(photos[..., :1], name, 5).shape == (*photos.shape[:3], 1)


@pytest.mark.parametrize("kind, side", [("frost", 32), ("fog", 32), ("motion_blur", 32), ("gaussian_noise", 8)])
def test_every_severity_corruption_seed_and_block_has_its_own_draws(kind, side):
    x = np.full((3, side, side, 3), 100, np.uint8)
    x[:, ::5, ::3] = 200
    found = [corrupt(x, kind, severity, seed, block)
             for severity, seed, block in [(1, 0, 0), (2, 0, 0), (1, 1, 0), (1, 0, 1)]]
    assert len({images.tobytes() for images in found}) == 4 and np.array_equal(found[0], corrupt(x, kind, 1))
    assert len(np.unique(found[0], axis=0)) == 3


CHEAP = ("impulse_noise", "glass_blur", "motion_blur", "fog")


def test_images_are_the_same_from_one_process_or_two_and_however_many_follow(tmp_path):
    dataset = in_pieces(620, (8, 8, 3))
    one, two, first = (corrupted_images(dataset, tmp_path / folder, CHEAP, images, jobs=jobs, quiet=True)
                       for folder, images, jobs in [("one", None, 1), ("two", None, 2), ("first", 500, 1)])
    for name in CHEAP:
        whole = np.load(one.files[name])
        assert whole.shape == (5 * 620, 8, 8, 3) and np.array_equal(whole, np.load(two.files[name]))
        for severity in FIVE:
            assert np.array_equal(one.at(name, severity).x_test[:500], first.at(name, severity).x_test)
            assert np.array_equal(one.at(name, severity).x_test, corrupt(dataset.x_test, name, severity))
    assert one.about == two.about and first.about["images"] == 500


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
@pytest.mark.parametrize("where", ["images", "file"])
def test_an_interruption_costs_one_corruption(tmp_path, monkeypatch, error, where):
    dataset, names, folder = in_pieces(30, (8, 8, 3)), ["fog", "contrast", "brightness"], tmp_path / "mine-C-30"
    calls, save = [], np.save

    def stopping(images, name, *place):
        calls.append(name)
        if where == "images" and len(calls) == 8:
            raise error
        return corrupt(images, name, *place)

    def half(path, array):
        save(path, array)
        if where == "file" and "contrast" in str(path):
            Path(path).write_bytes(Path(path).read_bytes()[:1000])
            raise error

    monkeypatch.setattr(corruptions, "corrupt", stopping)
    monkeypatch.setattr(np, "save", half)
    with pytest.raises(error):
        corrupted_images(dataset, tmp_path, names, jobs=1, quiet=True)
    assert {path.name for path in folder.iterdir()} == {"config.json", "fog.npy"}
    monkeypatch.undo()
    before = (folder / "fog.npy").stat().st_mtime_ns
    calls.clear()
    monkeypatch.setattr(corruptions, "corrupt", lambda *task: calls.append(task[1]) or corrupt(*task))
    found = corrupted_images(dataset, tmp_path, names, jobs=1, quiet=True)
    assert calls == 5 * ["contrast"] + 5 * ["brightness"] and found.files["fog"].stat().st_mtime_ns == before
    assert {path.name for path in folder.iterdir()} == {"config.json", *(f"{name}.npy" for name in names)}
    for name in names:
        assert all(np.array_equal(found.at(name, severity).x_test, corrupt(dataset.x_test, name, severity))
                   for severity in FIVE)
    calls.clear()
    corrupted_images(dataset, tmp_path, names, jobs=1, quiet=True)
    assert calls == []


def test_images_of_other_test_images_or_another_seed_are_refused(tmp_path):
    dataset, other = in_pieces(20, (8, 8, 1)), in_pieces(20, (8, 8, 1))
    corrupted_images(dataset, tmp_path, ["contrast"], quiet=True)
    for refused, seed, named in ((other, 0, "of_sha256"), (dataset, 1, "recipe_seed is 0 there, 1 here")):
        with pytest.raises(ValueError, match=f"mine-C-20 holds another run: {named}"):
            corrupted_images(refused, tmp_path, ["contrast", "fog"], seed=seed, quiet=True)
    assert {path.name for path in (tmp_path / "mine-C-20").iterdir()} == {"config.json", "contrast.npy"}
    with pytest.raises(ValueError, match="unknown corruption 'contrats': did you mean 'contrast'"):
        corrupted_images(dataset, tmp_path, ["contrats"], quiet=True)


def test_a_severity_is_of_the_data_set_and_smaller_if_asked(tmp_path):
    dataset = in_pieces(30, (8, 8, 3))
    found = corrupted_images(dataset, tmp_path, ["contrast"], quiet=True)
    data = found.at("contrast", 4, side=4, images=7)
    means = corrupt(dataset.x_test, "contrast", 4)[:7].reshape(7, 4, 2, 4, 2, 3).mean((2, 4))
    assert np.array_equal(data.x_test, np.floor(means + 0.5))
    assert np.array_equal(data.y_test, dataset.y_test[:7]) and len(data.x_train) == 0 and data.num_classes == 10
    plain = found.at("contrast", 4)
    assert len(plain.x_test) == 30
    assert (plain.mean, plain.std, plain.class_names) == (dataset.mean, dataset.std, dataset.class_names)


@pytest.fixture
def published(tmp_path, monkeypatch):
    "A small CIFAR-10 of 40 test images, its corrupted files of 200 rows, and their md5 where ours are."
    dataset, folder = in_pieces(40, (8, 8, 3), name="cifar10"), tmp_path / "CIFAR-10-C"
    folder.mkdir()
    rows = {name: RNG.integers(0, 256, (200, 8, 8, 3), dtype=np.uint8) for name in ("fog", "frost")}

    def write(**arrays):
        for name, array in arrays.items():
            np.save(folder / f"{name}.npy", array)
        md5 = {path.stem: hashlib.md5(path.read_bytes()).hexdigest() for path in folder.iterdir()}
        monkeypatch.setattr(corruptions, "PUBLISHED", PUBLISHED | md5)

    write(**rows, labels=np.tile(dataset.y_test, 5).astype(np.uint8))
    return dataset, folder, rows, write


def test_published_files_are_used_where_they_are(published, monkeypatch):
    dataset, folder, rows, _ = published
    monkeypatch.setattr(corruptions, "corrupt", lambda *task: pytest.fail("the files were not used"))
    for images in (None, 10):
        found = corrupted_images(dataset, folder.parent, rows, images, quiet=True)
        assert found.about["source"] == "published" and found.about["md5"].keys() == rows.keys() == found.files.keys()
        for name in rows:
            for severity in FIVE:
                data, begin = found.at(name, severity), 40 * (severity - 1)
                assert np.array_equal(data.x_test, rows[name][begin : begin + (images or 40)])
                assert np.array_equal(data.y_test, dataset.y_test[: images or 40])
                assert np.array_equal(found.at(name, severity, images=7).x_test, rows[name][begin : begin + 7])
    assert {path.name for path in folder.parent.iterdir()} == {folder.name}


def test_published_files_are_for_cifar10_alone(published, digits):
    folder = published[1]
    assert corrupted_images(digits, folder.parent, ["fog"], images=5, quiet=True).about["source"] == "generated"


@pytest.mark.parametrize("damage", ["missing", "damaged", "no labels", "other labels", "other order", "other images"])
def test_bad_published_files_are_named(published, damage):
    dataset, folder, rows, write = published
    says = {"missing": "frost.npy is missing: unpack CIFAR-10-C.tar .* again, or move .*CIFAR-10-C away",
            "damaged": "frost.npy is damaged .md5 [0-9a-f]{32}, expected [0-9a-f]{32}.: unpack",
            "no labels": "labels.npy is missing"}
    if damage == "missing":
        (folder / "frost.npy").unlink()
    elif damage == "no labels":
        (folder / "labels.npy").unlink()
    elif damage == "damaged":
        whole = (folder / "frost.npy").read_bytes()
        (folder / "frost.npy").write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    else:
        labels = np.tile(dataset.y_test, 5)
        write(labels={"other labels": (labels + 1) % 10, "other order": np.repeat(dataset.y_test, 5),
                      "other images": labels[:100]}[damage])
    with pytest.raises(ValueError, match=says.get(damage, "CIFAR-10-C has other labels than the test images")):
        corrupted_images(dataset, folder.parent, rows, quiet=True)
    assert {path.name for path in folder.parent.iterdir()} == {folder.name}  # nothing is made in their place


class Shade(nn.Module):
    "The class is the sum of an image's pixels, as whole numbers, modulo ten."

    def forward(self, x):
        total = (x * 255).round().double().sum((1, 2, 3)).long()
        return nn.functional.one_hot(total // 5 % 10, 10).float()


class Bound(Shade):
    "The same, with parameters and modes to disturb."

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Dropout(0.5))
        self.layers[0].bias.requires_grad_(False)

    def forward(self, x):
        return super().forward(x) + 0 * self.layers(x).mean()


@pytest.mark.parametrize("make", [Shade, Bound])
@pytest.mark.parametrize("side, images", [(None, None), (4, 37)])
def test_accuracy_of_a_fixed_function_is_counted_right(tmp_path, make, side, images):
    dataset, names = in_pieces(60, (8, 8, 3)), ["gaussian_noise", "contrast"]
    corrupted = corrupted_images(dataset, tmp_path, names, quiet=True)
    model = make().train()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    flags = [p.requires_grad for p in model.parameters()]
    modes = [m.training for m in model.modules()]
    chance = torch.get_rng_state()
    found = corruption_accuracy(model, corrupted, side, images, batch_size=13, quiet=True)
    n, right = images or 60, np.empty((2, 5, images or 60))
    for i, name in enumerate(names):
        for severity in FIVE:
            x = corrupt(dataset.x_test, name, severity)
            x = x if side is None else averaged(Dataset("mine", x, dataset.y_test, x, dataset.y_test), side).x_test
            right[i, severity - 1] = (x.astype(int).sum((1, 2, 3)) // 5 % 10 == dataset.y_test)[:n]
    assert 0 < right.mean() < 1
    for i, name in enumerate(names):
        np.testing.assert_allclose(found["accuracy"][name], 100 * right[i].mean(1))
    scores = 100 * right.reshape(10, n).mean(0)
    half = 1.96 * scores.std(ddof=1) / n**0.5
    np.testing.assert_allclose([found["mean"], found["low"], found["high"]],
                               [scores.mean(), scores.mean() - half, scores.mean() + half])
    assert found["n"] == n and found["source"] == "generated" and list(found["accuracy"]) == names
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert [p.requires_grad for p in model.parameters()] == flags and [m.training for m in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), chance) and all(p.grad is None for p in model.parameters())
