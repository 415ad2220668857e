"The report: what it says, that it holds what others call things, and how it looks in a browser."
import base64
import copy
import dataclasses
import html
import re
import shutil
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import advdpnp.report
from advdpnp.cli import app, parse_eps
from advdpnp.core import read_json, write_json
from advdpnp.autoattack import AutoAttack
from advdpnp.attacks import described
from advdpnp.evaluation import evaluate, images_of, verdicts_in
from advdpnp.report import LARGEST, command_of, first_answer, look, report, second_answer

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
HOSTILE = ("<script>alert(1)</script>", "\"><img src=x onerror=alert(1)>", "</svg><b>&amp;", "$\\frac{$_^", "{{ 7*7 }}",
           "a|b`c`", "\x00\x1b[31m\u202eevil", "javascript:alert(1)", "犬 ü", "x" * 500)
SCREENS = dict(wide=(1400, "light"), narrow=(420, "light"), dark=(1400, "dark"))


def linear():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10)).eval()


@pytest.fixture(scope="module")
def measured(_defended, digits):
    "A network and its record."
    return _defended, evaluate(_defended, digits, [advdpnp.FGSM(0.2), advdpnp.PGD(0.2)], images=120, check_images=40,
                               quiet=True)


@pytest.fixture(scope="module")
def page(measured, digits):
    net, record = measured
    return report(record | dict(model="models.py:net"), net, digits).html


@pytest.fixture(scope="module")
def hostile(measured, digits):
    "A page in which everything that somebody else names is an attack on it."
    net, record = measured
    data = dataclasses.replace(digits, class_names=HOSTILE, name=HOSTILE[0])
    checks = [dict(name=HOSTILE[1], passed=False, found=HOSTILE[0], expected=HOSTILE[2]), *record["checks"]]
    metrics = record["metrics"] | {HOSTILE[2]: record["metrics"]["fgsm"]}
    kept = " ".join([record["verdicts"], record["verdicts"].split()[1]])
    evil = record | dict(checks=checks, metrics=metrics, verdicts=kept, dataset=HOSTILE[0], commit=HOSTILE[1],
                         model=HOSTILE[1], remarks=[HOSTILE[0]], versions={HOSTILE[1]: HOSTILE[2]})
    return report({HOSTILE[0]: evil, HOSTILE[3]: evil}, {HOSTILE[0]: net}, data).html


def test_the_answer_comes_first_and_is_the_record(page, measured):
    record = measured[1]
    clean, worst = record["metrics"]["clean"], record["metrics"]["worst"]
    body = html.unescape(page.partition("</h1>")[2])
    first, second = re.findall("<p>(.*?)</p>", body)[:2]
    assert first == first_answer(record) and second == second_answer(record)
    assert first.startswith(f"Of 120 images, {clean['correct']} ({clean['accuracy']:.1f}%)")
    assert f". {worst['correct']} ({worst['accuracy']:.1f}%) survive every one of" in first
    assert f"the 95% interval is {worst['low']:.1f}%" in first
    assert "FGSM and PGD-20" in first and "0.2" in first


@pytest.mark.parametrize("passed, words", [(False, "Read this number with care"), (True, "No check speaks against"),
                                           (None, "1 more could not be run")])
def test_the_second_sentence_is_about_the_checks(passed, words):
    checks = [dict(name="noise", passed=passed, found="a", expected="b"),
              dict(name="steps", passed=True, found="a", expected="b")]
    assert words in second_answer(dict(checks=checks))


def test_a_false_defence_is_not_believed(digits):
    "Logits so large that the loss has no gradient."
    net = linear()
    with torch.no_grad():
        net[1].weight.mul_(1e6)
    record = evaluate(net, digits, [advdpnp.FGSM(0.1)], images=30, quiet=True)
    text = html.unescape(report(record, net, digits).html)
    assert "Read this number with care" in text and "answer failed" in text
    assert "Logits are so large that the loss has no gradient" in text


