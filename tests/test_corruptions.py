"Corruptions against the package imagecorruptions at our settings, on photographs; files, interruptions, accuracy."
import ast
import functools
import hashlib
import inspect
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import scipy.stats
import torch
from sklearn.datasets import load_sample_images
from torch import nn

from advdpnp import corruptions
from advdpnp.core import seed_of
from advdpnp.corruptions import CORRUPTIONS, GROUPS, PUBLISHED, STANDARD, corrupt, corrupted_images, corruption_accuracy
from advdpnp.data import Dataset, averaged

RNG = np.random.default_rng(0)
FIVE = range(1, 6)
FIXED = ("brightness", "contrast", "defocus_blur", "zoom_blur", "jpeg_compression", "pixelate")
SAME_DRAWS = ("gaussian_noise", "shot_noise", "motion_blur", "snow", "fog")  # ours and the oracle's, image by image


@pytest.fixture(scope="session")
def photos():
    "32-pixel pieces of scikit-learn's two photographs."
    pieces = []
    for image in load_sample_images().images:
        h, w = (side // 8 * 8 for side in image.shape[:2])
        small = image[:h, :w].reshape(h // 8, 8, w // 8, 8, 3).mean((1, 3))
        pieces += [small[i : i + 32, j : j + 32] for i in range(0, h // 8 - 31, 20) for j in range(0, w // 8 - 31, 16)]
    return np.stack(pieces).round().astype(np.uint8)


def setting(name, severity):
    return CORRUPTIONS[name].settings[severity - 1]


def in_pieces(n, shape, num_classes=10, name="mine"):
    "A data set of n random test images, and a few to train on."
    x, y = RNG.integers(0, 256, (n, *shape), dtype=np.uint8), np.arange(n) % num_classes
    return Dataset(name, x[:num_classes], y[:num_classes], x, y)


# -- the same as before: files in data folders, and seeds, rest on it


def test_the_fifteen_are_those_of_the_benchmark_in_its_order():
    assert STANDARD == (
        "gaussian_noise", "shot_noise", "impulse_noise", "defocus_blur", "glass_blur", "motion_blur", "zoom_blur",
        "snow", "frost", "fog", "brightness", "contrast", "elastic_transform", "pixelate", "jpeg_compression")
    assert [name for names in GROUPS.values() for name in names] == [*STANDARD] == [*CORRUPTIONS]
    assert [*GROUPS] == ["noise", "blur", "weather", "digital"]
    assert all({*of.md5} == {*STANDARD, "labels"} for of in PUBLISHED.values())


SUMS = dict(  # of all values at five severities, seed 3, block 2, as of version 0.1
    gaussian_noise=5191568, shot_noise=5147734, impulse_noise=5217034, defocus_blur=5165801, glass_blur=5240740,
    motion_blur=5178925, zoom_blur=5234668, snow=6570302, frost=7124387, fog=5159721, brightness=6458425,
    contrast=5165638, elastic_transform=5135900, pixelate=5198074, jpeg_compression=5194582)


@pytest.mark.parametrize("name", STANDARD)
def test_images_are_those_of_earlier_versions(photos, name):
    found = sum(int(corrupt(photos[::6], name, severity, seed=3, block=2).astype(int).sum()) for severity in FIVE)
    assert found == pytest.approx(SUMS[name], abs=200)  # of about five million: libraries may round differently


def test_random_numbers_come_from_seed_place_severity_and_block(photos):
    rng = np.random.RandomState(seed_of(3, STANDARD.index("fog"), 2, 1) % 2**32)
    by_hand = CORRUPTIONS["fog"].function(photos / 255, setting("fog", 2), rng)
    assert np.array_equal(corrupt(photos, "fog", 2, seed=3, block=1), corruptions.whole_numbers(by_hand))


@pytest.mark.parametrize("name, side", [("frost", 32), ("fog", 32), ("motion_blur", 32), ("gaussian_noise", 8)])
def test_every_severity_seed_block_and_image_has_its_own_draws(name, side):
    x = np.full((3, side, side, 3), 100, np.uint8)
    x[:, ::5, ::3] = 200
    found = [corrupt(x, name, *which) for which in [(1, 0, 0), (2, 0, 0), (1, 1, 0), (1, 0, 1)]]
    assert len({images.tobytes() for images in found}) == 4 and np.array_equal(found[0], corrupt(x, name, 1))
    assert len(np.unique(found[0], axis=0)) == 3


# -- against the package imagecorruptions


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
    "The oracle's corruptions, at our settings: theirs(name, image, severity)."

    def trimmed(image, zoom):  # the recipe for CIFAR keeps the middle; the oracle keeps a corner, or all
        big, h = oracle.clipped_zoom(image, zoom), image.shape[0]
        over = (len(big) - h) // 2
        return big[over : over + h, over : over + h]

    @functools.cache
    def function(name, severity):
        tree, node = parameters(getattr(oracle, name))
        how = setting(name, severity)
        node.value = ast.parse(f"np.arange(1, {how}, 0.01)" if name == "zoom_blur" else repr(how), mode="eval").body
        scope = vars(oracle) | dict(clipped_zoom=trimmed)
        exec(compile(ast.fix_missing_locations(tree), name, "exec"), scope)
        return scope[name]

    def run(name, x, severity, **settings):
        return np.uint8(function(name, severity)(PIL.Image.fromarray(x), **settings))

    return run


def test_the_oracle_at_our_settings_is_the_oracle_wherever_they_coincide(photos, oracle, theirs):
    found = set()
    for name in STANDARD:
        if name in ("elastic_transform", "frost"):  # other algorithms, and pictures of another size
            continue
        said = [eval(compile(ast.Expression(c), "", "eval"), dict(np=np))
                for c in parameters(getattr(oracle, name))[1].value.value.elts]
        for severity in FIVE:
            how = setting(name, severity)
            how = np.arange(1, how, 0.01) if name == "zoom_blur" else how
            for k, c in enumerate(said, 1):
                if np.array_equal(c, how):
                    found.add((name, severity, k))
                    settings = dict(seed=3) if name == "impulse_noise" else {}
                    for x in photos[:4]:
                        np.random.seed(3)
                        unchanged = np.uint8(getattr(oracle, name)(PIL.Image.fromarray(x), k, **settings))
                        np.random.seed(3)
                        assert np.array_equal(theirs(name, x, severity, **settings), unchanged)
    assert found == {("gaussian_noise", 3, 1), ("impulse_noise", 3, 1), ("zoom_blur", 2, 1), ("zoom_blur", 3, 2),
                     ("brightness", 2, 1), ("brightness", 4, 2), ("brightness", 5, 3), ("contrast", 3, 1),
                     ("contrast", 4, 2)}


@pytest.mark.parametrize("severity", FIVE)
@pytest.mark.parametrize("name", FIXED)
def test_what_draws_nothing_agrees_pixel_by_pixel(photos, theirs, name, severity):
    off = corrupt(photos, name, severity).astype(int) - np.stack([theirs(name, x, severity) for x in photos])
    assert np.abs(off).max() <= 1 and np.abs(off).mean() < 0.1  # a whole number that falls just short of itself


@pytest.mark.parametrize("severity", FIVE)
@pytest.mark.parametrize("name", SAME_DRAWS)
def test_the_same_draws_give_the_same_pixels(photos, theirs, name, severity):
    for seed, x in enumerate(photos):
        np.random.seed(seed)
        ours = CORRUPTIONS[name].function(x[None] / 255, setting(name, severity), np.random.RandomState(seed))
        off = np.abs(corruptions.whole_numbers(ours)[0].astype(int) - theirs(name, x, severity))
        assert off.max() <= (2 if name == "snow" else 1) and off.mean() < 0.5  # the oracle rounds its flakes


@pytest.mark.parametrize("name, severity", [*(("impulse_noise", severity) for severity in FIVE), ("glass_blur", 2),
                                            ("glass_blur", 5), *((name, 4) for name in SAME_DRAWS)])
def test_many_images_agree_in_distribution(photos, theirs, name, severity):
    many = np.tile(photos, (3 if name == "glass_blur" else 6, 1, 1, 1))
    np.random.seed(severity)
    seeds = lambda i: {} if name in SAME_DRAWS else dict(seed=i)
    reference = np.stack([theirs(name, x, severity, **seeds(i)) for i, x in enumerate(many)])
    changes = [found.astype(float) - many for found in (corrupt(many, name, severity), reference)]
    for measure in (np.mean, np.std, lambda change, axes: (np.abs(change) > 20).mean(axes)):
        a, b = (measure(change, (1, 2, 3)) for change in changes)
        apart = a - b  # of the same photograph
        assert abs(apart.mean()) < 4 * apart.std() / len(apart) ** 0.5 + 1e-9
        assert scipy.stats.ks_2samp(a, b).pvalue > 0.001


@pytest.mark.parametrize("side, decay", [(32, 3), (32, 2.5), (32, 2), (32, 1.75), (8, 2), (64, 3)])
def test_clouds_are_those_of_the_plasma_fractal(oracle, side, decay):
    for seed in range(3):
        np.random.seed(seed)
        expected, found = oracle.plasma_fractal(side, decay), corruptions.clouds(1, side, decay,
                                                                                 np.random.RandomState(seed))
        np.testing.assert_allclose(found[0, :, :, 0], expected, atol=1e-5)


@pytest.mark.parametrize("how", CORRUPTIONS["defocus_blur"].settings)
@pytest.mark.parametrize("side", [32, 64])
def test_a_point_out_of_focus_is_the_disk(oracle, how, side):
    point = np.zeros((1, side, side, 1))
    point[0, 16, 16] = 1
    radius, edge = how
    blurred = corruptions.defocus_blur(point, how, None)[0, 8:25, 8:25, 0]
    np.testing.assert_allclose(blurred, oracle.disk(radius * side / 32, edge), atol=1e-6)


@pytest.mark.parametrize("radius, sigma", [*CORRUPTIONS["motion_blur"].settings, (8, 3), (14, 12)])
def test_a_smear_is_the_motion_blur_at_every_angle(photos, oracle, radius, sigma):
    angles = np.array([-133.7, -90.1, -61.3, -44.9, -20.2, 0, 7.7, 33.3, 44.4])
    x = photos[: len(angles)] / 255
    for found, image, angle in zip(corruptions.smear(x, radius, sigma, angles), x, angles):
        np.testing.assert_allclose(found, oracle._motion_blur(image, radius, sigma, angle), atol=1e-5)


@pytest.mark.parametrize("side", [8, 32, 33])
@pytest.mark.parametrize("zoom", [1, 1.01, 1.06, 1.15, 1.25, 1.26, 1.75, 2.25])
def test_an_enlarged_image_is_the_middle_of_the_clipped_zoom(photos, oracle, zoom, side):
    x = np.pad(photos, ((0, 0), (0, 1), (0, 1), (0, 0)), mode="edge")[:, :side, :side] / 255
    for found, image in zip(corruptions.enlarge(x, zoom), x):
        big = oracle.clipped_zoom(image, zoom)
        over = (len(big) - side) // 2
        np.testing.assert_allclose(found, big[over : over + side, over : over + side], atol=1e-9)


@pytest.mark.parametrize("severity", FIVE)
def test_the_skew_is_an_affine_map_between_the_same_points(photos, severity):
    cv2 = pytest.importorskip("cv2")
    skew = setting("elastic_transform", severity)[2]
    for seed, x in enumerate(photos):
        found = corruptions.elastic_transform(x[None] / 255, (0, 0, skew), np.random.RandomState(seed))[0]
        before = np.array([[26, 26], [26, 6], [6, 6]])  # rows and columns
        after = before + np.random.RandomState(seed).uniform(-32 * skew, 32 * skew, (3, 2))
        m = cv2.getAffineTransform(np.float32(before[:, ::-1]), np.float32(after[:, ::-1]))
        expected = cv2.warpAffine(np.float32(x / 255), m, (32, 32), borderMode=cv2.BORDER_REFLECT_101)
        # its weights have five bits
        assert np.abs(found - expected).max() < 0.03 and np.abs(found - expected).mean() < 0.003


@pytest.mark.parametrize("severity, alpha", [(1, 250 * 0.05), (5, 250 * 0.12)])
def test_the_wobble_is_the_oracles(photos, oracle, severity, alpha):
    "Which wobbles by 0.16 alpha pixels, smoothed over 0.32 pixels."
    many = np.tile(photos, (6, 1, 1, 1))
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


# -- what must hold for any images


def test_every_image_has_its_own_cloud_as_large_as_alone():
    together, rng = corruptions.clouds(200, 16, 2, np.random.RandomState(0)), np.random.RandomState(1)
    alone = np.concatenate([corruptions.clouds(1, 16, 2, rng) for _ in range(200)])
    assert len(np.unique(together, axis=0)) == 200
    assert (together.min((1, 2, 3)) == 0).all()
    assert (together.max((1, 2, 3)) == 1).all()
    assert scipy.stats.ks_2samp(together.std((1, 2, 3)), alone.std((1, 2, 3))).pvalue > 0.001


def test_fog_makes_no_image_brighter_than_its_own_brightest_pixel(photos):
    x = np.concatenate([photos // 4, photos])
    for severity in FIVE:
        assert (corrupt(x, "fog", severity).max((1, 2, 3)) <= x.max((1, 2, 3))).all()


@pytest.mark.parametrize("severity", FIVE)
@pytest.mark.parametrize("name", GROUPS["blur"])
def test_a_blur_keeps_a_constant_image_and_the_light_of_a_point(name, severity):
    blur, how, rng = CORRUPTIONS[name].function, setting(name, severity), np.random.RandomState(0)
    grey, point = np.full((2, 32, 32, 3), 0.4), np.zeros((2, 32, 32, 1))
    point[:, 15:17, 15:17] = 1
    np.testing.assert_allclose(blur(grey, how, rng), grey, atol=5e-3)
    if name not in ("glass_blur", "zoom_blur"):  # which copy and enlarge
        np.testing.assert_allclose(blur(point, how, rng).sum((1, 2, 3)), 4, atol=1e-6)


def test_lengths_grow_with_the_image():
    point = np.zeros((1, 160, 160, 1))
    point[0, 80, 80] = 1
    spots = [(corruptions.defocus_blur(point, how, None) > 1e-9).sum() for how in CORRUPTIONS["defocus_blur"].settings]
    # pixels whose middle is within 7.5 of its own, and their neighbours' edge, which is 0.1 wide
    off = np.arange(-80, 80)
    assert all(before <= after for before, after in zip(spots, spots[1:]))
    assert spots[-1] == (off[:, None] ** 2 + off**2 <= 7.5**2).sum()
    ramp = np.tile(np.arange(96) / 95, (1, 96, 1))[..., None]
    moved = corruptions.glass_blur(ramp, setting("glass_blur", 1), np.random.RandomState(0)) - ramp
    assert 1 / 95 < np.abs(moved[:, 20:-20, 20:-20]).mean() < 6 / 95  # by up to 3 pixels, where 32 move by one


def test_frost_leaves_less_of_the_picture_at_each_severity(photos):
    "Its signal-to-noise ratio need not fall, see the notebook; the correlation with the clean picture does."
    correlations = [np.mean([np.corrcoef(a.ravel(), b.ravel())[0, 1] for a, b in zip(images, photos)])
                    for images in (corrupt(photos, "frost", severity) for severity in FIVE)]
    assert all(a > b - 0.005 for a, b in zip(correlations, correlations[1:]))
    assert 1 > correlations[0] > correlations[1] > correlations[4]


SHAPES = [(32, 24, 3), (24, 32, 1), (8, 8, 3), (8, 8, 1), (34, 36, 3)]


@pytest.mark.parametrize("name", STANDARD)
def test_images_of_any_size_black_and_white_ones_too(photos, name):
    for h, w, c in SHAPES:
        x = np.concatenate([np.tile(photos[-6:], (1, 2, 2, 1))[:, :h, :w, :c], np.zeros((1, h, w, c), np.uint8),
                            np.full((1, h, w, c), 255, np.uint8)])
        raw = CORRUPTIONS[name].function(x / 255, setting(name, 3), np.random.RandomState(0))
        assert raw.shape == x.shape and np.isfinite(raw).all()
        for severity in (1, 4, 5):
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                found = corrupt(x, name, severity)
            assert found.shape == x.shape and found.dtype == np.uint8
            if h > 8 or severity == 5:
                assert (found[:6] != x[:6]).any((1, 2, 3)).all()


@pytest.mark.parametrize("name", ["brightness", "contrast", "defocus_blur", "zoom_blur", "pixelate", "fog", "snow",
                                  "motion_blur", "glass_blur"])
def test_a_grey_image_becomes_what_its_three_equal_channels_become(photos, name):
    grey = photos[:6, ..., 1:2]
    for severity in FIVE:
        colour = corrupt(grey.repeat(3, 3), name, severity).astype(int)
        assert np.abs(corrupt(grey, name, severity) - colour).max() <= 1


@pytest.mark.parametrize("change, says", [
    (dict(name="gausian_noise"), "unknown corruption 'gausian_noise': did you mean 'gaussian_noise'"),
    (dict(name="saturate"), "unknown corruption 'saturate'"),
    (dict(severity=6), "unknown severity 6"),
    (dict(severity=0), "unknown severity 0"),
    (dict(images=np.zeros((2, 8, 8, 3))), r"images are float64 \(2, 8, 8, 3\), expected uint8 \(N, H, W, C\)"),
    (dict(images=np.zeros((8, 8, 3), np.uint8)), r"images are uint8 \(8, 8, 3\), expected uint8 \(N, H, W, C\)"),
    (dict(images=np.zeros((2, 3, 8, 8), np.uint8)), "with 1 or 3 channels"),
], ids=str)
def test_what_cannot_be_corrupted_is_named(change, says):
    with pytest.raises(ValueError, match=says):
        corrupt(**dict(images=np.zeros((2, 8, 8, 3), np.uint8), name="fog", severity=1) | change)


# -- files


@pytest.mark.parametrize("change, says", [
    (dict(images=0), "images is 0: expected at least 1, or None for all"),
    (dict(images=-480), "images is -480: expected at least 1, or None for all"),
    (dict(names=["contrats"]), "unknown corruption 'contrats': did you mean 'contrast'"),
], ids=str)
def test_what_cannot_be_made_is_named(digits, tmp_path, change, says):
    with pytest.raises(ValueError, match=says):
        corrupted_images(digits, tmp_path, **change)
    assert list(tmp_path.iterdir()) == []


def test_images_are_the_same_from_one_process_or_two_and_however_many_follow(tmp_path):
    dataset, names = replace(in_pieces(520, (8, 8, 3)), name="svhn"), ("impulse_noise", "motion_blur")
    one, two, first = (corrupted_images(dataset, tmp_path / folder, names, images, jobs=jobs, quiet=True)
                       for folder, images, jobs in [("one", None, 1), ("two", None, 2), ("first", 500, 1)])
    for name in names:
        whole = np.load(one.files[name])
        assert whole.shape == (5 * 520, 8, 8, 3) and np.array_equal(whole, np.load(two.files[name]))
        for severity in FIVE:
            assert np.array_equal(one.at(name, severity).x_test[:500], first.at(name, severity).x_test)
            assert np.array_equal(one.at(name, severity).x_test, corrupt(dataset.x_test, name, severity))
    assert one.about == two.about and first.about["images"] == 500


@pytest.mark.parametrize("error, where", [(KeyboardInterrupt, "images"), (OSError, "file")])
def test_an_interruption_costs_one_corruption(tmp_path, monkeypatch, error, where):
    dataset, names, folder = in_pieces(30, (8, 8, 3)), ["fog", "contrast", "brightness"], tmp_path / "mine-C-30"
    calls, save = [], np.save

    real, name_of = corruptions.corrupt_as, lambda place: [*corruptions.CORRUPTIONS][place]

    def stopping(one, place, *rest):
        calls.append(name_of(place))
        if where == "images" and len(calls) == 8:
            raise error
        return real(one, place, *rest)

    def half(path, array):
        save(path, array)
        if where == "file" and "contrast" in str(path):
            Path(path).write_bytes(Path(path).read_bytes()[:1000])
            raise error

    monkeypatch.setattr(corruptions, "corrupt_as", stopping)
    monkeypatch.setattr(np, "save", half)
    with pytest.raises(error):
        corrupted_images(dataset, tmp_path, names, quiet=True)
    assert {path.name for path in folder.iterdir()} == {"config.json", "fog.npy"}
    monkeypatch.undo()
    before = (folder / "fog.npy").stat().st_mtime_ns
    calls.clear()
    monkeypatch.setattr(corruptions, "corrupt_as", lambda *task: calls.append(name_of(task[1])) or real(*task))
    found = corrupted_images(dataset, tmp_path, names, quiet=True)
    assert calls == 5 * ["contrast"] + 5 * ["brightness"] and found.files["fog"].stat().st_mtime_ns == before
    assert {path.name for path in folder.iterdir()} == {"config.json", *(f"{name}.npy" for name in names)}
    for name in names:
        assert all(np.array_equal(found.at(name, severity).x_test, corrupt(dataset.x_test, name, severity))
                   for severity in FIVE)
    calls.clear()
    corrupted_images(dataset, tmp_path, names, quiet=True)
    assert calls == []


def test_images_of_other_test_images_another_seed_or_recipe_are_refused(tmp_path, monkeypatch):
    dataset, other = in_pieces(20, (8, 8, 1)), in_pieces(20, (8, 8, 1))
    made = corrupted_images(dataset, tmp_path, ["contrast"], quiet=True)
    for refused, seed, named in ((other, 0, "of_sha256"), (dataset, 1, "recipe_seed is 0 there, 1 here")):
        with pytest.raises(ValueError, match=f"mine-C-20 holds another run: {named}"):
            corrupted_images(refused, tmp_path, ["contrast", "fog"], seed=seed, quiet=True)
    monkeypatch.setattr(corruptions, "recipe_of", lambda x, seed: made.about | dict(recipe=2))
    with pytest.raises(ValueError, match="holds another run: recipe is 1 there, 2 here"):
        corrupted_images(dataset, tmp_path, ["contrast"], quiet=True)
    assert {path.name for path in (tmp_path / "mine-C-20").iterdir()} == {"config.json", "contrast.npy"}


def test_a_corruption_of_ones_own(tmp_path, monkeypatch):
    monkeypatch.setattr(corruptions, "CORRUPTIONS", {**CORRUPTIONS})

    @corruptions.corruption("light", (0.9, 0.8, 0.7, 0.6, 0.5))
    def darker(x, factor, rng):
        return factor * x

    dataset = in_pieces(20, (8, 8, 3))
    found = corrupted_images(dataset, tmp_path, ["darker"], quiet=True).at("darker", 5)
    assert np.array_equal(found.x_test, dataset.x_test // 2)
    assert np.array_equal(corruptions.corrupt(found.x_test, "fog", 1), corrupt(found.x_test, "fog", 1))


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
    for name, severity, says in (("fog", 1, "unknown corruption 'fog'"), ("contrast", 6, "unknown severity 6")):
        with pytest.raises(ValueError, match=says):
            found.at(name, severity)


@pytest.fixture(params=["cifar10", "cifar100"])
def published(request, tmp_path, monkeypatch):
    "A small CIFAR of 40 test images, its corrupted files of 200 rows, and their md5 where ours are."
    of = PUBLISHED[request.param]
    dataset, folder = in_pieces(40, (8, 8, 3), name=request.param), tmp_path / of.folder
    folder.mkdir()
    rows = {name: RNG.integers(0, 256, (200, 8, 8, 3), dtype=np.uint8) for name in ("fog", "frost")}

    def write(**arrays):
        for name, array in arrays.items():
            np.save(folder / f"{name}.npy", array)
        md5 = {path.stem: hashlib.md5(path.read_bytes()).hexdigest() for path in folder.iterdir()}
        monkeypatch.setitem(PUBLISHED, request.param, replace(of, md5=of.md5 | md5))

    write(**rows, labels=np.tile(dataset.y_test, 5).astype(np.uint8))
    return dataset, folder, rows, write


def test_published_files_are_used_where_they_are(published, monkeypatch, digits):
    dataset, folder, rows, _ = published
    with monkeypatch.context() as patched:
        patched.setattr(corruptions, "corrupt", lambda *task: pytest.fail("the files were not used"))
        for images in (None, 10):
            found = corrupted_images(dataset, folder.parent, rows, images, quiet=True)
            assert found.about["source"] == "published"
            assert found.about["md5"].keys() == rows.keys() == found.files.keys()
            for name in rows:
                for severity in FIVE:
                    data, begin = found.at(name, severity), 40 * (severity - 1)
                    assert np.array_equal(data.x_test, rows[name][begin : begin + (images or 40)])
                    assert np.array_equal(data.y_test, dataset.y_test[: images or 40])
                    assert np.array_equal(found.at(name, severity, images=7).x_test, rows[name][begin : begin + 7])
    assert {path.name for path in folder.parent.iterdir()} == {folder.name}
    other = replace(dataset, name={"cifar10": "cifar100", "cifar100": "cifar10"}[dataset.name])
    assert corrupted_images(other, folder.parent, ["fog"], images=5, quiet=True).about["source"] == "generated"
    assert corrupted_images(digits, folder.parent, ["fog"], images=5, quiet=True).about["source"] == "generated"


def test_published_files_are_read_once_for_their_md5(published):
    dataset, folder, rows, write = published
    read = lambda: corruptions.md5_of.cache_info().misses
    before = read()
    for _ in range(3):
        corrupted_images(dataset, folder.parent, rows, quiet=True)
    assert read() - before == len(rows) + 1  # and the labels
    write(fog=255 - rows["fog"])  # another file in its place
    corrupted_images(dataset, folder.parent, rows, quiet=True)
    assert read() - before == len(rows) + 2


@pytest.mark.parametrize("damage", ["missing", "damaged", "no labels", "other labels", "other order", "other images"])
def test_bad_published_files_are_named(published, damage):
    dataset, folder, rows, write = published
    says = {"missing": "frost.npy is missing: unpack CIFAR-100?-C.tar .* again, or move .*CIFAR-100?-C away",
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
    with pytest.raises(ValueError, match=says.get(damage, "CIFAR-100?-C has other labels than the test images")):
        corrupted_images(dataset, folder.parent, rows, quiet=True)
    assert {path.name for path in folder.parent.iterdir()} == {folder.name}  # nothing is made in their place


# -- accuracy


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


def test_accuracy_stops_when_time_is_up(tmp_path):
    corrupted = corrupted_images(in_pieces(20, (8, 8, 3)), tmp_path, ["contrast"], quiet=True)
    with pytest.raises(TimeoutError, match="time is up before contrast"):
        corruption_accuracy(Shade(), corrupted, quiet=True, deadline=0)


def test_of_one_image_nothing_is_known_of_others(tmp_path):
    corrupted = corrupted_images(in_pieces(1, (8, 8, 3)), tmp_path, ["contrast"], quiet=True)
    found = corruption_accuracy(Shade(), corrupted, quiet=True)
    assert (found["low"], found["high"], found["n"]) == (0, 100, 1)


def test_few_images_of_sorted_data_are_of_every_class(digits, tmp_path):
    order = np.argsort(digits.y_test, kind="stable")
    data = replace(digits, x_test=digits.x_test[order], y_test=digits.y_test[order])
    few = corrupted_images(data, tmp_path, ["contrast"], images=40, quiet=True)
    assert np.bincount(few.dataset.y_test).tolist() == [4] * 10
    assert np.array_equal(few.at("contrast", 3).y_test, few.dataset.y_test)


def test_a_corruption_of_one_s_own_is_made_by_several_processes(monkeypatch):
    own = corruptions.Corruption(lambda x, setting, rng: x / setting, (1, 2, 3, 4, 5), "weather")
    monkeypatch.setitem(corruptions.CORRUPTIONS, "own", own)
    x = np.full((2, 8, 8, 3), 200, np.uint8)
    one, two = (corruptions.at_all_severities(x, "own", jobs=jobs) for jobs in (1, 2))
    assert np.array_equal(one, two) and one[-1, 0, 0, 0] == 40
