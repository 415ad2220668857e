"What a full disk, a damaged file, another process or a wrong clock does: it is found and named, and nothing is lost."
import contextlib
import errno
import fcntl
import json
import os
import random
import resource
import shutil
import signal
import site
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import advdpnp.data
from advdpnp.attacks import FGSM, PGD
from advdpnp.autoattack import AutoAttack
from advdpnp.core import _HERE, place_of, read_json, replacing, signals_wait, write_json
from advdpnp.corruptions import corrupted_images
from advdpnp.data import load_dataset
from advdpnp.evaluation import Resume
from advdpnp.methods import AdvDPNP
from advdpnp.prototypes import PrototypeNet
from advdpnp.runs import RECORDS, Ledger, load_checkpoint, make_config, status
from advdpnp.training import Trainer, load_state

from conftest import TINY

CONFIG = make_config("Adv-DPNP", "quick", device="cpu", **TINY)


def attacks(config):
    return [FGSM(0.2), AutoAttack(0.2, steps=2, targets=1, queries=5)]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    "A data folder with a run that is trained and measured, and what is found in it."
    ledger = Ledger(tmp_path_factory.mktemp("finished"), "cpu", quiet=True)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("advdpnp.runs.attacks_of", attacks)
        patched.setitem(RECORDS, "geometry", lambda *_: dict(n=20))
        ledger.run(CONFIG)
        ledger.measure(CONFIG, kind="geometry")
    folder = ledger.folder(CONFIG)
    Resume(folder / "half.json", dict(data="a")).keeper("pgd20")(3, torch.ones(9, dtype=torch.bool))
    data = advdpnp.data.embedded_digits()
    np.savez(ledger.data_dir / "few.npz", x_train=data.x_train[:40], y_train=data.y_train[:40],
             x_test=data.x_test[:20], y_test=data.y_test[:20])
    return folder


def weights(path):
    return {name: value.tolist() for name, value in load_checkpoint(path)[0].state_dict().items()}


def archive(path):
    data = load_dataset(path)
    return data.sha256, data.class_names


def resumed(path):
    kept = Resume(path, dict(data="a"))
    return kept.stages, kept.before


def ledger_of(path):
    return Ledger(path.parents[3], "cpu", quiet=True)


def state(path):
    def plain(value):
        if isinstance(value, dict):
            return {key: plain(each) for key, each in value.items()}
        return value.tolist() if torch.is_tensor(value) else [*map(plain, value)] if isinstance(value, list) else value
    return plain(load_state(path))


READ = {  # a file to how it is read
    "state.pt": state,
    "best.safetensors": weights,
    "last.safetensors": weights,
    "config.json": lambda path: ledger_of(path).check(CONFIG),
    "result.json": lambda path: ledger_of(path).result(CONFIG),
    "geometry.json": lambda path: ledger_of(path).result(CONFIG, "geometry"),
    "trained.json": lambda path: read_json(path, "versions"),
    "half.json": resumed,
    "few.npz": archive,
}


