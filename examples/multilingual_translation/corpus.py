"""A corpus: split by document, with a vocabulary, as ids; and batches that mix all tasks."""

from __future__ import annotations

import hashlib
import io
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import sentencepiece
import torch
from torch import Tensor

from .languages import LANGUAGES, other
from .sources import Pair, read

PAD, START, END, UNKNOWN = range(4)

_FORMAT = 2  # of prepared files


@dataclass(frozen=True)
class Recipe:
    """What a corpus is made of.

    Attributes:
        source: ``"help"``, ``"verses"`` or ``"django"``.
        languages: codes, in order.
        vocabulary: at most so many pieces, shared by all languages and both sides.
        longest: training and evaluation pairs with more pieces than this on a side are left out.
        evaluated: at most so many pairs of each language to validate with, and as many to test with.
        cut: language → at most so many training pairs, to make a language scarce that is not.
    """

    source: str = "help"
    languages: tuple[str, ...] = ("fr", "cs", "hi", "tr")
    vocabulary: int = 4000
    longest: int = 40
    evaluated: int = 200
    cut: tuple[tuple[str, int], ...] = ()

    @property
    def hash(self) -> str:
        """Names the recipe."""
        return hashlib.sha256(json.dumps([_FORMAT, asdict(self)]).encode()).hexdigest()[:12]


class Part(NamedTuple):
    """Pairs as ids, without special symbols: ``english[i]`` and ``text[i]`` are arrays of ids."""

    english: Sequence[Sequence[int]]
    text: Sequence[Sequence[int]]


class Batch(NamedTuple):
    """A mixed batch; its samples are ordered by task.

    Attributes:
        source: ``[B, S]``, ids: the tag of the target language, the text, the end; padded.
        target: ``[B, T]``, ids: the start, the text, the end; padded.
        tasks: ``[B]``, indices of tasks, on the CPU.
    """

    source: Tensor
    target: Tensor
    tasks: Tensor

    def to(self, device: torch.device | str) -> Batch:
        """The same, with the texts on a device."""
        return Batch(self.source.to(device), self.target.to(device), self.tasks)


@dataclass(frozen=True)
class Corpus:
    """Training, validation and test pairs of each language.

    Attributes:
        recipe: what it was made from.
        train: language → pairs; no text of theirs, in either language, is in a held-out document.
        valid: language → pairs from held-out documents.
        test: language → pairs from other held-out documents.
        references: ``"valid"`` or ``"test"`` → language → the texts of those pairs.
        aligned: held-out texts that all languages have: English under ``"en"``, and each language's, row by row.
        pieces: the vocabulary, as a serialized SentencePiece model.
    """

    recipe: Recipe
    train: Mapping[str, Part]
    valid: Mapping[str, Part]
    test: Mapping[str, Part]
    references: Mapping[str, Mapping[str, Sequence[tuple[str, str]]]]
    aligned: Mapping[str, Sequence[Sequence[int]]]
    pieces: bytes

    @cached_property
    def vocabulary(self) -> sentencepiece.SentencePieceProcessor:
        """Texts to ids and back."""
        return sentencepiece.SentencePieceProcessor(model_proto=self.pieces)

    @property
    def size(self) -> int:
        """Of the vocabulary."""
        return int(self.vocabulary.vocab_size())

    def pairs(self, part: str, task: str) -> Part:
        """The pairs of a task, sources under ``english`` where it translates from English, else turned around."""
        language = other(task)
        if part == "aligned":
            found = Part(self.aligned["en"], self.aligned[language])
        else:
            found = {"train": self.train, "valid": self.valid, "test": self.test}[part][language]
        return found if task.startswith("en-") else Part(found.text, found.english)

    def batch(self, tasks: Sequence[str], picks: Sequence[tuple[int, Sequence[int], Sequence[int]]]) -> Batch:
        """Makes a batch of ``(task, source, target)``, ordered by task."""
        picks = sorted(picks, key=lambda pick: pick[0])
        tags = [self.vocabulary.piece_to_id(_tag(task.partition("-")[2])) for task in tasks]
        source = [[tags[task], *ids, END] for task, ids, _ in picks]
        target = [[START, *ids, END] for _, _, ids in picks]
        return Batch(_padded(source), _padded(target), torch.tensor([task for task, _, _ in picks]))

    def decode(self, rows: Tensor) -> list[str]:
        """``[B, T]`` → texts, up to the end symbol."""
        found = []
        for row in rows.tolist():
            row = row[: row.index(END)] if END in row else row
            found.append(self.vocabulary.decode([i for i in row if i > UNKNOWN]))
        return found

    @property
    def fingerprint(self) -> str:
        """Of the vocabulary and all numbers of pairs: two corpora that differ give runs that cannot be compared."""
        found = hashlib.sha256(self.pieces)
        for part in (self.train, self.valid, self.test):
            for language, pairs in part.items():
                found.update(f"{language} {len(pairs.english)} {sum(map(len, pairs.text))};".encode())
        return found.hexdigest()[:12]


