"""Mutation testing: are the tests there that would notice a fault?

Each *mutant* is the library with one small fault: a comparison that is turned, a number that is one off, a ``not`` that is
missing. A mutant that makes a test fail is *killed*; one that survives is a hole in the tests, dead code, or a change that
makes no difference. Cosmic Ray makes the mutants and keeps the results; this draws a sample of them, and runs each in a
process that is forked once PyTorch has been imported, on the tests that reach its line, the quickest first.

>>> make mutants ARGS="--sample 200 --seed 1"  # doctest: +SKIP

A run that was stopped goes on where it was. ``[mutants]`` in ``setup.cfg`` says which modules are mutated, and by which
tests; ``cr-report`` and ``cr-html`` read the sessions in ``out/mutants`` too.
"""

from __future__ import annotations

import argparse
import ast
import configparser
import hashlib
import importlib
import importlib.machinery
import importlib.util
import json
import os
import pickle
import random
import resource
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from difflib import unified_diff
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import coverage
import pytest
from cosmic_ray.ast import ast_nodes, get_ast_from_path
from cosmic_ray.mutating import mutate_code
from cosmic_ray.plugins import get_operator
from cosmic_ray.work_db import use_db
from cosmic_ray.work_item import MutationSpec, TestOutcome, WorkerOutcome, WorkItem, WorkResult
from scipy.stats import binomtest

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "out" / "mutants"

# One or two faults per place. Cosmic Ray has each operator for each other one; most of those raise a TypeError at once
# (floats have no >>), and their deaths would prove nothing.
BINARY = ["Add_Sub", "Sub_Add", "Mul_Div", "Div_Mul", "FloorDiv_Mul", "Mod_FloorDiv", "Pow_Mul", "LShift_RShift"]
BINARY += ["BitAnd_BitOr", "BitOr_BitAnd", "BitXor_BitAnd"]
COMPARISON = ["Lt_LtE", "Lt_GtE", "LtE_Lt", "LtE_Gt", "Gt_GtE", "Gt_LtE", "GtE_Gt", "GtE_Lt", "Eq_NotEq", "NotEq_Eq"]
COMPARISON += ["Is_IsNot", "IsNot_Is"]
OPERATORS = [
    *(f"core/ReplaceBinaryOperator_{pair}" for pair in BINARY),
    *(f"core/ReplaceComparisonOperator_{pair}" for pair in COMPARISON),
    *(f"core/ReplaceUnaryOperator_Delete_{sign}" for sign in ("USub", "Not", "Invert")),
    *("core/NumberReplacer", "core/ReplaceTrueWithFalse", "core/ReplaceFalseWithTrue"),
    *("core/ReplaceAndWithOr", "core/ReplaceOrWithAnd", "core/AddNot", "core/ExceptionReplacer"),
    *("core/ZeroIterationForLoop", "core/ReplaceBreakWithContinue", "core/ReplaceContinueWithBreak"),
]

Position = tuple[int, int]
Span = tuple[Position, Position]


# --- Which mutants there are ------------------------------------------------------------------------------------------


def mutations(module: str) -> Iterator[MutationSpec]:
    """All mutations of a module, ``"gradsurgery/_step.py"``."""
    nodes = list(ast_nodes(get_ast_from_path(ROOT / module)))
    idle, binary, signed = _regions(ast.parse((ROOT / module).read_text()))
    for name in OPERATORS:
        operator = get_operator(name)()
        found = ((start, end) for node in nodes for start, end in operator.mutation_positions(node))
        for occurrence, (start, end) in enumerate(found):
            possible = not _within(start, idle) and ("Binary" not in name or _within(start, binary))
            if possible and not ("USub" in name and _within(start, signed)):
                yield MutationSpec(ROOT / module, name, occurrence, start, end)


def _regions(tree: ast.AST) -> tuple[list[Span], list[Span], list[Span]]:
    """Where mutations would be no faults, or others than they are meant to be.

    That is: what is never run (annotations, imports for them); where binary operators stand, as ``*`` in ``def f(*, x)``
    does not; and numbers with a sign, which are replaced by others anyway: axes ``-1`` and ``1`` are mostly the same.
    """
    idle, binary, signed = [], [], []
    for node in ast.walk(tree):
        for annotation in (getattr(node, "annotation", None), getattr(node, "returns", None)):
            if isinstance(annotation, ast.expr):
                idle.append(_span(annotation))
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING":
            idle.append(_span(node))
        if isinstance(node, ast.BinOp):
            binary.append((_span(node.left)[1], _span(node.right)[0]))
        if isinstance(node, ast.UnaryOp) and isinstance(node.operand, ast.Constant):
            signed.append(_span(node))
    return idle, binary, signed


def _span(node: Any) -> Span:
    return (node.lineno, node.col_offset), (node.end_lineno, node.end_col_offset)


