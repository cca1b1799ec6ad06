"""``python -m gradsurgery``."""

import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import gradsurgery as gs
from gradsurgery import _catalogue
from gradsurgery.__main__ import main
from gradsurgery._bench import bench
from gradsurgery._bench.memory import measurable
from gradsurgery._bench.model import workload
from gradsurgery._bench.progress import progress

ROOT = Path(__file__).parent.parent
RULES = [name for name in gs.rules.__all__ if name != "Chain"]


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


# --- rules ------------------------------------------------------------------------------------------------------------


def test_rules_lists_all_of_them(capsys):
    assert main(["rules"]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = {line.split()[0]: line for line in lines[1 : 1 + len(RULES)]}
    assert set(rows) == set(RULES)
    assert lines[0].split()[:4] == ["rule", "sees", "state", "separable"]
    assert all(re.search(r"\d+ µs|ms|–", row) for row in rows.values())
    assert "NeurIPS 2020 (arXiv:2001.06782), Algorithm 1" in rows["PCGrad"]
    assert "settings" in rows["STCH"]  # it is symmetric unless it has preferences


def test_what_an_entry_says():
    found = {entry.name: entry for entry in _catalogue.entries()}
    famo, mgda, plain = found["FAMO"], found["MGDA"], found["Sum"]
    assert (famo.sees, famo.state, famo.flags["random"]) == ("losses", True, False)
    assert famo.paper.startswith("Liu, Feng, Stone, Liu")
    assert (mgda.sees, mgda.state, mgda.flags["non_conflicting"]) == ("gradients", False, True)
    assert mgda.what == "The shortest vector in the convex hull of the tasks' gradients"
    assert (plain.sees, plain.paper, plain.cost) == ("", "", ())
    assert found["STCH"].flags["symmetric"] is None
    for name in RULES:  # all but the plain sums have a paper, all a sentence
        assert found[name].what
        assert found[name].paper or name in ("Sum", "Mean")


def test_times_are_those_of_rules_that_do_without_settings(monkeypatch):
    class Needs(gs.Rule):
        """Needs a setting."""

        def __init__(self, anchors):
            pass

    monkeypatch.setattr(gs.rules, "Needs", Needs, raising=False)
    monkeypatch.setattr(gs.rules, "__all__", ["Needs", "Sum"])
    found = {entry.name: entry for entry in _catalogue.entries(timed=True)}
    assert all(math.isnan(seconds) for seconds in found["Needs"].cost)
    assert all(0 < seconds < 1 for seconds in found["Sum"].cost)
    assert "–" in _catalogue.plain(list(found.values()))


@pytest.mark.parametrize("path", ["README.md", "docs/rules.md"])
def test_the_tables_of_rules_are_up_to_date(path):
    page = (ROOT / path).read_text(encoding="utf-8")
    assert page == _catalogue.updated(page), f"run: python -m gradsurgery rules --write {path}"
    assert "`PCGrad`" in page


def test_a_page_is_updated(tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text(f"before\n{_catalogue.BEGIN}\nold\n{_catalogue.END}\nafter\n")
    assert main(["rules", "--write", str(page)]) == main(["rules", "--write", str(page)]) == 0
    assert capsys.readouterr().out == f"{page}: updated\n{page}: was up to date\n"
    text = page.read_text()
    assert text.startswith("before\n<!-- rules -->\n| Rule |")
    assert text.endswith("|\n<!-- /rules -->\nafter\n")
    assert "| `PCGrad` | Projects each task's gradient" in text
    assert main(["rules", "--markdown"]) == 0
    assert capsys.readouterr().out in text
    page.write_text("no marks")
    assert main(["rules", "--write", str(page)]) == 2
    assert "must hold <!-- rules --> and <!-- /rules --> once" in capsys.readouterr().err


# --- bench ------------------------------------------------------------------------------------------------------------

FACTORY = """
import torch
from torch import nn

def make():
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    x = torch.randn(16, 4)
    def losses():
        out = model(x)
        return {"a": out[:, 0].square().mean(), "b": (out[:, 1] - 1).square().mean()}
    return model, losses

def wrong():
    return nn.Linear(1, 1)

def stack():
    model, losses = make()
    return model, lambda: list(losses().values())
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "own_model.py").write_text(FACTORY)
    monkeypatch.chdir(tmp_path)
    yield "own_model"
    sys.modules.pop("own_model", None)


def quick(*arguments):
    return main(["bench", "--quick", "--threads", "1", *arguments])


def test_the_built_in_model(tmp_path, capsys):
    sources, groups = "autograd,batched,split", "model,layer"
    out = str(tmp_path / "out")
    assert quick("--rules", "PCGrad+Mean,FAMO", "--sources", sources, "--groups", groups, "--no-memory", "--out", out) == 0
    printed = capsys.readouterr().out
    table = (tmp_path / "out/bench.md").read_text()
    assert table in printed
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[2:]]
    assert rows[0][0] == "plain step"
    assert [tuple(row[:3]) for row in rows[1:]] == [
        (rule, source, group)
        for rule in ("PCGrad+Mean", "FAMO")
        for source in sources.split(",")
        for group in groups.split(",")
    ]
    assert all(re.fullmatch(r"[\d.]+ ms", row[3]) and re.fullmatch(r"[\d.]+×", row[4]) for row in rows)
    assert (tmp_path / "out/bench.png").stat().st_size > 10_000


@pytest.mark.skipif(not measurable(), reason="peak memory can be measured on Linux only")
def test_peak_memory_is_that_of_the_rows(tmp_path):
    # In float32, a plain step needs one gradient and surgery one row for each task more, beside the activations.
    sizes = {"tasks": 4, "width": 256, "layers": 2, "sequences": 4, "tokens": 4}
    settings = bench.Settings(None, sizes, repeats=1, seed=0, threads=1, memory=True)
    rows = bench.bench([bench.Way("PCGrad", "autograd", "model")], settings)
    gradient = 4 * sum(p.numel() for p in workload(None, sizes, 0).model.parameters())
    plain, ours = (row.peak for row in rows)
    assert 0.9 * gradient < plain < 2 * gradient
    assert 3 * gradient < ours - plain < 5.5 * gradient


def test_ones_own_model(module, tmp_path, capsys):
    arguments = ["--model", f"{module}:make", "--rules", "GradVac", "--groups", "tensor", "--no-memory"]
    assert quick(*arguments, "--sources", "autograd,split", "--out", str(tmp_path / "out")) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("58 parameters, 2 tasks, 1 threads")
    assert re.search(r"GradVac +\| autograd \| tensor \| [\d.]+ ms", printed)
    assert re.search(
        r"GradVac +\| split +\| tensor \| ValueError: there is no mixed batch: the factory must return", printed
    )


WRONG = {
    "no function": (["--model", "own_model"], "--model must be package.module:factory. Found 'own_model'"),
    "no module": (["--model", "nowhere:make"], "--model nowhere:make: No module named 'nowhere'"),
    "no such function": (["--model", "own_model:made"], "own_model:made: module 'own_model' has no attribute 'made'"),
    "no pair": (["--model", "own_model:wrong"], r"own_model:wrong() returned Linear. --model names a function without"),
    "no mapping": (["--model", "own_model:stack"], "own_model:stack(): losses() returned no mapping"),
    "sizes": (["--model", "own_model:make", "--width", "4"], "--width is a size of the built-in model"),
    "rule": (["--rules", "PCGrad,Nothing"], "There is no rule 'Nothing'. The rules are "),
    "chain": (["--rules", "Chain"], "There is no rule 'Chain'"),
    "source": (["--sources", "magic"], "There is no source 'magic'. Choose from autograd, batched, split"),
    "groups": (["--groups", "head"], "There is no kind of groups 'head'. Choose from model, layer"),
    "repeats": (["--repeats", "0"], "--repeats must be at least 1. Found 0"),
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_arguments_are_named(what, module, capsys):
    arguments, message = WRONG[what]
    assert quick(*arguments) == 2
    assert message in capsys.readouterr().err


def test_help_explains_the_factory(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["bench", "--help"])
    assert "(model, losses, mixed)" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        main([])


def test_it_runs_as_a_module():
    command = [sys.executable, "-W", "error", "-m", "gradsurgery", "rules", "--no-time"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (run.returncode, run.stderr) == (0, "")
    assert run.stdout == _catalogue.plain(_catalogue.entries()) + "\n"


def test_progress_does_without_tqdm(monkeypatch):
    assert list(progress([1, 2], "label")) == [1, 2]
    monkeypatch.setitem(sys.modules, "tqdm", None)
    assert list(progress([1, 2], "label")) == [1, 2]
