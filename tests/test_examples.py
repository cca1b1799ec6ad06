import re

import pytest
import torch

import gradsurgery as gs
from examples.translation.__main__ import main
from examples.translation.data import DEFAULT, END, PAD, START, Corpus, read_pairs
from examples.translation.model import Translator


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
