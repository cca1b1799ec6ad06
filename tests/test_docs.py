"""The code in the README and the guide runs, and the index of the public interface is complete."""

import importlib
import re
from pathlib import Path

import pytest
import torch

import gradsurgery as gs

ROOT = Path(__file__).parent.parent


def blocks(page):
    text = (ROOT / page).read_text()
    return re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


PAGES = ["README.md", "docs/index.md", "docs/choosing.md", "docs/guide.md", "docs/migration.md", "docs/transfer.md"]
LOOPS = ["docs/pytorch.md", "docs/lightning.md", "docs/accelerate.md", "docs/huggingface.md"]


@pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers")  # Lightning's advice,
@pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning")  # and its own call
@pytest.mark.parametrize("page", [*PAGES, *LOOPS])
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


@pytest.mark.parametrize("page", LOOPS)
def test_at_most_five_lines_are_new(page):
    numbers = re.findall(r"^.*\S +# (\d)\b.*$", "\n".join(blocks(page)), re.MULTILINE)
    assert list(map(int, numbers)) == list(range(1, len(numbers) + 1))
    assert 2 <= len(numbers) <= 5


def test_index_names_everything_public():
    index = (ROOT / "docs/api.md").read_text()
    named = set(re.findall(r"`(\w+)`", "\n".join(line.split("|")[1] for line in index.splitlines() if "|" in line)))
    assert named - {"integrations"} == set(gs.__all__)  # which is not imported with the library
    for module in (gs.plots, gs.sources, gs.testing, gs.testing.oracles, gs.testing.strategies):
        for name in module.__all__:
            assert f"`{name}`" in index, name
    for loop in ("accelerate", "lightning", "transformers"):
        for name in importlib.import_module(f"gradsurgery.integrations.{loop}").__all__:
            assert f"`integrations.{loop}.{name}`" in index, name


def test_links_lead_somewhere():
    ignored = (ROOT / ".gitignore").read_text().split()
    built = [ROOT / place.strip("/") for place in ignored if place.startswith("/docs/")]  # with the site, and checked there
    for page in [ROOT / "README.md", *ROOT.glob("docs/*.md")]:
        prose = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
        for target in re.findall(r"\]\(([^)#]+)\)", prose):
            if "://" not in target:
                path = page.parent / target
                assert path.exists() or any(path.is_relative_to(place) for place in built), f"{page.name}: {target}"
