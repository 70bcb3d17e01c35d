"""FX pass that merges each fused_layer node with the surrounding convolutions, norms and activations.

The result is one call of torch.ops.involution.fused_bottleneck; batch norms are folded into the 1x1 convolutions before
them. A match needs the whole reduction; after the layer the longest matching prefix is fused:

    x --+--> average pool (if strided) --> reduce 1x1 --> batch norm and/or L2 norm --> ReLU ---+
        |                                                                                       v
        +--------------------------------------------------------------------------------> fused layer
                                                                                                |
        ReLU <-- sum <-- batch norm <-- expand 1x1 <-- ReLU <-- batch norm <--------------------+
         |        ^
         |     shortcut
         v
    next block's reduce 1x1 --> batch norm --> ReLU

reduce and span are the generator's 1x1 convolutions: reduce computes the hidden features, span (in the fused layer) the
kernels. expand is the bottleneck's last 1x1 convolution.
"""

import math
import operator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch.nn.utils.fusion import fuse_conv_bn_weights

from ..ops.backends import selection
from ..ops.layer import pack
from .graph import (
    AVERAGE_POOLS,
    CONVOLUTIONS,
    RMS_NORMS,
    SUMS,
    Node,
    arguments,
    constant,
    is_relu,
    is_single_use_call,
    module_path,
    mutates_shared_tensor,
    only_user,
)

_BOTTLENECK = torch.ops.involution.fused_bottleneck.default
_UNMERGED = "is not fused with adjacent layers"  # the fused_layer operator runs by itself


