"""Peak memory of a step, in a process of its own.

The child makes two steps, so that everything that lives on is there (PyTorch's threads and scratch memory, the rules'
state, the layout of the rows), and drops the gradients. It then reads its resident set, resets the kernel's high-water
mark of it by writing ``5`` to ``/proc/self/clear_refs``, makes one more step to ``p.grad``, and reads the mark (``VmHWM``
in ``/proc/self/status``). The difference of the two is what the step needs at its peak. So that freed memory goes back to
the system at once instead of blurring both, the C library is told to map every allocation above 64 KiB on its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

_MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_TOP_PAD_": "0"}


def measurable() -> bool:
    """Whether peak memory can be measured here: on Linux."""
    return Path("/proc/self/clear_refs").exists()


def elsewhere(module: str, job: dict[str, Any], cwd: Path | None = None) -> Any:
    """What ``python -m module`` prints as JSON, given a job as JSON, in a process whose freed memory is given back.

    Raises:
        subprocess.CalledProcessError: if it fails; its messages have been shown.
    """
    done = subprocess.run(
        [sys.executable, "-m", module, json.dumps(job)],
        cwd=cwd,
        env={**os.environ, **_MALLOC},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)


def peak(run: Callable[[], object], drop: Callable[[], object], settle: Callable[[], object] | None = None) -> int:
    """Bytes that a call of ``run`` needs at its peak, above what is resident after two calls of it.

    Args:
        run: a step to ``p.grad``.
        drop: drops the gradients.
        settle: a step whose residents are the base instead of those of ``run``: then what ``run`` keeps counts too.
    """
    _twice(run if settle is None else settle, drop)
    before = _status("VmRSS")
    if settle is not None:
        _twice(run, drop)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    kept = run()
    high = _status("VmHWM")
    del kept
    return high - before


def _twice(run: Callable[[], object], drop: Callable[[], object]) -> None:
    for _ in range(2):
        run()
        drop()


def _status(field: str) -> int:
    """A field of ``/proc/self/status``, in bytes."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024
    raise RuntimeError(f"/proc/self/status has no field {field}.")
