"""The equations of docstrings, which are written to be read in a terminal, as TeX.

``g'_i <- g'_i - <g'_i, g_j> / ||g_j||^2  g_j`` becomes ``g'_{i} \\leftarrow g'_{i} - \\frac{\\langle …``. What is not an
equation (``[G, K, K]``, ``"mean"``, ``gs.Sum()``) is a :class:`NotAnEquation`, and stays as it is.
"""

from __future__ import annotations

import re

GREEK = "alpha beta gamma delta phi mu nu rho xi sigma tau theta eta kappa lambda omega psi pi"
SYMBOLS = {name: rf"\{name}" for name in GREEK.split(" ")} | {
    "eps": r"\varepsilon",
    "lam": r"\lambda",
    "lr": r"\text{lr}",
    "decay": r"\text{decay}",
}
PREFIXES = {"sum": r"\sum", "prod": r"\prod", "max": r"\max", "min": r"\min", "log": r"\log", "argmin": "argmin"}
FUNCTIONS = ["exp", "cos", "softmax", "sigmoid", "clip", "diag", "mean", "median", "normalise", "sign", "relu"]
RELATIONS = {"=": "=", "<-": r"\leftarrow", "<=": r"\leq", ">=": r"\geq", "!=": r"\neq", "<": "<", ">": ">", "~": r"\sim"}
SUMS = {"+": "+", "-": "-"}

TALL = re.compile(r"\\(frac|sum|prod)\b")  # what needs tall parentheses

TOKEN = re.compile(
    r"(?P<number>\d+(?:\.\d+)?(?:e-?\d+)?)"
    r"|(?P<name>[A-Za-z]+'*(?:\^(?=[\s_,)]|$))?)"  # w^ is a w with a hat
    r"|(?P<angle><(?=[A-Za-z]))"  # <a, b>, an inner product
    r"|(?P<sign><-(?=\s)|<=|>=|!=|\|\||\.\.\.|[-+=<>~/()|,^_[\]])"
    r"|(?P<gap>\s+)"
)


class NotAnEquation(ValueError):
    """The text is something else."""


def tex(text: str, *, display: bool = False) -> str:
    """The equation in TeX; with tall fractions if it is displayed.

    Raises:
        NotAnEquation: if it is none that this notation knows.
    """
    parser = _Parser(text, display)
    result = parser.relation()
    if parser.index < len(parser.tokens):
        raise NotAnEquation(f"{text!r}: {parser.tokens[parser.index][1]!r} was not expected.")
    return result


