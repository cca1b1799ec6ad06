import dataclasses
import io
import json
import lzma
import re
import tarfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

import gradsurgery as gs
from examples.multilingual_translation import cost, fetch, jobs, page, plan, sources, study, tables, train
from examples.multilingual_translation.__main__ import main
from examples.multilingual_translation.corpus import END, PAD, START, Batches, Recipe, held_out, prepare
from examples.multilingual_translation.hashes import HASHES
from examples.multilingual_translation.languages import LANGUAGES, tasks_of
from examples.multilingual_translation.methods import ABLATIONS, BEST, BILINGUAL, JOINT, METHODS, TABLE_65
from examples.multilingual_translation.model import SIZES, Size, Translator
from examples.multilingual_translation.train import Job, Result, Settings, Trainer, save, scarce, token_losses

RECIPE = Recipe("django", ("fr", "pl", "hi", "tr"), vocabulary=400, longest=20, evaluated=6, cut=(("hi", 100), ("tr", 90)))
SETTINGS = Settings(steps=8, batch=16, warmup=4, save=3, record=1, rate=1e-2)
SMALL = Size(width=16, inner=32, layers=2, heads=2)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def corpus(cache):
    return prepare(RECIPE, cache)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setitem(SIZES, "tiny", SMALL)


def job(method=JOINT, direction="from-en", seed=0, **settings):
    return Job(method, tasks_of(RECIPE.languages, direction), seed, dataclasses.replace(SETTINGS, **settings), RECIPE)


# --- Texts --------------------------------------------------------------------------------------------------------------


def package(path, pages):
    """A Debian package with these HTML pages."""
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        for name, text in pages.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(text.encode())
            tar.addfile(entry, io.BytesIO(text.encode()))
    content = b"!<arch>\n"
    for name, member in (("debian-binary", b"2.0\n"), ("data.tar.xz", lzma.compress(archive.getvalue()))):
        header = f"{name:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(member):<10}`\n".encode()
        content += header + member + b"\n" * (len(member) % 2)
    path.write_bytes(content)


def paragraph(key, text):
    return f'<p id="{key}" class="paragraph" dir="auto">{text}</p>\n'


def test_help_pairs_are_read_from_packages(tmp_path):
    root = "./usr/share/libreoffice/help"
    english = paragraph("par_id1", "Inserts &lt;one&gt; <b>table</b>.") + paragraph("par_id2", "File") + '<p id="x1">No</p>'
    french = paragraph("par_id1", "Insère &lt;un&gt;\n<b>tableau</b>.") + paragraph("par_id2", "File")
    package(tmp_path / f"libreoffice-help-en-us_{fetch.HELP_VERSION}_all.deb", {f"{root}/en-US/text/a.html": english})
    package(
        tmp_path / f"libreoffice-help-fr_{fetch.HELP_VERSION}_all.deb",
        {f"{root}/fr/text/a.html": french, f"{root}/fr/text/b.html": french, f"{root}/fr/a.txt": french},
    )
    expected = sources.Pair("text/a.html", "par_id1", "Inserts <one> table.", "Insère <un> tableau.")
    assert sources.read("help", "fr", tmp_path, check=False) == [expected]
    with pytest.raises(SystemExit, match="texts of 'fr' are not those .* --unchecked"):
        sources.read("help", "fr", tmp_path)


def test_what_is_no_package_says_so(tmp_path):
    path = tmp_path / f"libreoffice-help-fr_{fetch.HELP_VERSION}_all.deb"
    path.write_bytes(b"<html>")
    with pytest.raises(SystemExit, match="is no Debian package. Delete it"):
        sources.read("help", "fr", tmp_path)


def test_a_package_that_cannot_be_had_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(fetch.shutil, "which", lambda name: None)
    monkeypatch.setattr(fetch, "MIRROR", (tmp_path / "nowhere").as_uri())
    with pytest.raises(SystemExit, match="(?s)libreoffice-help-fr .* there is no apt-get.*--source django"):
        sources.read("help", "fr", tmp_path)


