"""Parser of the action language. A model's text must not be passed to `eval`."""

import re
from dataclasses import MISSING, dataclass, fields
from typing import NoReturn

from autoglm_client.actions import COORDINATES, KINDS, Action, Finish, Point
from autoglm_client.errors import ActionError
from autoglm_client.thought import find_action

_DO = {name: kind for name, kind in KINDS.items() if kind is not Finish}
_POINTS = {"element", "start", "end"}  # every other argument is a string


@dataclass(frozen=True)
class ParsedAnswer:
    """The thought and the action of an answer."""

    thought: str
    action: Action


def parse(text: str) -> ParsedAnswer:
    """Parse a model's answer, with or without its tags. Raises ActionError."""
    thought, offset = find_action(text)
    if offset is None:
        raise ActionError("no action: expected do(...) or finish(...)", len(text))
    return ParsedAnswer(thought, _Parser(text, offset).action())


_SPACE = re.compile(r"\s*")
_WORD = re.compile(r"[A-Za-z_]+")
_BARE = re.compile(r"-?\d+(?:\.\d+)?|True|False")
_INTEGER = re.compile(r"-?\d+")
# Models do not always escape quotes inside strings: a quote ends a string only if the rest continues the call.
_AFTER_STRING = re.compile(r"\s*(?:,\s*[A-Za-z_]+\s*=|\)\s*(?:</answer>\s*)?\Z)")
_ESCAPE = re.compile(r"\\(u[0-9a-fA-F]{4}|[\\\"'nrt])")
_ESCAPED = {"n": "\n", "r": "\r", "t": "\t"}


class _Parser:
    def __init__(self, text: str, offset: int) -> None:
        self._text = text
        self._at = offset

    def action(self) -> Action:
        start = self._at
        verb = self._word()
        self._expect("(")
        arguments = self._arguments()
        self._expect(")")
        self._space()
        if self._text.startswith("</answer>", self._at):
            self._at += len("</answer>")
            self._space()
        if self._at != len(self._text):
            self._fail("text after the action")
        if verb == "finish":
            return _build(Finish, arguments, start)
        name, position = arguments.pop("action", ("", start))
        if name not in _DO:
            raise ActionError(f"action must be one of {', '.join(_DO)} (got {name!r})", position)
        return _build(_DO[str(name)], arguments, start)

    def _arguments(self) -> dict[str, tuple[str | Point, int]]:
        arguments: dict[str, tuple[str | Point, int]] = {}
        if self._peek() == ")":
            return arguments
        while True:
            self._space()
            position = self._at
            name = self._word()
            if name in arguments:
                raise ActionError(f"{name} is given twice", position)
            self._expect("=")
            self._space()
            position = self._at
            arguments[name] = (self._point() if name in _POINTS else self._string(), position)
            if self._peek() != ",":
                return arguments
            self._expect(",")

    def _point(self) -> Point:
        opening = self._peek()
        if opening not in ("[", "("):
            self._fail("expected a point [x,y]")
        self._expect(opening)
        x = self._coordinate()
        self._expect(",")
        y = self._coordinate()
        self._expect("]" if opening == "[" else ")")
        return Point(x, y)

    def _coordinate(self) -> int:
        self._space()
        number = _INTEGER.match(self._text, self._at)
        if not number:
            self._fail("expected an integer")
        value = int(number[0])
        if not 0 <= value < COORDINATES:
            self._fail(f"coordinates must be between 0 and {COORDINATES - 1} (got {value})")
        self._at = number.end()
        return value

    def _string(self) -> str:
        quote = self._peek()
        if quote not in ('"', "'"):
            bare = _BARE.match(self._text, self._at)
            if not bare:
                self._fail("expected a string in quotes")
            self._at = bare.end()
            return bare[0]
        begin = self._at + 1
        end = self._closing_quote(quote, begin)
        self._at = end + 1
        return _unescape(self._text[begin:end])

    def _closing_quote(self, quote: str, at: int) -> int:
        first = -1
        while at < len(self._text):
            if self._text[at] == "\\":
                at += 2
                continue
            if self._text[at] == quote:
                if _AFTER_STRING.match(self._text, at + 1):
                    return at
                first = at if first < 0 else first
            at += 1
        if first < 0:
            self._fail("the string is not closed")
        return first  # the error is after it

    def _word(self) -> str:
        self._space()
        word = _WORD.match(self._text, self._at)
        if not word:
            self._fail("expected a name")
        self._at = word.end()
        return word[0]

    def _peek(self) -> str:
        self._space()
        return self._text[self._at : self._at + 1]

    def _expect(self, character: str) -> None:
        if self._peek() != character:
            self._fail(f"expected {character!r}")
        self._at += 1

    def _space(self) -> None:
        space = _SPACE.match(self._text, self._at)
        self._at = space.end() if space else self._at

    def _fail(self, message: str) -> NoReturn:
        raise ActionError(message, self._at)


def _build(kind: type[Action], arguments: dict[str, tuple[str | Point, int]], start: int) -> Action:
    allowed = {f.name: f.default is MISSING for f in fields(kind)}
    for name, (_, position) in arguments.items():
        if name not in allowed:
            raise ActionError(f"{kind.NAME} takes no argument {name!r}", position)
    for name, required in allowed.items():
        if required and name not in arguments:
            raise ActionError(f"{kind.NAME} needs the argument {name!r}", start)
    return kind(**{name: value for name, (value, _) in arguments.items()})


def _unescape(raw: str) -> str:
    text = _ESCAPE.sub(lambda m: chr(int(m[1][1:], 16)) if m[1][0] == "u" else _ESCAPED.get(m[1], m[1]), raw)
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")  # \ud83d\ude00 is one character
