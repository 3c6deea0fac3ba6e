"""Runs side by side. Called as a function, the package is `diffit_train.compare`."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any


class _Callable(ModuleType):
    """Importing this package binds the name `compare` in `diffit_train`, where users call it."""

    def __call__(self, *args: Any, **options: Any) -> Any:
        """See `diffit_train.compare.frame.compare`."""
        from diffit_train.compare.frame import compare

        return compare(*args, **options)


sys.modules[__name__].__class__ = _Callable
