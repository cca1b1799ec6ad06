"""Settings at the edges of their ranges: just inside they are accepted, just outside they are an error that names them."""

import math

import pytest

import gradsurgery as gs

INF, NAN = math.inf, math.nan
POSITIVE = (1e-3,), (0.0, -1.0, INF, NAN)
NOT_NEGATIVE = (0.0, 2.0), (-1e-3, INF, NAN)
FRACTION = (0.0, 0.5), (-1e-3, 1.0, NAN)  # [0, 1)
COUNT = (1, 2), (0, -1)

RANGES = [
    (gs.CAGrad, "c", *FRACTION),
    (lambda alpha: gs.CRMOGM(gs.MGDA(), alpha=alpha), "alpha", (0.0, 1.0), (-1e-3, 1.001, NAN)),
    (gs.DWA, "temperature", *POSITIVE),
    (gs.DWA, "epoch", (1, 2), (0, True, 1.5)),
    (gs.FairGrad, "alpha", *POSITIVE),
    (gs.FAMO, "lr", *POSITIVE),
    (gs.FAMO, "decay", *NOT_NEGATIVE),
    (lambda margin: gs.GEM(("a",), margin=margin), "margin", *NOT_NEGATIVE),
    (gs.GradNorm, "alpha", *NOT_NEGATIVE),
    (gs.GradNorm, "lr", *POSITIVE),
    (gs.GradNorm, "smallest", (1e-3, 0.999), (0.0, 1.0, NAN)),
    (gs.GradVac, "beta", (0.0, 1.0), (-1e-3, 1.001, NAN)),
    (gs.GradVac, "target", (-1.0, 0.0, 1.0, None), (-1.001, 1.001, NAN)),
    (gs.GradVac, "max_growth", (1.0, INF), (0.999, NAN)),
    (gs.IMTLL, "lr", *POSITIVE),
    (gs.Krum, "byzantine", (0, 1), (-1, True, 0.5)),
    (gs.Krum, "selected", (1, 2), (0, True, 1.5)),
    (gs.MGDA, "tolerance", (1e-9,), (0.0, -1.0, NAN)),
    (gs.MGDA, "iterations", *COUNT),
    (gs.MoDo, "lr", *POSITIVE),
    (gs.MoDo, "rho", *NOT_NEGATIVE),
    (gs.NashMTL, "update_every", (1, 2), (0, True, 1.5)),
    (gs.SDMGrad, "lam", *NOT_NEGATIVE),
    (gs.SDMGrad, "lr", *POSITIVE),
    (gs.SDMGrad, "momentum", *FRACTION),
    (gs.SDMGrad, "iterations", *COUNT),
    (gs.STCH, "mu", *POSITIVE),
    (gs.STCH, "preference", ([1e-3, 2.0], None), ([0.0, 1.0], [1.0, INF], [NAN, 1.0])),
    (gs.STCH, "ideal", ([-1.0, 0.0], None), ([INF, 0.0], [0.0, -INF], [NAN, 0.0])),
    (gs.UncertaintyWeighting, "lr", *POSITIVE),
    (gs.PCGrad, "weights", ({"a": 0.0}, None), ({"a": -1e-3}, {"a": 1.0, "b": INF}, {"a": NAN}, {})),
]


@pytest.mark.parametrize(
    ("make", "name", "inside", "outside"), RANGES, ids=lambda value: value if isinstance(value, str) else ""
)
def test_edges_of_ranges(make, name, inside, outside):
    for value in inside:
        make(**{name: value})
    for value in outside:
        with pytest.raises(ValueError, match=f"`{name}` (is|must)"):
            make(**{name: value})
