"""Base class and common types of the recipe's sections."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, GetCoreSchemaHandler
from pydantic.fields import FieldInfo
from pydantic_core import CoreSchema, core_schema

from diffit_train.errors import UserError, redact

# Names become folders of a root.
_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]*"
LONGEST_NAME = 80
Name = Annotated[str, Field(pattern=f"^{_NAME}$", max_length=LONGEST_NAME)]
PositiveInt = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
NonNegativeInt = Annotated[int, Field(ge=0)]


CREDENTIALS_IN_URL = (
    "it holds credentials, which would be stored; take them out, and set AWS_ACCESS_KEY_ID and "
    "AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
)


def without_credentials(url: str) -> str:
    """The URL of a source; a ValueError if it holds credentials."""
    if redact(url) != url:
        raise ValueError(CREDENTIALS_IN_URL)
    return url


def require_name(what: str, value: str) -> str:
    """The name, if it can be that of a folder.

    Args:
        what: the option or argument that gave it.

    Raises:
        UserError: it cannot.
    """
    if len(value) > LONGEST_NAME or not re.fullmatch(_NAME, value):
        raise UserError(
            f"{what} is {value!r}, but must consist of at most {LONGEST_NAME} letters, digits, "
            "'.', '_' and '-', beginning with a letter or digit"
        )
    return value


class Section(BaseModel):
    """A section of the recipe: immutable, rejects unknown keys, every number finite.

    The string below a key describes it.
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, protected_namespaces=(), use_attribute_docstrings=True
    )


# Stands for the variant of custom classes.
CUSTOM = "MODULE:CLASS"


@dataclass(frozen=True)
class Variants:
    """Marks a union of sections, of which the value of one key chooses one.

    Attributes:
        key: that key; a variant declares its values as a Literal, the one of custom classes any
            text.
        default: its value where it is missing.
    """

    key: str
    default: str

    def of(self, union: Any) -> dict[str, type[Section]]:
        """The variants by the value of the key."""
        return {value: model for model in get_args(union) for value in self.values(model)}

    def values(self, model: type[Section]) -> tuple[str, ...]:
        """The values of the key that choose a variant."""
        annotation = model.model_fields[self.key].annotation
        return get_args(annotation) if get_origin(annotation) is Literal else (CUSTOM,)

    def name(self, value: object, known: Mapping[str, type[Section]]) -> Any:
        """The name of the variant that a value chooses: `CUSTOM` for a custom class."""
        named = isinstance(value, str) and (value in known or CUSTOM not in known)
        return value if named else CUSTOM if CUSTOM in known else str(value)

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        known = self.of(source)
        schemas = {model: handler.generate_schema(model) for model in get_args(source)}

        def choose(section: Any) -> Any:
            if type(section) in schemas:
                return self.name(getattr(section, self.key), known)
            given = isinstance(section, Mapping)
            return self.name(section.get(self.key, self.default), known) if given else None

        choices = {value: schemas[model] for value, model in known.items()}
        return core_schema.tagged_union_schema(choices, choose)


def variants_of(field: FieldInfo) -> tuple[Variants, dict[str, type[Section]]] | None:
    """What chooses the variant of a field, and its variants; None if it has none."""
    marks = [item for item in field.metadata if isinstance(item, Variants)]
    return (marks[0], marks[0].of(field.annotation)) if marks else None


def section_of(field: FieldInfo) -> type[Section] | None:
    """The section that a field is; None if it is a value, or comes in variants."""
    kind = field.annotation
    return kind if isinstance(kind, type) and issubclass(kind, Section) else None


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted keys to values of a tree of sections."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
