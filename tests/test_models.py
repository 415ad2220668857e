"Whatever models and attacks people bring: attacked as they would be used, or refused in a sentence."
import collections
import functools
import json
import math
import warnings
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction

import numpy as np
import pytest
import timm
import torch
import torchvision
from torch import nn
from torch.nn import functional as F

from advdpnp.attacks import CW, FGSM, PGD, ThreatModel, check_device
from advdpnp.autoattack import APGD, FABT, AutoAttack, Square
from advdpnp.core import write_json
from advdpnp.evaluation import evaluate
from advdpnp.methods import METHODS
from advdpnp.prototypes import LinearNet, PrototypeNet
from advdpnp.sanity import check_mode, failed
from advdpnp.still import Still, as_module, modules_of
from advdpnp.training import Trainer

pytestmark = pytest.mark.filterwarnings("ignore")
X, Y = torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(6)
ATTACKS = [FGSM(0.2), PGD(0.2, steps=2), CW(0.2, steps=2), AutoAttack(0.2, steps=2, targets=2, queries=5)]


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10)).eval()


class Around(nn.Module):
    "A network, and what is done with it."

    def __init__(self, forward, inner=None):
        super().__init__()
        self.net, self.do = inner or net(), forward

    def forward(self, x):
        return self.do(self.net, x)


class Called:
    "An object that can be called, and is no module."

    def __init__(self):
        self.net = net()

    def __call__(self, x):
        return self.net(x)


class Keeps(Around):
    "Keeps what it was given."

    def forward(self, x):
        self.kept = x
        return self.net(x)


def around(forward, inner=None):
    return lambda: Around(forward, inner and inner()).eval()


def exported():
    batch = torch.export.Dim("b", min=1, max=1024)
    return torch.export.export(net(), (X,), dynamic_shapes=({0: batch},)).module()


def exported_inside():
    around = Around(lambda n, x: n(x), exported())
    around.training = False  # `eval` is refused by what it holds
    return around


def changed(change):
    "A network after a change in place."
    def make():
        made = net()
        change(made)
        return made
    return make


def mixed():
    inner = net()
    inner[4].double()
    return Around(lambda n, x: n[4](n[:4](x).double()), inner).eval()


def without_gradient_on_parameters():
    with torch.inference_mode():
        return net()


MODELS = {
    "view": around(lambda n, x: n[4](n[:3](x).view(len(x), -1))),
    "float64 inside": around(lambda n, x: n(x.double()), lambda: net().double()), "float64": lambda: net().double(),
    "float64 logits": around(lambda n, x: n(x).double()), "half logits": around(lambda n, x: n(x).half()),
    "bfloat16 logits": around(lambda n, x: n(x).bfloat16()), "half": lambda: net().half(),
    "bfloat16": lambda: net().bfloat16(), "mixed": mixed,
    "changes its input": around(lambda n, x: n(x.mul_(0.9))), "keeps its input": lambda: Keeps(None).eval(),
    "returns its input": around(lambda n, x: x.view(len(x), -1)[:, 20:30]),
    "lambda": lambda: (lambda n: lambda x: n(x))(net()), "method": lambda: net().forward,
    "partial": lambda: functools.partial(lambda n, x: n(x), net()), "object": Called,
    "hook": changed(lambda n: n[0].register_forward_hook(lambda *_, kept=[]: kept.append(n[0]))),
    "spectral norm": changed(lambda n: nn.utils.spectral_norm(n[4])),
    "parametrized": changed(lambda n: nn.utils.parametrizations.spectral_norm(n[4])),
    "weight norm": changed(lambda n: nn.utils.weight_norm(n[4])), "frozen": lambda: net().requires_grad_(False),
    "inference tensors": without_gradient_on_parameters, "DataParallel": lambda: nn.DataParallel(net()).eval(),
    "compiled": lambda: torch.compile(net()), "exported": exported,
    "exported inside": exported_inside, "scripted": lambda: torch.jit.script(net()),
    "frozen script": lambda: torch.jit.freeze(torch.jit.script(net())), "traced": lambda: torch.jit.trace(net(), X),
    "no statistics": changed(lambda n: n.__setitem__(1, nn.BatchNorm2d(4, track_running_stats=False).eval())),
    "random": around(lambda n, x: n(x) + 0.01 * torch.randn(len(x), 10)),
    "dropout": around(lambda n, x: n(F.dropout(x, 0.1, training=True))),
    "channels last": around(lambda n, x: n(x), lambda: net().to(memory_format=torch.channels_last)),
}


