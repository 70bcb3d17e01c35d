"""Whole models for inference: norms folded, involutions fused with their neighbours, the rest compiled and frozen."""

import copy
import inspect
import logging
import math
import operator
import re
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch._inductor
import torch._inductor.config
import torch.nn.functional as F
from torch import Tensor, fx, nn

from ..ops import fused as fused  # registers the operators that graphs refer to
from ..ops.backends import selection
from ..ops.layer import pack

Node = Any  # a torch.fx.Node: its arguments are typed too widely to be of use

_log = logging.getLogger(__name__)

_CONVOLUTIONS = {F.conv1d, F.conv2d, F.conv3d, torch.conv1d, torch.conv2d, torch.conv3d}
_POOLS = {F.avg_pool1d, F.avg_pool2d, F.avg_pool3d}
_RELUS = {F.relu, torch.relu, torch.relu_, F.relu_, "relu", "relu_"}
_FRESH = {F.batch_norm, F.linear, F.relu, torch.relu, "relu", operator.add, torch.add, *_CONVOLUTIONS, *_POOLS}
_FRESH |= {torch.ops.involution.fused_layer.default, torch.ops.involution.apply.default}
_RMS_NORMS = {F.rms_norm, torch.rms_norm}
_FRESH |= _RMS_NORMS
_IN_PLACE = {
    *("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod"),
    *("ipow", "iand", "ior", "ixor", "ilshift", "irshift", "imatmul", "setitem"),
}
_SUMS = {operator.add, operator.iadd, torch.add, "add", "add_"}