def _within(position: Position, spans: Iterable[Span]) -> bool:
    return any(start <= position < end for start, end in spans)


def sampled(by_module: dict[str, list[MutationSpec]], count: int, seed: int) -> list[MutationSpec]:
    """A random sample without replacement, in which each module has its share (to the next integer).

    It is in random order, so that what a run that is stopped has tried by then is a random sample too.
    """
    rng, total = random.Random(seed), sum(map(len, by_module.values()))
    shuffled = [mutation for found in by_module.values() for mutation in rng.sample(found, len(found))]
    start, count = rng.random(), min(count, total)  # every n-th, of all modules one after the other
    return rng.sample([shuffled[int((start + i) * total / count)] for i in range(count)], count)


# --- Processes --------------------------------------------------------------------------------------------------------


def in_child(function: Callable[[], Any], *, seconds: float, log: Path | None = None) -> Any:
    """What ``function`` returns in a forked process, given so many seconds of CPU time; None if it does not return."""
    with tempfile.TemporaryFile() as answer:
        child = os.fork()
        if child == 0:
            resource.setrlimit(resource.RLIMIT_CPU, (int(seconds) + 1, int(seconds) + 2))
            output = os.open(os.devnull if log is None else log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(output, 1)
            os.dup2(output, 2)
            try:
                answer.write(pickle.dumps(function()))
                answer.flush()
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(0)
        end = time.monotonic() + 100 * seconds  # for one that sleeps, not for one that waits for a busy machine
        while os.waitpid(child, os.WNOHANG) == (0, 0):
            if time.monotonic() > end:
                os.kill(child, signal.SIGKILL)
            time.sleep(0.005)
        answer.seek(0)
        return pickle.loads(answer.read() or pickle.dumps(None))


def run_pytest(arguments: Sequence[str], plugin: object = None) -> int:
    """Runs pytest as in a new process, but for what has been imported already."""
    import hypothesis
    import torch

    torch.set_num_threads(1)
    # What fails need not be made small, and no two runs differ.
    phases = (hypothesis.Phase.explicit, hypothesis.Phase.generate)
    hypothesis.settings.register_profile("mutants", derandomize=True, database=None, deadline=None, phases=phases)
    hypothesis.settings.load_profile("mutants")
    options = ["-x", "-q", "-m", "not distributed", "-p", "no:cacheprovider", "-p", "no:pytest_cov", "--rootdir", str(ROOT)]
    options += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]  # plugins are there already
    return int(pytest.main([*options, *arguments], plugins=[plugin] if plugin else []))


def preload(tests: Sequence[str]) -> None:
    """Imports what the library and its tests import from elsewhere."""

    def names() -> list[str]:
        run_pytest(["--collect-only", *tests])
        mine = str(ROOT) + os.sep
        files = {name: getattr(module, "__file__", None) for name, module in list(sys.modules.items())}
        return [name for name, file in files.items() if file and not (file.startswith(mine) and "/.venv/" not in file)]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in in_child(names, seconds=300) or ():
            try:
                importlib.import_module(name)
            except Exception:  # it is imported by those who need it
                continue


# --- Which tests reach which lines ------------------------------------------------------------------------------------


class Observer:
    """A pytest plugin: the seconds that each test takes, and the lines of the library that it runs."""

    def __init__(self) -> None:
        self.coverage = coverage.Coverage(data_file=None, source=["gradsurgery"], config_file=False)
        self.seconds: Counter[str] = Counter()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Any:
        self.coverage.switch_context(item.nodeid)
        start = os.times()
        result = yield
        self.seconds[item.nodeid] += sum(os.times()[:4]) - sum(start[:4])  # of this process and of its children
        self.coverage.switch_context("")
        return result

    def found(self) -> dict[str, Any]:
        data, reached = self.coverage.get_data(), defaultdict[str, dict[str, list[int]]](dict)
        for file in data.measured_files():
            lines = defaultdict[str, list[int]](list)
            for line, contexts in data.contexts_by_lineno(file).items():
                for context in filter(None, contexts):
                    lines[context].append(line)
            for test, numbers in lines.items():
                reached[test][str(Path(file).relative_to(ROOT))] = numbers
        return {test: {"seconds": round(s, 3), "lines": reached[test]} for test, s in self.seconds.items()}


def observed(path: str) -> dict[str, Any] | str:
    """Runs the tests of a file or folder, unmutated; what they print if one fails."""
    log = OUT / "unmutated.txt"

    def observe() -> dict[str, Any] | None:
        observer = Observer()
        observer.coverage.start()
        code = run_pytest([path], observer)
        observer.coverage.stop()
        return observer.found() if code == 0 else None

    found: dict[str, Any] | None = in_child(observe, seconds=1200, log=log)
    return log.read_text() if found is None else found


