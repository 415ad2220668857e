"What others build on: types that a checker sees, and a package that the oldest Python can read."
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent
EXAMPLES = "\n".join(re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S))

ACCEPTED = f'''
import numpy as np
import timm
import torch

x, y = torch.rand(2, 1, 8, 8), torch.tensor([0, 1])
{EXAMPLES}
import advdpnp
from advdpnp import AutoAttack, Dataset, METHODS, TRADES, discriminability
from advdpnp.attacks import ThreatModel
from advdpnp.evaluation import standard_attacks
from advdpnp.training import Trainer as FromItsModule

loss.backward()
again = FromItsModule(net, method, data, device="cpu", folder="run")
complete: bool = again.fit(time_limit=60)
print(again.epoch + 1, again.history[-1]["clean"], again.folder / "state.pt", again.device.type, again.judged)
evaluate(lambda x: x.flatten(1), (np.zeros((2, 1, 8, 8)), [0, 1]), standard_attacks(8 / 255), images=2)
logits: torch.Tensor = head(torch.rand(2, 512), detach=True)
print(head.prototypes.shape, net.features(x).shape, net.backbone.num_features)
attack = PGD(8 / 255, steps=10)
adversarial: torch.Tensor = attack(net, x, y)
print(attack.name.upper(), attack.passes + 1, attack.threat.project(adversarial, x), ThreatModel(0.1).eps)
mine = Dataset("mine", data.x_train, data.y_train, data.x_test, data.y_test, class_names=("a", "b"))
print(mine.channels + 1, mine.about[0].upper(), mine.sha256, METHODS["TRADES"](beta=3.0), AutoAttack(0.2), TRADES())
print(advdpnp.__version__, advdpnp.CW(0.1).steps, PrototypeNet.from_pretrained("somewhere")(x), discriminability)
'''

REJECTED = '''
from advdpnp import AdvDPNP, PGD, PrototypeHead, PrototypeNet, Trainer, evaluate, load_dataset
from advdpnp.attacks import ThreatModel
from advdpnp.runs import Ledger
from advdpnp import NoSuchName  # wrong

data = load_dataset("digits")
load_dataset(3)  # wrong
data.num_classez  # wrong
data.num_classes.upper()  # wrong
data.name = "other"  # wrong
PGD(eps="x")  # wrong
PGD()  # wrong
PGD(0.1, step=3)  # wrong
PGD(0.1)(data)  # wrong
ThreatModel(0.1).project(1, 2)  # wrong
AdvDPNP(0.2)  # wrong
AdvDPNP(alignment="strong")  # wrong
PrototypeHead(512)  # wrong
net = PrototypeNet("cifar_resnet8")  # wrong
net.features("images")  # wrong
trainer = Trainer(net, AdvDPNP(), data, epoch=1)  # wrong
Trainer(net, AdvDPNP())  # wrong
trainer.fitt()  # wrong
trainer.fit("9m")  # wrong
trainer.weights(1)  # wrong
evaluate()  # wrong
evaluate(net, data, image=10)  # wrong
evaluate(net, data).metrics  # wrong
Ledger().folder()  # wrong
'''


def test_stubs_are_those_of_the_exported_modules(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "nbs")
    from _stubs import stubs

    assert {path.name: path.read_text() for path in (ROOT / "advdpnp").glob("*.pyi")} == stubs(), "run `make export`"


def test_a_type_checker_accepts_what_is_right_and_rejects_what_is_wrong(tmp_path):
    "In the stubs themselves it finds nothing."
    (tmp_path / "accepted.py").write_text(ACCEPTED)
    (tmp_path / "rejected.py").write_text(REJECTED)
    done = subprocess.run([BIN / "mypy", "--ignore-missing-imports", "--cache-dir", ROOT / "build/mypy",
                           tmp_path / "accepted.py", tmp_path / "rejected.py", *(ROOT / "advdpnp").glob("*.pyi")],
                          cwd=ROOT, capture_output=True, text=True)
    found = re.findall(r"^.*?(\w+\.pyi?):(\d+): error: .*", done.stdout, re.M)
    wrong = [("rejected.py", str(i)) for i, line in enumerate(REJECTED.splitlines(), 1) if line.endswith("# wrong")]
    assert list(dict.fromkeys(found)) == wrong, done.stdout + done.stderr


def test_nothing_is_newer_than_the_oldest_python():
    declared, = re.findall(r'requires-python = ">=([\d.]+)"', (ROOT / "pyproject.toml").read_text())
    done = subprocess.run([BIN / "vermin", "--no-tips", "--violations", f"--target={declared}-",
                           *(ROOT / "advdpnp").glob("*.py")],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