def damages(whole):
    "Truncated, and with one bit changed in the header, in the middle, at the end and at random places."
    chance = random.Random(0)
    for size in (0, 1, len(whole) // 3, len(whole) - 100, len(whole) - 1):
        yield f"truncated to {size} bytes", whole[:size]
    for place in (0, 9, 40, len(whole) // 2, len(whole) - 3, *(chance.randrange(len(whole)) for _ in range(12))):
        changed = bytes([whole[place] ^ 1 << chance.randrange(8)])
        yield f"a bit of byte {place}", whole[:place] + changed + whole[place + 1:]


@pytest.mark.parametrize("name", READ)
def test_a_damaged_file_is_named_and_never_used(finished, tmp_path, name):
    data = tmp_path / "data"
    shutil.copytree(finished.parents[2], data)
    path, = data.rglob(name)
    read, whole = READ[name], path.read_bytes()
    right = read(path)
    for what, damaged in damages(whole):
        path.write_bytes(damaged)
        try:
            found = read(path)
        except ValueError as error:
            said = str(error)
            assert name in said and "\n" not in said, (what, said)
            assert "delete" not in said or name == "few.npz", (what, said)  # that one alone, and it is damaged
            assert any(word in said for word in ("damaged", "lacks", "expected", "another")), (what, said)
        else:
            assert found == right, what  # a byte that means nothing
    assert path.read_bytes() == damaged  # it is the user's to move away


def test_lines_of_metrics_are_for_people_and_are_written_again(finished, tmp_path):
    folder = tmp_path / "data/runs/digits" / finished.name
    shutil.copytree(finished, folder)
    lines = (folder / "metrics.jsonl").read_bytes()
    for name in ("trained.json", "result.json"):
        (folder / name).unlink()
    (folder / "metrics.jsonl").write_bytes(b"\xff" + lines[:9])
    assert status(folder) == ("interrupted", "after 1 epochs")
    Ledger(tmp_path / "data", "cpu", quiet=True).train(CONFIG)
    assert (folder / "metrics.jsonl").read_bytes() == lines


def test_what_became_of_a_run_is_said_whatever_its_files_hold(tmp_path):
    write_json(tmp_path / "config.json", {})
    (tmp_path / "error.txt").touch()
    assert status(tmp_path) == ("failed", "for reasons unknown")
    for text in ("[]", "3", '{"best": 1}', '{"best": {"metrics": {}}}', "[" * 100000, "\0"):
        (tmp_path / "result.json").write_text(text)
        assert status(tmp_path)[0] == "damaged"


# No room


@contextlib.contextmanager
def no_file_above(size):
    "No file of this process can grow beyond so many bytes, as on a full disk."
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def trainer(digits, folder, **settings):
    torch.manual_seed(0)
    few = replace(digits, x_train=digits.x_train[:200], y_train=digits.y_train[:200])
    net = PrototypeNet("cifar_resnet8", 10, mean=few.mean, std=few.std)
    return Trainer(net, AdvDPNP(eps=0.2, steps=1), few, folder=folder, device="cpu", quiet=True,
                   **dict(epochs=2, batch_size=32, val_size=40, val_attack=PGD(0.2, steps=1)) | settings)


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@contextlib.contextmanager
def full_disk(folder):
    "A folder on a disk of four megabytes."
    folder.mkdir()
    done = shutil.which("mount") and subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "none", folder],
                                                    capture_output=True)
    if not done or done.returncode:
        pytest.skip("a small disk cannot be made here: mount needs a privileged user")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def test_a_full_disk_stops_training_and_leaves_the_last_good_state(digits, tmp_path):
    with full_disk(tmp_path / "run"):
        half = trainer(digits, tmp_path / "run")
        half.fit(time_limit=0)
        before = files(tmp_path / "run")
        (tmp_path / "run/filler").write_bytes(bytes(2**22 - sum(map(len, before.values())) - 50_000))
        with pytest.raises(OSError, match=r"best.*safetensors cannot be written \(No space left on device\)"):
            half.fit()
        (tmp_path / "run/filler").unlink()
        assert files(tmp_path / "run") == before
        assert trainer(digits, tmp_path / "run").fit()


def test_no_room_for_a_state_leaves_the_last_good_one(digits, tmp_path):
    through, half = trainer(digits, tmp_path / "through"), trainer(digits, tmp_path / "half", save_every=0.0)
    through.fit()
    half.fit(time_limit=0)
    before = files(tmp_path / "half")
    with no_file_above(100_000), pytest.raises(OSError, match=r"state.pt cannot be written \(File too large\)"):
        half.fit()
    assert files(tmp_path / "half") == before  # and no part of a file
    trainer(digits, tmp_path / "half").fit()
    for name in ("best.safetensors", "last.safetensors"):
        assert files(tmp_path / "half")[name] == files(tmp_path / "through")[name]


def write_archive(folder):
    advdpnp.data.make_archive("cifar10", folder / "cifar10.npz")


