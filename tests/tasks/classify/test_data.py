import io

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from involution.tasks.classify import CIFAR10, Digits, ImageFolder
from involution.tasks.classify.cifar import read_npz
from involution.tasks.classify.data import stratified_split
from involution.tasks.classify.digits import load_scans

SIZE = (40, 48)


def jpeg(pixels: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "JPEG", quality=75)
    return stream.getvalue()


def write_npz(file, images: list[bytes], labels: list[int]) -> None:
    """The layout of data/cifar10_jpeg: a common header, then what differs."""
    common = 0
    while len({image[: common + 1] for image in images}) == 1:
        common += 1
    rest = [np.frombuffer(image[common:], np.uint8) for image in images]
    offsets = np.cumsum([0, *map(len, rest)])
    header = np.frombuffer(images[0][:common], np.uint8)
    np.savez(file, header=header, data=np.concatenate(rest), offsets=offsets, labels=np.array(labels, np.uint8))


def write_tree(root, counts: dict[str, dict[str, int]]) -> None:
    random = np.random.default_rng(0)
    for split, classes in counts.items():
        for name, count in classes.items():
            folder = root / split / name
            folder.mkdir(parents=True)
            for index in range(count):
                pixels = random.integers(0, 255, (*SIZE, 3), dtype=np.uint8)
                (folder / f"{index}.jpg").write_bytes(jpeg(pixels))


def test_stratified_split_keeps_shares_and_repeats_itself():
    labels = torch.arange(1000) % 10
    kept, held = stratified_split(labels, 0.3)
    assert sorted([*kept.tolist(), *held.tolist()]) == list(range(1000))
    assert labels[held].bincount().tolist() == [30] * 10
    torch.manual_seed(5)
    assert torch.equal(stratified_split(labels, 0.3)[1], held)


@pytest.fixture(scope="module")
def digits() -> Digits:
    data = Digits()
    data.setup("fit")
    return data


def test_digits_sizes_and_shares(digits):
    parts = [digits.train_set, digits.val_set, digits.test_set]
    assert [len(part) for part in parts] == [1293, 144, 360]
    shares = [part.labels.bincount(minlength=10) / len(part) for part in parts]
    for share in shares:
        torch.testing.assert_close(share, load_scans()[1].bincount() / 1797, atol=0.005, rtol=0)


def test_digits_test_set_is_the_agreed_fifth(digits):
    bunch = load_digits()
    _, scans, _, labels = train_test_split(
        bunch.images, bunch.target, test_size=0.2, stratify=bunch.target, random_state=0
    )
    assert digits.test_set.labels.tolist() == labels.tolist()
    images = digits.test_set.images[:, 0].numpy() * 16
    # Scaled up by three, every third pixel lies on a pixel of the scan.
    np.testing.assert_allclose(images[:, 5:28:3, 5:28:3], scans, atol=1e-5)
    np.testing.assert_allclose(images.sum(axis=(1, 2)), 9 * scans.sum(axis=(1, 2)), rtol=1e-4)


def test_digits_parts_share_no_image(digits):
    parts = [digits.train_set, digits.val_set, digits.test_set]
    scans = [{image.numpy().tobytes() for image in part.images} for part in parts]
    everything = {image.numpy().tobytes() for image in load_scans()[0]}
    assert len(everything) == 1797  # no two scans are equal, so the next line can tell
    assert sum(map(len, scans)) == len(set.union(*scans)) == 1797


def test_digits_batches(digits):
    images, labels = next(iter(digits.train_dataloader()))
    assert (images.shape, images.dtype) == ((32, 3, 32, 32), torch.float32)
    assert (labels.shape, labels.dtype) == ((32,), torch.int64)
    everything = torch.stack([digits.train_set[i][0] for i in range(len(digits.train_set))])
    assert abs(everything.mean()) < 0.1
    assert abs(everything.std() - 1) < 0.1


def test_only_training_images_are_shifted(digits):
    torch.manual_seed(0)
    assert not torch.equal(digits.train_set[0][0], digits.train_set[0][0])
    assert torch.equal(digits.val_set[0][0], digits.val_set[0][0])
    assert torch.equal(digits.test_set[0][0], digits.test_set[0][0])


def test_npz_round_trip(tmp_path):
    random = np.random.default_rng(0)
    images = [jpeg(random.integers(0, 255, (32, 32, 3), dtype=np.uint8)) for _ in range(5)]
    write_npz(tmp_path / "a.npz", images, [3, 1, 4, 1, 5])
    decoded, labels = read_npz(tmp_path / "a.npz")
    assert labels.tolist() == [3, 1, 4, 1, 5]
    assert labels.dtype == torch.int64
    for image, stream in zip(decoded, images, strict=True):
        expected = np.asarray(Image.open(io.BytesIO(stream)).convert("RGB"))
        assert np.array_equal(image.permute(1, 2, 0).numpy(), expected)


