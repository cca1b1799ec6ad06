import json
import re
from dataclasses import replace

import pytest
import torch

import gradsurgery as gs
from examples.translation.__main__ import main
from examples.translation.data import DEFAULT, END, PAD, START, Corpus, read_pairs
from examples.translation.every import main as measure_every
from examples.translation.model import Translator
from examples.translation.report import blocks
from examples.translation.train import Settings, backward_apart, backward_mixed, train


@pytest.fixture(scope="module")
def corpus():
    return Corpus.read(DEFAULT)


def test_demo_runs(tmp_path, capsys):
    out = main(["--quick", "--out", str(tmp_path / "out"), "--seeds", "2"])
    printed = capsys.readouterr().out
    for name in (*DEFAULT, "average", "Sum", "PCGrad", "GradVac", "pairs in conflict", "pairs operated on"):
        assert name in printed
    assert re.search(r"average( +\d+\.\d+ ± \d+\.\d+){6}", printed)
    assert printed.rstrip().splitlines()[-1].endswith(str(out.resolve()))
    for name in ("cosines", "similarity", "operations", "losses"):
        assert (out / f"{name}.png").stat().st_size > 5000
    assert (out / "results.json").read_text().count('"method"') == 6


def test_unknown_language_says_which_there_are(capsys):
    with pytest.raises(SystemExit):
        main(["--languages", "French", "Klingon"])
    assert "there is no Klingon. Choose from French, Spanish" in capsys.readouterr().err


def test_validation_messages_are_in_no_languages_training(corpus):
    train = {pair.english.casefold() for pairs in corpus.train.values() for pair in pairs}
    valid = {pair.english.casefold() for pairs in corpus.valid.values() for pair in pairs}
    assert len(valid) > 50
    assert not train & valid


def test_pairs_are_translated_and_unique():
    pairs = read_pairs("Ukrainian")
    assert len({pair.english for pair in pairs}) == len(pairs) > 300
    assert all(pair.english != pair.translation for pair in pairs)


def test_texts_survive_encoding(corpus):
    pairs = corpus.train["Hindi"][:5]
    _, target = corpus.encode("Hindi", pairs)
    assert corpus.decode(target[:, 1:]) == [pair.translation for pair in pairs]


def test_padding_changes_nothing_and_nothing_looks_ahead():
    torch.manual_seed(0)
    model = Translator(20, width=16, layers=2).eval()
    source, target = torch.randint(4, 20, (3, 7)), torch.randint(4, 20, (3, 6))
    scores = model(source, target)
    padded = torch.nn.functional.pad(source, (0, 3), value=PAD)
    torch.testing.assert_close(model(padded, target), scores, atol=1e-5, rtol=1e-5)
    changed = target.clone()
    changed[:, 4] = (changed[:, 4] - 3) % 16 + 4
    torch.testing.assert_close(model(source, changed)[:, :4], scores[:, :4])
    assert not torch.allclose(model(source, changed)[:, 4:], scores[:, 4:])


def test_greedy_decoding_takes_the_best_symbol():
    torch.manual_seed(0)
    model = Translator(12, width=16, layers=1).eval()
    source = torch.randint(4, 12, (2, 5))
    decoded = model.translate(source)
    target = torch.cat([torch.full((2, 1), START), decoded], 1)
    best = model(source, target[:, :-1]).argmax(-1)
    for row, expected in zip(decoded.tolist(), best.tolist(), strict=True):
        length = row.index(END) + 1 if END in row else len(row)
        assert row[:length] == expected[:length]


def test_layers_are_surgery_groups():
    model = Translator(12, width=16, layers=2)
    opt = gs.SurgeryOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), gs.Sum(), model=model, groups="layer")
    assert set(opt.groups) == {"embedding", "encoder.0", "encoder.1", "decoder.0", "decoder.1", "output"}


def test_every_runs(tmp_path, capsys):
    out = measure_every(["--quick", "--out", str(tmp_path / "out"), "--seeds", "2"])
    printed = capsys.readouterr().out
    assert "| every | step time | validation loss | difference to every=1 |\n|---|--:|--:|--:|\n" in printed
    loss = r"\d\.\d{3} ± \d\.\d{3}"
    for name in ("1", "2", "4", "8", "Sum", "1, apart"):
        change = "" if name == "1" else f"-?{loss}"
        assert re.search(rf"\| {name} \| \d\.\d\d \(\d\.\d\d–\d\.\d\d\) \| {loss} \| {change} \|\n", printed)
    assert printed.rstrip().endswith(str(out.resolve()))
    assert (out / "every.png").stat().st_size > 5000
    found = json.loads((out / "every.json").read_text())
    assert found["1"]["relative step times"] == [1.0, 1.0]
    assert all(len(values) == 2 for row in found.values() for values in row.values())


def test_every_with_one_seed_has_no_intervals(tmp_path, capsys):
    measure_every(["--quick", "--out", str(tmp_path), "--seeds", "1"])
    printed = capsys.readouterr().out
    assert "±" not in printed
    assert "One seed says nothing about differences" in printed


def test_demo_with_surgery_less_often(tmp_path, capsys):
    out = main(["--quick", "--out", str(tmp_path), "--every", "2"])
    assert "Surgery in one step of 2" in capsys.readouterr().out
    assert [(run["method"], run["every"]) for run in json.loads((out / "results.json").read_text())] == [
        ("Sum", 1),
        ("PCGrad", 2),
        ("GradVac", 2),
    ]


@pytest.mark.parametrize("command", [main, measure_every])
def test_options_must_be_positive(command, capsys):
    with pytest.raises(SystemExit):
        command(["--steps", "0"])
    assert "--steps must be at least 1. Found 0." in capsys.readouterr().err


def test_mixed_batches_have_the_gradients_of_passes_apart(corpus):
    batch = next(corpus.batches(1, 3, 0))
    gradients, losses = [], []
    for backward in (backward_apart, backward_mixed):
        torch.manual_seed(0)
        model = Translator(len(corpus.ids), width=16, layers=1, dropout=0.0)
        sgd = torch.optim.SGD(model.parameters(), lr=0.1)
        opt = gs.SurgeryOptimizer(sgd, gs.PCGrad(), model=model, groups="layer", tasks=corpus.languages)
        losses.append(backward(opt, model, batch))
        opt.combine()
        gradients.append([p.grad for p in model.parameters()])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("mixed", [False, True])
def test_taking_turns_changes_no_result(corpus, mixed):
    settings = replace(Settings(mixed=mixed, decoded=0).quick(), every=2)
    batches = list(corpus.batches(settings.steps, settings.batch, 0))

    def start(method):
        return train(method, 0, corpus, batches, settings)

    alone = [list(start(method))[-1] for method in ("Sum", "GradVac")]
    together = list(zip(start("Sum"), start("GradVac"), strict=True))[-1]
    for one, other in zip(alone, together, strict=True):
        assert len(one.training) == len(one.milliseconds) == 3
        assert one.training == other.training
        assert one.loss == other.loss
        assert not one.chrf


def test_sum_seldom_is_plain_training(corpus):
    settings = Settings(mixed=True, decoded=0).quick()
    batches = list(corpus.batches(settings.steps, settings.batch, 0))
    always, once = (list(train("Sum", 0, corpus, batches, replace(settings, every=n)))[-1] for n in (1, 3))
    assert once.training == pytest.approx(always.training, rel=1e-5)


def test_blocks_of_steps():
    assert blocks([1.0, 3.0, 5.0, 7.0, 100.0], 2) == [2.0, 6.0]
    assert blocks([1.0, 3.0], 8) == [2.0]
