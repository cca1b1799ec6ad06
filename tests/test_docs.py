"""The code in the README and the guide runs, and the index of the public interface is complete."""

import re
from pathlib import Path

import pytest
import torch

import gradsurgery as gs

ROOT = Path(__file__).parent.parent


def blocks(page):
    text = (ROOT / page).read_text()
    return re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", ["README.md", "docs/guide.md"])
def test_code_runs_from_top_to_bottom(page, tmp_path, monkeypatch):
    import matplotlib

    matplotlib.use("Agg")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    code = blocks(page)
    assert code
    namespace = {}
    for block in code:
        exec(compile(block, page, "exec"), namespace)


def test_index_names_everything_public():
    index = (ROOT / "docs/api.md").read_text()
    named = set(re.findall(r"`(\w+)`", "\n".join(line.split("|")[1] for line in index.splitlines() if "|" in line)))
    assert named == set(gs.__all__)
    for module in (gs.plots, gs.sources, gs.testing, gs.testing.oracles, gs.testing.strategies):
        for name in module.__all__:
            assert f"`{name}`" in index, name


def test_links_lead_somewhere():
    for page in [ROOT / "README.md", *ROOT.glob("docs/*.md")]:
        prose = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
        for target in re.findall(r"\]\(([^)#]+)\)", prose):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name}: {target}"
