"""The discriminator gate: how much each source sample resembles the target, and losses that find out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .._mixed import MixedBatch, TaskIds

Labelled: TypeAlias = tuple[Tensor, Tensor]
"""Features ``[B, d]`` and labels ``[B]``."""

TERMS = ("both", "joint", "marginal", "none")


@dataclass(frozen=True, eq=False)
class GateRecord:
    """What the gate last weighed, on the device of the features: reading it is what waits for that.

    Attributes:
        weights: ``[B]``, as they were returned.
        ratios: ``[B]``, the clamped density ratios, before they were normalised and scaled.
        effective: effective sample size, ``(sum w)^2 / sum w^2``: between 1 and ``B``.
    """

    weights: Tensor
    ratios: Tensor
    effective: Tensor

    @property
    def largest(self) -> Tensor:
        """The largest ratio."""
        return self.ratios.max()

    def figures(self) -> dict[str, float]:
        """What to log: the effective share of the samples, and the mean and the largest ratio. Waits for the device."""
        count = len(self.weights)
        if not count:
            return {}
        values = {"effective": self.effective / count, "ratio/mean": self.ratios.mean(), "ratio/max": self.largest}
        return {f"gate/{name}": float(value) for name, value in values.items()}


class DiscriminatorGate(nn.Module):
    r"""One discriminator ``D(f, y)`` of source and target, whose odds are weights for source samples.

    ``D = sigmoid(logit)`` is the probability that a sample with features ``f`` and label ``y`` is of the target; ``nil``
    is the label of a sample without one. A loss on source samples is gated by the density ratio that ``D`` implies,

    ``omega(x, y) = stop_gradient(D / (1 - D)) = e^logit``,

    ``L_gate = E_target[loss] + scale E_source[omega loss]``,

    while ``D`` learns to tell the two apart, with labels (the *joint* terms) and without (the *marginal* terms):

    ``L_D = - E_u[log D(f_u, nil)] - E_s[log(1 - D(f_s, nil))] - E_t[log D(f_t, y_t)] - E_s[log(1 - D(f_s, y_s))]``.

    The model's features are to match in those of ``terms``. Two losses share ``L_D`` among them, so that nothing is trained
    twice: :meth:`adversary_loss` has the terms in ``terms``, as a function of the features and of ``D``;
    :meth:`discriminator_loss` has the others, on detached features. :meth:`loss` is their sum: whatever ``terms``, ``D``
    learns from all of ``L_D``. The features are to *ascend* it: say so by the rule :class:`Adversary`, or by passing
    features through :func:`reverse_gradient`.

    Args:
        features: number of features, ``d``.
        classes: number of classes; labels are 0 to ``classes - 1``, and ``nil`` is the next.
        hidden: width of the discriminator's two hidden layers.
        terms: ``"both"``, ``"joint"``, ``"marginal"`` or ``"none"``: in which terms the features are to match.
        scale: the factor of source weights, the thesis' lambda.
        clamp: the largest ratio: ``omega = min(e^logit, clamp)``.
        normalise: whether the weights of a batch have the mean ``scale``.
        discriminator: a network of one's own, ``[B, d + classes + 1] -> [B]`` or ``[B, 1]`` logits: its input is the
            features and, behind them, the label in one-hot form, ``nil`` last.
        tasks: names of tasks, or their number, whose odds :meth:`see` keeps for the rule :class:`TaskGate`.

    Attributes:
        last: what :meth:`weights` last weighed; None before.
        task_ratio: ``[K]``, each task's mean ratio, as :meth:`see` last saw it; a buffer, with ``tasks``.
        task_logit: ``[K]``, each task's mean logit; a buffer, with ``tasks``.
        task_seen: ``[K]``, the tasks that were seen; a buffer, with ``tasks``.

    Raises:
        ValueError: for settings outside these ranges.

    Example:
        >>> import torch, gradsurgery as gs
        >>> gate = gs.DiscriminatorGate(features=4, classes=3)
        >>> f, y = torch.randn(8, 4), torch.randint(3, (8,))
        >>> losses = torch.rand(8)  # one for each source sample
        >>> gated = (gate.weights(f, y) * losses).mean()
        >>> gate.loss(source=(f, y), target=(f + 1, y), unlabelled=f + 1).backward()

    Reference:
        Wang, Dai, Póczos, Carbonell, *Characterizing and Avoiding Negative Transfer*, CVPR 2019 (arXiv:1811.09751);
        Z. Wang's thesis, Equations 3.8 to 3.11.

    Note:
        Equation 3.11, as printed, would let ``D`` descend its own likelihood: the sign here is that of DANN (Ganin et al.,
        JMLR 2016), a minimax of ``L_CLF - mu L_D``. Ratios of several hundred are common: hence ``clamp`` and
        ``normalise``, which the thesis does not have. With ``normalise``, the mean over a batch is that over the batch of
        this process. Terms of joint matching reach the features too with ``terms="both"``, the thesis' choice; with
        ``"marginal"``, ``D`` judges labels on detached features, and tells bad source samples from good ones far better.
    """

    def __init__(
        self,
        features: int,
        classes: int,
        *,
        hidden: int = 64,
        terms: str = "both",
        scale: float = 1.0,
        clamp: float = 20.0,
        normalise: bool = True,
        discriminator: nn.Module | None = None,
        tasks: Sequence[str] | int = (),
    ) -> None:
        super().__init__()
        for name, number in (("features", features), ("classes", classes), ("hidden", hidden)):
            if isinstance(number, bool) or not isinstance(number, int) or number < 1:
                raise ValueError(f"`{name}` must be a number, at least 1. Found {name}={number!r}.")
        if terms not in TERMS:
            raise ValueError(f"`terms` must be one of {', '.join(map(repr, TERMS))}. Found {terms!r}.")
        if not 0 <= scale < math.inf:
            raise ValueError(f"`scale` must be finite and not negative. Found scale={scale!r}.")
        if not 0 < clamp < math.inf:
            raise ValueError(f"`clamp` is the largest ratio, and must be positive and finite. Found clamp={clamp!r}.")
        if isinstance(tasks, str):
            raise ValueError(f"`tasks` must be several names, or their number. Found the string {tasks!r}.")
        names = tuple(map(str, range(tasks))) if isinstance(tasks, int) else tuple(tasks)
        if len(set(names)) < len(names):
            raise ValueError(f"`tasks` must be distinct. Found {names!r}.")
        self.features = features
        self.classes = classes
        self.terms = terms
        self.scale = float(scale)
        self.clamp = float(clamp)
        self.normalise = normalise
        self.tasks = names
        if discriminator is None:
            discriminator = nn.Sequential(
                nn.Linear(features + classes + 1, hidden),
                nn.ReLU(),
                nn.Linear(hidden, hidden),
                nn.ReLU(),
                nn.Linear(hidden, 1),
            )
        self.discriminator = discriminator
        self.last: GateRecord | None = None
        self.task_ratio: Tensor
        self.task_logit: Tensor
        self.task_seen: Tensor
        if names:
            self.register_buffer("task_ratio", torch.ones(len(names)))
            self.register_buffer("task_logit", torch.zeros(len(names)))
            self.register_buffer("task_seen", torch.zeros(len(names), dtype=torch.bool))

    def forward(self, features: Tensor, labels: Tensor | None = None) -> Tensor:
        """The logits ``[B]``: the log of the density ratio of target and source.

        Args:
            features: ``[B, d]``.
            labels: ``[B]``; None means ``nil``.

        Raises:
            ValueError: for other shapes; on the CPU, for labels out of range.
        """
        self._check("features", features, labels)
        return self._logits(features, self._one_hot(features, labels))

    @torch.no_grad()
    def weights(self, features: Tensor, labels: Tensor | None = None) -> Tensor:
        """Weights ``[B]`` for the losses of source samples, detached: ``scale min(e^logit, clamp)``, normalised.

        With ``normalise``, they are divided by their mean over the batch ahead of ``scale``. They gate any loss that there
        is for each sample, also those of a mixed batch: ``opt.backward(gate.weights(f, y) * losses)``.

        Args:
            features: ``[B, d]``; no gradient flows into them.
            labels: ``[B]``; None means ``nil``, for unlabelled samples and for gates that see no labelled target.

        Raises:
            ValueError: as the forward pass.
        """
        logits = self._clamped(features, labels)
        shares = logits.softmax(0)  # no ratio is too small for it
        ratios = logits.exp()
        weights = (shares * len(shares) if self.normalise else ratios) * self.scale
        squares = shares.square().sum().clamp_min(torch.finfo(shares.dtype).tiny)
        self.last = GateRecord(weights, ratios, shares.sum().square() / squares)
        return weights

    # --- Losses -------------------------------------------------------------------------------------------------------

    def loss(self, *, source: Labelled, target: Labelled | None = None, unlabelled: Tensor | None = None) -> Tensor:
        """All of ``L_D``: of the discriminator, and of the features in the terms that ``terms`` names.

        The sum of :meth:`adversary_loss` and :meth:`discriminator_loss`, in one forward pass. Terms that have no target
        samples in this batch, None or an empty tensor, are left out, with their source side.

        Args:
            source: features ``[B, d]`` and labels ``[B]`` of source samples.
            target: features and labels of labelled target samples, for the joint terms.
            unlabelled: features ``[B, d]`` of target samples, for the marginal terms. Labelled ones may be among them.

        Raises:
            ValueError: without any target samples or source samples, and for other shapes.
        """
        return self._loss({"joint", "marginal"}, "loss", source, target, unlabelled)

    def adversary_loss(
        self, *, source: Labelled, target: Labelled | None = None, unlabelled: Tensor | None = None
    ) -> Tensor:
        """The part of ``L_D`` in which the features are to match, not reversed: the discriminator is to descend it.

        Args:
            source, target, unlabelled: as for :meth:`loss`.

        Raises:
            ValueError: with ``terms="none"``; without target samples for any of the terms, or source samples; and for other
                shapes.
        """
        return self._loss(self._matched, "adversary_loss", source, target, unlabelled)

    def discriminator_loss(
        self, *, source: Labelled, target: Labelled | None = None, unlabelled: Tensor | None = None
    ) -> Tensor:
        """The other part of ``L_D``, on detached features.

        Args:
            source, target, unlabelled: as for :meth:`loss`.

        Raises:
            ValueError: with ``terms="both"``, which leaves nothing; without target samples for any of the terms, or source
                samples; and for other shapes.
        """
        return self._loss({"joint", "marginal"} - self._matched, "discriminator_loss", source, target, unlabelled)

    @property
    def _matched(self) -> set[str]:
        return {"joint", "marginal"} if self.terms == "both" else {self.terms} - {"none"}

    def _loss(
        self, asked: set[str], who: str, source: Labelled, target: Labelled | None, unlabelled: Tensor | None
    ) -> Tensor:
        if not asked:
            raise ValueError(
                f"With terms={self.terms!r}, nothing is left for {who}(): "
                + ("adversary_loss()" if self.terms == "both" else "discriminator_loss()")
                + " has all terms. loss() is their sum, for any `terms`."
            )
        given = {"source": source, "target": target, "unlabelled": None if unlabelled is None else (unlabelled, None)}
        for name, pair in given.items():
            if pair is not None:
                if not isinstance(pair, (tuple, list)) or len(pair) != 2:
                    raise ValueError(
                        f"`{name}` must be a pair of features [B, d] and labels [B]. Found {type(pair).__name__}."
                    )
                self._check(name, *pair, needs_labels=name != "unlabelled")
        if not len(source[0]):
            raise ValueError(f"{who}() needs source samples: leave it out of a step without any. Found an empty `source`.")
        parts: list[tuple[Tensor, Tensor | None, bool]] = []  # features, labels, whether of the target
        for term, there in (("marginal", given["unlabelled"]), ("joint", given["target"])):
            if term in asked and there is not None and len(there[0]):
                for (features, labels), of_target in ((source, False), (there, True)):
                    features = features if term in self._matched else features.detach()
                    parts.append((features, labels if term == "joint" else None, of_target))
        if not parts:
            needed = {"marginal": "`unlabelled`", "joint": "`target`"}
            names = " or ".join(needed[term] for term in ("joint", "marginal") if term in asked)
            raise ValueError(f"{who}() needs target samples, {names}, with terms={self.terms!r}. Found none.")
        features = torch.cat([part[0] for part in parts])
        labels = torch.cat([self._one_hot(f, y) for f, y, _ in parts])
        logits = torch.split(self._logits(features, labels), [len(part[0]) for part in parts])
        losses = [F.softplus(-each if part[2] else each).mean() for each, part in zip(logits, parts, strict=True)]
        return torch.stack(losses).sum()

    # --- Tasks --------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def see(self, features: Tensor, labels: Tensor | None, task_ids: TaskIds) -> None:
        """Notes how much the samples of each task resemble the target, for the rule :class:`TaskGate`.

        Tasks without samples in the batch keep what was noted of them, and so do those whose logits are not all finite.

        Args:
            features: ``[B, d]``.
            labels: ``[B]``; None means ``nil``.
            task_ids: ``[B]``, for each sample the index of its task among ``tasks``, or its name.

        Raises:
            ValueError: without ``tasks``, for unknown tasks and for other shapes.
        """
        if not self.tasks:
            raise ValueError("see() needs to know the tasks: make the gate with tasks=[...], their names or number.")
        logits = self._clamped(features, labels)
        index = self._task_index(task_ids, logits)
        # In the precision of the logits: in bfloat16, ones add up to 256 at most.
        zeros = logits.new_zeros(len(self.tasks))
        count = zeros.index_add(0, index, torch.ones_like(logits))
        ratio, logit = (zeros.index_add(0, index, values) / count for values in (logits.exp(), logits))
        known = logit.isfinite()  # nan without samples
        self.task_ratio.copy_(torch.where(known, ratio, self.task_ratio))
        self.task_logit.copy_(torch.where(known, logit, self.task_logit))
        self.task_seen |= known

    def _task_index(self, task_ids: TaskIds, like: Tensor) -> Tensor:
        on_device = isinstance(task_ids, Tensor) and task_ids.device.type != "cpu"
        if on_device and isinstance(task_ids, Tensor):  # whose values are not looked at: that would wait for the device
            index = task_ids.to(like.device)
        else:
            index = MixedBatch(task_ids, self.tasks).on(like.device)
        if index.shape != like.shape:
            raise ValueError(
                f"`task_ids` must have one entry for each of the {len(like)} samples. Found shape {tuple(index.shape)}."
            )
        return index

    # --- The discriminator --------------------------------------------------------------------------------------------

    def _one_hot(self, features: Tensor, labels: Tensor | None) -> Tensor:
        if labels is None:
            return F.pad(features.new_zeros(len(features), self.classes), (0, 1), value=1.0)
        return F.one_hot(labels.long(), self.classes + 1).to(features)

    def _clamped(self, features: Tensor, labels: Tensor | None) -> Tensor:
        logits: Tensor = self(features.detach(), labels)
        return logits.clamp_max(math.log(self.clamp))

    def _logits(self, features: Tensor, one_hot: Tensor) -> Tensor:
        first = next(self.discriminator.parameters(), features)
        logits: Tensor = self.discriminator(torch.cat([features, one_hot], -1).to(first.dtype))
        if logits.shape not in ((len(features),), (len(features), 1)):
            raise ValueError(
                f"`discriminator` must return one logit for each of the {len(features)} samples. Found shape "
                f"{tuple(logits.shape)}."
            )
        logits = logits.reshape(len(features))
        return logits.float() if logits.dtype.itemsize < 4 else logits

    def _check(self, name: str, features: Tensor, labels: Tensor | None, *, needs_labels: bool = False) -> None:
        if not isinstance(features, Tensor) or features.dim() != 2 or features.shape[1] != self.features:
            shape = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
            raise ValueError(f"`{name}` must hold features [B, {self.features}]. Found {shape}.")
        if labels is None:
            if needs_labels:
                raise ValueError(f"`{name}` must hold labels [B]. Found None; samples without labels are `unlabelled`.")
            return
        if not isinstance(labels, Tensor) or labels.shape != features.shape[:1] or labels.is_floating_point():
            found = f"{tuple(labels.shape)} of {labels.dtype}" if isinstance(labels, Tensor) else type(labels).__name__
            raise ValueError(f"`{name}`: labels must be [{len(features)}] integers, one for each sample. Found {found}.")
        if labels.device.type == "cpu" and len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < self.classes:
            raise ValueError(
                f"`{name}`: labels must be 0 to {self.classes - 1}. Found {int(labels.min())} to {int(labels.max())}."
            )

    def extra_repr(self) -> str:
        """The settings."""
        shown = [f"features={self.features}, classes={self.classes}, terms={self.terms!r}, scale={self.scale:g}"]
        shown += [f"clamp={self.clamp:g}, normalise={self.normalise}"]
        return ", ".join(shown + ([f"tasks={list(self.tasks)}"] if self.tasks else []))
