"""What is wrong gets one sentence: it names the value or the file, and says what was expected.

One table for the command line, the parameters of notebooks, the functions and the files.
"""
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import advdpnp
from advdpnp.attacks import CW, FGSM, PGD, ThreatModel
from advdpnp.autoattack import AutoAttack
from advdpnp.cli import app, import_model, parse_eps, parse_settings, parse_time, run_notebook
from advdpnp.core import pick_device
from advdpnp.corruptions import corrupt, corrupted_images
from advdpnp.data import at_most, averaged, embedded_digits, hold_out, load_dataset
from advdpnp.evaluation import evaluate
from advdpnp.geometry import ByClass
from advdpnp.methods import TRADES, AdvDPNP, make_net, split_name
from advdpnp.prototypes import LinearNet, PrototypeHead, PrototypeNet, auto_norm, regular_simplex
from advdpnp.runs import Ledger, check_parameters, load_checkpoint, make_config
from advdpnp.tables import make_table
from advdpnp.training import Trainer

from conftest import files

NBS = Path(__file__).parent.parent / "nbs"
GOOD = NBS.parent / "data/weights/Adv-DPNP-cifar10-small"
MODELS = """
import torch

def linear():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10)).eval()

def wrong():
    return 3

def fails():
    return {}["weights"]

def needs(path):
    return linear()

made = linear()
"""


wrong = pytest.param


# The command line

