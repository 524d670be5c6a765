"""The actions of the model's language, such as `do(action="Tap", element=[517,233])`."""

import re
from dataclasses import dataclass, fields
from typing import Any, ClassVar, NamedTuple

COORDINATES = 1000  # the size of the model's grid: coordinates are from 0 to 999
KINDS: dict[str, type["Action"]] = {}  # all actions, by name


class Point(NamedTuple):
    """A point on the screen: 0 to 999 from the top left in both directions, independent of the screen's size."""

    x: int
    y: int

    def to_pixels(self, size: tuple[int, int]) -> tuple[int, int]:
        """The pixel (x, y) on a screen of `size` (width, height), rounded down as phone agents do."""
        return int(self.x / COORDINATES * size[0]), int(self.y / COORDINATES * size[1])


@dataclass(frozen=True)
class Action:
    """Base class of the actions; `str(action)` is the action in the model's language."""

    NAME: ClassVar[str]

    def __init_subclass__(cls, name: str) -> None:
        cls.NAME = name
        KINDS[name] = cls

    def arguments(self) -> dict[str, Any]:
        """The arguments that are set, by name."""
        values = ((f.name, getattr(self, f.name)) for f in fields(self))
        return {name: value for name, value in values if value is not None}

    def __str__(self) -> str:
        arguments = [f"{name}={_write(value)}" for name, value in self.arguments().items()]
        if isinstance(self, Finish):
            return f"finish({', '.join(arguments)})"
        return f"do({', '.join([f'action={_write(self.NAME)}', *arguments])})"


@dataclass(frozen=True)
class Launch(Action, name="Launch"):
    """Start an app by name."""

    app: str


@dataclass(frozen=True)
class Tap(Action, name="Tap"):
    """Tap a point; a sensitive tap (payment, privacy), which needs confirmation, has a `message`."""

    element: Point
    message: str | None = None


@dataclass(frozen=True)
class Type(Action, name="Type"):
    """Type into the focused field, replacing its content."""

    text: str


@dataclass(frozen=True)
class TypeName(Action, name="Type_Name"):
    """Type a person's name."""

    text: str


@dataclass(frozen=True)
class Swipe(Action, name="Swipe"):
    """Swipe from one point to another."""

    start: Point
    end: Point


@dataclass(frozen=True)
class Back(Action, name="Back"):
    """Press the back button."""


@dataclass(frozen=True)
class Home(Action, name="Home"):
    """Press the home button."""


@dataclass(frozen=True)
class DoubleTap(Action, name="Double Tap"):
    """Tap a point twice."""

    element: Point


@dataclass(frozen=True)
class LongPress(Action, name="Long Press"):
    """Press and hold a point."""

    element: Point


@dataclass(frozen=True)
class Wait(Action, name="Wait"):
    """Wait for the screen to change."""

    duration: str = "1 seconds"

    @property
    def seconds(self) -> float:
        """The duration as a number; 1.0 if it contains none."""
        number = re.match(r"\s*(\d+(?:\.\d+)?)", self.duration)
        return float(number[1]) if number else 1.0


@dataclass(frozen=True)
class TakeOver(Action, name="Take_over"):
    """Ask the user to take over (login, verification)."""

    message: str = ""


@dataclass(frozen=True)
class Note(Action, name="Note"):
    """Note the content of the page for a later summary."""

    message: str = "True"


@dataclass(frozen=True)
class CallAPI(Action, name="Call_API"):
    """Summarise or comment on the page or on the notes."""

    instruction: str


@dataclass(frozen=True)
class Interact(Action, name="Interact"):
    """Ask the user to choose between several candidates."""


@dataclass(frozen=True)
class Finish(Action, name="finish"):
    """End the task."""

    message: str = ""


def _write(value: str | Point) -> str:
    if isinstance(value, Point):
        return f"[{value.x},{value.y}]"
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    return '"' + escaped.replace("\n", "\\n").replace("\r", "\\r").replace("\t", "\\t") + '"'
