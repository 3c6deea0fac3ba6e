"""Section `storage`: where the project is stored."""

from __future__ import annotations

from pydantic import field_validator

from diffit_train import storage
from diffit_train.config.base import Section, without_credentials


class Storage(Section):
    """Where the project is stored."""

    root: str = "."
    """project folder or s3://bucket/prefix; --root overrides it"""

    @field_validator("root")
    @classmethod
    def _a_url_has_two_slashes(cls, root: str) -> str:
        if fault := storage.missing_slash(root):
            raise ValueError(fault)
        if fault := storage.odd_root(root):
            raise ValueError(fault)
        return without_credentials(root)
