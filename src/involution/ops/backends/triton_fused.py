"""The fused layer for channels-last tensors: the span convolution and apply, without the kernel map.

The kernels of one tap, for a tile's positions and groups, are a matrix product of the tile's features and the tap's
rows of the span weight (tl.dot). They stay in registers, where they are applied.
"""

import triton
import triton.language as tl

from .triton_channels_last import channels
from .triton_indexing import SIZES, block_start, in_bits, inside, row_of_taps, tile, within


@triton.jit(do_not_specialize=SIZES)
def fused_kernel(
    x, hidden, weight, bias, scale, shift, y, in_depth, in_height, in_width, out_depth, out_height, out_width, rows,
    features: tl.constexpr, groups: tl.constexpr, width: tl.constexpr, KERNEL: tl.constexpr, STRIDE: tl.constexpr,
    PADDING: tl.constexpr, DILATION: tl.constexpr, DIMS: tl.constexpr, BLOCKS: tl.constexpr, GROUPS: tl.constexpr,
    WIDTH: tl.constexpr, WIDE: tl.constexpr, HIDDEN: tl.constexpr, RELU: tl.constexpr, PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """relu(scale * apply(x, hidden weight^T + bias) + shift): hidden [N, *O, R], weight [G * prod(K), R].

    bias, scale and RELU may be absent. HIDDEN is the smallest power of two >= R = features. UPCAST is for Triton's
    interpreter, which multiplies bfloat16 matrices wrongly.
    """
    in_depth, in_height, in_width = in_bits(in_depth, in_height, in_width, WIDE)
    out_depth, out_height, out_width = in_bits(out_depth, out_height, out_width, WIDE)
    inputs, outputs = in_depth * in_height * in_width, out_depth * out_height * out_width
    o, rest = tile(outputs, BLOCKS, WIDE)
    g, channel, _, is_channel, n = channels(rest, groups, width, GROUPS, WIDTH)
    n = n.to(tl.int64)
    is_output = o < outputs
    depth, height, column = block_start(o, out_height, out_width, 1, DIMS)
    d, h, w = depth * STRIDE[0] - PADDING[0], height * STRIDE[1] - PADDING[1], column * STRIDE[2] - PADDING[2]
    x += n * inputs * (groups * width)
    y += n * outputs * (groups * width)
    hidden += n * outputs * features
    f = tl.arange(0, HIDDEN)[None, :]
    of_tile = tl.load(hidden + o[:, None] * features + f, is_output[:, None] & (f < features), 0.0)
    if UPCAST:
        of_tile = of_tile.to(tl.float32)
    group = g.reshape(GROUPS)
    total = tl.zeros([BLOCKS, GROUPS, WIDTH], tl.float32)
    for r in range(rows.to(tl.int64) if WIDE else rows):
        a, b, _ = row_of_taps(r, KERNEL[1], 1, DIMS)
        i, j = d + a * DILATION[0], h + b * DILATION[1]
        is_row = is_output & inside(i, j, in_depth, in_height, DIMS)
        row = (i * in_height + j) * in_width + w
        for u in range(KERNEL[2]):
            span = (group * rows + r) * KERNEL[2] + u
            at = weight + span[:, None] * features + f
            matrix = tl.load(at, (group < groups)[:, None] & (f < features), 0.0).to(of_tile.dtype)
            kernels = tl.dot(of_tile, tl.trans(matrix), input_precision=PRECISION)
            if bias is not None:
                kernels += tl.load(bias + span, group < groups, 0.0)[None, :].to(tl.float32)
            v = w + u * DILATION[2]
            here = (is_row & within(v, in_width))[:, None, None]
            from_x = x + (row + u * DILATION[2])[:, None, None] * (groups * width) + channel
            value = tl.load(from_x, here & is_channel, 0.0)
            total += tl.where(here, kernels[:, :, None], 0.0) * value.to(tl.float32)
    if scale is not None:
        factor = tl.load(scale + channel, is_channel, 0.0).to(tl.float32)
        total = total * factor + tl.load(shift + channel, is_channel, 0.0).to(tl.float32)
    if RELU:
        total = tl.where(total < 0.0, 0.0, total)  # NaN stays NaN
    y += o[:, None, None] * (groups * width) + channel
    tl.store(y, total.to(y.dtype.element_ty), is_output[:, None, None] & is_channel)
