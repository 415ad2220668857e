"Configurations and the ledger: on more than one machine, in more than one process, and with runs that fail."
import dataclasses
import fcntl
import json
import re
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import advdpnp.runs
import advdpnp.tables
from advdpnp.core import differing
from advdpnp.methods import method_of
from advdpnp.runs import (RESULTS, Ledger, at_work, check_parameters, config_hash, identity, is_running,
                          load_checkpoint, make_config, status)
from advdpnp.tables import collect, make_table, plan_table, same_seeds
from advdpnp.training import Trainer

from conftest import TINY

DATA = Path(__file__).parent.parent / "data"
FILES = {path.name: kind for kind, names in RESULTS.items() for name in names
         for path in sorted((DATA / "results").glob(f"{name}.*.json"))}


@pytest.fixture
def ledger(tmp_path):
    return Ledger(tmp_path, "cpu", quiet=True)


@pytest.fixture
def machine(monkeypatch):
    "A function that makes this machine one that is fast in bfloat16, or not."
    return lambda fast: monkeypatch.setattr(advdpnp.runs, "has_fast_bf16", lambda device: fast)


@pytest.fixture
def few(monkeypatch):
    "Makes the preset quick a matter of a second."
    monkeypatch.setitem(advdpnp.runs.PRESETS, "quick", advdpnp.runs.PRESETS["quick"] | TINY)


def records_of(name):
    return json.loads((DATA / "results" / name).read_text())


# Configurations


@pytest.mark.parametrize("asked, said", [
    (dict(betta=3), "unknown parameter 'betta': did you mean 'beta'"),
    (dict(lr="0,1"), "lr is '0,1': expected a number$"),
    (dict(lr=float("nan")), "lr is nan: expected a number"),
    (dict(epochs=1.5), "epochs is 1.5: expected a whole number$"),
    (dict(epochs=True), "epochs is True: expected a whole number"),
    (dict(epochs=None), "epochs is None: expected a whole number"),
    (dict(train_images=0.5), "train_images is 0.5: expected a whole number or None"),
    (dict(test_images=0), "test_images is 0: expected at least 1"),
    (dict(padding=-1), "padding is -1: expected at least 0"),
    (dict(steps=-1), "steps is -1: expected at least 1"),
    (dict(eval_step_size=0.0), "eval_step_size is 0.0: expected more than 0, or None"),
    (dict(eps=2.0), "eps is 2.0"),
    (dict(beta=-1), "beta is -1.0: expected a finite weight"),
    (dict(precision=16), "precision is 16: expected a word"),
    (dict(dataset=10), "dataset is 10: expected a word"),
    (dict(seed=-1), "seed is -1: expected a whole number, 0 or more"),
    (dict(seed="0"), "seed is '0': expected a whole number"),
    (dict(preset="quik"), "did you mean 'quick'"),
    (dict(method="TRADE"), "did you mean 'TRADES'"),
    (dict(norm=2.5), "unknown parameter 'norm'"),  # there are no prototypes
])
def test_a_wrong_setting_gets_a_sentence(asked, said):
    with pytest.raises(ValueError, match=said):
        make_config(**dict(method="TRADES", preset="quick", device="cpu") | asked)


def test_a_data_set_may_be_given_by_where_it_lies(tmp_path):
    configs = [make_config("TRADES", "quick", device="cpu", dataset=place) for place in (
        "some/digits/", "./some/digits", Path("some/digits"), "some//digits//")]
    assert all(config == configs[0] for config in configs) and configs[0]["dataset"] == "some/digits/"
    assert configs[0]["eps"] == 0.2  # the budget goes with the name
    assert Ledger(tmp_path, "cpu").folder(configs[0]) == tmp_path / "runs/digits/TRADES-cifar_resnet8-quick-s0"