@pytest.mark.parametrize("name", MODELS)
def test_models_that_are_attacked_as_they_are(digits, name):
    model, x = MODELS[name](), X.clone()
    for attack in [*ATTACKS, PGD(1, steps=2, norm="l2")]:
        x_adv = attack(model, x, Y)
        assert torch.equal(x, X) and x_adv.dtype == x.dtype and x_adv.shape == x.shape
        assert attack.threat.length(x_adv - x).max() <= attack.eps + 1e-6 and 0 <= x_adv.min() and x_adv.max() <= 1
    assert not torch.equal(PGD(0.2, steps=2)(model, x, Y), x)
    record = evaluate(model, digits, ATTACKS, images=20, check_images=5, quiet=True)
    assert record["metrics"]["worst"]["accuracy"] <= record["metrics"]["clean"]["accuracy"]
    assert set(failed(record["checks"])) <= {"deterministic", "batch-independent"} | {"evaluation mode"}
    json.dumps(record)


def test_what_is_judged_is_the_model_as_it_is_run(digits):
    "A large number added to all logits in float64 changes no prediction, and would drown them in float32."
    found = [evaluate(Around(lambda n, x, much=much: n(x.double()) + much, net().double()).eval(), digits, ATTACKS,
                      images=30, check_images=5, quiet=True)["verdicts"] for much in (0, 1e9)]
    assert found[0] == found[1]


@pytest.mark.parametrize("name", ["view", "float64 inside", "half", "lambda"])
def test_another_default_type_changes_nothing_that_is_seen(digits, name):
    torch.set_default_dtype(torch.float64)
    try:
        for attack in (*ATTACKS, FABT(1, "l2", steps=2, targets=2), Square(1, "l2", queries=4), APGD(1, "l2", steps=2)):
            assert attack(MODELS[name](), X.float(), Y).dtype == torch.float32
        evaluate(MODELS[name](), digits, ATTACKS, images=10, check_images=5, quiet=True)
    finally:
        torch.set_default_dtype(torch.float32)


class Cut(Around):
    "Has no gradient."

    @torch.no_grad()
    def forward(self, x):
        return self.net(x)


@pytest.mark.parametrize("make", [
    lambda: Cut(None).eval(), around(lambda n, x: n(x.detach())),
    lambda: torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).eval(), {nn.Linear}),
], ids=["no_grad", "detach", "quantized"])
def test_a_model_without_gradients_is_attacked_as_far_as_it_can_be_and_named(digits, make):
    record = evaluate(make(), digits, ATTACKS, images=10, check_images=5, quiet=True)
    found = {check["name"]: check for check in record["checks"]}["gradients"]
    assert found["passed"] is False and "only an attack without gradients" in found["found"]
    assert Square(0.5, queries=20)(make(), X, Y).shape == X.shape


Output = collections.namedtuple("Output", "logits aux")