def test_cleaning_leaves_out_what_is_not_translated():
    def kept(code, english, text):
        return [pair.text for pair in sources.clean([sources.Pair("d", "k", english, text)], LANGUAGES[code])]

    assert kept("fr", "Not equal", " Diffe\u0301rent ") == ["Différent"]
    assert kept("fr", "File", "file") == []
    assert kept("hi", "The next page", "अगला पृष्ठ") == ["अगला पृष्ठ"]
    assert kept("hi", "The next page", "The next page अ") == []
    assert kept("fr", "Click the next page and print", "Click the next page et imprimer") == []
    assert kept("fr", "A sentence of some length", "Oui") == []
    assert kept("fr", "100", "cent") == []


def test_every_language_of_the_packages_has_a_hash():
    for source, hashes in HASHES.items():
        assert set(hashes) == set(sources.languages_of(source))
    families = {LANGUAGES[code].family for code in HASHES["help"]}
    assert len(HASHES["help"]) >= 12
    assert len(families) >= 5


def test_documents_and_texts_are_held_out(corpus):
    parts = {part: set() for part in ("train", "valid", "test")}
    for part, found in parts.items():
        for pairs in getattr(corpus, part).values():
            found |= {tuple(ids) for side in pairs for ids in side}
    assert not parts["train"] & (parts["valid"] | parts["test"])
    assert not {tuple(ids) for ids in corpus.aligned["en"]} & parts["train"]
    aligned = corpus.vocabulary.decode(corpus.aligned["en"])
    assert aligned != sorted(aligned)  # a few of the first are of many documents
    assert {held_out(f"document {i}") for i in range(200)} == {None, "valid", "test"}
    assert len(corpus.train["hi"].text) == 100
    assert len(corpus.train["fr"].text) > 200
    assert scarce(corpus, ("en-fr", "en-hi", "tr-en")) == ["en-hi", "tr-en"]


def test_a_corpus_is_the_same_from_the_cache(corpus, cache):
    again = prepare(RECIPE, cache)
    assert again.fingerprint == corpus.fingerprint
    for name in ("train", "valid", "test", "references", "aligned"):
        assert json.dumps(getattr(again, name)) == json.dumps(getattr(corpus, name)), name


def test_texts_survive_encoding(corpus):
    found = corpus.decode(torch.tensor([[*corpus.test["hi"].text[0], END, PAD]]))
    assert found == [corpus.references["test"]["hi"][0][1]]


def test_batches_have_their_tags_and_are_the_same_anywhere(corpus):
    tasks = tasks_of(RECIPE.languages, "both")
    settings = {"size": 32, "temperature": 5.0, "seed": 1, "pool": 4}
    batches, again = Batches(corpus, tasks, **settings), Batches(corpus, tasks, **settings)
    found = [batches[step] for step in range(6)]
    for step in (5, 0, 3):
        assert all(torch.equal(*pair) for pair in zip(again[step], found[step], strict=True))
    for batch in found:
        assert batch.tasks.equal(batch.tasks.sort().values)
        assert (batch.target[:, 0] == START).all()
        for tag, task in zip(batch.source[:, 0].tolist(), batch.tasks.tolist(), strict=True):
            assert corpus.vocabulary.id_to_piece(tag) == f"<2{tasks[task].partition('-')[2]}>"
    others = Batches(corpus, tasks, **{**settings, "seed": 2})
    assert not torch.equal(others[0].source, found[0].source)


def test_sampling_follows_the_temperature(corpus):
    tasks = tasks_of(RECIPE.languages, "from-en")
    counts = torch.tensor([len(corpus.train[code].text) for code in RECIPE.languages], dtype=torch.float64)
    for temperature in (1.0, 5.0):
        batches = Batches(corpus, tasks, size=500, temperature=temperature, seed=0)
        expected = (counts / counts.sum()) ** (1 / temperature)
        expected /= expected.sum()
        drawn = sum(batches[step].tasks.bincount(minlength=4) for step in range(8)) / 4000
        torch.testing.assert_close(drawn.double(), expected, atol=0.04, rtol=0)  # five standard deviations


# --- The model ----------------------------------------------------------------------------------------------------------


def test_padding_changes_nothing_and_nothing_looks_ahead():
    torch.manual_seed(0)
    model = Translator(20, SMALL).eval()
    source, target = torch.randint(4, 20, (3, 7)), torch.randint(4, 20, (3, 6))
    scores = model(source, target)
    padded = torch.nn.functional.pad(source, (0, 3), value=PAD)
    torch.testing.assert_close(model(padded, target), scores, atol=1e-5, rtol=1e-5)
    changed = target.clone()
    changed[:, 4] = (changed[:, 4] - 3) % 16 + 4
    torch.testing.assert_close(model(source, changed)[:, :4], scores[:, :4])
    assert not torch.allclose(model(source, changed)[:, 4:], scores[:, 4:])


