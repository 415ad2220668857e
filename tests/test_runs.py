"The ledger on more than one machine, and with runs that fail."
import json
import os
from pathlib import Path

import pytest

import advdpnp.runs
import advdpnp.tables
from advdpnp.runs import Ledger, make_config, status, worker
from advdpnp.tables import adopt, make_table

FEW = dict(epochs=1, test_images=30, autoattack_images=2, check_images=10)
TINY = FEW | dict(dataset="digits", arch="cifar_resnet8", side=None, train_images=None, val_size=100, padding=0, last_autoattack_images=2)


@pytest.fixture
def machine(monkeypatch):
    "A function that makes this machine one that is fast in bfloat16, or not."
    return lambda fast: monkeypatch.setattr(advdpnp.runs, "has_fast_bf16", lambda device: fast)


def test_a_run_keeps_the_precision_it_began_with_on_any_machine(tmp_path, machine):
    machine(True)
    began = make_config("standard", "small", device="cpu", **TINY)
    ledger = Ledger(tmp_path / "a", "cpu", quiet=True)
    record = ledger.run(began)
    machine(False)
    here = make_config("standard", "small", device="cpu", **TINY)
    assert (began["precision"], here["precision"]) == ("bf16", "float32")
    assert ledger.result(here) == record and ledger.model(here) is not None
    assert ledger.trainer(here).config["precision"] == "bf16"
    assert ledger.measure(here, kind="tradeoff")["config"]["precision"] == "bf16"
    other = Ledger(tmp_path / "b", "cpu", quiet=True)
    assert len(other.adopt([record])) == 1 and other.result(here) == record
    asked = make_config("standard", "small", device="cpu", precision="bf16", **TINY)
    assert asked["changes"] != here["changes"] and ledger.result(asked) is None  # who asks for a precision gets a run of its own


def test_verdicts_of_a_machine_that_rounds_otherwise_are_made_anew(tmp_path):
    ledger, config = Ledger(tmp_path, "cpu", quiet=True), make_config("standard", "quick", device="cpu", **FEW)
    ledger.train(config)
    begun = ledger.folder(config) / "result-best.json"
    begun.write_text(json.dumps(dict(key=dict(logits="of another machine"), stages={}, seconds=1.0)))
    assert ledger.measure(config)["best"]["n"] == 30
    assert not begun.exists() and ledger.result(config) is not None


def test_a_trade_off_that_ran_out_of_time_goes_on(tmp_path):
    ledger, config = Ledger(tmp_path, "cpu", quiet=True), make_config("PGD-AT", "quick", device="cpu", **FEW)
    ledger.train(config)
    assert ledger.measure(config, 1e-9, "tradeoff") is None
    half, = ledger.folder(config).glob("tradeoff-*.json")
    done = json.loads(half.read_text())["stages"]
    assert done["pgd20"][0] > 0 and "cw" not in done
    record = ledger.measure(config, kind="tradeoff")
    assert not half.exists()
    (ledger.folder(config) / "tradeoff.json").unlink()
    assert ledger.measure(config, kind="tradeoff")["verdicts"] == record["verdicts"]


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_run_that_fails_leaves_the_others_alone(tmp_path, jobs):
    ledger = Ledger(tmp_path, "cpu", quiet=True)
    wild, fine = (make_config("standard", "quick", seed, "cpu", **FEW, **change) for seed, change in ((0, dict(lr=1e8)), (1, {})))
    with pytest.raises(FloatingPointError, match="not finite"):
        ledger.run_all([wild, fine], jobs)
    assert [status(ledger.folder(config))[0] for config in (wild, fine)] == ["failed", "finished"]


def test_a_table_shows_what_is_there_before_it_says_what_failed(tmp_path, monkeypatch):
    (tmp_path / "reported").mkdir()
    real = advdpnp.runs.Ledger.train

    def train(self, config, time_limit=None):
        if config["method"] == "TRADES":
            raise FloatingPointError("the loss is not finite at epoch 1")
        return real(self, config, time_limit)

    monkeypatch.setattr(advdpnp.runs.Ledger, "train", train)
    monkeypatch.setitem(advdpnp.runs.PRESETS, "quick", advdpnp.runs.PRESETS["quick"] | FEW)
    with pytest.raises(FloatingPointError):
        make_table(1, "quick", methods="TRADES, standard", device="cpu", data_dir=tmp_path, jobs=1, quiet=True)
    saved = json.loads((tmp_path / "results/table1.quick.partial.json").read_text())
    assert [record["method"] for record in saved] == ["standard"]

    elsewhere = tmp_path / "elsewhere"
    assert len(adopt(tmp_path / "results/table1.quick.partial.json", elsewhere, "cpu")) == 1
    table = make_table(5, "quick", methods="standard", device="cpu", data_dir=elsewhere, quiet=True)
    assert [r["seed"] for r in table.records] == [0] and table.left == []  # what the records lack is made here
    table = make_table(1, "quick", methods="DPNP", device="cpu", data_dir=elsewhere, jobs=1, quiet=True)
    assert [r["method"] for r in table.records] == ["standard", "DPNP"]  # all that is finished
    checks = {check["name"]: check["passed"] for check in table.records[1]["best"]["checks"]}
    assert checks["twin"] is not None  # its undefended twin was there

    others = [record | dict(data_sha256="of other files") for record in saved]
    (tmp_path / "table1.quick.json").write_text(json.dumps(others))
    adopt(tmp_path / "table1.quick.json", elsewhere, "cpu")
    with pytest.raises(ValueError, match="not measured on the same files"):
        make_table(1, "quick", time_limit=0, device="cpu", data_dir=elsewhere, quiet=True)


def test_a_run_of_older_settings_that_nobody_asks_for_is_left_out(tmp_path, monkeypatch):
    monkeypatch.setitem(advdpnp.runs.PRESETS, "quick", advdpnp.runs.PRESETS["quick"] | FEW)
    ledger = Ledger(tmp_path, "cpu", quiet=True)
    for seed in (0, 1):
        ledger.run(make_config("standard", "quick", seed, "cpu"))
    monkeypatch.setitem(advdpnp.runs.PRESETS["quick"], "batch_size", 32)
    with pytest.raises(ValueError, match="holds another run"):
        make_table(1, "quick", methods="standard", time_limit=0, device="cpu", data_dir=tmp_path, quiet=True)
    table = make_table(1, "quick", methods="DPNP", device="cpu", data_dir=tmp_path, jobs=1, quiet=True)
    assert [(r["method"], r["seed"]) for r in table.records] == [("DPNP", 0)]


def test_the_process_of_another_user_is_alive(tmp_path, monkeypatch):
    (tmp_path / "running").write_text("1")

    def kill(process, signal):
        raise PermissionError

    monkeypatch.setattr(os, "kill", kill)
    assert worker(tmp_path) == 1


def test_a_chosen_setting_is_one_row_of_the_trade_off(tmp_path):
    results = Path(advdpnp.__file__).parent.parent / "data/results"
    adopt(results / "table7.quick.json", tmp_path, "cpu")
    table = make_table(7, "quick", methods="TRADES beta=1", time_limit=0, device="cpu", data_dir=tmp_path, quiet=True)
    assert table.stem.name == "table7.quick" and len(table.records) == len(json.loads((results / "table7.quick.json").read_text()))