@pytest.mark.parametrize("make, message", [
    (around(lambda n, x: (n(x), x)), r"returns tuple, .*: give lambda x: model\(x\)\[0\] as the model"),
    (around(lambda n, x: dict(scores=n(x))), r"give lambda x: model\(x\)\['scores'\]"),
    (around(lambda n, x: Output(n(x), x)), r"give lambda x: model\(x\).logits"),
    (around(lambda n, x: n(x).detach().numpy()), r"returns ndarray, expected logits \(1, K\)"),
    (around(lambda n, x: None), "returns NoneType"),
    (around(lambda n, x: n(x)[:, :1]), r"pad\(model\(x\), \(1, 0\)\)"),
    (around(lambda n, x: (100 * n(x)).long()), r"a tensor \(1, 10\) of torch.int64"),
    (around(lambda n, x: n(x) > 0), "of torch.bool"),
    (around(lambda n, x: n(x).argmax(1)), r"a tensor \(1,\)"),
    (lambda: Called, "Called is a class: expected a model made of it"),
    (lambda: "resnet18", "the model is a str: expected an nn.Module or a function"),
    (lambda: None, "the model is a NoneType"),
    (lambda: net().state_dict(), "not its weights alone"),
    (lambda: net().to("meta"), "on the device meta"),
    (lambda: nn.Sequential(nn.Flatten(), nn.LazyLinear(10)), "lazy layers.*call it once on some images"),
])
def test_what_is_no_model_gets_a_sentence(digits, make, message):
    for attempt in (lambda: PGD(0.1, steps=1)(make(), X, Y), lambda: evaluate(make(), digits, ATTACKS, images=5)):
        with pytest.raises(ValueError, match=message):
            attempt()


@pytest.mark.parametrize("error", [TypeError("no"), KeyError("no"), IndexError("no"), AttributeError("no")], ids=repr)
def test_a_model_that_fails_is_named_with_its_line(error):
    def fails(n, x):
        raise error

    with pytest.raises(RuntimeError, match=rf"fails on images \(1, 1, 8, 8\).*{type(error).__name__}.*test_models.py"):
        PGD(0.1)(Around(fails), X, Y)


def test_a_model_that_computes_with_numpy_can_be_searched_without_gradients():
    model = Around(lambda n, x: torch.from_numpy(x.numpy().reshape(len(x), -1)[:, :10]))
    with pytest.raises(RuntimeError, match=r"Can't call numpy\(\) on Tensor that requires grad"):
        PGD(0.1)(model, X, Y)
    assert Square(0.3, queries=5)(model, X, Y).shape == X.shape


def test_what_a_function_speaks_of_is_put_into_evaluation_mode_and_back():
    inner = net().train()
    held = dict(inner=[inner])
    for function in (lambda x: inner(x), functools.partial(lambda n, x: n(x), inner), inner.forward,
                     lambda x, n=inner: n(x), lambda x: held["inner"][0](x)):
        assert modules_of(function)[0] is inner
        before = inner[1].running_mean.clone()
        PGD(0.1, steps=1)(function, X, Y)
        assert torch.equal(inner[1].running_mean, before) and all(part.training for part in inner)
        assert all(p.requires_grad for p in inner.parameters())
    assert "given in training mode" in check_mode(lambda x: inner(x))["found"]


INNER = net().train()


class Global(nn.Module):
    "Calls a network that is no part of it, as notebooks do."

    def __init__(self):
        super().__init__()
        self.INNER = nn.Identity()  # of the same name

    def forward(self, x):
        return self.INNER(INNER(x))


class Named(Global):
    def forward(self, x):
        return self.INNER(x.flatten(1))


def test_a_module_that_calls_a_global_network_leaves_it_as_it_is(digits):
    before = INNER[1].running_mean.clone()
    record = evaluate(Global().eval(), digits, ATTACKS[:2], images=20, check_images=5, quiet=True)
    assert torch.equal(INNER[1].running_mean, before) and INNER.training and record["copied"] is False
    assert record["verdicts"] == evaluate(net(), digits, ATTACKS[:2], images=20, check_images=5, quiet=True)["verdicts"]
    assert "given in training mode" in check_mode(Global().eval())["found"]
    assert isinstance(as_module(Named()), Named)  # which has only an attribute of that name