def test_greedy_decoding_takes_the_best_symbol():
    torch.manual_seed(0)
    model = Translator(12, SMALL).eval()
    source = torch.randint(4, 12, (3, 5))
    decoded = model.translate(source)
    target = torch.cat([torch.full((3, 1), START), decoded], 1)
    best = model(source, target[:, :-1]).argmax(-1)
    for row, expected in zip(decoded.tolist(), best.tolist(), strict=True):
        length = row.index(END) + 1 if END in row else len(row)
        assert row[:length] == expected[:length]


def test_the_single_pass_is_right_on_this_model(corpus):
    torch.manual_seed(0)
    model = Translator(corpus.size, dataclasses.replace(SMALL, dropout=0.0)).double()
    batch = Batches(corpus, tasks_of(RECIPE.languages, "both"), size=24, temperature=5.0, seed=0)[0]

    class Losses(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, indices):
            return token_losses(self.model, batch._replace(source=batch.source[indices], target=batch.target[indices]))

    report = gs.testing.check_split(Losses(), torch.arange(24), batch.tasks)
    assert report


def test_layers_are_surgery_groups(corpus):
    groups = Trainer(job(), corpus).optimizer.groups
    assert set(groups) >= {"embedding", "encoder.0", "encoder.1", "decoder.0", "decoder.1"}
    halves = Trainer(job("GradVac, enc_dec"), corpus).optimizer.groups
    assert set(halves) == {"encoder", "decoder"}


# --- Training -----------------------------------------------------------------------------------------------------------


def test_joint_training_is_plain_training(corpus):
    trainer = Trainer(job(), corpus)
    torch.manual_seed(0)
    model = Translator(corpus.size, SMALL, longest=2 * RECIPE.longest + 16)
    adam = torch.optim.Adam(model.parameters(), betas=(0.9, 0.98))
    losses = []
    for step in range(3):
        adam.param_groups[0]["lr"] = SETTINGS.rate_at(step)
        batch = trainer.batches[step]
        loss = token_losses(model, batch, 0.1).sum() / (batch.target[:, 1:] != PAD).sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adam.step()
        adam.zero_grad()
        losses.append(loss.item())
    Trainer(job(), corpus)  # draws random numbers, and must not matter
    trainer = Trainer(job(), corpus)
    assert [trainer.advance() for _ in range(3)] == pytest.approx(losses, rel=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains(method, corpus):
    its = dataclasses.replace(job(method), tasks=("en-fr",)) if method == BILINGUAL else job(method)
    trainer = Trainer(its, corpus)
    losses = [trainer.advance() for _ in range(6)]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("GradVac, fixed_obj", {"en-hi", "en-tr"}),
        ("GradVac, all_layer", {"en-hi", "en-tr"}),
        ("GradVac, HRL_only", {"en-fr", "en-pl"}),
        ("GradVac, all_task", {"en-fr", "en-pl", "en-hi", "en-tr"}),
    ],
)
def test_gradvac_operates_on_the_tasks_of_its_name(method, expected, corpus):
    trainer = Trainer(job(method, batch=32), corpus)
    for _ in range(12):
        trainer.advance()
    operated = trainer.result.recorder.operated.any((0, 1)).any(1)
    assert {task for task, some in zip(trainer.job.tasks, operated, strict=True) if some} == expected


