"The command, as a user types it."
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import PIL.Image
import pytest
import typer
from typer.testing import CliRunner

import advdpnp.cli
import advdpnp.runs
from advdpnp.cli import app, import_model, parse_eps, parse_settings, parse_time, plain_errors, run_step
from advdpnp.data import averaged, load_dataset

from conftest import files

MODELS = """
import pathlib, time, torch

def linear():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10)).eval()

class Slow(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.net = linear()
    def forward(self, x):
        state = pathlib.Path(".out.json.unfinished")
        while pathlib.Path("wait after fgsm").exists() and state.exists() and "fgsm" in state.read_text():
            time.sleep(0.01)
        time.sleep(0.02)
        return self.net(x)

def slow():
    return Slow().eval()

def bright():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 2)).eval()

def wrong():
    return 3

made = linear()

def sized(size):
    return linear()

class Failing(torch.nn.Module):
    def __init__(self, error):
        super().__init__()
        self.error = error
    def forward(self, x):
        raise self.error

def type_error():
    return Failing(TypeError("no")).eval()

def key_error():
    return Failing(KeyError("no")).eval()

def index_error():
    return Failing(IndexError("no")).eval()

def runtime_error():
    return Failing(RuntimeError("no")).eval()

def outputs():
    net = linear()
    net.register_forward_hook(lambda module, inputs, output: dict(logits=output))
    return net
"""

BROKEN = dict(key="{}['a']", syntax="def f(:", importing="import nowhere_at_all", exits="import sys\nsys.exit(3)",
              zero="a = 1\n\nb = a / 0")


def run(*words):
    return CliRunner().invoke(app, [*map(str, words)])


def test_a_function_s_model_with_a_table_and_a_json(here):
    digits = load_dataset("digits")
    np.savez(here / "few.npz", **{f"{axis}_{part}": getattr(digits, f"{axis}_{part}")[:40] for axis in "xy"
                                  for part in ("train", "test")})
    done = run("evaluate", "their_models:linear", "--dataset", "few.npz", "--eps", "4/255",
               "--robustbench", "info.json", "--output", "record.json")
    assert done.exit_code == 0, done.output
    for word in ("autoattack", "… after square", "sanity checks failed", "batch-independent", "record.json"):
        assert word in done.stdout
    assert "pgd20" in done.stderr and "100%" in done.stderr  # progress
    record, info = (json.loads((here / name).read_text()) for name in ("record.json", "info.json"))
    assert record["metrics"]["autoattack"]["n"] == 40
    assert record["metrics"]["autoattack"]["attack"]["eps"] == pytest.approx(4 / 255)
    assert record["versions"]["torch"] and record["device"].startswith("CPU")
    assert info["eps"] == "4/255" and info["autoattack_acc"] == f"{record['metrics']['autoattack']['accuracy']:.2f}"
    assert files(here) == ["few.npz", "info.json", "record.json", "their_models.py"]  # nothing half-written


def test_images_from_an_npz_and_from_a_folder(here, digits):
    np.savez(here / "mine.npz", x_test=digits.x_test[:30], y_test=digits.y_test[:30])
    for i in range(30):
        place = here / "photos" / str(digits.y_test[i])
        place.mkdir(parents=True, exist_ok=True)
        PIL.Image.fromarray(digits.x_test[i, :, :, 0]).save(place / f"{i:02}.png")
    found = []
    for i, source in enumerate(["mine.npz", "photos/"]):
        done = run("evaluate", "their_models:linear", "--dataset", source, "--eps", "0.05", "--attacks", "fgsm",
                   "--output", f"{i}.json", "--quiet")
        assert done.exit_code == 0, done.output
        found.append(json.loads((here / f"{i}.json").read_text())["metrics"])
    assert found[0]["clean"] == found[1]["clean"] and found[0]["clean"]["n"] == 30
    assert found[0]["fgsm"] == found[1]["fgsm"]


def pictures(folder, *splits, count=24):
    "Two classes that differ in brightness."
    rng = np.random.default_rng(0)
    for split in splits:
        for name, grey in (("10", 190), ("9", 60)):
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                x = (grey + rng.integers(-20, 20, (8, 8, 3))).astype(np.uint8)
                PIL.Image.fromarray(x).save(folder / split / name / f"{i}.png")


