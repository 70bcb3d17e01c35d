"""Every number of the published detectors: their framework's defaults, and the paper's recipes."""

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from small_detectors import FEW, NARROW
from torch import nn
from torch.nn import functional as F
from torchvision.ops import sigmoid_focal_loss

from involution.tasks.detect import faster_rcnn, mask_rcnn, retinanet
from involution.tasks.detect.anchors import RATIOS, Anchors, Matcher
from involution.tasks.detect.models import CHANNELS
from involution.tasks.detect.regions import ProposalNetwork, RegionAlign
from involution.tasks.detect.retina import SCALES, RetinaHead

OPTIONS: dict[str, Any] = {"backbone": "rednet26", "num_classes": 3, "backbone_kwargs": NARROW}


@pytest.fixture(scope="module", params=[faster_rcnn, mask_rcnn])
def rcnn(request: pytest.FixtureRequest) -> Any:
    return request.param(**OPTIONS)


@pytest.fixture(scope="module")
def retina() -> Any:
    return retinanet(**OPTIONS)


def test_numbers_of_the_rpn(rcnn: Any) -> None:
    rpn = rcnn.rpn
    assert rpn._pre_nms_top_n == {"training": 2000, "testing": 1000}
    assert rpn._post_nms_top_n == {"training": 1000, "testing": 1000}
    matcher, sampler = rpn.proposal_matcher, rpn.fg_bg_sampler
    assert (matcher.high_threshold, matcher.low_threshold, matcher.min_quality) == (0.7, 0.3, 0.3)
    assert (sampler.batch_size_per_image, sampler.positive_fraction) == (256, 0.5)
    assert (rpn.nms_thresh, rpn.score_thresh, rpn.box_coder.weights) == (0.7, 0, (1, 1, 1, 1))
    anchors = rpn.anchor_generator
    assert (anchors.strides, anchors.aspect_ratios) == ((4, 8, 16, 32, 64), ((0.5, 1.0, 2.0),) * 5)
    assert anchors.sizes == ((32,), (64,), (128,), (256,), (512,))


def test_numbers_of_the_regions(rcnn: Any) -> None:
    heads = rcnn.roi_heads
    matcher, sampler = heads.proposal_matcher, heads.fg_bg_sampler
    quality = 0.5 if heads.has_mask() else None
    assert (matcher.high_threshold, matcher.low_threshold, matcher.min_quality) == (0.5, 0.5, quality)
    assert (sampler.batch_size_per_image, sampler.positive_fraction) == (512, 0.25)
    assert (heads.score_thresh, heads.nms_thresh, heads.detections_per_img) == (0.05, 0.5, 100)
    assert heads.box_coder.weights == (10, 10, 5, 5)  # standard deviations 0.1, 0.1, 0.2, 0.2
    pools = [(heads.box_roi_pool, 7)] + ([(heads.mask_roi_pool, 14)] if heads.has_mask() else [])
    for pool, size in pools:
        assert (pool.output_size, pool.sampling_ratio) == ((size, size), 0)
        assert pool.scales == [1 / 4, 1 / 8, 1 / 16, 1 / 32]
        assert (pool.map_levels.k_min, pool.map_levels.k_max, pool.map_levels.s0, pool.map_levels.lvl0) == (
            2,
            5,
            224,
            4,
        )


def test_numbers_of_retinanet(retina: Any) -> None:
    matcher, anchors = retina.proposal_matcher, retina.anchor_generator
    assert (matcher.high_threshold, matcher.low_threshold, matcher.min_quality) == (0.5, 0.4, 0)
    assert (anchors.strides, anchors.aspect_ratios) == ((8, 16, 32, 64, 128), ((0.5, 1.0, 2.0),) * 5)
    for stride, sizes in zip(anchors.strides, anchors.sizes, strict=True):
        assert sizes == pytest.approx([4 * stride, 4 * stride * 2 ** (1 / 3), 4 * stride * 2 ** (2 / 3)])
    assert (retina.score_thresh, retina.nms_thresh) == (0.05, 0.5)
    assert (retina.topk_candidates, retina.detections_per_img) == (1000, 100)
    assert retina.box_coder.weights == (1, 1, 1, 1)


def test_images_are_scaled_to_800(rcnn: Any, retina: Any) -> None:
    for model in (rcnn, retina):
        transform = model.transform
        assert (tuple(transform.min_size), transform.max_size, transform.size_divisible) == ((800,), 1333, 32)
        assert [255 * value for value in transform.image_mean] == pytest.approx([123.675, 116.28, 103.53])
        assert [255 * value for value in transform.image_std] == pytest.approx([58.395, 57.12, 57.375])


def normal(layer: nn.Module, std: float) -> None:
    weight = layer.weight.detach()
    assert float(weight.std()) == pytest.approx(std, rel=0.1)
    assert abs(float(weight.mean())) < 0.1 * std


