"The doctor finds what is broken, and nothing else; imports may stand in any order in the environment that make builds."
import importlib.metadata
import importlib.util
import subprocess
import sys

import pytest
from typer.testing import CliRunner

import advdpnp.doctor
from advdpnp.cli import app
from advdpnp.doctor import PAIRS, examine, order_of_imports, versions


def broken(findings):
    return [str(finding) for finding in findings if finding.state == "broken"]


def test_nothing_is_broken_here_and_an_empty_folder_is_fine(tmp_path):
    assert broken(examine(tmp_path / "not" / "made")) == []
    found = CliRunner().invoke(app, ["doctor", "--data-dir", str(tmp_path)])
    assert found.exit_code == 0 and "ok      torch: " in found.stdout and not [*tmp_path.iterdir()]


def test_what_is_broken_is_named_and_the_command_fails(tmp_path):
    (tmp_path / "results").mkdir()
    (tmp_path / "results/table1.quick.json").write_text('[{"method": ')
    (tmp_path / "mine.npz").write_bytes(b"PK\x03\x04")
    run = tmp_path / "runs/digits/Adv-DPNP-cifar_resnet8-quick-s0"
    run.mkdir(parents=True)
    for name in ("config.json", "result.json"):
        (run / name).write_text("{" * (name == "result.json") or "{}")
    found = CliRunner().invoke(app, ["doctor", "--data-dir", str(tmp_path)])
    lines = [line for line in found.stdout.splitlines() if line.startswith("broken")]
    assert found.exit_code == 1 and len(lines) == 3
    assert "mine" in lines[0] and "table1.quick.json" in lines[1] and "quick-s0" in lines[2]


def test_in_a_terminal_each_finding_has_its_line(tmp_path, monkeypatch):
    monkeypatch.setattr("rich.console.Console.is_terminal", True)
    lines = CliRunner().invoke(app, ["doctor", "--data-dir", str(tmp_path)]).stdout.splitlines()
    assert len([line for line in lines if line.split()[0] in ("ok", "note", "broken")]) == len(examine(tmp_path))


@pytest.mark.parametrize("torch, vision, says", [
    ("2.13.0+cpu", "0.28.0", ""), ("2.11.0", "0.28.0", "torch 2.11 goes with torchvision 0.26: pip install "),
    ("2.12.1", "0.27.4+cu130", ""), ("3.0.0", "0.40.0", "")])
def test_pairs_that_do_not_belong_together(monkeypatch, torch, vision, says):
    real = importlib.metadata.version
    here = dict(torch=torch, torchvision=vision)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: here.get(name) or real(name))
    found = versions()
    assert len(broken(found)) == bool(says) and all(says in line for line in broken(found))
    assert ("tested with 2.11" in str(found[1])) == (torch[:4] not in PAIRS)


def test_an_import_that_fails_alone_gets_a_note(monkeypatch):
    monkeypatch.setattr(advdpnp.doctor, "imports_alone", lambda package: False)
    assert order_of_imports().state == "note" and "write `import advdpnp` before" in order_of_imports().todo


@pytest.mark.skipif(importlib.util.find_spec("torchvision_first") is None, reason="not the environment of make")
@pytest.mark.parametrize("order", ["timm, advdpnp", "torchvision, timm", "advdpnp, timm", "torch, torchvision"])
def test_imports_in_any_order(order, tmp_path):
    subprocess.run([sys.executable, "-c", f"import {order}"], check=True, cwd=tmp_path)
