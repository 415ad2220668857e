"The ledger on more than one machine, and with runs that fail."
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import advdpnp.runs
import advdpnp.tables
from advdpnp.runs import Ledger, at_work, make_config, status, worker
from advdpnp.tables import adopt, make_table
from advdpnp.training import Trainer

FEW = dict(epochs=1, test_images=30, autoattack_images=2, check_images=10)
RESULTS = Path(__file__).parent.parent / "data/results"
TINY = FEW | dict(dataset="digits", arch="cifar_resnet8", side=None, train_images=None, val_size=100, padding=0,
                  last_autoattack_images=2)


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
    for wrong, kind in (([record], "corruptions"), ([], "result"), ({"a": 1}, "result"), ([{"a": 1}], "result")):
        with pytest.raises(ValueError, match=f"no records of kind {kind}"):
            other.adopt(wrong, kind)
    asked = make_config("standard", "small", device="cpu", precision="bf16", **TINY)
    # who asks for a precision gets a run of its own
    assert asked["changes"] != here["changes"] and ledger.result(asked) is None


def test_of_records_that_are_not_all_good_none_is_taken_in(tmp_path):
    records = json.loads((RESULTS / "table1.quick.json").read_text())[:3]
    ledger = Ledger(tmp_path, "cpu", quiet=True)
    records[2]["config"]["lr"] = 7.0
    with pytest.raises(ValueError, match="lr is 7.0"):
        ledger.adopt(records)
    del records[2]["config"]["changes"]
    with pytest.raises(ValueError, match="no records of kind result"):
        ledger.adopt(records)
    assert not (tmp_path / "adopted").exists()


def test_what_another_process_has_finished_in_the_meantime_is_left_as_it_is(tmp_path, monkeypatch):
    ledger, config = Ledger(tmp_path, "cpu", quiet=True), make_config("standard", "quick", device="cpu", **FEW)
    behind, trainer, written = Ledger(tmp_path, "cpu", quiet=True), Ledger.trainer, []
    last_write = lambda: (ledger.folder(config) / "state.pt").stat().st_mtime_ns

    def overtaken(self, config):
        found = trainer(self, config)
        if self is behind:
            ledger.train(config)
            written.append(last_write())
        return found

    monkeypatch.setattr(Ledger, "trainer", overtaken)
    assert behind.train(config)
    assert written == [last_write()]


def test_what_another_process_has_done_in_the_meantime_is_gone_on_from(tmp_path, monkeypatch):
    ledger = Ledger(tmp_path, "cpu", quiet=True)
    config = make_config("standard", "quick", device="cpu", **FEW | dict(epochs=2))
    behind, trainer, step, seen = Ledger(tmp_path, "cpu", quiet=True), Ledger.trainer, Trainer.step, []

    def overtaken(self, config):
        found = trainer(self, config)
        if self is behind:
            assert not ledger.train(config, time_limit=60)
        return found

    monkeypatch.setattr(Trainer, "_late", lambda self, deadline: deadline < float("inf") and self.epoch == 1)
    monkeypatch.setattr(Trainer, "step", lambda self, *batch: seen.append(self.epoch) or step(self, *batch))
    monkeypatch.setattr(Ledger, "trainer", overtaken)
    assert behind.train(config)
    assert seen == sorted(seen) and seen.count(0) == seen.count(1) > 0


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
    wild = make_config("standard", "quick", 0, "cpu", **FEW, lr=1e8)
    fine = make_config("standard", "quick", 1, "cpu", **FEW)
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


