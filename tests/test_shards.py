"An evaluation in shards is, image by image, that of one machine."
import json

import pytest
from typer.testing import CliRunner

import advdpnp.cli
from advdpnp.attacks import CW, FGSM, PGD, PrototypePGD
from advdpnp.autoattack import AutoAttack
from advdpnp.cli import app
from advdpnp.evaluation import attack_shard, evaluate, merge_shards

ATTACKS = [FGSM(0.2), PGD(0.2), CW(0.2, steps=10), PrototypePGD(0.2), AutoAttack(0.2, steps=5, targets=2, queries=40)]
HOW = dict(images=60, limits=dict(autoattack=37), check_images=10, batch_size=8, quiet=True)


@pytest.fixture(scope="module")
def whole(_defended, digits):
    return evaluate(_defended, digits, ATTACKS, **HOW)


@pytest.mark.parametrize("shards", [1, 2, 5])
def test_shards_find_what_one_machine_finds(_defended, digits, whole, tmp_path, shards):
    files = [tmp_path / f"{number}.json" for number in range(shards)]
    for number, file in enumerate(files):
        attack_shard(_defended, digits, ATTACKS, number, shards, file, **HOW)
    merge_shards(files, tmp_path / "merged")
    found = evaluate(_defended, digits, ATTACKS, resume=tmp_path / "merged", **HOW)
    clock = lambda record: {key: value for key, value in record.items() if key != "seconds"}
    assert clock(found) == clock(whole) and 0 < whole["metrics"]["autoattack"]["correct"] < 37


def test_shards_of_another_evaluation_are_not_merged(_defended, _undefended, digits, tmp_path):
    how = dict(images=8, quiet=True)
    for number, net in enumerate((_defended, _undefended)):
        attack_shard(net, digits, [FGSM(0.2)], number, 2, tmp_path / f"{number}", **how)
    with pytest.raises(ValueError, match="of several evaluations, or were measured on devices that round differently"):
        merge_shards([tmp_path / "0", tmp_path / "1"], tmp_path / "merged")
    with pytest.raises(ValueError, match="expected each once"):
        merge_shards([tmp_path / "0", tmp_path / "0"], tmp_path / "merged")


def test_shards_of_other_settings_are_refused(tmp_path):
    words, options = ("m.py:net", "digits", "0.1", "linf", None, "cpu", tmp_path), dict(images=20, quiet=True)
    advdpnp.cli.claim_shards(tmp_path / "shards", 2, words, None, options)
    advdpnp.cli.claim_shards(tmp_path / "shards", 2, words, None, options | dict(quiet=False))
    for change in ((2, (*words[:2], "0.3", *words[3:]), None, options), (2, words, None, dict(images=500)),
                   (3, words, None, options), (2, words, "other.py:net", options)):
        with pytest.raises(ValueError, match="holds another"):
            advdpnp.cli.claim_shards(tmp_path / "shards", *change)


MODELS = """
import torch


def net():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
"""


def test_the_command_shares_the_images_and_goes_on_from_shards_that_are_there(here, monkeypatch):
    words = ["evaluate", "their_models:net", "--dataset", "digits", "--images", "30", "--attacks", "fgsm,pgd20",
             "--device", "cpu", "--quiet", "--output"]
    real, fails = advdpnp.cli.Shard.__call__, [1]

    class Here:
        "Workers that are this process; one fails at first."
        def __init__(self, *arguments): pass
        def __enter__(self): return self
        def __exit__(self, *error): pass

        def do(self, function, work):
            done.append([more[2] for more in work])
            for more in work:
                if more[2] in fails:
                    fails.clear()
                    return [RuntimeError("out of memory")]
                real(function, *more)
            return []

    done = []
    monkeypatch.setattr("advdpnp.runs.Workers", Here)
    run = lambda *more: CliRunner().invoke(app, [*words, *more])
    assert (said := run("one.json")).exit_code == 0, said.stderr
    failed = run("three.json", "--shards", "3")
    assert failed.exit_code == 1 and "out of memory" in failed.stderr
    assert run("three.json", "--shards", "3").exit_code == 0
    assert done == [[0, 1, 2], [1, 2]]
    one, three = (json.loads((here / name).read_text()) for name in ("one.json", "three.json"))
    assert one["verdicts"] == three["verdicts"] and one["metrics"] == three["metrics"]
    assert sorted(path.name for path in here.glob(".three*")) == []
    kept = here / ".two.json.unfinished"  # of an evaluation without shards that was interrupted
    kept.write_text("{}")
    assert run("two.json", "--shards", "2").exit_code == 0 and not kept.exists()
    assert json.loads((here / "two.json").read_text())["verdicts"] == one["verdicts"]


def test_a_twin_that_is_not_there_is_said_before_the_first_attack(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models.py").write_text(MODELS)
    words = ["evaluate", "models.py:net", "--dataset", "digits", "--attacks", "fgsm", "--images", "20"]
    found = CliRunner().invoke(advdpnp.cli.app, [*words, "--shards", "2", "--twin", "models.py:gone"])
    assert found.exit_code == 1 and "gone" in found.stderr
    assert [path.name for path in tmp_path.iterdir() if path.name != "__pycache__"] == ["models.py"]