def held_out(document: str, share: float = 0.05) -> str | None:
    """``"valid"`` or ``"test"`` for a ``share`` of documents each, by their name alone; None for those to train on."""
    place = int.from_bytes(hashlib.sha256(document.encode()).digest()[:4], "big") / 2**32
    return "valid" if place < share else "test" if place < 2 * share else None


def prepare(recipe: Recipe, cache: Path, *, check: bool = True) -> Corpus:
    """Reads, splits and encodes a corpus, or reads it from the cache.

    Raises:
        Unavailable: if a package cannot be had, or its texts are others.
    """
    pairs = {code: read(recipe.source, code, cache, check=check) for code in recipe.languages}
    kept = cache / f"prepared-{recipe.hash}-{_digest(pairs)}.pt"
    if kept.exists():
        return _loaded(recipe, torch.load(kept, weights_only=True))
    return _make(recipe, pairs, kept)


def _make(recipe: Recipe, pairs: Mapping[str, Sequence[Pair]], kept: Path | None) -> Corpus:
    share = 0.15 if recipe.source == "django" else 0.05
    apart = {code: {part: [] for part in ("valid", "test", None)} for code in pairs}
    for code, found in pairs.items():
        for pair in found:
            apart[code][held_out(pair.document, share)].append(pair)
    out = {pair[side].casefold() for of in apart.values() for p in ("valid", "test") for pair in of[p] for side in (2, 3)}
    train: dict[str, list[Pair]] = {}
    for code, of in apart.items():
        train[code] = [pair for pair in of[None] if not {pair.english.casefold(), pair.text.casefold()} & out]
        train[code].sort(key=_shuffled)
    pieces = _train_vocabulary(recipe, train)
    vocabulary = sentencepiece.SentencePieceProcessor(model_proto=pieces)
    parts: dict[str, dict[str, Part]] = {"train": {}, "valid": {}, "test": {}}
    references: dict[str, dict[str, list[tuple[str, str]]]] = {"valid": {}, "test": {}}
    for code, of in apart.items():
        for part, found in (("train", train[code]), ("valid", of["valid"]), ("test", of["test"])):
            if part != "train":
                found = sorted({pair.english: pair for pair in found}.values(), key=_shuffled)
            english, text = (_encode(vocabulary, [pair[side] for pair in found]) for side in (2, 3))
            short = [i for i, (a, b) in enumerate(zip(english, text, strict=True)) if max(len(a), len(b)) <= recipe.longest]
            short = short[: dict(recipe.cut).get(code) if part == "train" else recipe.evaluated]
            if part != "train":
                references[part][code] = [(found[i].english, found[i].text) for i in short]
            parts[part][code] = Part([english[i] for i in short], [text[i] for i in short])
    corpus = Corpus(recipe, **parts, references=references, aligned=_aligned(recipe, apart, vocabulary), pieces=pieces)
    for part in ("train", "valid", "test"):
        if empty := [code for code, found in parts[part].items() if not found.english]:
            raise SystemExit(f"Nothing is left of {', '.join(empty)} to {part} with: {recipe}.")
    if kept is not None:
        _save(corpus, kept)
    return corpus


def _aligned(
    recipe: Recipe,
    apart: Mapping[str, Mapping[str | None, Sequence[Pair]]],
    vocabulary: sentencepiece.SentencePieceProcessor,
) -> dict[str, list[list[int]]]:
    """Texts of held-out documents that all languages have, in an order that mixes documents: the first are a sample."""
    of = {code: {pair[:3]: pair for part in ("valid", "test") for pair in found[part]} for code, found in apart.items()}
    common = sorted(set.intersection(*map(set, of.values())))
    places = list({place[2]: place for place in common}.values())  # each English text once
    places.sort(key=lambda place: hashlib.sha256(place[2].encode()).digest())
    rows = {"en": _encode(vocabulary, [english for _, _, english in places])}
    for code, found in of.items():
        rows[code] = _encode(vocabulary, [found[place].text for place in places])
    short = [i for i in range(len(places)) if all(len(ids[i]) <= recipe.longest for ids in rows.values())]
    return {code: [ids[i] for i in short] for code, ids in rows.items()}