def write_corruptions(folder):
    corrupted_images(load_dataset("digits"), folder, ["contrast"], images=100)


def write_verdicts(folder):
    Resume(folder / "half.json", dict(data="a")).keeper("pgd20")(3, torch.ones(200_000, dtype=torch.bool))


@pytest.mark.parametrize("write", [write_archive, write_corruptions, write_verdicts])
def test_no_room_for_any_other_file_is_said_and_leaves_no_part(tmp_path, monkeypatch, write):
    images = np.zeros((200, 8, 8, 1), np.uint8), np.arange(200) % 10
    monkeypatch.setattr("advdpnp.data.official_arrays", lambda *_: dict(x_train=images[0], y_train=images[1],
                                                                       x_test=images[0], y_test=images[1]))
    with no_file_above(5000), pytest.raises(OSError, match=r"\.(npz|npy|json) cannot be written \(.+\): expected a"):
        write(tmp_path)
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.name != "config.json"]
    write(tmp_path)


@pytest.mark.parametrize("place", ["/proc/nothing/run", "a file/run"])
def test_a_folder_that_cannot_be_written_is_named(digits, tmp_path, monkeypatch, place):
    monkeypatch.chdir(tmp_path)
    Path("a file").touch()
    with pytest.raises(OSError, match=f"{place}/config.json cannot be written .*: expected a folder"):
        trainer(digits, place)


def test_a_folder_that_may_not_be_changed_is_named(digits, tmp_path):
    trainer(digits, tmp_path).fit(time_limit=0)
    if not shutil.which("chattr") or subprocess.run(["chattr", "+i", tmp_path], capture_output=True).returncode:
        pytest.skip("a folder cannot be made unchangeable here")
    try:
        with pytest.raises(OSError, match="cannot be written .*: expected a folder"):
            trainer(digits, tmp_path).fit()
    finally:
        subprocess.run(["chattr", "-i", tmp_path], check=True)


# Parts of files


def test_parts_of_dead_processes_are_removed_and_those_of_living_ones_stay(tmp_path):
    names = [name.format(_HERE) for name in (".state.{}a1b2c.part.pt", ".lock.{}a1b2c.part", ".state.{}11111.part.pt",
                                             ".mine.part.txt", "a.part.txt")]
    for name in names:
        (tmp_path / name).touch()
    with open(tmp_path / names[2]) as alive:
        fcntl.flock(alive, fcntl.LOCK_EX)  # as the process that writes it does
        write_json(tmp_path / "any.json", {})
        assert {path.name for path in tmp_path.iterdir()} == {*names[2:], "any.json"}
    write_json(tmp_path / "any.json", {})
    assert {path.name for path in tmp_path.iterdir()} == {*names[3:], "any.json"}


def test_parts_of_another_machine_stay_for_an_hour(tmp_path):
    "Some clusters show a lock on its own machine alone."
    theirs = tmp_path / ".state.00000000.part.pt"
    theirs.touch()
    write_json(tmp_path / "any.json", {})
    assert theirs.exists()
    os.utime(theirs, (time.time() - 4000,) * 2)
    write_json(tmp_path / "any.json", {})
    assert not theirs.exists()


def test_two_that_write_one_file_at_a_time_do_not_remove_each_other_s_part(tmp_path):
    path = tmp_path / "file"
    with replacing(path) as first:
        first.write_text("first")
        with replacing(path) as second:
            second.write_text("second")
        assert first.exists() and path.read_text() == "second"
    assert path.read_text() == "first" and os.listdir(tmp_path) == ["file"]


# The clock


