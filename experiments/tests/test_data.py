"""Images: MNIST in every supported form, CIFAR-10, and the refusal of damaged files."""

import gzip
import hashlib
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from wellcond_experiments import data

TRAIN, TEST, SIDE = 20, 10, 28
STEMS = {key: stem for key, (stem, _) in data.MNIST_FILES.items()}


def idx(array: np.ndarray) -> bytes:
    sizes = struct.pack(f">{array.ndim}I", *array.shape)
    return bytes([0, 0, 8, array.ndim]) + sizes + array.tobytes()


@pytest.fixture
def arrays() -> dict[str, np.ndarray]:
    source = np.random.default_rng(0)
    images, labels = (TRAIN, SIDE, SIDE), (TEST, SIDE, SIDE)
    return {
        "x_train": source.integers(0, 256, images, dtype=np.uint8),
        "y_train": source.integers(0, 10, TRAIN, dtype=np.uint8),
        "x_test": source.integers(0, 256, labels, dtype=np.uint8),
        "y_test": source.integers(0, 10, TEST, dtype=np.uint8),
    }


@pytest.fixture
def directory(tmp_path: Path, arrays: dict[str, np.ndarray]) -> Path:
    for key, stem in STEMS.items():
        (tmp_path / stem).write_bytes(idx(arrays[key]))
    return tmp_path


def assert_read(path: Path, arrays: dict[str, np.ndarray]) -> None:
    read = data.read(path)
    for key, array in arrays.items():
        torch.testing.assert_close(read[key], torch.from_numpy(array))


# --- every form -----------------------------------------------------------------------------------


def test_idx_files_are_read(directory: Path, arrays: dict[str, np.ndarray]) -> None:
    assert_read(directory, arrays)


def test_gzipped_idx_files_are_read(directory: Path, arrays: dict[str, np.ndarray]) -> None:
    for stem in STEMS.values():
        (directory / f"{stem}.gz").write_bytes(gzip.compress((directory / stem).read_bytes()))
        (directory / stem).unlink()
    assert_read(directory, arrays)


def test_idx_files_with_a_dot_are_read(directory: Path, arrays: dict[str, np.ndarray]) -> None:
    for stem in STEMS.values():
        (directory / stem).rename(directory / stem.replace("-idx", ".idx"))
    assert_read(directory, arrays)


def test_npz_is_read_as_a_file_and_in_its_directory(
    tmp_path: Path, arrays: dict[str, np.ndarray]
) -> None:
    np.savez_compressed(tmp_path / "mnist.npz", **arrays)
    assert_read(tmp_path / "mnist.npz", arrays)
    assert_read(tmp_path, arrays)


def test_images_are_flat_and_between_zero_and_one(
    directory: Path, arrays: dict[str, np.ndarray]
) -> None:
    images = data.load(str(directory))
    assert images.x_train.shape == (TRAIN, SIDE**2)
    torch.testing.assert_close(
        images.x_test.reshape(TEST, SIDE, SIDE) * 255, torch.from_numpy(arrays["x_test"]).float()
    )
    assert images.y_train.dtype == torch.int64


def test_mnist_is_found_by_the_environment(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WELLCOND_DATA", str(directory))
    assert data.load("mnist").x_train.shape == (TRAIN, SIDE**2)


def test_the_real_mnist_is_read(mnist: Path) -> None:
    images = data.load(str(mnist))
    assert (len(images.x_train), len(images.x_test), images.pixels) == (60_000, 10_000, 784)
    # The usual mean and deviation of MNIST.
    assert float(images.mean) == pytest.approx(0.1307, abs=1e-4)
    assert float(images.std) == pytest.approx(0.3081, abs=1e-4)
    assert torch.bincount(images.y_test).tolist()[:3] == [980, 1135, 1032]


# --- damage ---------------------------------------------------------------------------------------


def test_missing_data_names_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no such file or directory.*--data DIR or WELLCOND_DATA"):
        data.load(str(tmp_path / "absent"))
    with pytest.raises(ValueError, match=r"does not contain train-images-idx3-ubyte, plain"):
        data.load(str(tmp_path))


@pytest.mark.parametrize("kept", [0, 3, 10, 500])
def test_truncated_idx_is_refused(directory: Path, kept: int) -> None:
    path = directory / STEMS["x_test"]
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"t10k-images-idx3-ubyte is (truncated|not an idx file)"):
        data.read(directory)


