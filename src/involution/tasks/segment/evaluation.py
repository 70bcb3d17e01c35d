"""Intersection over union and accuracies from the confusion matrix of all pixels of all images."""

from collections.abc import Sequence

from torch import Tensor


def scores(matrix: Tensor, classes: Sequence[str]) -> dict[str, float]:
    """The scores of a confusion matrix.

    Args:
        matrix: [C, C], true classes in rows, predicted ones in columns.
        classes: the class names.

    Returns:
        mIoU, mean_accuracy (over classes), pixel_accuracy, and IoU_NAME of each class. Means are over the classes that
        occur: a class that is neither in the masks nor predicted has an IoU of NaN.
    """
    counts = matrix.double()
    right, true, predicted = counts.diagonal(), counts.sum(1), counts.sum(0)
    iou, accuracy = right / (true + predicted - right), right / true
    return {
        "mIoU": float(iou.nanmean()),
        "mean_accuracy": float(accuracy.nanmean()),
        "pixel_accuracy": float(right.sum() / true.sum()),
        **{f"IoU_{name}": float(value) for name, value in zip(classes, iou, strict=True)},
    }


def table(numbers: dict[str, float]) -> str:
    """The scores as lines of text, in percent."""
    width = max(map(len, numbers))
    return "\n".join(f"{name.ljust(width)} {100 * value:6.2f}" for name, value in numbers.items())
