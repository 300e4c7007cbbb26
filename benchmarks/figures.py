"""The results of measurements: figures, each with its goal and whether it was met."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace

from benchmarks.timing import Sample, ratio


@dataclass(frozen=True)
class Goal:
    """The limit of a figure: at most, or at least."""

    limit: float
    at_most: bool = True

    def met_by(self, value: float) -> bool:
        """Returns whether the value is on the good side."""
        return value <= self.limit if self.at_most else value >= self.limit

    def __str__(self) -> str:
        return f"{'<=' if self.at_most else '>='} {self.limit:g}"


@dataclass(frozen=True)
class Figure:
    """One number of a measurement.

    Attributes:
        label: its name for people.
        value: a median; of ratios, over those of the rounds.
        low, high: the spread over the rounds (see `Sample.spread`).
        unit: "s", "ms", "x" for ratios, "chunks".
        goal: None if the number is there to explain others.
    """

    label: str
    value: float
    low: float
    high: float
    unit: str
    goal: Goal | None = None

    @classmethod
    def of(cls, label: str, sample: Sample, unit: str = "s", goal: Goal | None = None) -> Figure:
        """Returns a sample's median and spread."""
        return cls(label, sample.median, *sample.spread, unit, goal)

    @classmethod
    def ratio(cls, label: str, above: Sample, below: Sample, goal: Goal | None = None) -> Figure:
        """Returns how one sample compares with another, round by round; see `timing.ratio`."""
        return cls(label, *ratio(above, below), "x", goal)

    def prefixed(self, words: str) -> Figure:
        """Returns the same figure under a longer label."""
        return replace(self, label=words + self.label)

    @property
    def met(self) -> bool | None:
        """Whether the goal was met; None without a goal."""
        return None if self.goal is None else self.goal.met_by(self.value)

    def as_dict(self) -> dict[str, object]:
        """Returns JSON-ready values."""
        goal = None if self.goal is None else str(self.goal)
        return {**asdict(self), "goal": goal, "met": self.met}


@dataclass(frozen=True)
class Result:
    """One measurement.

    Attributes:
        title: a line for people.
        figures: by a short name.
        details: JSON-ready, for a closer look.
        failure: empty, or why nothing could be measured.
    """

    title: str
    figures: dict[str, Figure]
    details: dict[str, object] = field(default_factory=dict)
    failure: str = ""

    def as_dict(self) -> dict[str, object]:
        """Returns JSON-ready values."""
        return {**{name: figure.as_dict() for name, figure in self.figures.items()}, "details": self.details}