def test_overlong_idx_is_refused(directory: Path) -> None:
    path = directory / STEMS["y_test"]
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(ValueError, match="header gives 10 bytes of data, but it has 11"):
        data.read(directory)


def test_wrong_magic_is_refused(directory: Path) -> None:
    path = directory / STEMS["x_train"]
    path.write_bytes(b"\x00\x00\x0d\x03" + path.read_bytes()[4:])  # 0x0d: float32
    with pytest.raises(ValueError, match="not an idx file of bytes: it begins with 00000d03"):
        data.read(directory)


def test_empty_idx_is_refused(directory: Path) -> None:
    (directory / STEMS["x_train"]).write_bytes(idx(np.zeros((0, SIDE, SIDE), np.uint8)))
    with pytest.raises(ValueError, match="is empty: its header gives 0 x 28 x 28"):
        data.read(directory)


@pytest.mark.parametrize("spoil", [lambda raw: raw[: len(raw) // 2], lambda raw: raw[1:]])
def test_damaged_gzip_is_refused(directory: Path, spoil) -> None:
    plain = directory / STEMS["x_train"]
    (directory / f"{plain.name}.gz").write_bytes(spoil(gzip.compress(plain.read_bytes())))
    plain.unlink()
    with pytest.raises(ValueError, match=r"train-images-idx3-ubyte\.gz is damaged"):
        data.read(directory)


def test_mislabelled_files_are_refused(directory: Path) -> None:
    images, labels = (directory / STEMS[key] for key in ("x_train", "y_train"))
    content = images.read_bytes()
    images.write_bytes(labels.read_bytes())
    labels.write_bytes(content)
    with pytest.raises(ValueError, match="Are the files named correctly"):
        data.read(directory)


def test_labels_of_another_set_are_refused(directory: Path) -> None:
    (directory / STEMS["y_train"]).write_bytes((directory / STEMS["y_test"]).read_bytes())
    with pytest.raises(ValueError, match="20 train images but 10 labels"):
        data.read(directory)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.pop("y_test"), "it lacks y_test"),
        (lambda a: a.update(x_train=a["x_train"] / 255), "x_train must be uint8, got float64"),
        (lambda a: a.update(y_test=a["y_test"] + np.uint8(10)), "labels must be 0 to 9"),
        (lambda a: a.update(x_test=a["x_test"][:, :14, :14]), "square and of one size"),
        (
            lambda a: a.update(x_train=a["x_train"][..., 1:], x_test=a["x_test"][..., 1:]),
            "square and of one size",
        ),
        (lambda a: a.update(y_train=np.array([None])), "Object arrays cannot be loaded"),
    ],
)
def test_npz_of_something_else_is_refused(
    tmp_path: Path, arrays: dict[str, np.ndarray], change, message: str
) -> None:
    change(arrays)
    np.savez(tmp_path / "mnist.npz", **arrays)
    with pytest.raises(ValueError, match=message):
        data.read(tmp_path)