def test_a_folder_with_train_and_test_in_it_is_trained_on_and_evaluated(here):
    pictures(here / "photos", "train", "test")
    (here / "photos/train/notes.txt").write_text("words")
    words = ["--preset", "quick", "--set", "epochs=2", "--set", "steps=1", "--device", "cpu", "--quiet"]
    done = run("train", "Adv-DPNP", "--dataset", "photos", *words)
    assert done.exit_code == 1 and "photos is a folder: with a slash, photos/" in done.stderr
    done = run("train", "Adv-DPNP", "--dataset", "photos/", *words)
    assert done.exit_code == 0, done.output
    assert done.stdout.splitlines()[0] == (
        "photos, classes and their training + test images: 0 = 9 (24 + 24), 1 = 10 (24 + 24)")
    assert "notes.txt" in done.stdout and done.stdout.count("classes and their") == 1
    folder, = (here / "data/runs/photos").iterdir()
    assert "val_size=4" in folder.name  # a tenth: the preset's 200 are more than there are
    assert run("train", "Adv-DPNP", "--dataset", "./photos/", *words).exit_code == 0  # it is there
    assert run("evaluate", folder, "--attacks", "fgsm", "--quiet").exit_code == 0
    done = run("evaluate", folder, "--dataset", "photos/test/", "--attacks", "fgsm", "--quiet", "--output", "o.json")
    assert done.exit_code == 0 and "test, classes and their test images: 0 = 9 (24), 1 = 10 (24)" in done.stdout
    assert json.loads((here / "o.json").read_text())["n"] == 48


def test_a_subset_is_stratified_and_said(here):
    for k in range(10):
        (here / "sorted" / str(k)).mkdir(parents=True)
        for i in range(30 if k else 270):
            PIL.Image.fromarray(np.full((8, 8), 20 * k + 5, np.uint8)).save(here / "sorted" / str(k) / f"{i}.png")
    done = run("evaluate", "their_models:linear", "--dataset", "sorted/", "--images", 20, "--autoattack-images", 5,
               "--attacks", "fgsm,autoattack", "--quiet", "--output", "o.json")
    assert done.exit_code == 0, done.output
    record = json.loads((here / "o.json").read_text())
    assert record["subset"] == dict(order="stratified", seed=0, of=540) and len(record["remarks"]) == 1
    assert "20 of 540 test images, stratified, seed 0." in done.stdout
    assert "The 5 of 540 test images that are used have none of class" in done.stdout


def test_an_old_terminal_gets_other_characters_and_a_record(here):
    pictures(here / "photos", "\u72ac")  # dog
    words = ["evaluate", "their_models:bright", "--dataset", "photos/\u72ac/", "--attacks", "autoattack",
             "--images", "2", "--output", "o.json", "--quiet"]
    done = subprocess.run([sys.executable, "-m", "advdpnp", *words], cwd=here, capture_output=True,
                          env=os.environ | {"PYTHONIOENCODING": "cp437"})
    assert done.returncode == 0, done.stderr.decode()
    said = done.stdout.decode("cp437")
    assert "after square" in said and said.index("o.json") < said.index("| clean |") and (here / "o.json").exists()


def test_interrupted_it_goes_on(here):
    "In processes of its own: a signal ends the first, the second goes on."
    words = ["evaluate", "their_models:slow", "--dataset", "digits", "--eps", "0.1", "--images", "40", "--batch-size",
             "10", "--attacks", "fgsm,pgd20", "--output", "out.json"]
    wait, state = here / "wait after fgsm", here / ".out.json.unfinished"
    wait.touch()
    process = subprocess.Popen([sys.executable, "-m", "advdpnp", *words], cwd=here, stderr=subprocess.PIPE, text=True)
    while not (state.exists() and "fgsm" in state.read_text()):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    wait.unlink()
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130 and "the same command goes on" in said and state.exists()
    done = run(*words)
    assert done.exit_code == 0 and (here / "out.json").exists() and not state.exists()


MODEL, DATA = ["their_models:linear"], ["--dataset", "digits"]
RAISED = f"their_models.py, line {MODELS[:MODELS.index('raise self.error')].count(chr(10)) + 1})"