@pytest.mark.parametrize("given, message", [
    (dict(minutes="9m"), "minutes is '9m': expected a number"),
    (dict(minutes=[9]), "minutes is .9.: expected a number"),
    (dict(minutes=None), "minutes is None: expected a number"),
    (dict(minutes=True), "minutes is True: expected a number"),
    (dict(methods={"TRADES": 1}), "methods is .'TRADES': 1.: expected a word"),
    (dict(methods=None), "methods is None: expected a word"),
    (dict(use_results="perhaps"), "use_results is 'perhaps': expected True or False"),
    (dict(preset=3), "preset is 3: expected a word"),
    (dict(method=["TRADES"]), "unknown parameter 'method': did you mean 'methods'"),
    (dict(minuts={"a": 1}), "unknown parameter 'minuts': did you mean 'minutes'"),
    (dict(METHODS=("TRADES",)), "unknown parameter 'METHODS'"),
])
def test_a_wrong_parameter_of_a_notebook_gets_a_sentence(given, message):
    known = ["preset", "methods", "seeds", "minutes", "use_results"]
    with pytest.raises(ValueError, match=message):
        check_parameters(given, known)


def test_parameters_of_a_notebook_become_what_it_expects():
    given = dict(preset="quick", methods=["TRADES", "MART"], seeds=[0, 1], minutes="0.5", use_results="True", path=Path,
                 In=[], Out={}, CHOSEN=advdpnp.runs.CHOSEN)
    check_parameters(given, ["preset", "methods", "seeds", "minutes", "use_results"])
    assert (given["methods"], given["seeds"], given["minutes"], given["use_results"]) == (
        "TRADES, MART", "0, 1", 0.5, True)


def test_no_record_is_of_the_first_images_of_sorted_data(digits, tmp_path, monkeypatch):
    order = np.argsort(digits.y_test, kind="stable")
    np.savez(tmp_path / "mine.npz", x_train=digits.x_train, y_train=digits.y_train, x_test=digits.x_test[order],
             y_test=digits.y_test[order])
    monkeypatch.setattr(advdpnp.corruptions, "make_missing", lambda *_: None)
    monkeypatch.setattr(advdpnp.runs, "MOST", 100)
    config = make_config("standard", "quick", device="cpu", dataset="mine", corruption_images=50)
    ledger = Ledger(tmp_path, "cpu", quiet=True)
    assert np.bincount(ledger.corrupted(config).dataset.y_test).tolist() == [5] * 10
    assert advdpnp.runs.some_images(ledger, config).y.bincount().tolist() == [10] * 10
    assert advdpnp.runs.chosen_images(ledger.dataset(config)) == dict(order="stratified", seed=0, of=500)


def test_verdicts_of_other_images_are_not_compared():
    advdpnp.runs.check_same_images([dict(verdicts={}), dict(verdicts={}, subset=None)])
    with pytest.raises(ValueError, match="some records are of the first test images"):
        advdpnp.runs.check_same_images([dict(verdicts={}), dict(verdicts={}, subset=dict(seed=0))])


def test_numbers_of_numpy_and_whole_numbers_give_the_same_run():
    given = make_config("Adv-DPNP", "quick", np.int64(1), "cpu", norm=1, epochs=np.int64(3), lr=np.float32(0.5))
    assert json.loads(json.dumps(given)) == make_config("Adv-DPNP", "quick", 1, "cpu", norm=1.0, epochs=3, lr=0.5)
    assert make_config("DPNP", "small", norm="auto", train_images=None, device="cpu")["train_images"] is None


def test_auto_is_fast_with_a_gpu_and_quick_without(monkeypatch, machine):
    assert make_config("standard", device="cpu")["preset"] == "quick"
    monkeypatch.setattr(advdpnp.runs, "pick_device", lambda device: torch.device("cuda"))
    machine(True)
    config = make_config("standard")
    assert (config["preset"], config["epochs"], config["precision"]) == ("fast", 15, "bf16")


@pytest.mark.parametrize("name", FILES)
def test_configurations_of_today_are_those_of_the_records(name, machine):
    for record in records_of(name):
        config = record["config"]
        machine(config["precision"] == "bf16")
        today = make_config(config["method"], config["preset"], config["seed"], "cpu",
                            **{key: config[key] for key in ("dataset", "arch", *config["changes"])})
        assert not differing(config, {key: today[key] for key in config})
        defaults = {field.name: field.default for field in dataclasses.fields(method_of(config["method"]))}
        assert all(defaults[key] == today[key] for key in today.keys() - config.keys())  # settings of later versions
        assert config_hash(config) == record["config_hash"] and identity(config) == identity(today)


