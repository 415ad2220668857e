"Every number of the geometry against loops in float64 NumPy, what must not change it, and what it must not change."
import json
import math
import random

import numpy as np
import pytest
import timm
import torch

from advdpnp.attacks import PGD, Draws
from advdpnp.data import Loader
from advdpnp.geometry import angles, cosines, discriminability, features_of, geometry, simplex_deviation
from advdpnp.prototypes import LinearNet, PrototypeNet

DISTANCES = ("to_own_mean", "to_nearest_mean", "means_apart", "to_own_prototype", "to_nearest_prototype")
SQUARES = ("within", "between")
RATIOS = ("fisher", "silhouette", "davies_bouldin", "angular_spread", "nearest_mean", "nearest_prototype", "linear")
PER_CLASS = ("to_own_mean", "within", "angular_spread", "to_nearest_mean", "silhouette", "nearest_mean")
OF_PROTOTYPES = ("to_own_prototype", "to_nearest_prototype", "nearest_prototype")


def case(seed):
    "Features of unbalanced classes, not all of which occur; prototypes of one norm, and logits that are not theirs."
    rng = np.random.default_rng(seed)
    k, d = rng.integers(4, 9), rng.integers(3, 20)
    occur = np.sort(rng.choice(k, rng.integers(2, k), replace=False))
    y = rng.permutation(np.repeat(occur, rng.integers(2, 30, len(occur))))
    c = rng.normal(size=(k, d))
    c *= 1.7 / np.linalg.norm(c, axis=1, keepdims=True)
    return [torch.from_numpy(a) for a in (c[y] + rng.uniform(0.4, 2) * rng.normal(size=(len(y), d)), y, c,
                                          rng.normal(size=(len(y), k)))]


def reference(f, y, c, z):
    "All numbers, one feature after the other."
    distance = lambda a, b: math.sqrt(sum((a - b) ** 2))
    classes = sorted(set(y.tolist()))
    mean = {k: sum(f[i] for i in range(len(y)) if y[i] == k) / sum(y == k) for k in classes}
    found = {name: [] for name in (*PER_CLASS, *OF_PROTOTYPES, "linear")}
    for k in classes:
        rows = {name: [] for name in found}
        for i in np.flatnonzero(y == k):
            others = [f[j] for j in np.flatnonzero(y == k) if j != i]
            left_out = {j: mean[j] if j != k else sum(others) / len(others) for j in classes}
            cosine = f[i] @ mean[k] / np.linalg.norm(f[i]) / np.linalg.norm(mean[k])
            rows["to_own_mean"].append(distance(f[i], mean[k]))
            rows["within"].append(distance(f[i], mean[k]) ** 2)
            rows["angular_spread"].append(math.degrees(math.acos(cosine)))
            rows["to_nearest_mean"].append(min(distance(f[i], mean[j]) for j in classes if j != k))
            near = min(np.mean([distance(f[i], f[j]) for j in np.flatnonzero(y == other)])
                       for other in classes if other != k)
            own = np.mean([distance(f[i], other) for other in others])
            rows["silhouette"].append((near - own) / max(near, own))
            rows["nearest_mean"].append(100 * (min(classes, key=lambda j: distance(f[i], left_out[j])) == k))
            rows["to_own_prototype"].append(distance(f[i], c[k]))
            rows["to_nearest_prototype"].append(min(distance(f[i], c[j]) for j in range(len(c)) if j != k))
            rows["nearest_prototype"].append(100 * (min(range(len(c)), key=lambda j: distance(f[i], c[j])) == k))
            rows["linear"].append(100 * (max(range(len(c)), key=lambda j: z[i, j]) == k))
        for name, values in rows.items():
            found[name].append(sum(values) / len(values))
    numbers = {name: sum(values) / len(classes) for name, values in found.items()}
    middle = sum(mean.values()) / len(classes)
    numbers["between"] = sum(distance(mean[k], middle) ** 2 for k in classes) / len(classes)
    numbers["means_apart"] = np.mean([distance(mean[a], mean[b]) for a in classes for b in classes if a < b])
    numbers["fisher"] = numbers["between"] / numbers["within"]
    spread = {k: np.mean([distance(f[i], mean[k]) for i in np.flatnonzero(y == k)]) for k in classes}
    alike = lambda a, b: (spread[a] + spread[b]) / distance(mean[a], mean[b])
    numbers["davies_bouldin"] = np.mean([max(alike(a, b) for b in classes if b != a) for a in classes])
    return numbers, found