@pytest.mark.parametrize("make, passed, found", [
    (net, True, "given in evaluation mode"), (lambda: net().train(), False, "given in training mode"),
    (changed(lambda n: n[1].train()), False, "in part, and changed: 1"),
    (lambda: lambda x: x.flatten(1), None, "a function"), (exported, None, "its mode is fixed"),
    (MODELS["exported inside"], None, "its mode is fixed"), (MODELS["frozen script"], True, "its mode is fixed"),
    (MODELS["traced"], None, "its mode is fixed"),
])
def test_the_record_says_in_which_mode_a_model_was(make, passed, found):
    check = check_mode(make())
    assert check["passed"] is passed and found in check["found"]


def test_the_record_says_that_mixed_precision_was_switched_off(digits):
    with torch.autocast("cpu", torch.bfloat16):
        record = evaluate(net(), digits, ATTACKS[:2], images=10, check_images=5, quiet=True)
    assert "precision" in failed(record["checks"])
    assert record["verdicts"] == evaluate(net(), digits, ATTACKS[:2], images=10, check_images=5, quiet=True)["verdicts"]


SEEN = []  # a copy of a model counts here, too


def counts(n, x):
    SEEN.append(len(x))
    return n(x)


@pytest.mark.parametrize("make", [around(counts), lambda: (lambda n: lambda x: counts(n, x))(net())])
@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_never_more_images_at_once_than_asked_for(digits, make, batch_size):
    SEEN.clear()
    record = evaluate(make(), digits, [*ATTACKS, PGD(0.3, steps=3, restarts=2)], images=8, batch_size=batch_size,
                      twin=make(), quiet=True)
    assert max(SEEN) == batch_size
    alone = {check["name"]: check["passed"] for check in record["checks"]}["batch-independent"]
    assert alone is (None if batch_size == 1 else True)


@pytest.mark.parametrize("name", ["hook", "lambda", "partial", "object", "weight norm", "exported",
                                  "changes its input"])
def test_threads_get_what_they_get_alone_and_leave_no_trace(name):
    model = MODELS[name]()
    attack = lambda seed: PGD(0.1, steps=2, seed=seed)(model, X, Y)
    alone, random = [attack(seed) for seed in range(6)], torch.get_rng_state()
    precision = torch.backends.mkldnn.matmul.fp32_precision
    for workers in (2, 6):
        with ThreadPoolExecutor(workers) as pool:
            assert all(map(torch.equal, alone, pool.map(attack, range(6))))
    assert torch.equal(torch.get_rng_state(), random)
    with ThreadPoolExecutor(6) as pool:
        list(pool.map(lambda _: evaluate_few(model), range(6)))
    assert torch.backends.mkldnn.matmul.fp32_precision == precision


def evaluate_few(model):
    return evaluate(model, (X, Y), [PGD(0.1, steps=1)], quiet=True, check_images=2)


@pytest.mark.parametrize("eps", [np.float32(0.1), np.float64(0.1), np.array(0.1), torch.tensor(0.1), Fraction(1, 10)])
def test_numbers_of_any_library_become_python_s(eps, digits, tmp_path):
    for attack in (PGD(eps, steps=np.int64(5), random_start=np.bool_(True)), FGSM(eps),
                   AutoAttack(eps, queries=np.int8(3)), CW(eps, step_size=eps, seed=torch.tensor(3))):
        assert type(attack.eps) is float and math.isclose(attack.eps, 0.1, rel_tol=1e-6)
        json.dumps(vars(attack))
    record = evaluate(net(), digits, [PGD(eps, steps=np.int64(1))], images=np.int64(6), batch_size=np.int32(3),
                      check_images=np.int64(4), seed=np.int64(1), limits=dict(pgd1=np.int8(5)), quiet=True)
    assert record["metrics"]["pgd1"]["n"] == 5 and json.dumps(record)
    write_json(tmp_path / "config.json", dict(eps=eps, steps=np.int64(3)))
    assert json.loads((tmp_path / "config.json").read_text())["steps"] == 3


