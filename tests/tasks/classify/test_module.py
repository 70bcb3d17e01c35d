import math

import pytest
import torch
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader

from involution.tasks.classify import ClassificationData, Classifier
from involution.tasks.classify.data.base import TensorImages
from involution.tasks.classify.module import warmup_cosine
from involution.tasks.classify.preprocessing import Preprocessing

SMALL = {"model_name": "rednet14_cifar"}


class Blocks(ClassificationData):
    """Three easily separable classes: red, green and blue images."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__(batch_size=8, num_workers=0)
        self.classes = [str(i) for i in range(classes)]

    def setup(self, stage):
        labels = torch.arange(24) % 3
        images = torch.eye(3)[labels][:, :, None, None].expand(-1, -1, 8, 8)
        self.train_set = self.val_set = self.test_set = TensorImages(images, labels, torch.clone)


def trainer(folder, **arguments) -> Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    return Trainer(default_root_dir=folder, accelerator="cpu", enable_model_summary=False, **quiet | arguments)


@pytest.mark.parametrize(
    ("step", "factor"), [(0, 0.25), (5, 0.625), (10, 1.0), (60, 0.5), (110, 0.0), (500, 0.0), (35, (1 + 2**-0.5) / 2)]
)
def test_schedule_by_hand(step, factor):
    assert warmup_cosine(step, total=110, warmup=10, warmup_ratio=0.25) == pytest.approx(factor)


def test_schedule_without_warmup_starts_at_the_peak():
    assert warmup_cosine(0, total=10, warmup=0, warmup_ratio=0.25) == 1


def test_training_learns_and_logs(tmp_path):
    torch.manual_seed(0)
    model = Classifier("resnet14_cifar", num_classes=3, lr=0.05, warmup_steps=2, model_kwargs={"zero_init_last": False})
    fitted = trainer(tmp_path, max_epochs=30, log_every_n_steps=1)
    fitted.fit(model, Blocks())
    logged = fitted.callback_metrics
    assert logged["train/loss"] < 0.5 < math.log(3)
    assert logged["val/accuracy"] > 0.9
    assert logged["train/seconds"] > 0
    assert "val/top5" not in logged
    assert logged["lr"] == pytest.approx(0.05 * warmup_cosine(89, 90, 2, 0.25))
    [result] = fitted.test(model, Blocks(), verbose=False)
    assert result["test/accuracy"] == logged["val/accuracy"]


def test_accuracies_against_a_count(tmp_path):
    torch.manual_seed(0)
    model = Classifier(**SMALL, num_classes=7)
    data = Blocks(7)
    [result] = trainer(tmp_path).test(model, data, verbose=False)
    model.eval()
    images, labels = next(iter(DataLoader(data.test_set, 24)))
    with torch.no_grad():
        ranked = model(images).argsort(dim=1, descending=True)
    for name, k in (("accuracy", 1), ("top5", 5)):
        hits = (ranked[:, :k] == labels[:, None]).any(dim=1).float().mean().item()
        assert result[f"test/{name}"] == pytest.approx(hits)
    assert 0 < result["test/top5"] < 1 or result["test/accuracy"] != result["test/top5"]


def test_label_smoothing_acts_in_training_only():
    torch.manual_seed(0)
    model = Classifier(**SMALL, num_classes=3, label_smoothing=0.5)
    model.log = model.log_dict = lambda *_, **__: None
    model._trainer = type("Stub", (), {"optimizers": [torch.optim.SGD(model.parameters(), lr=0.1)]})()
    batch = (torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 2, 0]))
    logits = model(batch[0])
    expected = torch.nn.functional.cross_entropy(logits, batch[1], label_smoothing=0.5)
    torch.testing.assert_close(model.training_step(batch, 0), expected)
    plain = torch.nn.functional.cross_entropy(logits, batch[1])
    torch.testing.assert_close(model._step(batch, "val", model.val_metrics), plain)
    assert abs(plain - expected) > 1e-3


def test_predictions_are_probabilities(tmp_path):
    images = DataLoader(torch.randn(24, 3, 8, 8), batch_size=8)
    probabilities = torch.cat(trainer(tmp_path).predict(Classifier(**SMALL, num_classes=3), images))
    assert probabilities.shape == (24, 3)
    torch.testing.assert_close(probabilities.sum(dim=1), torch.ones(24))


def test_norms_and_biases_have_no_decay(tmp_path):
    model = Classifier(**SMALL, num_classes=3, weight_decay=0.5)
    fitted = trainer(tmp_path, fast_dev_run=True)
    fitted.fit(model, Blocks())
    decayed, free = fitted.optimizers[0].param_groups
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.5, 0)
    names = {id(parameter): name for name, parameter in model.net.named_parameters()}
    assert len(decayed["params"]) + len(free["params"]) == len(names)
    assert all(names[id(parameter)].endswith("weight") for parameter in decayed["params"])
    assert {"stem.conv1.weight", "layer1.0.conv2.generator.span.weight", "fc.weight"} <= {
        names[id(parameter)] for parameter in decayed["params"]
    }
    assert {"fc.bias", "stem.bn1.weight", "layer1.0.conv2.generator.span.bias"} <= {
        names[id(parameter)] for parameter in free["params"]
    }


def test_decay_all_decays_norms_and_biases_too(tmp_path):
    """As the published ImageNet recipe, whose framework decays every parameter."""
    model = Classifier(**SMALL, num_classes=3, weight_decay=0.5, decay_all=True)
    fitted = trainer(tmp_path, fast_dev_run=True)
    fitted.fit(model, Blocks())
    groups = fitted.optimizers[0].param_groups
    assert [group["weight_decay"] for group in groups] == [0.5, 0.5]
    assert sum(len(group["params"]) for group in groups) == len(list(model.net.parameters()))


@pytest.mark.parametrize("channels_last", [True, False])
def test_memory_format(channels_last):
    model = Classifier(**SMALL, num_classes=3, channels_last=channels_last)
    weight = model.net.get_parameter("stem.conv3.weight")
    assert weight.is_contiguous(memory_format=torch.channels_last) is channels_last
    seen = []
    model.net.layer1.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0]))
    model(torch.randn(2, 3, 8, 8))
    assert seen[0].is_contiguous(memory_format=torch.channels_last) is channels_last


def test_checkpoint_carries_the_model(tmp_path):
    model = Classifier(**SMALL, num_classes=3, model_kwargs={"stem_channels": 64})
    fitted = trainer(tmp_path, max_epochs=1)
    fitted.fit(model, Blocks())
    fitted.save_checkpoint(tmp_path / "a.ckpt")
    loaded = Classifier.load_from_checkpoint(tmp_path / "a.ckpt").eval()
    images = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(loaded(images), model.eval()(images))
    assert loaded.hparams["model_kwargs"] == {"stem_channels": 64}


def test_other_number_of_classes_is_refused(tmp_path):
    with pytest.raises(ValueError, match="num_classes of the model is 4, but the data have 3"):
        trainer(tmp_path, fast_dev_run=True).fit(Classifier(**SMALL, num_classes=4), Blocks())


def test_mixed_images_and_soft_labels():
    torch.manual_seed(0)
    model = Classifier(**SMALL, num_classes=3, mixup=0.4, label_smoothing=0.1)
    model.log = model.log_dict = lambda *_, **__: None
    model._trainer = type("Stub", (), {"optimizers": [torch.optim.SGD(model.parameters(), lr=0.1)]})()
    images, labels = torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 2, 0])
    torch.manual_seed(1)
    loss = model.training_step((images, labels), 0)
    torch.manual_seed(1)
    mixed, soft = model._mixing(images, labels)
    assert not torch.equal(mixed, images)
    torch.testing.assert_close(soft.sum(dim=1), torch.ones(4))
    by_hand = -((0.9 * soft + 0.1 / 3) * model(mixed).log_softmax(dim=1)).sum(dim=1).mean()
    torch.testing.assert_close(loss, by_hand)
    plain = torch.nn.functional.cross_entropy(model(images), labels)
    torch.testing.assert_close(model._step((images, labels), "val", model.val_metrics), plain)


def test_mixup_and_cutmix_alternate_at_random():
    torch.manual_seed(0)
    model = Classifier(**SMALL, num_classes=2, mixup=1.0, cutmix=1.0)
    images = torch.stack([torch.zeros(3, 8, 8), torch.ones(3, 8, 8)])
    mixed = [model._mixing(images, torch.tensor([0, 1]))[0] for _ in range(20)]
    pure = [bool(((one == 0) | (one == 1)).all()) for one in mixed]  # CutMix keeps every pixel as it was
    assert {True, False} == set(pure)
    with pytest.raises(ValueError, match=r"cutmix must be at least 0, got -1"):
        Classifier(**SMALL, num_classes=2, cutmix=-1)


def test_checkpoint_carries_classes_and_preprocessing(tmp_path):
    fitted = trainer(tmp_path, max_epochs=1)
    data = Blocks()
    data.classes = ["red", "green", "blue"]
    data.preprocessing = Preprocessing(8, 9, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    fitted.fit(Classifier(**SMALL, num_classes=3), data)
    fitted.save_checkpoint(tmp_path / "a.ckpt")
    loaded = Classifier.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True)
    assert loaded.classes == ["red", "green", "blue"]
    assert loaded.preprocessing == data.preprocessing
    data.classes = ["red", "blue", "green"]
    message = "checkpoint's classes must be the data's, but class 1 is 'green' there and 'blue' here"
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path).test(Classifier(**SMALL, num_classes=3), data, ckpt_path=tmp_path / "a.ckpt")


@pytest.mark.parametrize("theirs", [["red", "green"], ["red", "green", "blue", "white"]])
def test_other_numbers_of_classes_are_named(theirs):
    model = Classifier(**SMALL, num_classes=3)
    model._data_classes = ["red", "green", "blue"]
    with pytest.raises(ValueError, match=f"but they are {len(theirs)} there and 3 here"):
        model.on_load_checkpoint({"involution": {"classes": theirs}})


def test_a_checkpoint_records_no_pretrained_weights():
    model = Classifier("resnet14_cifar", num_classes=3, model_kwargs={"pretrained": False, "drop_rate": 0.5})
    assert model.hparams["model_kwargs"] == {"drop_rate": 0.5}


def test_decay_is_decided_by_name_not_by_shape(tmp_path):
    """FSDP flattens parameters before the optimizer is made."""
    model = Classifier(**SMALL, num_classes=3, weight_decay=0.5)
    wanted = {name for name, parameter in model.net.named_parameters() if parameter.ndim > 1}
    names = {id(parameter): name for name, parameter in model.net.named_parameters()}
    for parameter in model.net.parameters():
        parameter.data = parameter.data.flatten()
    model._trainer = trainer(tmp_path)
    model._trainer.fit_loop.max_epochs = 1
    model._trainer.__class__ = type("Stub", (Trainer,), {"estimated_stepping_batches": 10})
    groups = model.configure_optimizers()["optimizer"].param_groups
    assert {names[id(p)] for p in groups[0]["params"]} == wanted
    assert len(groups[1]["params"]) == len(names) - len(wanted) > 0


def test_a_network_trained_without_a_data_module_cannot_read_images(tmp_path):
    with pytest.raises(ValueError, match="preprocessing is missing"):
        Classifier(**SMALL, num_classes=3).read(tmp_path / "a.png")


def test_unknown_model_is_named():
    with pytest.raises(ValueError, match=r"model_name must be a model of timm's, got 'rednet27'; .*rednet26"):
        Classifier("rednet27", num_classes=3)