@pytest.mark.parametrize("seed", range(5))
def test_every_number_is_what_a_loop_finds(seed):
    f, y, c, z = case(seed)
    found = discriminability(f, y, c, z)
    per_class = found.pop("per_class")
    numbers, classes = reference(f.numpy(), y.numpy(), c.numpy(), z.numpy())
    assert found.keys() == numbers.keys() == {*DISTANCES, *SQUARES, *RATIOS} and per_class.keys() == classes.keys()
    for name, value in numbers.items():
        assert found[name] == pytest.approx(value, rel=1e-9, abs=1e-9), name
    for name, values in classes.items():
        assert per_class[name] == pytest.approx(values, rel=1e-9, abs=1e-9), name


def test_the_cases_are_neither_easy_nor_hopeless():
    numbers = [discriminability(*case(seed)) for seed in range(8)]
    for name in ("nearest_mean", "nearest_prototype"):
        assert 40 < np.mean([n[name] for n in numbers]) < 95
    assert any(n["nearest_mean"] != n["nearest_prototype"] for n in numbers)


def test_what_needs_prototypes_or_logits_is_left_out_without_them():
    f, y, c, z = case(0)
    plain, full = discriminability(f, y), discriminability(f, y, c, z)
    assert full.keys() - plain.keys() == {*OF_PROTOTYPES, "linear"} and plain["per_class"].keys() == {*PER_CLASS}
    assert all(full[name] == plain[name] for name in plain if name != "per_class")
    assert "linear" not in discriminability(f, y, c) and "nearest_prototype" not in discriminability(f, y, logits=z)


@pytest.mark.parametrize("seed", range(4))
def test_what_moves_everything_alike_changes_nothing(seed):
    f, y, c, z = case(seed)
    q = torch.linalg.qr(torch.randn(f.shape[1], f.shape[1], dtype=torch.double,
                                    generator=torch.Generator().manual_seed(seed)))[0]
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    before = discriminability(f, y, c, z)
    for after in (discriminability(f @ q, y, c @ q, z), discriminability(f[order], y[order], c, z[order])):
        for name in (*DISTANCES, *SQUARES, *RATIOS):
            assert after[name] == pytest.approx(before[name], rel=1e-9), name
    moved = discriminability(f + 5, y, c + 5, z)
    assert all(moved[name] == pytest.approx(before[name]) for name in (*DISTANCES, *SQUARES, *RATIOS)
               if name != "angular_spread")
    assert moved["angular_spread"] < 0.9 * before["angular_spread"]  # angles are seen from the origin
    assert angles((c @ q).numpy()) == pytest.approx(angles(c.numpy()))


@pytest.mark.parametrize("seed, prototypes_too", [(0, False), (1, True), (2, False), (3, True)])
def test_scale_changes_distances_alone(seed, prototypes_too):
    f, y, c, z = case(seed)
    before, after = discriminability(f, y, c, z), discriminability(3 * f, y, 3 * c if prototypes_too else c, z)
    for name in RATIOS:  # prototypes have one norm, so even the nearest is the same
        assert after[name] == pytest.approx(before[name], rel=1e-9), name
    for name in SQUARES:
        assert after[name] == pytest.approx(9 * before[name], rel=1e-9)
    for name in DISTANCES:
        assert ("prototype" in name and not prototypes_too
                or after[name] == pytest.approx(3 * before[name], rel=1e-9)), name
    assert angles(3 * c.numpy()) == pytest.approx(angles(c.numpy()))


