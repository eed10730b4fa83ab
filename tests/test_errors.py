"""Errors cross Ray by pickling: each class of the tree arrives as itself, with the same facts and the same words."""

from __future__ import annotations

import copy
import inspect
import pickle
import re
from collections.abc import Callable, Iterator
from typing import Any, get_type_hints

import pytest

from crucible import errors
from crucible.errors import CrucibleError

PLAUSIBLE: dict[str, Any] = {
    "repo": "openai/gsm8k",
    "endpoint": "https://huggingface.co",
    "revision": "main",
    "path": "main/train-00000-of-00001.parquet",
    "known": ["main", "socratic"],
    "mismatches": [("train", 7, 6)],
    "signed_in": True,
    "expected": "9f86d081884c7d659a2feaa0c55ad015",
    "actual": "60303ae22b998861bce3b28f33eec1be",
    "problems": ["one", "two", "three", "four"],
    "reason": "connection reset; 5 tries",
}


def tree(root: type[CrucibleError] = CrucibleError) -> Iterator[type[CrucibleError]]:
    yield root
    for child in root.__subclasses__():
        yield from tree(child)


CLASSES = sorted({cls for cls in tree() if cls.__module__.startswith("crucible")}, key=lambda cls: cls.__name__)


def parameters(cls: type[CrucibleError]) -> list[inspect.Parameter]:
    if cls.__init__ in (Exception.__init__, OSError.__init__, ValueError.__init__):
        return []
    return [p for name, p in inspect.signature(cls).parameters.items() if name != "self"]


def example(cls: type[CrucibleError]) -> CrucibleError:
    """An instance with every argument of the constructor given, of the type its annotation says."""
    if not parameters(cls):
        return cls("something went wrong")
    hints = get_type_hints(cls.__init__)
    return cls(*(10_240 if hints[p.name] is int else PLAUSIBLE.get(p.name, f"some {p.name}") for p in parameters(cls)))


def facts(error: CrucibleError) -> dict[str, Any]:
    return {name: value for name, value in vars(error).items() if not name.startswith("__")}


def by_cloudpickle(error: CrucibleError) -> Any:
    cloudpickle = pytest.importorskip("ray.cloudpickle")  # what Ray itself uses, by its own copy
    return cloudpickle.loads(cloudpickle.dumps(error))


@pytest.mark.parametrize(
    "there_and_back",
    [
        lambda error: pickle.loads(pickle.dumps(error)),
        lambda error: pickle.loads(pickle.dumps(error, protocol=2)),
        copy.copy,
        by_cloudpickle,
    ],
    ids=["pickle", "pickle-2", "copy", "ray-cloudpickle"],
)
@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_an_error_arrives_as_it_left(cls: type[CrucibleError], there_and_back: Callable[[CrucibleError], Any]) -> None:
    error = example(cls)
    arrived = there_and_back(error)
    assert type(arrived) is cls
    assert arrived.args == error.args
    assert facts(arrived) == facts(error)
    assert str(arrived) == str(error)


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_an_error_says_something_with_its_first_fact_in_it(cls: type[CrucibleError]) -> None:
    error = example(cls)
    said = str(error)
    assert said
    assert "\n" not in said
    if parameters(cls):
        assert str(next(iter(facts(error).values()))) in said


@pytest.mark.parametrize("cls", [c for c in CLASSES if parameters(c)], ids=lambda cls: cls.__name__)
def test_an_error_keeps_its_facts_as_attributes(cls: type[CrucibleError]) -> None:
    names = [p.name.rstrip("_") for p in parameters(cls)]
    assert set(facts(example(cls))) >= set(names)


def test_the_tree_in_the_docstring_is_the_tree() -> None:
    drawing = (errors.__doc__ or "").split("CrucibleError` for all of them.", 1)[1].split("An error keeps", 1)[0]
    missing = [cls.__name__ for cls in CLASSES if not re.search(rf"\b{cls.__name__}\b", drawing)]
    assert missing == []
    drawn = {name for line in drawing.splitlines() for name in drawn_names(line)}
    assert drawn - {cls.__name__ for cls in CLASSES} == set()


def drawn_names(line: str) -> list[str]:
    """The classes a line of the drawing names: the capitalised words before the explanation (two spaces and prose)."""
    names = []
    for word in re.sub(r"\([^)]*\)", "", line).replace("│", " ").replace("├──", " ").replace("└──", " ").split():
        if not re.fullmatch(r"[A-Z][a-z]+([A-Z][a-z]+)+", word):
            break
        names.append(word)
    return names


def test_a_builtin_that_fits_catches_ours_too() -> None:
    with pytest.raises(OSError, match="no space left"):
        raise errors.DiskFull("/data/store", "3 GB needed")
    with pytest.raises(ValueError, match="rank must be"):
        raise errors.UsageError("rank must be in [0, 8), got 9")
