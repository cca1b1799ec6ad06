"""The site is whole: every page, every public name, every rule with its equations, its picture and when to use it."""

import inspect
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from docutils.utils.math import latex2mathml

import gradsurgery as gs

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
RULES = gs.rules.__all__

sys.path.insert(0, str(DOCS / "_ext"))
import equations  # noqa: E402
import pages  # noqa: E402
import pictures  # noqa: E402


def test_every_rule_is_described():
    assert pages.undescribed() == ""
    assert all(cell.strip() for row in pages.rows().values() for cell in row)


def test_a_rule_that_is_not_described_is_missed(monkeypatch):
    monkeypatch.setattr(gs.rules, "__all__", [*RULES, "NewRule"])
    assert "says nothing of NewRule: add a row" in pages.undescribed()
    monkeypatch.setattr(gs.rules, "__all__", [name for name in RULES if name != "PCGrad"])
    assert "has rows for PCGrad, which are no rules" in pages.undescribed()


@pytest.mark.parametrize("name", RULES)
def test_every_rule_has_a_picture_or_a_reason_for_none(name):
    picture = pictures.shown(name)  # says where to add the settings of a rule that needs some
    if isinstance(picture, pictures.Nothing):
        assert picture.said
    elif isinstance(picture, pictures.Plane):
        for gradients in (picture.scenes or pictures.PAIRS).values():
            found = pictures.scene(picture, gradients)
            assert np.isfinite(found.combined).all()
            if found.mixed is not None:
                np.testing.assert_allclose(found.mixed.sum(0), found.combined, atol=1e-12)
    else:
        compute = pictures.curves if isinstance(picture, pictures.Curves) else pictures.smoothing
        assert all(np.isfinite(series).all() for series in compute(picture))


def test_a_rule_that_cannot_be_shown_says_where_to_say_how(monkeypatch):
    monkeypatch.delitem(pictures.SHOWN, "AGEM")
    with pytest.raises(ValueError, match="add it to SHOWN in docs/_ext/pictures.py"):
        pictures.shown("AGEM")


@pytest.mark.parametrize("name", ["PCGrad", "FAMO", "CRMOGM"])  # one of each kind
def test_pictures_are_drawn_and_are_the_same_each_time(name):
    picture = pictures.one(name)
    assert picture == pictures.one(name)
    assert picture.startswith("<svg")
    assert "currentColor" in picture
    assert pictures.INK not in picture


@pytest.mark.parametrize("name", RULES)
def test_every_rule_has_an_equation_that_can_be_set(name):
    doc = inspect.getdoc(getattr(gs, name))
    literals = [" ".join(text.split()) for text in re.findall(r"``(.+?)``", doc, re.DOTALL)]
    known = {}
    for text in literals:
        try:
            known[text] = equations.tex(text, display=True)
        except equations.NotAnEquation:
            continue
    assert any(re.search(r"[=<|^]", text) for text in known), f"{name}'s docstring needs its equation, in ``…``."
    for paragraph in re.split(r"\n\n", doc.partition("\nArgs:")[0].partition("\nExample:")[0]):
        if paragraph.startswith("``"):  # it stands by itself
            text = " ".join(paragraph[2:].partition("``")[0].split())
            assert text in known, f"{name}: docs/_ext/equations.py cannot read the equation {text!r}."
    for result in known.values():
        assert latex2mathml.tex2mathml(result)


@pytest.mark.parametrize("name", RULES)
def test_every_paper_has_a_link(name):
    doc = inspect.getdoc(getattr(gs, name))
    reference = re.search(r"^Reference:\n((?: .*\n?|\n(?= ))+)", doc, re.MULTILINE)
    if reference:
        assert pages.PAPER.search(reference[1]) or "https://" in reference[1], (
            f"{name}'s Reference needs arXiv:<number>, doi:<name> or an address, which become links."
        )
    else:
        assert name in ("Sum", "Mean", "Chain")


