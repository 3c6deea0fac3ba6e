"""The code of an exported folder: modules of this package, as they are, in one file a component.

diffusers copies a component's one file to its cache, and runs it again with each folder. Modules
next to it would be left out of a download, and shared by all folders that a process loads.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from importlib.util import module_from_spec, resolve_name, spec_from_file_location
from pathlib import Path
from symtable import symtable
from typing import Any

import torch
from torch import Tensor

from diffit_train import __version__
from diffit_train.config import Recipe
from diffit_train.diffusion.generation import ImageNoise, generate_latents, weight_of_noise
from diffit_train.diffusion.objective import Objective
from diffit_train.errors import DiffitError, UserError
from diffit_train.models.backbone import Backbone

_OURS = "diffit_train"
# Of this package; the rest, such as sections of the recipe, is only named in annotations.
_CARRIED = re.compile(rf"{_OURS}\.(models|diffusion|errors)\b")
_IMPORT = re.compile(r"^( *)from ([\w.]+) import (\([^)]*\)|.+)\n", re.MULTILINE)
_HEAD = '''"""{title}

Modules of diffit_train {version} and of the packages that its recipe names, in one file.
"""

from __future__ import annotations
'''
_SEEDS = [0, 1]


def join_modules(module: str, title: str, replaced: Mapping[str, str] | None = None) -> str:
    """The source of a module of this package after those that it imports, which go with it.

    Args:
        title: first line of the file's docstring.
        replaced: text of the module to what takes its place, which may import another package.

    Raises:
        DiffitError: two modules define the same name.
        UserError: a module of another package has no source, or imports its package as a whole.
    """
    text = _source(module)
    for old, new in (replaced or {}).items():
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    imports = "\n".join((replaced or {}).values())
    packages = {_OURS, *re.findall(r"^from (\w+)", imports, re.MULTILINE)}
    parts: dict[str, str] = {}
    _add(module, text, parts, packages, set())
    owners: dict[str, str] = {}
    for name, part in parts.items():
        symbols = symtable(part, name, "exec").get_symbols()
        for defined in sorted(
            s.get_name() for s in symbols if s.is_assigned() and not s.is_imported()
        ):
            if (other := owners.setdefault(defined, name)) != name and defined != "_":
                raise DiffitError(f"{other} and {name} both define {defined!r}; rename one")
    sections = [f"# ---- {name} ----\n\n{part}" for name, part in parts.items()]
    return "\n\n".join([_HEAD.format(title=title, version=__version__), *sections])


def _add(module: str, text: str, parts: dict[str, str], packages: set[str], seen: set[str]) -> None:
    """Add a module without its imports from `packages`, after the modules that these name."""
    if whole := re.search(rf"^\s*import ({'|'.join(packages)})\b.*", text, re.MULTILINE):
        raise UserError(
            f"module {module} has `{whole[0].strip()}`; name what it uses: `from {whole[1]} "
            "import …`"
        )
    package = import_module(module).__package__

    def without(match: re.Match[str]) -> str:
        indent, source, names = match.groups()
        source = resolve_name(source, package)
        top, sources = source.partition(".")[0], [source]
        if top not in {*packages, "__future__"}:
            return match[0]
        if source == _OURS:  # which imports what it exports when it is used
            words = re.findall(r"(\w+)(?: as \w+)?", names)
            sources = [getattr(import_module(_OURS), word).__module__ for word in words]
        for name in sources:
            if name not in seen and (top in packages - {_OURS} or _CARRIED.match(name)):
                seen.add(name)
                _add(name, _source(name), parts, packages, seen)
        pairs = re.findall(r"(\w+) as (\w+)", names)
        lines = [f"{new} = {old}" for old, new in pairs if new != old]
        return "".join(f"{indent}{line}\n" for line in lines or ["pass"] * bool(indent))

    parts[module] = _IMPORT.sub(without, text)


def _source(module: str) -> str:
    try:
        return inspect.getsource(import_module(module))
    except (OSError, TypeError) as error:
        raise UserError(f"module {module} has no Python source to export") from error


# ---- Code of another package ----


@contextmanager
def running(key: str, name: str, file: Path, kind: str, config: Mapping[str, Any]) -> Iterator[Any]:
    """The component of an exported file, to be compared in the block with what it was made from.

    Raises:
        UserError: it cannot be made, or what is done in the block fails.
    """
    spec = spec_from_file_location("diffit_exported_code", file)
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = module_from_spec(spec)  # where dataclasses look
    try:
        spec.loader.exec_module(module)
        yield getattr(module, kind)(**config)
    except Exception as error:  # code of another package may raise anything
        raise UserError(
            f"{key} is {name!r}, whose code does not work in a file of its own: "
            f"{type(error).__name__}: {error}; its modules may hold imports, definitions and "
            "constants only, or export it without --format diffusers"
        ) from error
    finally:
        del sys.modules[spec.name]


@torch.no_grad()
def require_same_network(exported: Any, model: Backbone) -> None:
    """Compare the outputs for one input.

    Raises:
        ValueError: they differ.
    """
    exported.network.load_state_dict(model.state_dict())
    random = torch.Generator().manual_seed(0)
    x = torch.randn(len(_SEEDS), *model.input_shape, generator=random)
    t, y = torch.rand(len(_SEEDS), generator=random), torch.zeros(len(_SEEDS), dtype=torch.long)
    if not torch.equal(exported.eval()(x, t, y), model.eval()(x, t, y)):
        raise ValueError("its outputs differ from those of the package")


def require_same_samples(exported: Any, recipe: Recipe, objective: Objective) -> None:
    """Compare what the sampler makes of a network that returns a tenth of its input.

    Raises:
        ValueError: it differs.
    """
    guidance, size = recipe.evaluate.guidance, recipe.latent_size
    shape = (recipe.autoencoder.latent_channels, size, size)
    labels, null = torch.zeros(len(_SEEDS), dtype=torch.long), recipe.data.num_classes

    def network(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return 0.1 * x

    mine = generate_latents(
        objective,
        recipe.evaluate.sampler,
        guidance,
        weight_of_noise(objective, guidance),
        network,
        ImageNoise([(seed, 0) for seed in _SEEDS], shape),
        labels,
        null,
    )
    if not torch.equal(exported.generate(network, shape, _SEEDS, labels, null), mine):
        raise ValueError("its samples differ from those of the package")