MODEL, DATA = ["evaluate", "their_models:linear"], ["--dataset", "digits"]
COMMANDS = [
    (MODEL, "which data? name a data set with --dataset"),
    (["evaluate", "their_models:wrong", *DATA], "their_models:wrong returns int: expected a torch.nn.Module"),
    (["evaluate", "their_models:fails", *DATA], "their_models:fails() fails: KeyError: 'weights' ("),
    (["evaluate", "their_models:needs", *DATA], "their_models:needs needs path: expected a function without arguments"),
    (["evaluate", "their_models:gone", *DATA], "their_models:gone cannot be imported"),
    (["evaluate", "no_such_module:gone", *DATA], "no_such_module:gone cannot be imported"),
    (["evaluate", "nowhere", *DATA], "nowhere is neither a file or folder nor package.module:function"),
    (["evaluate", "their_models.py", *DATA], "which function in it returns the model? their_models.py:function"),
    (["evaluate", ".", *DATA], "best.safetensors is not there"),
    ([*MODEL, "--dataset", "digit"], "unknown data set 'digit': did you mean 'digits'"),
    ([*MODEL, "--dataset", "nothing/"], "nothing is no folder of images"),
    ([*MODEL, "--dataset", "gone.npz"], "gone.npz is not there: expected an .npz archive"),
    ([*MODEL, *DATA, "--eps", "8"], "eps is 8.0: expected 0 to 1"),
    ([*MODEL, *DATA, "--eps", "-0.1"], "eps is -0.1: expected 0 to 1"),
    ([*MODEL, *DATA, "--eps", "8:255"], "eps is '8:255': expected a number or a fraction"),
    ([*MODEL, *DATA, "--eps", "nan"], "eps is 'nan': expected a number or a fraction"),
    ([*MODEL, *DATA, "--eps", "0"], "eps is 0: nothing to attack with"),
    ([*MODEL, *DATA, "--attacks", "pgd"], "unknown attack 'pgd': did you mean 'pgd20'"),
    ([*MODEL, *DATA, "--attacks", "prototype"], "unknown attack 'prototype'"),
    ([*MODEL, *DATA, "--norm", "l2"], "--norm l2 needs --eps"),
    ([*MODEL, *DATA, "--norm", "l1"], "unknown norm 'l1'"),
    ([*MODEL, *DATA, "--robustbench", "x.json", "--autoattack-images", "5"], "on the whole test set"),
    ([*MODEL, *DATA, "--robustbench", "x.json", "--images", "5"], "on the whole test set: leave --images and"),
    ([*MODEL, *DATA, "--attacks", "fgsm", "--autoattack-images", "5"], "needs the attack autoattack"),
    ([*MODEL, *DATA, "--output", "x.json", "--robustbench", "x.json"], "--output and --robustbench are both x.json"),
    ([*MODEL, *DATA, "--output", "their_models.py"], "their_models.py is there already"),
    ([*MODEL, *DATA, "--device", "tpu"], "device is 'tpu': expected auto, cpu, cuda"),
    ([*MODEL, *DATA, "--attacks", "fgsm", "--images", "9", "--output", "/proc/nothing/x.json"],
     "cannot be written"),
    (["train", "Trades"], "unknown method 'Trades': did you mean 'TRADES'"),
    (["train", "TRADES+EMA+AWP"], "method 'TRADES+EMA+AWP': write it 'TRADES+AWP+EMA'"),
    (["train", "TRADES+SWA"], "unknown extra 'SWA'"),
    (["train", "TRADES", "--preset", "qick"], "unknown preset 'qick': did you mean 'quick'"),
    (["train", "TRADES", "--dataset", "../mine"], "../mine is no folder of images: expected one sub-folder a class"),
    (["train", "TRADES", "--dataset", ".."], "dataset is '..': expected a name"),
    (["train", "TRADES", "--set", "lr"], "setting 'lr': expected key=value"),
    (["train", "TRADES", "--set", "lr=fast"], "lr is 'fast': expected a number"),
    (["train", "TRADES", "--set", "lr=0"], "lr 0.0: expected"),
    (["train", "TRADES", "--set", "eps=8"], "eps is 8.0: expected 0 to 1"),
    (["train", "TRADES", "--set", "epochs=1e3"], "epochs is 1000.0: expected a whole number"),
    (["train", "TRADES", "--set", "epochs=1" + "0" * 400], "epochs is 1000"),
    (["train", "TRADES", "--set", "arch=resnet"], "unknown architecture 'resnet'"),
    (["train", "TRADES", "--set", "arch=hf-hub:a/b"], "arch is 'hf-hub:a/b': expected the name of a network"),
    (["train", "TRADES", "--set", "schedule=cosine"], "unknown schedule 'cosine'"),
    (["train", "TRADES", "--set", "val_size=5000"], "cannot hold 5000"),
    (["train", "TRADES", "--set", "seed=1"], "seed has a place of its own in the command"),
    (["train", "TRADES", "--set", "dataset=svhn"], "dataset has a place of its own in the command"),
    (["train", "TRADES", "--set", "lr=0.1", "--set", "lr=0.2"], "setting 'lr=0.2': lr is given twice"),
    (["train", "TRADES", "--set", "epoch=3"], "unknown parameter 'epoch': did you mean 'epochs'"),
    (["train", "TRADES", "--time-limit", "soon"], "time limit is 'soon': expected something like 90s, 9m or 1h30m"),
    (["table", 8], "unknown table 8"),
    (["table", 1, "--seeds", "one"], "seeds are 'one': expected whole numbers"),
    (["table", 1, "--seeds", "-1"], "seed is -1: expected a whole number, 0 or more"),
    (["table", 6, "--methods", "TRADES"], "unknown row of table 6 'TRADES'"),
    (["table", 1, "--jobs", "many"], "--jobs is 'many': expected a number of runs, or auto"),
    (["table", 1, "--jobs", "0"], "--jobs is '0'"),
    (["publish", "nothing"], "is not there"),
    (["notebook", "their_models.py"], "their_models.py is no notebook"),
    (["numbers", "qick"], "unknown preset 'qick': did you mean 'quick'"),
    (["numbers", "quick"], "expected the root folder of a clone"),
]


@pytest.mark.parametrize("words, message", COMMANDS, ids=lambda each: " ".join(map(str, each))[:60] if isinstance(
    each, list) else "")
def test_a_wrong_command_gets_a_sentence(here, words, message):
    done = CliRunner().invoke(app, [*map(str, words)])
    assert done.exit_code == 1 and message in done.stderr and "Traceback" not in done.output
    assert [line[:7] for line in done.stderr.splitlines()] == ["error: "] and files(here) == ["their_models.py"]


@pytest.mark.parametrize("words", [["evaluate"], ["train"], ["table", "one"], ["train", "TRADES", "--seed", "-1"],
                                   [*MODEL, "--images", "0"], ["numbers", "quick", "--minutes", "-3"], ["trian"],
                                   ["train", "TRADES", "--no-such-option"], ["notebook", "gone.ipynb"]])
def test_a_command_that_cannot_be_read_gets_its_usage(here, words):
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 2 and "Usage" in done.stderr and "Traceback" not in done.output


# The functions


def numbers(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype)


def digits(**changes):
    return replace(embedded_digits(), **changes)


def net(classes=10):
    torch.manual_seed(0)
    return PrototypeNet("cifar_resnet8", classes, mean=(0.5,), std=(0.5,))


