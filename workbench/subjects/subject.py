"""What a step of a plan takes and gives: a model with its task, and the model that it began as."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, ClassVar, Protocol

from annotated_types import Ge, Gt, Le, Lt
from torch import nn

from workbench.batches import Inputs
from workbench.subjects.tasks import Task

# what the fields of a step may be; a recipe is checked against it before anything runs
Share = Annotated[float, Gt(0), Le(1)]  # what stays
Removed = Annotated[float, Ge(0), Lt(1)]
Count = Annotated[int, Ge(0)]
Globs = str | list[str]


@dataclass(frozen=True)
class Subject:
    """A model and the task that it is for. reference: the model before any step, which teaches
    where no other teacher is given; made: what the steps so far leave for later ones and for the
    reader (a history, a table), by name.

    Example: `Subject(model, task)`
    """

    model: nn.Module
    task: Task
    reference: nn.Module | None = None
    made: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        if self.reference is None:
            object.__setattr__(self, "reference", self.model)

    def __repr__(self) -> str:
        return (f"Subject({type(self.model).__name__}, "
                f"{self.task.name}{', ' + ', '.join(self.made) if self.made else ''})")

    @property
    def example(self) -> Inputs:
        """One input of the model."""
        return self.task.example

    def with_model(self, model: nn.Module, **made: object) -> "Subject":
        """The same subject with another model, and what was made on the way."""
        return replace(self, model=model, made={**self.made, **made})


class Step(Protocol):
    """One method with its settings: a frozen dataclass whose fields are what a recipe writes.

    A class may have keeps_shape: whether the model that comes out has the layers and tensors of the
    one that went in, with other numbers; where it has none, it is taken not to. And needs_examples:
    whether it calibrates, judges or trains on examples other than the test's.

    Example: `Prune(macs=0.5).apply(start)`
    """

    __dataclass_fields__: ClassVar[dict[str, Any]]

    def apply(self, subject: Subject) -> Subject:
        """The subject after the step; the one given is left as it was."""