@pytest.mark.parametrize(
    ("method", "stop"),
    [("GradVac, all_layer", 1), ("GradVac, all_layer", 4), ("PCGrad", 7), ("GradNorm", 5), (BILINGUAL, 4)],
)
def test_an_interrupted_run_ends_the_same(method, stop, corpus, tmp_path):
    its = dataclasses.replace(job(method), tasks=("en-fr",)) if method == BILINGUAL else job(method)
    whole = Trainer(its, corpus).run()

    class Interrupted(Exception):
        pass

    calls = []

    def interrupt(loss):
        calls.append(loss)
        if len(calls) == stop:
            raise Interrupted

    with pytest.raises(Interrupted):
        Trainer(its, corpus, tmp_path).run(interrupt)
    torch.manual_seed(99)
    trainer = Trainer(its, corpus, tmp_path)
    assert trainer.step == 3 * ((stop - 1) // 3)  # a checkpoint at each third step, written after the interruption
    again = trainer.run()
    assert again.training == whole.training
    assert (again.loss, again.bleu, again.chrf, again.texts) == (whole.loss, whole.bleu, whole.chrf, whole.texts)
    assert again.weights == pytest.approx(whole.weights, nan_ok=True)
    for name in ("steps", "cosines", "operated", "losses"):
        one, other = (torch.from_numpy(getattr(run.recorder, name)) for run in (again, whole))
        torch.testing.assert_close(one, other, atol=0, rtol=0, equal_nan=True)
    read = Result.read(tmp_path)
    assert read.bleu == whole.bleu
    assert read.recorder.conflict_rate() == pytest.approx(whole.recorder.conflict_rate(), nan_ok=True)


def test_no_model_of_the_study_is_missing_after_an_interruption(corpus, tmp_path, monkeypatch):
    written = []

    def failing(content, path):
        written.append(path)
        if len(written) == 2:
            raise KeyboardInterrupt
        save(content, path)

    with monkeypatch.context() as patch:
        patch.setattr(train, "save", failing)
        with pytest.raises(KeyboardInterrupt):
            Trainer(job(keep=3), corpus, tmp_path).run()
    Trainer(job(keep=3), corpus, tmp_path).run()
    assert sorted(path.name for path in tmp_path.glob("model-*")) == ["model-0000003.pt", "model-0000006.pt"]


def test_losses_of_tasks_are_what_their_method_wants(corpus):
    batch = Trainer(job(), corpus).batches[0]
    losses, tokens = torch.rand(batch.target[:, 1:].shape) * (batch.target[:, 1:] != PAD), batch.target[:, 1:] != PAD
    means = {
        task: losses[batch.tasks == task].sum() / tokens[batch.tasks == task].sum()
        for task in batch.tasks.unique().tolist()
    }
    expected = {"GradNorm": {task: mean / len(means) for task, mean in means.items()}, "MGDA": means}
    for method, its in expected.items():
        weighted = losses * train.factors(tokens.sum(1), batch.tasks, 4, METHODS[method].loss)
        found = {task: weighted[batch.tasks == task].sum() for task in means}
        torch.testing.assert_close(found, its)
    shared = losses * train.factors(tokens.sum(1), batch.tasks, 4, METHODS[JOINT].loss)
    torch.testing.assert_close(shared.sum(), losses.sum() / tokens.sum())
    first = {method: Trainer(job(method), corpus).advance() for method in (JOINT, *expected)}
    assert first == pytest.approx(dict.fromkeys(first, first[JOINT]))  # the mean over all tokens, whatever is stepped on


def test_a_checkpoint_of_other_texts_is_an_error(corpus, tmp_path):
    trainer = Trainer(job(), corpus)
    trainer.advance()
    save({**trainer.state_dict(), "corpus": "other"}, tmp_path / "checkpoint.pt")
    with pytest.raises(SystemExit, match="was made with other texts"):
        Trainer(job(), corpus, tmp_path)


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    save({"a": 1}, tmp_path / "file")
    with pytest.raises(Exception, match="pickle"):
        save({"a": lambda: None}, tmp_path / "file")
    assert torch.load(tmp_path / "file") == {"a": 1}
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


# --- Loss geometry ------------------------------------------------------------------------------------------------------


def test_geometry_is_that_of_a_backward_pass_for_each_task(corpus):
    torch.manual_seed(0)
    model = Translator(corpus.size, SMALL).double()
    tasks = tasks_of(RECIPE.languages, "both")
    found = study.geometry(model, corpus, tasks, count=5, size=2)
    assert all(parameter.grad is None for parameter in model.parameters())
    rows = {}
    for task in tasks:
        pairs = corpus.pairs("aligned", task)
        batch = corpus.batch((task,), [(0, a, b) for a, b in zip(pairs.english[:5], pairs.text[:5], strict=True)])
        loss = token_losses(model, batch).sum() / (batch.target[:, 1:] != PAD).sum()
        grads = torch.autograd.grad(loss, list(model.parameters()))
        rows[task] = dict(zip([name for name, _ in model.named_parameters()], grads, strict=True))
    for c, group in enumerate(found.groups):
        its = [name for name in rows[tasks[0]] if name.startswith(f"{group}.")]
        jacobian = torch.stack([torch.cat([rows[task][name].flatten() for name in its]) for task in tasks])
        expected = jacobian @ jacobian.T
        norms = expected.diagonal().sqrt()
        expected = (expected / norms / norms[:, None]).fill_diagonal_(torch.nan)
        torch.testing.assert_close(found.cosines[c], expected, equal_nan=True, atol=1e-6, rtol=1e-6)


def test_families_against_chance():
    families = ["x", "x", "x", "y", "y", "y", "z"]
    random = np.random.default_rng(0)
    noise = random.normal(size=(7, 7)) * 0.01
    same = np.equal.outer(families, families)
    clustered = np.where(same, 0.5, 0.1) + noise + noise.T
    np.fill_diagonal(clustered, np.nan)
    difference, correlation, p = study.permutation_test(clustered, families, times=499)
    within = [clustered[i, j] for i in range(7) for j in range(i) if families[i] == families[j]]
    between = [clustered[i, j] for i in range(7) for j in range(i) if families[i] != families[j]]
    assert difference == pytest.approx(np.mean(within) - np.mean(between))
    assert correlation > 0.9
    # Of 7!/(3! 3!) = 140 ways to have the same families, two do not tell x from y.
    assert 2 / 500 < p < 0.05
    flat = noise + noise.T
    np.fill_diagonal(flat, np.nan)
    assert study.permutation_test(flat, families, times=199)[2] > 0.05
    assert np.isnan(study.permutation_test(clustered, list("abcdefg"))).all()


def test_similarity_against_performance(corpus):
    model = Translator(corpus.size, SMALL)
    runs = {}
    for number, code in enumerate(("pl", "hi", "tr")):
        recorder = gs.Recorder()
        recorder.record(study.geometry(model, corpus, ("en-fr", f"en-{code}"), count=4), 0)
        runs[f"en-{code}"] = (recorder, float(number))
    table, correlation, p = study.against_performance(runs)
    cosines = [float(row.split("|")[3]) for row in table.splitlines()[2:]]
    assert cosines == sorted(cosines, reverse=True)
    assert -1 <= correlation <= 1
    assert 0 <= p <= 1
    assert np.isnan(study.against_performance({"en-pl": runs["en-pl"]})[1])


# --- Tables -------------------------------------------------------------------------------------------------------------


def test_the_runs_of_the_tables():
    scale = jobs.SCALES["tiny"]
    runs = jobs.table_jobs(scale, range(3))
    assert len(runs) == len(set(runs)) == 3 * 2 * (4 + len(TABLE_65) - 1)
    assert len({run.name for run in runs}) == len(runs)
    extra = set(jobs.ablation_jobs(scale, range(3))) - set(runs)
    assert {run.method for run in extra} == {m for rows in ABLATIONS.values() for m in rows} - set(TABLE_65)
    longer = jobs.longer_jobs(scale, range(3))
    assert {run.method for run in set(longer) & set(runs)} == {BILINGUAL}
    of_seed = [run for run in longer if run.seed == 0]
    together = sum(run.settings.steps for run in of_seed if run.method == BILINGUAL)
    assert {run.settings.steps for run in of_seed if run.method != BILINGUAL} == {together}
    massive, study = jobs.massive_jobs(scale, range(1)), jobs.study_jobs(scale, range(1))
    assert len(set(massive) & set(study)) == 2  # joint training with T=5 serves both


@pytest.fixture
def in_process(monkeypatch):
    """Runs are done here, not in processes of their own."""

    def here(todo, out, cache, *, processes, device, check):
        for run in todo:
            if Result.read(jobs.folder_of(run, out)) is None:
                jobs.run_one(run, out, cache, device, check)

    monkeypatch.setattr("examples.multilingual_translation.__main__.run_all", here)
    monkeypatch.setattr(study, "pooled", lambda perform, todo, processes: [perform(job) for job in todo])


@pytest.fixture
def few(in_process, monkeypatch):
    """Three methods in one direction."""
    chosen = (BILINGUAL, JOINT, BEST)
    for module in (jobs, tables):
        monkeypatch.setattr(module, "TABLE_65", chosen)
        monkeypatch.setattr(module, "DIRECTIONS", ("from-en",))
        monkeypatch.setattr(module, "LONGER", chosen[1:])
    monkeypatch.setattr(jobs.table_jobs, "__defaults__", (("from-en",),))
    return chosen


def test_the_command_makes_the_table_and_goes_on_where_it_was(few, tmp_path, cache, capsys, monkeypatch):
    out = tmp_path / "out"
    arguments = ["table", "--quick", "--steps", "2", "--source", "django", "--cache", str(cache), "--out", str(out)]
    main(arguments)
    printed = capsys.readouterr().out
    assert all(f"| {method} |" in printed for method in few)
    assert tables.NOT_RUN not in printed
    assert "paired bootstrap" in printed
    before = {path: path.stat().st_mtime_ns for path in out.glob("runs/*/*")}
    assert sum(path.name == "result.json" for path in before) == 6
    assert not any(path.name == "checkpoint.pt" for path in before)
    main(arguments)
    assert {path: path.stat().st_mtime_ns for path in out.glob("runs/*/*")} == before
    main(["longer", *arguments[1:]])
    printed = capsys.readouterr().out
    assert all(f"| {method} |" in printed for method in few)
    assert tables.NOT_RUN not in printed
    assert sum(1 for _ in out.glob("runs/*/result.json")) == 8  # the bilingual models are those of the table
    monkeypatch.setattr(plan, "measured", lambda *_, **__: plan.Times(start=0, step=0.5, evaluation=2, geometry=100))
    main([*arguments, "--plan", "--seeds", "2"])
    # Two steps of half a second each, and two seconds for each task's evaluation, of which the six runs have twelve.
    assert "6 runs are left: 0.5 minutes of one process, 0.2 of 2" in capsys.readouterr().out


def test_study_and_page(in_process, tmp_path, cache, capsys, monkeypatch):
    monkeypatch.setattr(jobs, "languages_of", lambda source: ("fr", "es", "ru"))
    monkeypatch.setattr(study, "SENTENCES", 8)
    out = tmp_path / "out"
    arguments = ["--quick", "--steps", "2", "--source", "django", "--cache", str(cache), "--out", str(out)]
    with pytest.raises(SystemExit, match="Nothing has been run in .* run a part first"):
        main(["report", *arguments])
    main(["study", *arguments])
    printed = capsys.readouterr().out
    for name in ("En→Any", "Any→En", "Any→Any", "En→Any, small batches"):
        for tasks in ("xx-en",) if name == "Any→En" else ("en-xx", "xx-en") if name == "Any→Any" else ("en-xx",):
            for part in ("encoder", "decoder"):
                assert f"| Django's messages, {name}, seed 0 | {tasks} | {part} |" in printed
    main(["trilingual", *arguments])
    assert "Rank correlation" in capsys.readouterr().out
    kept = {path: path.stat().st_mtime_ns for path in out.glob("runs/*/*")}
    main(["report", *arguments])
    assert {path: path.stat().st_mtime_ns for path in out.glob("runs/*/*")} == kept
    found = (out / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"(src|href)=\"(?!data:|#)|url\((?!#)|@import", found)  # nothing is loaded
    assert found.count("<svg") == 4 * 5
    assert found.count("<details") == 4
    for link in re.findall(r'href="#([^"]*)"', found):
        assert found.count(f'id="{link}"') == 1, link
    assert "currentColor" in found
    assert "#0a0b0c" not in found
    assert tables.NOT_RUN in found  # the table of methods
    assert "python -m examples.multilingual_translation all --quick --steps 2 --source django --seed 0 --seeds 1" in found
    assert f"torch {torch.__version__}" in found
    assert "6 of 44 runs; seeds 0" in found
    assert "Not measured yet" in found  # the cost


def test_tables_become_html():
    text = "**A** < B\n\n| x | y | z |\n|---|--:|--:|\n| 1 |  | < |"
    assert page.html(text).replace("\n", "") == (
        '<p><b>A</b> &lt; B</p><div class="table"><table><thead><tr><th class="words">x</th><th>y</th><th>z</th></tr>'
        '</thead><tbody><tr><td class="words">1</td><td></td><td>&lt;</td></tr></tbody></table></div>'
    )
    assert page.html("**A, b**\n\n1.20 ± 0.10 `x`") == (
        '<h3>A, b</h3>\n<p>1.20<span class="pm"> ± 0.10</span> <code>x</code></p>'
    )


def test_the_best_of_a_column_is_bold():
    scores = {JOINT: [1.0, 3.0], BEST: [2.0, 1.0], BILINGUAL: [9.0, 9.0]}
    tasks = ("en-fr", "en-pl")
    results = {}
    for method, values in scores.items():
        for its in [(task,) for task in tasks] if method == BILINGUAL else [tasks]:
            run = dataclasses.replace(job(method), tasks=its)
            results[run] = Result({}, "", bleu={task: values[tasks.index(task)] for task in its})
    rows = tables.scores(results, tuple(scores), tasks, tables.SCORES["BLEU"]).splitlines()[2:]
    assert rows == [
        f"| {JOINT} | 1.00 | **3.00** | **2.00** |  | 1 |",
        f"| {BEST} | **2.00** | 1.00 | 1.50 | -0.50 | 1 |",
        f"| {BILINGUAL} | 9.00 | 9.00 | 9.00 | 7.00 | 1 |",
    ]


def test_times_are_measured(corpus, cache, monkeypatch):
    monkeypatch.setattr(plan, "_POOL", 1)
    times = plan.timed(job(), cache, "cpu", True, True)
    assert all(seconds > 0 for seconds in times)
    assert plan.timed(job(), cache, "cpu", True, False).geometry == 0


def test_an_error_waits_for_no_more_runs(monkeypatch, tmp_path, cache):
    begun, first = [], threading.Event()

    def one(run, **_):
        begun.append(run)
        if len(begun) == 1:
            first.wait(10)
            raise RuntimeError("no disk")
        first.set()
        return 0.0

    monkeypatch.setattr(jobs, "ProcessPoolExecutor", lambda processes, **_: ThreadPoolExecutor(processes))
    monkeypatch.setattr(jobs, "run_one", one)
    wanted = [job(seed=seed) for seed in range(50)]
    with pytest.raises(RuntimeError, match="no disk"):
        jobs.run_all(wanted, tmp_path, cache, processes=2, device="cpu", check=True)
    assert len(begun) < 50


def test_costs_are_of_the_same_batches(corpus, cache, tmp_path, monkeypatch, capsys):
    ways = (cost.PLAIN, JOINT)
    monkeypatch.setattr(cost, "WAYS", ways)
    monkeypatch.setattr(jobs, "languages_of", lambda source: ("fr", "pl"))
    monkeypatch.setattr(cost.memory, "elsewhere", lambda module, its: cost.peak(json.loads(json.dumps(its))))
    with monkeypatch.context() as patch:
        seen = []
        patch.setattr(cost, "gradients", lambda way, trainer, batch: seen.append((way, batch)))
        turns = cost.Turns({way: cost.trainer_of(way, corpus, SETTINGS, seed=0) for way in ways})
        for contender in 2 * list(turns.contenders().values()):
            contender.before()
            contender.run()
        assert [way for way, _ in seen] == [*ways, *ways]
        assert seen[0][1] is seen[1][1]
        assert seen[2][1] is seen[3][1] is not seen[0][1]
        patch.setitem(SIZES, "tiny", dataclasses.replace(SMALL, dropout=0.0))
        found = {way: cost.trainer_of(way, corpus, SETTINGS, seed=0) for way in ways}
        cost.plain(found[cost.PLAIN], seen[0][1])
        found[JOINT].gradients(seen[0][1])
        for one, other in zip(*(trainer.model.parameters() for trainer in found.values()), strict=True):
            torch.testing.assert_close(one.grad, other.grad)
    arguments = ["cost", "--quick", "--source", "django", "--repeats", "2", "--cache", str(cache), "--out", str(tmp_path)]
    main([*arguments, "--threads", "1"])
    assert "2 directions" in capsys.readouterr().out
    costs = cost.Costs.read(tmp_path)
    assert {way: len(seconds) for way, seconds in costs.seconds.items()} == dict.fromkeys(ways, 2)
    for way in ways:
        assert f"| {way} |" in costs.table


def test_options_must_make_sense(capsys):
    with pytest.raises(SystemExit):
        main(["--seeds", "0"])
    assert "--seeds must be at least 1. Found 0." in capsys.readouterr().err


def test_the_cache_is_the_users(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert fetch.cache_folder() == Path(tmp_path) / "gradsurgery" / "multilingual_translation"
