"""Trees of tensors: what is kept of a rule's state, and what is not."""

import pytest
import torch

from gradsurgery._state import carried, guarded, loaded, zip_states


def tensor(*values):
    return torch.tensor(values, dtype=torch.float64)


def same(found, expected):
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        if isinstance(value, dict):
            same(found[key], value)
        elif isinstance(value, torch.Tensor):
            assert torch.equal(found[key], value), key
        else:
            assert found[key] == value, key


@pytest.mark.parametrize("finite", [(True, True), (True, False), (False, False)])
def test_a_step_that_is_not_finite_leaves_the_state_as_it_was(finite):
    old = {"mean": tensor(1, 2), "inner": {"count": tensor(3)}}
    new = {"mean": tensor(5, 6), "inner": {"count": tensor(4)}}
    same(guarded([torch.tensor(value) for value in finite], old=old, new=new), new if all(finite) else old)


def test_what_cannot_be_compared_is_the_new():
    old = {"grown": tensor(1), "number": 1, "was": 2, "shared": tensor(7)}
    new = {"grown": tensor(1, 2), "number": 3, "was": tensor(4), "shared": old["shared"], "only": tensor(8)}
    same(guarded([torch.tensor(False)], old=old, new=new), new)
    assert guarded([], old=old, new=old) is old


def test_leaves_of_two_trees():
    old, new = {"a": 1, "b": {"c": 2}, "gone": 9}, {"a": 10, "b": {"c": 20, "d": 30}, "e": {"f": 40}}
    assert zip_states(lambda new, old: (new, old), new, old) == {"a": (10, 1), "b": {"c": (20, 2), "d": 30}, "e": {"f": 40}}


def test_groups_that_are_still_there_keep_their_state():
    old = {"pairs": torch.arange(12.0).view(3, 2, 2), "steps": torch.tensor(5.0), "of tasks": tensor(1, 2)}
    fresh = {"pairs": torch.full((2, 2, 2), -1.0), "steps": torch.tensor(0.0), "of tasks": tensor(0, 0)}
    found = carried(old, ["x", "y", "z"], fresh, ["new", "y"])
    same(found, old | {"pairs": torch.stack([fresh["pairs"][0], old["pairs"][1]])})
    assert (fresh["pairs"] == -1).all()
    other = {"pairs": torch.zeros(2, 3, 3)}  # of other tasks: nothing of a group fits
    assert carried(old, ["x", "y", "z"], other, ["new", "y"])["pairs"] is old["pairs"]


def test_a_loaded_state_is_like_a_fresh_one():
    fresh = {"mean": torch.zeros(2), "inner": {"count": torch.zeros((), dtype=torch.int64)}, "note": "x"}
    found = loaded({"mean": tensor(1, 2), "inner": {"count": torch.tensor(3.0)}, "note": "y"}, fresh)
    same(found, {"mean": torch.tensor([1.0, 2.0]), "inner": {"count": torch.tensor(3)}, "note": "y"})
    assert found["mean"].dtype == torch.float32
    assert found["inner"]["count"].dtype == torch.int64
    with pytest.raises(ValueError, match=r"entries \['mean'\], expected \['mean', 'inner', 'note'\]"):
        loaded({"mean": tensor(1, 2)}, fresh)
    with pytest.raises(ValueError, match=r"'mean' has shape \(3,\), expected \(2,\)"):
        loaded({"mean": tensor(1, 2, 3), "inner": {}, "note": "y"}, fresh)
