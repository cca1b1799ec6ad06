"""What the integrations have in common: they are imported when asked for, and say what to install."""

import importlib
import subprocess
import sys

import pytest
import torch

from gradsurgery.integrations._common import surgery_in

NEEDS = {
    "accelerate": ["accelerate"],
    "lightning": ["lightning"],
    "transformers": ["transformers", "accelerate"],
}


def test_nothing_is_imported_with_the_library():
    code = "import sys, gradsurgery.integrations; print({'accelerate', 'lightning', 'transformers'} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"


@pytest.mark.parametrize(("loop", "package"), [(loop, package) for loop in NEEDS for package in NEEDS[loop]])
def test_a_package_that_is_not_installed(loop, package, monkeypatch):
    for name in [name for name in sys.modules if name == package or name.startswith(f"{package}.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    for name in NEEDS:
        monkeypatch.delitem(sys.modules, f"gradsurgery.integrations.{name}", raising=False)
    with pytest.raises(ImportError, match=rf"needs .*{package}.* not installed: pip install 'gradsurgery\["):
        importlib.import_module(f"gradsurgery.integrations.{loop}")


def test_no_surgery_optimizer():
    with pytest.raises(TypeError, match="Found list: wrap it"):
        surgery_in([])
    with pytest.raises(TypeError, match="Found SGD: wrap it"):
        surgery_in(torch.optim.SGD([torch.zeros(1)], lr=0.1))
