"""Image sources of other packages, named by `data.format`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

from diffit_train.config.data import FORMATS
from diffit_train.config.plugins import require
from diffit_train.data.preprocess import UnreadableImage
from diffit_train.errors import UserError


class ImageSource(Protocol):
    """A source of images, made as `Source(url)` with the recipe's `data.source`.

    It is made in each process that reads images, so its images must be the same everywhere and at
    each time.

    Attributes:
        classes: names of the classes; their number is the recipe's `data.num_classes`.
    """

    classes: Sequence[str]

    def images(self) -> Iterable[tuple[str, int]]:
        """Name and label of every image, in a fixed order; a label is an index into `classes`."""

    def read(self, index: int) -> bytes:
        """The file of an image: JPEG, PNG, WebP or BMP. Several threads call it at once.

        Args:
            index: position in `images()`.

        Raises:
            OSError: the storage cannot be read.
            Exception: any other rejects the image, and is recorded as the reason.
        """


def open_source(name: str, url: str) -> ImageSource:
    """The source.

    Raises:
        UserError: its class cannot be imported or made, or lacks methods.
    """
    made: ImageSource = FORMATS.make(name, {}, url)
    require(FORMATS.key, name, made, ["images", "read"])
    classes = getattr(made, "classes", None)
    if classes is None or isinstance(classes, str) or not all(isinstance(c, str) for c in classes):
        raise UserError(
            f"{FORMATS.key} is {name!r}, but the `classes` of its {type(made).__name__} are "
            f"{classes!r}; they must be names"
        )
    return made


def listed(name: str, source: ImageSource) -> list[tuple[str, int]]:
    """Names and labels of its images.

    Raises:
        UserError: they are something else.
    """
    pairs = list(source.images())
    for pair in pairs:
        if not (
            isinstance(pair, tuple)
            and len(pair) == 2
            and isinstance(pair[0], str)
            and isinstance(pair[1], int)
        ):
            raise UserError(
                f"{FORMATS.key} is {name!r}, whose images() has {pair!r}; it must have pairs of a "
                "name and a label, text and int"
            )
    return pairs


def read_image(name: str, source: ImageSource, index: int) -> bytes:
    """The file of an image.

    Raises:
        OSError: the storage cannot be read.
        UnreadableImage: the source cannot give it.
        UserError: it is something else than bytes.
    """
    try:
        data = source.read(index)
    except (OSError, UserError):
        raise
    except Exception as error:  # the source's own code may raise anything
        raise UnreadableImage(f"{type(error).__name__}: {error}") from error
    if not isinstance(data, bytes):
        raise UserError(
            f"{FORMATS.key} is {name!r}, whose read() returned {type(data).__name__}; it must "
            "return the bytes of an image file"
        )
    return data
