"""The languages: their families, and where their texts are."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Language:
    """One language.

    Attributes:
        code: as in ``<2fr>``, and in names of tasks such as ``"en-fr"``.
        name: in English.
        family: a branch of a language family, as fine as a reader would cluster them.
        script: how the names of its letters begin in Unicode; several where it has several.
        help: the suffix of its ``libreoffice-help-…`` package; None if there is none.
        edition: the key of its translation among the verses; None if there is none.
    """

    code: str
    name: str
    family: str
    script: tuple[str, ...]
    help: str | None = None
    edition: str | None = None


_LATIN, _CYRILLIC, _ARABIC = ("LATIN",), ("CYRILLIC",), ("ARABIC",)

LANGUAGES: dict[str, Language] = {
    language.code: language
    for language in (
        Language("fr", "French", "Romance", _LATIN, "fr", "l"),
        Language("es", "Spanish", "Romance", _LATIN, "es", "v"),
        Language("ca", "Catalan", "Romance", _LATIN, "ca"),
        Language("pt", "Portuguese", "Romance", _LATIN, "pt-br", "a"),
        Language("it", "Italian", "Romance", _LATIN, "it", "1"),
        Language("ro", "Romanian", "Romance", _LATIN, None, "u"),
        Language("de", "German", "Germanic", _LATIN, "de", "s"),
        Language("nl", "Dutch", "Germanic", _LATIN, "nl"),
        Language("da", "Danish", "Germanic", _LATIN, "da"),
        Language("sv", "Swedish", "Germanic", _LATIN, "sv"),
        Language("pl", "Polish", "Slavic", _LATIN, "pl", "z"),
        Language("cs", "Czech", "Slavic", _LATIN, "cs"),
        Language("uk", "Ukrainian", "Slavic", _CYRILLIC, None, "8"),
        Language("ru", "Russian", "Slavic", _CYRILLIC, "ru", "r"),
        Language("el", "Greek", "Greek", ("GREEK",), "el"),
        Language("fi", "Finnish", "Uralic", _LATIN, "fi"),
        Language("et", "Estonian", "Uralic", _LATIN, "et"),
        Language("hu", "Hungarian", "Uralic", _LATIN, "hu"),
        Language("eu", "Basque", "Basque", _LATIN, "eu"),
        Language("tr", "Turkish", "Turkic", _LATIN, "tr", "t"),
        Language("fa", "Persian", "Indo-Iranian", _ARABIC, None, "p"),
        Language("hi", "Hindi", "Indo-Iranian", ("DEVANAGARI",), "hi", "i"),
        Language("bn", "Bengali", "Indo-Iranian", ("BENGALI",), None, "b"),
        Language("ar", "Arabic", "Semitic", _ARABIC, None, "y"),
        Language("sw", "Swahili", "Bantu", _LATIN, None, "h"),
        Language("id", "Indonesian", "Malayo-Polynesian", _LATIN, "id", "6"),
        Language("tl", "Tagalog", "Malayo-Polynesian", _LATIN, None, "f"),
        Language("vi", "Vietnamese", "Vietic", _LATIN, "vi", "7"),
        Language("zh", "Chinese", "Sinitic", ("CJK",), "zh-cn", "c"),
        Language("ja", "Japanese", "Japonic", ("HIRAGANA", "KATAKANA", "CJK"), "ja", "j"),
        Language("ko", "Korean", "Koreanic", ("HANGUL", "CJK"), "ko", "n"),
    )
}
"""Code → language, in the order of tables and pictures: families together, near ones side by side."""

FAMILY = {code: language.family for code, language in LANGUAGES.items()}

FOUR = ("fr", "cs", "hi", "tr")
"""The languages of Table 6.5, as in the thesis: two with many texts, two with few."""


def other(task: str) -> str:
    """The language of a task that is not English.

    >>> other("en-fr"), other("fr-en")
    ('fr', 'fr')
    """
    source, _, target = task.partition("-")
    return target if source == "en" else source


def tasks_of(codes: tuple[str, ...], direction: str) -> tuple[str, ...]:
    """The tasks of some languages: ``"from-en"``, ``"to-en"``, or ``"both"`` in one model.

    >>> tasks_of(("fr", "hi"), "both")
    ('en-fr', 'en-hi', 'fr-en', 'hi-en')
    """
    outward, inward = tuple(f"en-{code}" for code in codes), tuple(f"{code}-en" for code in codes)
    return {"from-en": outward, "to-en": inward, "both": outward + inward}[direction]