def optimize(model: nn.Module, example_input: Tensor) -> nn.Module:
    """A copy of a model that does the same faster, for inference.

    Batch norms are folded into the convolutions before them; every involution with the default generator becomes one
    fused operator with its reduction, the norm and ReLU after it and, where it stands in a bottleneck, the 1x1
    convolution and the shortcut after those; images are held in channels_last; torch.compile makes the rest, with
    frozen weights. Models without involutions (a timm ResNet) get the same treatment as far as it applies.

    Args:
        model: in evaluation mode; it is copied and left alone. Later changes of its weights have no effect.
        example_input: one batch; the returned module is compiled for it. Other sizes work and compile when they come.

    Returns:
        A module with the model's forward, without gradients. Its `unfused` lists what could not be fused, and why.

    Raises:
        TypeError: model is no module, or example_input no tensor.
        ValueError: the model, or a part of it, is in training mode.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    if not isinstance(example_input, Tensor):
        raise TypeError(f"example_input must be a torch.Tensor, got {type(example_input).__name__}")
    training = [name or "the model itself" for name, module in model.named_modules() if module.training]
    if training:
        raise ValueError(f"model must be in evaluation mode (model.eval()), but {training[0]} is in training mode")
    optimized = Optimized(model)
    optimized(example_input)
    return optimized


class Optimized(nn.Module):
    """What :func:`optimize` returns."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = copy.deepcopy(model).requires_grad_(False)
        _channels_last(self.model)
        self.unfused: list[str] = []
        # Nobody changes the copy, so nothing about its modules needs to be checked at every call.
        options: dict[str, Any] = {"guard_filter_fn": torch.compiler.skip_guard_on_all_nn_modules_unsafe}
        # Held in a partial: as a submodule it would list every weight a second time.
        self._run = partial(torch.compile(self.model, backend=self._compile, options=options))
        self.train(False)

    def forward(self, *inputs: Any, **options: Any) -> Any:
        """The model's own."""
        inputs = tuple(_images_channels_last(value) for value in inputs)
        with torch.no_grad(), torch._inductor.config.patch(freezing=True):
            return self._run(*inputs, **options)

    def train(self, mode: bool = True) -> "Optimized":
        """Stays in evaluation mode: the weights are frozen."""
        if mode:
            raise ValueError("an optimized model cannot be trained: its weights are frozen")
        return super().train(False)

    def _compile(self, graph: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        for reason in fuse(graph):
            if reason not in self.unfused:
                self.unfused.append(reason)
                _log.warning("involution.optimize: %s", reason)
        graph = fx.GraphModule(graph, graph.graph)  # without dynamo's notes: they do not know the folded weights
        graph.meta.pop("dynamo_compile_id", None)
        compiled: Callable[..., Any] = torch._inductor.compile(graph, inputs, options={"freezing": True})
        return compiled


def _channels_last(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.data = _images_channels_last(parameter.data)


def _images_channels_last(value: Any) -> Any:
    return (
        value.contiguous(memory_format=torch.channels_last) if isinstance(value, Tensor) and value.dim() == 4 else value
    )


class _Norm(NamedTuple):
    """A batch norm as a scale and a shift per channel."""

    node: Node
    scale: Tensor
    shift: Tensor


class _Pointwise(NamedTuple):
    """A 1x1 convolution: weight [out, in], bias [out] or None."""

    node: Node
    weight: Tensor
    bias: Tensor | None


class _Reduction(NamedTuple):
    """A generator's reduction: weight [out, in] and bias [out], and the eps of the RMS norm before its ReLU, or 0."""

    weight: Tensor
    bias: Tensor
    rms_eps: float


def fuse(graph: fx.GraphModule) -> list[str]:
    """Replaces every involution of the graph, with the steps around it that fit, by a fused_bottleneck operator.

    Returns:
        For every involution that is left as it is, or loses less than it could, a sentence with the reason.
    """
    reasons = []
    in_place = _changes_in_place(graph)
    for node in list(graph.graph.nodes):
        if node.target is torch.ops.involution.apply.default:
            reasons.append(f"{_place(node)} runs unfused: {_why_not(node)}")
        elif node.target is torch.ops.involution.fused_layer.default and in_place:
            reasons.append(f"{_place(node)} runs as it is: the model changes a tensor in place that is used elsewhere")
        elif node.target is torch.ops.involution.fused_layer.default:
            reason = _fuse_layer(graph, node)
            if reason:
                reasons.append(f"{_place(node)} {reason}")
    if not in_place:  # fx takes calls for dead whose only effect is a change in place
        graph.graph.eliminate_dead_code()
        graph.recompile()
    return reasons


def _why_not(apply: Node) -> str:
    value = getattr(apply.args[0], "meta", {}).get("example_value")
    if value is not None and value.dtype not in (torch.float32, torch.float64):
        return f"the fused layer takes float32 and float64, not {value.dtype}"
    if value is not None and not selection.fuses(value):
        return f"no kernel of the fused layer serves: {selection.why_not_fused(value)}"
    return "its kernels come from a generator other than the default one, or one with hooks"


def _changes_in_place(graph: fx.GraphModule) -> bool:
    """Whether a tensor with more than one use is overwritten: moving its readers would change what they read."""
    for node in graph.graph.nodes:
        changed = node.args[0] if _overwrites(node) and node.args else None
        while isinstance(changed, fx.Node):
            if len(changed.users) > 1 or changed.op in ("placeholder", "get_attr"):
                return True
            # What makes a new tensor ends the search; anything else may return a view of its argument.
            fresh = changed.target in _FRESH and not _overwrites(changed)
            changed = None if fresh or not changed.args else changed.args[0]
    return False


def _overwrites(node: Node) -> bool:
    if node.op == "call_method":
        return str(node.target).endswith("_") and not str(node.target).endswith("__")
    if node.op != "call_function":
        return False
    schema, name = getattr(node.target, "_schema", None), getattr(node.target, "__name__", "")
    return bool(
        (schema is not None and schema.is_mutable)
        or _is_told_to(node, "inplace")
        or node.kwargs.get("out") is not None
        or (name.endswith("_") and not name.endswith("__"))
        or (getattr(node.target, "__module__", "") == "_operator" and name in _IN_PLACE)
    )


def _is_told_to(node: Node, option: str) -> bool:
    """Whether a call sets this option, by keyword or by position."""
    if option in node.kwargs:
        return bool(node.kwargs[option])
    try:
        names = list(inspect.signature(node.target).parameters)
    except (TypeError, ValueError):  # a builtin: those of torch that overwrite end with an underscore
        return False
    return option in names and len(node.args) > names.index(option) and bool(node.args[names.index(option)])


def _fuse_layer(graph: fx.GraphModule, layer: Node) -> str:
    """Fuses one layer with its neighbours; returns why not, or not with all."""
    x, hidden, span, bias, scale, _, relu, *window = layer.args
    if scale is not None or relu:
        return "runs as it is: it has a norm of its own"
    span_weight, span_bias = _constant(graph, span), _constant(graph, bias)
    if span_weight is None or (bias is not None and span_bias is None):
        return "runs unfused: its span's weights are not constant"
    reduced, why = _reduction(graph, hidden, x, window[1])
    if reduced is None:
        return f"runs without its reduction: {why}"

    last, reason = layer, ""
    norm = _norm(graph, _only_user(layer))
    rectified = None if norm is None else _only_user(norm.node)
    if norm is None:
        reason = "runs without what follows: no batch norm in evaluation mode comes after it"
    elif not _is_relu(rectified):
        norm, reason = None, "runs without what follows: no ReLU comes after its norm"
    else:
        assert rectified is not None
        last = rectified
    expansion, shortcut, next_reduce, rectified_reduction = None, None, None, None
    if norm is not None:
        expansion, shortcut, end = _expansion(graph, last)
        last = end or last
    if expansion is not None:
        next_reduce, rectified_reduction = _beginning(graph, last)

    def keep(name: str, value: Tensor | None) -> Node:
        if value is None:
            return None
        name = f"{layer.name}_{name}"
        graph.register_buffer(name, value)
        return graph.graph.get_attr(name)

    with graph.graph.inserting_before(last):
        arguments = (
            x,
            keep("reduce_weight", pack(reduced.weight)),
            keep("reduce_bias", reduced.bias),
            reduced.rms_eps,
            keep("span_weight", pack(span_weight.flatten(1))),
            keep("span_bias", span_weight.new_zeros(len(span_weight)) if span_bias is None else span_bias),
            keep("scale", norm and norm.scale),
            keep("shift", norm and norm.shift),
            norm is not None,
            keep("expand_weight", expansion and pack(expansion.weight)),
            keep("expand_bias", expansion and expansion.bias),
            shortcut,
            expansion is not None,
            keep("next_reduce_weight", next_reduce and pack(next_reduce.weight)),
            keep("next_reduce_bias", next_reduce and next_reduce.bias),
            *window,
        )
        outputs = graph.graph.call_function(torch.ops.involution.fused_bottleneck.default, arguments)
        replaced = [last] if rectified_reduction is None else [last, rectified_reduction]
        results = [graph.graph.call_function(operator.getitem, (outputs, index)) for index in range(len(replaced))]
    for old, new in zip(replaced, results, strict=True):
        new.meta = dict(old.meta)
        old.replace_all_uses_with(new)
        graph.graph.erase_node(old)  # what led to it is dead now
    graph.graph.eliminate_dead_code()
    return reason


def _reduction(graph: fx.GraphModule, hidden: Any, x: Any, stride: Any) -> tuple[_Reduction | None, str]:
    """The 1x1 convolution, with a batch norm folded in, from x (pooled where the layer strides) to hidden."""
    if not _is_relu(hidden):
        return None, "its generator's activation is not ReLU"
    reduced, rms_eps = _before_rms_norm(hidden.args[0])
    norm = _norm(graph, reduced)
    if norm is None and rms_eps == 0:
        return None, "its generator's norm is not a batch norm in evaluation mode, nor RMS norm"
    convolution = _pointwise(graph, reduced if norm is None else norm.node.args[0])
    if convolution is None:
        return None, "its generator's reduction is not a plain 1x1 convolution"
    source = convolution.node.args[0]
    if math.prod(stride) > 1:
        if not _pools_windows(source, stride):
            return None, "its generator does not average windows of the stride's size"
        source = source.args[0]
    if source is not x:
        return None, "its generator reads something other than the layer's input"
    weight, bias = (convolution.weight, convolution.bias) if norm is None else _folded(convolution, norm)
    return _Reduction(weight, weight.new_zeros(len(weight)) if bias is None else bias, rms_eps), ""


def _before_rms_norm(node: Any) -> tuple[Any, float]:
    """What `nn.generators.ChannelRMSNorm` reads to make this, and its eps; or the node itself, and 0."""
    if not _calls(node, {"movedim"}) or tuple(node.args[1:]) != (-1, 1):
        return node, 0.0
    normed = node.args[0]
    if not _calls(normed, _RMS_NORMS):
        return node, 0.0
    values = _bound(normed, ("input", "normalized_shape", "weight", "eps"))
    last = values["input"]
    plain = len(values["normalized_shape"]) == 1 and values.get("weight") is None and values.get("eps") is not None
    if not plain or not _calls(last, {"movedim"}) or tuple(last.args[1:]) != (1, -1):
        return node, 0.0
    return last.args[0], values["eps"]


def _expansion(graph: fx.GraphModule, rectified: Node) -> tuple[_Pointwise | None, Any, Node]:
    """The 1x1 convolution, norm, sum and ReLU that end a bottleneck: weights, the shortcut, and the last node."""
    nothing = None, None, None
    convolution = _pointwise(graph, _only_user(rectified))
    norm = None if convolution is None else _norm(graph, _only_user(convolution.node))
    total = None if norm is None else _only_user(norm.node)
    end = None if total is None else _only_user(total)
    if convolution is None or norm is None or total is None or total.target not in _SUMS or not _is_relu(end):
        return nothing
    others = [value for value in total.args if value is not norm.node]
    if len(total.args) != 2 or len(others) != 1 or not isinstance(others[0], fx.Node) or total.kwargs:
        return nothing
    values = [value.meta.get("example_value") for value in (norm.node, others[0])]
    kinds = [(v.shape, v.dtype, v.device) if isinstance(v, Tensor) else None for v in values]
    if None in kinds or kinds[0] != kinds[1]:
        return nothing  # a sum that broadcasts or promotes
    return _Pointwise(convolution.node, *_folded(convolution, norm)), others[0], end


def _beginning(graph: fx.GraphModule, output: Node) -> tuple[_Pointwise | None, Node]:
    """The 1x1 convolution, norm and ReLU that the next bottleneck begins with: weights, and the last node."""
    for user in output.users:
        convolution = _pointwise(graph, user)
        norm = None if convolution is None else _norm(graph, _only_user(convolution.node))
        end = None if norm is None else _only_user(norm.node)
        feeds_layer = end is not None and any(
            node.target is torch.ops.involution.fused_layer.default and node.args[1] is end for node in end.users
        )
        if convolution is not None and norm is not None and _is_relu(end) and not feeds_layer:
            return _Pointwise(convolution.node, *_folded(convolution, norm)), end
    return None, None


def _folded(convolution: _Pointwise, norm: _Norm) -> tuple[Tensor, Tensor]:
    bias = norm.shift if convolution.bias is None else norm.shift + convolution.bias * norm.scale
    return convolution.weight * norm.scale[:, None], bias


def _norm(graph: fx.GraphModule, node: Any) -> _Norm | None:
    if not _calls(node, {F.batch_norm}):
        return None
    values = _bound(node, ("input", "mean", "var", "weight", "bias", "training", "momentum", "eps"))
    mean, var = (_constant(graph, values.get(name)) for name in ("mean", "var"))
    weight, bias = (_constant(graph, values.get(name)) for name in ("weight", "bias"))
    if values.get("training") or mean is None or var is None:
        return None
    scale = (var.double() + values.get("eps", 1e-5)).rsqrt()
    scale = scale if weight is None else scale * weight.double()
    shift = -mean.double() * scale if bias is None else bias.double() - mean.double() * scale
    return _Norm(node, scale.to(mean.dtype), shift.to(mean.dtype))


def _pointwise(graph: fx.GraphModule, node: Any) -> _Pointwise | None:
    if not _calls(node, _CONVOLUTIONS):
        return None
    values = _bound(node, ("input", "weight", "bias", "stride", "padding", "dilation", "groups"))
    weight, bias = _constant(graph, values.get("weight")), _constant(graph, values.get("bias"))
    plain = (
        weight is not None
        and math.prod(weight.shape[2:]) == 1
        and all(step == 1 for step in _numbers(values.get("stride", 1)))
        and all(side == 0 for side in _numbers(values.get("padding", 0)))
        and values.get("groups", 1) == 1
        and (values.get("bias") is None or bias is not None)
    )
    return _Pointwise(node, weight.flatten(1), bias) if plain and weight is not None else None


def _pools_windows(node: Any, stride: Any) -> bool:
    if not _calls(node, _POOLS):
        return False
    values = _bound(
        node, ("input", "kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override")
    )
    return bool(
        tuple(_numbers(values["kernel_size"])) == tuple(_numbers(values.get("stride"))) == tuple(stride)
        and all(side == 0 for side in _numbers(values.get("padding", 0)))
        and values.get("ceil_mode")
        and values.get("count_include_pad") is False
        and values.get("divisor_override") is None
    )


def _bound(node: Node, names: tuple[str, ...]) -> dict[str, Any]:
    return dict(zip(names, node.args, strict=False)) | dict(node.kwargs)


def _numbers(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, tuple | list) else (value,)


def _calls(node: Any, targets: set[Any]) -> bool:
    """Whether this node calls one of these, and every use of its result is at one place."""
    return isinstance(node, fx.Node) and node.target in targets and len(node.users) == 1 and len(node.args) > 0


def _is_relu(node: Any) -> bool:
    return isinstance(node, fx.Node) and node.target in _RELUS and len(node.args) > 0


def _only_user(node: Node) -> Node:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _constant(graph: fx.GraphModule, node: Any) -> Tensor | None:
    """The value of a weight: an attribute of the graph, or a flattened one."""
    if isinstance(node, fx.Node) and node.target == "flatten":
        inner = _constant(graph, node.args[0])
        return None if inner is None else inner.flatten(*node.args[1:])  # type: ignore[arg-type]
    if not isinstance(node, fx.Node) or node.op != "get_attr":
        return None
    value: Any = graph
    for name in str(node.target).split("."):
        value = getattr(value, name)
    return value.detach() if isinstance(value, Tensor) else None


def _place(node: Node) -> str:
    """The module that a node comes from, as named_modules() calls it."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    return re.sub(r"^L\['\w+'\]\.", "", str(stack[-1][0])) if stack else node.name
