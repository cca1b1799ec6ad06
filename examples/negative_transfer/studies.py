"""The tables and figures of the thesis' chapter 3: which runs each of them needs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from .data import EMOJI, REAL
from .methods import CLASSICAL, DEEP, Training
from .protocol import Setting
from .runs import Run

HARD = {"labelled": 10.0, "at_most": 3}
"""Table 3.2: ten percent, and at most three labelled target samples of a class."""


@dataclass(frozen=True)
class Study:
    """What to compare, and at what size.

    Args:
        pairs: (source, target) of Table 3.2, and of the checks.
        main: the two of Table 3.1; the first is that of the other outputs.
        seeds: of the repeats.
        base: sizes of the data, and how labels are wrong.
        training: hyperparameters.
        methods: the deep methods.
        classical: the classical ones.
        epsilons: of Figure 3.3(a).
        shares: labelled shares of Figure 3.3(b), in percent.
        table31: the (eps, labelled) of Table 3.1.
        table34: the same of Table 3.4.
        checked: rates of the checks.
        emoji: (source, target) of the emoji; none where they are no part of the study.
        emoji_rates: of these.
    """

    pairs: tuple[tuple[str, str], ...]
    main: tuple[tuple[str, str], ...]
    seeds: tuple[int, ...] = tuple(range(5))
    base: Setting = field(default_factory=Setting)
    training: Training = field(default_factory=Training)
    methods: tuple[str, ...] = tuple(DEEP)
    classical: tuple[str, ...] = tuple(CLASSICAL)
    epsilons: tuple[float, ...] = tuple(i / 10 for i in range(11))
    shares: tuple[float, ...] = (0, 5, 10, 20, 30, 50)
    table31: tuple[tuple[float, ...], tuple[float, ...]] = ((0.0, 0.3, 0.7, 0.9), (0, 10, 30, 50))
    table34: tuple[tuple[float, float], ...] = ((0.7, 30), (0.7, 10), (0.3, 30), (0.3, 10))
    checked: tuple[float, ...] = (0.0, 0.3, 0.7, 1.0)
    emoji: tuple[tuple[str, str], ...] = ()
    emoji_rates: tuple[float, ...] = (0.0, 0.3, 0.7)

    def setting(self, pair: tuple[str, str], eps: float | tuple[float, float], **changes: object) -> Setting:
        """Of a pair of domains, with both rates the same or ``(eps_x, eps_y)``."""
        eps_x, eps_y = eps if isinstance(eps, tuple) else (eps, eps)
        fields = {**self.base.__dict__, "source": pair[0], "target": pair[1], "eps_x": eps_x, "eps_y": eps_y, **changes}
        return Setting(**fields)

    def repeats(self, method: str, setting: Setting, given: str = "") -> tuple[Run, ...]:
        """A run for each seed."""
        # A gate has nothing to gate without a source: A and A_gate share the baseline of Eq. 3.4.
        method = method.partition("-")[0] if given == "T" else method
        return tuple(Run(method, setting, given, seed, self.training) for seed in self.seeds)


@dataclass(frozen=True)
class Cell:
    """A method in a setting, against the same method with the target alone."""

    runs: tuple[Run, ...]
    baseline: tuple[Run, ...]


def cell(study: Study, method: str, setting: Setting, given: str = "") -> Cell:
    """Of a method."""
    return Cell(study.repeats(method, setting, given), study.repeats(method, setting, "T"))


# --- What each output needs -------------------------------------------------------------------------------------------


def table31(study: Study) -> dict[tuple[str, tuple[str, str], float, float], Cell]:
    """(method, pair, eps, labelled) → cell."""
    epsilons, shares = study.table31
    return {
        (method, pair, eps, share): cell(study, method, study.setting(pair, eps, labelled=share))
        for pair in study.main
        for share in shares
        for eps in epsilons
        for method in ("DANN", "DANN-gate")
    }


def table32(study: Study, eps: float = 0.7) -> dict[tuple[str, tuple[str, str]], Cell]:
    """(method, pair) → cell."""
    return {
        (method, pair): cell(study, method, study.setting(pair, eps, **HARD))
        for pair in study.pairs
        for method in _all_methods(study)
    }


def emoji(study: Study) -> dict[tuple[str, tuple[tuple[str, str], float]], Cell]:
    """(method, (pair, eps)) → cell: all methods on emoji, labelled as in Table 3.2."""
    return {
        (method, (pair, eps)): cell(study, method, study.setting(pair, eps, **HARD))
        for pair in study.emoji
        for eps in study.emoji_rates
        for method in _all_methods(study)
    }


def _all_methods(study: Study) -> tuple[str, ...]:
    return (*study.classical, *(name for method in study.methods for name in (method, f"{method}-gate")))


def table33(study: Study) -> dict[tuple[str, float, float], Cell]:
    """(method, eps_x, labelled) → cell; labels are right."""
    methods = [method for method in ("DAN", "DANN", "GTA") if method in study.methods]
    pair = study.main[0]
    return {
        (method, eps, share): cell(study, method, study.setting(pair, (eps, 0.0), labelled=share))
        for method in methods
        for eps, share in ((0.7, 10.0), (1.0, 30.0))
    }


ABLATION = {
    "DANN": ("DANN", ""),
    "DANN, target only": ("DANN", "T"),
    "DANN, oracle": ("DANN", "oracle"),
    "gate only": ("DANN-gate-only", ""),
    "labels only": ("DANN-label-only", ""),
    "joint": ("DANN-joint", ""),
    "marginal": ("DANN-marginal", ""),
    "none": ("DANN-none", ""),
    "gate": ("DANN-gate", ""),
}
"""Row of Table 3.4 → method and what it is given."""


def table34(study: Study) -> dict[tuple[str, float, float], tuple[Run, ...]]:
    """(row, eps, labelled) → runs."""
    return {
        (row, eps, share): study.repeats(method, study.setting(study.main[0], eps, labelled=share), given)
        for row, (method, given) in ABLATION.items()
        for eps, share in study.table34
    }


CURVES = {
    "source only": ("plain", "S"),
    "target only": ("plain", "T"),
    "DANN, target only": ("DANN", "T"),
    "DANN": ("DANN", ""),
    "DANN, gated": ("DANN-gate", ""),
}
"""Curve of Figure 3.3 → method and what it is given."""


def figure33(study: Study) -> tuple[dict[tuple[str, float], tuple[Run, ...]], dict[tuple[str, float], tuple[Run, ...]]]:
    """(curve, eps) → runs at 20 % of labels, and (curve, labelled) → runs at eps = .2."""
    pair = study.main[0]
    a = {
        (name, eps): study.repeats(method, study.setting(pair, eps, labelled=20.0), given)
        for name, (method, given) in CURVES.items()
        for eps in study.epsilons
    }
    b = {
        (name, share): study.repeats(method, study.setting(pair, 0.2, labelled=share), given)
        for name, (method, given) in CURVES.items()
        for share in study.shares
    }
    return a, b


def figure34(study: Study) -> dict[str, Run]:
    """The first repeat of DANN and of its gated form, at eps = .7 and 30 % of labels."""
    setting = study.setting(study.main[0], 0.7, labelled=30.0)
    return {name: study.repeats(name, setting)[0] for name in ("DANN", "DANN-gate")}


def figure35(study: Study) -> dict[float, tuple[Run, ...]]:
    """Gated DANN at several rates and 30 % of labels; the last, .7, is the thesis'."""
    epsilons = [eps for eps in (0.3, 0.5, 0.7) if eps in study.epsilons]
    return {eps: study.repeats("DANN-gate", study.setting(study.main[0], eps, labelled=30.0)) for eps in epsilons}


