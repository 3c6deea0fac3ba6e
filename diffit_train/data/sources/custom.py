"""Image sources of other packages, named by `data.format`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

from diffit_train.config.data import FORMATS, Data
from diffit_train.config.plugins import require
from diffit_train.data.preprocess import UnreadableImage
from diffit_train.data.sources.base import (
    ImageList,
    Item,
    Location,
    Source,
    labeled_item,
    require_size,
)
from diffit_train.errors import UserError


class ImageSource(Protocol):
    """A source of images, created as `Source(url)` with the recipe's `data.source`.

    Each process that reads images creates it, so its images must be the same everywhere and at
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


class CustomSource(Source):
    """An `ImageSource`; the `start` of a location is its index.

    Raises:
        UserError: its class cannot be imported or created, lacks methods, or returns what it must
            not.
    """

    def __init__(self, url: str, data: Data) -> None:
        super().__init__(url, data)
        self.kind = FORMATS.reference(data.format)  # type: ignore[misc]

    def list_images(self) -> ImageList:
        """List its images; see `Source.list_images`."""
        images = self._create()
        classes = getattr(images, "classes", None)
        if isinstance(classes, str | None) or not all(isinstance(c, str) for c in classes):
            raise UserError(
                f"{FORMATS.key} is {self.kind!r}, but the `classes` of its "
                f"{type(images).__name__} are {classes!r}; they must be names"
            )
        items = []
        for index, pair in enumerate(images.images()):
            match pair:
                case (str(name), int(label)) if isinstance(pair, tuple):
                    where = Location("", index)
                    items.append(labeled_item(name, label, self.data.num_classes, where))
                case _:
                    raise UserError(
                        f"{FORMATS.key} is {self.kind!r}, whose images() has {pair!r}; it must "
                        "have pairs of a name and a label, text and int"
                    )
        return ImageList(self, tuple(classes), items)

    def read(self, location: Location) -> bytes:
        """Return an image; see `Source.read`."""
        return self._read(self._create(), location)

    def open(self, items: Sequence[Item]) -> Callable[[Location], bytes]:
        """Create the source once for all of these images; see `Source.open`."""
        images = self._create()
        return lambda location: self._read(images, location)

    def exists(self) -> bool:
        """Only the class itself knows."""
        return True

    def _create(self) -> ImageSource:
        images: ImageSource = FORMATS.make(self.kind, {}, self.url)
        require(FORMATS.key, self.kind, images, ["images", "read"])
        return images

    def _read(self, images: ImageSource, location: Location) -> bytes:
        try:
            data = images.read(location.start)
        except (OSError, UserError):
            raise
        except Exception as error:  # the class's own code may raise anything
            raise UnreadableImage(f"{type(error).__name__}: {error}") from error
        if not isinstance(data, bytes):
            raise UserError(
                f"{FORMATS.key} is {self.kind!r}, whose read() returned {type(data).__name__}; it "
                "must return the bytes of an image file"
            )
        require_size(len(data))
        return data
