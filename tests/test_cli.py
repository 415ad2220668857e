"The command, as a user types it."
import json
import sys

import numpy as np
import PIL.Image
import pytest
import typer
from typer.testing import CliRunner

import advdpnp.cli
import advdpnp.runs
from advdpnp.cli import app, plain_errors, run_step

MODELS = """
import torch

def linear():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10)).eval()

def wrong():
    return 3

made = linear()
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    (tmp_path / "their_models.py").write_text(MODELS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])  # the command adds this folder
    sys.modules.pop("their_models", None)  # of another test
    return tmp_path


def files(folder):
    return sorted(path.name for path in folder.iterdir() if "pycache" not in path.name)


def run(*words):
    return CliRunner().invoke(app, [*map(str, words)])


def test_a_function_s_model_with_a_table_and_a_json(here):
    done = run("evaluate", "their_models:linear", "--dataset", "digits", "--eps", "4/255", "--images", 40,
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
    assert files(here) == ["info.json", "record.json", "their_models.py"]  # nothing half-written


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


@pytest.mark.parametrize("error, code", [(ValueError("no"), 1), (OSError("no"), 1), (FloatingPointError("no"), 1),
                                         (AssertionError("no"), 1), (KeyboardInterrupt(), 130)])
def test_what_a_user_can_mend_is_said_in_a_line(error, code, capsys):
    with pytest.raises(typer.Exit) as found, plain_errors():
        raise error
    assert found.value.exit_code == code and len(capsys.readouterr().err.splitlines()) == 1


def test_a_mistake_of_ours_keeps_its_traceback():
    with pytest.raises(KeyError), plain_errors():
        {}["nothing"]


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