def test_initialisation_of_the_heads() -> None:
    torch.manual_seed(0)
    model = mask_rcnn(**(OPTIONS | {"num_classes": 80}))
    heads, rpn = model.roi_heads, model.rpn.head
    for layer in (rpn.conv[0][0], rpn.cls_logits, rpn.bbox_pred, heads.box_predictor.cls_score):
        normal(layer, 0.01)
    normal(heads.box_predictor.bbox_pred, 0.001)
    for layer in (heads.box_head.fc6, heads.box_head.fc7):  # Glorot's, uniform
        bound = math.sqrt(6 / (layer.in_features + layer.out_features))
        assert float(layer.weight.abs().max()) == pytest.approx(bound, rel=0.01)
    for block in heads.mask_head:
        normal(block[0], math.sqrt(2 / (256 * 9)))
    normal(heads.mask_predictor.conv5_mask, math.sqrt(2 / (256 * 4)))
    normal(heads.mask_predictor.mask_fcn_logits, math.sqrt(2 / 80))
    for module in [rpn, heads, model.backbone.fpn]:
        assert not any(p.any() for name, p in module.named_parameters() if name.endswith("bias"))
    for block in [*model.backbone.fpn.inner_blocks, *model.backbone.fpn.layer_blocks]:
        fans = (block[0].in_channels + block[0].out_channels) * block[0].kernel_size[0] ** 2
        assert float(block[0].weight.abs().max()) == pytest.approx(math.sqrt(6 / fans), rel=0.01)


def test_initialisation_of_retinanets_head(retina: Any) -> None:
    head = retina.head
    for part, last in ((head.classification_head, "cls_logits"), (head.regression_head, "bbox_reg")):
        for layer in [*(block[0] for block in part.conv), getattr(part, last)]:
            normal(layer, 0.01)
    assert torch.allclose(head.classification_head.cls_logits.bias.sigmoid(), torch.tensor(0.01))


def test_no_relu_before_the_last_level(retina: Any) -> None:
    extra = retina.backbone.fpn.extra_blocks
    stages = [torch.randn(1, extra.p6.in_channels, 8, 8)]
    [sixth, seventh], names = extra([], stages, [])
    assert names == ["p6", "p7"]
    assert (sixth < 0).any()
    assert torch.equal(seventh, extra.p7(sixth))
    assert torch.equal(sixth, extra.p6(stages[0]))


