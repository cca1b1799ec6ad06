"""The page on several processes runs, on two of them."""

import pytest
import torch
from test_docs import blocks

pytestmark = pytest.mark.distributed


def run(rank):
    torch.manual_seed(rank)
    namespace = {}
    for block in blocks("docs/distributed.md"):
        exec(compile(block, "docs/distributed.md", "exec"), namespace)
    return [p.grad is None for p in namespace["net"].parameters()], [p.detach() for p in namespace["net"].parameters()]


def test_code_runs_from_top_to_bottom(ranks):
    first, second = ranks(2, run)
    assert first[0] == [True] * 4
    assert all(torch.equal(a, b) for a, b in zip(first[1], second[1], strict=True))
