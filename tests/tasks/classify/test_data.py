import io
import random

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from involution.tasks.classify import CIFAR10, CIFAR100, Digits, ImageFolder, ImageNet, Imagenette
from involution.tasks.classify.data.base import stratified_split
from involution.tasks.classify.data.cifar import read_npz
from involution.tasks.classify.data.digits import load_scans
from involution.tasks.classify.preprocessing import Preprocessing, random_crops

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


def write_tree(root, counts: dict[str, dict[str, int]], suffix: str = ".jpg") -> None:
    random = np.random.default_rng(0)
    for split, classes in counts.items():
        for name, count in classes.items():
            folder = root / split / name
            folder.mkdir(parents=True)
            for index in range(count):
                pixels = random.integers(0, 255, (*SIZE, 3), dtype=np.uint8)
                (folder / f"{index}{suffix}").write_bytes(jpeg(pixels))


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


def test_only_training_images_are_augmented(digits):
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
    write_tree(tmp_path, {split: {"cat": 3, "dog": 3} for split in ("train", "val", "test")})
    data = ImageFolder(str(tmp_path), batch_size=4, num_workers=0, image_size=32, resize=36)
    assert (data.classes, data.num_classes) == (["cat", "dog"], 2)
    data.setup("fit")
    data.setup("test")
    images, labels = next(iter(data.test_dataloader()))
    assert (images.shape, images.dtype) == ((4, 3, 32, 32), torch.float32)
    assert labels.tolist() == [0, 0, 0, 1]
    assert sum(len(labels) for _, labels in data.train_dataloader()) == 6


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
        (
            {"train": {"cat": 1, "dog": 0}, "val": {"cat": 1, "dog": 1}},
            FileNotFoundError,
            r"got .*train: .*dog",
        ),
        ({"train": {"cat": 1, "dog": 1}, "val": {"cat": 1}}, ValueError, r"val lacks \['dog'\]"),
        ({"train": {"cat": 1}, "val": {"cat": 1, "cow": 1}}, ValueError, r"besides \['cow'\]"),
    ],
)
def test_image_folder_names_what_is_wrong(tmp_path, tree, error, message):
    write_tree(tmp_path, tree)
    with pytest.raises(error, match=message):
        ImageFolder(str(tmp_path)).setup("fit")


def test_image_folder_names_a_file_that_is_no_image(tmp_path):
    write_tree(tmp_path, {split: {"cat": 2, "dog": 2} for split in ("train", "val")})
    (tmp_path / "train" / "dog" / ".hidden").touch()
    (tmp_path / "train" / "dog" / "notes.txt").touch()
    with pytest.raises(ValueError, match=r"notes\.txt is no image \(\.jpg"):
        ImageFolder(str(tmp_path)).setup("fit")
    data = ImageFolder(str(tmp_path), on_error="skip")
    with pytest.warns(UserWarning, match=r"left out 1 files that are no images, .*notes\.txt"):
        data.setup("fit")
    assert len(data.train_set) == 4