def test_npz_of_cifar10_decodes_as_pil_does(data_folder):
    file = data_folder / "cifar10_jpeg" / "test.npz"
    if not file.is_file():
        pytest.skip(f"no {file}")
    images, labels = read_npz(file)
    assert images.shape == (10000, 3, 32, 32)
    assert labels.bincount().tolist() == [1000] * 10
    with np.load(file) as z:
        header, data, offsets = z["header"].tobytes(), z["data"], z["offsets"]
    for i in range(0, 10000, 97):
        stream = io.BytesIO(header + data[offsets[i] : offsets[i + 1]].tobytes())
        assert np.array_equal(images[i].permute(1, 2, 0).numpy(), np.asarray(Image.open(stream)))


@pytest.fixture
def tiny_cifar(tmp_path):
    random = np.random.default_rng(0)
    for part, count in (("train", 100), ("test", 20)):
        images = [jpeg(random.integers(0, 255, (32, 32, 3), dtype=np.uint8)) for _ in range(count)]
        write_npz(tmp_path / f"{part}.npz", images, [i % 10 for i in range(count)])
    return tmp_path


def test_cifar10_holds_out_of_training_only(tiny_cifar):
    data = CIFAR10(str(tiny_cifar), val_size=30, num_workers=0)
    data.setup("fit")
    assert (len(data.train_set), len(data.val_set)) == (70, 30)
    assert data.val_set.labels.bincount().tolist() == [3] * 10
    data.setup("test")
    assert torch.equal(data.test_set.images, read_npz(tiny_cifar / "test.npz")[0])


def test_cifar10_from_torchvision(tmp_path, monkeypatch):
    pixels = np.random.default_rng(0).integers(0, 255, (40, 32, 32, 3), dtype=np.uint8)

    class Downloaded:
        base_folder = "cifar-10-batches-py"

        def __init__(self, root, train=True, download=False):
            if download:
                (root / self.base_folder).mkdir()
            self.data = pixels if train else pixels[:10]
            self.targets = [i % 10 for i in range(len(self.data))]

    monkeypatch.setattr(CIFAR10, "dataset", Downloaded)
    data = CIFAR10(str(tmp_path), val_size=10)
    data.prepare_data()
    with pytest.raises(FileNotFoundError, match="root must hold"):
        data.setup("fit")
    data = CIFAR10(str(tmp_path), download=True, val_size=10)
    data.prepare_data()
    data.setup("test")
    assert np.array_equal(data.test_set.images[7].permute(1, 2, 0).numpy(), pixels[7])
    assert data.test_set.labels.tolist() == list(range(10))


def test_cifar10_names_what_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"root must hold train.npz or cifar-10-batches-py/.*download=true"):
        CIFAR10(str(tmp_path)).setup("fit")


def test_image_folder_batches(tmp_path):
    write_tree(tmp_path, {split: {"cat": 3, "dog": 2} for split in ("train", "val", "test")})
    data = ImageFolder(str(tmp_path), batch_size=4, num_workers=0, image_size=32, resize=36)
    assert (data.classes, data.num_classes) == (["cat", "dog"], 2)
    data.setup("fit")
    data.setup("test")
    images, labels = next(iter(data.test_dataloader()))
    assert (images.shape, images.dtype) == ((4, 3, 32, 32), torch.float32)
    assert labels.tolist() == [0, 0, 0, 1]
    assert sum(len(labels) for _, labels in data.train_dataloader()) == 5


def test_image_folder_needs_no_test_images_to_train(tmp_path):
    write_tree(tmp_path, {"train": {"cat": 1}, "val": {"cat": 1}})
    data = ImageFolder(str(tmp_path))
    data.setup("fit")
    with pytest.raises(FileNotFoundError, match="'test'"):
        data.setup("test")


@pytest.mark.parametrize(
    ("tree", "error", "message"),
    [
        ({}, FileNotFoundError, "root must hold a folder 'train'"),
        ({"train": {"cat": 1, "dog": 1}}, FileNotFoundError, "root must hold a folder 'val'"),
        ({"train": {}}, FileNotFoundError, "root must hold a folder 'train'"),
        ({"train": {"cat": 1, "dog": 0}, "val": {"cat": 1, "dog": 1}}, FileNotFoundError, "dog"),
        ({"train": {"cat": 1, "dog": 1}, "val": {"cat": 1}}, ValueError, r"val lacks \['dog'\]"),
        ({"train": {"cat": 1}, "val": {"cat": 1, "cow": 1}}, ValueError, r"besides \['cow'\]"),
    ],
)
def test_image_folder_names_what_is_wrong(tmp_path, tree, error, message):
    write_tree(tmp_path, tree)
    with pytest.raises(error, match=message):
        ImageFolder(str(tmp_path)).setup("fit")


def test_image_folder_with_an_empty_split(tmp_path):
    (tmp_path / "train").mkdir()
    with pytest.raises(ValueError, match=r"a folder per class in 'train'"):
        ImageFolder(str(tmp_path)).setup("fit")