def test_a_clock_that_jumps_back_changes_nothing(finished, tmp_path, monkeypatch):
    moments = iter(range(10**9, 0, -3600))
    monkeypatch.setattr("time.time", lambda: float(next(moments)))
    monkeypatch.setattr("advdpnp.runs.attacks_of", attacks)
    ledger = Ledger(tmp_path, "cpu", quiet=True)
    record = ledger.run(CONFIG, time_limit=600)
    known = read_json(finished / "result.json")
    for which in ("best", "last"):
        assert record[which]["metrics"] == known[which]["metrics"] and record[which]["seconds"] >= 0
        assert record[which]["sha256"] == known[which]["sha256"]
    assert all(line["seconds"] >= 0 for line in record["history"])
    assert ledger.measure(CONFIG, time_limit=0, kind="geometry") is None


# Checkpoints write what has changed


def test_best_weights_are_written_when_they_change_and_are_not_in_the_state(digits, tmp_path):
    t = trainer(digits, tmp_path, lr=2.0, epochs=3)
    best, written = tmp_path / "best.safetensors", []
    end = t._end_epoch
    t._end_epoch = lambda: (end(), written.append((t.best["epoch"], best.stat().st_mtime_ns)))
    t.fit()
    assert len({*written}) == len({epoch for epoch, _ in written}) < 3
    state = load_state(tmp_path / "state.pt")
    assert "weights" not in state["best"]
    again = trainer(digits, tmp_path, lr=2.0, epochs=3)
    assert all(torch.equal(value, again.weights("best")[name]) for name, value in t.weights("best").items())


def test_states_of_older_versions_go_on(digits, tmp_path):
    "They hold the best weights, and there are no checksums."
    through, half = (trainer(digits, tmp_path / name, lr=2.0, epochs=3) for name in ("through", "half"))
    through.fit()
    half._late = lambda deadline: half.epoch == 2
    half.fit()
    state = load_state(tmp_path / "half/state.pt")
    state["best"]["weights"] = half.weights("best")
    del state["best"]["sha256"]
    torch.save(state, tmp_path / "half/state.pt")
    config = read_json(tmp_path / "half/config.json")
    (tmp_path / "half/config.json").write_text(json.dumps(config))
    (tmp_path / "half/best.safetensors").unlink()
    trainer(digits, tmp_path / "half", lr=2.0, epochs=3).fit()
    for name in ("best.safetensors", "last.safetensors"):
        assert files(tmp_path / "half")[name] == files(tmp_path / "through")[name]


def test_what_a_killed_process_left_is_removed_from_nfs_too(tmp_path, monkeypatch):
    "There an exclusive lock needs a file that is open for writing (flock(2))."
    flock = fcntl.flock

    def on_nfs(file, operation):
        if operation & fcntl.LOCK_EX and not file.writable():
            raise OSError(errno.EBADF, "Bad file descriptor")
        flock(file, operation)

    monkeypatch.setattr(fcntl, "flock", on_nfs)
    part = tmp_path / f".record.{_HERE}00000.part.json"
    part.write_text("half")
    write_json(tmp_path / "record.json", dict(n=1))
    assert [path.name for path in tmp_path.iterdir()] == ["record.json"]


def test_files_are_written_where_there_are_no_locks(tmp_path, monkeypatch):
    monkeypatch.setattr("advdpnp.core.fcntl", None)  # Windows
    write_json(tmp_path / "a.json", dict(n=1))
    assert read_json(tmp_path / "a.json") == dict(n=1) and os.listdir(tmp_path) == ["a.json"]


def test_a_file_that_a_block_wanted_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="gone.txt"), replacing(tmp_path / "out.txt") as part:
        part.write_text((tmp_path / "gone.txt").read_text())
    assert not [*tmp_path.iterdir()]


def test_ctrl_c_is_not_lost_behind_an_error():
    with pytest.raises(KeyboardInterrupt), signals_wait():
        signal.raise_signal(signal.SIGINT)
        raise ValueError("the loss is not finite")


def test_a_user_s_libraries_are_libraries(tmp_path):
    code = compile("def fails():\n    raise KeyError\n", f"{site.getusersitepackages()}/torch/x.py", "exec")
    exec(code, names := {})
    with pytest.raises(KeyError) as error:
        names["fails"]()
    assert Path(__file__).name in place_of(error.value)
