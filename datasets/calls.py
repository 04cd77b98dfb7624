"""What a data set's class or function can be called with, asked of itself."""

import inspect
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

# A data set's class, a function like it, or a ``partial`` of either.
DatasetClass = Callable[..., Any]


def call(dataset: DatasetClass, **arguments: Any) -> Any:
    """Call a data set's class with those of the arguments that it takes."""
    takes = parameters_of(dataset)
    return dataset(**{name: value for name, value in arguments.items() if name in takes})


def parameters_of(dataset: DatasetClass) -> dict[str, Any]:
    """Return the parameters that can be given, and their defaults.

    The default of one that has none is ``inspect.Parameter.empty``. What a ``partial`` gives is
    left out. A class that takes ``**more`` hands it to the class that it is made of, whose
    parameters count, too. Whatever takes ``**more`` in the end is believed to take all that a data
    set is called with.
    """
    if isinstance(dataset, partial):
        inner = list(parameters_of(dataset.func).items())[len(dataset.args) :]
        return {name: default for name, default in inner if name not in dataset.keywords}
    found: dict[str, Any] = {}
    takes_more = False
    for function in functions_called(dataset):
        parameters = inspect.signature(function).parameters.values()
        takes_more = any(each.kind is each.VAR_KEYWORD for each in parameters)
        for each in parameters:
            if each.kind not in (each.VAR_KEYWORD, each.VAR_POSITIONAL):
                found.setdefault(each.name, each.default)
        if not takes_more:
            break
    if takes_more:
        found = dict.fromkeys(("root", "split", "transform", "download")) | found
    found.pop("self", None)
    return found


def functions_called(dataset: DatasetClass) -> list[Callable[..., Any]]:
    """Return the functions that a call goes through: a class's ``__init__``, and those above it."""
    if not isinstance(dataset, type):
        return [dataset]
    owners = [each for each in dataset.__mro__ if "__init__" in vars(each) and each is not object]
    return [vars(each)["__init__"] for each in owners]


def unwrapped(dataset: DatasetClass) -> Any:
    """Return the class or function that a ``partial`` calls."""
    while isinstance(dataset, partial):
        dataset = dataset.func
    return dataset


def is_torchvisions(dataset: DatasetClass) -> bool:
    """Return whether a class, or the one whose ``__init__`` it has, is a data set of torchvision's.

    ``VisionDataset`` is none, and neither is what a reader builds upon it.
    """
    functions = functions_called(unwrapped(dataset))
    module = str(getattr(functions[0], "__module__", "")) if functions else ""
    return module.startswith("torchvision.datasets.") and not module.endswith(".vision")


def needed(dataset: DatasetClass, given: Iterable[str]) -> list[str]:
    """Return the parameters that have to be given besides some others and ``root``."""
    parameters = parameters_of(dataset)
    required = [name for name, default in parameters.items() if default is inspect.Parameter.empty]
    return [name for name in required if name not in {"root", *given}]