@pytest.mark.parametrize("seed", range(5))
def test_the_nearest_prototype_has_the_highest_logit_if_all_have_one_norm(seed):
    f, y, c, _ = case(seed)
    found = discriminability(f, y, c, f @ c.T)
    assert found["nearest_prototype"] == found["linear"]
    assert found["per_class"]["nearest_prototype"] == found["per_class"]["linear"]


def test_the_nearest_prototype_need_not_have_the_highest_logit_if_one_is_longer():
    c = torch.tensor([[1.0, 0], [10, 0], [0, 1]])
    f, y = torch.tensor([[2.0, 0], [2, 0.1], [9, 0], [9, 0.1]]), torch.tensor([0, 0, 1, 1])
    found = discriminability(f, y, c, f @ c.T)
    assert found["per_class"]["nearest_prototype"] == [100, 100] and found["per_class"]["linear"] == [0, 100]
    assert (found["nearest_prototype"], found["linear"]) == (100, 50)


@pytest.mark.parametrize("y, says", [
    ([0, 0, 0, 0], "features of 1 classes, of the rarest 4: expected two classes and two features of each"),
    ([0, 0, 0, 1], "features of 2 classes, of the rarest 1: expected"),
    ([0, 1, 2, 3], "features of 4 classes, of the rarest 1: expected"),
])
def test_too_few_classes_or_features_are_refused(y, says):
    with pytest.raises(ValueError, match=says):
        discriminability(torch.randn(4, 3), torch.tensor(y))
    assert discriminability(torch.eye(4), torch.tensor([0, 0, 1, 1]))["nearest_mean"] == 0  # two of each are enough


def test_classes_that_collapse_or_coincide_have_a_number():
    y = torch.tensor([0, 0, 1, 1])
    collapsed = discriminability(torch.tensor([[1.0, 0], [1, 0], [0, 1], [0, 1]]), y)
    assert (collapsed["within"], collapsed["fisher"], collapsed["silhouette"],
            collapsed["nearest_mean"]) == (0, math.inf, 1, 100)
    one_spot = discriminability(torch.tensor([[1.0, 1], [1, -1], [1, 1], [1, -1]]), y)
    assert (one_spot["between"], one_spot["fisher"], one_spot["davies_bouldin"],
            one_spot["nearest_mean"]) == (0, 0, math.inf, 0)
    dead = discriminability(torch.zeros(4, 2), y)
    assert not any(math.isnan(value) for name, value in dead.items() if name != "per_class")


@pytest.mark.parametrize("seed", range(4))
def test_angles_are_what_a_loop_finds(seed):
    points = np.random.default_rng(seed).normal(size=(seed + 2, 6))
    cosine = lambda a, b: a @ b / np.linalg.norm(a) / np.linalg.norm(b)
    apart = [cosine(points[i], points[j]) for i in range(len(points)) for j in range(i)]
    found = angles(points)
    assert found["mean"] == pytest.approx(np.mean([math.degrees(math.acos(a)) for a in apart]))
    assert found["smallest"] == pytest.approx(min(math.degrees(math.acos(a)) for a in apart))
    deviation = math.sqrt(np.mean([(a + 1 / (len(points) - 1)) ** 2 for a in apart]))
    assert found["simplex_deviation"] == simplex_deviation(points) == pytest.approx(deviation)
    np.testing.assert_allclose(cosines(points), [[cosine(a, b) for b in points] for a in points])


ATTACK = PGD(0.2, steps=3)


def few(digits, keep=lambda y: y == y, n=100, batch_size=64):
    "A loader of test images whose labels are kept."
    kept = keep(digits.y_test)
    return Loader(digits.x_test[kept][:n], digits.y_test[kept][:n], batch_size)