def checks(study: Study) -> dict[tuple[str, tuple[str, str], float], Cell]:
    """(method, pair, eps) → cell: every method, gated and not, over several rates, labelled as in Table 3.2."""
    return {
        (name, pair, eps): cell(study, name, study.setting(pair, eps, **HARD))
        for pair in study.pairs
        for method in study.methods
        for name in (method, f"{method}-gate")
        for eps in study.checked
    }


def runs_of(name: str, study: Study) -> Iterator[Run]:
    """All runs that an output needs, some of them several times."""
    if name == "figure33":
        for curves in figure33(study):
            for runs in curves.values():
                yield from runs
    elif name == "table34" or name == "figure35":
        for runs in (table34(study) if name == "table34" else figure35(study)).values():
            yield from runs
    elif name == "figure34":
        yield from figure34(study).values()
    else:
        cells = {"table31": table31, "table32": table32, "table33": table33, "checks": checks, "emoji": emoji}[name]
        for one in cells(study).values():
            yield from (*one.runs, *one.baseline)


OUTPUTS = ("table31", "table32", "table33", "table34", "figure33", "figure34", "figure35", "checks", "emoji")


def full(data: str, seeds: Sequence[int]) -> Study:
    """All directions of the three real domains, and of emoji; or of the two small ones."""
    if data == "small":
        both = (("small", "edges"), ("edges", "small"))
        return Study(both, both, tuple(seeds), Setting(*both[0], sources=800, targets=800))
    pairs, emoji = (tuple((a, b) for a in names for b in names if a != b) for names in (REAL, EMOJI))
    return Study(pairs, (("mnist", "uci"), ("uci", "pen")), tuple(seeds), Setting(*pairs[0]), emoji=emoji)


def quick(study: Study) -> Study:
    """Fewer steps, rates and repeats, to see that everything works: its numbers say nothing."""
    return replace(
        study,
        pairs=study.pairs[:2],
        main=study.pairs[:2],
        seeds=study.seeds[:2],
        base=replace(study.base, sources=500, targets=400),
        training=replace(study.training, steps=60),
        epsilons=(0.0, 0.3, 0.7, 1.0),
        shares=(0, 20, 50),
        table31=((0.0, 0.7), (0, 30)),
        table34=((0.7, 30), (0.3, 10)),
        checked=(0.0, 0.7),
        emoji_rates=(0.0, 0.7),
    )
