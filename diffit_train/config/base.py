"""Base class and common types of the recipe's sections."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from diffit_train.errors import UserError
from diffit_train.redaction import redact

# Names become folders of a root.
_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]*"
LONGEST_NAME = 80
Name = Annotated[str, Field(pattern=f"^{_NAME}$", max_length=LONGEST_NAME)]
PositiveInt = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]


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
    """A section of the recipe: immutable, rejects unknown keys, every number finite."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted keys to values of a tree of sections."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            found |= flatten(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found