def _train_vocabulary(recipe: Recipe, train: Mapping[str, Sequence[Pair]]) -> bytes:
    """Of the training pairs, each language's share as of sampling with T=5, so that scarce ones get pieces too."""
    most = max(map(len, train.values()))
    texts: list[str] = []
    for pairs in train.values():
        wanted = round(most * (len(pairs) / most) ** 0.2) if pairs else 0
        repeated = [pairs[i % len(pairs)] for i in range(min(wanted, 200_000 // len(train)))]
        texts += [text for pair in repeated for text in (pair.english, pair.text)]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=model,
        vocab_size=recipe.vocabulary,
        hard_vocab_limit=False,  # a small corpus has fewer pieces
        character_coverage=0.9995,
        pad_id=PAD,
        bos_id=START,
        eos_id=END,
        unk_id=UNKNOWN,
        user_defined_symbols=[_tag(code) for code in ("en", *LANGUAGES)],
        num_threads=1,  # the sums of several would be in another order each time
        minloglevel=2,
    )
    return model.getvalue()


def _tag(language: str) -> str:
    return f"<2{language}>"


def _encode(vocabulary: sentencepiece.SentencePieceProcessor, texts: list[str]) -> list[list[int]]:
    return vocabulary.encode(texts) if texts else []


def _shuffled(pair: Pair) -> str:
    """A random order that is always the same."""
    return hashlib.sha256("\0".join(pair).encode()).hexdigest()


def _padded(rows: Sequence[Sequence[int]]) -> Tensor:
    width = max(map(len, rows))
    return torch.tensor([[*row, *[PAD] * (width - len(row))] for row in rows])


# --- The cache --------------------------------------------------------------------------------------------------------


def _digest(pairs: Mapping[str, Sequence[Pair]]) -> str:
    found = hashlib.sha256()
    for code, of in pairs.items():
        found.update(f"{code} {len(of)} {sum(len(pair.text) for pair in of)};".encode())
    return found.hexdigest()[:8]


def _flat(rows: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    lengths = torch.tensor([len(row) for row in rows], dtype=torch.int32)
    return {"lengths": lengths, "ids": torch.tensor([i for row in rows for i in row], dtype=torch.int32)}


def _rows(flat: Mapping[str, Tensor]) -> list[list[int]]:
    return [row.tolist() for row in flat["ids"].split(flat["lengths"].tolist())] if len(flat["lengths"]) else []


def _save(corpus: Corpus, path: Path) -> None:
    content = {
        "pieces": torch.frombuffer(bytearray(corpus.pieces), dtype=torch.uint8),
        "references": json.dumps(corpus.references),
        "aligned": {code: _flat(rows) for code, rows in corpus.aligned.items()},
        **{
            part: {code: (_flat(pairs.english), _flat(pairs.text)) for code, pairs in getattr(corpus, part).items()}
            for part in ("train", "valid", "test")
        },
    }
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        torch.save(content, file)
    os.replace(file.name, path)


def _loaded(recipe: Recipe, content: Mapping[str, object]) -> Corpus:
    parts = {
        part: {code: Part(_rows(english), _rows(text)) for code, (english, text) in content[part].items()}
        for part in ("train", "valid", "test")
    }
    references = {
        part: {code: [tuple(pair) for pair in pairs] for code, pairs in of.items()}
        for part, of in json.loads(content["references"]).items()
    }
    aligned = {code: _rows(flat) for code, flat in content["aligned"].items()}
    return Corpus(recipe, **parts, references=references, aligned=aligned, pieces=bytes(content["pieces"].numpy()))


# --- Batches ----------------------------------------------------------------------------------------------------------


class Batches:
    """Mixed batches without end. ``batches[step]`` depends on nothing else, so that a run continues anywhere.

    Each sentence is of task ``i`` with probability ``P_i ~ L_i^(1/T)``, ``L_i`` the number of the task's training pairs.
    Sentences are drawn with replacement, for several batches at a time, which are then cut by length.

    Args:
        corpus: where the sentences are from.
        tasks: names such as ``"en-fr"``.
        size: sentences in a batch.
        temperature: ``T``.
        seed: of everything that is drawn.
        pool: batches that are drawn together.
    """

    def __init__(
        self, corpus: Corpus, tasks: Sequence[str], *, size: int, temperature: float, seed: int, pool: int = 16
    ) -> None:
        self.tasks = tuple(tasks)
        self._corpus, self._size, self._seed, self._pool = corpus, size, seed, pool
        self._pairs = [corpus.pairs("train", task) for task in tasks]
        lengths = np.array([len(pairs.english) for pairs in self._pairs], dtype=np.float64)
        self.shares = (lengths / lengths.sum()) ** (1 / temperature)
        self.shares /= self.shares.sum()
        self._at, self._drawn = -1, []

    def __getitem__(self, step: int) -> Batch:
        pool, number = divmod(step, self._pool)
        if pool != self._at:
            self._at, self._drawn = pool, self._draw(pool)
        return self._corpus.batch(self.tasks, self._drawn[number])

    def _draw(self, pool: int) -> list[list[tuple[int, Sequence[int], Sequence[int]]]]:
        random = np.random.default_rng([self._seed, pool])
        of = random.choice(len(self.tasks), self._pool * self._size, p=self.shares)
        picks = []
        for task in of.tolist():
            pairs = self._pairs[task]
            i = int(random.integers(len(pairs.english)))
            picks.append((task, pairs.english[i], pairs.text[i]))
        picks.sort(key=lambda pick: (max(len(pick[1]), len(pick[2])), len(pick[1])))
        order = random.permutation(self._pool)
        return [picks[n * self._size : (n + 1) * self._size] for n in order]