def reached(tests: Sequence[str], library: str) -> dict[str, Any]:
    """Test → its seconds and lines; measured again where the library or the test's file has changed."""
    cache = OUT / "reached.json"
    known = json.loads(cache.read_text()) if cache.exists() else {}
    for path in tests:
        digest = digested([ROOT / path], library)
        if known.get(path, {}).get("digest") != digest:
            print(f"which lines does {path} reach?", flush=True)
            found = observed(path)
            if isinstance(found, str):
                raise SystemExit(f"{path} fails without any mutation:\n{found}")
            known[path] = {"digest": digest, "tests": found}
            cache.write_text(json.dumps(known))
    return {test: found for path in tests for test, found in known[path]["tests"].items()}


def digested(paths: Iterable[Path], salt: str = "") -> str:
    files = sorted(file for path in paths for file in ([path] if path.is_file() else path.rglob("*.py")))
    return hashlib.sha256(b"".join([salt.encode(), *(file.read_bytes() for file in files)])).hexdigest()[:8]


def chosen(mutation: MutationSpec, tests: dict[str, Any], imported: Sequence[str], seconds: float) -> list[str]:
    """The tests that reach the mutation, the quickest first, as many as the time allows.

    Of what is run on import: those that reach anything in the module, after those ``imported`` that are there for it.
    """
    module = str(mutation.module_path.relative_to(ROOT))
    first, last = _statement(mutation.module_path, mutation.start_pos[0])
    there = {name: found["lines"][module] for name, found in tests.items() if module in found["lines"]}
    exact = [name for name, lines in there.items() if any(first <= line <= last for line in lines)]
    ranked = sorted(exact or there, key=lambda name: tests[name]["seconds"])
    names, spent = [], 0.0
    for name in ranked if exact else dict.fromkeys([*imported, *ranked]):
        spent += tests[name]["seconds"] + 0.002
        if names and spent > seconds:
            break
        names.append(name)
    return names


def _statement(path: Path, line: int) -> Position:
    """The lines of the innermost statement (of a compound one: of its head) around a line."""
    spans = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.stmt) and node.lineno <= line <= (node.end_lineno or node.lineno):
            body = getattr(node, "body", None)
            spans.append((node.lineno, max(node.lineno, body[0].lineno - 1) if body else node.end_lineno or node.lineno))
    around = [span for span in spans if span[0] <= line <= span[1]]
    return min(around, key=lambda span: span[1] - span[0], default=(line, line))


# --- One mutant -------------------------------------------------------------------------------------------------------


class Mutated(importlib.machinery.SourceFileLoader):
    """Finds and loads one module with other code."""

    code: str

    def get_code(self, fullname: str) -> Any:
        return compile(self.code, self.path, "exec", dont_inherit=True)

    def find_spec(self, name: str, path: object = None, target: object = None) -> importlib.machinery.ModuleSpec | None:
        return importlib.util.spec_from_file_location(name, self.path, loader=self) if name == self.name else None


class Only:
    """A pytest plugin: keeps some tests, in their order, and sees to it that they import the mutant.

    Pytest would find files that it is given, as modules with doctests are, before anyone else does; and before it is
    configured, it imports what ``conftest.py`` does.
    """

    def __init__(self, names: Sequence[str], mutated: Mutated) -> None:
        self.place = {name: place for place, name in enumerate(names)}
        self.mutated = mutated
        self.pytest_configure()

    def pytest_configure(self) -> None:
        sys.meta_path.insert(0, self.mutated)  # type: ignore[arg-type]

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items[:] = sorted((item for item in items if item.nodeid in self.place), key=lambda item: self.place[item.nodeid])


def tried(mutation: MutationSpec, tests: dict[str, Any], imported: Sequence[str], seconds: float) -> WorkResult:
    """Runs a mutant."""
    path = mutation.module_path
    before = path.read_text()
    after = mutate_code(before, get_operator(mutation.operator_name)(), mutation.occurrence)
    place = str(path.relative_to(ROOT))
    diff = "\n".join(unified_diff(before.split("\n"), after.split("\n"), place, place, n=1, lineterm=""))
    names = chosen(mutation, tests, imported, seconds)
    if not names:
        return WorkResult(WorkerOutcome.NORMAL, "No test reaches the module.", TestOutcome.SURVIVED, diff)
    log = OUT / "mutant.txt"

    def run() -> int:
        loader = Mutated(place.removesuffix(".py").replace("/", "."), str(path))
        loader.code = after
        return next((code for files in _by_file(names, path) if (code := run_pytest(files, Only(names, loader)))), 0)

    code = in_child(run, seconds=20 + 3 * sum(tests[name]["seconds"] for name in names), log=log)
    if code == 0:
        return WorkResult(WorkerOutcome.NORMAL, f"{len(names)} tests passed.", TestOutcome.SURVIVED, diff)
    last = log.read_text()[-2000:] if code is not None else "It did not end, or ended the process."
    return WorkResult(WorkerOutcome.NORMAL, last, TestOutcome.KILLED, diff)


