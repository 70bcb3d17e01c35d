"""The three maps for contiguous tensors: [N, C, *S] and [N, G, *K, *O].

Neighbours in memory are positions, so a lane is a block of COLUMNS neighbouring positions of a row. It keeps up to
WIDTH channels of one group, each a tensor of its own over the lanes, so that one mask and one weight serve all of them:

    totals[column * WIDTH + channel]    [BLOCKS]

A program computes BLOCKS blocks of one group of one image. Spatial axes are always three, the missing leading ones of
size 1. Sums are float32 (float64 for float64); every element has one writer, so results are the same in every run.
Taps outside the input are skipped. WIDE is for images whose offsets leave 32 bits.
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
    residue_class,
    row_of_taps,
    steps,
    tap_at,
    tap_from_last,
    tile,
    within,
)


@triton.jit
def _zeros(like: tl.constexpr, BLOCKS: tl.constexpr, COUNT: tl.constexpr):
    """A tuple of sums, all 0."""
    totals = ()
    for _ in tl.static_range(COUNT):
        totals += (tl.zeros([BLOCKS], tl.float64 if like == tl.float64 else tl.float32),)
    return totals


@triton.jit
def _load(pointer, distance, here, first, dtype: tl.constexpr, width: tl.constexpr, WIDTH: tl.constexpr):
    """The channels of one image column, `distance` apart; those beyond the group's `width` are 0."""
    values = ()
    for c in tl.static_range(WIDTH):
        exists = here
        if width % WIDTH != 0:
            exists = here & (first + c < width)
        values += (tl.load(pointer + c * distance, exists, 0.0).to(dtype),)
    return values


