"""The example runs under torchrun, and gives the same on any number of processes."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

pytestmark = pytest.mark.distributed


def torchrun(processes, *arguments):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--rdzv-backend", "c10d"]
    command += ["--rdzv-endpoint", "localhost:0", "examples/distributed.py", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=ROOT, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return {name: float(loss) for name, loss in re.findall(r"^  (\w+) +(\d+\.\d+)$", done.stdout, re.MULTILINE)}


def test_any_number_of_processes_learn_the_same_and_continue_each_others_checkpoints(tmp_path):
    saved = str(tmp_path / "saved")
    whole = torchrun(2, "--quick")
    assert set(whole) == {"French", "Spanish", "Russian", "Ukrainian", "Hindi", "Marathi", "average"}
    torchrun(2, "--quick", "--steps", "2", "--save", saved)
    continued = torchrun(1, "--quick", "--steps", "1", "--resume", saved)
    assert continued == pytest.approx(whole, abs=2e-4)  # four digits are printed
    assert torchrun(1, "--quick", "--seed", "1") != pytest.approx(whole, abs=2e-4)


def test_help_and_wrong_options(monkeypatch, capsys):
    sys.path.insert(0, str(ROOT))
    from examples.distributed import parse

    with pytest.raises(SystemExit, match="0"):
        parse(["--help"])
    assert "torchrun --nproc-per-node 2 examples/distributed.py" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        parse([])
    assert "start it with torchrun" in capsys.readouterr().err
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(SystemExit):
        parse(["--steps", "0"])
    assert "--steps must be at least 1. Found 0." in capsys.readouterr().err
    assert parse(["--quick"]).steps == 3