def test_damaged_npz_is_refused(tmp_path: Path, arrays: dict[str, np.ndarray]) -> None:
    path = tmp_path / "mnist.npz"
    np.savez_compressed(path, **arrays)
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 3] ^= 0xFF
    for content in (b"", b"hello", whole[: len(whole) // 2], bytes(flipped)):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"is not a readable \.npz of MNIST"):
            data.read(path)


def test_a_single_array_is_not_an_npz(tmp_path: Path) -> None:
    np.save(tmp_path / "mnist.npy", np.zeros(3, np.uint8))
    with pytest.raises(ValueError, match=r"is not a readable \.npz of MNIST"):
        data.read(tmp_path / "mnist.npy")


# --- colour ---------------------------------------------------------------------------------------


@pytest.fixture
def coloured(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Makes colour images whose green and blue are darker than red by 1 and 2."""
    dark = np.arange(3, dtype=np.uint8)
    return {
        key: array[..., None].clip(2) - dark if key.startswith("x") else array
        for key, array in arrays.items()
    }


def test_colour_is_read_channel_after_channel(
    tmp_path: Path, coloured: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "cifar10.npz"
    np.savez(path, **coloured)
    for source, place in ((str(path), ""), ("cifar10", path), ("cifar10", tmp_path)):
        monkeypatch.setenv("WELLCOND_DATA", str(place))
        images = data.load(source, colour=True)
        assert (images.name, images.side, images.channels) == ("cifar10", SIDE, 3)
        assert images.x_train.shape == (TRAIN, images.pixels) == (TRAIN, 3 * SIDE**2)
        red, green, blue = (255 * images.x_test).unflatten(1, (3, SIDE, SIDE)).unbind(1)
        torch.testing.assert_close(red, torch.from_numpy(coloured["x_test"][..., 0]).float())
        torch.testing.assert_close(red - green, torch.ones_like(red))
        torch.testing.assert_close(red - blue, 2 * torch.ones_like(red))
    assert images.split(0.5).channels == 3


def test_colour_is_refused_where_unsupported(
    tmp_path: Path,
    arrays: dict[str, np.ndarray],
    coloured: dict[str, np.ndarray],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    grey, colour = tmp_path / "grey.npz", tmp_path / "colour.npz"
    np.savez(grey, **arrays)
    np.savez(colour, **coloured)
    with pytest.raises(ValueError, match=r"contains colour images\. Only cifar10-plain"):
        data.load(str(colour))
    for source, path, other in (("cifar10", grey, "mnist"), ("mnist", colour, "cifar10")):
        monkeypatch.setenv("WELLCOND_DATA", str(path))
        with pytest.raises(ValueError, match=f"shaped as {other}, not as {source}"):
            data.load(source, colour=True)
    monkeypatch.setenv("WELLCOND_DATA", str(tmp_path))
    with pytest.raises(ValueError, match=r"no such file: .*cifar10\.npz\. CIFAR-10 is not"):
        data.load("cifar10", colour=True)
    monkeypatch.delenv("WELLCOND_DATA")
    with pytest.raises(
        ValueError, match=r"is not downloaded\. .* with --data PATH or WELLCOND_DATA"
    ):
        data.load("cifar10", colour=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.update(x_test=a["x_test"][..., 0]), "of one size, and colour images"),
        (lambda a: a.update({k: a[k].swapaxes(1, 3) for k in ("x_train", "x_test")}), "square"),
        (lambda a: a.update({k: a[k][..., :2] for k in ("x_train", "x_test")}), "three channels"),
        (lambda a: a.update(y_train=a["y_train"][:, None]), "labels 1, got"),
    ],
)
def test_npz_with_wrong_colour_dimensions_is_refused(
    tmp_path: Path, coloured: dict[str, np.ndarray], change, message: str
) -> None:
    change(coloured)
    np.savez(tmp_path / "colour.npz", **coloured)
    with pytest.raises(ValueError, match=message):
        data.load(str(tmp_path / "colour.npz"), colour=True)


# --- download -------------------------------------------------------------------------------------


@pytest.fixture
def mirror(directory: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Makes a mirror on disk and replaces the published md5s by those of its files."""
    place = directory / "mirror"
    place.mkdir()
    files = {}
    for key, stem in STEMS.items():
        content = gzip.compress((directory / stem).read_bytes(), mtime=0)
        (place / f"{stem}.gz").write_bytes(content)
        files[key] = (stem, hashlib.md5(content).hexdigest())
    monkeypatch.setattr(data, "MNIST_FILES", files)
    return f"{place.as_uri()}/"


def names(cache: Path) -> set[str]:
    return {path.name for path in cache.iterdir()} if cache.exists() else set()


def test_download_fetches_what_is_missing(
    mirror: str, tmp_path: Path, arrays: dict[str, np.ndarray]
) -> None:
    cache = tmp_path / "cache"
    assert_read(data.download_mnist(cache, (mirror,)), arrays)
    assert names(cache) == {f"{stem}.gz" for stem in STEMS.values()}
    # All files exist, so no mirror is used.
    assert data.download_mnist(cache, ()) == cache


def test_download_tries_the_next_mirror(mirror: str, tmp_path: Path) -> None:
    absent = (tmp_path / "absent").as_uri() + "/"
    data.download_mnist(tmp_path / "cache", (absent, mirror))


def test_wrong_md5_leaves_nothing(mirror: str, tmp_path: Path) -> None:
    (tmp_path / "mirror" / f"{STEMS['x_train']}.gz").write_bytes(b"a login page")
    with pytest.raises(ValueError, match=r"the md5 of train-images-idx3-ubyte\.gz is not"):
        data.download_mnist(tmp_path / "cache", (mirror,))
    assert names(tmp_path / "cache") == set()


def test_a_damaged_cache_is_fetched_again(
    mirror: str, tmp_path: Path, arrays: dict[str, np.ndarray]
) -> None:
    cache = data.download_mnist(tmp_path / "cache", (mirror,))
    path = cache / f"{STEMS['x_test']}.gz"
    path.write_bytes(path.read_bytes()[:100])
    assert_read(data.download_mnist(cache, (mirror,)), arrays)


def test_an_interrupted_download_keeps_complete_files(
    mirror: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetch, calls = data._fetch, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return fetch(*args)

    monkeypatch.setattr(data, "_fetch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        data.download_mnist(tmp_path / "cache", (mirror,))
    assert names(tmp_path / "cache") == {f"{STEMS['x_train']}.gz"}


def test_failed_download_names_the_remedy(tmp_path: Path) -> None:
    absent = (tmp_path / "absent").as_uri() + "/"
    with pytest.raises(
        ValueError, match=r"could not be downloaded .* Put train-images.*--data DIR"
    ):
        data.download_mnist(tmp_path / "cache", (absent,))
    assert names(tmp_path / "cache") == set()


# --- digits, normalisation, splits ----------------------------------------------------------------


def test_digits_are_reproducible_and_keep_the_global_generator() -> None:
    before = torch.get_rng_state()
    first, second = data.load("digits"), data.load("digits")
    torch.testing.assert_close(first.x_train, second.x_train)
    torch.testing.assert_close(torch.get_rng_state(), before)
    assert (first.side, len(first.x_train), len(first.x_test)) == (8, 1437, 360)
    assert float(first.x_train.min()) == 0
    assert float(first.x_train.max()) == 1
    assert set(first.y_test.tolist()) == set(range(10))


def test_normalised_training_images_have_mean_zero_and_deviation_one() -> None:
    images = data.load("digits")
    x = images.normalise(images.x_train).double()
    # 92,000 float32 pixels: the rounding of mean and deviation is far below 1e-5.
    assert float(x.mean()) == pytest.approx(0, abs=1e-5)
    assert float(x.std()) == pytest.approx(1, abs=1e-5)


def test_a_split_divides_the_training_images_only() -> None:
    images = data.load("digits")
    marked = data.Images(
        "marked",
        1,
        torch.arange(1437.0)[:, None],
        images.y_train,
        images.x_test,
        images.y_test,
    )
    parts = marked.split(0.15)
    assert len(parts.x_test) == 215
    together = torch.cat([parts.x_train, parts.x_test]).flatten().sort().values
    torch.testing.assert_close(together, torch.arange(1437.0))
