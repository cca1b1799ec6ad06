"""Surgery groups: every parameter is in exactly one, whatever the model looks like."""

import pytest
import torch
from conftest import Bent, Heads, check_gradients, combined, task_gradients, wrap
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import gradsurgery as gs


def groups_of(model, spec):
    return dict(wrap(model, gs.PCGrad(), groups=spec).groups)


class Encoder(nn.Module):
    """Blocks inside blocks, a parameter that a non-leaf module holds, and one that the root holds."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))
        self.embed = nn.Linear(4, 4)
        self.stack = nn.Module()
        self.stack.position = nn.Parameter(torch.zeros(4))
        self.stack.blocks = nn.ModuleList([nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)) for _ in range(2)])


# --- By name ----------------------------------------------------------------------------------------------------------


def test_model():
    model = Encoder()
    assert groups_of(model, "model") == {"model": tuple(name for name, _ in model.named_parameters())}


def test_layer():
    assert groups_of(Encoder(), "layer") == {
        "(root)": ("scale",),
        "embed": ("embed.weight", "embed.bias"),
        "stack": ("stack.position",),
        "stack.blocks.0": tuple(f"stack.blocks.0.{i}.{part}" for i in (0, 1) for part in ("weight", "bias")),
        "stack.blocks.1": tuple(f"stack.blocks.1.{i}.{part}" for i in (0, 1) for part in ("weight", "bias")),
    }


def test_module():
    assert groups_of(Encoder(), "module") == {
        "(root)": ("scale",),
        "embed": ("embed.weight", "embed.bias"),
        "stack": ("stack.position",),
        **{
            f"stack.blocks.{b}.{i}": (f"stack.blocks.{b}.{i}.weight", f"stack.blocks.{b}.{i}.bias")
            for b in (0, 1)
            for i in (0, 1)
        },
    }


def test_tensor():
    model = Encoder()
    assert groups_of(model, "tensor") == {name: (name,) for name, _ in model.named_parameters()}


def test_a_model_that_is_a_sequential():
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))
    assert list(groups_of(model, "layer")) == ["0", "1"]


def test_a_list_that_holds_parameters_of_its_own():
    class Gated(nn.ModuleList):
        def __init__(self):
            super().__init__([nn.Linear(2, 2)])
            self.gate = nn.Parameter(torch.ones(2))

    model = nn.Module()
    model.gated = Gated()
    assert groups_of(model, "layer") == {"gated": ("gated.gate",), "gated.0": ("gated.0.weight", "gated.0.bias")}


def test_a_parameter_list_and_a_module_dict_are_no_blocks():
    model = nn.Module()
    model.vectors = nn.ParameterList([torch.ones(2), torch.ones(2)])
    model.parts = nn.ModuleDict({"left": nn.Linear(2, 2), "right": nn.Linear(2, 2)})
    groups = groups_of(model, "layer")
    assert set(groups) == {"parts", "vectors"}
    assert len(groups["parts"]) == 4


def test_parametrized_modules():
    model = nn.Module()
    model.normed = parametrizations.weight_norm(nn.Linear(3, 3))
    model.blocks = nn.ModuleList([parametrizations.weight_norm(nn.Linear(3, 3)), nn.Linear(3, 3)])
    original = ("parametrizations.weight.original0", "parametrizations.weight.original1")
    assert groups_of(model, "layer") == {
        "normed": ("normed.bias", *(f"normed.{name}" for name in original)),
        "blocks.0": ("blocks.0.bias", *(f"blocks.0.{name}" for name in original)),
        "blocks.1": ("blocks.1.weight", "blocks.1.bias"),
    }
    assert groups_of(model, "module") == groups_of(model, "layer")  # a weight stays with its bias
    root = parametrizations.weight_norm(nn.Linear(3, 3))
    assert groups_of(root, "layer") == groups_of(root, "module") == {"(root)": ("bias", *original)}


class Gain(nn.Module):
    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(()))

    def forward(self, weight):
        return self.gain * weight


def test_a_parametrization_with_parameters_of_its_own():
    model = nn.Module()
    model.linear = nn.Linear(3, 3, bias=False)
    parametrize.register_parametrization(model.linear, "weight", Gain())
    names = ("linear.parametrizations.weight.original", "linear.parametrizations.weight.0.gain")
    assert groups_of(model, "layer") == groups_of(model, "module") == {"linear": names}


def test_a_module_that_is_merely_called_parametrizations():
    model = nn.Module()
    model.parametrizations = nn.ModuleDict({"weight": nn.Linear(3, 3)})
    names = ("parametrizations.weight.weight", "parametrizations.weight.bias")
    model.x = nn.Linear(1, 1)
    assert groups_of(model, "module") == {
        "parametrizations.weight": names,
        "x": ("x.weight", "x.bias"),
    }


def test_transformer():
    model = nn.Transformer(4, 2, num_encoder_layers=2, num_decoder_layers=2, dim_feedforward=8, batch_first=True)
    assert list(groups_of(model, "layer")) == [
        *("encoder.layers.0", "encoder.layers.1", "encoder"),
        *("decoder.layers.0", "decoder.layers.1", "decoder"),
    ]
    by_module = groups_of(model, "module")
    # held by a module that has children, which a loop over leaf modules would miss
    assert by_module["encoder.layers.0.self_attn"] == tuple(
        f"encoder.layers.0.self_attn.{name}" for name in ("in_proj_weight", "in_proj_bias")
    )


def test_a_compiled_model_has_the_same_names():
    model = Encoder()
    plain = wrap(model, gs.PCGrad(), groups="layer").groups
    compiled = torch.compile(model, backend="eager")
    assert next(compiled.named_parameters())[0].startswith("_orig_mod.")
    assert wrap(compiled, gs.PCGrad(), groups="layer").groups == plain
    assert wrap(nn.DataParallel(compiled), gs.PCGrad(), groups="layer").groups == plain


# --- By pattern and by function ---------------------------------------------------------------------------------------


def test_patterns():
    groups = groups_of(Heads(), {"bottom": ["trunk.0.*"], "weights": ["*.weight"], "c": ["heads.c.bias"]})
    assert groups == {
        "bottom": ("trunk.0.weight", "trunk.0.bias"),  # the first group that matches
        "weights": ("trunk.2.weight", "adapter.weight", *(f"heads.{task}.weight" for task in "abc")),
        "(rest)": ("trunk.2.bias", "adapter.bias", "heads.a.bias", "heads.b.bias"),
        "c": ("heads.c.bias",),
    }


def test_function():
    seen = {}

    def by_dimension(name, parameter):
        seen[name] = parameter
        return f"{parameter.dim()}-D"

    model = Heads()
    groups = groups_of(model, by_dimension)
    assert seen == dict(model.named_parameters())
    assert set(groups) == {"1-D", "2-D"}
    assert all(name.endswith("bias") for name in groups["1-D"])


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        ("layers", ValueError, r"Unknown `groups`: 'layers'. Use 'model', 'layer', 'module' or 'tensor'"),
        (3, TypeError, r"`groups` must be a string, a mapping or a function. Found 3"),
        ({"all": "trunk.*"}, TypeError, r"`groups\['all'\]` must be a list of patterns. Found 'trunk.\*'; write \['trunk"),
        ({"x": ["nowhere.*"]}, ValueError, r"`groups\['x'\]`: no parameter matches 'nowhere.\*'. The parameters are trunk"),
        (lambda name, p: p.dim(), TypeError, r"must return a name. For 'trunk.0.weight' it returned 2"),
    ],
)
def test_bad_groups(spec, error, message):
    with pytest.raises(error, match=message):
        wrap(Heads(), gs.PCGrad(), groups=spec)


@pytest.mark.parametrize("spec", ["layer", "module"])
def test_groups_that_follow_modules_need_a_model(spec):
    with pytest.raises(ValueError, match=f"groups='{spec}' follows the modules of the model: pass `model=` too"):
        gs.SurgeryOptimizer(torch.optim.SGD(Heads().parameters(), lr=0.1), gs.PCGrad(), groups=spec)


# --- Without a model --------------------------------------------------------------------------------------------------


def test_names_without_a_model():
    model = nn.Linear(2, 3)
    numbered = gs.SurgeryOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), gs.PCGrad(), groups="tensor")
    assert list(numbered.groups) == ["param0", "param1"]
    named = gs.SurgeryOptimizer(torch.optim.SGD(model.named_parameters(), lr=0.1), gs.PCGrad(), groups="tensor")
    assert list(named.groups) == ["weight", "bias"]
    two = [{"params": [model.weight]}, {"params": [model.bias]}]
    grouped = gs.SurgeryOptimizer(torch.optim.SGD(two, lr=0.1), gs.PCGrad(), groups="tensor")
    assert list(grouped.groups) == ["param0", "param1"]


def test_two_parameters_of_one_name():
    layers = nn.Linear(2, 2), nn.Linear(2, 2)
    inner = torch.optim.SGD([{"params": list(layer.named_parameters())} for layer in layers], lr=0.1)
    with pytest.raises(ValueError, match="several parameters of the same name: bias, weight. Pass the module"):
        gs.SurgeryOptimizer(inner, gs.PCGrad())
    assert len(wrap(nn.ModuleList(layers), gs.PCGrad(), inner).groups["model"]) == 4


# --- The table --------------------------------------------------------------------------------------------------------


def test_it_prints_as_a_table():
    groups = wrap(Encoder(), gs.PCGrad(), groups={"blocks": ["stack.blocks.*"], "in": ["embed.*"]}).groups
    assert repr(groups).splitlines() == [
        "group   tensors  parameters",
        "(rest)        2           8  scale, stack.position",
        "in            2          20  embed.weight, embed.bias",
        "blocks        8          80  stack.blocks.0.0.weight, stack.blocks.0.0.bias, …",
    ]
    large = nn.Linear(1000, 1000)
    assert "1,001,000  weight, bias" in repr(wrap(large, gs.PCGrad()).groups)


# --- Laws -------------------------------------------------------------------------------------------------------------

leaf = st.sampled_from(["linear", "norm", "vector", "normed"])
tree = st.recursive(
    leaf, lambda children: st.tuples(st.sampled_from(["sequential", "list", "dict", "own"]), st.lists(children, min_size=1))
)


def built(plan):
    if isinstance(plan, tuple):
        kind, children = plan
        modules = [built(child) for child in children]
        if kind == "sequential":
            return nn.Sequential(*modules)
        if kind == "list":
            return nn.ModuleList(modules)
        if kind == "dict":
            return nn.ModuleDict({f"m{i}": module for i, module in enumerate(modules)})
        module = nn.Module()
        module.own = nn.Parameter(torch.zeros(2))
        for i, child in enumerate(modules):
            module.add_module(f"child{i}", child)
        return module
    if plan == "vector":
        module = nn.Module()
        module.vector = nn.Parameter(torch.zeros(2))
        return module
    return {
        "linear": lambda: nn.Linear(1, 1),
        "norm": lambda: nn.LayerNorm(1),
        "normed": lambda: parametrizations.weight_norm(nn.Linear(1, 1)),
    }[plan]()


@settings(max_examples=40, deadline=None)
@given(plan=tree, spec=st.sampled_from(["model", "layer", "module", "tensor"]))
def test_every_parameter_is_in_exactly_one_group(plan, spec):
    model = built(plan)
    names = [name for name, _ in model.named_parameters()]
    groups = groups_of(model, spec)
    assert sorted(name for members in groups.values() for name in members) == sorted(names)
    assert all(groups.values())


@pytest.mark.parametrize("spec", ["model", "layer", "module", "tensor", {"low": ["*.0.*"]}])
@pytest.mark.parametrize("model_class", [Heads, Bent])
def test_each_group_is_operated_on_by_itself(spec, model_class):
    model = model_class()
    opt = wrap(model, gs.MGDA(), groups=spec)
    group_of = {name: group for group, names in opt.groups.items() for name in names}
    x = torch.randn(8, 4)
    expected = combined(task_gradients(model.losses(x), dict(model.named_parameters())), group_of.get, gs.MGDA())
    opt.backward(model.losses(x))
    opt.combine()
    check_gradients(model, expected, rtol=1e-4, atol=1e-6)
