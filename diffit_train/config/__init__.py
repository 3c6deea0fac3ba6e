"""The typed recipe, and reading it from YAML."""

from diffit_train.config.load import (
    dump_recipe,
    load_recipe,
    load_recipe_text,
    packaged_recipes,
    stored_text,
    validate,
    with_overrides,
)
from diffit_train.config.recipe import Recipe

__all__ = [
    "Recipe",
    "dump_recipe",
    "load_recipe",
    "load_recipe_text",
    "packaged_recipes",
    "stored_text",
    "validate",
    "with_overrides",
]
