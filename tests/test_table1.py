"The main job, as a user runs it: a page with papermill, killed and run again, on a handful of digits."
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from pages import ROOT

from advdpnp.runs import PRESETS
from advdpnp.tables import make_table, plan_table

METHODS = "standard, Adv-DPNP"


def papermill(folder, output):
    "Table 1 of `METHODS` at preset quick, on one core: workers of their own would start longer than they work."
    command = [os.path.join(os.path.dirname(sys.executable), "papermill"), "nbs/table1.ipynb", output, "-p", "data_dir",
               folder, "-p", "dataset", "few", "-p", "methods", METHODS, "-p", "preset", "quick", "-p", "device", "cpu",
               "-p", "keep_going", "True", "--no-progress-bar", "--stdout-file", output.with_suffix(".txt")]
    alone = (lambda: os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})) if sys.platform == "linux" else None
    environment = {name: value for name, value in os.environ.items() if name != "MPLBACKEND"}  # pictures as on a page
    return subprocess.Popen(list(map(str, command)), cwd=ROOT, stderr=subprocess.PIPE, text=True, env=environment,
                            start_new_session=True, preexec_fn=alone)


def few_digits(digits, folder):
    "A data set of a few pale digits in a data folder: a budget of 8/255 breaks them, which keeps AutoAttack short."
    two = np.concatenate([np.flatnonzero(digits.y_test == k)[:2] for k in range(10)])
    np.savez(folder / "few.npz", x_train=digits.x_train[:400] // 4, y_train=digits.y_train[:400],
             x_test=digits.x_test[two] // 4, y_test=digits.y_test[two])
    return folder


def made(folder, number=1, methods=METHODS, **given):
    "A table in this process."
    return make_table(number, "quick", "few", methods, device="cpu", data_dir=folder, jobs=1, quiet=True,
                      keep_going=True, **given)


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def page(digits, tmp_path_factory):
    "The folder of a page that was killed in its first run, and run again."
    folder = few_digits(digits, tmp_path_factory.mktemp("page"))
    process = papermill(folder, folder / "out.ipynb")
    while not list(folder.rglob("state.pt")):
        assert process.poll() is None, process.stderr.read()[-3000:]
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert not list(folder.rglob("result.json"))
    process = papermill(folder, folder / "out.ipynb")
    log = process.communicate()[1]
    assert process.returncode == 0, log[-3000:]
    return folder


@pytest.fixture(scope="module")
def undisturbed(digits, tmp_path_factory):
    "The same table, made in one go."
    return made(few_digits(digits, tmp_path_factory.mktemp("undisturbed")))


def test_a_page_leaves_a_table_and_its_pictures(page):
    for suffix in ("csv", "last.csv", "md", "json", "training.png", "budget.png", "steps.png", "images.png"):
        assert (page / f"results/table1.quick.few.partial.{suffix}").stat().st_size > 100
    outputs = json.dumps([cell.get("outputs") for cell in json.loads((page / "out.ipynb").read_text())["cells"]])
    assert "## The table" in outputs and "### Loss against steps" in outputs and outputs.count("image/png") == 4
    assert "| Adv-DPNP |" in (page / "out.txt").read_text()  # `make table1` prints it
    for record in json.loads((page / "results/table1.quick.few.partial.json").read_text()):
        assert record["seed"] == 0 and record["config"]["seed"] == 0 and record["device"].startswith("CPU")
        assert len(record["data_sha256"]) == len(record["best"]["sha256"]) == 64


def test_killed_and_run_again_it_ends_with_the_same_numbers(page, undisturbed):
    again = json.loads((page / "results/table1.quick.few.partial.json").read_text())
    assert [record["method"] for record in again] == METHODS.split(", ")
    for record, whole in zip(again, undisturbed.records):
        for which in ("best", "last"):
            assert record[which]["sha256"] == whole[which]["sha256"]
            assert record[which]["metrics"] == whole[which]["metrics"]
        assert record["best"]["curve"] == whole["best"]["curve"]


def test_a_second_table_reuses_the_records(undisturbed):
    before = contents(undisturbed.ledger.data_dir)
    assert made(undisturbed.ledger.data_dir).records == undisturbed.records
    assert contents(undisturbed.ledger.data_dir) == before


def test_other_tables_are_of_its_runs(undisturbed):
    folder, first = undisturbed.ledger.data_dir, {record["method"]: record for record in undisturbed.records}
    weights = {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")}
    assert made(folder, 2).records == undisturbed.records
    corrupted, shapes = made(folder, 4), made(folder, 5)
    fronts = made(folder, 7, "Adv-DPNP consistency=1")
    for table in (corrupted, shapes, fronts):
        for record in table.records:
            assert record["sha256"] == first[record["config"]["method"]]["best"]["sha256"]
    assert all(len(record["accuracy"]) == 15 and record["source"] == "generated" for record in corrupted.records)
    assert all("pictures" in record for record in shapes.records)  # to draw
    assert "pictures" not in (folder / "results/table5.quick.few.partial.json").read_text()  # too large to keep
    front, whole = fronts.records[0], first["Adv-DPNP"]["best"]["metrics"]
    assert front["clean"]["correct"] == whole["clean"]["correct"]
    assert front["worst"]["correct"] <= whole["pgd20"]["correct"]
    assert weights == {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")}


def test_an_ablation_changes_one_thing_and_shares_the_rest(undisturbed):
    table = made(undisturbed.ledger.data_dir, 6, "Adv-DPNP, no consistency", time_limit=0)
    assert [record["best"]["sha256"] for record in table.records] == [undisturbed.records[1]["best"]["sha256"]]
    assert table.left == ["no consistency, seed 0: missing"]
    asked = plan_table(6, "quick", "few", "Adv-DPNP, no consistency", device="cpu").asked
    whole, without = asked.values()
    assert {key for key in whole if whole[key] != without[key]} == {"consistency", "changes"}


def test_large_images_stop_in_time_and_say_what_is_left(tmp_path, monkeypatch):
    "An archive like CIFAR-10, cifar_resnet18, preset fast with small batches, and a clock."
    monkeypatch.setitem(PRESETS, "fast", PRESETS["fast"] | dict(batch_size=8, val_size=100))
    rng = np.random.default_rng(0)
    images = lambda n: rng.integers(0, 256, (n, 32, 32, 3), dtype=np.uint8)
    np.savez(tmp_path / "cifar10.npz", x_train=images(1000), y_train=np.arange(1000) % 10, x_test=images(20),
             y_test=np.arange(20) % 10)
    table = make_table(1, "fast", "cifar10", "standard", time_limit=2, device="cpu", data_dir=tmp_path, quiet=True)
    assert table.records == [] and table.left[0].startswith("standard, seed 0: interrupted")
    assert list((tmp_path / "runs/cifar10/standard-cifar_resnet18-fast-s0").glob("state.pt"))
