"""The three maps for channels-last tensors: [N, *S, C] and [N, *O, G, *K].

Neighbours in memory are channels, so a tensor is a tile of blocks x groups x channels of a group, and a block's COLUMNS
neighbouring positions are a tuple of such tensors:

    totals[column]    [BLOCKS, GROUPS, WIDTH]

A row of taps of the kernel map is read whole, at most eight of them, and split in registers. Spatial axes are always
three, the missing leading ones of size 1. Sums are float32 (float64 for float64); every element has one writer, so
results are the same in every run. Taps outside the input are skipped. WIDE is for images whose offsets leave 32 bits.
"""

import triton
import triton.language as tl

from .triton_indexing import (
    SIZES,
    block_start,
    ceil_div,
    classes,
    in_bits,
    inside,
    join,
    residue_class,
    row_of_taps,
    split,
    steps,
    tap_at,
    tap_from_last,
    tile,
    vector,
    within,
)


@triton.jit
def channels(
    rest, groups: tl.constexpr, width: tl.constexpr, GROUPS: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    """Groups [1, G] and channels [1, G, W] of this program, masks of those that exist, and the rest of its number."""
    PARTS: tl.constexpr = ceil_div(width, WIDTH)
    BLOCKS: tl.constexpr = ceil_div(groups, GROUPS)
    c = rest % PARTS * WIDTH + tl.arange(0, WIDTH)[None, None, :]
    g = rest // PARTS % BLOCKS * GROUPS + tl.arange(0, GROUPS)[None, :]
    # Constant masks where all exist: compilers remove them.
    is_group = tl.full([1, GROUPS], True, tl.int1) if groups % GROUPS == 0 else g < groups
    is_width = tl.full([1, 1, WIDTH], True, tl.int1) if width % WIDTH == 0 else c < width
    return g, g[:, :, None] * width + c, is_group, is_group[:, :, None] & is_width, rest // PARTS // BLOCKS


@triton.jit
def _zeros(like: tl.constexpr, COUNT: tl.constexpr, BLOCKS: tl.constexpr, GROUPS: tl.constexpr, WIDTH: tl.constexpr):
    """A tuple of sums, all 0."""
    totals = ()
    for _ in tl.static_range(COUNT):
        totals += (tl.zeros([BLOCKS, GROUPS, WIDTH], tl.float64 if like == tl.float64 else tl.float32),)
    return totals


@triton.jit(do_not_specialize=SIZES)
def apply_channels_last(
    x, k, y, in_depth, in_height, in_width, out_depth, out_height, out_width, rows, groups: tl.constexpr,
    width: tl.constexpr, KERNEL: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr, DILATION: tl.constexpr,
    DIMS: tl.constexpr, UNIT: tl.constexpr, CHUNKS: tl.constexpr, BLOCKS: tl.constexpr, COLUMNS: tl.constexpr,
    GROUPS: tl.constexpr, WIDTH: tl.constexpr, WIDE: tl.constexpr,
    TUNED_FOR: tl.constexpr = "",
):  # fmt: skip
    """y[n, c, o] = sum over u of k[n, g(c), u, o] * x[n, c, o*stride + u*dilation - padding]."""
    TAPS: tl.constexpr = ceil_div(KERNEL[2], CHUNKS)
    VECTOR: tl.constexpr = vector(TAPS)
    CHANNELS: tl.constexpr = groups * width
    SPAN: tl.constexpr = groups * KERNEL[0] * KERNEL[1] * KERNEL[2]  # elements of the kernel map at one position
    in_depth, in_height, in_width = in_bits(in_depth, in_height, in_width, WIDE)
    out_depth, out_height, out_width = in_bits(out_depth, out_height, out_width, WIDE)
    inputs, outputs = in_depth * in_height * in_width, out_depth * out_height * out_width
    count = out_depth * out_height * tl.cdiv(out_width, COLUMNS)
    block, rest = tile(count, BLOCKS, WIDE)
    g, channel, is_group, is_channel, n = channels(rest, groups, width, GROUPS, WIDTH)
    is_block = block < count
    depth, height, column = block_start(block, out_height, out_width, COLUMNS, DIMS)
    o = (depth * out_height + height) * out_width + column
    d, h, w = depth * STRIDE[0] - PADDING[0], height * STRIDE[1] - PADDING[1], column * STRIDE[2] - PADDING[2]
    x += n.to(tl.int64) * inputs * CHANNELS
    y += n.to(tl.int64) * outputs * CHANNELS
    k += n.to(tl.int64) * outputs * SPAN
    taps = tl.arange(0, VECTOR)[None, None, :]
    k_block = k + (o[:, None] * SPAN + g * (KERNEL[0] * KERNEL[1] * KERNEL[2]))[:, :, None] + taps
    totals = _zeros(y.dtype.element_ty, COLUMNS, BLOCKS, GROUPS, WIDTH)
    dtype: tl.constexpr = totals[0].dtype
    for r in range(rows.to(tl.int64) if WIDE else rows):
        a, b, chunk = row_of_taps(r, KERNEL[1], CHUNKS, DIMS)
        i, j, first = d + a * DILATION[0], h + b * DILATION[1], chunk * TAPS
        is_row = is_block & inside(i, j, in_depth, in_height, DIMS)
        v = w + first * DILATION[2]
        x_row = x + ((i * in_height + j) * in_width + v)[:, None, None] * CHANNELS + channel
        weights = ()
        for p in tl.static_range(COLUMNS):
            exists = (is_block & (column + p < out_width))[:, None] & is_group
            exists = exists[:, :, None] & (taps < TAPS) & (first + taps < KERNEL[2])
            k_row = k_block + (((a * KERNEL[1] + b) * KERNEL[2] + first) + p * SPAN)
            weights += (split(tl.load(k_row, exists, 0.0), VECTOR),)
        for s in tl.static_range(steps(COLUMNS, TAPS, STRIDE[2], DILATION[2], UNIT)):
            here = (is_row & within(v + s * UNIT, in_width))[:, None]
            value = tl.load(x_row + s * UNIT * CHANNELS, here[:, :, None] & is_channel, 0.0).to(dtype)
            sums = ()
            for p in tl.static_range(COLUMNS):
                if tap_at(s, p, TAPS, STRIDE[2], DILATION[2], UNIT) >= 0:
                    weight = weights[p][tap_at(s, p, TAPS, STRIDE[2], DILATION[2], UNIT)]
                    weight = tl.where(here, weight.to(dtype), 0.0)
                    sums += (totals[p] + weight[:, :, None] * value,)
                else:
                    sums += (totals[p],)
            totals = sums
    y_block = y + o[:, None, None] * CHANNELS + channel
    for p in tl.static_range(COLUMNS):
        exists = (is_block & (column + p < out_width))[:, None, None] & is_channel
        tl.store(y_block + p * CHANNELS, totals[p].to(y.dtype.element_ty), exists)


@triton.jit(do_not_specialize=SIZES)
def adjoint_channels_last(
    grad, k, dx, in_depth, in_height, in_width, out_depth, out_height, out_width, rows, groups: tl.constexpr,
    width: tl.constexpr, KERNEL: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr, STEP: tl.constexpr,
    BACK: tl.constexpr, INVERSE: tl.constexpr, DIMS: tl.constexpr, UNIT: tl.constexpr, CHUNKS: tl.constexpr,
    BLOCKS: tl.constexpr, COLUMNS: tl.constexpr, GROUPS: tl.constexpr, WIDTH: tl.constexpr, WIDE: tl.constexpr,
    TUNED_FOR: tl.constexpr = "",
):  # fmt: skip
    """dx[n, c, i] = sum over (u, o) with o*stride + u*dilation - padding = i of k[n, g(c), u, o] * grad[n, c, o].

    A program's input positions are those of one residue class modulo the stride, so that no tap is visited in vain. The
    weights that one output column has for a block's positions are neighbours in memory (every STEP-th tap).
    """
    TAPS: tl.constexpr = ceil_div(ceil_div(KERNEL[2], STEP[2]), CHUNKS)
    VECTOR: tl.constexpr = vector(TAPS)
    LAST: tl.constexpr = (TAPS - 1) * BACK[2]
    CHANNELS: tl.constexpr = groups * width
    SPAN: tl.constexpr = groups * KERNEL[0] * KERNEL[1] * KERNEL[2]  # elements of the kernel map at one position
    in_depth, in_height, in_width = in_bits(in_depth, in_height, in_width, WIDE)
    out_depth, out_height, out_width = in_bits(out_depth, out_height, out_width, WIDE)
    inputs, outputs = in_depth * in_height * in_width, out_depth * out_height * out_width
    height, across = tl.cdiv(in_height, STRIDE[1]), tl.cdiv(in_width, STRIDE[2])
    count = tl.cdiv(in_depth, STRIDE[0]) * height * tl.cdiv(across, COLUMNS)
    block, rest = tile(count, BLOCKS, WIDE)
    g, channel, is_group, is_channel, rest = channels(rest, groups, width, GROUPS, WIDTH)
    depth_classes, height_classes, width_classes = classes(in_depth, in_height, in_width, STRIDE)
    at_w, rest = rest % width_classes, rest // width_classes
    at_h, rest = rest % height_classes, rest // height_classes
    at_d, n = rest % depth_classes, (rest // depth_classes).to(tl.int64)
    u_d, taps_d, o_d = residue_class(at_d, KERNEL[0], STRIDE[0], PADDING[0], STEP[0], BACK[0], INVERSE[0])
    u_h, taps_h, o_h = residue_class(at_h, KERNEL[1], STRIDE[1], PADDING[1], STEP[1], BACK[1], INVERSE[1])
    u_w, taps_w, o_w = residue_class(at_w, KERNEL[2], STRIDE[2], PADDING[2], STEP[2], BACK[2], INVERSE[2])
    grad += n * outputs * CHANNELS
    dx += n * inputs * CHANNELS
    k += n * outputs * SPAN
    is_block = block < count
    d, h, w = block_start(block, height, across, COLUMNS, DIMS)
    taps = tl.arange(0, VECTOR)[None, None, :]
    totals = _zeros(dx.dtype.element_ty, COLUMNS, BLOCKS, GROUPS, WIDTH)
    dtype: tl.constexpr = totals[0].dtype
    for r in range(tl.minimum(taps_d * taps_h * CHUNKS, rows)):  # a bound that no compiler knows
        a, b, chunk = row_of_taps(r, taps_h, CHUNKS, DIMS)
        i, j, first = d + o_d - a * BACK[0], h + o_h - b * BACK[1], chunk * TAPS
        is_row = is_block & inside(i, j, out_depth, out_height, DIMS)
        v = w + o_w - first * BACK[2] - LAST  # the output column that the last tap reads for the first column
        row = (i * out_height + j) * out_width + v
        tap = ((u_d + a * STEP[0]) * KERNEL[1] + u_h + b * STEP[1]) * KERNEL[2] + u_w + first * STEP[2]
        grad_row = grad + row[:, None, None] * CHANNELS + channel
        of_group = row[:, None] * SPAN + g * (KERNEL[0] * KERNEL[1] * KERNEL[2]) + tap
        k_row = k + of_group[:, :, None] + taps * STEP[2]
        for s in tl.static_range(steps(COLUMNS, TAPS, 1, BACK[2], UNIT)):
            here = (is_row & within(v + s * UNIT, out_width))[:, None]
            value = tl.load(grad_row + s * UNIT * CHANNELS, here[:, :, None] & is_channel, 0.0).to(dtype)
            meets = (here & is_group)[:, :, None] & (taps < TAPS) & (first + taps < taps_w)
            weights = split(tl.load(k_row + s * UNIT * SPAN, meets, 0.0), VECTOR)
            sums = ()
            for p in tl.static_range(COLUMNS):
                if tap_from_last(s, p, TAPS, BACK[2], UNIT) >= 0:
                    weight = weights[tap_from_last(s, p, TAPS, BACK[2], UNIT)].to(dtype)
                    sums += (totals[p] + weight[:, :, None] * value,)
                else:
                    sums += (totals[p],)
            totals = sums
    i, j, v = at_d + d * STRIDE[0], at_h + h * STRIDE[1], at_w + w * STRIDE[2]
    is_row = is_block & inside(i, j, in_depth, in_height, DIMS)
    dx += ((i * in_height + j) * in_width + v)[:, None, None] * CHANNELS + channel
    for p in tl.static_range(COLUMNS):
        exists = (is_row & (v + p * STRIDE[2] < in_width))[:, None, None] & is_channel
        tl.store(dx + p * (STRIDE[2] * CHANNELS), totals[p].to(dx.dtype.element_ty), exists)


@triton.jit(do_not_specialize=SIZES)
def correlate_channels_last(
    grad, x, dk, in_depth, in_height, in_width, out_depth, out_height, out_width, rows, groups: tl.constexpr,
    width: tl.constexpr, KERNEL: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr, DILATION: tl.constexpr,
    DIMS: tl.constexpr, UNIT: tl.constexpr, CHUNKS: tl.constexpr, BLOCKS: tl.constexpr, COLUMNS: tl.constexpr,
    GROUPS: tl.constexpr, WIDTH: tl.constexpr, WIDE: tl.constexpr,
    TUNED_FOR: tl.constexpr = "",
):  # fmt: skip
    """dk[n, g, u, o] = sum over the channels c of group g of grad[n, c, o] * x[n, c, o*stride + u*dilation - padding].

    A tile has all channels of its groups: WIDTH is at least the width.
    """
    TAPS: tl.constexpr = ceil_div(KERNEL[2], CHUNKS)
    VECTOR: tl.constexpr = vector(TAPS)
    CHANNELS: tl.constexpr = groups * width
    SPAN: tl.constexpr = groups * KERNEL[0] * KERNEL[1] * KERNEL[2]  # elements of the kernel map at one position
    in_depth, in_height, in_width = in_bits(in_depth, in_height, in_width, WIDE)
    out_depth, out_height, out_width = in_bits(out_depth, out_height, out_width, WIDE)
    inputs, outputs = in_depth * in_height * in_width, out_depth * out_height * out_width
    count = out_depth * out_height * tl.cdiv(out_width, COLUMNS)
    block, rest = tile(count, BLOCKS, WIDE)
    g, channel, is_group, is_channel, n = channels(rest, groups, width, GROUPS, WIDTH)
    is_block = block < count
    depth, height, column = block_start(block, out_height, out_width, COLUMNS, DIMS)
    o = (depth * out_height + height) * out_width + column
    d, h, w = depth * STRIDE[0] - PADDING[0], height * STRIDE[1] - PADDING[1], column * STRIDE[2] - PADDING[2]
    grad += n.to(tl.int64) * outputs * CHANNELS + o[:, None, None] * CHANNELS + channel
    x += n.to(tl.int64) * inputs * CHANNELS
    dk += n.to(tl.int64) * outputs * SPAN
    taps = tl.arange(0, VECTOR)[None, None, :]
    dk_block = dk + (o[:, None] * SPAN + g * (KERNEL[0] * KERNEL[1] * KERNEL[2]))[:, :, None] + taps
    dtype: tl.constexpr = tl.float64 if dk.dtype.element_ty == tl.float64 else tl.float32
    grads = ()
    for p in tl.static_range(COLUMNS):
        exists = (is_block & (column + p < out_width))[:, None, None] & is_channel
        grads += (tl.load(grad + p * CHANNELS, exists, 0.0).to(dtype),)
    for r in range(rows.to(tl.int64) if WIDE else rows):
        a, b, chunk = row_of_taps(r, KERNEL[1], CHUNKS, DIMS)
        i, j, first = d + a * DILATION[0], h + b * DILATION[1], chunk * TAPS
        is_row = is_block & inside(i, j, in_depth, in_height, DIMS)
        v = w + first * DILATION[2]
        x_row = x + ((i * in_height + j) * in_width + v)[:, None, None] * CHANNELS + channel
        values, masks = (), ()
        for s in tl.static_range(steps(COLUMNS, TAPS, STRIDE[2], DILATION[2], UNIT)):
            here = (is_row & within(v + s * UNIT, in_width))[:, None]
            values += (tl.load(x_row + s * UNIT * CHANNELS, here[:, :, None] & is_channel, 0.0).to(dtype),)
            masks += (here,)
        for p in tl.static_range(COLUMNS):
            sums = ()
            for u in tl.static_range(VECTOR):
                if u < TAPS:
                    products = grads[p] * values[(p * STRIDE[2] + u * DILATION[2]) // UNIT]
                    here = masks[(p * STRIDE[2] + u * DILATION[2]) // UNIT]
                    sums += (tl.where(here, tl.sum(products, 2), 0.0),)
                else:
                    sums += (tl.zeros([BLOCKS, GROUPS], dtype),)
            is_map = (is_block & (column + p < out_width))[:, None] & is_group
            is_tap = is_map[:, :, None] & (taps < TAPS) & (first + taps < KERNEL[2])
            dk_row = dk_block + (((a * KERNEL[1] + b) * KERNEL[2] + first) + p * SPAN)
            tl.store(dk_row, join(sums, 0, 1, VECTOR).to(dk.dtype.element_ty), is_tap)
