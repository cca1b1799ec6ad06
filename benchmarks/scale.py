"""What surgery on many processes costs: a model, which the tests compare with what is counted on 2 and 4."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from .report import Figure, Options

_SECTIONS, _FACTS = 8, 5  # what ranks compare at each meeting, and tell each other: 8 bytes each


@dataclass(frozen=True)
class Job:
    """A training run.

    Attributes:
        ranks: how many processes.
        tasks: ``K``, all of which reach all parameters.
        parameters: ``D``, of the model.
        groups: surgery groups.
        itemsize: bytes of a coordinate.
    """

    ranks: int
    tasks: int
    parameters: int
    groups: int = 1
    itemsize: int = 4

    @property
    def _others(self) -> float:
        return (self.ranks - 1) / self.ranks

    @property
    def _gradient(self) -> int:
        """Bytes of one, filled up so that ranks have equal parts."""
        return -(-self.parameters // self.ranks) * self.ranks * self.itemsize

    @property
    def sent(self) -> float:
        """Bytes that a rank sends in a step: rows, the result, inner products, and what hosts tell each other."""
        rows_and_result = (self.tasks + 1) * self._gradient
        sums = 2 * 8 * (self.groups * self.tasks**2 + 2 * self.tasks + 1)
        notes = 8 * (_SECTIONS + _FACTS) * self.ranks
        return self._others * (rows_and_result + sums + notes)

    @property
    def sent_plain(self) -> float:
        """The same of plain data-parallel training: one all-reduce."""
        return self._others * 2 * self.parameters * self.itemsize

    @property
    def sent_sharded(self) -> float:
        """With FSDP2: parameters once for the forward pass, then parameters and gradients once for each task."""
        return self._others * (1 + 2 * self.tasks) * self.parameters * self.itemsize

    @property
    def sent_sharded_plain(self) -> float:
        """Of plain training with FSDP2."""
        return self._others * 3 * self.parameters * self.itemsize

    @property
    def products(self) -> float:
        """Floating-point operations of a rank for its part of the Gram matrices."""
        return 2 * self.tasks**2 * self.parameters / self.ranks

    @property
    def combination(self) -> float:
        """Floating-point operations of a rank for its part of the combined gradient."""
        return 2 * self.tasks * self.parameters / self.ranks

    @property
    def rows(self) -> int:
        """Bytes of a rank's own rows, which it has at the end of the backward pass."""
        return self.tasks * self.parameters * self.itemsize

    @property
    def shard(self) -> float:
        """Bytes of a rank's part of the rows of all ranks: with FSDP2, all that it has of rows."""
        return self.tasks * self._gradient / self.ranks


def scale(options: Options) -> list[Figure]:
    """What a rank of 8 to 4,096 sends, computes and keeps, modelled for 10^9 parameters: ``scale.png``."""
    ranks = [2**i for i in range(3, 13)]
    draw(ranks, options.out)
    figures = []
    for count in (8, 4096):
        for tasks in (2, 8, 32):
            job = Job(count, tasks, 10**9, groups=48)
            name = f"model of bytes sent, K={tasks}, {count} ranks"
            figures.append(Figure(name, job.sent, job.sent_plain, job.sent / job.sent_plain, unit="B"))
    return figures


def draw(ranks: Sequence[int], out: Path) -> None:
    """Three panels over the number of ranks: bytes sent, operations, memory."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    panels: list[tuple[str, str, Callable[[Job], float], Callable[[Job], float] | None]] = [
        ("sent by a rank", "GB in a step", lambda job: job.sent / 1e9, lambda job: job.sent_sharded / 1e9),
        ("computed by a rank", "GFLOP in a step", lambda job: (job.products + job.combination) / 1e9, None),
        ("rows kept by a rank", "GB", lambda job: (job.rows + job.shard) / 1e9, lambda job: job.shard / 1e9),
    ]
    plt.rcParams.update({"font.size": 10, "axes.titlesize": 12, "axes.titleweight": "bold"})
    figure, axes = plt.subplots(1, 3, figsize=(11, 4), layout="constrained")
    for ax, (title, unit, whole, sharded) in zip(axes, panels, strict=True):
        for tasks, colour in ((2, "#9cc3ea"), (8, "#2a6fbb"), (32, "#0b3c6f")):
            jobs = [Job(count, tasks, 10**9, groups=48) for count in ranks]
            ax.plot(ranks, [whole(job) for job in jobs], "o-", color=colour, lw=2, ms=4, label=f"K = {tasks}")
            if sharded is not None:
                ax.plot(
                    ranks, [sharded(job) for job in jobs], "s--", color=colour, lw=1.4, ms=3, label=f"K = {tasks}, FSDP2"
                )
        if title.startswith("sent"):
            plain = [Job(count, 1, 10**9).sent_plain / 1e9 for count in ranks]
            ax.plot(ranks, plain, ":", color="0.3", lw=1.6, label="plain DDP")
        ax.set(title=title, xlabel="ranks", ylabel=unit, xscale="log", yscale="log", xticks=ranks[::3])
        ax.set_xticklabels([f"{count:,}" for count in ranks[::3]])
        ax.minorticks_off()
        ax.grid(alpha=0.25, lw=0.6)
        ax.spines[["top", "right"]].set_visible(False)
    lines = axes[0].get_lines()
    figure.legend(lines, [line.get_label() for line in lines], ncols=4, frameon=False, loc="outside lower center")
    out.mkdir(parents=True, exist_ok=True)
    figure.savefig(out / "scale.png", dpi=130)
    plt.close(figure)