@pytest.mark.parametrize("make, message", [
    (lambda: PGD("8/255"), "eps is '8/255': expected a number, such as 0.03 or 8/255"),
    (lambda: PGD(True), "eps is True"), (lambda: FGSM(None), "eps is None"), (lambda: AutoAttack([0.1]), "eps is"),
    (lambda: PGD(0.1, steps=2.5), "steps is 2.5: expected a whole number"), (lambda: PGD(math.nan), "eps is nan"),
    (lambda: PGD(0.1, steps="5"), "steps is '5'"), (lambda: PGD(0.1, seed=-1), "seed is -1: expected at least 0"),
    (lambda: PGD(0.1, "l2"), "step_size is 'l2': expected a number"),
    (lambda: PGD(0.1, norm="l1"), "unknown norm 'l1'"), (lambda: PGD(0.1, norm=1), "unknown norm 1"),
    (lambda: AutoAttack(net(), norm="Linf", eps=8 / 255), r"AutoAttack\(eps=8/255\)\(model, x, y\)"),
    (lambda: PGD(net(), eps=8 / 255), "PGD is made without a model"), (lambda: CW(eps=0.1, model=net()), "CW is made"),
    (lambda: PGD(128, norm="l2")(net(), X, Y), "no two images of 64 pixels are further apart than 8 in l2"),
])
def test_settings_that_mean_nothing(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("norm, name", [("Linf", "linf"), ("L_inf", "linf"), ("l-inf", "linf"), ("inf", "linf"),
                                        (np.inf, "linf"), (math.inf, "linf"), ("linfinity", "linf"), ("l∞", "linf"),
                                        ("L2", "l2"), ("l_2", "l2"), (2, "l2"), (2.0, "l2"), (np.int64(2), "l2")])
def test_norms_as_the_field_writes_them(norm, name):
    assert ThreatModel(0.1, norm).norm == PGD(0.1, norm=norm).norm == AutoAttack(0.1, norm).norm == name


@pytest.mark.parametrize("change", [-3e-8, 1 + 1e-7, -9e-7])
def test_rounding_outside_of_the_range_is_clamped(change):
    x = X.clone()
    x[0, 0, 0, 0] = change
    before = x.clone()
    x_adv = PGD(0.1, steps=1)(net(), x, Y.to(torch.int32))
    assert torch.equal(x, before) and 0 <= x_adv.min() and x_adv.max() <= 1
    with pytest.raises(ValueError, match=r"expected \[0, 1\]"):
        PGD(0.1)(net(), x * 1.1, Y)


@pytest.mark.parametrize("x, y, message", [(X.numpy(), Y, "images are a ndarray: expected a tensor"),
                                           (X, Y.tolist(), "labels are a list"), (Y, net(), "labels are a Sequential")])
def test_batches_that_are_no_tensors(x, y, message):
    with pytest.raises(ValueError, match=message):
        PGD(0.1)(net(), x, y)


def test_a_model_elsewhere_is_refused():
    with pytest.raises(ValueError, match="images are on cpu, the model is on meta: expected both on one device"):
        check_device(net().to("meta"), X)


class Theirs:
    "Somebody's attack, without a name."

    eps = 0.1

    def __init__(self, attack=lambda model, x, y: x):
        self.attack = attack

    def __call__(self, model, x, y):
        return self.attack(model, x, y)


def run(*attacks, model=None):
    return evaluate(model or net(), (X, (model or net())(X.clone()).argmax(1)), attacks, quiet=True)


def test_attacks_of_others():
    import torchattacks

    model, function = net(), Theirs().attack
    function.eps, function.name = 0.1, "mine"
    theirs = torchattacks.PGD(model, eps=0.3, alpha=0.1, steps=10)
    l2 = torchattacks.PGDL2(model, eps=1.0, steps=5)
    auto = torchattacks.FAB(model, norm="L2", eps=0.5, steps=2, n_classes=10)
    record = run(theirs, l2, auto, Theirs(), function, model=model)
    said = {name: found.get("attack") for name, found in record["metrics"].items()}
    assert list(said) == ["clean", "PGD", "PGDL2", "FAB", "Theirs", "mine", "worst"]
    assert [said[name]["norm"] for name in list(said)[1:-1]] == ["linf", "l2", "l2", "linf", "linf"]
    assert said["PGD"]["class"] == "torchattacks.PGD" and said["PGD"]["steps"] == 10
    assert record["metrics"]["PGD"]["accuracy"] < 50 and record["metrics"]["Theirs"]["accuracy"] == 100
    assert theirs.model is model and not model.training and json.dumps(record)


def test_attacks_of_others_take_colour_images():
    "Images lie in memory as others expect them: a flat view of them is no error."
    import torchattacks

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(144, 5))
    x = torch.rand(20, 3, 8, 8)
    attacks = [torchattacks.PGDL2(model, eps=0.5, steps=2), torchattacks.FAB(model, norm="L2", eps=0.5, steps=2,
                                                                             n_classes=5)]
    record = evaluate(model, (x, model(x).argmax(1)), attacks, quiet=True)
    assert record["metrics"]["clean"]["accuracy"] == 100 and record["metrics"]["PGDL2"]["n"] == 20