class Images:
    def __init__(self, *sizes: tuple[int, int]) -> None:
        self.image_sizes = list(sizes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_anchors_have_the_levels_strides_and_are_not_rounded(dtype: torch.dtype) -> None:
    """800 x 1344: the level of stride 64 has 13 rows (12.5 rounded up); torchvision's stride would be 61."""
    anchors = Anchors((4, 8, 16, 32, 64), (8.0,), RATIOS)
    levels = [torch.zeros(1, 1, -(-800 // s), 1344 // s, dtype=dtype) for s in anchors.strides]
    first, second = anchors(Images((800, 1344), (790, 1300)), levels)
    assert torch.equal(first, second)
    assert first.dtype == torch.float32
    last = first[-13 * 21 * 3 :].reshape(13, 21, 3, 4)
    for row, column in ((0, 0), (12, 20), (7, 3)):
        for index, ratio in enumerate(RATIOS):
            width, height = 512 / math.sqrt(ratio), 512 * math.sqrt(ratio)
            x, y = 64 * column, 64 * row
            want = [x - width / 2, y - height / 2, x + width / 2, y + height / 2]
            assert last[row, column, index].tolist() == pytest.approx(want, abs=1e-3)
    octaves = Anchors((8,), SCALES, RATIOS).cell_anchors[0]
    sides = octaves[:, 2:] - octaves[:, :2]
    assert sides.prod(1).sqrt().tolist() == pytest.approx([32, 32 * 2 ** (1 / 3), 32 * 2 ** (2 / 3)] * 3)
    assert (sides[:, 1] / sides[:, 0]).tolist() == pytest.approx([0.5] * 3 + [1] * 3 + [2] * 3)


def test_low_quality_matches() -> None:
    quality = torch.tensor(
        [  # two boxes, five anchors
            [0.75, 0.20, 0.45, 0.10, 0.00],
            [0.74, 0.00, 0.10, 0.25, 0.00],
        ]
    )
    assert Matcher(0.7, 0.3)(quality).tolist() == [0, -1, -2, -1, -1]
    assert Matcher(0.7, 0.3, 0.3)(quality).tolist() == [1, -1, -2, -1, -1]  # the second box's best is the first's too
    low = torch.tensor([[0.25, 0.20, 0.0], [0.0, 0.40, 0.35], [0.0, 0.0, 0.0]])
    assert Matcher(0.7, 0.3, 0.3)(low).tolist() == [-1, 1, -2]  # 0.25 is too little; 0 is none
    assert Matcher(0.5, 0.4, 0.0)(low).tolist() == [0, 1, -1]
    assert Matcher(0.5, 0.4, 0.0)(torch.zeros(2, 0)).tolist() == []


def test_true_boxes_do_not_take_part_in_low_quality_matches(rcnn: Any) -> None:
    """A proposal overlaps most with the first object, and is the second one's best: Mask R-CNN assigns the second."""
    first, second = [0.0, 0.0, 100.0, 100.0], [0.0, 0.0, 60.0, 100.0]
    proposal = torch.tensor([[0.0, 0.0, 85.0, 100.0], [0.0, 0.0, 98.0, 100.0]])
    true, labels = torch.tensor([first, second]), torch.tensor([1, 2])
    heads = rcnn.roi_heads
    want = [2, 1] if heads.has_mask() else [1, 1]
    joined = heads.add_gt_proposals([proposal], [true])
    [matched], [found] = heads.assign_targets_to_proposals(joined, [true], [labels])
    assert found.tolist() == [*want, 1, 2]
    assert matched.tolist() == [*(label - 1 for label in want), 0, 1]
    [matched], [found] = heads.assign_targets_to_proposals([true], [true], [labels])  # the RPN found nothing
    assert (matched.tolist(), found.tolist()) == ([0, 1], [1, 2])
    [matched], [found] = heads.assign_targets_to_proposals([proposal], [true[:0]], [labels[:0]])
    assert found.tolist() == [0, 0]


def test_the_rpns_box_loss_is_l1() -> None:
    network = ProposalNetwork.__new__(ProposalNetwork)
    nn.Module.__init__(network)
    network.fg_bg_sampler = lambda labels: (
        [torch.tensor([1, 0, 0, 0]), torch.tensor([0, 0, 0, 0])],
        [torch.tensor([0, 1, 0, 0]), torch.tensor([0, 0, 1, 0])],
    )
    deltas, wanted = torch.randn(8, 4), list(torch.randn(2, 4, 4))
    scores, labels = torch.randn(8, 1), [torch.tensor([1.0, 0.0, -1.0, 0.0]), torch.zeros(4)]
    objectness, boxes = network.compute_loss(scores, deltas, labels, wanted)
    assert boxes == pytest.approx(float((deltas[0] - wanted[0][0]).abs().sum() / 3))
    of_sampled = F.binary_cross_entropy_with_logits(scores[[0, 1, 6], 0], torch.tensor([1.0, 0.0, 0.0]))
    torch.testing.assert_close(objectness, of_sampled)


def test_the_regions_box_loss_is_l1(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    heads = faster_rcnn(**OPTIONS).roi_heads.train()
    boxes = torch.tensor([[8.0, 8.0, 40.0, 48.0], [30.0, 20.0, 60.0, 60.0], [0.0, 0.0, 8.0, 8.0]])
    scores, deltas = torch.randn(3, 4), torch.randn(3, 16)
    labels, coded = torch.tensor([1, 3, 0]), torch.randn(3, 4)
    monkeypatch.setattr(heads, "select_training_samples", lambda *given: ([boxes], None, [labels], [coded]))
    monkeypatch.setattr(heads, "_of_boxes", lambda *given: (scores, deltas))
    nothing, losses = heads({}, [boxes], [(64, 64)], [{}])
    assert nothing == []
    by_class = deltas.view(3, 4, 4)
    want = ((by_class[0, 1] - coded[0]).abs().sum() + (by_class[1, 3] - coded[1]).abs().sum()) / 3
    torch.testing.assert_close(losses["loss_box_reg"], want)
    torch.testing.assert_close(losses["loss_classifier"], F.cross_entropy(scores, labels))


def test_regions_are_aligned_and_sampled_adaptively() -> None:
    """Features equal their coordinates, so a cell is the mean coordinate inside it."""
    rows, columns = torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing="ij")
    level = 4 * (torch.stack([columns, rows])[None] + 0.5)  # the image's coordinate of a pixel's centre
    pool = RegionAlign(["0", "1"], (4, 8), 2)
    box = torch.tensor([[10.0, 30.0, 43.0, 101.0]])
    [found] = pool({"0": level, "1": level[..., ::2, ::2]}, [box], [(256, 256)])
    assert found[0, 0].tolist() == pytest.approx([10 + 33 / 4, 10 + 3 * 33 / 4], abs=1e-4)
    assert found[1, :, 0].tolist() == pytest.approx([30 + 71 / 4, 30 + 3 * 71 / 4], abs=1e-4)
    # A point in a large region: two samples a cell would miss it.
    point = torch.zeros(1, 1, 64, 64)
    point[0, 0, 9, 9] = 1
    [dense] = RegionAlign(["0"], (4,), 1)({"0": point}, [torch.tensor([[0.0, 0.0, 256.0, 256.0]])], [(256, 256)])
    assert float(dense) == pytest.approx(1 / 64**2, rel=1e-4)


@pytest.mark.parametrize("family", [faster_rcnn, mask_rcnn])
def test_the_first_image_does_not_decide_the_strides(family: Any) -> None:
    """From a first image of 30 x 1000 torchvision infers scales of 0.5 to 0.0625, and keeps them."""
    torch.manual_seed(0)
    model = family(**OPTIONS, **FEW, min_size=64, max_size=1000, box_score_thresh=0.0).eval()
    photograph = torch.rand(3, 64, 80)
    with torch.no_grad():
        [before] = model([photograph])
        model([torch.rand(3, 30, 1000)])
        [after] = model([photograph])
    assert len(before["boxes"]) > 0
    assert all(torch.equal(before[name], after[name]) for name in before)
    fresh = RegionAlign(["0", "1", "2", "3"], (4, 8, 16, 32), 7)
    assert model.roi_heads.box_roi_pool.scales == fresh.scales == [0.25, 0.125, 0.0625, 0.03125]


def head_and_step() -> tuple[RetinaHead, dict[str, torch.Tensor], list[Any], list[Any], list[Any]]:
    """Two images of six anchors: three positives in the first, one in the second."""
    torch.manual_seed(0)
    head = RetinaHead(CHANNELS, 9, 3)
    outputs = {"cls_logits": torch.randn(2, 6, 3), "bbox_regression": torch.randn(2, 6, 4)}
    corner = 50 * torch.rand(2, 6, 2)
    anchors = list(torch.cat([corner, corner + 20], dim=-1))
    targets = [
        {"boxes": torch.tensor([[1.0, 2.0, 20.0, 30.0], [5.0, 5.0, 44.0, 33.0]]), "labels": torch.tensor([2, 0])},
        {"boxes": torch.tensor([[9.0, 2.0, 20.0, 30.0]]), "labels": torch.tensor([1])},
    ]
    matched = [torch.tensor([0, 1, 1, -1, -2, -1]), torch.tensor([-1, -1, 0, -2, -2, -1])]
    return head, outputs, targets, anchors, matched


def sums(head: Any, outputs: Any, targets: Any, anchors: Any, matched: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Both losses, not yet divided."""
    focal = torch.zeros(())
    boxes = torch.zeros(())
    for image, target in enumerate(targets):
        for anchor, match in enumerate(matched[image].tolist()):
            if match != -2:
                wanted = torch.zeros(3)
                wanted[target["labels"][match]] = float(match >= 0)
                focal += sigmoid_focal_loss(outputs["cls_logits"][image, anchor], wanted, 0.25, 2, "sum")
            if match >= 0:
                pair = target["boxes"][match][None], anchors[image][anchor][None]
                coded = head.regression_head.box_coder.encode_single(*pair)[0]
                boxes += (outputs["bbox_regression"][image, anchor] - coded).abs().sum()
    return focal, boxes


def test_retinanets_losses_are_normalised_by_the_batchs_positives() -> None:
    head, *step = head_and_step()
    outputs, targets, anchors, matched = step
    focal, boxes = sums(head, *step)
    losses = head.compute_loss(targets, outputs, anchors, matched)
    torch.testing.assert_close(losses["classification"], focal / 4)
    torch.testing.assert_close(losses["bbox_regression"], boxes / 4)
    nothing = [torch.full_like(one, -1) for one in matched]
    losses = head.compute_loss(targets, outputs, anchors, nothing)
    assert losses["bbox_regression"] == 0
    torch.testing.assert_close(losses["classification"], sums(head, outputs, targets, anchors, nothing)[0])


def one_process(rank: int, store: str, results: Any) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    head, outputs, targets, anchors, matched = head_and_step()
    own = slice(rank, rank + 1)
    part = {name: value[own] for name, value in outputs.items()}
    losses = head.compute_loss(targets[own], part, anchors[own], matched[own])
    results[rank] = {name: float(value) for name, value in losses.items()}


def test_processes_average_their_positives(tmp_path: Any) -> None:
    """The mean of both processes' losses, whose gradient DDP computes, equals the loss of the whole batch."""
    with torch.multiprocessing.Manager() as manager:
        results = manager.dict()
        torch.multiprocessing.start_processes(
            one_process, (str(tmp_path / "store"), results), nprocs=2, start_method="fork"
        )
        found = dict(results)
    head, outputs, targets, anchors, matched = head_and_step()
    want = head.compute_loss(targets, outputs, anchors, matched)
    for name, value in want.items():
        assert (found[0][name] + found[1][name]) / 2 == pytest.approx(float(value), rel=1e-5)
        assert found[0][name] != found[1][name]