class _Parser:
    """Recursive descent, a method for each level: relation, listed, additive, product, fraction, powered, atom."""

    def __init__(self, text: str, display: bool) -> None:
        self.text, self.display = text, display
        self.tokens: list[tuple[str, str]] = []
        self.joined: list[bool] = []  # whether a token follows the one before it without a gap
        self.index = 0
        self.norms = 0
        self.words = re.search(r"\s(=|<-)\s", text) is not None  # a = b may have words in it; a=b is a setting
        position, gap = 0, True
        while position < len(text):
            found = TOKEN.match(text, position)
            if found is None:
                raise NotAnEquation(f"{text!r}: {text[position]!r} is no part of an equation.")
            position, kind = found.end(), str(found.lastgroup)
            if kind != "gap":
                self.tokens.append((kind, found[0]))
                self.joined.append(not gap)
            gap = kind == "gap"

    @property
    def next(self) -> str:
        """The next token: its text if it is a sign, else its kind."""
        if self.index == len(self.tokens):
            return ""
        kind, token = self.tokens[self.index]
        return token if kind == "sign" else kind

    def take(self, wanted: str = "") -> str:
        if not self.next or (wanted and self.next != wanted):
            raise NotAnEquation(f"{self.text!r}: expected {wanted or 'more'}, found {self.next or 'its end'!r}.")
        self.index += 1
        return self.tokens[self.index - 1][1]

    def relation(self) -> str:
        parts = [self.additive()]
        while self.next in RELATIONS:
            parts += [RELATIONS[self.take()], self.additive()]
        return " ".join(parts)

    def listed(self) -> str:
        parts = [self.relation()]
        while self.next == ",":
            self.take()
            parts.append(self.relation())
        return ", ".join(parts)

    def additive(self) -> str:
        parts = []
        if self.next in SUMS:
            parts.append(self.take())
        parts.append(self.product())
        while self.next in SUMS:
            parts += [self.take(), self.product()]
        return " ".join(parts)

    def product(self) -> str:
        parts = [self.fraction()]
        while self.next in ("number", "name", "angle", "(", "...") or (self.next in ("||", "|") and not self.norms):
            parts.append(self.fraction())
        return r" \, ".join(parts)

    def fraction(self) -> str:
        start, tall = self.index, self.display
        upper, bare = self.powered()
        while self.next == "/":
            self.take()
            lower, bare_lower = self.powered()
            if self.display and r"\frac" in upper + lower:  # no fractions inside of fractions
                self.index, self.display = start, False
                upper, bare = self.powered()
                self.take("/")
                lower, bare_lower = self.powered()
                self.display = True
            both = tall or (upper + lower).isdigit()
            upper = bare = rf"\frac{{{bare}}}{{{bare_lower}}}" if both else f"{upper} / {lower}"
        return upper

    def powered(self) -> tuple[str, str]:
        """A factor, and the same without the parentheses around it, which a fraction does without."""
        if self.next == "name" and (name := self.tokens[self.index][1]) in PREFIXES:
            self.take()
            head = PREFIXES[name] if name != "argmin" else r"\operatorname{argmin}"
            head += self.script()
            if not self.next or self.next in RELATIONS or self.next in (")", ","):
                raise NotAnEquation(f"{self.text!r}: nothing follows {name}.")
            whole = f"{head} {self.product()}"
            return whole, whole
        name = self.next == "name"
        atom, bare = self.atom()
        primes = len(atom) - len(atom.rstrip("'"))  # which stand above the subscript
        script = self.script()
        whole = atom.rstrip("'") + script + ("^{" + r"\prime" * primes + "}" if primes else "")
        if name and self.next in ("(", "[") and self.joined[self.index]:  # L_i(t), E_k[x]
            whole = bare = f"{whole} {self.argument()}"
        return whole, (whole if script else bare)

    def script(self) -> str:
        """Subscript and superscript, in either order."""
        result = ""
        while self.next in ("_", "^"):
            mark = self.take()
            if mark == "_":
                if self.next not in ("number", "name"):
                    raise NotAnEquation(f"{self.text!r}: a subscript is a name or a number.")
                inner = self.take()
                word = SYMBOLS.get(inner, rf"\text{{{inner}}}")
                result += f"_{{{inner if len(inner) <= 2 else word}}}"
            else:
                result += f"^{{{self.exponent()}}}"
        return result

    def exponent(self) -> str:
        if self.next == "(":
            self.take()
            inner = self.relation()
            self.take(")")
            return inner
        sign = self.take() if self.next in SUMS else ""
        if not self.next or self.next in (",", ")"):  # a pseudo-inverse
            return sign
        if sign == "+":
            return sign
        number = self.next == "number"
        inner = self.atom()[0]
        if number and self.next == "/" and self.joined[self.index]:
            inner += self.take() + self.take("number")
        return sign + inner

    def atom(self) -> tuple[str, str]:
        kind = self.next
        if kind == "number":
            number = self.take()
            mantissa, _, exponent = number.partition("e")
            if exponent:
                power = f"10^{{{int(exponent)}}}"
                number = power if mantissa == "1" else rf"{mantissa} \cdot {power}"
            return number, number
        if kind == "name":
            return self.named()
        if kind == "...":
            self.take()
            return r"\cdots", r"\cdots"
        if kind == "(":
            self.take()
            inner = self.listed()
            self.take(")")
            return (rf"\left( {inner} \right)" if TALL.search(inner) else f"({inner})"), inner
        if kind == "angle":
            self.take()
            left = self.additive()
            self.take(",")
            right = self.additive()
            self.take(">")
            return (rf"\langle {left}, {right} \rangle",) * 2
        if kind in ("||", "|"):
            self.take()
            self.norms += 1
            inner = self.additive()
            self.norms -= 1
            self.take(kind)
            bar = r"\Vert" if kind == "||" else r"\vert"
            return (rf"\left{bar} {inner} \right{bar}" if TALL.search(inner) else f"{bar} {inner} {bar}",) * 2
        raise NotAnEquation(f"{self.text!r}: expected a quantity, found {kind or 'its end'!r}.")

    def argument(self) -> str:
        if self.next == "(":
            return self.atom()[0]
        self.take("[")
        inner = self.listed()
        self.take("]")
        return f"[{inner}]"

    def named(self) -> tuple[str, str]:
        name = self.take()
        call = self.next == "(" and self.joined[self.index]
        if name == "sqrt" and call:
            return (rf"\sqrt{{{self.atom()[1]}}}",) * 2
        if name in FUNCTIONS:
            head = rf"\{name}" if name in ("exp", "cos") else rf"\operatorname{{{name}}}"
        else:
            head = _symbol(name, self.text, self.words)
        if not call:
            return head, head
        if self.next == "(":
            return (f"{head} {self.atom()[0]}",) * 2
        return head, head


def _symbol(name: str, text: str, words: bool) -> str:
    hat, name = name.endswith("^"), name.rstrip("^")
    primes, name = name.count("'"), name.rstrip("'")
    if name in SYMBOLS:
        result = SYMBOLS[name]
    elif len(name) == 1:
        result = name
    elif name.startswith("d") and (len(name) == 2 or name[1:] in SYMBOLS):  # dz, dxi
        result = rf"d {SYMBOLS.get(name[1:], name[1:])}"
    elif words and name.islower():
        result = rf"\text{{{name}}}"
    else:
        raise NotAnEquation(f"{text!r}: {name!r} is no symbol.")
    return (rf"\hat{{{result}}}" if hat else result) + "'" * primes