def test_attacks_of_foolbox(monkeypatch):
    monkeypatch.setattr("numba.config.DISABLE_JIT", 0)  # see conftest.py: foolbox cannot be imported with it
    import foolbox

    attacks = foolbox.attacks.LinfPGD(steps=5), foolbox.attacks.L2PGD(steps=5)
    with pytest.raises(ValueError, match="has no eps: expected an attack that names its budget"):
        run(*attacks)
    for attack in attacks:
        attack.eps = 0.3
    metrics = run(*attacks)["metrics"]
    assert [found["attack"]["norm"] for name, found in metrics.items() if "Attack" in name] == ["linf", "l2"]
    assert metrics["worst"]["accuracy"] < 100


@pytest.mark.parametrize("attack, message", [
    (lambda: PGD, "PGD is a class: expected an attack such as"), (lambda: "pgd20", "'pgd20' is no attack"),
    (lambda: lambda model, x, y: x, r"has no eps: .*attack.eps = 8 / 255"),
    (lambda: __import__("torchattacks").CW(net()), "CW has no eps"),
    (lambda: __import__("torchattacks").PGD(net(), eps=8), "eps is 8: expected 0 to 1"),
    (lambda: PGD(9, norm="l2"), "no two images of 64 pixels"),
])
def test_what_is_no_attack_gets_a_sentence(attack, message):
    with pytest.raises(ValueError, match=message):
        run(attack())


@pytest.mark.parametrize("returns, message", [
    (lambda x: x[:1], r"Theirs returned a Tensor \(1, 1, 8, 8\)"), (lambda x: x.double(), "of torch.float64"),
    (lambda x: (255 * x).byte(), "of torch.uint8"), (lambda x: x * math.nan, "NaN or infinity"),
    (lambda x: (x, x), "a tuple"), (lambda x: None, "a NoneType"), (lambda x: x.numpy(), "a ndarray"),
    (lambda x: (x + 0.5).clamp(0, 1), "Theirs went 0.5 away"), (lambda x: x - 0.05, "to values from -0.0"),
])
def test_an_attack_that_returns_something_else_is_named(returns, message):
    with pytest.raises(RuntimeError, match=message):
        run(Theirs(lambda model, x, y: returns(x)))


def test_a_model_that_changes_its_input_is_blamed():
    model = MODELS["changes its input"]()

    def attack(still, x, y):
        x = x.clone()
        for _ in range(3):
            model(x)
        return x

    with pytest.raises(RuntimeError, match=r"changes its input in place.*x = x.clone\(\)"):
        run(Theirs(attack), model=model)
    run(Theirs(lambda still, x, y: (still(x), x)[1]), model=model)  # what it is given hands over copies


class Backbone(nn.Module):
    num_features = 8

    def __init__(self, after):
        super().__init__()
        self.conv, self.after = nn.Conv2d(1, 8, 3), after

    def forward(self, x):
        return self.after(self.conv(x))


