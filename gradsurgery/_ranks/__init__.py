"""What a step asks of the other processes that train the same model.

:class:`Ranks` is the contract, and the answer where there is one process. :class:`Replicas` is the one for data-parallel
processes that each hold the whole model:

1. ``agreement`` makes sure, before anything large is sent, that all ranks mean the same: the same tasks, groups,
   parameters, rule and random numbers. What each rank brings may differ; tasks may be present on some ranks only.
2. ``buckets`` puts the rows of parameters that as many tasks reached side by side. A reduce-scatter sums them over the
   ranks, and leaves each rank a *shard* of all rows: some coordinates of every task's gradient.
3. Inner products of shards add up to the Gram matrices in one all-reduce. All ranks then have the same mixing.
4. Each rank combines its shard, and an all-gather makes it whole: the same bits on every rank.

So ``K + 1`` gradients travel where plain data-parallel training sends two. ``wire`` holds the collectives, and ``rounds``
is the way there and back. In a single pass, ``reach`` knows ahead which rows will be there, and ``lockstep`` does steps 2
to 4 during the pass, on one part of the parameters after the other.

Where parameters are sharded already, ``shards`` leaves the rows where they are, and only the third step is left. A single
pass has rows of whole parameters, which ``unsharded`` sends to the shards.
"""

from .alone import Meeting, Outlook, Ranks
from .find import ProcessGroup, ranks_of, source_for, take_over
from .lockstep import Lockstep
from .replicas import Replicas
from .unsharded import Inflow
from .wire import Lost

__all__ = [
    "Inflow",
    "Lockstep",
    "Lost",
    "Meeting",
    "Outlook",
    "ProcessGroup",
    "Ranks",
    "Replicas",
    "ranks_of",
    "source_for",
    "take_over",
]