@pytest.mark.parametrize("words, message", [
    (["their_models:wrong", *DATA], "their_models:wrong returns int: expected a torch.nn.Module"),
    (["their_models:gone", *DATA], "their_models:gone cannot be imported"),
    (["nowhere", *DATA], "nowhere is neither a file or folder nor package.module:function"),
    (["their_models.py", *DATA], "which function in it returns the model? their_models.py:function"),
    (["./gone.py:net", *DATA], "./gone.py:net cannot be imported"),
    (["./their_models.py:linaer", *DATA], "there is no linaer in ./their_models.py: did you mean linear?"),
    (["./their_models.py:", *DATA], "names no function"),
    (["./their_models.py:made", *DATA], "is a model: expected a function"),
    (["./their_models.py:sized", *DATA], "sized needs size: expected a function without arguments"),
    (["their_models:type_error", *DATA], "with TypeError: no ("),
    (["their_models:key_error", *DATA], "with KeyError: 'no' ("),
    (["their_models:index_error", *DATA], RAISED),
    (["their_models:runtime_error", *DATA], RAISED),
    (["their_models:outputs", *DATA], "give lambda x: model(x)['logits'] as the model"),
    ([*MODEL, "--dataset", "digit"], "did you mean 'digits'"),
    ([*MODEL, *DATA, "--eps", "8:255"], "expected a number or a fraction"),
    ([*MODEL, *DATA, "--norm", "L2", "--eps", "128"], "no two images of 64 pixels are further apart than 8 in l2"),
    ([*MODEL, *DATA, "--output", "their_models.py"], "is there already"),
    ([*MODEL, "--dataset", "nothing/"], "is no folder of images"),
])
def test_mistakes_get_a_sentence(here, words, message):
    done = run("evaluate", *words)
    assert done.exit_code == 1 and message in done.output and "Traceback" not in done.output
    assert done.stderr.startswith("error: ") and files(here) == ["their_models.py"]


@pytest.mark.parametrize("name", BROKEN)
def test_a_module_that_cannot_be_imported_is_named_with_its_line(here, name):
    (here / f"{name}_models.py").write_text(BROKEN[name])
    for place in (f"{name}_models", f"./{name}_models.py", here / f"{name}_models.py"):
        done = run("evaluate", f"{place}:net", *DATA)
        line = BROKEN[name].count("\n") + 1
        assert done.exit_code == 1 and done.stderr.startswith(f"error: {place}:net cannot be imported")
        assert f"{name}_models.py, line {line})" in done.stderr and len(done.stderr.splitlines()) == 1


def test_a_function_of_a_file_beside_its_neighbours(here, monkeypatch):
    (here / "deep").mkdir()
    (here / "deep/nets.py").write_text("from of_nets import linear as net")
    (here / "deep/of_nets.py").write_text(MODELS)
    words = [*DATA, "--eps", "0.05", "--attacks", "fgsm", "--images", 10, "--quiet"]
    assert run("evaluate", "deep/nets.py:net", *words).exit_code == 0
    assert (here / "net-digits-linf-0.05.json").exists()
    monkeypatch.chdir(here / "deep")
    assert run("evaluate", "../their_models.py:linear", *words, "--norm", "Linf").exit_code == 0
    assert json.loads((here / "deep/linear-digits-linf-0.05.json").read_text())["metrics"]["fgsm"]["n"] == 10


def test_another_file_of_a_run_is_not_called_damaged(here):
    for name in ("config.json", "state.pt", "best.safetensors"):
        (here / name).write_text("{}")
    done = run("evaluate", "state.pt", *DATA)
    assert "state.pt is no file of a run's weights: expected a .safetensors file or the folder" in done.stderr
    assert "delete" not in done.stderr


@pytest.mark.parametrize("words, message", [
    (["train", "Trades"], "did you mean 'TRADES'"),
    (["train", "TRADES", "--preset", "qick"], "did you mean 'quick'"),
    (["train", "TRADES", "--set", "lr=0,1"], "lr is '0,1': expected a number"),
    (["train", "TRADES", "--set", "lr=inf"], "lr is 'inf': expected a number"),
    (["train", "TRADES", "--set", "epochs=1."], "epochs is 1.0: expected a whole number"),
    (["train", "TRADES", "--dataset", "photos/"], "photos is no folder of images"),
    (["train", "TRADES", "--time-limit", "soon"], "expected something like 90s, 9m or 1h30m"),
])
def test_mistakes_in_other_commands_get_a_sentence(here, words, message):
    done = run(*words)
    assert done.exit_code == 1 and message in done.stderr and "Traceback" not in done.output
    assert files(here) == ["their_models.py"]


