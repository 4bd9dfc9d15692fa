"""What the networks learn: handwritten digits, and an English text, both of which come with scikit-learn."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from sklearn.datasets import load_digits  # type: ignore[import-untyped]

from gradclip._lab.layers import Array

__all__ = ["Data", "Labels", "batches", "fingerprint", "split_digits", "split_text"]

Labels: TypeAlias = npt.NDArray[np.integer[Any]]

CONTEXT = 40  # characters in one example of text


@dataclass(frozen=True)
class Data:
    """Examples along the first axis, in two parts.

    Attributes:
        classes: How many labels there are.
    """

    train_x: Array
    train_y: Labels
    test_x: Array
    test_y: Labels
    classes: int


@cache
def split_digits(seed: int, test_share: float = 0.2) -> Data:
    """scikit-learn's 1797 handwritten digits, 8 x 8 pixels, scaled by the training part and split."""
    pixels, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(seed).permutation(len(labels))
    test, train = np.split(order, [round(test_share * len(labels))])
    x = (pixels - pixels[train].mean(axis=0)) / pixels[train].std()
    x = x.astype(np.float32)
    return Data(x[train], labels[train], x[test], labels[test], 10)


@cache
def english() -> str:
    """The descriptions of scikit-learn's data sets, in lower case: some 40 000 characters of prose."""
    folder = files("sklearn.datasets") / "descr"
    texts = sorted(
        (p.name, p.read_text(encoding="utf-8")) for p in folder.iterdir() if p.name.endswith(".rst")
    )
    return " ".join(" ".join(text for _, text in texts).lower().split())


@cache
def split_text(seed: int, test_share: float = 0.1) -> Data:
    """Windows of the text, one-hot, labelled with what follows each character; the last part is for tests.

    The seed is unused: a text is split where it is, or the test would be known from the windows around it.
    """
    del seed
    alphabet, codes = np.unique(
        np.frombuffer(english().encode("ascii", "replace"), np.uint8), return_inverse=True
    )
    windows = np.lib.stride_tricks.sliding_window_view(codes, CONTEXT + 1)[:: CONTEXT // 4]
    one_hot = np.eye(len(alphabet), dtype=np.float32)
    train, test = np.split(windows, [round((1 - test_share) * len(windows))])
    train = train[: len(train) - 4]  # which reach into the test
    return Data(one_hot[train[:, :-1]], train[:, 1:], one_hot[test[:, :-1]], test[:, 1:], len(alphabet))


def fingerprint() -> str:
    """Of digits and text together: rows of other data are not comparable."""
    digits = load_digits(return_X_y=True)
    return f"{zlib.crc32(english().encode(), zlib.crc32(digits[0].tobytes())):08x}"


def batches(count: int, size: int, rng: np.random.Generator) -> Iterator[npt.NDArray[np.int64]]:
    """Indices of one batch after another, in a new random order every epoch, without end."""
    size = min(size, count)
    while True:
        order = rng.permutation(count)
        yield from (order[i : i + size] for i in range(0, count - size + 1, size))
