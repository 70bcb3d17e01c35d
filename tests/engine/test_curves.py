import pytest

from involution.engine.curves import draw_curves, read_curve

METRICS = """epoch,lr,step,train/accuracy,train/loss,val/accuracy,val/loss
0,0.1,9,,,,
0,,20,,,0.5,1.5
0,,20,0.4,2.0,,
1,,41,,,0.75,1.0
1,,41,0.7,1.25,,
"""


@pytest.fixture
def metrics(tmp_path):
    file = tmp_path / "metrics.csv"
    file.write_text(METRICS)
    return file


def test_read_curve(metrics):
    assert read_curve(metrics, "val/accuracy") == ([1, 2], [0.5, 0.75])
    assert read_curve(metrics, "train/loss") == ([1, 2], [2.0, 1.25])


@pytest.mark.parametrize("metric", ["test/loss", "nothing"])
def test_missing_metric(metrics, metric):
    with pytest.raises(ValueError, match=f"'{metric}'"):
        read_curve(metrics, metric)


def test_curves_hold_every_run_and_part(metrics, tmp_path):
    figure = draw_curves({"a": metrics, "b": metrics}, tmp_path / "out" / "curves.png")
    assert (tmp_path / "out" / "curves.png").read_bytes().startswith(b"\x89PNG")
    loss, accuracy = figure.axes
    assert [line.get_label() for line in loss.lines] == ["a, train", "a, val", "b, train", "b, val"]
    assert list(accuracy.lines[1].get_ydata()) == [0.5, 0.75]
    assert loss.get_ylim()[1] == 4.0  # twice the largest training loss, so that one bad validation hides nothing
    assert list(loss.lines[2].get_ydata()) == [2.0, 1.25]


def test_a_detectors_curves(tmp_path):
    """Its losses are logged at every step, and it has no validation loss."""
    log = tmp_path / "metrics.csv"
    log.write_text("epoch,step,train/loss,val/box_AP\n0,0,4.0,\n0,1,2.0,\n0,1,,0.1\n1,2,1.0,\n1,3,1.0,\n1,3,,0.2\n")
    loss, precision = draw_curves({"": log}, tmp_path / "curves.png", metric="box_AP").axes
    [line] = loss.lines
    assert (list(line.get_xdata()), list(line.get_ydata())) == ([1, 2], [3.0, 1.0])
    [line] = precision.lines
    assert (line.get_label(), list(line.get_ydata())) == ("val", [0.1, 0.2])
    assert precision.get_ylabel() == "box_AP"