@pytest.mark.parametrize("parse, text, message", [
    (parse_eps, "8:255", "eps is '8:255': expected a number or a fraction"),
    (parse_eps, "1/0", "eps is '1/0'"),
    (parse_eps, "1e999", "eps is '1e999'"),
    (parse_eps, "nan", "eps is 'nan'"),
    (parse_time, "", "time limit is '': expected something like"),
    (parse_time, "9min", "time limit is '9min'"),
    (parse_settings, ["preset=quick"], "preset has a place of its own"),
    (import_model, "torch:no_such", "torch:no_such cannot be imported"),
    (import_model, "torch:no_grad.__name__", "cannot be imported"),
    (import_model, "math:pi", "math:pi is a float: expected a function without arguments"),
    (import_model, "math:cos", r"math:cos needs x: expected a function without arguments"),
    (import_model, "their_models:linear:made", "their_models:linear:made cannot be imported"),
    (import_model, "their_models:made", "their_models:made is a model: expected a function"),
])
def test_words_that_mean_nothing(here, parse, text, message):
    with pytest.raises(ValueError, match=message):
        parse(text)


def test_numbers_as_people_write_them():
    found = parse_settings(["lr=.1", "weight_decay=1.", "epochs=+3", "beta=5e-1", "ema= .5", "eps=8 / 255"])
    assert found == dict(lr=0.1, weight_decay=1.0, epochs=3, beta=0.5, ema=0.5, eps=8 / 255)


@pytest.mark.parametrize("error, code", [(ValueError("no"), 1), (OSError("no"), 1), (FloatingPointError("no"), 1),
                                         (AssertionError("no"), 1), (KeyboardInterrupt(), 130)])
def test_what_a_user_can_mend_is_said_in_a_line(error, code, capsys):
    with pytest.raises(typer.Exit) as found, plain_errors():
        raise error
    assert found.value.exit_code == code and len(capsys.readouterr().err.splitlines()) == 1


def test_a_mistake_of_ours_keeps_its_traceback():
    with pytest.raises(KeyError), plain_errors():
        {}["nothing"]


def test_a_reader_that_stops_reading_is_no_error():
    command = [sys.executable, "-m", "advdpnp", "numbers", "small", "--plan"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                          cwd=Path(__file__).parent.parent) as done:
        done.stdout.close()  # as `| head` does
        assert done.stderr.read() == ""


def test_a_notebook_that_is_not_there_is_a_mistake_in_the_command(here):
    done = run("notebook", "figure9.ipynb")
    assert done.exit_code == 2 and "does not exist" in done.stderr
    (here / "figure9.ipynb").write_text("{}")
    assert "parameter 'quick': expected name=value" in run("notebook", "figure9.ipynb", "quick").stderr


@pytest.fixture
def clone(here, monkeypatch):
    "A folder that looks like a clone, with a plan of three steps."
    page = dict(cells=[dict(cell_type="code", source=["words = 'none'"], metadata=dict(tags=["parameters"])),
                       dict(cell_type="markdown", source=["# A page"], metadata={}),
                       dict(cell_type="code", metadata={},
                            source=["from pathlib import Path\n", "Path('../made').write_text(words)"])])
    (here / "nbs").mkdir()
    (here / "nbs/figure1.ipynb").write_text(json.dumps(page))
    plan = [["notebook", "figure1", "words=once"], ["evaluate", "gone.safetensors", "--output", "gone.json"],
            ["evaluate", "their_models.py", "--output", "nbs/figure1.ipynb"], ["chosen"]]
    monkeypatch.setitem(advdpnp.runs.PLANS, "quick", plan)
    return here


def test_a_plan_is_carried_out(clone):
    done = run("numbers", "quick")
    assert done.exit_code == 0, done.output
    assert (clone / "made").read_text() == "once"
    assert done.stdout.splitlines() == [
        "notebook figure1 words=once", "evaluate gone.safetensors --output gone.json",
        "  left out: these weights are not here", "evaluate their_models.py --output nbs/figure1.ipynb", "  done",
        "chosen", "  done"]


def test_a_plan_stops_in_time(clone):
    done = run("numbers", "quick", "--minutes", 0)
    assert done.exit_code == 0 and "time is up; the same command goes on" in done.stdout
    assert not (clone / "made").exists()
    with pytest.raises(TimeoutError):
        run_step(["notebook", "figure1"], "quick", 0.01)


def test_a_step_that_fails_is_named_when_time_runs_out(clone, monkeypatch):
    def step(step, *_):
        if step[0] == "notebook":
            return False
        raise TimeoutError

    monkeypatch.setattr(advdpnp.cli, "run_step", step)
    done = run("numbers", "quick", "--pack", clone / "taken")
    assert done.exit_code == 1 and "time is up" in done.stdout and "failed: notebook figure1" in done.stderr
    assert run("numbers", "quick", "--pack", clone / "taken").exit_code == 1
    assert (clone / "taken/pack-0000").exists()  # the second took the place of the first
    (clone / "taken/mine.txt").touch()
    assert "holds mine.txt: expected a new folder" in run("numbers", "quick", "--pack", clone / "taken").stderr