@triton.jit
def _columns(
    pointer, distance, here, column, columns, first, dtype: tl.constexpr, width: tl.constexpr, WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """The channels of all columns of a block."""
    values = ()
    for p in tl.static_range(COLUMNS):
        values += (_load(pointer + p, distance, here & (column + p < columns), first, dtype, width, WIDTH),)
    return values


@triton.jit
def _add_tap(
    totals, values, pointer, distance, here, first, taps, COLUMN: tl.constexpr, TAP: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    """The sums of one column with the products of a tap added, whose weights are at `pointer`; TAP -1 is none."""
    sums = ()
    if TAP >= 0:
        dtype: tl.constexpr = totals[0].dtype
        weight = tl.load(pointer + TAP * distance, here & (first + TAP < taps), 0.0).to(dtype)
        for c in tl.static_range(WIDTH):
            sums += (totals[COLUMN * WIDTH + c] + weight * values[c],)
    else:
        for c in tl.static_range(WIDTH):
            sums += (totals[COLUMN * WIDTH + c],)
    return sums


@triton.jit(do_not_specialize=SIZES)
def apply_contiguous(
    x, k, y, in_depth, in_height, in_width, out_depth, out_height, out_width, rows, width: tl.constexpr,
    KERNEL: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr, DILATION: tl.constexpr, DIMS: tl.constexpr,
    UNIT: tl.constexpr, CHUNKS: tl.constexpr, BLOCKS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr,
    WIDE: tl.constexpr, TUNED_FOR: tl.constexpr = "",
):  # fmt: skip
    """y[n, c, o] = sum over u of k[n, g(c), u, o] * x[n, c, o*stride + u*dilation - padding]."""
    TAPS: tl.constexpr = ceil_div(KERNEL[2], CHUNKS)
    PARTS: tl.constexpr = ceil_div(width, WIDTH)
    in_depth, in_height, in_width = in_bits(in_depth, in_height, in_width, WIDE)
    out_depth, out_height, out_width = in_bits(out_depth, out_height, out_width, WIDE)
    inputs, outputs = in_depth * in_height * in_width, out_depth * out_height * out_width
    count = out_depth * out_height * tl.cdiv(out_width, COLUMNS)
    block, rest = tile(count, BLOCKS, WIDE)
    part, group = rest % PARTS, (rest // PARTS).to(tl.int64)
    x += (group * width + part * WIDTH) * inputs
    y += (group * width + part * WIDTH) * outputs
    k += group * (KERNEL[0] * KERNEL[1] * KERNEL[2]) * outputs
    depth, height, column = block_start(block, out_height, out_width, COLUMNS, DIMS)
    o = (depth * out_height + height) * out_width + column
    d, h, w = depth * STRIDE[0] - PADDING[0], height * STRIDE[1] - PADDING[1], column * STRIDE[2] - PADDING[2]
    totals = _zeros(y.dtype.element_ty, BLOCKS, COLUMNS * WIDTH)
    dtype: tl.constexpr = totals[0].dtype
    for r in range(rows.to(tl.int64) if WIDE else rows):
        a, b, chunk = row_of_taps(r, KERNEL[1], CHUNKS, DIMS)
        i, j, first = d + a * DILATION[0], h + b * DILATION[1], chunk * TAPS
        is_row = (block < count) & inside(i, j, in_depth, in_height, DIMS)
        v = w + first * DILATION[2]
        x_row = x + ((i * in_height + j) * in_width + v)
        k_row = k + (((a * KERNEL[1] + b) * KERNEL[2] + first) * outputs + o)
        for s in tl.static_range(steps(COLUMNS, TAPS, STRIDE[2], DILATION[2], UNIT)):
            here = is_row & within(v + s * UNIT, in_width)
            values = _load(x_row + s * UNIT, inputs, here, part * WIDTH, dtype, width, WIDTH)
            sums = ()
            for p in tl.static_range(COLUMNS):
                meets = here & (column + p < out_width)
                sums += _add_tap(
                    totals, values, k_row + p, outputs, meets, first, KERNEL[2], p,
                    tap_at(s, p, TAPS, STRIDE[2], DILATION[2], UNIT), WIDTH,
                )  # fmt: skip
            totals = sums
    for p in tl.static_range(COLUMNS):
        is_output = (block < count) & (column + p < out_width)
        for c in tl.static_range(WIDTH):
            exists = is_output & (part * WIDTH + c < width)
            tl.store(y + c * outputs + o + p, totals[p * WIDTH + c].to(y.dtype.element_ty), exists)


@triton.jit(do_not_specialize=SIZES)
def adjoint_contiguous(
    grad, k, dx, in_depth, in_height, in_width, out_depth, out_height, out_width, rows, width: tl.constexpr,
    KERNEL: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr, STEP: tl.constexpr, BACK: tl.constexpr,
    INVERSE: tl.constexpr, DIMS: tl.constexpr, UNIT: tl.constexpr, CHUNKS: tl.constexpr, BLOCKS: tl.constexpr,
    COLUMNS: tl.constexpr, WIDTH: tl.constexpr, WIDE: tl.constexpr, TUNED_FOR: tl.constexpr = "",
):  # fmt: skip
    """dx[n, c, i] = sum over (u, o) with o*stride + u*dilation - padding = i of k[n, g(c), u, o] * grad[n, c, o].

    A program's input positions are those of one residue class modulo the stride, so that no tap is visited in vain.
    """
    TAPS: tl.constexpr = ceil_div(ceil_div(KERNEL[2], STEP[2]), CHUNKS)
    PARTS: tl.constexpr = ceil_div(width, WIDTH)
    LAST: tl.constexpr = (TAPS - 1) * BACK[2]
    in_depth, in_height, in_width = in_bits(in_depth, in_height, in_width, WIDE)
    out_depth, out_height, out_width = in_bits(out_depth, out_height, out_width, WIDE)
    inputs, outputs = in_depth * in_height * in_width, out_depth * out_height * out_width
    height, width_ = tl.cdiv(in_height, STRIDE[1]), tl.cdiv(in_width, STRIDE[2])
    count = tl.cdiv(in_depth, STRIDE[0]) * height * tl.cdiv(width_, COLUMNS)
    block, rest = tile(count, BLOCKS, WIDE)
    part, rest = rest % PARTS, rest // PARTS
    depth_classes, height_classes, width_classes = classes(in_depth, in_height, in_width, STRIDE)
    at_w, rest = rest % width_classes, rest // width_classes
    at_h, rest = rest % height_classes, rest // height_classes
    at_d, group = rest % depth_classes, (rest // depth_classes).to(tl.int64)
    u_d, taps_d, o_d = residue_class(at_d, KERNEL[0], STRIDE[0], PADDING[0], STEP[0], BACK[0], INVERSE[0])
    u_h, taps_h, o_h = residue_class(at_h, KERNEL[1], STRIDE[1], PADDING[1], STEP[1], BACK[1], INVERSE[1])
    u_w, taps_w, o_w = residue_class(at_w, KERNEL[2], STRIDE[2], PADDING[2], STEP[2], BACK[2], INVERSE[2])
    grad += (group * width + part * WIDTH) * outputs
    dx += (group * width + part * WIDTH) * inputs
    k += group * (KERNEL[0] * KERNEL[1] * KERNEL[2]) * outputs
    d, h, w = block_start(block, height, width_, COLUMNS, DIMS)
    totals = _zeros(dx.dtype.element_ty, BLOCKS, COLUMNS * WIDTH)
    dtype: tl.constexpr = totals[0].dtype
    for r in range(tl.minimum(taps_d * taps_h * CHUNKS, rows)):  # a bound that no compiler knows
        a, b, chunk = row_of_taps(r, taps_h, CHUNKS, DIMS)
        i, j, first = d + o_d - a * BACK[0], h + o_h - b * BACK[1], chunk * TAPS
        is_row = (block < count) & inside(i, j, out_depth, out_height, DIMS)
        v = w + o_w - first * BACK[2] - LAST  # the output column that the last tap reads for the first column
        row = (i * out_height + j) * out_width + v
        tap = ((u_d + a * STEP[0]) * KERNEL[1] + u_h + b * STEP[1]) * KERNEL[2] + u_w + first * STEP[2]
        grad_row, k_row = grad + row, k + (tap * outputs + row)
        for s in tl.static_range(steps(COLUMNS, TAPS, 1, BACK[2], UNIT)):
            here = is_row & within(v + s * UNIT, out_width)
            values = _load(grad_row + s * UNIT, outputs, here, part * WIDTH, dtype, width, WIDTH)
            sums = ()
            for p in tl.static_range(COLUMNS):
                sums += _add_tap(
                    totals, values, k_row + s * UNIT, STEP[2] * outputs, here, first, taps_w, p,
                    tap_from_last(s, p, TAPS, BACK[2], UNIT), WIDTH,
                )  # fmt: skip
            totals = sums
    i, j, v = at_d + d * STRIDE[0], at_h + h * STRIDE[1], at_w + w * STRIDE[2]
    is_row = (block < count) & inside(i, j, in_depth, in_height, DIMS)
    dx += (i * in_height + j) * in_width + v
    for p in tl.static_range(COLUMNS):
        is_input = is_row & (v + p * STRIDE[2] < in_width)
        for c in tl.static_range(WIDTH):
            exists = is_input & (part * WIDTH + c < width)
            tl.store(dx + c * inputs + p * STRIDE[2], totals[p * WIDTH + c].to(dx.dtype.element_ty), exists)


@triton.jit(do_not_specialize=SIZES)
def correlate_contiguous(
    grad, x, dk, in_depth, in_height, in_width, out_depth, out_height, out_width, rows, width: tl.constexpr,
    KERNEL: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr, DILATION: tl.constexpr, DIMS: tl.constexpr,
    UNIT: tl.constexpr, CHUNKS: tl.constexpr, BLOCKS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr,
    WIDE: tl.constexpr, TUNED_FOR: tl.constexpr = "",
):  # fmt: skip
    """dk[n, g, u, o] = sum over the channels c of group g of grad[n, c, o] * x[n, c, o*stride + u*dilation - padding].

    A lane has the sums of one row of taps; groups of more than WIDTH channels are read WIDTH at a time.
    """
    TAPS: tl.constexpr = ceil_div(KERNEL[2], CHUNKS)
    PARTS: tl.constexpr = ceil_div(width, WIDTH)
    in_depth, in_height, in_width = in_bits(in_depth, in_height, in_width, WIDE)
    out_depth, out_height, out_width = in_bits(out_depth, out_height, out_width, WIDE)
    inputs, outputs = in_depth * in_height * in_width, out_depth * out_height * out_width
    count = out_depth * out_height * tl.cdiv(out_width, COLUMNS)
    block, group = tile(count, BLOCKS, WIDE)
    group = group.to(tl.int64)
    grad += group * width * outputs
    x += group * width * inputs
    dk += group * (KERNEL[0] * KERNEL[1] * KERNEL[2]) * outputs
    depth, height, column = block_start(block, out_height, out_width, COLUMNS, DIMS)
    o = (depth * out_height + height) * out_width + column
    d, h, w = depth * STRIDE[0] - PADDING[0], height * STRIDE[1] - PADDING[1], column * STRIDE[2] - PADDING[2]
    is_block = block < count
    zeros = _zeros(dk.dtype.element_ty, BLOCKS, COLUMNS * TAPS)
    dtype: tl.constexpr = zeros[0].dtype
    grads = ()
    if PARTS == 1:
        grads = _columns(grad + o, outputs, is_block, column, out_width, 0, dtype, width, WIDTH, COLUMNS)
    for r in range(rows.to(tl.int64) if WIDE else rows):
        a, b, chunk = row_of_taps(r, KERNEL[1], CHUNKS, DIMS)
        i, j, first = d + a * DILATION[0], h + b * DILATION[1], chunk * TAPS
        is_row = (block < count) & inside(i, j, in_depth, in_height, DIMS)
        v = w + first * DILATION[2]
        x_row = x + ((i * in_height + j) * in_width + v)
        dk_row = dk + (((a * KERNEL[1] + b) * KERNEL[2] + first) * outputs + o)
        sums = zeros
        for part in range(PARTS):
            if PARTS > 1:
                grads = _columns(
                    grad + (part * WIDTH * outputs + o), outputs, is_block, column, out_width, part * WIDTH, dtype,
                    width, WIDTH, COLUMNS,
                )  # fmt: skip
            for s in tl.static_range(steps(COLUMNS, TAPS, STRIDE[2], DILATION[2], UNIT)):
                here = is_row & within(v + s * UNIT, in_width)
                x_part = x_row + (part * WIDTH * inputs + s * UNIT)
                values = _load(x_part, inputs, here, part * WIDTH, dtype, width, WIDTH)
                more = ()
                for p in tl.static_range(COLUMNS):
                    for u in tl.static_range(TAPS):
                        if tap_at(s, p, TAPS, STRIDE[2], DILATION[2], UNIT) == u:
                            products = grads[p][0] * values[0]
                            for c in tl.static_range(1, WIDTH):
                                products += grads[p][c] * values[c]
                            more += (sums[p * TAPS + u] + tl.where(here, products, 0.0),)
                        else:
                            more += (sums[p * TAPS + u],)
                sums = more
        for p in tl.static_range(COLUMNS):
            for u in tl.static_range(TAPS):
                exists = is_block & (column + p < out_width) & (first + u < KERNEL[2])
                tl.store(dk_row + u * outputs + p, sums[p * TAPS + u].to(dk.dtype.element_ty), exists)
