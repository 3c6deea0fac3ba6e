"""Classes of other packages that a recipe names: by entry point, or as MODULE:CLASS.

A recipe keeps the name as it was given; the class is imported where it is needed, on every node
that needs it. `diffit_train` exports what such a class derives from or provides.
"""

from __future__ import annotations

import difflib
import importlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from pydantic import GetCoreSchemaHandler
from pydantic_core import CoreSchema, core_schema

from diffit_train.errors import UserError, first_line


class PluginError(UserError):
    """A class that a recipe names cannot be used; trying again on the same node finds the same."""


_REFERENCE = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")


@dataclass(frozen=True)
class Plugged:
    """Type of a recipe's key: one of ours, an entry point of a group, or MODULE:CLASS.

    Attributes:
        key: dotted name of the key.
        group: group of entry points.
        own: names of ours.
    """

    key: str
    group: str
    own: tuple[str, ...]

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self._known, handler(source))

    def is_plugged(self, name: str) -> bool:
        """Whether the class is another package's."""
        return name not in self.own

    def load(self, name: str) -> type[Any]:
        """The class of another package.

        Raises:
            PluginError: it cannot be imported, or is no class; names key, value and fix.
        """
        reference = self.reference(name)
        what_it_is = f"{self.key} is {name!r}" + (f" ({reference})" if reference != name else "")
        module_name, _, class_name = reference.partition(":")
        try:
            module = importlib.import_module(module_name)
        except Exception as error:  # the module's own code may raise anything
            missing = isinstance(error, ModuleNotFoundError) and f"{module_name}.".startswith(
                f"{error.name}."
            )
            reason = first_line(error)
            fix = (
                "install the package that has it where this runs (on a cluster: on every node), "
                "put its folder on PYTHONPATH, or fix the name"
                if missing
                else "fix that module"
            )
            raise PluginError(
                f"{what_it_is}, but importing module {module_name} failed: {type(error).__name__}: "
                f"{reason}; {fix}"
            ) from error
        cls = getattr(module, class_name, None)
        if not isinstance(cls, type):
            classes = [n for n, value in vars(module).items() if isinstance(value, type)]
            what = "no" if cls is None else f"a {type(cls).__name__}, not a"
            raise PluginError(
                f"{what_it_is}, but module {module_name} has {what} class {class_name}"
                f"{nearest(class_name, classes)}"
            )
        return cls

    def reference(self, name: str) -> str:
        """MODULE:CLASS of a name.

        Raises:
            PluginError: no installed package has an entry point of that name.
        """
        if ":" in name:
            return name
        for point in _entry_points(self.group):
            if point.name == name:
                return point.value
        raise PluginError(f"{self.key} is {name!r}: {self._unknown(name)}")

    def make(self, name: str, options: dict[str, Any], *arguments: Any) -> Any:
        """An object of the class of another package.

        Raises:
            PluginError: as `load`, or its constructor refuses the options.
        """
        cls = self.load(name)
        try:
            return cls(*arguments, **options)
        except UserError:
            raise
        except Exception as error:  # the class's own code may raise anything
            reason = first_line(error)
            given = f" with options {options}" if options else ""
            raise PluginError(
                f"{self.key} is {name!r}, but making a {cls.__name__}{given} failed: "
                f"{type(error).__name__}: {reason}; fix the options, or the class"
            ) from error

    def _known(self, name: str) -> str:
        if name in self.own or _REFERENCE.fullmatch(name):
            return name
        if ":" in name:
            raise ValueError("a custom class is given as MODULE:CLASS, such as mynet.model:Net")
        if all(point.name != name for point in _entry_points(self.group)):
            raise ValueError(self._unknown(name))
        return name

    def _unknown(self, name: str) -> str:
        installed = [point.name for point in _entry_points(self.group)]
        return (
            f"must be one of {', '.join(self.own)}, MODULE:CLASS, or an entry point in group "
            f"{self.group} of an installed package "
            f"({', '.join(installed) if installed else 'there is none'})"
            f"{nearest(name, [*self.own, *installed])}"
        )


def require(key: str, name: str, value: object, methods: Sequence[str]) -> None:
    """Refuse an object of another package that lacks methods.

    Raises:
        PluginError: names them.
    """
    missing = [method for method in methods if not callable(getattr(value, method, None))]
    if missing:
        raise PluginError(
            f"{key} is {name!r}, but {type(value).__name__} has no {', '.join(missing)}; "
            "docs/extend.md says what it needs"
        )


def _entry_points(group: str) -> list[EntryPoint]:
    return sorted(entry_points(group=group), key=lambda point: point.name)


def nearest(word: str, known: Iterable[str]) -> str:
    """The known word that is most like a misspelled one, as the end of a message; else empty."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" (did you mean {close[0]!r}?)" if close else ""
