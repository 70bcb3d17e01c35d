"""TorchDynamo's graphs: what a node calls, with which constants, and whether tensors are modified in place."""

import inspect
import operator
import re
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from ..ops import fused as fused  # registers the operators that graphs refer to

Node = Any  # a torch.fx.Node: its arguments are typed too widely to be of use

CONVOLUTIONS = {F.conv1d, F.conv2d, F.conv3d, torch.conv1d, torch.conv2d, torch.conv3d}
AVERAGE_POOLS = {F.avg_pool1d, F.avg_pool2d, F.avg_pool3d}
RMS_NORMS = {F.rms_norm, torch.rms_norm}
SUMS = {operator.add, operator.iadd, torch.add, "add", "add_"}
_RELUS = {F.relu, torch.relu, torch.relu_, F.relu_, "relu", "relu_"}
# Functions whose result shares no memory with their arguments, unless they are called in place.
_NON_ALIASING = {F.batch_norm, F.linear, F.relu, torch.relu, "relu", operator.add, torch.add}
_NON_ALIASING |= {*CONVOLUTIONS, *AVERAGE_POOLS, *RMS_NORMS}
_NON_ALIASING |= {torch.ops.involution.fused_layer.default, torch.ops.involution.apply.default}
_IN_PLACE_OPERATORS = {
    *("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod"),
    *("ipow", "iand", "ior", "ixor", "ilshift", "irshift", "imatmul", "setitem"),
}


def is_single_use_call(node: Any, targets: set[Any]) -> bool:
    """Whether a node calls one of these functions and its result has exactly one user."""
    return isinstance(node, fx.Node) and node.target in targets and len(node.users) == 1 and len(node.args) > 0


def is_relu(node: Any) -> bool:
    """Whether a node is a ReLU: the function, the method, or either's in-place form."""
    return isinstance(node, fx.Node) and node.target in _RELUS and len(node.args) > 0


def only_user(node: Node) -> Node:
    """The node that reads this one's result, or None unless there is exactly one."""
    return next(iter(node.users)) if len(node.users) == 1 else None


def arguments(node: Node, names: tuple[str, ...]) -> dict[str, Any]:
    """A call's arguments by name, where `names` are the function's parameters in order; omitted ones are absent."""
    return dict(zip(names, node.args, strict=False)) | dict(node.kwargs)


def constant(graph: fx.GraphModule, node: Any) -> Tensor | None:
    """The value of a weight (an attribute of the graph, possibly flattened), or None where a node is computed."""
    if isinstance(node, fx.Node) and node.target == "flatten":
        inner = constant(graph, node.args[0])
        return None if inner is None else inner.flatten(*node.args[1:], **node.kwargs)  # type: ignore[arg-type]
    if not isinstance(node, fx.Node) or node.op != "get_attr":
        return None
    value: Any = graph
    for name in str(node.target).split("."):
        value = getattr(value, name)
    return value.detach() if isinstance(value, Tensor) else None


def module_path(node: Node) -> str:
    """The module that a node was traced from, as named_modules() calls it."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    return re.sub(r"^L\['\w+'\]\.", "", str(stack[-1][0])) if stack else node.name


def mutates_shared_tensor(graph: fx.GraphModule) -> bool:
    """Whether an in-place call modifies a tensor that another node reads: then moving reads would change the result."""
    pending = [tensor for node in graph.graph.nodes for tensor in _mutated(node)]
    while pending:
        tensor = pending.pop()
        if len(tensor.users) > 1 or tensor.op in ("placeholder", "get_attr"):
            return True
        pending += _aliased(tensor)
    return False


def _aliased(node: Node) -> list[Node]:
    """The tensors whose memory a call's result may share: those it modifies, or else its first argument (a view)."""
    return _mutated(node) or ([] if node.target in _NON_ALIASING else _first_tensor(node))


def _first_tensor(node: Node) -> list[Node]:
    """A call's first argument, by position or as `input`, in a list; empty where that is no node."""
    first = node.args[0] if node.args else node.kwargs.get("input", node.kwargs.get("self"))
    return [first] if isinstance(first, fx.Node) else []


def _mutated(node: Node) -> list[Node]:
    """The tensors that a call modifies: `out` where it is given, else the first argument of an in-place call."""
    if node.op == "call_method":
        return _first_tensor(node) if _has_in_place_name(str(node.target)) else []
    if node.op != "call_function":
        return []
    if node.kwargs.get("out") is not None:
        out = node.kwargs["out"]
        return [tensor for tensor in (out if isinstance(out, tuple | list) else [out]) if isinstance(tensor, fx.Node)]
    schema, name = getattr(node.target, "_schema", None), getattr(node.target, "__name__", "")
    in_place = (
        (schema is not None and schema.is_mutable)
        or _passes_inplace(node)
        or _has_in_place_name(name)
        or (getattr(node.target, "__module__", "") == "_operator" and name in _IN_PLACE_OPERATORS)
    )
    return _first_tensor(node) if in_place else []


def _has_in_place_name(name: str) -> bool:
    return name.endswith("_") and not name.endswith("__")


def _passes_inplace(node: Node) -> bool:
    """Whether a call passes inplace=True, by keyword or by position."""
    if "inplace" in node.kwargs:
        return bool(node.kwargs["inplace"])
    try:
        names = list(inspect.signature(node.target).parameters)
    except (TypeError, ValueError):  # a builtin: torch's in-place builtins end with an underscore
        return False
    index = names.index("inplace") if "inplace" in names else len(node.args)
    return index < len(node.args) and bool(node.args[index])
