"""Nothing is lost: killed at random moments, and asked to stop, everything ends as if nobody had disturbed it.

`make kill` does with a hundred kills what the suite does with a few.
"""
import json
import os
import random
import signal
import sys
import time

import pytest
from children import start

import advdpnp.data
from advdpnp.core import read_json
from advdpnp.runs import PLANS, RECORDS, Ledger, make_config
from advdpnp.tables import make_table
from advdpnp.training import Trainer, load_state

KILLS = int(os.environ.get("ADVDPNP_KILLS", 8))
TINY = dict(epochs=2, train_images=200, val_size=50, steps=1, test_images=20, autoattack_images=1, check_images=5,
            corruption_images=20)
METHODS = "Adv-DPNP+AWP+EMA, standard"


def everything(folder):
    "Make an archive, then what a table needs and the table, then the other records; from wherever it was left."
    sync = os.fsync
    os.fsync = lambda file: time.sleep(0.003) or sync(file)  # as on a slow disk: a kill finds files half written
    Trainer.__init__.__kwdefaults__["save_every"] = 0.0  # after every batch
    digits = advdpnp.data.embedded_digits()
    names = "x_train", "y_train", "x_test", "y_test"
    advdpnp.data.official_arrays = lambda *where: {name: getattr(digits, name)[:400] for name in names}
    advdpnp.runs.PRESETS["quick"] |= TINY
    make_table(1, "quick", "cifar10", METHODS, device="cpu", data_dir=folder, jobs=1, quiet=True)
    ledger = Ledger(folder, "cpu", quiet=True)
    config = make_config("Adv-DPNP+AWP+EMA", "quick", device="cpu", dataset="cifar10")
    for kind in RECORDS:
        ledger.measure(config, kind=kind)


def without_clock(value):
    "What a record says, without how long it took, and without the commit, as somebody may work on the code meanwhile."
    if isinstance(value, list):
        return [without_clock(each) for each in value]
    if not isinstance(value, dict):
        return value
    return {key: without_clock(each) for key, each in value.items()
            if key not in ("seconds", "training_seconds", "commit", "others")}


def left_in(folder):
    "All files: names to what is in them, but for the clock."
    found = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        if path.name in ("state.pt", "machines.json") or path.suffix == ".md":
            what = None  # what they are for, the other files show; the text holds minutes
        elif path.suffix == ".jsonl":
            what = [json.loads(line) for line in path.open()]
        else:
            what = read_json(path) if path.suffix == ".json" else path.read_bytes()
        found[str(path.relative_to(folder))] = without_clock(what)
    return found


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    began, process = time.monotonic(), start(everything, folder)
    process.join()
    assert process.exitcode == 0
    return left_in(folder), time.monotonic() - began


def killed(folder, seconds, in_a_write):
    "Whether a process was killed after some seconds, the next time that it writes a file if that is wanted."
    process, until = start(everything, folder), time.monotonic() + seconds
    while process.is_alive() and (time.monotonic() < until or in_a_write and not [*folder.rglob(".*.part*")]):
        time.sleep(0.001)
    process.kill()
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode != 0


def test_killed_at_random_moments_it_ends_with_the_same_bits(undisturbed, tmp_path):
    expected, whole = undisturbed
    chance, kills, writes = random.Random(KILLS), 0, 0
    for number in range(KILLS):
        folder, until = tmp_path / str(number), KILLS if KILLS <= 10 else kills + 10
        while kills < until and killed(folder, chance.uniform(0, whole / 3), in_a_write=kills % 2):
            kills, writes = kills + 1, writes + bool([*folder.rglob(".*.part*")])
        process = start(everything, folder)
        process.join()
        assert process.exitcode == 0
        found = left_in(folder)
        assert found.keys() == expected.keys()  # and with them no parts of files
        for name in found:
            assert found[name] == expected[name], name
        if kills >= KILLS:
            break
    assert kills >= KILLS and writes >= KILLS // 4


# Asked to stop