def trainer(data=None, model=None, **settings):
    return Trainer(net() if model is None else model, AdvDPNP(eps=0.2), data or digits(), device="cpu", **settings)


def config(method="TRADES", preset="quick", **changes):
    return make_config(method, preset, device="cpu", **changes)


class Backbone(nn.Module):
    def forward(self, x):
        return x.flatten(1)


X, Y = numbers(2, 1, 8, 8), numbers(2, dtype=torch.int64)
FUNCTIONS = [
    wrong(lambda: config(betta=3), "unknown parameter 'betta': did you mean 'beta'"),
    wrong(lambda: config(lr="0,1"), "lr is '0,1': expected a number"),
    wrong(lambda: config(lr=float("nan")), "lr is nan: expected a number"),
    wrong(lambda: config(lr=10**400), "lr is 1000000.*: expected a number"),
    wrong(lambda: config(lr=10**5000), "lr is a very long number: expected a number"),
    wrong(lambda: config(epochs=1.5), "epochs is 1.5: expected a whole number"),
    wrong(lambda: config(epochs=True), "epochs is True: expected a whole number"),
    wrong(lambda: config(epochs=None), "epochs is None: expected a whole number"),
    wrong(lambda: config(epochs=[3]), r"epochs is \[3\]: expected a whole number"),
    wrong(lambda: config(epochs=0), "epochs is 0: expected at least 1"),
    wrong(lambda: config(train_images=0.5), "train_images is 0.5: expected a whole number or None"),
    wrong(lambda: config(test_images=0), "test_images is 0: expected at least 1"),
    wrong(lambda: config(padding=-1), "padding is -1: expected at least 0"),
    wrong(lambda: config(steps=-1), "steps is -1: expected at least 1"),
    wrong(lambda: config(eval_step_size=0.0), "eval_step_size is 0.0: expected more than 0, or None"),
    wrong(lambda: config(eps=2.0), "eps is 2.0: expected 0 to 1"),
    wrong(lambda: config(beta=-1), "beta is -1.0: expected a finite weight"),
    wrong(lambda: config(precision=16), "precision is 16: expected a word"),
    wrong(lambda: config(dataset=10), "dataset is 10: expected a word"),
    wrong(lambda: config(dataset="../-mine.npz"), "dataset is '-mine': expected a name of 1 to 200 letters"),
    wrong(lambda: config(seed=-1), "seed is -1: expected a whole number, 0 or more"),
    wrong(lambda: config(seed="0"), "seed is '0': expected a whole number"),
    wrong(lambda: config(preset="quik"), "unknown preset 'quik': did you mean 'quick'"),
    wrong(lambda: config("TRADE"), "unknown method 'TRADE': did you mean 'TRADES'"),
    wrong(lambda: config("ADVDPNP"), "unknown method 'ADVDPNP'.*There are: standard, PGD-AT, TRADES, MART, DPNP"),
    wrong(lambda: config(norm=2.5), "unknown parameter 'norm'"),  # there are no prototypes
    wrong(lambda: config("dual-branch linear", consistency=-1.0), "consistency is -1.0: expected a finite weight"),
    wrong(lambda: config("x" * 5000), "unknown method 'xxx.* … x*'"),
    wrong(lambda: split_name(""), "unknown method ''"),
    wrong(lambda: pick_device("gpu"), "device is 'gpu': expected auto, cpu, cuda"),
    wrong(lambda: pick_device(None), "device is None: expected auto, cpu, cuda"),
    wrong(lambda: pick_device("mps"), "device is 'mps': expected auto, cpu, cuda"),
    wrong(lambda: parse_eps("1/0"), "eps is '1/0': expected a number or a fraction"),
    wrong(lambda: parse_time(""), "time limit is '': expected something like"),
    wrong(lambda: parse_time("9min"), "time limit is '9min': expected something like"),
    wrong(lambda: parse_settings(["preset=quick"]), "preset has a place of its own"),
    wrong(lambda: config(**parse_settings(["lr=" + "1" * 5000])), "lr is '1111.* … 1*': expected a number"),
    wrong(lambda: import_model("torch:no_such"), "torch:no_such cannot be imported"),
    wrong(lambda: import_model("torch:no_grad.__name__"), "cannot be imported"),
    wrong(lambda: import_model("math:pi"), "math:pi is a float: expected a function without arguments"),
    wrong(lambda: import_model("math:cos"), "math:cos needs x: expected a function without arguments"),
    wrong(lambda: import_model("their_models:made"), "their_models:made is a model: expected a function"),
    wrong(lambda: PrototypeHead(8, 1), "num_classes is 1: prototypes need at least 2"),
    wrong(lambda: PrototypeHead(8, 3, norm=0.0), "norm is 0.0: expected a positive number or 'auto'"),
    wrong(lambda: PrototypeHead(8, 3, norm="wide"), "norm is 'wide': expected a positive number or 'auto'"),
    wrong(lambda: auto_norm(10, confidence=0.05), "confidence is 0.05: expected more than chance"),
    wrong(lambda: regular_simplex(10, 3), "10 classes need 9 dimensions"),
    wrong(lambda: PrototypeNet("cifar_resnet9", 10), "unknown architecture 'cifar_resnet9'"),
    wrong(lambda: PrototypeNet(Backbone(), 10), "Backbone does not say how many features it returns"),
    wrong(lambda: LinearNet("cifar_resnet8", 10, mean=(0.5,), std=(0.5, 0.5)), "mean has 1 and std 2 numbers"),
    wrong(lambda: net()(numbers(2, 3, 8, 8)), r"images are \(2, 3, 8, 8\), expected 1 channels"),
    wrong(lambda: make_net("TRADE", "cifar_resnet8", 10, (0.5,), (0.5,)), "unknown method 'TRADE'"),
    wrong(lambda: ThreatModel(8), "eps is 8: expected 0 to 1"),
    wrong(lambda: ThreatModel(float("nan")), "eps is nan: expected 0 to 1"),
    wrong(lambda: ThreatModel(0.1, "l1"), "unknown norm 'l1'"),
    wrong(lambda: PGD(0.1, steps=-1), "steps is -1.*: expected at least 0"),
    wrong(lambda: CW(0.1, restarts=0), "restarts is 0: expected at least 0, 0 and 1"),
    wrong(lambda: AutoAttack(0.1, queries=0), "queries is 0: expected at least 1"),
    wrong(lambda: TRADES(eps=0.1, steps=0), "steps is 0: expected at least 1"),
    wrong(lambda: AdvDPNP(eps=0.1, repulsion_form="far"), "unknown form of repulsion 'far'"),
    wrong(lambda: AdvDPNP(eps=0.1, label_smoothing=2.0), "label_smoothing is 2.0: expected 0 to 1"),
    wrong(lambda: FGSM(0.1)(net(), X * 255 + 255, Y), r"images range from 255 to 255, expected \[0, 1\]"),
    wrong(lambda: FGSM(0.1)(net(), X[0], Y), r"images are torch.float32 of shape \(1, 8, 8\), expected floats"),
    wrong(lambda: FGSM(0.1)(net(), X, Y.float()), r"labels are torch.float32 of shape \(2,\), expected int64"),
    wrong(lambda: FGSM(0.1)(net(), X, Y + 10), "labels range from 10 to 10, expected 0 to 9"),
    wrong(lambda: FGSM(0.1)(net(), X.fill_(0) / 0, Y), "images range from nan to nan, expected"),
    wrong(lambda: trainer(schedule="cosine"), "unknown schedule 'cosine'"),
    wrong(lambda: trainer(precision="fp16"), "unknown precision 'fp16'"),
    wrong(lambda: trainer(awp=1.5), "awp is 1.5 and ema is 0.0: expected"),
    wrong(lambda: trainer(epochs=0), "epochs is 0, .*: expected at least"),
    wrong(lambda: trainer(val_size=3), "cannot hold 3 of 1297 images out: expected 10 to 1287"),
    wrong(lambda: trainer(model=net(7)), "the network has 7 classes, digits has 10"),
    wrong(lambda: trainer(model=torch.compile(net(), backend="eager")), "the network is OptimizedModule: expected"),
    wrong(lambda: evaluate(net(), digits(), [PGD(0.1), PGD(0.2)]), "attacks named pgd20, pgd20: expected different"),
    wrong(lambda: evaluate(net(), digits(), images=0), "images is 0: expected at least 1"),
    wrong(lambda: evaluate(net(), digits(), [PGD(0.1)], limits={"pgd": 3}), "unknown attack with a limit 'pgd'"),
    wrong(lambda: evaluate(net(7), digits()), "the model has 7 classes, digits has 10"),
    wrong(lambda: evaluate(net(), (X * 255 + 255, Y)), r"from 255 to 255: expected floats .*, so divide by 255"),
    wrong(lambda: corrupt(embedded_digits().x_test, "rain", 1), "unknown corruption 'rain'"),
    wrong(lambda: corrupt(embedded_digits().x_test, "fog", 6), "unknown severity 6"),
    wrong(lambda: corrupt(np.zeros((2, 8, 8)), "fog", 1), r"images are float64 \(2, 8, 8\), expected uint8"),
    wrong(lambda: corrupted_images(digits(), images=0), "images is 0: expected at least 1"),
    wrong(lambda: averaged(digits(), 3), "cannot average images of digits, 8x8, to 3x3: expected"),
    wrong(lambda: at_most(digits(), 3), "cannot keep 3 training images of digits: expected 10 or more"),
    wrong(lambda: hold_out(digits(x_train=embedded_digits().x_train[:0], y_train=embedded_digits().y_train[:0])),
          "digits has no training images"),
    wrong(lambda: digits(y_test=embedded_digits().y_test[:-1]), r"digits: y_test is int64 \(499,\), expected int64"),
    wrong(lambda: digits(x_test=embedded_digits().x_test / 255), "digits: x_test is float64 .*, expected uint8"),
    wrong(lambda: digits(x_train=embedded_digits().x_train.transpose(0, 3, 1, 2)), "looks like .N, C, H, W., expected"),
    wrong(lambda: digits(mean=(5.0,), std=(1.0,)), r"mean is \[5.0\] and std \[1.0\], expected 1 of each"),
    wrong(lambda: load_dataset("cifar1O"), "unknown data set 'cifar1O': did you mean 'cifar10'"),
    wrong(lambda: ByClass(numbers(4, 2), numbers(4, dtype=torch.int64)), "features of 1 classes.*: expected two"),
    wrong(lambda: Ledger("data", "cpu").model(config()), "is not there: train this run first"),
    wrong(lambda: Ledger("data", "cpu").measure(config()), "holds no trained run: Ledger.run trains it first"),
    wrong(lambda: Ledger("data", "cpu").result(config(), "results"), "unknown record 'results': did you mean 'result'"),
    wrong(lambda: advdpnp.PrototypeNet.from_pretrained("data/weights/DPNP"), "'data/weights/DPNP' is no folder here"),
]