def test_a_run_keeps_the_precision_it_began_with_on_any_machine(ledger, machine):
    tiny = TINY | dict(dataset="digits", arch="cifar_resnet8", side=None, padding=0, last_autoattack_images=1)
    machine(True)
    began = make_config("standard", "small", device="cpu", **tiny)
    record = ledger.run(began)
    machine(False)
    here = make_config("standard", "small", device="cpu", **tiny)
    assert (began["precision"], here["precision"]) == ("bf16", "float32")
    assert ledger.result(here) == record and ledger.model(here) is not None
    assert ledger.trainer(here).config["precision"] == "bf16"
    assert ledger.measure(here, kind="tradeoff")["config"]["precision"] == "bf16"
    asked = make_config("standard", "small", device="cpu", precision="bf16", **tiny)
    # who asks for a precision gets a run of its own
    assert asked["changes"] != here["changes"] and ledger.result(asked) is None


# Checkpoints


def test_what_is_no_checkpoint_is_named(tmp_path):
    def said(error):
        with pytest.raises(error) as found:
            load_checkpoint(tmp_path)
        return str(found.value)

    assert "best.safetensors is not there: a run's folder holds config.json" in said(FileNotFoundError)
    good = DATA / "weights/Adv-DPNP-cifar10-small"
    shutil.copy(good / "model.safetensors", tmp_path / "best.safetensors")
    assert "config.json is not there" in said(FileNotFoundError)
    about = json.loads((good / "record.json").read_text())
    settings = tmp_path / "config.json"
    settings.write_text("{}")
    assert "is not of a run of the ledger" in said(ValueError)
    settings.write_text(json.dumps(dict(run=about["run"] | dict(method="TRADES"))))
    assert "is damaged or of another network" in said(ValueError)
    (tmp_path / "best.safetensors").write_bytes(b"weights")
    assert "best.safetensors is damaged" in said(ValueError)


# Records that are there


def test_records_count_as_runs_only_if_asked_for(tmp_path, machine):
    machine(True)
    (tmp_path / "results").symlink_to(DATA / "results")  # without the runs that this clone may hold
    use, do_not = Ledger(tmp_path, "cpu", use_results=True), Ledger(tmp_path, "cpu")
    for name, kind in FILES.items():
        for record in records_of(name):
            found = use.result(record["config"], kind)
            assert config_hash(found["config"]) == record["config_hash"]
            assert found["method"] == record["config"]["method"]  # and not a row's name
            assert do_not.result(record["config"], kind) is None
    other = make_config("TRADES", "quick", device="cpu", beta=2.75)
    assert use.result(other) is None


def test_a_record_of_a_machine_without_fast_bf16_is_found_by_one_that_has_it(machine):
    ledger = Ledger(DATA, "cpu", use_results=True)
    for fast in (True, False):
        machine(fast)
        assert ledger.result(make_config("PGD-AT", "small", device="cpu"))["config"]["precision"] == "bf16"


def test_complete_tables_go_before_partial_ones_and_files_that_change_are_read_again(tmp_path):
    ledger, results = Ledger(tmp_path, "cpu", use_results=True), tmp_path / "results"
    results.mkdir()
    record = records_of("table1.quick.json")[0]
    config = record["config"]
    write = lambda name, **changes: (results / name).write_text(json.dumps([record | changes]))
    assert ledger.result(config) is None
    write("table1.quick.partial.json", seed="partial")
    assert ledger.result(config)["seed"] == "partial"
    write("table3.quick.svhn.json", seed="complete")
    assert ledger.result(config)["seed"] == "complete"
    write("table3.quick.svhn.json", config=config | dict(lr=9.0))  # no record of this run
    os.utime(results / "table3.quick.svhn.json", (1, 1))
    assert ledger.result(config)["seed"] == "partial"
    (results / "table1.quick.partial.json").write_text('{"a": 1}')
    with pytest.raises(ValueError, match="table1.quick.partial.json holds no records of runs"):
        Ledger(tmp_path, "cpu", use_results=True).result(config)
    (results / "table1.quick.partial.json").write_text("{")
    with pytest.raises(ValueError, match="table1.quick.partial.json is damaged"):
        Ledger(tmp_path, "cpu", use_results=True).result(config)


