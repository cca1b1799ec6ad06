"""Processes that train together: started once, and killed when one does not answer."""

import datetime
import multiprocessing as mp
import os
import sys
import tempfile
import time
import traceback
import warnings

# Seconds: so many that a busy machine is not taken for a rank that hangs. Only such a rank ever takes as long.
START = 600  # to import what tests need
TIMEOUT = 300  # for a job; a collective gives up much earlier
COLLECTIVE = 60


def _serve(rank, pipe, path):
    sys.path[:] = path
    warnings.simplefilter("error")
    import torch
    import torch.distributed as dist
    import torch.distributed.fsdp
    import torch.distributed.tensor.parallel  # which takes a while, and must not happen when others wait in a collective

    torch.set_num_threads(1)
    pipe.send(("ready", None))
    while True:
        job = pipe.recv()
        if job is None:
            return
        function, arguments, size, store, dying = job
        try:
            torch.manual_seed(0)
            dist.init_process_group(
                "gloo",
                init_method=f"file://{store}",
                rank=rank,
                world_size=size,
                timeout=datetime.timedelta(seconds=COLLECTIVE),
            )
            answer = "done", function(rank, *arguments)
        except BaseException:
            answer = "failed", traceback.format_exc()
        if dying or answer[0] == "failed":
            _leave(dist)  # as a process does that ends: nobody is to wait for it
        pipe.send(answer)
        pipe.recv()  # all have answered: the others may have been reading what this one sent last
        _leave(dist)


def _leave(dist):
    if dist.is_initialized():
        dist.destroy_process_group()


class Ranks:
    """Up to ``size`` processes that run functions ``(rank, *arguments)`` of a test file, in a process group."""

    def __init__(self, size=4):
        self.size = size
        self._workers = []

    def __call__(self, count, function, *arguments, dying=()):
        """Each rank's result; of those that are ``dying``, None.

        Raises:
            AssertionError: with the traceback of a rank that fails, and if one does not answer.
        """
        self._start()
        with tempfile.TemporaryDirectory() as folder:
            for _, pipe in self._workers[:count]:
                pipe.send((function, arguments, count, os.path.join(folder, "store"), bool(dying)))
            deadline = time.monotonic() + TIMEOUT
            results, failures = [], []
            for rank, (worker, pipe) in enumerate(self._workers[:count]):
                kind, value = self._answer(worker, pipe, deadline)
                if kind != "done" and rank not in dying:
                    failures.append(f"rank {rank} {kind}\n{value}")
                results.append(value if kind == "done" else None)
        if dying or any(" failed\n" not in failure for failure in failures):
            self.stop()
        for _, pipe in self._workers[:count]:
            pipe.send("all have answered")
        assert not failures, "\n".join(failures)
        return results

    @staticmethod
    def _answer(worker, pipe, deadline):
        while time.monotonic() < deadline:
            try:
                if pipe.poll(0.05):
                    return pipe.recv()
            except (EOFError, ConnectionError):
                return "died", ""
            if not worker.is_alive() and not pipe.poll():
                return "died", ""
        return "did not answer", ""

    def _start(self):
        context, started = mp.get_context("spawn"), []
        for rank in range(len(self._workers), self.size):
            ours, theirs = context.Pipe()
            worker = context.Process(target=_serve, args=(rank, theirs, sys.path), daemon=True)
            worker.start()
            theirs.close()
            self._workers.append((worker, ours))
            started.append((worker, ours))
        deadline = time.monotonic() + START
        answers = [self._answer(worker, pipe, deadline)[0] for worker, pipe in started]
        if set(answers) - {"ready"}:
            self.stop()
            raise AssertionError(f"processes did not start: {answers}")

    def stop(self):
        """Kills all processes."""
        for worker, pipe in self._workers:
            worker.kill()
            worker.join()
            pipe.close()
        self._workers = []
