"Runs side by side on one machine: which sees which card, and what becomes of a run whose worker dies."
import os
import signal
import time
import warnings
from concurrent.futures import Future
from unittest import mock

import pytest
import torch
from joblib.externals.loky import BrokenProcessPool

import advdpnp.runs
from advdpnp.core import read_weights
from advdpnp.runs import Ledger, Workers, cards, make_config
from advdpnp.training import Trainer

from conftest import TINY

CONFIGS = [make_config("standard", "quick", seed, "cpu", **TINY | dict(epochs=2)) for seed in (0, 1)]


def test_a_worker_that_is_replaced_because_it_has_grown_is_no_news(recwarn):
    with Workers(1):
        warnings.warn("A worker stopped while some jobs were given to the executor. [...] or by a memory leak.")
    assert not recwarn.list


@pytest.fixture
def gpus(monkeypatch):
    "Makes this a machine of so many GPUs."
    return lambda count: monkeypatch.setattr(torch.cuda, "device_count", lambda: count)


@pytest.mark.parametrize("said, found", [
    (None, ["0", "1", "2", "3"]), ("2,0", ["2", "0"]), ("GPU-7f, GPU-3a", ["GPU-7f", "GPU-3a"]),
    ("MIG-5b,3,-1,1", ["MIG-5b", "3"]),  # CUDA stops at what is no card
])
def test_cards_are_those_that_somebody_has_left_visible(monkeypatch, gpus, said, found):
    gpus(len(found))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if said:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", said)
    assert cards(torch.device("cuda")) == found and cards(torch.device("cuda:1")) == found[1:2]
    assert cards(torch.device("cpu")) == []


@pytest.mark.parametrize("jobs, asked", [("auto", 4), (2, 2), (6, 6)])
def test_auto_is_a_run_on_each_card(monkeypatch, tmp_path, jobs, asked):
    seen = []

    class Recorder(Workers):
        def __init__(self, *arguments):
            seen.append(arguments)
            super().__init__(*arguments)

        def do(self, function, work):
            assert all(device == "cpu" for _, device, *_ in work)  # no card's number: a worker sees one alone
            return []

    names = ["GPU-a", "GPU-b", "GPU-c", "GPU-d"]
    monkeypatch.setattr(advdpnp.runs, "cards", lambda device: names)
    monkeypatch.setattr(advdpnp.runs, "Workers", Recorder)
    configs = [make_config("standard", "quick", seed, "cpu", **TINY) for seed in range(8)]
    Ledger(tmp_path, "cpu", quiet=True).run_all(configs, jobs)
    assert seen == [(asked, names)]


def note(folder, number):
    "Which card a worker saw, and from when to when."
    began = time.time()
    time.sleep(0.3)
    (folder / str(number)).write_text(f"{os.environ['CUDA_VISIBLE_DEVICES']} {began} {time.time()}")


def test_no_card_is_used_twice_at_once(tmp_path):
    with Workers(2, ["GPU-a", "GPU-b"]) as workers:
        assert workers.do(note, [(tmp_path, number) for number in range(6)]) == []
    used = [path.read_text().split() for path in tmp_path.iterdir()]
    assert {card for card, *_ in used} == {"GPU-a", "GPU-b"} and len(used) == 6
    for card in ("GPU-a", "GPU-b"):
        times = sorted((float(began), float(ended)) for seen, began, ended in used if seen == card)
        assert all(ended <= began for (_, ended), (began, _) in zip(times, times[1:]))


def train(folder, config, deadly):
    "Train a run; in the worker that comes first, in the middle of its second epoch, somebody kills it."
    step, died = Trainer.step, folder / "died"
    (folder / f"{config['seed']}-{os.getpid()}").touch()

    def killed(self, *batch):
        if deadly and (self.epoch, self.batch) == (1, 1) and not died.exists():
            died.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return step(self, *batch)

    Trainer.step = killed
    Ledger(folder, "cpu", quiet=True).train(config)


def test_a_worker_that_dies_costs_its_run_alone_and_that_goes_on_elsewhere(tmp_path):
    with Workers(2) as workers:
        assert workers.do(train, [(tmp_path, config, config is CONFIGS[0]) for config in CONFIGS]) == []
    tries = [path.name.split("-")[0] for path in tmp_path.glob("?-*")]
    assert sorted(tries) == ["0", "0", "1"]
    through, ledger = Ledger(tmp_path / "through", "cpu", quiet=True), Ledger(tmp_path, "cpu")
    for config in CONFIGS:
        through.train(config)
        one, other = (read_weights(of.folder(config) / "last.safetensors") for of in (through, ledger))
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_run_whose_workers_die_again_and_again_is_given_up():
    tried = []

    class Dying(Workers):
        def submit(self, slot, function, arguments):
            tried.append((slot, *arguments))
            task, self.processes[slot] = Future(), mock.Mock()
            task.set_exception(BrokenProcessPool("out of memory")) if arguments == ("bad",) else task.set_result(None)
            return task

    error, = Dying(2).do(print, [("bad",), ("good",)])
    assert str(error) == "out of memory"
    assert [name for _, name in tried].count("bad") == 3 and [name for _, name in tried].count("good") == 1


def test_workers_share_the_cores(monkeypatch):
    "Shards of a large evaluation would otherwise use all cores each; who has said a number keeps it."
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(advdpnp.runs, "cores", lambda: 6)
    for said, found in ((None, "3"), ("1", "1")):
        if said:
            monkeypatch.setenv("OMP_NUM_THREADS", said)
        with Workers(2) as workers:
            assert workers.submit(0, os.getenv, ["OMP_NUM_THREADS"]).result() == found


def stop_once(folder, number):
    "A piece of work; whoever does the first one ends its worker, as `kill` does."
    if not (folder / "stopped").exists():
        (folder / "stopped").touch()
        os.kill(os.getpid(), signal.SIGTERM)
    (folder / str(number)).touch()


def test_a_worker_that_is_asked_to_stop_is_replaced_and_its_work_is_done(tmp_path):
    with Workers(1) as workers:
        assert workers.do(stop_once, [(tmp_path, number) for number in range(6)]) == []
    assert {path.name for path in tmp_path.iterdir()} == {"stopped", *"012345"}


def interrupt(parent):
    os.kill(parent, signal.SIGINT)
    time.sleep(60)


def test_an_interrupted_command_does_not_wait_for_its_workers():
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt), Workers(2) as workers:
        workers.do(interrupt, [(os.getpid(),), (os.getpid(),)])
    assert time.monotonic() - began < 30  # and not for a minute


def test_a_worker_that_has_just_died_does_not_cost_the_others_their_time_to_save(monkeypatch):
    gone = mock.Mock(_processes=[2**22 + 1])
    workers = Workers(1)
    workers.processes[0] = gone
    workers.stop([])
    gone.shutdown.assert_called_once()