class _BatchNorm(NamedTuple):
    """A batch norm in evaluation mode: its node and its constants."""

    node: Node
    mean: Tensor
    var: Tensor
    eps: float
    weight: Tensor | None
    bias: Tensor | None

    def folded_into(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """Weight [out, in] and bias [out] of a convolution that computes what convolution and norm compute."""
        weight, bias = fuse_conv_bn_weights(weight, bias, self.mean, self.var, self.eps, self.weight, self.bias)
        return weight.detach(), bias.detach()

    def scale_and_shift(self) -> tuple[Tensor, Tensor]:
        """The norm as y * scale + shift, both [C]."""
        scale, shift = self.folded_into(torch.ones_like(self.mean)[:, None], None)
        return scale[:, 0], shift


class _Pointwise(NamedTuple):
    """A 1x1 convolution: weight [out, in], bias [out] or None."""

    node: Node
    weight: Tensor
    bias: Tensor | None


class _HiddenNorm(NamedTuple):
    """The norm of the hidden features: z / sqrt(mean of z**2 + eps) * factor; eps 0 is no norm."""

    eps: float = 0.0
    factor: float = 1.0  # positive: the span's weights take it, on the other side of the ReLU


def fuse(graph: fx.GraphModule) -> list[str]:
    """Replaces every fused layer, together with the layers around it that match, by a fused_bottleneck operator.

    Returns:
        One sentence with the reason for every involution that is not fused with adjacent layers, or not with its norm.
    """
    reasons = []
    mutates = mutates_shared_tensor(graph)
    if not mutates:  # fx would remove calls whose only effect is in place
        graph.graph.eliminate_dead_code()  # first: otherwise replacing a layer could erase an unused one that follows
    for node in list(graph.graph.nodes):
        if node.target is torch.ops.involution.apply.default:
            reasons.append(f"{module_path(node)} runs unfused: {_why_unfused(node)}")
        elif node.target is torch.ops.involution.fused_layer.default:
            reason = f"{_UNMERGED}: the model modifies in place a tensor with other uses"
            if not mutates:
                operands, ends, reason = _match(graph, node)
                if operands:
                    _replace(graph, node, operands, ends)
            if reason:
                reasons.append(f"{module_path(node)} {reason}")
    if not mutates:
        graph.recompile()
    return reasons


def _why_unfused(apply: Node) -> str:
    value = getattr(apply.args[0], "meta", {}).get("example_value")
    if value is not None and value.dtype not in (torch.float32, torch.float64):
        return f"the fused layer takes float32 and float64, not {value.dtype}"
    if value is not None and not selection.fuses(value):
        return f"no kernel of the fused layer serves: {selection.why_not_fused(value)}"
    return "its kernels come from a generator other than the default one, or one with hooks"


def _match(graph: fx.GraphModule, layer: Node) -> tuple[dict[str, Any], list[Node], str]:
    """What matches around a fused layer.

    Returns:
        The operands of fused_bottleneck; the nodes whose results it computes; and the reason why the reduction or the
        norm does not match. Without the reduction there are no operands and no nodes. The reason is empty where both
        match, even if the expansion or the next block's reduction does not.
    """
    x, hidden, span, bias, scale, _, relu, kernel_size, stride, dilation = layer.args
    if scale is not None or relu:
        return {}, [], f"{_UNMERGED}: it has a scale, a shift or a ReLU already"
    span_weight, span_bias = constant(graph, span), constant(graph, bias)
    if span_weight is None or (bias is not None and span_bias is None):
        return {}, [], f"{_UNMERGED}: its span's weights are not constant"
    reduce, norm_of_hidden, why = _reduction(graph, hidden, x, stride)
    if reduce is None:
        return {}, [], f"{_UNMERGED}: {why}"
    operands = {
        **{"input": x, "kernel_size": kernel_size, "stride": stride, "dilation": dilation},
        **_packed("reduce", *reduce),
        **_packed("span", *_with_bias(span_weight.flatten(1) * norm_of_hidden.factor, span_bias)),
        **{"rms_eps": norm_of_hidden.eps, "relu": False, "expand_relu": False},
    }
    norm = _batch_norm(graph, only_user(layer))
    if norm is None:
        return operands, [layer], "is fused with its reduction only: no batch norm in evaluation mode comes after it"
    relu_node = only_user(norm.node)
    if not is_relu(relu_node):
        return operands, [layer], "is fused with its reduction only: no ReLU comes after its norm"
    scale, shift = norm.scale_and_shift()
    operands |= {"scale": scale, "shift": shift, "relu": True}
    expand, shortcut, end = _expansion(graph, relu_node)
    if expand is None:
        return operands, [relu_node], ""
    operands |= {**_packed("expand", *expand), "shortcut": shortcut, "expand_relu": True}
    next_reduce, next_end = _next_reduction(graph, end)
    if next_reduce is None:
        return operands, [end], ""
    return operands | _packed("next_reduce", *next_reduce), [end, next_end], ""


def _packed(name: str, weight: Tensor, bias: Tensor) -> dict[str, Tensor]:
    return {f"{name}_weight": pack(weight), f"{name}_bias": bias}


def _replace(graph: fx.GraphModule, layer: Node, operands: dict[str, Any], ends: list[Node]) -> None:
    """Inserts a fused_bottleneck operator, whose outputs take the place of the nodes `ends`."""
    values = []
    with graph.graph.inserting_before(ends[0]):
        for name in (argument.name for argument in _BOTTLENECK._schema.arguments):
            value = operands.get(name)
            if isinstance(value, Tensor):
                graph.register_buffer(f"{layer.name}_{name}", value)
                value = graph.graph.get_attr(f"{layer.name}_{name}")
            values.append(value)
        outputs = graph.graph.call_function(_BOTTLENECK, tuple(values))
        results = [graph.graph.call_function(operator.getitem, (outputs, index)) for index in range(len(ends))]
    for old, new in zip(ends, results, strict=True):
        new.meta = dict(old.meta)
        old.replace_all_uses_with(new)
        graph.graph.erase_node(old)
    graph.graph.eliminate_dead_code()  # the steps that led to the replaced nodes


def _reduction(
    graph: fx.GraphModule, hidden: Any, x: Any, stride: Any
) -> tuple[tuple[Tensor, Tensor] | None, _HiddenNorm, str]:
    """The generator's reduction from x (pooled if strided) to hidden: weights and its L2 norm, or why not."""
    nothing = None, _HiddenNorm()
    if not is_relu(hidden):
        return *nothing, "its generator's activation is not ReLU"
    reduced, l2_norm = _before_l2_norm(hidden.args[0])
    if l2_norm is not None and l2_norm.eps == 0:
        return *nothing, "its generator's norm over channels has eps = 0, which the fused layer does not support"
    norm = _batch_norm(graph, reduced)
    if norm is None and l2_norm is None:
        return *nothing, "its generator's norm is not a batch norm in evaluation mode, nor ChannelL2Norm"
    convolution = _pointwise(graph, reduced if norm is None else norm.node.args[0])
    if convolution is None:
        return *nothing, "its generator's reduction is not a plain 1x1 convolution"
    source = convolution.node.args[0]
    if math.prod(stride) > 1:
        if not _averages_windows(source, stride):
            return *nothing, "its generator does not average pooling windows of the stride's size"
        source = source.args[0]
    if source is not x:
        return *nothing, "its generator reads something other than the layer's input"
    weight, bias = convolution.weight, convolution.bias
    weights = _with_bias(weight, bias) if norm is None else norm.folded_into(weight, bias)
    return weights, l2_norm or _HiddenNorm(), ""


def _before_l2_norm(node: Any) -> tuple[Any, _HiddenNorm | None]:
    """The input and the norm of an `nn.generators.ChannelL2Norm` that ends in this node; else the node and None."""
    if not is_single_use_call(node, {"movedim"}) or tuple(node.args[1:]) != (-1, 1):
        return node, None
    scaled = node.args[0]
    if not is_single_use_call(scaled, {operator.mul}) or not isinstance(scaled.args[1], float):
        return node, None
    normed, factor = scaled.args
    if factor <= 0 or not is_single_use_call(normed, RMS_NORMS):
        return node, None
    values = arguments(normed, ("input", "normalized_shape", "weight", "eps"))
    last = values["input"]
    plain = len(values["normalized_shape"]) == 1 and values.get("weight") is None and values.get("eps") is not None
    if not plain or not is_single_use_call(last, {"movedim"}) or tuple(last.args[1:]) != (1, -1):
        return node, None
    return last.args[0], _HiddenNorm(values["eps"], factor)


def _expansion(graph: fx.GraphModule, relu_node: Node) -> tuple[tuple[Tensor, Tensor] | None, Node, Node]:
    """The 1x1 convolution, norm, sum and ReLU that end a bottleneck: weights, the shortcut, and the last node."""
    nothing = None, None, None
    convolution = _pointwise(graph, only_user(relu_node))
    norm = None if convolution is None else _batch_norm(graph, only_user(convolution.node))
    total = None if norm is None else only_user(norm.node)
    end = None if total is None else only_user(total)
    if convolution is None or norm is None or total is None or total.target not in SUMS or not is_relu(end):
        return nothing
    others = [value for value in total.args if value is not norm.node]
    if len(total.args) != 2 or len(others) != 1 or not isinstance(others[0], fx.Node) or total.kwargs:
        return nothing
    values = [value.meta.get("example_value") for value in (norm.node, others[0])]
    kinds = [(v.shape, v.dtype, v.device) if isinstance(v, Tensor) else None for v in values]
    if None in kinds or kinds[0] != kinds[1]:
        return nothing  # a sum that broadcasts or promotes
    return norm.folded_into(convolution.weight, convolution.bias), others[0], end


def _next_reduction(graph: fx.GraphModule, output: Node) -> tuple[tuple[Tensor, Tensor] | None, Node]:
    """The 1x1 convolution, norm and ReLU that begin the next bottleneck: weights, and the last node.

    A generator's reduction looks the same: it belongs to its own layer, which reads the ReLU as hidden features.
    """
    for user in output.users:
        convolution = _pointwise(graph, user)
        norm = None if convolution is None else _batch_norm(graph, only_user(convolution.node))
        end = None if norm is None else only_user(norm.node)
        is_generator = end is not None and any(
            node.target is torch.ops.involution.fused_layer.default and node.args[1] is end for node in end.users
        )
        if convolution is not None and norm is not None and is_relu(end) and not is_generator:
            return norm.folded_into(convolution.weight, convolution.bias), end
    return None, None


def _batch_norm(graph: fx.GraphModule, node: Any) -> _BatchNorm | None:
    """A batch norm in evaluation mode with constant statistics, weight and bias."""
    if not is_single_use_call(node, {F.batch_norm}):
        return None
    values = arguments(node, ("input", "mean", "var", "weight", "bias", "training", "momentum", "eps"))
    mean, var, weight, bias = (constant(graph, values.get(name)) for name in ("mean", "var", "weight", "bias"))
    affine = ("weight", weight), ("bias", bias)
    computed = any(values.get(name) is not None and not isinstance(value, Tensor) for name, value in affine)
    if values.get("training") or mean is None or var is None or computed:
        return None
    return _BatchNorm(node, mean, var, values.get("eps", 1e-5), weight, bias)


def _pointwise(graph: fx.GraphModule, node: Any) -> _Pointwise | None:
    """A 1x1 convolution of stride 1 without padding or groups."""
    if not is_single_use_call(node, CONVOLUTIONS):
        return None
    values = arguments(node, ("input", "weight", "bias", "stride", "padding", "dilation", "groups"))
    weight, bias = constant(graph, values.get("weight")), constant(graph, values.get("bias"))
    plain = (
        weight is not None
        and math.prod(weight.shape[2:]) == 1
        and all(step == 1 for step in _per_axis(values.get("stride", 1)))
        and all(side == 0 for side in _per_axis(values.get("padding", 0)))
        and values.get("groups", 1) == 1
        and (values.get("bias") is None or bias is not None)
    )
    return _Pointwise(node, weight.flatten(1), bias) if plain and weight is not None else None


def _averages_windows(node: Any, stride: Any) -> bool:
    """Whether a node is the average pooling of `ops.layer.average_windows`: windows of min(stride, image size)."""
    if not is_single_use_call(node, AVERAGE_POOLS):
        return False
    names = ("input", "kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override")
    values = arguments(node, names)
    image = values["input"].meta.get("example_value") if isinstance(values["input"], fx.Node) else None
    sizes = [math.inf] * len(stride) if image is None else image.shape[2:]
    windows = tuple(min(pair) for pair in zip(stride, sizes, strict=True))
    return bool(
        tuple(_per_axis(values["kernel_size"])) in (tuple(stride), windows)
        and tuple(_per_axis(values.get("stride"))) == tuple(stride)
        and all(side == 0 for side in _per_axis(values.get("padding", 0)))
        and values.get("ceil_mode")
        and values.get("count_include_pad") is False
        and values.get("divisor_override") is None
    )


def _per_axis(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, tuple | list) else (value,)


def _with_bias(weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    return weight, weight.new_zeros(len(weight)) if bias is None else bias
