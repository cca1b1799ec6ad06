"""The training loops that people have: gradient surgery inside them, a module for each, with an extra of its name.

They share one idea. Such a loop calls ``backward`` on one loss, multiplies it before (by a scaler's scale, by one over the
number of accumulated passes), and reads ``p.grad`` after (to unscale, to clip). :meth:`SurgeryOptimizer.joint_loss` is a
loss whose backward pass is surgery's; a module here says when the loop's step is complete, so that the gradients are
combined before anything reads them, and hands :meth:`Step.figures` to the loop's own logger.

Nothing here is imported with ``gradsurgery``.
"""

__all__: list[str] = []