def said_by(call):
    "What an error says, which is one sentence, raised by this package and by no library."
    with pytest.raises((ValueError, OSError, RuntimeError)) as found:
        call()
    frames = [entry.path for entry in found.traceback]
    assert "advdpnp" in str(frames[-1]), f"{found.value!r} comes from {frames[-1]}"
    said = str(found.value)
    assert "\n" not in said and len(said) < 700
    return said


@pytest.mark.parametrize("call, message", FUNCTIONS)
def test_a_wrong_argument_gets_a_sentence(here, call, message):
    assert re.search(message, said_by(call))
    assert files(here) == ["their_models.py"]


# The parameters of notebooks

PAGES = [
    (["minutes=soon"], "minutes is 'soon': expected a number"),
    (["minutes=-1"], "minutes is -1: expected 0"),
    (["use_results=maybe"], "use_results is 'maybe': expected True or False"),
    (["preset=qick"], "unknown preset 'qick': did you mean 'quick'"),
    (["method=TRADES"], "unknown parameter 'method': did you mean 'methods'"),
    (["methods=Trades", "preset=quick"], "unknown method 'Trades': did you mean 'TRADES'"),
    (["seeds=a", "preset=quick"], "seeds are 'a': expected whole numbers"),
    (["device=gpu"], "device is 'gpu': expected auto, cpu, cuda"),
    (["dataset=digit", "preset=quick"], "unknown data set 'digit': did you mean 'digits'"),
    (["dataset=../x", "preset=quick"], "dataset is '../x': expected a name"),
]


