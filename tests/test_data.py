"""MNIST is read whole and right, or not at all; the digits need no download."""

import gzip
import hashlib
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from wellcond.experiments import data

STEMS = {key: stem for key, (stem, _) in data.MNIST_FILES.items()}


def arrays(seed: int = 0) -> dict[str, np.ndarray]:
    source = np.random.default_rng(seed)
    return {
        "x_train": source.integers(0, 256, (30, 28, 28), dtype=np.uint8),
        "y_train": source.integers(0, 10, 30, dtype=np.uint8),
        "x_test": source.integers(0, 256, (12, 28, 28), dtype=np.uint8),
        "y_test": source.integers(0, 10, 12, dtype=np.uint8),
    }


def idx(array: np.ndarray) -> bytes:
    header = struct.pack(f">{1 + array.ndim}I", 0x0800 + array.ndim, *array.shape)
    return header + array.tobytes()


def write(directory: Path, files: dict[str, np.ndarray], compressed: bool = False) -> Path:
    directory.mkdir(exist_ok=True)
    for key, array in files.items():
        raw = gzip.compress(idx(array)) if compressed else idx(array)
        (directory / (STEMS[key] + (".gz" if compressed else ""))).write_bytes(raw)
    return directory


@pytest.mark.parametrize("form", ["idx", "gz", "npz", "npz in a directory"])
def test_every_form_gives_the_same_arrays(form: str, tmp_path: Path) -> None:
    files = arrays()
    path = tmp_path
    if form.startswith("npz"):
        np.savez(tmp_path / "mnist.npz", **files)
        path = tmp_path if "directory" in form else tmp_path / "mnist.npz"
    else:
        write(tmp_path, files, compressed=form == "gz")
    for key, tensor in data.read_mnist(path).items():
        assert torch.equal(tensor, torch.from_numpy(files[key]))
    images = data.load(str(path))
    assert images.x_train.shape == (30, 784)
    assert 0 <= images.x_train.min() <= images.x_train.max() <= 1
    torch.testing.assert_close(images.normalised(images.x_train).std(), torch.tensor(1.0))


def damage(directory: Path, how: str) -> str:
    """Damages the files; returns what the error must say."""
    images, labels = directory / STEMS["x_train"], directory / STEMS["y_test"]
    raw = images.read_bytes()
    if how == "truncated":
        images.write_bytes(raw[:-1])
        return "is truncated or overlong"
    if how == "truncated in the header":
        images.write_bytes(raw[:9])
        return "is truncated"
    if how == "empty":
        images.write_bytes(b"")
        return "is no idx file"
    if how == "another magic":
        images.write_bytes(b"PK\x03\x04" + raw[4:])
        return "is no idx file"
    if how == "missing":
        labels.unlink()
        return "holds no t10k-labels-idx1-ubyte"
    if how == "labels for images":
        images.write_bytes(labels.read_bytes())
        return "images must have 3 dimensions"
    if how == "another count":
        labels.write_bytes(idx(arrays()["y_test"][:-1]))
        return "12 test images but 11 labels"
    if how == "labels above 9":
        labels.write_bytes(idx(np.full(12, 17, dtype=np.uint8)))
        return "labels must be 0 to 9, got 17"
    images.unlink()
    (directory / f"{images.name}.gz").write_bytes(gzip.compress(raw)[:-20])
    return "is damaged"


@pytest.mark.parametrize(
    "how",
    [
        "truncated",
        "truncated in the header",
        "empty",
        "another magic",
        "missing",
        "labels for images",
        "another count",
        "labels above 9",
        "truncated gz",
    ],
)
def test_damaged_files_are_named(how: str, tmp_path: Path) -> None:
    message = damage(write(tmp_path, arrays()), how)
    with pytest.raises(ValueError, match=message):
        data.read_mnist(tmp_path)


def test_bad_archives_are_named(tmp_path: Path) -> None:
    path = tmp_path / "mnist.npz"
    files = arrays()
    np.savez(path, **files)
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(ValueError, match=r"is no readable \.npz"):
        data.read_mnist(path)
    np.savez(path, x_train=files["x_train"])
    with pytest.raises(ValueError, match="it lacks y_train"):
        data.read_mnist(path)
    np.savez(path, **(files | {"x_test": files["x_test"].astype(np.float32)}))
    with pytest.raises(ValueError, match="x_test must be uint8, got float32"):
        data.read_mnist(path)
    with pytest.raises(ValueError, match="no such file or directory"):
        data.read_mnist(tmp_path / "elsewhere")


def test_downloads_are_checked_and_kept_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mirrors are directories here; the code that fetches is the same."""
    good = write(tmp_path / "good", arrays(), compressed=True)
    bad = write(tmp_path / "bad", arrays(seed=1), compressed=True)
    md5 = {
        key: (stem, hashlib.md5((good / f"{stem}.gz").read_bytes()).hexdigest())
        for key, stem in STEMS.items()
    }
    monkeypatch.setattr(data, "MNIST_FILES", md5)
    mirrors = tuple(f"{path.as_uri()}/" for path in (tmp_path / "none", bad, good))
    cache = tmp_path / "cache"
    assert data.download_mnist(cache, mirrors) == cache
    assert sorted(path.name for path in cache.iterdir()) == sorted(
        f"{s}.gz" for s in STEMS.values()
    )
    assert len(data.read_mnist(cache)["x_train"]) == 30
    data.download_mnist(cache, ())  # nothing is fetched twice
    with pytest.raises(ValueError, match=r"could not be downloaded.*md5.*Put train-images"):
        data.download_mnist(tmp_path / "other", mirrors[:2])
    assert not (tmp_path / "other").exists()


def test_digits_are_split_once_and_for_all() -> None:
    images = data.load("digits")
    assert images.x_train.shape == (1437, 64)
    assert images.x_test.shape == (360, 64)
    assert torch.equal(images.x_train, data.load("digits").x_train)
    held_out = images.split(0.2)
    assert (len(held_out.x_train), len(held_out.x_test)) == (1150, 287)
    both = torch.cat([held_out.x_train, held_out.x_test]).sort(0).values
    assert torch.equal(both, images.x_train.sort(0).values)


def test_real_mnist_is_the_real_thing(mnist: Path) -> None:
    images = data.load(str(mnist))
    assert (len(images.x_train), len(images.x_test)) == (60000, 10000)
    assert images.y_train[:10].tolist() == [5, 0, 4, 1, 9, 2, 1, 3, 1, 4]
    torch.testing.assert_close(images.mean, torch.tensor(0.13066), rtol=0, atol=1e-5)
    torch.testing.assert_close(images.std, torch.tensor(0.30811), rtol=0, atol=1e-5)