def flat(x):
    return x.mean((2, 3))


LINEAR = dict(num_classes=10, mean=(0.3,), std=(0.4,))


@pytest.mark.parametrize("make, message", [
    (lambda: torchvision.models.resnet18(), r"the network is ResNet: expected LinearNet\(backbone, num_classes\)"),
    (lambda: timm.create_model("cifar_resnet8", in_chans=1), r"expected LinearNet\(backbone"),
    (lambda: LinearNet(torchvision.models.resnet18(), 10), "net.num_features = 512"),
    (lambda: LinearNet(timm.create_model("cifar_resnet8", in_chans=1), **LINEAR), r"\(2, 10\).* num_classes=0"),
    (lambda: LinearNet(Backbone(lambda x: x), **LINEAR), r"\(2, 8, 6, 6\).*AdaptiveAvgPool2d"),
    (lambda: LinearNet(Backbone(lambda x: (flat(x), x)), **LINEAR), r"as a tuple.*returns backbone\(x\)\[0\]"),
    (lambda: LinearNet(Backbone(lambda x: Output(flat(x), x)), **LINEAR), r"returns backbone\(x\).logits"),
    (lambda: LinearNet(Backbone(lambda x: x.flatten(1)), **LINEAR), r"\(2, 288\), expected \(2, 8\)"),
    (lambda: LinearNet(lambda x: x, **LINEAR), "the backbone is <lambda>: expected a timm name"),
    (lambda: LinearNet("cifar_resnet8", 10), "expected 3 channels"),
    (lambda: nn.DataParallel(LinearNet("cifar_resnet8", **LINEAR)), "the network is DataParallel"),
    (lambda: "cifar_resnet8", "the network is str"),
])
def test_a_network_that_cannot_be_trained_is_refused_at_once(digits, make, message):
    with pytest.raises(ValueError, match=message):
        Trainer(make(), METHODS["standard"](), digits, quiet=True, device="cpu")


@pytest.mark.parametrize("method, message", [("TRADES", "the method is 'TRADES'"),
                                             (METHODS["TRADES"], "expected one such"),
                                             (METHODS["Adv-DPNP"](), "LinearNet has none: expected a PrototypeNet")])
def test_a_method_that_does_not_fit_is_refused_at_once(digits, method, message):
    with pytest.raises(ValueError, match=message):
        Trainer(LinearNet("cifar_resnet8", **LINEAR), method, digits, quiet=True, device="cpu")


class Placed(nn.Module):
    "Makes tensors of its own in float32, and flattens with `view`."
    num_features = 8

    def __init__(self):
        super().__init__()
        self.conv, self.layer = nn.Conv2d(1, 8, 3), nn.Linear(288, 8)

    def forward(self, x):
        x = self.conv(x)
        return self.layer(x.view(len(x), -1) + torch.arange(288.0, device=x.device) / 288)


@pytest.mark.parametrize("backbone", [Placed, lambda: Backbone(lambda x: flat(x.float() @ torch.ones(6, 6)))])
def test_a_copy_in_bfloat16_works_or_keeps_the_types_of_the_model(backbone):
    torch.manual_seed(0)
    model = PrototypeNet(backbone(), 10, mean=(0.5,), std=(0.25,)).eval()
    still = Still(model, X, torch.bfloat16)
    with torch.no_grad():
        torch.testing.assert_close(still(X), model(X), rtol=0.02, atol=0.02)
    still.refresh()


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_a_backbone_that_flattens_with_view_is_trained(digits, precision):
    warnings.simplefilter("ignore")
    model = LinearNet(Placed(), **LINEAR)
    Trainer(model, METHODS["TRADES"](steps=1, eps=0.1), digits, epochs=1, batch_size=256, val_size=50, quiet=True,
            val_attack=PGD(0.1, steps=1), precision=precision, device="cpu").fit()
    assert evaluate(model, digits, ATTACKS[:1], images=10, quiet=True)["metrics"]["clean"]["n"] == 10