def test_a_run_is_one_process_s_until_that_is_gone(tmp_path):
    hold = ("import sys, time; from pathlib import Path; from advdpnp.runs import at_work\n"
            "with at_work(Path(sys.argv[1])): print('at work', flush=True); time.sleep(60)")
    with subprocess.Popen([sys.executable, "-c", hold, str(tmp_path)], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "at work\n"
        assert worker(tmp_path).startswith(f"process {other.pid} on ") and status(tmp_path)[0] == "running"
        with pytest.raises(RuntimeError, match=f"process {other.pid} on .* is at work"), at_work(tmp_path):
            pass
        other.kill()  # its mark stays
    assert (tmp_path / "running").exists() and worker(tmp_path) is None
    with at_work(tmp_path):
        assert worker(tmp_path).startswith(f"process {os.getpid()} on ")


def test_the_process_of_another_user_is_alive(tmp_path, monkeypatch):
    (tmp_path / "running").write_text("process 1 on this machine")

    def lock(path, timeout):
        raise PermissionError

    monkeypatch.setattr(advdpnp.runs, "FileLock", lock)
    assert worker(tmp_path) == "process 1 on this machine"


def test_a_run_says_what_each_of_its_sittings_was_made_with(tmp_path, monkeypatch):
    ledger, config = Ledger(tmp_path, "cpu", quiet=True), make_config("standard", "quick", device="cpu", **FEW)
    real, where = advdpnp.runs.provenance, ["another processor"]
    monkeypatch.setattr(advdpnp.runs, "provenance", lambda device: real(device) | dict(device=where[0]))
    assert not ledger.train(config, 1e-9)
    where[0] = "this processor"
    assert not ledger.train(config, 1e-9) and not ledger.train(config, 1e-9)
    assert ledger.run(config)["trained_with"]["device"] == "this processor"
    assert [sitting["device"] for sitting in ledger.run(config)["trained_with"]["others"]] == ["another processor"]


def test_what_is_damaged_or_lost_is_said(tmp_path):
    ledger, config = Ledger(tmp_path, "cpu", quiet=True), make_config("standard", "quick", device="cpu", **FEW)
    ledger.train(config)
    state = (ledger.folder(config) / "state.pt").rename(tmp_path / "state.pt")
    with pytest.raises(ValueError, match="state.pt is not there"):
        ledger.measure(config)
    state.rename(ledger.folder(config) / "state.pt")
    ledger.measure(config)
    (ledger.folder(config) / "result.json").write_text("{")
    assert status(ledger.folder(config))[0] == "damaged"


def test_a_complete_table_takes_the_place_of_its_part(tmp_path, monkeypatch):
    monkeypatch.setitem(advdpnp.runs.PRESETS, "quick", advdpnp.runs.PRESETS["quick"] | FEW)
    monkeypatch.setattr(advdpnp.tables, "METHODS",
                        {name: advdpnp.tables.METHODS[name] for name in ("standard", "DPNP")})
    make = lambda methods: make_table(1, "quick", methods=methods, device="cpu", data_dir=tmp_path, jobs=1, quiet=True)
    assert make("standard").stem.name == "table1.quick.partial" and list((tmp_path / "results").glob("*.partial.*"))
    assert make("").stem.name == "table1.quick" and not list((tmp_path / "results").glob("*.partial.*"))


def test_a_chosen_setting_is_one_row_of_the_trade_off(tmp_path):
    adopt(RESULTS / "table7.quick.json", tmp_path, "cpu")
    table = make_table(7, "quick", methods="TRADES beta=1", time_limit=0, device="cpu", data_dir=tmp_path, quiet=True)
    assert table.stem.name == "table7.quick"
    assert len(table.records) == len(json.loads((RESULTS / "table7.quick.json").read_text()))


def test_an_ablation_is_compared_seed_by_seed(tmp_path):
    for name in ("table1.small.json", "table6.small.partial.json", "table6.small.json"):
        if (RESULTS / name).exists():
            adopt(RESULTS / name, tmp_path, "cpu")

    def seeds(number, **asked):
        table = make_table(number, "small", methods="Adv-DPNP", time_limit=0, device="cpu", data_dir=tmp_path,
                           quiet=True, **asked)
        return {r["seed"] for r in table.records}

    assert seeds(1) == {0, 1, 2} and seeds(6) == {0} and seeds(6, seeds="0, 1") == {0, 1}


def test_a_script_that_lacks_the_guard_is_told_so(tmp_path):
    script = tmp_path / "mine.py"
    script.write_text(f"from advdpnp.runs import Ledger, make_config\n"
                      f"Ledger({str(tmp_path)!r}, 'cpu', quiet=True).run_all([make_config('standard', 'quick', seed, "
                      f"'cpu') for seed in (0, 1)], jobs=2)\n")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True)
    assert done.returncode
    assert 'a script starts runs outside of `if __name__ == "__main__":`' in done.stderr.splitlines()[-1]