def damage(root, file: str) -> None:
    """Cuts off the end of an image file, which its header does not show."""
    content = (root / file).read_bytes()
    (root / file).write_bytes(content[: len(content) // 2])


def test_image_files_are_checked_before_training(tmp_path):
    """Broken ones raise, or are left out of training; the order of the others stays."""
    write_tree(tmp_path, {split: {"cat": 2, "dog": 2} for split in ("train", "val")})
    damage(tmp_path, "train/dog/0.jpg")
    with pytest.raises(ValueError, match=r"dog.0\.jpg cannot be read as an image: .*on_error=skip leaves such"):
        ImageFolder(str(tmp_path), num_workers=0).setup("fit")
    ImageFolder(str(tmp_path), check_files=False).setup("fit")
    data = ImageFolder(str(tmp_path), num_workers=0, image_size=32, on_error="skip")
    with pytest.warns(UserWarning, match=r"left out 1 images, the first: .*dog.0\.jpg"):
        data.setup("fit")
    assert [data.train_set[index][1] for index in range(len(data.train_set))] == [0, 0, 1]
    assert sorted(label for _, labels in data.train_dataloader() for label in labels.tolist()) == [0, 0, 1]
    damage(tmp_path, "train/dog/1.jpg")
    with pytest.raises(ValueError, match=r"no image of dog can be read: .*dog.0\.jpg"):
        ImageFolder(str(tmp_path), on_error="skip").setup("fit")


@pytest.mark.parametrize("on_error", ["raise", "skip"])
def test_validation_images_are_never_left_out(tmp_path, on_error):
    """Not when files are checked, and not when they are read."""
    write_tree(tmp_path, {split: {"cat": 2, "dog": 2} for split in ("train", "val")})
    damage(tmp_path, "val/cat/1.jpg")
    with pytest.raises(ValueError, match=r"val.cat.1\.jpg cannot be read .* out of training"):
        ImageFolder(str(tmp_path), on_error=on_error).setup("fit")
    data = ImageFolder(str(tmp_path), num_workers=0, on_error=on_error, check_files=False)
    data.setup("validate")
    with pytest.raises(ValueError, match=r"val.cat.1\.jpg cannot be read"):
        list(data.val_dataloader())


def test_hidden_folders_and_files_are_skipped(tmp_path):
    write_tree(tmp_path, {split: {"cat": 2, ".ipynb_checkpoints": 1, "dog": 1} for split in ("train", "val")})
    (tmp_path / "train" / "cat" / "._0.jpg").write_bytes(b"no image")
    (tmp_path / "train" / ".DS_Store").write_bytes(b"no folder")
    data = ImageFolder(str(tmp_path), image_size=32, num_workers=0)
    data.setup("fit")
    assert data.classes == ["cat", "dog"]
    assert [label for _, label in data.train_set.samples] == [label for _, label in data.val_set.samples] == [0, 0, 1]


def test_image_folder_with_an_empty_split(tmp_path):
    (tmp_path / "train").mkdir()
    with pytest.raises(ValueError, match=r"a folder per class in 'train'"):
        ImageFolder(str(tmp_path)).setup("fit")


def test_cifar100_has_torchvisions_classes(tmp_path):
    assert len(CIFAR100.classes) == len(set(CIFAR100.classes)) == 100
    assert list(CIFAR100.classes) == sorted(CIFAR100.classes)
    with pytest.raises(FileNotFoundError, match=r"train.npz or cifar-100-python/"):
        CIFAR100(str(tmp_path)).setup("fit")


def test_npz_files_that_do_not_fit(tmp_path):
    images = [jpeg(np.full((32, 32, 3), level, np.uint8)) for level in (0, 200)]
    write_npz(tmp_path / "train.npz", images, [0, 10])
    with pytest.raises(ValueError, match=r"labels of .*train\.npz must be from 0 to 9, got \[0, 10\]"):
        CIFAR10(str(tmp_path)).setup("fit")
    np.savez(tmp_path / "test.npz", data=np.zeros(3), labels=np.zeros(1))
    with pytest.raises(ValueError, match=r"test\.npz must hold .* but lacks header, offsets"):
        CIFAR10(str(tmp_path)).setup("test")
    arrays = {"header": np.zeros(0, np.uint8), "data": np.zeros(9, np.uint8), "labels": np.zeros(1, np.uint8)}
    np.savez(tmp_path / "test.npz", offsets=np.array([0, 9]), **arrays)
    with pytest.raises(ValueError, match=r"test\.npz: image 0 cannot be read as an image"):
        CIFAR10(str(tmp_path)).setup("test")
    np.savez(tmp_path / "test.npz", offsets=np.array([0]), **arrays)
    with pytest.raises(ValueError, match=r"offsets must be one more than labels, got 1 and 1"):
        CIFAR10(str(tmp_path)).setup("test")


WNIDS = {"n01440764": "tench", "n02102040": "English springer"}


def test_imagenette_reads_torchvisions_folders(tmp_path):
    write_tree(tmp_path / "imagenette2-160", {split: dict.fromkeys(WNIDS, 2) for split in ("train", "val")}, ".JPEG")
    data = Imagenette(str(tmp_path), size="160px", image_size=32, resize=36, num_workers=0)
    assert data.classes == ["tench", "English springer"]
    data.prepare_data()
    data.setup("fit")
    data.setup("test")
    assert [len(part) for part in (data.train_set, data.val_set, data.test_set)] == [4, 4, 4]
    assert data.test_set[3][1] == 1
    with pytest.raises(FileNotFoundError, match="root must hold a folder 'train'"):
        _ = Imagenette(str(tmp_path)).classes
    with pytest.raises(ValueError, match="size must be one of full, 320px, 160px, got 'small'"):
        Imagenette(str(tmp_path), size="small")


def test_imagenet_reads_torchvisions_folders(tmp_path):
    write_tree(tmp_path, {split: dict.fromkeys(WNIDS, 2) for split in ("train", "val")})
    data = ImageNet(str(tmp_path), image_size=32, resize=36, num_workers=0)
    with pytest.raises(FileNotFoundError, match="root must hold ImageNet's archives"):
        data.prepare_data()
    names = {wnid: (name, f"{name}, by another name") for wnid, name in WNIDS.items()}
    torch.save((names, ["n02102040"]), tmp_path / "meta.bin")  # as torchvision's parse_devkit_archive does
    data.prepare_data()
    assert data.classes == ["tench", "English springer"]
    data.setup("fit")
    data.setup("test")
    assert len(data.test_set) == 4
    torch.save((dict.fromkeys(WNIDS, ("crane",)), ["n02102040"]), tmp_path / "meta.bin")
    assert ImageNet(str(tmp_path)).classes == ["crane (n01440764)", "crane (n02102040)"]


@pytest.mark.parametrize("kind", [ImageNet, Imagenette])
def test_folders_of_imagenet_that_are_no_classes(kind, tmp_path):
    """A hidden folder is skipped, one that is no WNID is named."""
    root = tmp_path if kind is ImageNet else tmp_path / "imagenette2"
    write_tree(root, {split: dict.fromkeys(WNIDS, 2) for split in ("train", "val")})
    for split in ("train", "val"):
        (root / split / ".ipynb_checkpoints").mkdir()
    torch.save(({wnid: (name,) for wnid, name in WNIDS.items()}, ["n02102040"]), tmp_path / "meta.bin")
    data = kind(str(tmp_path), num_workers=0)
    data.prepare_data()
    data.setup("fit")
    assert data.classes == ["tench", "English springer"]
    assert [data.train_set[index][1] for index in range(4)] == [0, 0, 1, 1]
    (root / "train" / "n00000000").mkdir()
    with pytest.raises(ValueError, match=r"root must hold a folder per WNID, got .*train/n00000000"):
        _ = kind(str(tmp_path)).classes


PLAIN = Preprocessing(24, 28, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


@pytest.mark.parametrize("policy", [None, "rand-m9-mstd0.5-inc1", "augmix-m5-w4", "original", "3a", "v0"])
@pytest.mark.parametrize("erasing", [0.0, 1.0])
def test_training_transforms(policy, erasing):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (*SIZE, 3), dtype=np.uint8))
    transform = random_crops(PLAIN, policy, erasing)
    for seed in range(5):
        torch.manual_seed(seed)
        result = transform(image)
        assert type(result) is torch.Tensor
        assert (result.shape, result.dtype) == ((3, 24, 24), torch.float32)
        assert (result.abs().max() > 1 + 1e-6) == bool(erasing)  # noise leaves the range of images


@pytest.mark.parametrize("policy", ["rand-m10-inc1", "augmix-m10-mstd0", "original", "v0"])
def test_policies_at_full_strength(policy):
    """There timm's posterize keeps no bit, which Pillow refuses."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (*SIZE, 3), dtype=np.uint8))
    transform = random_crops(PLAIN, policy)
    for seed in range(60):
        random.seed(seed)
        assert transform(image).shape == (3, 24, 24)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"auto_augment": "magic"}, r"auto_augment must begin with one of rand, .*, got 'magic'"),
        ({"auto_augment": "rand-m9-zzz1"}, r"auto_augment must be a policy in timm's notation, got 'rand-m9-zzz1'"),
        ({"random_erasing": 1.5}, r"random_erasing must be a probability, got 1\.5"),
        ({"image_size": 0}, r"image_size must be at least 1, got 0"),
        ({"batch_size": 0}, r"batch_size must be at least 1, got 0"),
        ({"num_workers": -1}, r"num_workers must be at least 0, got -1"),
        ({"on_error": "ignore"}, r"on_error must be raise or skip, got 'ignore'"),
    ],
)
def test_bad_options_of_photographs(options, message):
    with pytest.raises(ValueError, match=message):
        ImageFolder("somewhere", **options)


def test_evaluation_is_resize_and_centre_crop():
    ramp = np.broadcast_to(np.arange(48, dtype=np.uint8)[None, :, None], (40, 48, 3))
    result = Preprocessing(20, 40, (0.5,) * 3, (0.5,) * 3).evaluation()(Image.fromarray(ramp.copy()))
    expected = torch.arange(14.0, 34.0) / 255 * 2 - 1  # the shorter side is 40 already
    torch.testing.assert_close(result, expected.expand(3, 20, 20))