def _by_file(names: Sequence[str], module: Path) -> Iterator[list[str]]:
    """The files of these tests, the module's own first: one, two, four, …, each to be collected when those before pass."""
    files = list(dict.fromkeys(name.partition("::")[0] for name in names))
    files.sort(key=lambda file: f"test{module.stem}.py" not in file)
    start, count = 0, 1
    while start < len(files):
        yield files[start : start + count]
        start, count = start + count, 2 * count


# --- All of them ------------------------------------------------------------------------------------------------------


def report(done: Sequence[tuple[WorkItem, WorkResult]]) -> str:
    """The share killed, by module, and the survivors."""
    killed, total, survivors = Counter[str](), Counter[str](), []
    for item, result in done:
        mutation = item.mutations[0]
        module = str(mutation.module_path.relative_to(ROOT))
        total[module] += 1
        killed[module] += result.test_outcome is not TestOutcome.SURVIVED
        if result.test_outcome is TestOutcome.SURVIVED:
            survivors.append(f"{module}:{mutation.start_pos[0]}  {result.output}\n{result.diff}")
    lines = [f"{killed[module]:>4} of {total[module]:>4}  {module}" for module in sorted(total)]
    lines = [*sorted(survivors), *lines]
    if done:
        share = killed.total() / total.total()
        low, high = binomtest(killed.total(), total.total()).proportion_ci(method="wilson")
        lines.append(
            f"{killed.total()} of {total.total()} mutants killed: {share:.1%}, 95 % interval {low:.1%} to {high:.1%}"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Draws, runs and reports."""
    parser = argparse.ArgumentParser("mutants", description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--sample", type=int, default=100, help="how many mutants; 0 for all (hours)")
    parser.add_argument("--seed", type=int, default=0, help="another seed draws another sample")
    parser.add_argument("--only", default="*", help="modules to mutate, a pattern: 'gradsurgery/rules/*'")
    parser.add_argument("--skip", default="", help="modules not to mutate, likewise")
    parser.add_argument("--again", action="store_true", help="try those that survived again, say after writing tests")
    parser.add_argument("--seconds", type=float, help="of tests for each mutant, if not as in setup.cfg")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop after so long; the next run goes on")
    options = parser.parse_args(arguments)
    end = time.monotonic() + 60 * options.minutes

    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT))
    os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    # All but the mutated module is compiled once.
    sys.dont_write_bytecode, sys.pycache_prefix = False, str(OUT / "compiled")
    OUT.mkdir(parents=True, exist_ok=True)
    parsed = configparser.ConfigParser()
    parsed.read(ROOT / "setup.cfg")
    settings = parsed["mutants"]
    tests, seconds = settings["tests"].split(), options.seconds or settings.getfloat("seconds")

    library = digested([ROOT / "gradsurgery"])
    drawn = f"{options.sample}-{options.seed}-{digested([], options.only + options.skip)}"
    with use_db(str(OUT / f"{library}-{drawn}.sqlite")) as db:
        if not db.num_work_items:
            paths = sorted(path for line in settings["modules"].split() for path in ROOT.glob(line))
            names = [str(path.relative_to(ROOT)) for path in paths]
            wanted = [name for name in names if fnmatch(name, options.only) and not fnmatch(name, options.skip)]
            population = {module: list(mutations(module)) for module in wanted}
            print(f"{sum(map(len, population.values()))} mutants of {len(wanted)} modules", flush=True)
            sample = sampled(population, options.sample or sys.maxsize, options.seed)
            db.add_work_items([WorkItem.single(f"{place:05}", mutation) for place, mutation in enumerate(sample)])
        survived = [item for item, result in db.completed_work_items if result.test_outcome is TestOutcome.SURVIVED]
        waiting = sorted(db.pending_work_items, key=lambda item: item.job_id) + (survived if options.again else [])
        if waiting:
            preload(tests)
            found = reached(tests, library)
        for place, item in enumerate(waiting, 1):
            if time.monotonic() > end:
                break
            start, mutation = time.monotonic(), item.mutations[0]
            result = tried(mutation, found, settings["imported"].split(), seconds)
            db.set_result(item.job_id, result)
            where = f"{mutation.module_path.relative_to(ROOT)}:{mutation.start_pos[0]}"
            spent = f"{time.monotonic() - start:.1f} s"
            print(f"{place}/{len(waiting)} {result.test_outcome.value} {spent} {where}", flush=True)
        print(report(db.completed_work_items))


if __name__ == "__main__":
    main()
