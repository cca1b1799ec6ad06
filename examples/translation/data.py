"""Parallel text from the message catalogues that are installed with Django, as batches of character ids."""

from __future__ import annotations

import hashlib
import importlib.util
import random
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

FAMILY = {
    "French": "Western European",
    "Spanish": "Western European",
    "German": "Western European",
    "Italian": "Western European",
    "Russian": "Slavic",
    "Ukrainian": "Slavic",
    "Bulgarian": "Slavic",
    "Polish": "Slavic",
    "Finnish": "Uralic",
    "Estonian": "Uralic",
    "Hungarian": "Uralic",
    "Hindi": "Indo-Aryan",
    "Marathi": "Indo-Aryan",
    "Nepali": "Indo-Aryan",
    "Turkish": "Turkic",
    "Azerbaijani": "Turkic",
}
"""Language → family, in the order of the tables and pictures."""

CODES = dict(
    zip(
        FAMILY,
        ["fr", "es", "de", "it", "ru", "uk", "bg", "pl", "fi", "et", "hu", "hi", "mr", "ne", "tr", "az"],
        strict=True,
    )
)
DEFAULT = ("French", "Spanish", "Russian", "Ukrainian", "Hindi", "Marathi")

LONGEST = 48  # characters of a message, in either language
PAD, START, END, UNKNOWN = range(4)
_CONTEXT, _PLURAL = "\x04", "\0"
_FORMAT = set("%{}<>\\\n")  # placeholders and markup


class Pair(NamedTuple):
    """A message and its translation."""

    english: str
    translation: str


# --- Reading catalogues -----------------------------------------------------------------------------------------------


def read_catalogue(path: Path) -> dict[str, str]:
    """Reads a ``.mo`` file: msgid → translation, without messages that have a context or plural forms."""
    content = path.read_bytes()
    order = "<" if content[:4] == b"\xde\x12\x04\x95" else ">"
    count, originals, translations = struct.unpack(f"{order}3I", content[8:20])

    def text(table: int, i: int) -> str:
        length, start = struct.unpack_from(f"{order}2I", content, table + 8 * i)
        return content[start : start + length].decode()

    messages = {text(originals, i): text(translations, i) for i in range(count)}
    return {msgid: text for msgid, text in messages.items() if msgid and not {_CONTEXT, _PLURAL} & set(msgid)}


def read_pairs(language: str) -> list[Pair]:
    """All messages of a language that are worth learning: translated, short, plain text, each English message once."""
    try:
        django = importlib.util.find_spec("django")
    except ValueError:  # somebody put a module without a spec into sys.modules
        django = None
    if django is None or django.origin is None:
        raise SystemExit('The texts come from Django\'s catalogues: pip install "gradsurgery[examples]".')
    root, found = Path(django.origin).parent, {}
    for path in sorted(root.glob(f"**/locale/{CODES[language]}/LC_MESSAGES/*.mo")):
        for msgid, text in read_catalogue(path).items():
            pair = Pair(" ".join(msgid.split()), " ".join(text.split()))
            if pair.translation and pair.english != pair.translation and all(map(_plain, (msgid, text))):
                found.setdefault(pair.english, pair)
    return list(found.values())


def _plain(text: str) -> bool:
    return len(text) <= LONGEST and not _FORMAT & set(text)


def is_validation(english: str) -> bool:
    """Whether a message is held out: one in six. It depends on nothing but the English, so all languages agree."""
    return hashlib.sha256(english.casefold().encode()).digest()[0] % 6 == 0


# --- The corpus -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Corpus:
    """Training and validation pairs of each language, and the vocabulary of the training pairs.

    Attributes:
        train: language → pairs.
        valid: language → pairs; their English is in no language's training pairs.
        ids: symbol → id, for characters and for the tags such as ``"<2fr>"``.
    """

    train: Mapping[str, Sequence[Pair]]
    valid: Mapping[str, Sequence[Pair]]
    ids: Mapping[str, int]

    @classmethod
    def read(cls, languages: Sequence[str]) -> Corpus:
        """Reads Django's catalogues."""
        pairs = {language: read_pairs(language) for language in languages}
        train = {language: [p for p in pairs[language] if not is_validation(p.english)] for language in languages}
        valid = {language: [p for p in pairs[language] if is_validation(p.english)] for language in languages}
        tags = [_tag(language) for language in languages]
        characters = sorted({c for pairs in train.values() for pair in pairs for text in pair for c in text})
        symbols = ["<pad>", "<start>", "<end>", "<unknown>", *tags, *characters]
        return cls(train, valid, {symbol: i for i, symbol in enumerate(symbols)})

    @property
    def languages(self) -> tuple[str, ...]:
        """The target languages, in order."""
        return tuple(self.train)

    def encode(self, language: str, pairs: Sequence[Pair]) -> tuple[Tensor, Tensor]:
        """Pairs → padded ids: source ``[B, S]``, which starts with the language's tag, and target ``[B, T]``."""
        source = [[self.ids[_tag(language)], *self._ids(pair.english), END] for pair in pairs]
        target = [[START, *self._ids(pair.translation), END] for pair in pairs]
        return _padded(source), _padded(target)

    def decode(self, ids: Tensor) -> list[str]:
        """``[B, T]`` → texts, up to the end symbol."""
        symbols = list(self.ids)
        texts = []
        for row in ids.tolist():
            row = row[: row.index(END)] if END in row else row
            texts.append("".join(symbols[i] for i in row if i > UNKNOWN))
        return texts

    def batches(self, steps: int, size: int, seed: int) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
        """For each step and language, ``size`` pairs as ids. Each language is shuffled, and starts again when it is over.

        Every language has the same share of a batch, so small ones are seen more often.
        """
        streams = {language: _endless(pairs, random.Random(f"{seed} {language}")) for language, pairs in self.train.items()}
        for _ in range(steps):
            yield {
                language: self.encode(language, [next(stream) for _ in range(size)]) for language, stream in streams.items()
            }

    def _ids(self, text: str) -> list[int]:
        return [self.ids.get(character, UNKNOWN) for character in text]


def _endless(pairs: Sequence[Pair], generator: random.Random) -> Iterator[Pair]:
    while True:
        yield from generator.sample(pairs, len(pairs))


def _tag(language: str) -> str:
    return f"<2{CODES[language]}>"


def _padded(rows: Sequence[Sequence[int]]) -> Tensor:
    width = max(map(len, rows))
    return torch.tensor([[*row, *[PAD] * (width - len(row))] for row in rows])
