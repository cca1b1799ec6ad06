"""Every public name resolves, is documented, and has one path."""

import importlib
import inspect
import pkgutil
from typing import Any

import pytest

import gradsurgery as gs

LOOPS = ("accelerate", "lightning", "transformers")

MODULES = {
    name: importlib.import_module(name)
    for name in ["gradsurgery", *(info.name for info in pkgutil.walk_packages(gs.__path__, "gradsurgery."))]
    if "._" not in name
}
NAMES = [(module, name) for module in MODULES.values() for name in module.__all__]
CLASSES = {value for module, name in NAMES if inspect.isclass(value := getattr(module, name))}


NAMES_OF_MODULES = (
    *("", ".plots", ".rules", ".sources", ".testing", ".testing.oracles", ".testing.strategies"),
    *(".integrations", *(f".integrations.{name}" for name in LOOPS)),
)


def test_public_modules():
    assert set(MODULES) == {f"gradsurgery{name}" for name in NAMES_OF_MODULES}
    assert all(module.__doc__ for module in MODULES.values())


@pytest.mark.parametrize("module", MODULES.values(), ids=lambda module: module.__name__)
def test_all_is_sorted_and_complete(module):
    # as ruff sorts it: constants, classes, then the rest
    key = lambda name: (0 if name.isupper() else 1 if name[0].isupper() else 2, name)  # noqa: E731
    assert module.__all__ == sorted(set(module.__all__), key=key)
    package = hasattr(module, "__path__")
    found = set()
    for name, value in vars(module).items():
        origin = value.__name__ if inspect.ismodule(value) else getattr(value, "__module__", "")
        # A package exports what it imports; a module, what it defines.
        if not name.startswith("_") and (origin.startswith("gradsurgery") if package else origin == module.__name__):
            found.add(name)
    # Rules are imported from the package itself; the module that gathers them is not advertised.
    assert found - {"rules", "integrations", *LOOPS} <= set(module.__all__)


@pytest.mark.parametrize(("module", "name"), NAMES, ids=[f"{module.__name__}.{name}" for module, name in NAMES])
def test_every_name_resolves_and_is_documented(module, name):
    value = getattr(module, name)
    if name == "State":  # a type alias, whose docstring follows it in the source; Python 3.10 takes it for a class
        assert value == dict[str, Any]
    elif inspect.ismodule(value):
        assert value.__doc__
    elif inspect.isclass(value) or inspect.isfunction(value):
        assert value.__module__.startswith("gradsurgery")
        assert value.__doc__
        assert not value.__doc__.startswith(f"{name}(")  # what a dataclass writes by itself
    else:
        pytest.fail(f"{name} is neither a class nor a function")


def test_every_name_has_one_public_path():
    paths = {}
    for module, name in NAMES:
        value = getattr(module, name)
        if not inspect.ismodule(value) and module is not MODULES["gradsurgery.rules"]:
            paths.setdefault(id(value), []).append(f"{module.__name__}.{name}")
    assert [path for path in paths.values() if len(path) > 1] == []
    # Rules are imported from the package itself; the module that gathers them is not advertised.
    assert "rules" not in gs.__all__
    assert all(
        getattr(gs, name) is getattr(MODULES["gradsurgery.rules"], name) for name in MODULES["gradsurgery.rules"].__all__
    )


MEMBERS = [
    (cls, name)
    for cls in sorted(CLASSES, key=lambda cls: cls.__name__)
    for name, value in vars(cls).items()
    if not name.startswith("_") and (inspect.isfunction(value) or isinstance(value, (property, classmethod, staticmethod)))
]


@pytest.mark.parametrize(("cls", "name"), MEMBERS, ids=[f"{cls.__name__}.{name}" for cls, name in MEMBERS])
def test_every_method_is_documented(cls, name):
    assert inspect.getdoc(getattr(cls, name))  # its own, or that of the base class whose promise it keeps


def test_rules_are_values():
    assert gs.GradVac(beta=0.5) == gs.GradVac(beta=0.5) != gs.GradVac()
    assert hash(gs.PCGrad()) == hash(gs.PCGrad())
    assert all(issubclass(getattr(gs, name), (gs.Rule, gs.CoordinateRule)) for name in MODULES["gradsurgery.rules"].__all__)


def test_version():
    assert gs.__version__.count(".") == 2