@pytest.mark.parametrize(
    ("text", "tex"),
    [
        ("g'_i = g_i / n", r"g_{i}^{\prime} = \frac{g_{i}}{n}"),
        (
            "a <- a - <a, b> / ||b||^2  b",
            r"a \leftarrow a - \frac{\langle a, b \rangle}{\Vert b \Vert^{2}} \, b",
        ),
        ("r_k = L_k(t) / L_k(0)", r"r_{k} = \frac{L_{k} (t)}{L_{k} (0)}"),
        ("(a + b) / (c d)", r"\frac{a + b}{c \, d}"),
        ("(a / b) / sum_j (c / d)", r"\frac{a / b}{\sum_{j} (c / d)}"),
        ("w <- alpha w + (1 - alpha) w^", r"w \leftarrow \alpha \, w + (1 - \alpha) \, \hat{w}"),
        ("l^-1/2 + U^+ 1", r"l^{-1/2} + U^{+} \, 1"),
        ("w_k = scale E_k[log omega]", r"w_{k} = \text{scale} \, E_{k} [\log \omega]"),
        ("exp(-(1 / T))", r"\exp \left( - \left( \frac{1}{T} \right) \right)"),
        ("argmin ||d||^2", r"\operatorname{argmin} \Vert d \Vert^{2}"),
    ],
)
def test_equations_by_hand(text, tex):
    assert equations.tex(text, display=True) == tex


def test_equations_in_a_line_are_low():
    assert equations.tex("(a + b) / (c d)") == r"(a + b) / (c \, d)"
    assert equations.tex("1/2 a") == r"\frac{1}{2} \, a"


@pytest.mark.parametrize(
    "text", ["[G, K, K]", '"mean"', "gs.Sum()", "max_norm", "update_every > 1", "epoch=1", "a +", "(a", "<a, b", ""]
)
def test_what_is_no_equation(text):
    with pytest.raises(equations.NotAnEquation):
        equations.tex(text)


def test_every_page_is_in_the_contents():
    index = (DOCS / "index.md").read_text()
    blocks = re.findall(r"^```\{toctree\}\n(.*?)^```", index, re.MULTILINE | re.DOTALL)
    listed = {word.strip("<>") for block in blocks for word in block.split()}
    written = {path.stem for path in DOCS.glob("*.md") if path.name not in ("index.md", "changes.md")}
    assert written - listed == set(), "add the page to a toctree of docs/index.md"


def test_everything_public_has_one_place():
    documented = re.findall(
        r"^\.\. (?:auto\w+|py:data):: ([\w.]+)", "\n".join(text for _, text in pages.pages(pictured=False)), re.M
    )
    assert sorted(documented) == sorted([*pages.public(), *pages.modules()])
    # public() and modules() are what test_public_interface.py takes for public.
    names = {f"{path}.{name}" for path, module in pages.modules().items() for name in module.__all__}
    assert {f"gradsurgery.{name}" for name in gs.__all__} | names == {*pages.public(), *pages.modules()} - {
        f"gradsurgery.integrations.{loop}" for loop in pages.LOOPS
    }


def test_it_builds_without_a_warning(tmp_path):
    """All of it but the pictures, which take longest: every link leads somewhere, every equation is TeX."""
    shutil.copytree(DOCS, tmp_path / "docs", ignore=shutil.ignore_patterns("__pycache__"))
    for path in [ROOT / "CHANGELOG.md", *ROOT.glob("examples/*/README.md")]:
        target = tmp_path / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    built = subprocess.run(
        [sys.executable, "-m", "sphinx", "-E", "-W", "--keep-going", "-q", "-D", "site_pictures=0", "docs", "html"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0, built.stderr
    page = (tmp_path / "html/rules/PCGrad.html").read_text()
    assert "<mfrac>" in page
    assert 'href="https://arxiv.org/abs/2001.06782"' in page
    assert 'id="gradsurgery.PCGrad"' in page
    assert "changes least and is the cheapest" in (tmp_path / "html/choosing.html").read_text()
    assert 'href="rules/PCGrad.html#gradsurgery.PCGrad"' in (tmp_path / "html/choosing.html").read_text()
