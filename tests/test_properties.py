"What holds for any numbers, shapes and words, and not for our examples alone."
import json
import math
import os
import string

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as some
from torch.nn import functional as F

from advdpnp.attacks import CW, FGSM, PGD, Draws, ThreatModel
from advdpnp.autoattack import APGD, APGDT, FABT, Square
from advdpnp.cli import parse_eps, parse_settings, parse_time, parse_value
from advdpnp.core import differing, flat, read_json, replacing, seed_of, write_json
from advdpnp.data import stratified_order
from advdpnp.evaluation import packed, unpacked, wilson
from advdpnp.losses import CONSISTENCIES, REPULSIONS, adversarial_terms, clean_terms, consistency, mean_repulsion
from advdpnp.losses import negative_repulsion, positive_alignment
from advdpnp.methods import EXTRAS, METHODS, split_name
from advdpnp.prototypes import PrototypeHead, auto_norm, regular_simplex
from advdpnp.runs import config_hash, kinds_of, make_config

few = settings(max_examples=25, deadline=None, derandomize=True,
               suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
seeds = some.integers(0, 2**32 - 1)
classes = some.integers(2, 12)
sizes = some.integers(1, 9)
scales = some.sampled_from([1e-6, 0.1, 1.0, 30.0])


def drawn(seed, *shape, scale=1.0):
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def labels(seed, n, k):
    return torch.randint(k, (n,), generator=torch.Generator().manual_seed(seed))


# Losses


@few
@given(seeds, classes, some.integers(1, 20), scales)
def test_repulsion_lies_between_the_simplex_and_one_and_knows_no_length(seed, k, d, scale):
    c = drawn(seed, k, d, scale=scale)
    for found in (negative_repulsion(c), mean_repulsion(c)):
        assert -1 / (k - 1) - 1e-5 <= found <= 1 + 1e-5
    assert torch.allclose(negative_repulsion(c), negative_repulsion(7 * c), atol=1e-5)
    assert torch.allclose(negative_repulsion(c), negative_repulsion(c.flip(0)), atol=1e-5)
    assert mean_repulsion(c) <= negative_repulsion(c) + 1e-5


@few
@given(classes, some.integers(0, 5))
def test_the_bound_of_repulsion_is_that_of_the_regular_simplex(k, more):
    simplex = regular_simplex(k, k - 1 + more)
    assert math.isclose(negative_repulsion(simplex), -1 / (k - 1), abs_tol=1e-5)
    assert math.isclose(mean_repulsion(simplex), -1 / (k - 1), abs_tol=1e-5)


@few
@given(seeds, classes, sizes, scales)
def test_consistency_is_never_negative_and_zero_for_one_and_the_same(seed, k, b, scale):
    z, other = drawn(seed, b, k, scale=scale), drawn(seed + 1, b, k, scale=scale)
    for name, loss in CONSISTENCIES.items():
        assert loss(z, other, z, other) >= -1e-6, name
        assert abs(loss(z, z, z, z)) < 1e-6, name
    assert torch.allclose(consistency(z + 5, other - 3), consistency(z, other), atol=1e-4)  # logits up to a constant
    order = torch.randperm(k, generator=torch.Generator().manual_seed(seed))
    assert torch.allclose(consistency(z[:, order], other[:, order]), consistency(z, other), atol=1e-4)


@few
@given(seeds, classes, sizes, some.integers(1, 20))
def test_alignment_is_zero_on_the_prototypes_alone(seed, k, b, d):
    c, y = drawn(seed, k, d), labels(seed, b, k)
    assert positive_alignment(c[y], y, c) == 0
    away = drawn(seed + 1, b, d)
    assert math.isclose(positive_alignment(c[y] + away, y, c), 0.5 * away.square().sum(1).mean(), rel_tol=1e-3)


@few
@given(seeds, classes, sizes, some.integers(2, 20), some.sampled_from([*REPULSIONS]),
       some.sampled_from([*CONSISTENCIES]))
def test_the_adversarial_branch_never_moves_a_prototype(seed, k, b, d, repulsion, form):
    torch.manual_seed(seed)
    head, y = PrototypeHead(d, k), labels(seed, b, k)
    clean, adversarial = (drawn(seed + i, b, d).requires_grad_() for i in (1, 2))
    terms = adversarial_terms(head, clean, adversarial, y, consistency=form)
    gradients = torch.autograd.grad(sum(terms.values()), [head.directions, adversarial], allow_unused=True)
    assert gradients[0] is None or not gradients[0].any()
    assert gradients[1].isfinite().all()
    moved, = torch.autograd.grad(sum(clean_terms(head, clean, y, repulsion=repulsion).values()), head.directions)
    assert moved.isfinite().all()
    # the norm is fixed: a gradient has no part along its prototype
    assert (moved * head.directions).sum(1).abs().max() < 1e-3 * (1 + moved.norm())


@few
@given(classes, some.floats(0.3, 0.9999))
def test_the_norm_reaches_its_confidence(k, confidence):
    assume(confidence > 1.01 / k)
    c = auto_norm(k, confidence) * regular_simplex(k, k).double()
    assert (c @ c.T).softmax(1).diagonal().sub(confidence).abs().max() < 1e-4


# Attacks


class Linear(torch.nn.Module):
    "Logits of any images."

    def __init__(self, shape, k=3):
        super().__init__()
        torch.manual_seed(0)
        self.net = torch.nn.Linear(math.prod(shape), k)

    def forward(self, x):
        return self.net(x.flatten(1))


shapes = some.tuples(some.integers(1, 3), some.integers(1, 3), some.integers(1, 6), some.integers(1, 6))
norms = some.sampled_from(["linf", "l2"])


def images(seed, shape):
    "In [0, 1], some at its ends."
    return (1.4 * torch.rand(shape, generator=torch.Generator().manual_seed(seed)) - 0.2).clamp(0, 1)


def inside(threat, x_adv, x):
    return (threat.length(x_adv - x) <= threat.eps + 1e-5).all() and 0 <= x_adv.min() and x_adv.max() <= 1


@few
@given(seeds, shapes, some.floats(0, 1), norms, some.sampled_from([1e-6, 0.1, 3.0, 1e6]))
def test_a_projection_leads_inside_and_leaves_what_is_inside(seed, shape, eps, norm, far):
    threat, x = ThreatModel(eps, norm), images(seed, shape)
    once = threat.project(x + drawn(seed + 1, *shape, scale=far), x)
    assert inside(threat, once, x)
    assert (threat.project(once, x) - once).abs().max() < 1e-6
    start = threat.start(x, threat.ball(shape, torch.Generator().manual_seed(seed)))
    assert inside(threat, start, x)
    assert (threat.project(start, x) - start).abs().max() < 1e-6


@few
@given(seeds, shapes, some.floats(1e-4, 1), norms, some.sampled_from([FGSM, PGD, CW, APGD, APGDT, FABT, Square]))
def test_attacks_stay_inside_for_any_shape_budget_and_norm(seed, shape, eps, norm, kind):
    attack = kind(eps, norm=norm, **{"queries": 5} if kind is Square else {} if kind is FGSM else {"steps": 3})
    x, y, model = images(seed, shape), labels(seed, shape[0], 3), Linear(shape[1:]).eval()
    before = x.clone()
    x_adv = attack(model, x, y)
    assert inside(ThreatModel(eps, norm), x_adv, x) and x_adv.shape == x.shape
    assert torch.equal(x, before) and torch.equal(attack(model, x, y), x_adv)
    if kind is FGSM and norm == "linf":  # of a linear model, it is the best
        lead = lambda images: (F.cross_entropy(model(images), y, reduction="none"))
        assert (lead(x_adv) >= lead(x) - 1e-5).all()


@few
@given(seeds, some.lists(some.integers(0, 10**6), min_size=1, max_size=6, unique=True))
def test_an_image_gets_its_random_numbers_in_whatever_batch_it_comes(seed, places):
    draw = lambda generator: torch.rand(3, generator=generator)
    together = Draws(seed, places).each(draw)
    assert all(torch.equal(together[i], Draws(seed, [place]).each(draw)[0]) for i, place in enumerate(places))


# Parsers


@few
@given(some.integers(0, 1000), some.integers(1, 1000))
def test_a_fraction_is_the_number_it_names(top, bottom):
    assert parse_eps(f"{top}/{bottom}") == top / bottom
    assert parse_eps(str(top / bottom)) == top / bottom


@few
@given(some.text(max_size=12))
def test_other_words_are_no_budget_and_no_time(text):
    for parse, expected in ((parse_eps, "expected a number or a fraction"), (parse_time, "expected something like")):
        try:
            found = parse(text)
        except ValueError as error:
            assert expected in str(error) and repr(text) in str(error)
        else:
            assert math.isfinite(found)


@few
@given(some.integers(0, 99), some.integers(0, 999), some.integers(0, 9999))
def test_times_add_up(hours, minutes, seconds):
    assert parse_time(f"{hours}h{minutes}m{seconds}s") == 3600 * hours + 60 * minutes + seconds
    assert parse_time(f"{minutes}m") == parse_time(f" {60 * minutes}") == 60 * minutes


plain = some.one_of(some.booleans(), some.none(), some.integers(-10**9, 10**9),
                    some.floats(allow_nan=False, allow_infinity=False))


@few
@given(some.dictionaries(some.text(string.ascii_lowercase, min_size=1, max_size=8).filter(
    lambda key: key not in ("method", "preset", "seed", "device")), plain, max_size=4))
def test_settings_are_read_as_they_are_written(given_settings):
    written = [f"{key}={value}" for key, value in given_settings.items()]
    assert parse_settings(written) == given_settings
    assert all(type(parse_value("a", str(value))) is type(value) for value in given_settings.values())


@few
@given(some.sampled_from([*METHODS]), some.lists(some.sampled_from([*EXTRAS]), max_size=4))
def test_a_method_has_one_name(method, extras):
    name = "+".join([method, *extras])
    usual = "+".join([method, *(extra for extra in EXTRAS if extra in extras)])
    if name == usual:
        assert split_name(name) == (method, {key: value for extra in extras for key, value in EXTRAS[extra].items()})
    else:
        with pytest.raises(ValueError, match="write it "):
            split_name(name)


@few
@given(some.text(max_size=20))
def test_any_other_name_is_no_method(name):
    assume(name.split("+")[0] not in METHODS)
    with pytest.raises(ValueError, match="unknown method"):
        split_name(name)


# Configurations


@few
@given(some.sampled_from([*METHODS]), some.sampled_from(["quick", "small", "fast", "paper"]), some.integers(0, 10**6),
       some.data())
def test_a_configuration_survives_json_and_has_one_hash(method, preset, seed, data):
    changes = data.draw(some.fixed_dictionaries({}, optional=dict(
        epochs=some.integers(1, 200), lr=some.floats(1e-4, 10), eps=some.floats(0, 1), ema=some.floats(0, 0.999),
        train_images=some.none() | some.integers(1, 10**6), precision=some.sampled_from(["float32", "bf16"]))))
    config = make_config(method, preset, seed, "cpu", **changes)
    again = json.loads(json.dumps(config))
    assert again == config and config_hash(again) == config_hash(dict(reversed(config.items()))) == config_hash(config)
    assert not differing(config, again) and flat(config) == flat(again)
    assert make_config(method, preset, seed, "cpu", **{key: config[key] for key in config["changes"]}) == config
    assert all(config[key] == value for key, value in changes.items())
    assert config_hash(make_config(method, preset, seed + 1, "cpu", **changes)) != config_hash(config)


@few
@given(some.sampled_from([*METHODS]), some.data())
def test_settings_of_another_kind_are_refused(method, data):
    key = data.draw(some.sampled_from(sorted(kinds_of(method))))
    value = data.draw(some.sampled_from([[], {}, (1,), b"1", object(), 1j, float("nan"), float("inf"), 10**400]))
    with pytest.raises(ValueError, match=f"^{key} is .*: expected"):
        make_config(method, "quick", device="cpu", **{key: value})


# Numbers and files


@few
@given(some.integers(1, 10**5), some.data())
def test_a_wilson_interval_holds_the_estimate_and_is_symmetric(n, data):
    correct = data.draw(some.integers(0, n))
    low, high = wilson(correct, n)
    assert 0 <= low <= correct / n <= high <= 1 and low < high
    assert np.allclose(wilson(n - correct, n), (1 - high, 1 - low), atol=1e-9)
    wider = wilson(10 * correct, 10 * n)
    assert low - 1e-9 <= wider[0] and wider[1] <= high + 1e-9  # more images, a smaller interval


@few
@given(some.lists(some.booleans(), max_size=50))
def test_verdicts_are_kept_as_they_are(verdicts):
    assert unpacked(packed(torch.tensor(verdicts, dtype=torch.bool))).tolist() == verdicts


@few
@given(some.lists(some.integers(0, 4), min_size=1, max_size=200), some.integers(0, 1000))
def test_every_beginning_of_a_stratified_order_has_the_classes_in_proportion(y, seed):
    y = np.array(y)
    order = stratified_order(y, 5, seed)
    assert sorted(order) == [*range(len(y))]
    for n in {1, len(y) // 3, len(y) // 2, len(y)} - {0}:
        share = np.bincount(y[order[:n]], minlength=5) - n * np.bincount(y, minlength=5) / len(y)
        assert np.abs(share).max() <= 2.5


@few
@given(some.lists(some.integers(0, 2**40), min_size=1, max_size=4), some.lists(some.integers(0, 2**40), min_size=1,
                                                                              max_size=4))
def test_places_that_differ_have_seeds_that_differ(one, other):
    strip = lambda key: tuple(key[:max((i + 1 for i, part in enumerate(key) if part), default=0)])
    assert 0 <= seed_of(*one) < 2**63
    assert (seed_of(*one) == seed_of(*other)) == (strip(one) == strip(other))


values = some.recursive(plain | some.text(max_size=9), lambda inner: some.lists(inner, max_size=3) | some.dictionaries(
    some.text(max_size=5), inner, max_size=3), max_leaves=8)


@few
@given(values)
def test_json_is_read_as_it_was_written(tmp_path, value):
    assume(not (isinstance(value, dict) and "checksum" in value))
    write_json(tmp_path / "any.json", value)
    assert read_json(tmp_path / "any.json") == value and os.listdir(tmp_path) == ["any.json"]


@few
@given(some.binary(max_size=50), some.binary(max_size=50), some.sampled_from([None, KeyboardInterrupt, ValueError]))
def test_a_file_is_the_old_one_or_the_new_one(tmp_path, old, new, error):
    path = tmp_path / "a.b.c"
    path.write_bytes(old)
    try:
        with replacing(path) as part:
            part.write_bytes(new)
            assert path.read_bytes() == old
            if error:
                raise error
    except (KeyboardInterrupt, ValueError):
        pass
    assert path.read_bytes() == (old if error else new) and os.listdir(tmp_path) == ["a.b.c"]