def command(folder, *words):
    "The command, as a process of its own would run it."
    os.chdir(folder)
    sys.argv, sys.stderr = ["advdpnp", *words], open(folder / "said", "w", buffering=1)
    for number, usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGTERM, signal.SIG_DFL)):
        signal.signal(number, usual)
    from advdpnp.cli import app
    app()


def stopped(process, number, reached, then=lambda: None):
    "Ask a process to stop when it has reached something, and do something then; its exit code."
    while not reached():
        assert process.is_alive()
        time.sleep(0.01)
    os.kill(process.pid, number)
    then()
    process.join(60)
    return process.exitcode


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_asked_to_stop_training_saves_and_says_how_to_go_on(tmp_path, number, code):
    words = "train", "Adv-DPNP", "--preset", "quick", "--device", "cpu", "--set", "epochs=1000", "--quiet"
    process = start(command, tmp_path, *words)
    run = lambda: [*tmp_path.glob("data/runs/*/*/machines.json")]
    settled = lambda: run() and time.time() - run()[0].stat().st_mtime > 0.5
    assert stopped(process, number, settled) == code
    state = load_state(run()[0].with_name("state.pt"))
    assert state["batch"] > 0 or state["epoch"] > 0
    said = (tmp_path / "said").read_text()
    assert "the same command goes on from here: advdpnp train Adv-DPNP --preset quick" in said
    assert "Traceback" not in said


def numbers(folder):
    "A plan of one table, with two workers."
    PLANS["quick"] = [["table", 1, "--methods", "DPNP, standard", "--jobs", "2", "--device", "cpu", "--quiet"]]
    command(folder, "numbers", "quick")


def test_asked_to_stop_the_workers_of_a_plan_save_too(tmp_path):
    (tmp_path / "nbs").mkdir()
    (tmp_path / "nbs/figure1.ipynb").write_text("{}")
    process = start(numbers, tmp_path)
    runs = lambda: [*tmp_path.glob("data/runs/*/*/machines.json")]
    assert stopped(process, signal.SIGTERM, lambda: len(runs()) == 2) == 143
    for path in runs():
        assert load_state(path.with_name("state.pt"))["batch"] + load_state(path.with_name("state.pt"))["epoch"] > 0
    assert "the same command goes on from here: advdpnp numbers quick" in (tmp_path / "said").read_text()


SLOW = """
import pathlib, time, torch

class Slow(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
    def forward(self, x):
        state = pathlib.Path(".out.json.unfinished")
        while pathlib.Path("wait after fgsm").exists() and state.exists() and "fgsm" in state.read_text():
            time.sleep(0.01)
        open("calls", "a").write(f"{len(x)}\\n")
        return self.net(x)

def slow():
    return Slow().eval()
"""


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_asked_to_stop_an_evaluation_goes_on(tmp_path, number, code):
    (tmp_path / "their_models.py").write_text(SLOW)
    words = ("evaluate", "their_models:slow", "--dataset", "digits", "--eps", "0.1", "--images", "40", "--batch-size",
             "10", "--attacks", "fgsm,pgd20", "--output", "out.json")
    wait, state = tmp_path / "wait after fgsm", tmp_path / ".out.json.unfinished"
    wait.touch()
    process = start(command, tmp_path, *words)
    reached = lambda: state.exists() and "fgsm" in state.read_text()
    assert stopped(process, number, reached, wait.unlink) == code
    assert "the same command goes on from here: advdpnp evaluate" in (tmp_path / "said").read_text()

    def images_seen(name):
        (tmp_path / "calls").unlink()
        process = start(command, tmp_path, *words[:-1], name)
        process.join()
        assert process.exitcode == 0
        return sum(map(int, (tmp_path / "calls").read_text().split()))

    assert images_seen("out.json") < images_seen("whole.json") and not state.exists()
    one, whole = (read_json(tmp_path / name) for name in ("out.json", "whole.json"))
    assert one["verdicts"] == whole["verdicts"]