def test_what_the_records_lack_is_trained_and_an_undefended_twin_as_well(tmp_path, few, ledger):
    plain, ours = (make_config(method, "quick", device="cpu") for method in ("standard", "DPNP"))
    record = ledger.run(plain)
    here = Ledger(tmp_path / "elsewhere", "cpu", quiet=True, use_results=True)
    (here.data_dir / "results").mkdir(parents=True)
    (here.data_dir / "results/table1.quick.json").write_text(json.dumps([record]))
    assert here.run_all([plain], jobs=1) == [record] and not here.folder(plain).exists()
    assert [config["method"] for config in here.missing([plain, ours], "result")] == ["DPNP", "standard"]
    found = here.run_all([plain, ours], jobs=1)
    assert found[0] == record and here.trained(plain) and here.folder(ours).exists()
    checks = {check["name"]: check["passed"] for check in found[1]["best"]["checks"]}
    assert checks["twin"] is not None
    # another kind of record is not there, and is made from the network
    assert here.run_all([plain], jobs=1, kind="geometry")[0]["sha256"] == here.sha256(plain)


def test_what_runs_were_made_with_is_read_from_older_records_too():
    for name in FILES:
        for record in records_of(name):
            machines = [record.get("trained_with") or record]
            machines += machines[0].get("others", [])
            assert all(made["versions"]["torch"] for made in machines)


# Another process


def overtaken(monkeypatch, behind, before):
    "When `behind` has made its trainer, something else happens first."
    trainer = Ledger.trainer

    def make(self, config):
        found = trainer(self, config)
        if self is behind:
            before(config)
        return found

    monkeypatch.setattr(Ledger, "trainer", make)


def test_what_another_process_has_finished_in_the_meantime_is_left_as_it_is(ledger, monkeypatch):
    config, written = make_config("standard", "quick", device="cpu", **TINY), []
    last_write = lambda: (ledger.folder(config) / "state.pt").stat().st_mtime_ns
    behind = Ledger(ledger.data_dir, "cpu", quiet=True)
    overtaken(monkeypatch, behind, lambda config: written.append(ledger.train(config) and last_write()))
    assert behind.train(config)
    assert written == [last_write()]


def test_what_another_process_has_done_in_the_meantime_is_gone_on_from(ledger, monkeypatch):
    config = make_config("standard", "quick", device="cpu", **TINY | dict(epochs=2))
    behind, step, seen = Ledger(ledger.data_dir, "cpu", quiet=True), Trainer.step, []
    monkeypatch.setattr(Trainer, "_late", lambda self, deadline: deadline < float("inf") and self.epoch == 1)
    monkeypatch.setattr(Trainer, "step", lambda self, *batch: seen.append(self.epoch) or step(self, *batch))
    overtaken(monkeypatch, behind, lambda config: ledger.train(config, time_limit=60))
    assert behind.train(config)
    assert seen == sorted(seen) and seen.count(0) == seen.count(1) > 0