@pytest.fixture(params=[PrototypeNet, LinearNet])
def any_net(request, digits):
    "An untrained network of width 4, with prototypes or with a linear layer."
    torch.manual_seed(0)
    backbone = timm.create_model("cifar_resnet8", width=4, in_chans=1, num_classes=0)
    return request.param(backbone, 10, mean=digits.mean, std=digits.std)


def test_geometry_leaves_no_trace(any_net, digits):
    any_net.train()
    any_net.backbone.eval()  # modes may differ
    for i, parameter in enumerate(any_net.parameters()):
        parameter.requires_grad_(i % 3 > 0)
        parameter.grad = torch.full_like(parameter, i) if i % 2 else None
    look = lambda: dict(state={name: value.clone() for name, value in any_net.state_dict().items()},
                        modes=[m.training for m in any_net.modules()],
                        flags=[p.requires_grad for p in any_net.parameters()], chance=torch.get_rng_state(),
                        numpy=np.random.get_state()[1].copy(), python=random.getstate(),
                        hooks=[len(m._forward_hooks) + len(m._forward_pre_hooks) for m in any_net.modules()],
                        grads=[None if p.grad is None else p.grad.clone() for p in any_net.parameters()])
    before = look()
    found = geometry(any_net, few(digits), ATTACK)
    after = look()
    for name in ("modes", "flags", "python", "hooks"):
        assert after[name] == before[name]
    assert all(torch.equal(value, before["state"][name]) for name, value in after["state"].items())
    assert all(a is b or torch.equal(a, b) for a, b in zip(after["grads"], before["grads"], strict=True))
    assert torch.equal(after["chance"], before["chance"])
    assert np.array_equal(after["numpy"], before["numpy"])
    torch.manual_seed(7)
    assert geometry(any_net, few(digits), ATTACK) == found  # and depends on no global state
    json.dumps(found)


def test_attacked_features_are_those_of_pgd(any_net, digits):
    any_net.train()
    loader = few(digits)
    clean, attacked = features_of(any_net, loader), features_of(any_net, loader, ATTACK)
    any_net.eval().requires_grad_(False)
    x, y = loader.take(torch.arange(100))
    x_adv = ATTACK.perturb(any_net, x, y, Draws(ATTACK.seed, range(100)))
    assert (x_adv - x).abs().mean() > 0.05
    for images, (features, logits) in ((x, clean), (x_adv, attacked)):
        with torch.no_grad():
            # the attack works on a folded copy, whose rounding may turn a sign of a gradient
            np.testing.assert_allclose(features, any_net.features(images), atol=0.02)
            np.testing.assert_allclose(logits, any_net(images), atol=0.02)
    assert len(clean[0]) == len(attacked[1]) == 100 and not attacked[0].requires_grad
    found, prototypes = geometry(any_net, loader, ATTACK), getattr(any_net.head, "prototypes", None)
    for state, (features, logits) in (("clean", clean), ("attacked", attacked)):
        assert found[state] == discriminability(features, loader.y, prototypes, logits)
    assert found["attacked"]["linear"] <= found["clean"]["linear"]
    assert found["attacked"]["within"] != found["clean"]["within"]


@pytest.mark.parametrize("keep", [lambda y: y == y, lambda y: y < 7, lambda y: y != 3, lambda y: y > 4],
                         ids=["all", "below 7", "not 3", "above 4"])