@pytest.mark.parametrize("settings, message", PAGES)
def test_a_wrong_parameter_of_a_page_gets_a_sentence(here, settings, message):
    assert message in said_by(lambda: run_notebook(NBS / "table1.ipynb", [*settings, f"data_dir={here / 'data'}"]))
    assert "data" not in files(here) or not [*Path("data").rglob("*")]


@pytest.mark.parametrize("given, message", [
    (dict(betta=3), "unknown parameter 'betta': did you mean 'beta'"),
    (dict(minutes="soon"), "minutes is 'soon': expected a number"),
    (dict(minutes=-1), "minutes is -1: expected 0"),
])
def test_parameters_that_papermill_would_take(given, message):
    assert message in said_by(lambda: check_parameters(given, ["beta", "minutes"]))


@pytest.mark.parametrize("asked, message", [
    (dict(number="one"), "unknown table 'one'"),
    (dict(time_limit="9m"), "time_limit is '9m': expected a number or None"),
    (dict(jobs=0), "jobs is 0: expected 'auto', or at least 1"), (dict(jobs=1.5), "jobs is 1.5: expected a whole"),
    (dict(seeds="0;1"), "seeds are '0;1': expected whole numbers"), (dict(methods="TRADES;MART"), "unknown method"),
])
def test_a_wrong_table_gets_a_sentence(here, asked, message):
    assert message in said_by(lambda: make_table(**dict(number=1, preset="quick", device="cpu") | asked))


