"""The oracle: the operator's definition and its gradients as a float64 loop over taps."""

from itertools import product

import numpy as np
import torch
from strategies import Call


def loop(call: Call, x: torch.Tensor, k: torch.Tensor, g: torch.Tensor) -> list[torch.Tensor]:
    """y, dx and dk in float64, one tap at a time."""
    x, k, g = (t.double().numpy() for t in (x, k, g))
    y, dx, dk = np.zeros(g.shape), np.zeros(x.shape), np.zeros(k.shape)
    for n in range(call.batch):
        for o in product(*(range(size) for size in call.output)):
            for u in product(*(range(size) for size in call.kernel)):
                i = tuple(o[a] * call.stride[a] + u[a] * call.dilation[a] - call.padding[a] for a in range(call.dims))
                if any(i[a] < 0 or i[a] >= call.input[a] for a in range(call.dims)):
                    continue
                at_x, at_y = (n, slice(None), *i), (n, slice(None), *o)
                weights = np.repeat(k[(n, slice(None), *u, *o)], call.width)
                y[at_y] += weights * x[at_x]
                dx[at_x] += weights * g[at_y]
                dk[(n, slice(None), *u, *o)] += (g[at_y] * x[at_x]).reshape(call.groups, call.width).sum(1)
    return [torch.from_numpy(t) for t in (y, dx, dk)]