def test_labels_that_miss_a_class_work(any_net, digits, keep):
    loader = few(digits, keep)
    found, classes = geometry(any_net, loader, ATTACK), np.unique(loader.y.numpy()).tolist()
    anchored = isinstance(any_net, PrototypeNet)
    pictures = found["pictures"]
    assert (found["n"], pictures["labels"], pictures["anchored"]) == (len(loader.y), loader.y.tolist(), anchored)
    assert len(pictures["cosines"]) == 10 and len(found["clean"]["per_class"]["within"]) == len(classes)
    clean, attacked = (features_of(any_net, loader, attack)[0].double().numpy() for attack in (None, ATTACK))
    y, means = loader.y.numpy(), {k: clean[loader.y.numpy() == k].mean(0) for k in classes}
    weights = (any_net.head.prototypes if anchored else any_net.head.weight).detach().double().numpy()
    places = dict(enumerate(weights)) if anchored else means
    for state, features in (("clean", clean), ("attacked", attacked)):
        own = [np.linalg.norm(f - places[k]) for f, k in zip(features, y)]
        rival = [min(np.linalg.norm(f - place) for j, place in places.items() if j != k) for f, k in zip(features, y)]
        np.testing.assert_allclose(pictures["distances"][state]["own"], own, atol=2e-3)
        np.testing.assert_allclose(pictures["distances"][state]["rival"], rival, atol=2e-3)
        assert len(pictures[state]) == len(y)
    centred = np.stack([*means.values()]) - np.mean([*means.values()], 0)
    assert found["prototypes"] == pytest.approx(angles(weights))
    assert found["means"] == pytest.approx(angles(centred), rel=1e-3)
    three = np.stack([*means.values()])[:3]
    middle = three.mean(0)
    plane = np.linalg.svd(three - middle)[2][:2]  # each of its axes may point either way
    for name, points in (("clean", clean), ("attacked", attacked), ("prototypes", weights)):
        np.testing.assert_allclose(np.abs(pictures[name]), np.abs((points - middle) @ plane.T), atol=5e-3)


def test_geometry_does_not_depend_on_the_batch_size(any_net, digits):
    a, b = (geometry(any_net, few(digits, batch_size=size), ATTACK) for size in (100, 37))
    for state, tolerance in (("clean", 1e-4), ("attacked", 1e-2)):  # another batch rounds differently, PGD takes signs
        del a[state]["per_class"], b[state]["per_class"]
        assert a[state] == pytest.approx(b[state], rel=tolerance)
    assert (a["prototypes"], a["n"]) == (b["prototypes"], b["n"])


def test_the_record_has_the_names_that_tables_and_pictures_read(any_net, digits):
    found, anchored = geometry(any_net, few(digits), ATTACK), isinstance(any_net, PrototypeNet)
    assert [*found] == ["clean", "attacked", "prototypes", "means", "n", "pictures"]
    assert [*found["prototypes"]] == [*found["means"]] == ["mean", "smallest", "simplex_deviation"]
    per_class = {*PER_CLASS, "linear"} | ({*OF_PROTOTYPES} if anchored else set())
    for state in ("clean", "attacked"):
        assert found[state]["per_class"].keys() == per_class
        assert found[state].keys() == per_class | {"between", "means_apart", "fisher", "davies_bouldin", "per_class"}
    pictures = found["pictures"]
    assert [*pictures] == ["cosines", "labels", "anchored", "clean", "attacked", "prototypes", "distances"]
    assert {state: [*sides] for state, sides in pictures["distances"].items()} == dict(clean=["own", "rival"],
                                                                                     attacked=["own", "rival"])


def test_a_network_that_is_wrapped_is_measured(any_net, digits):
    loader = Loader(digits.x_test[:60], digits.y_test[:60], 60)
    wrapped, plain = (geometry(net, loader, PGD(0.1, steps=1)) for net in (torch.nn.DataParallel(any_net), any_net))
    assert wrapped["clean"] == plain["clean"]


def test_features_as_a_network_or_numpy_has_them():
    features, y = torch.randn(8, 3, requires_grad=True), torch.tensor([0, 1] * 4)
    found = discriminability(features, y, torch.eye(2, 3))
    assert found == discriminability(features.detach().numpy(), y.tolist(), np.eye(2, 3))
    for wrong in ([-1, 1] * 4, [0, 2] * 4):
        with pytest.raises(ValueError, match="expected 0 to 1, one prototype for each"):
            discriminability(features, torch.tensor(wrong), torch.eye(2, 3))