def test_classes_are_counted_as_the_verdicts_say(page, measured, digits):
    record = measured[1]
    labels, right = digits.y_test[images_of(record, digits)], verdicts_in(record)["worst"].numpy()
    table = page.partition("<caption>Accuracy of each class</caption>")[2].partition("</table>")[0]
    rows = re.findall(r'<th scope="row">(.*?)</th><td>(\d+)</td><td>[\d.]+</td><td>([\d.]+)</td>', table)
    assert len(rows) == 10
    for name, n, robust in rows:
        assert (int(n), robust) == ((labels == int(name)).sum(), f"{100 * right[labels == int(name)].mean():.1f}")
    assert [float(robust) for *_, robust in rows] == sorted(float(robust) for *_, robust in rows)


def test_a_class_that_the_first_model_did_not_see_is_shown_of_the_second(measured, digits):
    few = evaluate(linear(), digits, [advdpnp.FGSM(0.2)], images=120, limits=dict(fgsm=5), check_images=5, quiet=True)
    text = report(dict(few=few, all=measured[1]), None, digits).html
    tables = [part.partition("</table>")[0] for part in re.split(r"[Aa]ccuracy of each class</caption>", text)[1:]]
    assert [table.count('<th scope="row">') for table in tables] == [5, 10]


def test_what_is_said_to_break_an_image_breaks_it_and_stays_in_its_budget(measured, digits):
    net, record = measured
    seen = look(net, digits, record)
    x = torch.from_numpy(digits.x_test[seen.places]).permute(0, 3, 1, 2) / 255
    moved, broken = seen.moved.float(), (seen.broken_at > 0) & np.isfinite(seen.broken_at)
    limit = np.where(np.isinf(seen.broken_at), seen.budgets[-1], seen.broken_at)
    assert (moved.abs().flatten(1).amax(1).numpy() <= limit * 1.001 + 1e-6).all()
    assert (x + moved).min() > -1e-3 and (x + moved).max() < 1 + 1e-3
    wrong = seen.said.argmax(1).numpy() != seen.labels
    assert wrong[broken].all() and not wrong[np.isinf(seen.broken_at)].any() and broken.sum() > 20
    with torch.no_grad():  # half precision moves an image by next to nothing
        assert (net.eval()(x + moved).argmax(1) == seen.said.argmax(1)).float().mean() > 0.95


def test_the_model_is_left_as_it_was(measured, digits):
    net, record = copy.deepcopy(measured[0]).train(), measured[1]
    before = {name: value.clone() for name, value in net.state_dict().items()}
    state = torch.get_rng_state()
    report(record, net, digits)
    assert net.training and torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())


def test_what_cannot_be_shown_is_said(measured, digits):
    record = measured[1]
    alone, with_data = report(record).html, report(record, None, digits).html
    assert "the data set is needed" in alone and "the model and the data set are needed" in html.unescape(alone)
    assert "the data set is needed" not in with_data and "Accuracy of each class" in with_data
    old = {key: value for key, value in record.items() if key != "verdicts"}
    assert "earlier version, without verdicts" in report(old, None, digits).html
    assert "no attack was run" in report(evaluate(linear(), digits, images=20), linear(), digits).html


def test_two_models_are_compared_on_the_same_images(measured, digits):
    net, record = measured
    weak = evaluate(linear(), digits, [advdpnp.FGSM(0.2), advdpnp.PGD(0.2)], images=120, check_images=40, quiet=True)
    text = html.unescape(report({"ours": record, "linear": weak}, {"ours": net, "linear": linear()}, digits).html)
    assert "Differences on the same images" in text and re.search(r"[\d.]+ points better \[", text)
    assert "Images on which ours and linear disagree most" in text and "linear is right: " in text
    assert "linear: reliability" in text and "ours: reliability" in text
    other = weak | dict(data_sha256="0" * 64)
    assert "cannot be compared image by image" in report({"ours": record, "other": other}).html
    with pytest.raises(ValueError, match="other data than digits"):
        report({"ours": record, "other": other}, None, digits)


def test_names_of_others_are_words_and_nothing_else(hostile):
    for words in ("<script", "<img src=x", "</svg><b>", "49", "\x1b", "\x00", "\u202e"):
        shown = re.sub(r"data:image/[\w+]+;base64,[\w+/=]+|\d+(\.\d+)?", "", hostile) if words == "49" else hostile
        assert words not in shown, words
    assert "&lt;script&gt;" in hostile and "{{ 7*7 }}" in hostile and "犬" in hostile
    for svg in re.findall(r"data:image/svg\+xml;base64,([\w+/=]+)", hostile):
        root = ElementTree.fromstring(base64.b64decode(svg))  # well-formed, whatever the names are
        assert not [e for e in root.iter() if e.tag.endswith(("}script", "}b", "}image"))]


