"Files and names of others: nothing in them is run, nothing leads out of its folder, nothing becomes a page's own."
import io
import json
import os
import pickle
import re
import shutil
import socket
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some
from typer.testing import CliRunner

from advdpnp.cli import app
from advdpnp.core import as_text, markdown, plain_name, write_json
from advdpnp.data import load_dataset
from advdpnp.evaluation import report
from advdpnp.hub import pack, publish
from advdpnp.runs import Ledger, load_checkpoint, make_config
from advdpnp.tables import readable
from advdpnp.training import load_state

from conftest import TINY

DATA = Path(__file__).parent.parent / "data"
GOOD = DATA / "weights/Adv-DPNP-cifar10-small"


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    "Nothing here may ask the network."
    def refuse(*_, **__):
        raise AssertionError("the network was asked")
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


class Evil:
    "Makes a file when it is unpickled."

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def zipped(path, compression=zipfile.ZIP_STORED, **members):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in members.items():
            archive.writestr(f"archive/{name}", data)


def bomb(path):
    "A state of 200 MB in a file of 200 kB."
    whole = io.BytesIO()
    torch.save({"weights": torch.zeros(50_000_000)}, whole)
    with zipfile.ZipFile(whole) as source, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in source.namelist():
            archive.writestr(name, source.read(name))


STATES = {
    "a pickle": lambda path, evil: path.write_bytes(pickle.dumps(Evil(evil))),
    "a pickle, in PyTorch's old format": lambda path, evil: torch.save(Evil(evil), path,
                                                                     _use_new_zipfile_serialization=False),
    "a pickle, in PyTorch's format": lambda path, evil: torch.save({"weights": Evil(evil)}, path),
    "a bomb": lambda path, evil: bomb(path),
    "of another kind": lambda path, evil: torch.save([1, 2], path),
    "of other contents": lambda path, evil: torch.save({"epoch": "3"}, path),
    "a zip of other things": lambda path, evil: zipped(path, data="x"),
    "empty": lambda path, evil: zipped(path),
}


@pytest.mark.parametrize("kind", STATES)
def test_a_state_of_somebody_else_s_making_runs_nothing_and_is_refused(tmp_path, kind):
    STATES[kind](tmp_path / "state.pt", tmp_path / "evil")
    with pytest.raises(ValueError, match="state.pt is damaged or not the state of a run") as found:
        load_state(tmp_path / "state.pt")
    assert not (tmp_path / "evil").exists()
    assert kind != "a bomb" or "it is compressed" in str(found.value)  # refused before it is unpacked


def test_a_state_of_another_network_is_refused(digits, tmp_path):
    ledger = Ledger(tmp_path, "cpu", quiet=True)
    one, other = (make_config(method, "quick", device="cpu", **TINY) for method in ("standard", "DPNP"))
    for config in (one, other):
        ledger.train(config)
    shutil.copy(ledger.folder(one) / "state.pt", ledger.folder(other))
    with pytest.raises(ValueError, match="state.pt is not of this network|best.safetensors is missing or damaged"):
        ledger.trainer(other)


def test_weights_that_are_a_pickle_run_nothing(tmp_path):
    shutil.copy(GOOD / "record.json", tmp_path / "config.json")
    for evil in (pickle.dumps(Evil(tmp_path / "evil")), (2**62).to_bytes(8, "little") + b"{}",
                 b"\x02\0\0\0\0\0\0\0{}", b'\x50\0\0\0\0\0\0\0{"a":{"dtype":"F32","shape":[9999999999],'
                 b'"data_offsets":[0,39999999996]}}      '):
        (tmp_path / "best.safetensors").write_bytes(evil)
        with pytest.raises(ValueError, match="best.safetensors is damaged"):
            load_checkpoint(tmp_path)
    assert not (tmp_path / "evil").exists()


def deep(levels=100_000):
    return "[" * levels