def test_a_run_is_one_process_s_until_that_is_gone(tmp_path):
    hold = ("import sys, time; from filelock import FileLock\n"
            "with FileLock(sys.argv[1]): print('at work', flush=True); time.sleep(60)")
    with subprocess.Popen([sys.executable, "-c", hold, tmp_path / "lock"], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "at work\n"
        assert status(tmp_path) == ("running", "after 0 epochs")
        with pytest.raises(RuntimeError, match="another process is at work on"), at_work(tmp_path):
            pass
        other.kill()
    assert not is_running(tmp_path)
    with at_work(tmp_path):
        assert is_running(tmp_path)


def test_those_who_ask_do_not_see_each_other_and_a_lock_that_may_only_be_read_can_be_asked(tmp_path):
    (tmp_path / "lock").touch()
    (tmp_path / "lock").chmod(0o444)
    with open(tmp_path / "lock", "rb") as other:
        fcntl.flock(other, fcntl.LOCK_SH)  # somebody asks at the same moment
        assert not is_running(tmp_path)
    with open(tmp_path / "lock", "rb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        assert is_running(tmp_path)


def test_a_run_whose_lock_may_not_be_read_is_taken_as_running(tmp_path, monkeypatch):
    def refused(*_):
        raise PermissionError

    monkeypatch.setattr("builtins.open", refused)
    assert is_running(tmp_path)


def test_a_run_is_of_its_images_and_not_of_their_name(digits, tmp_path, monkeypatch):
    "Training and test images changed places after training, or after measuring."
    monkeypatch.setitem(advdpnp.runs.PRESETS, "quick", advdpnp.runs.PRESETS["quick"] | dict(epochs=1, test_images=20))
    arrays = {f"{axis}_{part}": getattr(digits, f"{axis}_{part}")[:300] for axis in "xy" for part in ("train", "test")}
    swapped = {name.replace("train", "te_t").replace("test", "train").replace("te_t", "test"): value
               for name, value in arrays.items()}
    config = make_config("standard", "quick", device="cpu", dataset="mine", autoattack_images=2)
    np.savez(tmp_path / "mine.npz", **arrays)
    assert Ledger(tmp_path, "cpu", quiet=True).train(config)
    np.savez(tmp_path / "mine.npz", **swapped)
    with pytest.raises(ValueError, match="the images of mine are not those that .* was trained on"):
        Ledger(tmp_path, "cpu", quiet=True).measure(config)
    np.savez(tmp_path / "mine.npz", **arrays)
    ledger = Ledger(tmp_path, "cpu", quiet=True)
    assert ledger.measure(config) == ledger.result(config)
    np.savez(tmp_path / "mine.npz", **swapped)
    again = Ledger(tmp_path, "cpu", quiet=True)
    again.dataset(config)
    with pytest.raises(ValueError, match="result.json is of other images than those of mine now"):
        again.result(config)


def test_one_damaged_claim_does_not_hide_the_other_runs(tmp_path):
    (tmp_path / "job-train-1.json").write_text("{")
    assert status(tmp_path)[0] == "damaged" and "job-train-1.json" in status(tmp_path)[1]


SCRIPT = f"""
import sys
from advdpnp.runs import Ledger, make_config
ledger, tiny = Ledger(sys.argv[1], "cpu", quiet=True), {TINY}
wild = make_config("standard", "quick", 0, "cpu", **tiny, lr=1e20)
fine = make_config("standard", "quick", 1, "cpu", **tiny)
try:
    ledger.run_all([wild, fine], jobs=2)
except FloatingPointError as error:
    print(error, "|", ledger.result(fine)["best"]["n"], flush=True)
long = tiny | dict(epochs=10_000)
ledger.run_all([make_config("standard", "quick", seed, "cpu", **long) for seed in (2, 3)], jobs=2)
"""


def test_workers_of_a_script_without_a_guard_and_what_becomes_of_them_when_it_is_killed(tmp_path):
    (tmp_path / "mine.py").write_text(SCRIPT)
    command = [sys.executable, tmp_path / "mine.py", tmp_path]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as script:
        # a run that fails leaves the others alone
        said = script.stdout.readline()
        assert "the loss is not finite" in said and said.endswith("| 20\n")
        until = time.monotonic() + 180
        while len(list(tmp_path.glob("runs/*/*epochs=10000*/metrics.jsonl"))) < 2:
            assert script.poll() is None and time.monotonic() < until
            time.sleep(0.1)
        script.send_signal(signal.SIGKILL)
    runs = {path: status(path)[0] for path in sorted(tmp_path.glob("runs/*/*"))}
    assert sorted(runs.values()) == ["failed", "finished", "running", "running"]
    long = [path for path, word in runs.items() if word == "running"]
    while any(map(is_running, long)):
        assert time.monotonic() < until, "workers outlive the process that started them"
        time.sleep(0.1)
    assert status(long[0])[0] == "interrupted"
    ledger, config = Ledger(tmp_path, "cpu", quiet=True), json.loads((long[0] / "config.json").read_text())["run"]
    epochs = lambda: len((long[0] / "metrics.jsonl").read_text().splitlines())
    before = epochs()
    assert not ledger.train(config, time_limit=2)
    assert epochs() > before  # it went on


def test_a_run_that_fails_leaves_the_others_alone(ledger):
    wild = make_config("standard", "quick", 0, "cpu", **TINY, lr=1e20)
    fine = make_config("standard", "quick", 1, "cpu", **TINY)
    with pytest.raises(FloatingPointError, match="not finite"):
        ledger.run_all([wild, fine], jobs=1)
    word, why = status(ledger.folder(wild))
    assert word == "failed" and why.startswith("FloatingPointError: the loss is not finite at epoch 1")
    assert status(ledger.folder(fine))[0] == "finished"
    assert ledger.run_all([fine, fine], time_limit=0)[0] == ledger.result(fine)
    with pytest.raises(ValueError, match="did you mean 'geometry'"):
        ledger.run_all([fine], kind="geometri")


# One run, in several goes


def test_verdicts_of_a_machine_that_rounds_otherwise_are_made_anew(ledger):
    config = make_config("standard", "quick", device="cpu", **TINY)
    ledger.train(config)
    begun = ledger.folder(config) / "result-best.json"
    begun.write_text(json.dumps(dict(key=dict(logits="of another machine"), stages={}, seconds=1.0)))
    assert ledger.measure(config)["best"]["n"] == 20
    assert not begun.exists() and ledger.result(config) is not None


def test_a_trade_off_that_ran_out_of_time_goes_on(ledger):
    config = make_config("PGD-AT", "quick", device="cpu", **TINY)
    ledger.train(config)
    assert ledger.measure(config, 1e-9, "tradeoff") is None
    half, = ledger.folder(config).glob("tradeoff-*.json")
    done = json.loads(half.read_text())["stages"]
    assert done["pgd20"][0] > 0 and "cw" not in done
    record = ledger.measure(config, kind="tradeoff")
    assert not half.exists()
    (ledger.folder(config) / "tradeoff.json").unlink()
    assert ledger.measure(config, kind="tradeoff")["verdicts"] == record["verdicts"]


def test_a_run_names_the_machines_that_trained_it(ledger, monkeypatch):
    config = make_config("standard", "quick", device="cpu", **TINY)
    real, where = advdpnp.runs.provenance, ["another processor"]
    monkeypatch.setattr(advdpnp.runs, "provenance", lambda device: real(device) | dict(device=where[0]))
    assert not ledger.train(config, 1e-9)
    where[0] = "this processor"
    assert not ledger.train(config, 1e-9) and not ledger.train(config, 1e-9)
    made = ledger.run(config)["trained_with"]
    assert made["device"] == "this processor"
    assert [other["device"] for other in made["others"]] == ["another processor"]


def test_what_is_damaged_lost_or_exchanged_is_said(ledger):
    config, other = (make_config("standard", "quick", seed, "cpu", **TINY) for seed in (0, 1))
    folder = ledger.folder(config)
    with pytest.raises(ValueError, match="holds no trained run"):
        ledger.measure(config)
    with pytest.raises(FileNotFoundError, match="train this run first"):
        ledger.model(config)
    ledger.train(config)
    assert status(folder) == ("trained", "not measured")
    state = (folder / "state.pt").rename(folder / "elsewhere.pt")
    with pytest.raises(ValueError, match="state.pt is not there"):
        ledger.measure(config)
    state.rename(folder / "state.pt")
    ledger.measure(config)
    ledger.measure(config, kind="geometry")
    ledger.train(other)
    (folder / "best.safetensors").write_bytes((ledger.folder(other) / "best.safetensors").read_bytes())
    with pytest.raises(ValueError, match="is not the file that was measured"):
        ledger.model(config)
    with pytest.raises(ValueError, match="is of another checkpoint than"):
        ledger.result(config, "geometry")
    (folder / "result.json").write_text("{")
    assert status(folder)[0] == "damaged"


def test_a_folder_of_an_older_preset_is_not_taken_for_today_s(ledger, monkeypatch):
    config = make_config("standard", "quick", device="cpu", **TINY)
    ledger.run(config)
    monkeypatch.setitem(advdpnp.runs.PRESETS["quick"], "padding", 1)
    today = make_config("standard", "quick", device="cpu", **TINY)
    for ask in (ledger.train, ledger.result, ledger.model, ledger.run,
                lambda config: ledger.measure(config, kind="geometry")):
        with pytest.raises(ValueError, match="padding is 0 there, 1 here"):
            ask(today)


# Tables of runs


def test_a_table_shows_what_is_there_before_it_says_what_failed(tmp_path, few, monkeypatch):
    real = advdpnp.runs.Ledger.train

    def train(self, config, time_limit=None):
        if config["method"] == "TRADES":
            raise FloatingPointError("the loss is not finite at epoch 1")
        return real(self, config, time_limit)

    monkeypatch.setattr(advdpnp.runs.Ledger, "train", train)
    make = lambda methods, **more: make_table(1, "quick", methods=methods, device="cpu", data_dir=tmp_path, jobs=1,
                                              quiet=True, **more)
    with pytest.raises(FloatingPointError):
        make("TRADES, standard")
    saved = json.loads((tmp_path / "results/table1.quick.partial.json").read_text())
    assert [record["method"] for record in saved] == ["standard"]
    # a run of older settings that nobody asks for is left out
    monkeypatch.setitem(advdpnp.runs.PRESETS["quick"], "batch_size", 32)
    with pytest.raises(ValueError, match="holds another run"):
        make("standard", time_limit=0)
    assert [record["method"] for record in make("DPNP").records] == ["DPNP"]


def test_a_complete_table_takes_the_place_of_its_part(tmp_path, few, monkeypatch):
    monkeypatch.setattr(advdpnp.tables, "METHODS",
                        {name: advdpnp.tables.METHODS[name] for name in ("standard", "DPNP")})
    make = lambda methods, **more: make_table(1, "quick", methods=methods, device="cpu", data_dir=tmp_path, jobs=1,
                                              quiet=True, **more)
    assert make("standard").stem.name == "table1.quick.partial" and list((tmp_path / "results").glob("*.partial.*"))
    assert make("").stem.name == "table1.quick" and not list((tmp_path / "results").glob("*.partial.*"))
    # without the runs, the records are enough, if they are asked for
    shutil.rmtree(tmp_path / "runs")
    assert len(make("", time_limit=0, use_results=True).records) == 2
    records = json.loads((tmp_path / "results/table1.quick.json").read_text())
    assert make("", time_limit=0).records == []
    records[0]["data_sha256"] = "of other files"
    (tmp_path / "results/table1.quick.json").write_text(json.dumps(records))
    with pytest.raises(ValueError, match="not measured on the same files"):
        make("", time_limit=0, use_results=True)


def test_a_chosen_setting_is_one_row_of_the_trade_off():
    plan = plan_table(7, "quick", methods="TRADES beta=1", device="cpu")
    done = same_seeds(collect(plan, Ledger(DATA, "cpu", use_results=True))[0], {0})
    assert len(done) == len(records_of("table7.quick.json"))


def test_an_ablation_is_compared_seed_by_seed(machine):
    machine(True)
    ledger = Ledger(DATA, "cpu", use_results=True)

    def seeds(number, asked):
        plan = plan_table(number, "small", methods="Adv-DPNP", seeds=asked, device="cpu")
        found, _ = collect(plan, ledger)
        return {seed for _, seed in (found if number == 1 else same_seeds(found, {seed for _, seed in plan.asked}))}

    assert seeds(1, "auto") == {0, 1, 2} and seeds(6, "auto") == {0} and seeds(6, "0, 1") == {0, 1}


PAGES = [path for path in sorted((Path(__file__).parent.parent / "nbs").glob("*.ipynb"))
         if "check_parameters(globals()" in path.read_text()]


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_the_parameters_of_a_page_are_what_it_expects(page):
    cells = [cell for cell in json.loads(page.read_text())["cells"] if cell["cell_type"] == "code"]
    given = {}
    exec("".join(next(cell["source"] for cell in cells if "parameters" in cell["metadata"].get("tags", []))), given)
    check = next("".join(cell["source"]) for cell in cells if "check_parameters(globals()" in "".join(cell["source"]))
    known = eval(re.search(r"check_parameters\(globals\(\), (\[.*?\])\)", check, re.S)[1])
    before = {name: value for name, value in given.items() if not name.startswith("_")}
    check_parameters(given, known)
    assert {*before} == {*known} and {name: given[name] for name in known} == before


def test_a_folder_that_cannot_be_read_does_not_stop_the_other_runs(few, ledger):
    bad, good = (make_config("standard", "quick", seed, "cpu") for seed in (0, 1))
    ledger.folder(bad).mkdir(parents=True)
    (ledger.folder(bad) / "result.json").write_text("{")
    with pytest.raises(ValueError, match="result.json is damaged"):
        ledger.run_all([bad, good], jobs=1)
    assert ledger.result(good)["config"] == good


@pytest.mark.parametrize("jobs", [0, -1, "2", 1.5])
def test_runs_side_by_side_are_a_whole_number(ledger, jobs):
    with pytest.raises(ValueError, match="jobs is"):
        ledger.run_all([make_config("standard", "quick", 0, "cpu")], jobs)
