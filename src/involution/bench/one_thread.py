"""The published design as a baseline: one thread for every element of a result, contiguous, its window unrolled.

It is the plain way to write the three maps, and that of the CUDA kernels that were published with the paper: a thread
works out an element's place, and loads an image element and a weight for every product. Only counted, never launched.
"""

import triton
import triton.language as tl


@triton.jit
def apply_one_thread(
    x, k, y, elements, groups, in_height, in_width, out_height, out_width, width: tl.constexpr, KERNEL: tl.constexpr,
    STRIDE: tl.constexpr, PADDING: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """An output element a thread."""
    e = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    column, row, channel = e % out_width, e // out_width % out_height, e // out_width // out_height
    positions = out_height * out_width
    k += channel // width * (KERNEL * KERNEL) * positions + row * out_width + column
    i, j = row * STRIDE - PADDING, column * STRIDE - PADDING
    x += (channel * in_height + i) * in_width + j
    total = tl.zeros([BLOCKS], tl.float32)
    for a in tl.static_range(KERNEL):
        is_row = (e < elements) & (i + a >= 0) & (i + a < in_height)
        for b in tl.static_range(KERNEL):
            here = is_row & (j + b >= 0) & (j + b < in_width)
            value = tl.load(x + b, here, 0.0).to(tl.float32)
            total += tl.load(k, here, 0.0).to(tl.float32) * value
            k += positions
        x += in_width
    tl.store(y + e, total.to(y.dtype.element_ty), e < elements)


@triton.jit
def adjoint_one_thread(
    grad, k, dx, elements, groups, in_height, in_width, out_height, out_width, width: tl.constexpr,
    KERNEL: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """An input element a thread; every tap is tried."""
    e = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    column, row, channel = e % in_width, e // in_width % in_height, e // in_width // in_height
    k += channel // width * (KERNEL * KERNEL) * out_height * out_width
    total = tl.zeros([BLOCKS], tl.float32)
    for a in tl.static_range(KERNEL):
        for b in tl.static_range(KERNEL):
            h, w = row + PADDING - a, column + PADDING - b
            here = (e < elements) & (h >= 0) & (h % STRIDE == 0) & (w >= 0) & (w % STRIDE == 0)
            i, j = h // STRIDE, w // STRIDE
            here = here & (i < out_height) & (j < out_width)
            value = tl.load(grad + (channel * out_height + i) * out_width + j, here, 0.0).to(tl.float32)
            weight = tl.load(k + ((a * KERNEL + b) * out_height + i) * out_width + j, here, 0.0).to(tl.float32)
            total += weight * value
    tl.store(dx + e, total.to(dx.dtype.element_ty), e < elements)


@triton.jit
def correlate_one_thread(
    grad, x, dk, elements, groups, in_height, in_width, out_height, out_width, width: tl.constexpr,
    KERNEL: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """An element of the kernel map's gradient a thread: a sum over the channels of a group."""
    e = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    column, row, rest = e % out_width, e // out_width % out_height, e // out_width // out_height
    tap, group = rest % (KERNEL * KERNEL), rest // (KERNEL * KERNEL)
    i, j = row * STRIDE + tap // KERNEL - PADDING, column * STRIDE + tap % KERNEL - PADDING
    here = (e < elements) & (i >= 0) & (i < in_height) & (j >= 0) & (j < in_width)
    grad += (group * width * out_height + row) * out_width + column
    x += (group * width * in_height + i) * in_width + j
    total = tl.zeros([BLOCKS], tl.float32)
    for c in tl.static_range(width):
        value = tl.load(x + c * in_height * in_width, here, 0.0).to(tl.float32)
        total += value * tl.load(grad + c * out_height * out_width, here, 0.0).to(tl.float32)
    tl.store(dk + e, total.to(dk.dtype.element_ty), e < elements)
