"""Photographs from inside scikit-image and scikit-learn, their patches, their noise, and the way back from patches."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

TRAINING = (
    "astronaut.png",
    "brick.png",
    "coins.png",
    "grass.png",
    "gravel.png",
    "moon.png",
    "motorcycle_left.png",
    "rocket.jpg",
    "china.jpg",
    "flower.jpg",
)
TEST = ("camera.png", "chelsea.png", "coffee.png")
_FROM_SKLEARN = ("china.jpg", "flower.jpg")


def file_of(name: str) -> Path:
    """Where an installed package keeps the photograph; nothing is ever downloaded."""
    import skimage
    import sklearn

    if name in _FROM_SKLEARN:
        return Path(sklearn.__file__).parent / "datasets" / "images" / name
    return Path(skimage.__file__).parent / "data" / name


def photograph(name: str) -> np.ndarray:
    """A photograph in 8-bit grey, from 0 to 1."""
    from skimage.color import rgb2gray
    from skimage.io import imread

    image = imread(file_of(name))
    image = rgb2gray(image[..., :3]) if image.ndim == 3 else image / 255
    return (np.round(image * 255) / 255).astype(np.float32)


def halved(image: np.ndarray) -> np.ndarray:
    """The image at half its size, each pixel the mean of four."""
    h, w = (n // 2 for n in image.shape)
    return image[: 2 * h, : 2 * w].reshape(h, 2, w, 2).mean((1, 3), dtype=image.dtype)


def random_patches(images: list[np.ndarray], count: int, size: int, rng: np.random.Generator) -> np.ndarray:
    """Random patches (count, size, size) of the images, as many from each, in the order of the images."""
    each = -(-count // len(images))
    patches = []
    for image in images:
        rows, columns = (rng.integers(0, n - size + 1, each) for n in image.shape)
        patches.append(sliding_window_view(image, (size, size))[rows, columns])
    return np.concatenate(patches)[:count]


def training_patches(count: int, size: int, seed: int) -> np.ndarray:
    """Random patches (count, size * size) of the training photographs at full and half size, flipped and turned."""
    rng = np.random.default_rng(seed)
    images = [photograph(name) for name in TRAINING]
    x = random_patches([*images, *map(halved, images)], count, size, rng)
    turned, upside_down, mirrored = rng.integers(0, 2, (3, len(x), 1, 1)) == 1
    x = np.where(turned, x.transpose(0, 2, 1), x)
    x = np.where(upside_down, x[:, ::-1], x)
    x = np.where(mirrored, x[:, :, ::-1], x)
    return rng.permutation(x.reshape(len(x), -1))


def salt_and_pepper(key: jax.Array, x: jax.Array, amount: float = 0.1) -> jax.Array:
    """x with the given part of its pixels replaced, half by black and half by white."""
    u = jax.random.uniform(key, x.shape, x.dtype)
    return jnp.where(u < amount / 2, 0, jnp.where(u < amount, 1, x))


def restored(image: np.ndarray, restore: Callable[[Any], Any], size: int, stride: int, chunk: int) -> np.ndarray:
    """The image after ``restore`` has seen its overlapping patches, ``chunk`` (chunk, size * size) at a time.

    Where patches overlap, their Hann-weighted mean is taken.
    """
    rows, columns = (np.unique([*range(0, n - size + 1, stride), n - size]) for n in image.shape)
    patches = sliding_window_view(image, (size, size))[np.ix_(rows, columns)].reshape(-1, size * size)
    count = len(patches)
    patches = np.concatenate([patches, np.zeros((-count % chunk, size * size), patches.dtype)])
    results = [np.asarray(restore(patches[i : i + chunk])) for i in range(0, len(patches), chunk)]
    results = np.concatenate(results)[:count].reshape(len(rows), len(columns), size, size)
    ramp = np.hanning(size + 2)[1:-1]
    window = np.outer(ramp, ramp)
    total, weight = np.zeros(image.shape), np.zeros(image.shape)
    for i in range(size):
        for j in range(size):
            at = np.ix_(rows + i, columns + j)
            total[at] += window[i, j] * results[:, :, i, j]
            weight[at] += window[i, j]
    return np.clip(total / weight, 0, 1).astype(image.dtype)
