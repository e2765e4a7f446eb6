"""Training images: scikit-learn's digits, which need no download, MNIST and CIFAR-10.

MNIST is read from a directory or a file: four idx files, plain or .gz, or an .npz with uint8 arrays
x_train, y_train, x_test, y_test. Without a path it is downloaded, checked by md5, and cached.
CIFAR-10 is an .npz of the same form with images (N, side, side, 3). It is not downloaded.
"""

from __future__ import annotations

import gzip
import hashlib
import http.client
import math
import os
import struct
import urllib.request
import zlib
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from wellcond_experiments.command import replacing

# The four files as published, with the md5 of their .gz.
MNIST_FILES = {
    "x_train": ("train-images-idx3-ubyte", "f68b3c2dcbeaaa9fbdd348bbdeb94873"),
    "y_train": ("train-labels-idx1-ubyte", "d53e105ee54ea40749a09fcbcd1e9432"),
    "x_test": ("t10k-images-idx3-ubyte", "9fb629c4189551a2d022fa330f9573f3"),
    "y_test": ("t10k-labels-idx1-ubyte", "ec29112dd5afa0611ce80d1b7f02629c"),
}
MIRRORS = (
    "https://ossci-datasets.s3.amazonaws.com/mnist/",
    "https://storage.googleapis.com/cvdf-datasets/mnist/",
)
WHERE = (
    "Put train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-images-idx3-ubyte and "
    "t10k-labels-idx1-ubyte (plain or .gz), or a mnist.npz, into a directory and pass it with "
    "--data DIR or WELLCOND_DATA."
)
WHERE_CIFAR10 = (
    "CIFAR-10 is not downloaded. Pass an .npz with uint8 arrays x_train (N, 32, 32, 3), y_train, "
    "x_test and y_test with --data PATH or WELLCOND_DATA."
)


@dataclass(frozen=True)
class Images:
    """Flat images in [0, 1], (N, channels side^2) float32, with labels (N,) int64.

    Images are grey, or have three channels, one after another.
    """

    name: str
    side: int
    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor
    channels: int = 1

    @property
    def pixels(self) -> int:
        return self.channels * self.side**2

    @property
    def mean(self) -> Tensor:
        return self.x_train.mean()

    @property
    def std(self) -> Tensor:
        return self.x_train.std()

    def normalise(self, x: Tensor) -> Tensor:
        """Returns (x - mean)/std, with mean and std of the training images."""
        return (x - self.mean) / self.std

    def split(self, share: float, seed: int = 0) -> Images:
        """Returns the images with a share of the training set as the test set."""
        order = _permutation(len(self.x_train), seed)
        held = int(share * len(order))
        train, validation = order[held:], order[:held]
        x, y = self.x_train, self.y_train
        return replace(
            self, x_train=x[train], y_train=y[train], x_test=x[validation], y_test=y[validation]
        )


def _permutation(count: int, seed: int) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))


def load(source: str, colour: bool = False) -> Images:
    """Loads the images of `--data`: "digits", "mnist", "cifar10", or a path to MNIST or CIFAR-10.

    Args:
        source: the name or the path.
        colour: whether colour images are accepted.

    Raises:
        ValueError: if a file is missing, truncated or mislabelled, or if a download fails.
    """
    if source == "digits":
        return _digits()
    path, local = Path(source), os.environ.get("WELLCOND_DATA")
    if source == "mnist":
        path = Path(local) if local else download_mnist()
    if source == "cifar10":
        if not local:
            raise ValueError(WHERE_CIFAR10)
        path = Path(local, "cifar10.npz") if Path(local).is_dir() else Path(local)
        if not path.is_file():
            raise ValueError(f"no such file: {path}. {WHERE_CIFAR10}")
    images = _images(read(path))
    if source in ("mnist", "cifar10") and images.name != source:
        raise ValueError(f"{path} contains images shaped as {images.name}, not as {source}.")
    if images.channels > 1 and not colour:
        raise ValueError(
            f"{path} contains colour images. Only cifar10-plain, cifar10-batch-norm and "
            "cifar10-vit of `wellcond reproduce` accept them."
        )
    return images


def _digits() -> Images:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    x = torch.tensor(bunch.data / 16, dtype=torch.float32)
    y = torch.tensor(bunch.target, dtype=torch.int64)
    order = _permutation(len(x), seed=0)
    train, test = order[360:], order[:360]  # 1437 for training, 360 for testing
    return Images("digits", 8, x[train], y[train], x[test], y[test])


def _images(arrays: dict[str, Tensor]) -> Images:
    colour = arrays["x_train"].ndim == 4
    x_train, x_test = (
        (arrays[key].movedim(3, 1) if colour else arrays[key]).flatten(1).float() / 255
        for key in ("x_train", "x_test")
    )
    y_train, y_test = (arrays[key].long() for key in ("y_train", "y_test"))
    name, channels = ("cifar10", 3) if colour else ("mnist", 1)
    side = arrays["x_train"].shape[2]
    return Images(name, side, x_train, y_train, x_test, y_test, channels)


