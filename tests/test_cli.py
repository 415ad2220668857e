"The command, as a user types it."
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from typer.testing import CliRunner

from advdpnp.cli import app

ADVDPNP = Path(sys.executable).parent / "advdpnp"
MODELS = """
import time, torch

def linear():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10)).eval()

class Slow(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.net = linear()
    def forward(self, x):
        time.sleep(0.02)
        return self.net(x)

def slow():
    return Slow().eval()

def wrong():
    return 3
"""


@pytest.fixture
def here(tmp_path):
    (tmp_path / "their_models.py").write_text(MODELS)
    return tmp_path


def advdpnp(here, *words):
    return subprocess.run([ADVDPNP, "evaluate", *map(str, words)], cwd=here, capture_output=True, text=True)


def test_a_function_s_model_with_a_table_and_a_json(here):
    done = advdpnp(here, "their_models:linear", "--dataset", "digits", "--eps", "4/255", "--images", 40,
                   "--robustbench", "info.json", "--output", "record.json")
    assert done.returncode == 0, done.stderr
    for word in ("autoattack", "… after square", "sanity checks failed", "batch-independent", "record.json"):
        assert word in done.stdout
    assert "pgd20" in done.stderr and "100%" in done.stderr  # progress
    record, info = (json.loads((here / name).read_text()) for name in ("record.json", "info.json"))
    assert record["metrics"]["autoattack"]["n"] == 40
    assert record["metrics"]["autoattack"]["attack"]["eps"] == pytest.approx(4 / 255)
    assert record["versions"]["torch"] and record["device"].startswith("CPU")
    assert info["eps"] == "4/255" and info["autoattack_acc"] == f"{record['metrics']['autoattack']['accuracy']:.2f}"
    left = sorted(path.name for path in here.iterdir() if "pycache" not in path.name)
    assert left == ["info.json", "record.json", "their_models.py"]  # nothing half-written


def test_images_from_an_npz_and_from_a_folder(here, digits):
    np.savez(here / "mine.npz", x_test=digits.x_test[:30], y_test=digits.y_test[:30])
    for i in range(30):
        place = here / "photos" / str(digits.y_test[i])
        place.mkdir(parents=True, exist_ok=True)
        PIL.Image.fromarray(digits.x_test[i, :, :, 0]).save(place / f"{i:02}.png")
    found = []
    for i, source in enumerate(["mine.npz", "photos/"]):
        done = advdpnp(here, "their_models:linear", "--dataset", source, "--eps", "0.05", "--attacks", "fgsm",
                       "--output", f"{i}.json", "--quiet")
        assert done.returncode == 0, done.stderr
        found.append(json.loads((here / f"{i}.json").read_text())["metrics"])
    assert found[0]["clean"] == found[1]["clean"] and found[0]["clean"]["n"] == 30
    assert found[0]["fgsm"] == found[1]["fgsm"]


def test_interrupted_it_goes_on(here):
    words = [ADVDPNP, "evaluate", "their_models:slow", "--dataset", "digits", "--eps", "0.1", "--images", "40",
             "--batch-size", "10", "--attacks", "fgsm,pgd20", "--output", "out.json"]
    process = subprocess.Popen(words, cwd=here, stderr=subprocess.PIPE, text=True)
    state = here / ".out.json.unfinished"
    while not (state.exists() and "pgd20" in state.read_text()):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate()
    assert process.returncode == 130 and "the same command goes on" in said and state.exists()
    done = subprocess.run(words, cwd=here, capture_output=True, text=True)
    assert done.returncode == 0 and (here / "out.json").exists() and not state.exists()


@pytest.mark.parametrize("words, message", [
    (["their_models:linear"], "which data? name a data set with --dataset"),
    (["their_models:wrong", "--dataset", "digits"], "their_models:wrong returns int: expected a torch.nn.Module"),
    (["their_models:gone", "--dataset", "digits"], "their_models:gone cannot be imported"),
    (["nowhere", "--dataset", "digits"], "nowhere is neither a file or folder nor package.module:function"),
    (["their_models:linear", "--dataset", "digit"], "did you mean 'digits'"),
    (["their_models:linear", "--dataset", "digits", "--eps", "8"], "eps is 8.0: expected 0 to 1"),
    (["their_models:linear", "--dataset", "digits", "--eps", "8:255"], "expected a number or a fraction"),
    (["their_models:linear", "--dataset", "digits", "--attacks", "pgd"], "unknown attack 'pgd': did you mean 'pgd20'"),
    (["their_models:linear", "--dataset", "digits", "--attacks", "prototype"], "unknown attack 'prototype'"),
    (["their_models:linear", "--dataset", "digits", "--norm", "l2"], "--norm l2 needs --eps"),
    (["their_models:linear", "--dataset", "digits", "--robustbench", "x.json", "--autoattack-images", "5"],
     "on the images of the clean accuracy"),
    (["their_models:linear", "--dataset", "digits", "--norm", "l1"], "unknown norm 'l1'"),
    (["their_models:linear", "--dataset", "digits", "--output", "x.json", "--robustbench", "x.json"],
     "--output and --robustbench are both x.json"),
    (["their_models:linear", "--dataset", "digits", "--output", "their_models.py"], "is there already"),
    (["their_models:linear", "--dataset", "nothing/"], "is no folder of images"),
])
def test_mistakes_get_a_sentence(here, words, message, monkeypatch):
    monkeypatch.chdir(here)
    done = CliRunner().invoke(app, ["evaluate", *words])
    assert done.exit_code == 1 and message in done.output and "Traceback" not in done.output
    assert sorted(p.name for p in here.iterdir() if "pycache" not in p.name) == ["their_models.py"]


def test_help():
    overview = subprocess.run([ADVDPNP, "--help"], capture_output=True, text=True).stdout
    assert "evaluate" in overview and "Measure a model" in overview