def test_models_of_two_folders_have_neighbours_of_their_own(here):
    for name in ("a", "b"):
        (here / name).mkdir()
        (here / name / "layers.py").write_text(f"who = {name!r}")
        (here / name / "models.py").write_text(
            "import pickle\nimport torch\nfrom layers import who\n\n\nclass Net(torch.nn.Linear):\n    pass\n\n\n"
            "def net():\n    made = Net(1, 1)\n    made.who = who\n"
            "    assert pickle.loads(pickle.dumps(made)).who == who\n    return made\n")
    assert [import_model(f"{name}/models.py:net").who for name in "aba"] == ["a", "b", "a"]


def test_names_of_others_cannot_speak_to_the_terminal(capsys):
    advdpnp.cli.say_data(SimpleNamespace(about=["classes: \x1b]0;owned\x07 and 犬"]))
    assert "\x1b" not in (said := capsys.readouterr().out) and "犬" in said


def test_a_step_that_fails_is_named_when_the_others_are_done(clone, monkeypatch):
    monkeypatch.setattr(advdpnp.cli, "run_step", lambda step, *_: step[0] != "notebook")
    done = run("numbers", "quick")
    assert done.exit_code == 1 and "failed: notebook figure1 words=once" in done.stderr
    assert done.stdout.splitlines()[-1] == "chosen"


def test_what_nobody_has_chosen_is_asked_for(clone, monkeypatch):
    monkeypatch.setitem(advdpnp.runs.PLANS, "quick", [["chosen"]])
    monkeypatch.delitem(advdpnp.runs.CHOSEN, "quick")
    done = run("numbers", "quick")
    assert done.exit_code == 1 and "put what data/results/figure1.quick.csv says into CHOSEN" in done.stderr


def test_a_plan_is_shown(here):
    shown = run("numbers", "small", "--show").stdout.splitlines()
    assert shown[:2] == ["table 1", "table 4"] and len(shown) == len(advdpnp.runs.PLANS["small"])


def test_help():
    overview = run("--help").stdout
    assert "evaluate" in overview and "Measure a model" in overview and "numbers" in overview
    for command in ("evaluate", "train", "runs", "table", "publish", "notebook", "numbers"):
        assert f"advdpnp {command}" in run(command, "--help").stdout.split("Examples:")[1]


def test_a_model_is_opened_once(tmp_path, monkeypatch):
    "What is measured is what is in the report, also of a function that gives another network each time."
    (tmp_path / "counted.py").write_text(
        "import torch\nmade = []\n\n\ndef model():\n    made.append(1)\n"
        "    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    words = "evaluate counted:model --dataset digits --eps 0.1 --images 20 --attacks fgsm --output record.json"
    done = CliRunner().invoke(app, [*words.split(), "--report", "page.html", "--quiet"])
    assert done.exit_code == 0, done.output
    assert len(sys.modules["counted"].made) == 1


def test_an_interrupted_report_is_written_by_the_same_command_without_new_attacks(here, monkeypatch):
    words = ["evaluate", "their_models.py:linear", "--dataset", "digits", "--attacks", "fgsm", "--images", 20,
             "--report", "page.html", "--output", "net.json"]
    monkeypatch.setattr(sys, "argv", ["advdpnp", *map(str, words)])
    with monkeypatch.context() as patched:
        patched.setattr(advdpnp.cli, "write_report", interrupted)
        assert run(*words).exit_code == 130
    written = (here / "net.json").stat().st_mtime_ns
    done = run(*words)
    assert done.exit_code == 0 and (here / "page.html").exists(), done.output
    assert (here / "net.json").stat().st_mtime_ns == written
    assert "net.json is there already" in run(*words[:-4], *words[-2:]).stderr


def interrupted(*_):
    raise KeyboardInterrupt


def test_what_is_there_is_packed_when_a_plan_stops_at_a_choice(clone, monkeypatch):
    monkeypatch.delitem(advdpnp.runs.CHOSEN, "quick")
    done = run("numbers", "quick", "--pack", clone / "taken")
    assert done.exit_code == 1 and "CHOSEN" in done.stderr and (clone / "taken/pack-0000").exists()


def test_a_record_of_smaller_images_finds_them():
    small = averaged(load_dataset("digits"), 4)
    record = dict(dataset="digits-4px", data_sha256=small.sha256)
    assert advdpnp.cli.data_of(record, "digits", Path("data")).sha256 == small.sha256
