"""What a step asks of the other processes that train the same model.

:class:`Ranks` is the contract, and the answer where there is one process. :class:`Replicas` is the one for data-parallel
processes that each hold the whole model:

1. ``agreement`` makes sure, before anything large is sent, that all ranks mean the same: the same tasks, groups,
   parameters, rule and random numbers. What each rank brings may differ; tasks may be present on some ranks only.
2. ``buckets`` puts the rows of parameters that as many tasks reached side by side. A reduce-scatter sums them over the
   ranks, and leaves each rank a *shard* of all rows: some coordinates of every task's gradient.
3. Inner products of shards add up to the Gram matrices in one all-reduce. All ranks then have the same mixing.
4. Each rank combines its shard, and an all-gather makes it whole: the same bits on every rank.

So ``K + 1`` gradients travel where plain data-parallel training sends two. ``wire`` holds the collectives.

Where parameters are sharded already, ``shards`` leaves the rows where they are, and only the third step is left.
"""

from .alone import Meeting, Outlook, Ranks
from .find import ProcessGroup, ranks_of, source_for, take_over
from .replicas import Replicas
from .wire import Lost

__all__ = ["Lost", "Meeting", "Outlook", "ProcessGroup", "Ranks", "Replicas", "ranks_of", "source_for", "take_over"]