@pytest.mark.parametrize("which", ["page", "hostile"])
def test_a_page_is_one_file_and_fetches_nothing(request, which):
    text = request.getfixturevalue(which)
    assert len(text.encode()) <= LARGEST
    assert not re.findall(r"""(?:src|href)\s*=\s*["'](?!data:|#)""", text)
    assert "url(" not in text and "@import" not in text and "<script" not in text
    assert all(alt for alt in re.findall(r'<img [^>]*?alt="([^"]*)"', text))
    for svg in re.findall(r"data:image/svg\+xml;base64,([\w+/=]+)", text):
        found = re.findall(r'(?:href|src)="(?!#)[^"]*"|url\((?!#)[^)]*\)', base64.b64decode(svg).decode())
        assert not found


def test_a_page_of_large_photographs_stays_small():
    random = np.random.RandomState(0)
    data = advdpnp.Dataset("noise", np.zeros((0, 160, 160, 3), np.uint8), np.zeros(0, np.int64),
                           random.randint(0, 256, (24, 160, 160, 3), np.uint8), np.arange(24) % 2)
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.AvgPool2d(40), torch.nn.Flatten(), torch.nn.Linear(48, 2)).eval()
    record = evaluate(net, data, [advdpnp.FGSM(8 / 255)], check_images=2, quiet=True)
    text = report([record, record], [net, net], data).html
    assert 100_000 < len(text.encode()) <= LARGEST and "overview" in text


def test_a_page_that_would_be_too_large_shows_fewer_pictures(measured, digits, monkeypatch):
    net, record = measured
    whole = report(record, net, digits).html
    monkeypatch.setattr(advdpnp.report, "LARGEST", len(whole.encode()) - 10_000)
    text = report(record, net, digits).html
    assert len(text.encode()) <= advdpnp.report.LARGEST and "Only 6 pictures of each kind" in text
    monkeypatch.setattr(advdpnp.report, "LARGEST", 1000)
    with pytest.raises(ValueError, match="report on fewer"):
        report(record)


@pytest.mark.skipif(not CHROMIUM, reason="there is no Chromium here: Debian's package chromium has it")
@pytest.mark.parametrize("which", ["page", "hostile"])
def test_axe_finds_no_violation_in_a_browser(request, tmp_path, which):
    "Wide, narrow and dark; nothing is fetched, nothing runs, nothing is cut off."
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe-playwright-python is not installed")
    file = tmp_path / "report.html"
    file.write_text(request.getfixturevalue(which), encoding="utf-8")
    with sync_api.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        for screen, (width, scheme) in SCREENS.items():
            tab, said = browser.new_page(viewport=dict(width=width, height=900), color_scheme=scheme), []
            tab.on("console", lambda message: said.append(message.text))
            tab.on("dialog", lambda dialog: said.append("a dialog"))
            tab.on("request", lambda r: said.append(r.url) if not r.url.startswith(("data:", file.as_uri())) else None)
            tab.goto(file.as_uri())
            found = axe.Axe().run(tab).response
            assert [(v["id"], v["nodes"][0]["html"]) for v in found["violations"]] == [], screen
            assert len(found["passes"]) > 15 and said == [], screen
            assert tab.evaluate("document.documentElement.scrollWidth") <= width, screen
            blank = tab.evaluate("[...document.images].filter(i => !i.complete || !i.naturalWidth).length")
            assert blank == 0 and tab.evaluate("document.images.length") > 20, screen
        browser.close()


MODELS = """
import torch

def linear():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10)).eval()
"""


