"""The site's Sphinx extension: what makes the pages that nobody writes by hand, and equations, links and pictures.

* a page for each rule, from its docstring, its row in ``choosing.md`` and its picture; and a gallery of them;
* a page for each other public name, from ``__all__``; a name that has no place on the site is a warning;
* equations in the docstrings of rules, as MathML that browsers draw by themselves: no script, nothing to download;
* names of the public interface in the prose of any page, as links.
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pictures
from docutils import nodes
from docutils.parsers.rst import Directive
from docutils.utils.math import latex2mathml
from equations import NotAnEquation, tex
from sphinx.addnodes import desc, desc_content, desc_signature, pending_xref
from sphinx.application import Sphinx
from sphinx.util import logging

import gradsurgery as gs
from gradsurgery import _catalogue

log = logging.getLogger(__name__)
DOCS = Path(__file__).parent.parent
LOOPS = ("lightning", "accelerate", "transformers")
CHOOSING = "choosing.md"
PAPERS = {"arXiv": "https://arxiv.org/abs/", "doi": "https://doi.org/"}
PAPER = re.compile(r"(arXiv:\d{4}\.\d{4,5}|doi:10\.[^\s,;)]+[^\s,;).])")

# --- What is public ---------------------------------------------------------------------------------------------------


def modules() -> dict[str, ModuleType]:
    """Path → public module that has a page of its own."""
    found = {f"gradsurgery.{name}": getattr(gs, name) for name in gs.__all__ if inspect.ismodule(getattr(gs, name))}
    for path, module in list(found.items()):
        found |= {f"{path}.{n}": getattr(module, n) for n in module.__all__ if inspect.ismodule(getattr(module, n))}
    return found | {f"gradsurgery.integrations.{loop}": _loop(loop) for loop in LOOPS}


def _loop(name: str) -> ModuleType:
    return importlib.import_module(f"gradsurgery.integrations.{name}")


def public() -> dict[str, Any]:
    """Path → everything public that is no module."""
    found = {f"gradsurgery.{name}": getattr(gs, name) for name in gs.__all__}
    for path, module in modules().items():
        found |= {f"{path}.{name}": getattr(module, name) for name in module.__all__}
    return {path: value for path, value in found.items() if not inspect.ismodule(value)}


def rows() -> dict[str, tuple[str, str, str]]:
    """Rule → when to use it, when not, and what it needs: the rows of ``choosing.md``."""
    page = (DOCS / CHOOSING).read_text(encoding="utf-8")
    found = re.findall(r"^\| `(\w+)` \| (.+?) \| (.+?) \| (.+?) \|$", page, re.MULTILINE)
    return {name: (use, avoid, needs) for name, use, avoid, needs in found}


# --- Pages ------------------------------------------------------------------------------------------------------------


def pages(*, pictured: bool = True) -> Iterator[tuple[str, str]]:
    """The generated pages: path in ``docs/`` and content."""
    described, entries = rows(), {entry.name: entry for entry in _catalogue.entries()}
    for name in gs.rules.__all__:
        yield f"rules/{name}.md", _rule_page(name, entries.get(name), described.get(name), pictured)
    yield "rules/index.md", _gallery(pictured)
    index = (DOCS / "api.md").read_text(encoding="utf-8")  # whose order is that of importance
    own = [name for name in gs.__all__ if name not in gs.rules.__all__ and f"gradsurgery.{name}" not in modules()]
    own.sort(key=lambda name: index.find(f"`{name}`"))
    for name in own:
        yield f"reference/{name}.md", f"# {name}\n\n" + _autodoc(f"gradsurgery.{name}")
    for path, module in modules().items():
        inside = [f"{path}.{name}" for name in module.__all__ if not inspect.ismodule(getattr(module, name))]
        head = f"# {path.removeprefix('gradsurgery.')}\n\n" + _rst(f".. automodule:: {path}\n   :no-members:")
        yield f"reference/{path.removeprefix('gradsurgery.')}.md", head + "".join(map(_autodoc, inside))
    listed = [*own, *(path.removeprefix("gradsurgery.") for path in modules())]
    yield "reference/index.md", "# Reference\n\n```{toctree}\n:maxdepth: 1\n\n" + "\n".join(listed) + "\n```\n"
    for readme in DOCS.parent.glob("examples/*/README.md"):
        yield f"examples/{readme.parent.name}.md", readme.read_text(encoding="utf-8")
    changes = (DOCS.parent / "CHANGELOG.md").read_text(encoding="utf-8")
    yield "changes.md", changes


def _rule_page(name: str, entry: _catalogue.Entry | None, row: tuple[str, str, str] | None, pictured: bool) -> str:
    parts = [f"# {name}\n"]
    if pictured and (picture := pictures.one(name)) is not None:
        parts.append(_raw(picture))
    parts.append(f"*{_caption(pictures.shown(name))}*\n" if _caption(pictures.shown(name)) else "")
    if row is not None:
        cells = [("Use it", row[0]), ("Think twice", row[1]), ("Needs", row[2])]
        if entry is not None:
            cells.append(("Sees", entry.sees or "nothing: gradients stay as they are"))
            cells.append(("Claims", _claims(entry)))
        parts.append("| | |\n|---|---|\n" + "".join(f"| **{what}** | {text} |\n" for what, text in cells if text))
    parts.append(_autodoc(f"gradsurgery.{name}", members=False))
    return "\n".join(parts)


def _caption(picture: pictures.Picture) -> str:
    if isinstance(picture, pictures.Nothing):
        return picture.said
    said = {
        pictures.Plane: "Wide arrows are the tasks' gradients, thin ones what became of them, green is what is stepped on. "
        "Shaded: directions that conflict with no task.",
        pictures.Curves: "Made-up losses, and the weights that the rule gave them.",
        pictures.Smoothing: "",
    }[type(picture)]
    if isinstance(picture, pictures.Plane) and picture.scenes:
        said = said.partition(" Shaded")[0]
    return f"{said} {picture.said}".strip()


def _claims(entry: _catalogue.Entry) -> str:
    found = ["remembers something (its state is in checkpoints)"] * entry.state
    for flag, value in entry.flags.items():
        if value is None:
            found.append(f"{flag.replace('_', '-')}: depends on its settings")
        elif value != getattr(gs.Rule, flag):
            found.append(("" if value else "not ") + flag.replace("_", "-"))
    return "; ".join(found)


def _gallery(pictured: bool) -> str:
    cards, others = [], []
    for name in sorted(gs.rules.__all__, key=str.lower):
        if isinstance(pictures.shown(name), pictures.Plane):
            svg = pictures.one(name, small=True) if pictured else ""
            cards.append(f'<a class="card" href="{name}.html"><span>{name}</span>{svg}</a>')
        else:
            others.append(f"[{name}]({name}.md)")
    listed = "\n".join(sorted(gs.rules.__all__, key=str.lower))
    return (
        "# All rules in pictures\n\nWhat they make of the same two gradients, which are in conflict: wide arrows are the "
        "gradients, thin ones what became of them, green is what is stepped on; the dotted arrow is the plain sum. Shaded "
        "are the directions that conflict with neither. What is particular to a picture is on the rule's page.\n\n"
        + _raw('<div class="gallery">' + "".join(cards) + "</div>")
        + f"\nRules that weigh losses, or look back in time: {', '.join(others)}.\n"
        + f"\n```{{toctree}}\n:hidden:\n\n{listed}\n```\n"
    )


class Hero(Directive):
    """The picture of the front page."""

    def run(self) -> list[nodes.Node]:
        """Draws it."""
        rules = {"Sum": gs.Sum(), "PCGrad": gs.PCGrad(), "MGDA": gs.MGDA()}
        return [nodes.raw("", pictures.side_by_side(rules), format="html")]


def _autodoc(path: str, *, members: bool = True) -> str:
    value = public()[path]
    if path == "gradsurgery.State":  # a type alias, whose docstring follows it in the source
        source = inspect.getsource(importlib.import_module("gradsurgery._rule"))
        text = re.search(r'^State: TypeAlias = (.+)\n"""(.+?)"""', source, re.MULTILINE | re.DOTALL)
        assert text is not None
        said = " ".join(text[2].split())
        return _rst(f".. py:data:: gradsurgery.State\n   :value: {text[1]}\n\n   {said}")
    if not inspect.isclass(value):
        return _rst(f".. autofunction:: {path}")
    return _rst(f".. autoclass:: {path}" + "\n   :members:" * members)


def _rst(text: str) -> str:
    return f"```{{eval-rst}}\n{text}\n```\n\n"


def _raw(html: str) -> str:
    return f"```{{raw}} html\n{html}\n```\n"


def write(app: Sphinx) -> None:
    """Writes the generated pages, those that changed."""
    wanted = dict(pages(pictured=app.config.site_pictures in (True, "1")))
    for path, text in wanted.items():
        target = DOCS / path
        target.parent.mkdir(exist_ok=True)
        if not target.exists() or target.read_text(encoding="utf-8") != text:
            target.write_text(text, encoding="utf-8")
    for folder in ("rules", "reference", "examples"):
        for left in (DOCS / folder).glob("*.md"):
            if f"{folder}/{left.name}" not in wanted:
                left.unlink()


# --- Equations and links ----------------------------------------------------------------------------------------------


def names(page: str = "") -> dict[str, str]:
    """What prose calls public names → their paths: ``PCGrad``, ``gs.PCGrad``, ``opt.split``; in the index, all of them."""
    paths = [*public(), *modules()]
    found = {path.rpartition(".")[2]: path for path in paths} if page == "api" else {}
    for path in paths:
        short = path.removeprefix("gradsurgery.")
        found |= {short: path, f"gs.{short}": path, path: path}
        if short.startswith("testing.check"):
            found[short.partition(".")[2]] = path
    for member in vars(gs.SurgeryOptimizer):
        if not member.startswith("_"):
            found |= {f"opt.{member}": f"gradsurgery.SurgeryOptimizer.{member}"}
    return found


def outside(app: Sphinx, page: str, source: list[str]) -> None:
    """Links to examples, which lie outside of ``docs/``, lead to their pages here."""
    source[0] = re.sub(r"\]\(\.\./examples/(\w+)/README\.md\)", r"](/examples/\1.md)", source[0])


def enrich(app: Sphinx, document: nodes.document) -> None:
    """Turns literals into equations, in the docstrings of rules, and into links, in pages written by hand."""
    page = app.env.docname
    for described in document.findall(desc):
        path = next((str(sign.get("fullname", "")) for sign in described.findall(desc_signature)), "")
        if path in gs.rules.__all__:
            _equations(described, path)
    if page == "rules":
        _equations(document, "")
    _papers(document)
    known, own = names(page), f"gradsurgery.{page.partition('/')[2]}"
    prose = [literal for literal in document.findall(nodes.literal) if not _inside(literal, desc)]
    for literal in prose:
        target = known.get(literal.astext())
        if target and target != own and not _inside(literal, nodes.title, nodes.reference, pending_xref):
            link = pending_xref(
                "", refdomain="py", reftype="obj", reftarget=target, refdoc=page, refexplicit=True, refwarn=True
            )
            link += literal.deepcopy()
            literal.replace_self(link)


def _inside(node: nodes.Node, *kinds: type[nodes.Node]) -> bool:
    while (node := node.parent) is not None:
        if isinstance(node, kinds):
            return True
    return False


def _papers(document: nodes.document) -> None:
    """``arXiv:2001.06782`` and ``doi:10.1016/…`` become links."""
    for text in list(document.findall(nodes.Text)):
        parts = PAPER.split(text.astext())
        if len(parts) > 1 and not _inside(text, nodes.reference, nodes.literal, nodes.literal_block):
            new: list[nodes.Node] = []
            for i, part in enumerate(parts):
                kind, _, number = part.partition(":")
                new.append(nodes.reference("", part, refuri=PAPERS[kind] + number) if i % 2 else nodes.Text(part))
            text.parent.replace(text, [node for node in new if node.astext()])


def _equations(root: nodes.Element, rule: str) -> None:
    settings = set(inspect.signature(getattr(gs, rule)).parameters) if rule else set()
    for literal in list(root.findall(nodes.literal)):
        text = " ".join(literal.astext().split())
        paragraph = literal.parent
        # An equation that a paragraph of its own begins with.
        display = isinstance(paragraph, nodes.paragraph) and paragraph.index(literal) == 0
        display = display and isinstance(paragraph.parent, desc_content) and bool(re.search(r"[=<|^]", text))
        if text in settings or isinstance(paragraph, (nodes.title, nodes.reference, pending_xref)):
            continue
        if display:
            paragraph["classes"].append("equation")
        try:
            equation = tex(text, display="equation" in paragraph.get("classes", []))
        except NotAnEquation as error:
            if display:
                log.warning("%s: an equation that docs/_ext/equations.py cannot read: %s", rule, error)
            continue
        literal.replace_self(nodes.math(text, equation))


def visit_math(translator: Any, node: nodes.Element) -> None:
    """An equation as MathML."""
    block = isinstance(node, nodes.math_block)
    source = node.astext()
    big = not block and "equation" in node.parent.get("classes", [])
    try:
        text = latex2mathml.tex2mathml((r"\displaystyle " if big else "") + source, as_block=block)
    except Exception as error:
        log.warning("An equation that is no TeX: %s (%s)", source, error, location=node)
        text = ""
    translator.body.append(text)
    raise nodes.SkipNode


def resolve(app: Sphinx, env: Any, node: pending_xref, content: nodes.TextElement) -> nodes.reference | None:
    """Docstrings name public things as their own module knows them; the site knows them by their public path."""
    target = node.get("reftarget", "")
    python = env.get_domain("py")
    for path in (f"gradsurgery.{target}", names().get(target.partition("(")[0], "")):
        if path in python.objects:
            return python.resolve_xref(env, node["refdoc"], app.builder, "obj", path, node, content)
    return None


def complete(app: Sphinx, env: Any) -> None:
    """Warns of public names that the site leaves out, and of rules that nobody described."""
    known = set(env.get_domain("py").objects)
    for path in (*public(), *modules()):
        if path not in known:
            log.warning("%s is public, and the site does not have it.", path)
    if problem := undescribed():
        log.warning(problem)


def undescribed() -> str:
    """What is wrong with the table of ``choosing.md``; empty if nothing is."""
    found, wanted = set(rows()), set(gs.rules.__all__)
    says = []
    if wanted - found:
        says.append(
            f"docs/{CHOOSING} says nothing of {', '.join(sorted(wanted - found))}: add a row "
            "`| `Name` | use it … | think twice … | needs … |` to the table where it belongs."
        )
    if found - wanted:
        says.append(f"docs/{CHOOSING} has rows for {', '.join(sorted(found - wanted))}, which are no rules.")
    return " ".join(says)


def setup(app: Sphinx) -> dict[str, bool]:
    """Called by Sphinx."""
    app.add_html_math_renderer("mathml", (visit_math, None), (visit_math, None))
    app.add_config_value("site_pictures", True, "env", [bool, str])
    app.add_directive("hero", Hero)
    app.connect("builder-inited", write)
    app.connect("source-read", outside)
    app.connect("doctree-read", enrich)
    app.connect("missing-reference", resolve)
    app.connect("env-check-consistency", complete)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
