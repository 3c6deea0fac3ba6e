"""Names of earlier versions: refused in a recipe, understood in what was stored, kept in hashes."""

from __future__ import annotations

import pytest
import yaml

from diffit_train.config import dump_recipe, load_recipe, load_recipe_text, load_stored_recipe
from diffit_train.config.renamed import KEYS, VALUES, current, current_params, hashed
from diffit_train.errors import UserError


@pytest.mark.parametrize(("former", "now"), KEYS.items())
def test_a_former_key_is_refused_with_todays_name(former: str, now: str) -> None:
    with pytest.raises(UserError, match=f"key '{former}' was renamed to '{now}'"):
        load_recipe("demo", [f"{former}=3"])


@pytest.mark.parametrize(("key", "former", "now"), [(*pair, now) for pair, now in VALUES.items()])
def test_a_former_value_is_refused_with_todays_name(key: str, former: str, now: str) -> None:
    with pytest.raises(UserError, match=f"{key} is '{former}', which was renamed to '{now}'"):
        load_recipe("demo", [f"{key}={former}"])


def test_todays_keys_exist() -> None:
    assert set(KEYS.values()) <= load_recipe("demo").flat().keys()


def test_a_stored_recipe_is_read_under_todays_names() -> None:
    recipe = load_recipe("demo", ["model.attention=chunked"])
    stored = yaml.safe_load(dump_recipe(recipe))
    for former, now in KEYS.items():
        (section, old), new = former.split("."), now.split(".")[1]
        stored[section][old] = stored[section].pop(new)
    stored["model"]["attention"] = "stretched"
    text = yaml.safe_dump(stored)
    assert load_stored_recipe(text, "it") == recipe
    with pytest.raises(UserError, match="was renamed to"):
        load_recipe_text(text, "it")


def test_params_of_mlflow_are_read_under_todays_names() -> None:
    params = {"evaluate.neighbours": "3", "model.attention": "stretched", "train.lr": "1"}
    expected = {"evaluate.num_neighbors": "3", "model.attention": "chunked", "train.lr": "1"}
    assert current_params(params) == expected


def test_hashes_are_over_the_names_of_then() -> None:
    tree = {"data": {"source": "root:images/digits", "images_per_shard": 5}, "lr": 1}
    former = {"data": {"source": "root:pictures/digits", "pictures_per_shard": 5}, "lr": 1}
    assert hashed(tree) == former
    assert current(former) == {**tree, "data": {**tree["data"], "source": "root:pictures/digits"}}


@pytest.mark.parametrize(
    ("name", "sha256"),
    [
        ("imagenet256", "5a64d30a985d351dc543b1cd892c1c4d1dad6bc867f8566c1665d6c264e3dbfa"),
        ("imagenet512", "ffebde71732fe312190d1e1da27b581dbce97eb6363940d296ce31ecb8d86077"),
        ("demo", "24854fffb34366ba50929776c698e3c46a6e7eb91739505505b3455fc1cd97c7"),
        ("cifar10", "db68f79ea0a6246168b5f141db67893718ced56e0f349f1bc27b53c0cb48d5bd"),
        ("ffhq64", "8fbb8ceda20ad9a77fa04a6fc2f4447ddd8843de92a247a35991f1fbe34caa4f"),
    ],
)
def test_packaged_recipes_hash_as_before_any_key_was_renamed(name: str, sha256: str) -> None:
    """A change here makes every run that there is another recipe's; change it on purpose only."""
    assert load_recipe(name).train_hash() == sha256
