"""The benchmark on molecules, on molecules made up here: the real ones are a package of 100 MB."""

import csv
import io

import numpy as np
import pytest
import torch

import gradsurgery as gs
from benchmarks.qm9 import data as qm9
from benchmarks.qm9.__main__ import main
from benchmarks.qm9.report import deltas, mean_ranks, tables
from benchmarks.qm9.train import Settings, Training, train

METHANE = """\
XYZ_file,Elements,XYZ_Ang,Dipole_debye,Polarizability_bohr3,HOMO_au,LUMO_au,R2_bohr2,ZPVE_au,InternalEnergy_0K_au,\
InternalEnergy_298K_au,Enthalphy_298K_au,GibbsFreeEnergy_298K_au,Heatcapacity_Cv_cal_mol_K
"a.xyz","['C','H','H','H','H']","[[-0.0126981359,1.0858041578,0.0080009958],[0.002150416,-0.0060313176,0.0019761204],\
[1.0117308433,1.4637511618,0.0002765748],[-0.540815069,1.4475266138,-0.8766437152],[-0.5238136345,1.4379326443,\
0.9063972942]]",0.,13.21,-0.3877,0.1171,35.3641,0.044749,-40.47893,-40.476062,-40.475117,-40.498597,6.469
"""


@pytest.fixture
def made_up():
    generator = np.random.default_rng(0)
    x = generator.normal(size=(400, 20)).astype(np.float32)
    y = x[:, :11].astype(np.float64) ** 2 + x[:, 11:12] * 3 + 5
    return x, y


@pytest.fixture
def data(made_up):
    return qm9.standardized(*made_up, *np.split(np.arange(400), [300, 350]))


def test_a_molecule_is_read():
    x, y = qm9.read(next(csv.DictReader(io.StringIO(METHANE))))
    assert x[:5].tolist() == [4, 1, 0, 0, 0]
    pairs = x[5:].reshape(15, 24)
    assert (pairs.sum(1) > 0).tolist() == [True, True] + [False] * 13  # H-H, then C-H
    assert np.isclose(qm9.CENTRES[pairs[1].argmax()], 1.09, atol=qm9.WIDTH / 2)  # the length of the bond
    assert y[:3] == pytest.approx([0, 13.21, -10549.85], rel=1e-5)


def test_features_know_neither_order_nor_orientation():
    generator = np.random.default_rng(1)
    places = generator.normal(size=(6, 3)) * 2
    turn = np.linalg.qr(generator.normal(size=(3, 3)))[0]
    order = generator.permutation(6)
    own = qm9.features("HCNOFC", places)
    other = qm9.features("".join("HCNOFC"[i] for i in order), places[order] @ turn + 5)
    np.testing.assert_allclose(own, other, atol=1e-5)
    assert not np.allclose(own, qm9.features("HCNOFC", places * 1.2), atol=1e-2)


def test_nothing_of_the_test_set_is_used_in_scaling(made_up):
    x, y = made_up
    parts = np.split(np.arange(400), [300, 350])
    before = qm9.standardized(x, y, *parts)
    changed = y.copy()
    changed[350:] *= 100
    after = qm9.standardized(x, changed, *parts)
    for part in ("train", "valid"):
        assert torch.equal(getattr(before, part).y, getattr(after, part).y)
    assert not torch.equal(before.test.y, after.test.y)
    assert before.train.y.mean(0).abs().max() < 1e-5
    torch.testing.assert_close(before.train.y.std(0, correction=0), torch.ones(11))


def test_what_atoms_explain_is_taken_from_extensive_targets(made_up):
    x, y = made_up
    energies = [k for k, target in enumerate(qm9.TARGETS.values()) if target.extensive]
    assert energies == [6, 7, 8, 9]
    shifted = y.copy()
    shifted[:, energies] += x[:, :5].sum(1, keepdims=True) * 1000
    parts = np.split(np.arange(400), [300, 350])
    torch.testing.assert_close(
        qm9.standardized(x, y, *parts).test.y, qm9.standardized(x, shifted, *parts).test.y, rtol=1e-3, atol=1e-3
    )


def test_the_sum_over_eleven_is_plain_training(data):
    settings = Settings(steps=3, batch=32, width=16, lr=1e-2)
    plain, mean = Training(data, None, settings, 0), Training(data, gs.Mean(), settings, 0)
    for _ in range(3):
        plain.step()
        mean.step()
    for a, b in zip(plain.model.trunk.parameters(), mean.model.trunk.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_training_on_one_target_learns_it(data):
    found = train(data, 3, Settings(steps=300, batch=64, width=32, lr=1e-2), 0)
    assert len(found["test"]) == 1
    spread = (data.test.y[:, 3] * data.unit[3]).abs().mean()
    assert found["test"][0] < 0.5 * spread


def test_measures_by_hand():
    single = [[1.0] * 11, [3.0] * 11]  # 2 on average
    errors = {"a": [[2.0] * 11, [4.0] * 11], "b": [[1.0] * 10 + [12.0], [1.0] * 10 + [12.0]]}
    assert deltas(errors, single) == {"a": [0.0, 100.0], "b": pytest.approx([0.0, 0.0], abs=1e-12)}
    assert mean_ranks(errors) == pytest.approx({"a": 21 / 11, "b": 12 / 11})
    text = tables(errors, single, {"a": 1.0})
    assert "| b | 0.0 ± 0.0 | 1.1 |" in text
    assert "| a | 50.0 ± 635.3 | 1.9 | 1.0 |" in text


def test_command_runs_and_goes_on_where_it_stopped(tmp_path, capsys, made_up, monkeypatch):
    key = qm9.cached(tmp_path)
    np.savez(key, x=made_up[0], y=made_up[1])
    tiny = Settings(steps=2, batch=8, width=8, train=300, valid=50, test=50)
    monkeypatch.setattr(Settings, "quick", lambda self: tiny)
    arguments = ["--quick", "--methods", "LS", "PCGrad", "--out", str(tmp_path), "--cache", str(tmp_path), "--jobs", "1"]
    out = main(arguments)
    assert "13 runs made now" in capsys.readouterr().out
    (out / "runs" / "PCGrad-0.json").unlink()
    before = (out / "runs" / "LS-0.json").stat().st_mtime_ns
    main(arguments)
    assert "1 runs made now" in capsys.readouterr().out
    assert (out / "runs" / "LS-0.json").stat().st_mtime_ns == before
    assert (out / "delta.png").stat().st_size > 5000
    assert (out / "results.md").read_text().count("\n| ") == 9


def test_without_the_package_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(qm9, "version", lambda name: "0.0.1")
    with pytest.raises(SystemExit, match=r"Found 0\.0\.1: pip install qm9pack==1\.0\.3"):
        qm9.load(tmp_path, train=1, valid=1, test=1)