def read(path: Path) -> dict[str, Tensor]:
    """Reads the four uint8 arrays of MNIST (.npz or directory) or CIFAR-10 (.npz).

    Raises:
        ValueError: if the file is missing, damaged or of another kind.
    """
    if path.is_file():
        arrays = _read_npz(path)
    elif (path / "mnist.npz").is_file():
        arrays = _read_npz(path / "mnist.npz")
    elif path.is_dir():
        arrays = {key: _read_idx(_find(path, stem)) for key, (stem, _) in MNIST_FILES.items()}
    else:
        raise ValueError(f"no such file or directory: {path}. {WHERE}")
    return _check(arrays, path)


def _find(directory: Path, stem: str) -> Path:
    for name in (stem, f"{stem}.gz", stem.replace("-idx", ".idx")):
        if (directory / name).is_file():
            return directory / name
    raise ValueError(f"{directory} does not contain {stem}, plain or .gz. {WHERE}")


def _read_npz(path: Path) -> dict[str, Tensor]:
    import zipfile

    import numpy as np

    try:
        with np.load(path, allow_pickle=False) as archive:
            missing = [key for key in MNIST_FILES if key not in archive]
            if missing:
                raise ValueError(f"it lacks {', '.join(missing)}")
            arrays = {key: archive[key] for key in MNIST_FILES}
    except (
        *(OSError, ValueError, EOFError, TypeError, NotImplementedError),
        *(zipfile.BadZipFile, zlib.error),
    ) as error:
        raise ValueError(f"{path} is not a readable .npz of MNIST or CIFAR-10: {error}.") from None
    for key, array in arrays.items():
        if array.dtype != np.uint8:
            raise ValueError(f"{path}: {key} must be uint8, got {array.dtype}.")
    return {key: torch.from_numpy(array) for key, array in arrays.items()}


def _read_idx(path: Path) -> Tensor:
    """Reads an idx file: magic 0, 0, 8 (uint8), dimensions, big-endian sizes, bytes."""
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is damaged: {error}. Download it again.") from None
    if len(raw) < 4 or raw[:3] != b"\x00\x00\x08" or raw[3] not in (1, 3):
        raise ValueError(
            f"{path} is not an idx file of bytes: it begins with {raw[:4].hex() or 'nothing'}."
        )
    dimensions = raw[3]
    header = 4 + 4 * dimensions
    if len(raw) < header:
        raise ValueError(f"{path} is truncated: {len(raw)} bytes. Download it again.")
    shape = struct.unpack(f">{dimensions}I", raw[4:header])
    count = math.prod(shape)
    if count == 0:
        raise ValueError(f"{path} is empty: its header gives {' x '.join(map(str, shape))}.")
    if len(raw) != header + count:
        raise ValueError(
            f"{path} is truncated or too long: its header gives {count} bytes of data, but it has "
            f"{len(raw) - header}. Download it again."
        )
    return torch.frombuffer(bytearray(raw), dtype=torch.uint8, offset=header).reshape(shape)


def _check(arrays: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    for part in ("train", "test"):
        x, y = arrays[f"x_{part}"], arrays[f"y_{part}"]
        if x.ndim not in (3, 4) or y.ndim != 1:
            raise ValueError(
                f"{path}: images must have 3 dimensions, or 4 in colour, and labels 1, got "
                f"{tuple(x.shape)} and {tuple(y.shape)} for {part}. "
                "Are the files named correctly?"
            )
        if len(x) != len(y) or len(x) == 0:
            raise ValueError(f"{path}: {len(x)} {part} images but {len(y)} labels.")
        if int(y.max()) > 9:
            raise ValueError(f"{path}: {part} labels must be 0 to 9, got {int(y.max())}.")
    shapes = {tuple(arrays[key].shape[1:]) for key in ("x_train", "x_test")}
    if len(shapes) > 1 or any(s[0] != s[1] or s[2:] not in ((), (3,)) for s in shapes):
        raise ValueError(
            f"{path}: images must all be square and of one size, and colour images must have "
            f"three channels in the last dimension, got {shapes}."
        )
    return arrays


def download_mnist(directory: Path | None = None, mirrors: tuple[str, ...] = MIRRORS) -> Path:
    """Downloads missing files into a cache, each complete and with the right md5."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    directory = directory or cache / "wellcond" / "mnist"
    for stem, md5 in MNIST_FILES.values():
        target = directory / f"{stem}.gz"
        if target.is_file() and _md5(target.read_bytes()) == md5:
            continue
        content = _fetch(f"{stem}.gz", md5, mirrors)
        with replacing(target) as part:
            part.write_bytes(content)
    return directory


def _md5(content: bytes) -> str:
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


def _fetch(name: str, md5: str, mirrors: tuple[str, ...]) -> bytes:
    troubles = []
    for mirror in mirrors:
        try:
            with urllib.request.urlopen(mirror + name, timeout=30) as response:
                content: bytes = response.read()
        except (OSError, ValueError, http.client.HTTPException) as error:
            troubles.append(f"{mirror}: {error}")
            continue
        if _md5(content) == md5:
            return content
        troubles.append(f"{mirror}: the md5 of {name} is not {md5}")
    raise ValueError(f"MNIST could not be downloaded ({'; '.join(troubles)}). {WHERE}")