def test_the_command_writes_a_page_beside_the_record(here):
    words = ["evaluate", "their_models:linear", "--dataset", "digits", "--images", "20", "--attacks", "fgsm,pgd20",
             "--quiet", "--output", "a.json", "--report"]
    done = CliRunner().invoke(app, [*words, "a.json"])
    assert done.exit_code == 1 and "--output and --report are both a.json" in done.stderr
    done = CliRunner().invoke(app, [*words, "a.html"])
    assert done.exit_code == 0, done.output
    text = (here / "a.html").read_text(encoding="utf-8")
    assert first_answer(read_json(here / "a.json")).replace("&", "&amp;") in text and "last longest" in text
    done = CliRunner().invoke(app, [*words, "a.html"])
    assert done.exit_code == 1 and "is there already" in done.stderr
    done = CliRunner().invoke(app, ["report", "a.json", "--dataset", "digits", "--output", "b.html"])
    assert done.exit_code == 0 and done.stdout == "b.html\n"
    assert "Accuracy of each class" in (here / "b.html").read_text(encoding="utf-8")


def test_files_that_are_no_records_are_refused(here, measured):
    write_json("record.json", measured[1])
    text = (here / "record.json").read_text()
    (here / "cut.json").write_text(text[:500])
    (here / "changed.json").write_text(text.replace('"n": 120', '"n": 121', 1))
    write_json("other.json", dict(data_sha256="a", dataset="digits", n=1))
    write_json("list.json", [1, 2])
    for name, said in (("cut", "is damaged"), ("changed", "is damaged"), ("other", "lacks metrics"),
                       ("list", "is not a record"), ("nowhere", "nowhere.json")):
        done = CliRunner().invoke(app, ["report", f"{name}.json"])
        assert done.exit_code == 1 and said in done.stderr and done.stderr.count("\n") == 1, (name, done.stderr)
        assert not (here / f"{name}.html").exists()
    with pytest.raises(ValueError, match="expected one for each"):
        report(measured[1], [measured[0]] * 2)
    assert first_answer(measured[1]).replace("&", "&amp;") in report("record.json").html
    with pytest.raises(ValueError, match="there are no records to report on"):
        report({"A": []})
    with pytest.raises(ValueError, match="lacks accuracy of clean, .*n of clean"):
        report(measured[1] | dict(metrics=dict(clean={})))


def test_a_record_is_made_again_with_the_same_budget_and_numbers(measured):
    record = measured[1]
    words = command_of(record).split()
    assert parse_eps(words[words.index("--eps") + 1]) == record["metrics"]["pgd20"]["attack"]["eps"]
    metrics = copy.deepcopy(record["metrics"]) | dict(autoattack=dict(n=7, attack=described(AutoAttack(0.2))))
    assert "--autoattack-images 7" in command_of(record | dict(metrics=metrics))
    metrics["pgd20"]["attack"] |= dict(steps=21)  # the command has 20
    assert command_of(record | dict(metrics=metrics)) == ""
    metrics["mine"] = metrics.pop("pgd20")
    assert command_of(record | dict(metrics=metrics)) == ""


def test_a_model_of_another_record_is_refused(measured, digits):
    net, record = measured
    with pytest.raises(ValueError, match="the model is not the one that the record is of"):
        report(record, linear(), digits)


def test_files_may_be_given_one_by_one_or_by_name(measured, tmp_path):
    file = tmp_path / "a.json"
    write_json(file, measured[1])
    said = first_answer(measured[1]).replace("&", "&amp;")
    for given in ([file, str(file)], {"ours": file, "theirs": str(file)}):
        assert report(given).html.count(said) >= 1


def test_without_attacks_no_worst_case_is_shown(digits):
    net = linear()
    page = report(evaluate(net, digits, images=50, quiet=True), net, digits).html
    assert "worst case (%)" not in page and "no attack was run" in page


def test_of_models_that_share_no_images_none_are_shown_as_different(measured, digits):
    net, record = measured
    part = evaluate(net, digits, [advdpnp.FGSM(0.2)], images=30, check_images=5, quiet=True)
    whole = evaluate(net, digits, [advdpnp.FGSM(0.2)], check_images=5, quiet=True)
    assert "disagree most" not in report({"a": part, "b": whole, "c": part}, [net] * 3, digits).html


def test_a_curve_that_rises_is_not_said_to_end_too_high():
    from advdpnp.report import Subject, end_of_curve

    curve, failed = dict(eps=[0, 0.1, 0.2, 0.5], accuracy=[98, 40, 44, 9]), dict(name="budget", passed=False)
    assert "rises somewhere, or ends above" in end_of_curve(Subject("rising", dict(curve=curve, checks=[failed])))