# Files


def archive(**changes):
    data = embedded_digits()
    arrays = {name: getattr(data, name)[:40] for name in ("x_train", "y_train", "x_test", "y_test")}
    arrays |= changes
    np.savez("mine.npz", **{name: value for name, value in arrays.items() if value is not None})
    return load_dataset("./mine.npz")


def pictures(*shapes, name="a.png", text=None):
    for i, shape in enumerate(shapes):
        Path(f"photos/{i}").mkdir(parents=True, exist_ok=True)
        PIL.Image.fromarray(np.zeros(shape, np.uint8)).save(f"photos/{i}/{name}")
    if text is not None:
        Path(f"photos/0/{name}").write_text(text)
    return load_dataset("photos/")


def checkpoint(run=None, **files):
    Path("run").mkdir()
    shutil.copy(GOOD / "record.json", "run/config.json")
    shutil.copy(GOOD / "model.safetensors", "run/best.safetensors")
    if run:
        about = json.loads(Path("run/config.json").read_text())
        Path("run/config.json").write_text(json.dumps({"run": about["run"] | run}))
    for name, text in files.items():
        Path("run", name.replace("_", ".")).write_text(text)
    return load_checkpoint("run")


def page(text):
    Path("mine.ipynb").write_text(text)
    return run_notebook("mine.ipynb")


FILES = [
    wrong(lambda: archive(x_test=None), "mine.npz lacks x_test: an archive holds x_train, y_train"),
    wrong(lambda: archive(y_test=np.full(40, 0.5)), "mine: .*labels|y_test"),
    wrong(lambda: archive(y_test=np.arange(40) - 5), "mine: labels from -5 to 34"),
    wrong(lambda: archive(x_test=np.zeros((40, 9, 9, 1), np.uint8)), r"mine: test images are \(9, 9, 1\), training"),
    wrong(lambda: archive(x_test=np.zeros((40, 8, 8, 1))), "mine: x_test is float64 .*, expected uint8"),
    wrong(lambda: archive(class_names=np.array(["a", "b"])), "mine: labels from 0 to 9, expected 0 to 1"),
    wrong(lambda: archive(class_names=np.array(["a"], object)), "mine.npz holds Python objects"),
    wrong(lambda: Path("mine.npz").write_text("no") and load_dataset("./mine.npz"), "mine.npz is damaged or not an"),
    wrong(lambda: Path("mine.npz").mkdir() or load_dataset("./mine.npz"), "mine.npz is damaged"),
    wrong(lambda: pictures(), "photos is no folder of images"),
    wrong(lambda: pictures((8, 8), (9, 8)), r"images of 2 sizes: 8x8 \(1, such as photos/0/a.png\), 8x9 .*one"),
    wrong(lambda: pictures((8, 8), text="no"), "photos/0/a.png is damaged or no image"),
    wrong(lambda: checkpoint(best_safetensors="weights"), "best.safetensors is damaged"),
    wrong(lambda: checkpoint(config_json="{"), r"config.json is damaged \(Expecting .*\): move this file away"),
    wrong(lambda: checkpoint(config_json="[]"), "config.json is not of a run of the ledger"),
    wrong(lambda: checkpoint(dict(method="TRADES")), "best.safetensors is damaged or of another network"),
    wrong(lambda: checkpoint(dict(norm=[1])), r"norm is \[1\]: expected"),
    wrong(lambda: page("{"), "mine.ipynb is damaged"),
    wrong(lambda: page("{}"), "mine.ipynb lacks cells: expected"),
    wrong(lambda: page("[]"), "mine.ipynb holds a list: expected"),
]


@pytest.mark.parametrize("call, message", FILES)
def test_a_wrong_file_gets_a_sentence(here, call, message):
    assert re.search(message, said_by(call))


def test_there_are_many_of_them():
    assert len(COMMANDS) + len(FUNCTIONS) + len(PAGES) + len(FILES) >= 150