CHANGES = [  # of a configuration that comes with weights
    dict(method=7), dict(method=["TRADES"]), dict(method="__import__('os')"), dict(method="../TRADES"),
    dict(method="TRADES\n"), dict(arch=None), dict(arch=3), dict(arch="hf-hub:evil/model"), dict(arch="local-dir:/etc"),
    dict(arch="../../etc/passwd"), dict(arch="cifar_resnet8/../x"), dict(norm=[2.5]), dict(norm={"a": 1}),
    dict(norm=10**400), dict(norm=-1.0), dict(norm="wide"), dict(dataset="../-x"), dict(dataset=".."),
    dict(dataset={}), dict(preset="x" * 10**6), dict(preset=None), dict(eps="8/255"), dict(steps=1e9),
    dict(epochs=True), dict(side="16px"),
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: str(change)[:40])
def test_a_configuration_of_other_kinds_is_refused(tmp_path, change):
    about = json.loads((GOOD / "record.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({"run": about["run"] | change}))
    shutil.copy(GOOD / "model.safetensors", tmp_path / "best.safetensors")
    with pytest.raises(ValueError) as found:
        load_checkpoint(tmp_path)
    said = str(found.value)
    assert ("config.json is not of a run of the ledger" in said or "of another network" in said) and len(said) < 1200


@pytest.mark.parametrize("text", ["", "[]", "3", "null", '{"run": []}', '{"run": {}}', '{"run": "x"}', deep(),
                                  '{"run": {"method": "TRADES"}}', '{"run": 1' + "0" * 5000 + "}", "\x00\xff",
                                  '{"a":' * 9])
def test_a_configuration_that_is_none_is_refused(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    shutil.copy(GOOD / "model.safetensors", tmp_path / "best.safetensors")
    with pytest.raises(ValueError, match="config.json (is damaged|is not of a run)") as found:
        load_checkpoint(tmp_path)
    assert len(str(found.value)) < 1000
    done = CliRunner().invoke(app, ["evaluate", str(tmp_path)])
    assert done.exit_code == 1 and "Traceback" not in done.output and len(done.stderr.splitlines()) == 1


NAMES = ["../../x", "..", ".", "", "/etc/passwd", "a/b", "a\\b", "C:\\x", "x\0y", "x\ny", ".hidden", "~", "x" * 300,
         "$(touch x)", "a;b", "-rf/", "|", "*"]


@pytest.mark.parametrize("name", NAMES)
def test_no_name_leads_out_of_its_folder(tmp_path, name):
    with pytest.raises(ValueError, match="expected a name of 1 to 200 letters"):
        plain_name(name, "name")
    config = make_config("standard", "quick", device="cpu")
    with pytest.raises(ValueError, match="name of the network is .*: expected a name of 1 to 200 letters"):
        publish(Ledger(tmp_path, "cpu"), config, name) if name else plain_name(name, "name of the network")
    try:  # a data set may be named by where it lies; its runs are not there
        config = make_config("standard", "quick", device="cpu", dataset=name)
    except ValueError:
        pass
    else:
        assert "/" in name and Ledger(tmp_path, "cpu").folder(config).resolve().is_relative_to(tmp_path / "runs")
    with pytest.raises(ValueError, match="unknown"):
        make_config(name, "quick", device="cpu")
    with pytest.raises(ValueError, match="unknown preset"):
        make_config("standard", name, device="cpu")
    assert list(tmp_path.iterdir()) == []


@settings(max_examples=25, deadline=None)
@given(some.text(max_size=30), some.text(max_size=30))
def test_a_run_s_folder_is_in_the_data_folder(arch, word):
    config = make_config("Adv-DPNP", "quick", device="cpu") | dict(arch=arch, norm=word, changes=["norm"])
    folder = Ledger("data", "cpu").folder(config)
    assert folder.parent == Path("data/runs/digits") and not {"/", "\\", "\0"} & {*folder.name}


def test_an_archive_is_read_in_memory_and_holds_no_objects(tmp_path, digits):
    arrays = dict(x_test=digits.x_test[:20], y_test=digits.y_test[:20])
    np.savez(tmp_path / "a.npz", **arrays, **{"../../evil": np.zeros(3), "/evil": np.zeros(3)})
    assert len(load_dataset(tmp_path / "a.npz").x_test) == 20
    assert [path.name for path in tmp_path.iterdir()] == ["a.npz"] and not Path("/evil.npy").exists()
    np.savez(tmp_path / "b.npz", **arrays, class_names=np.array([Evil(tmp_path / "evil")] * 10, object))
    with pytest.raises(ValueError, match="b.npz holds Python objects"):
        load_dataset(tmp_path / "b.npz")
    assert not (tmp_path / "evil").exists()


EVIL = "a|b`c\n| <script>alert(1)</script> \\| [x](javascript:alert(1)) ![x](http://x/y) <img src=x onerror=y>"


def harmless(text):
    "Whether Markdown shows words and tables of ours alone."
    return not (re.search(r"<[a-zA-Z/!?]", text) or re.search(r"\](?=\()", text) or re.search(r"(?<!\\)`", text))


def columns(line):
    return len(re.findall(r"(?<!\\)\|", line))


def test_words_of_others_stay_words():
    line = as_text(EVIL)
    assert harmless(line) and "\n" not in line and columns(line) == 0
    table = markdown([["method", EVIL], [EVIL, "3"]]).splitlines()
    assert len(table) == 3 and {*map(columns, table)} == {3} and all(map(harmless, table))


@settings(max_examples=25, deadline=None)
@given(some.text(max_size=60))
def test_any_words_stay_in_their_cell(words):
    table = markdown([["method", words], [words, "3"]]).split("\n")
    assert len(table) == 3 and {*map(columns, table)} == {3}


def test_a_record_of_somebody_else_s_making_stays_in_its_table():
    record = json.loads((DATA / "results/table1.quick.json").read_text())[0]
    for name in ("method", "dataset", "arch", "device"):
        record[name] = EVIL
    record["best"]["checks"][0] |= dict(name=EVIL, found=EVIL, expected=EVIL, passed=False)
    assert harmless(readable([record])) and {*map(columns, readable([record]).splitlines()[2:])} == \
        {columns(readable([record]).splitlines()[0])}
    best = record["best"]
    best["metrics"] = {EVIL: best["metrics"]["clean"], "worst": best["metrics"]["worst"]}
    said = report(best)
    assert harmless(said) and {columns(line) for line in said.splitlines() if line.startswith("|")} == {5}


def test_a_list_of_runs_holds_a_line_a_run_whatever_their_names_and_files(tmp_path):
    for i, name in enumerate(["a\x1b[2Jb", "c\nd", "e|f", "<script>"]):
        run = tmp_path / "runs/digits" / name
        run.mkdir(parents=True)
        (run / "config.json").write_text("{")
        (run / "error.txt").write_text("ValueError: \x1b[31mred" if i % 2 else "\x00")
    listed = CliRunner().invoke(app, ["runs", "--data-dir", str(tmp_path)]).stdout
    assert len(listed.splitlines()) == 4 and listed.replace("\n", "").isprintable() and "failed" in listed


def test_a_pack_holds_names_below_the_data_folder_alone(tmp_path):
    run = tmp_path / "data/runs/digits/standard-cifar_resnet8-quick-s0"
    run.mkdir(parents=True)
    write_json(run / "result.json", dict(best=1))
    (run / "secret.json").symlink_to("/etc/passwd")
    pieces = pack("quick", tmp_path / "packed", tmp_path / "data")
    whole = io.BytesIO(b"".join(piece.read_bytes() for piece in pieces))
    with tarfile.open(fileobj=whole) as archive:
        for member in archive.getmembers():
            assert not member.name.startswith("/") and ".." not in Path(member.name).parts and member.isfile()
