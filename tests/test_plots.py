"Pictures: who is who in grey print, letters that can be read, labels that do not touch, and files that are of today."
import itertools
import re

import numpy as np
import pytest
from matplotlib import pyplot as plt
from matplotlib.collections import PathCollection
from matplotlib.colors import to_rgb
from matplotlib.text import Text
from pages import ROOT

from advdpnp import plots
from advdpnp.core import read_json
from advdpnp.methods import METHODS

RESULTS = ROOT / "data/results"
DRAWN = sorted(path for path in RESULTS.glob("table*.png")
               if path.stem.split(".")[-1] in ("training", "budget", "steps", "corruptions", "front", "rows"))


@pytest.fixture(autouse=True)
def close_figures():
    plots.theme()
    yield
    plt.close("all")


def drawn(path):
    "A picture in `data/results`, from the records beside it."
    stem, _, name = path.stem.rpartition(".")
    records = read_json(RESULTS / f"{stem}.json")
    whole = name in ("corruptions", "front")
    return plots.PICTURES[name][2]([r for r in records if whole or r["seed"] == records[0]["seed"]])


# Who is who


def linear(colour):
    "A colour in linear light."
    c = np.array(to_rgb(colour))
    return np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)


def lab(rgb):
    "CIE L*a*b* of linear light (D65)."
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    x, y, z = (np.cbrt(v) if v > 0.008856 else 7.787 * v + 16 / 116 for v in to_xyz @ rgb / [0.9505, 1, 1.089])
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


# Machado, Oliveira and Fernandes, 2009, at full severity
BLIND = dict(deuteranopia=[[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413],
                           [-0.011820, 0.042940, 0.968881]],
             protanopia=[[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216],
                         [-0.003882, -0.048116, 1.051998]])


def test_any_two_methods_differ_in_grey_print():
    "By their markers, or by 15 of 100 in lightness."
    assert [*plots.STYLES] == [*METHODS]
    for a, b in itertools.combinations(plots.STYLES.values(), 2):
        assert a["marker"] != b["marker"] or abs(lab(linear(a["color"])) - lab(linear(b["color"])))[0] > 15


@pytest.mark.parametrize("looks", [plots.STYLES.values(), plots.CLASSES], ids=["methods", "classes"])
@pytest.mark.parametrize("eyes", BLIND)
def test_any_two_colours_differ_for_the_colour_blind(eyes, looks):
    "Ten units of colour difference are plain to see."
    seen = [lab(np.clip(np.array(BLIND[eyes]) @ linear(look["color"]), 0, 1)) for look in looks]
    assert min(np.linalg.norm(a - b) for a, b in itertools.combinations(seen, 2)) > 10


def test_classes_differ_in_grey_print():
    assert len({look["marker"] for look in plots.CLASSES}) == 3
    light = sorted(lab(linear(look["color"]))[0] for look in plots.CLASSES)
    assert np.diff(light).min() > 15


def test_rows_that_are_no_methods_have_looks_of_their_own():
    rows = ["TRADES", "no alignment", *(f"Adv-DPNP{ends}" for ends in ("+AWP", "+EMA", "+AWP+EMA"))]
    of = plots.styles(rows)
    assert of["TRADES"] == plots.STYLES["TRADES"] and {*rows, *METHODS} == {*of}
    assert len({look["marker"] for look in of.values()}) == len(of)


# What stands in a picture


def visible(figure):
    "Texts that a reader sees."
    return [text for text in figure.findobj(Text) if text.get_text().strip() and text.get_visible()
            and getattr(text.axes, "axison", True)]


@pytest.mark.parametrize("path", DRAWN, ids=lambda path: path.stem)
def test_a_picture_is_that_of_its_records_and_can_be_read(path, tmp_path):
    "Letters have 8 points where a page shows it, and the file is what would be drawn today."
    figure = drawn(path)
    figure.savefig(tmp_path / path.name, dpi=120)
    shrunk = min(1, plots.WIDTH / figure.get_size_inches()[0])
    assert min(text.get_fontsize() for text in visible(figure)) * shrunk >= 8
    for axis in (axis for ax in figure.axes if ax.axison for axis in (ax.xaxis, ax.yaxis)):
        upright = (text.get_window_extent() for text in axis.get_ticklabels() if not text.get_rotation())
        boxes = [box for box in upright if box.width and box.height]
        assert [box.count_overlaps(boxes) for box in boxes] == [1] * len(boxes)
    axes = " ".join(ax.get_xlabel() + ax.get_ylabel() for ax in figure.axes)
    assert not re.search("standing|rival", axes + figure.get_supxlabel() + figure.get_supylabel())  # words of records
    now, then = (plt.imread(file)[..., :3] for file in (tmp_path / path.name, path))
    assert now.shape == then.shape and np.abs(now - then).mean() < 0.01


@pytest.mark.parametrize("preset", ["quick", "small"])
def test_labels_of_fronts_do_not_touch(preset):
    figure = drawn(RESULTS / f"table7.{preset}.front.png")
    figure.canvas.draw()
    runs = 0
    for ax in figure.axes[1:]:
        boxes = [Text.get_window_extent(text) for text in ax.texts]
        runs += len(boxes)
        assert [box.count_overlaps(boxes) for box in boxes] == [1] * len(boxes)  # each touches itself
        marks = [there for there in ax.collections if isinstance(there, PathCollection)]
        dots = [ax.transData.transform(dot) for there in marks for dot in there.get_offsets()]
        assert dots and not [dot for dot in dots for box in boxes if box.contains(*dot)]
        assert all(ax.bbox.contains(*corner) for box in boxes for corner in (box.min, box.max))
    assert runs > 15


def test_curves_of_all_methods_are_in_every_panel():
    figure = drawn(RESULTS / "table1.quick.budget.png")
    panels = [ax for ax in figure.axes if ax.axison]
    assert [ax.get_title() for ax in panels] == [*METHODS]
    for ax, method in zip(panels, METHODS):
        curves = [line for line in ax.lines if len(line.get_xdata()) > 2]
        own = [line for line in curves if line.get_color() == plots.STYLES[method]["color"]]
        assert len(curves) == 7 and len(own) == 1 and own[0].get_zorder() == max(line.get_zorder() for line in curves)


def test_an_image_says_what_is_seen_in_it_and_whether_that_is_right(net, digits):
    shown = type("Kept", (), dict(device="cpu", dataset=lambda _, config: digits, model=lambda _, config: net.eval()))()
    config = dict(method="DPNP", eps=0.2, eval_step_size=None)
    figure = plots.draw_images([dict(method="DPNP", config=config)], shown)
    axes = np.array(figure.axes).reshape(6, 2)
    true = [ax.get_xlabel().removeprefix("true: ") for ax in axes[::2, 0]]
    assert len({*true}) == 3
    for name, ax in zip(true, axes[::2, 1]):
        assert len(ax.texts) == 2
        for text in ax.texts:
            wrong, found, sure = re.fullmatch(r"(✗ )?(\d) \((\d+)%\)", text.get_text()).groups()
            assert (found != name) == bool(wrong) == (text.get_color() == "crimson") and 0 <= int(sure) <= 100
    assert "× 2.5" in axes[1, 0].texts[0].get_text()
