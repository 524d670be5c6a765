"""The actions, and how they are written: `do(action="Tap", element=[517,233])` and its relatives."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from typing import Any, ClassVar, NamedTuple

COORDINATES = 1000  # the model's grid; values go from 0 to 999


class Point(NamedTuple):
    """A place on the screen, 0..999 from the top left in both directions, whatever the screen's size."""

    x: int
    y: int

    def to_pixels(self, size: tuple[int, int]) -> tuple[int, int]:
        """The pixel (x, y) on a screen of `size` (width, height), rounded down as phone agents do it."""
        return int(self.x / COORDINATES * size[0]), int(self.y / COORDINATES * size[1])


@dataclass(frozen=True)
class Action:
    """Base of all actions; `str(action)` is the action in the model's language."""

    NAME: ClassVar[str]

    def arguments(self) -> dict[str, Any]:
        """The arguments that are set, by their names in the language."""
        values = ((f.name, getattr(self, f.name)) for f in fields(self))
        return {name: value for name, value in values if value is not None}

    def __str__(self) -> str:
        arguments = [f"{name}={_write(value)}" for name, value in self.arguments().items()]
        if isinstance(self, Finish):
            return f"finish({', '.join(arguments)})"
        return f"do({', '.join([f'action={_write(self.NAME)}', *arguments])})"


@dataclass(frozen=True)
class Launch(Action):
    """Start an app by its name."""

    NAME = "Launch"
    app: str


@dataclass(frozen=True)
class Tap(Action):
    """Tap a place; `message` is set when the tap is a sensitive one (payment, privacy) that wants a confirmation."""

    NAME = "Tap"
    element: Point
    message: str | None = None


@dataclass(frozen=True)
class Type(Action):
    """Type into the focused field, replacing what it holds."""

    NAME = "Type"
    text: str


@dataclass(frozen=True)
class TypeName(Action):
    """Type a person's name."""

    NAME = "Type_Name"
    text: str


@dataclass(frozen=True)
class Swipe(Action):
    """Drag from one place to another."""

    NAME = "Swipe"
    start: Point
    end: Point


@dataclass(frozen=True)
class Back(Action):
    """The back button."""

    NAME = "Back"


@dataclass(frozen=True)
class Home(Action):
    """The home button."""

    NAME = "Home"


@dataclass(frozen=True)
class DoubleTap(Action):
    """Tap a place twice."""

    NAME = "Double Tap"
    element: Point


@dataclass(frozen=True)
class LongPress(Action):
    """Press a place and hold."""

    NAME = "Long Press"
    element: Point


@dataclass(frozen=True)
class Wait(Action):
    """Wait for the screen to change."""

    NAME = "Wait"
    duration: str = "1 seconds"

    @property
    def seconds(self) -> float:
        """The duration as a number; 1.0 when it holds none."""
        number = re.match(r"\s*(\d+(?:\.\d+)?)", self.duration)
        return float(number[1]) if number else 1.0


@dataclass(frozen=True)
class TakeOver(Action):
    """Ask the person to take over (login, verification)."""

    NAME = "Take_over"
    message: str = ""


@dataclass(frozen=True)
class Note(Action):
    """Keep the page's content for a later summary."""

    NAME = "Note"
    message: str = "True"


@dataclass(frozen=True)
class CallAPI(Action):
    """Summarise or comment on the page or on what was noted."""

    NAME = "Call_API"
    instruction: str


@dataclass(frozen=True)
class Interact(Action):
    """Ask the person which of several candidates is meant."""

    NAME = "Interact"


@dataclass(frozen=True)
class Finish(Action):
    """The task is over."""

    NAME = "finish"
    message: str = ""


# What `do(action=...)` can name.
KINDS: tuple[type[Action], ...] = (
    Launch, Tap, Type, TypeName, Swipe, Back, Home, DoubleTap, LongPress, Wait, TakeOver, Note, CallAPI, Interact,
)  # fmt: skip


def _write(value: str | Point) -> str:
    if isinstance(value, Point):
        return f"[{value.x},{value.y}]"
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    return '"' + escaped.replace("\n", "\\n").replace("\r", "\\r").replace("\t", "\\t") + '"'
