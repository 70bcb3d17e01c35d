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
# Functions whose result shares no memory with their arguments.
_ALLOCATING = {F.batch_norm, F.linear, F.relu, torch.relu, "relu", operator.add, torch.add}
_ALLOCATING |= {*CONVOLUTIONS, *AVERAGE_POOLS, *RMS_NORMS}
_ALLOCATING |= {torch.ops.involution.fused_layer.default, torch.ops.involution.apply.default}
_IN_PLACE_OPERATORS = {
    *("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod"),
    *("ipow", "iand", "ior", "ixor", "ilshift", "irshift", "imatmul", "setitem"),
}


def calls(node: Any, targets: set[Any]) -> bool:
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
        return None if inner is None else inner.flatten(*node.args[1:])  # type: ignore[arg-type]
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
    for node in graph.graph.nodes:
        mutated = node.args[0] if _mutates(node) and node.args else None
        while isinstance(mutated, fx.Node):
            if len(mutated.users) > 1 or mutated.op in ("placeholder", "get_attr"):
                return True
            # Anything but an allocating function may return a view of its first argument: follow it.
            allocates = mutated.target in _ALLOCATING and not _mutates(mutated)
            mutated = None if allocates or not mutated.args else mutated.args[0]
    return False


def _mutates(node: Node) -> bool:
    """Whether a call modifies its first argument, or writes to `out`."""
    if node.op == "call_method":
        return str(node.target).endswith("_") and not str(node.target).endswith("__")
    if node.op != "call_function":
        return False
    schema, name = getattr(node.target, "_schema", None), getattr(node.target, "__name__", "")
    return bool(
        (schema is not None and schema.is_mutable)
        or _is_set(node, "inplace")
        or node.kwargs.get("out") is not None
        or (name.endswith("_") and not name.endswith("__"))
        or (getattr(node.target, "__module__", "") == "_operator" and name in _IN_PLACE_OPERATORS)
    )


def _is_set(node: Node, option: str) -> bool:
    """Whether a call passes a true value for an option, by keyword or by position."""
    if option in node.kwargs:
        return bool(node.kwargs[option])
    try:
        names = list(inspect.signature(node.target).parameters)
    except (TypeError, ValueError):  # a builtin: torch's in-place builtins end with an underscore
        return False
    return option in names and len(node.args) > names.index(option) and bool(node.args[names.index(option)])
