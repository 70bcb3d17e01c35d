"""The GPU kernels, in Triton: one program makes a tile of a result, positions x groups x channels of a group.

Spatial axes are always three, the missing leading ones of size 1. Tensors lie in memory as [N, C, *S] and
[N, G, *K, *O], with CHANNELS_LAST as [N, *S, C] and [N, *O, G, *K]; `_distances` says how many numbers lie between one
image, channel or position and the next. WIDE is for images whose distances leave 32 bits. Sums are float32 (float64 for
float64); every result has one writer, so results are the same in every run. Taps outside the input are skipped.
"""

import triton
import triton.language as tl

# An image's sizes must not make a new program of a kernel; nor must compilers unroll its loop over rows of taps.
_SIZES = ["in_depth", "in_height", "in_width", "out_depth", "out_height", "out_width", "rows"]


@triton.jit
def _tile(
    positions, groups, width,
    POSITIONS: tl.constexpr, GROUPS: tl.constexpr, WIDTH: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Which image, positions, groups and channels of a group this program makes; numbers beyond the end are masked."""
    tiles, blocks = tl.cdiv(positions, POSITIONS), tl.cdiv(width, WIDTH)
    program = tl.program_id(0)
    if WIDE:
        program = program.to(tl.int64)
    p = program % tiles * POSITIONS + tl.arange(0, POSITIONS)
    c = program // tiles % blocks * WIDTH + tl.arange(0, WIDTH)
    rest = program // tiles // blocks
    g = rest % tl.cdiv(groups, GROUPS) * GROUPS + tl.arange(0, GROUPS)
    n = (rest // tl.cdiv(groups, GROUPS)).to(tl.int64)
    return n, p, g, c


@triton.jit
def _axes(depth, height, width, WIDE: tl.constexpr):
    """Three sizes, in as many bits as are needed."""
    if WIDE:
        depth, height, width = depth.to(tl.int64), height.to(tl.int64), width.to(tl.int64)
    return depth, height, width


@triton.jit
def _distances(channels, positions, CHANNELS_LAST: tl.constexpr):
    """Of an image: from it to the next one, and from one channel and position to the next."""
    if CHANNELS_LAST:
        channel, position = 1, channels
    else:
        channel, position = positions, 1
    return channels * positions.to(tl.int64), channel, position


@triton.jit
def _map_distances(groups, taps, positions, CHANNELS_LAST: tl.constexpr):
    """Of a kernel map: from an image to the next, and from one group, tap and position to the next."""
    if CHANNELS_LAST:
        group, tap, position = taps, 1, groups * taps
    else:
        group, tap, position = taps * positions, positions, 1
    return groups * taps * positions.to(tl.int64), group, tap, position


@triton.jit
def _channels(g, c, groups, width):
    """[1, G, C]: the image's channels that these groups and channels of a group are, and which of them there are."""
    return (g[:, None] * width + c[None, :])[None, :, :], ((g[:, None] < groups) & (c[None, :] < width))[None, :, :]


@triton.jit
def _window(o, height, width, STRIDE: tl.constexpr, PADDING: tl.constexpr):
    """The input position of tap (0, 0, 0) at output positions o, for each axis; outside the image too."""
    return (
        o // (height * width) * STRIDE[0] - PADDING[0],
        o // width % height * STRIDE[1] - PADDING[1],
        o % width * STRIDE[2] - PADDING[2],
    )


@triton.jit
def _split8(t):
    """[P, G, 8] -> eight [P, G]: in registers, where indexing would go through memory."""
    even, odd = tl.split(t.reshape(t.shape[0], t.shape[1], 2, 2, 2))
    t04, t26 = tl.split(even)
    t15, t37 = tl.split(odd)
    t0, t4 = tl.split(t04)
    t2, t6 = tl.split(t26)
    t1, t5 = tl.split(t15)
    t3, t7 = tl.split(t37)
    return t0, t1, t2, t3, t4, t5, t6, t7


@triton.jit
def _join8(t):
    """The other way."""
    even = tl.join(tl.join(t[0], t[4]), tl.join(t[2], t[6]))
    odd = tl.join(tl.join(t[1], t[5]), tl.join(t[3], t[7]))
    return tl.join(even, odd).reshape(t[0].shape[0], t[0].shape[1], 8)


@triton.jit(do_not_specialize=_SIZES)
def apply_kernel(
    x, k, y, groups, width: tl.constexpr, in_depth, in_height, in_width, out_depth, out_height, out_width, rows,
    KERNEL: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr, DILATION: tl.constexpr,
    POSITIONS: tl.constexpr, GROUPS: tl.constexpr, WIDTH: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, WIDE: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """y[n, c, o] = sum over u of k[n, g(c), u, o] * x[n, c, o*stride + u*dilation - padding]."""
    in_depth, in_height, in_width = _axes(in_depth, in_height, in_width, WIDE)
    out_depth, out_height, out_width = _axes(out_depth, out_height, out_width, WIDE)
    inputs, outputs = in_depth * in_height * in_width, out_depth * out_height * out_width
    x_image, x_channel, x_position = _distances(groups * width, inputs, CHANNELS_LAST)
    y_image, y_channel, y_position = _distances(groups * width, outputs, CHANNELS_LAST)
    k_image, k_group, k_tap, k_position = _map_distances(
        groups, KERNEL[0] * KERNEL[1] * KERNEL[2], outputs, CHANNELS_LAST
    )
    n, o, g, c = _tile(outputs, groups, width, POSITIONS, GROUPS, WIDTH, WIDE)
    channel, is_channel = _channels(g, c, groups, width)
    is_output = o < outputs
    is_kernel = is_output[:, None, None] & (g < groups)[None, :, None]
    x += n * x_image + channel * x_channel
    k += n * k_image + o[:, None, None] * k_position + g[None, :, None] * k_group
    depth, height, column = _window(o, out_height, out_width, STRIDE, PADDING)
    total = tl.zeros([POSITIONS, GROUPS, WIDTH], tl.float64 if y.dtype.element_ty == tl.float64 else tl.float32)
    for r in range(rows.to(tl.int64) if WIDE else rows):  # of taps, eight of a row at a time
        a, b, first = r // CHUNKS // KERNEL[1], r // CHUNKS % KERNEL[1], r % CHUNKS * 8
        i, j = depth + a * DILATION[0], height + b * DILATION[1]
        is_row = is_output & (i >= 0) & (i < in_depth) & (j >= 0) & (j < in_height)
        row = (i * in_height + j) * in_width + column
        v = first + tl.arange(0, 8)[None, None, :]
        tap = (a * KERNEL[1] + b) * KERNEL[2] + v
        weights = _split8(tl.load(k + tap * k_tap, is_kernel & (v < KERNEL[2]), 0.0))
        for u in tl.static_range(min(8, KERNEL[2])):
            shift = (first + u) * DILATION[2]
            here = is_row & (column + shift >= 0) & (column + shift < in_width) & (first + u < KERNEL[2])
            here = here[:, None, None]
            value = tl.load(x + (row + shift)[:, None, None] * x_position, here & is_channel, 0.0)
            weight = tl.where(here, weights[u][:, :, None].to(total.dtype), 0.0)
            total += weight * value.to(total.dtype)
    y += n * y_image + channel * y_channel + o[:, None, None] * y_position
    tl.store(y, total.to(y.dtype.element_ty), is_output[:, None, None] & is_channel)


@triton.jit(do_not_specialize=_SIZES)
def adjoint_kernel(
    grad, k, dx, groups, width: tl.constexpr, in_depth, in_height, in_width, out_depth, out_height, out_width, rows,
    KERNEL: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr, DILATION: tl.constexpr,
    POSITIONS: tl.constexpr, GROUPS: tl.constexpr, WIDTH: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, WIDE: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """dx[n, c, i] = sum over (u, o) with o*stride + u*dilation - padding = i of k[n, g(c), u, o] * grad[n, c, o]."""
    in_depth, in_height, in_width = _axes(in_depth, in_height, in_width, WIDE)
    out_depth, out_height, out_width = _axes(out_depth, out_height, out_width, WIDE)
    inputs, outputs = in_depth * in_height * in_width, out_depth * out_height * out_width
    x_image, x_channel, x_position = _distances(groups * width, inputs, CHANNELS_LAST)
    y_image, y_channel, y_position = _distances(groups * width, outputs, CHANNELS_LAST)
    k_image, k_group, k_tap, k_position = _map_distances(
        groups, KERNEL[0] * KERNEL[1] * KERNEL[2], outputs, CHANNELS_LAST
    )
    n, i, g, c = _tile(inputs, groups, width, POSITIONS, GROUPS, WIDTH, WIDE)
    channel, is_channel = _channels(g, c, groups, width)
    is_input = i < inputs
    grad += n * y_image + channel * y_channel
    k += n * k_image + g[None, :] * k_group
    depth = i // (in_height * in_width) + PADDING[0]
    height = i // in_width % in_height + PADDING[1]
    column = i % in_width + PADDING[2]
    total = tl.zeros([POSITIONS, GROUPS, WIDTH], tl.float64 if dx.dtype.element_ty == tl.float64 else tl.float32)
    for r in range(rows.to(tl.int64) if WIDE else rows):  # of taps, eight of a row at a time
        a, b, first = r // CHUNKS // KERNEL[1], r // CHUNKS % KERNEL[1], r % CHUNKS * 8
        # Output positions times the stride; what is no multiple, or negative, has no output.
        d, h = depth - a * DILATION[0], height - b * DILATION[1]
        is_row = is_input & (d >= 0) & (d % STRIDE[0] == 0) & (d // STRIDE[0] < out_depth)
        is_row = is_row & (h >= 0) & (h % STRIDE[1] == 0) & (h // STRIDE[1] < out_height)
        row = (d // STRIDE[0] * out_height + h // STRIDE[1]) * out_width
        for u in tl.static_range(min(8, KERNEL[2])):
            w = column - (first + u) * DILATION[2]
            here = is_row & (w >= 0) & (w % STRIDE[2] == 0) & (w // STRIDE[2] < out_width) & (first + u < KERNEL[2])
            o = row + w // STRIDE[2]
            tap = (a * KERNEL[1] + b) * KERNEL[2] + first + u
            weight = tl.load(k + tap * k_tap + o[:, None] * k_position, here[:, None] & (g < groups)[None, :], 0.0)
            value = tl.load(grad + o[:, None, None] * y_position, here[:, None, None] & is_channel, 0.0)
            total += weight[:, :, None].to(total.dtype) * value.to(total.dtype)
    dx += n * x_image + channel * x_channel + i[:, None, None] * x_position
    tl.store(dx, total.to(dx.dtype.element_ty), is_input[:, None, None] & is_channel)


@triton.jit(do_not_specialize=_SIZES)
def correlate_kernel(
    grad, x, dk, groups, width: tl.constexpr, in_depth, in_height, in_width, out_depth, out_height, out_width, rows,
    KERNEL: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr, DILATION: tl.constexpr,
    POSITIONS: tl.constexpr, GROUPS: tl.constexpr, WIDTH: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, WIDE: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """dk[n, g, u, o] = sum over the channels c of group g of grad[n, c, o] * x[n, c, o*stride + u*dilation - padding].

    A tile has all channels of its groups: WIDTH is at least the width.
    """
    in_depth, in_height, in_width = _axes(in_depth, in_height, in_width, WIDE)
    out_depth, out_height, out_width = _axes(out_depth, out_height, out_width, WIDE)
    inputs, outputs = in_depth * in_height * in_width, out_depth * out_height * out_width
    x_image, x_channel, x_position = _distances(groups * width, inputs, CHANNELS_LAST)
    y_image, y_channel, y_position = _distances(groups * width, outputs, CHANNELS_LAST)
    k_image, k_group, k_tap, k_position = _map_distances(
        groups, KERNEL[0] * KERNEL[1] * KERNEL[2], outputs, CHANNELS_LAST
    )
    n, o, g, c = _tile(outputs, groups, width, POSITIONS, GROUPS, WIDTH, WIDE)
    channel, is_channel = _channels(g, c, groups, width)
    is_output = o < outputs
    is_kernel = is_output[:, None, None] & (g < groups)[None, :, None]
    grad += n * y_image + channel * y_channel + o[:, None, None] * y_position
    x += n * x_image + channel * x_channel
    dk += n * k_image + o[:, None, None] * k_position + g[None, :, None] * k_group
    depth, height, column = _window(o, out_height, out_width, STRIDE, PADDING)
    dtype = tl.float64 if dk.dtype.element_ty == tl.float64 else tl.float32
    here = tl.load(grad, is_output[:, None, None] & is_channel, 0.0).to(dtype)
    for r in range(rows.to(tl.int64) if WIDE else rows):  # of taps, eight of a row at a time
        a, b, first = r // CHUNKS // KERNEL[1], r // CHUNKS % KERNEL[1], r % CHUNKS * 8
        i, j = depth + a * DILATION[0], height + b * DILATION[1]
        is_row = is_output & (i >= 0) & (i < in_depth) & (j >= 0) & (j < in_height)
        row = (i * in_height + j) * in_width + column
        totals = ()
        for u in tl.static_range(8):
            if u < KERNEL[2]:
                shift = (first + u) * DILATION[2]
                inside = (is_row & (column + shift >= 0) & (column + shift < in_width))[:, None, None]
                there = tl.load(x + (row + shift)[:, None, None] * x_position, inside & is_channel, 0.0).to(dtype)
                totals += (tl.sum(tl.where(inside, here * there, 0.0), 2),)
            else:
                totals += (tl.zeros([POSITIONS, GROUPS], dtype),)
        v = first + tl.arange(0, 8)[None, None, :]
        tap = (a * KERNEL[1] + b) * KERNEL[2] + v
        tl.store(dk + tap * k_tap, _join8(totals).to(dk.dtype.element_ty), is_kernel & (v < KERNEL[2]))


@triton.jit(do_not_specialize=_SIZES)
def fused_kernel(
    x, hidden, weight, bias, scale, shift, y, groups, width: tl.constexpr,
    in_depth, in_height, in_width, out_depth, out_height, out_width, rows,
    hidden_channels,
    KERNEL: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr, DILATION: tl.constexpr,
    POSITIONS: tl.constexpr, GROUPS: tl.constexpr, WIDTH: tl.constexpr, WIDE: tl.constexpr,
    HIDDEN: tl.constexpr, RELU: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """relu(scale * apply(x, hidden weight^T + bias) + shift): hidden [N, *O, R], weight [G * prod(K), R].

    The kernels of one tap, for a tile's positions and groups, are a matrix product. bias, scale and RELU may be absent.
    HIDDEN is at least R. UPCAST is for Triton's interpreter, which multiplies bfloat16 matrices wrongly.
    """
    in_depth, in_height, in_width = _axes(in_depth, in_height, in_width, WIDE)
    out_depth, out_height, out_width = _axes(out_depth, out_height, out_width, WIDE)
    inputs, outputs = in_depth * in_height * in_width, out_depth * out_height * out_width
    x_image, x_channel, x_position = _distances(groups * width, inputs, True)
    y_image, y_channel, y_position = _distances(groups * width, outputs, True)
    n, o, g, c = _tile(outputs, groups, width, POSITIONS, GROUPS, WIDTH, WIDE)
    channel, is_channel = _channels(g, c, groups, width)
    is_output = o < outputs
    x += n * x_image + channel * x_channel
    depth, height, column = _window(o, out_height, out_width, STRIDE, PADDING)
    f = tl.arange(0, HIDDEN)[None, :]
    position = n * outputs + o[:, None]
    features = tl.load(hidden + position * hidden_channels + f, is_output[:, None] & (f < hidden_channels), 0.0)
    if UPCAST:
        features = features.to(tl.float32)
    total = tl.zeros([POSITIONS, GROUPS, WIDTH], tl.float32)
    for r in range(rows):  # of taps
        a, b = r // KERNEL[1], r % KERNEL[1]
        i, j = depth + a * DILATION[0], height + b * DILATION[1]
        is_row = is_output & (i >= 0) & (i < in_depth) & (j >= 0) & (j < in_height)
        row = (i * in_height + j) * in_width + column
        for u in range(KERNEL[2]):
            span = (g * rows + r) * KERNEL[2] + u
            of_tap = weight + span[:, None] * hidden_channels + f
            matrix = tl.load(of_tap, (g < groups)[:, None] & (f < hidden_channels), 0.0).to(features.dtype)
            kernels = tl.dot(features, tl.trans(matrix), input_precision=PRECISION)
            if bias is not None:
                kernels += tl.load(bias + span, g < groups, 0.0)[None, :].to(tl.float32)
            w = column + u * DILATION[2]
            here = (is_row & (w >= 0) & (w < in_width))[:, None, None]
            value = tl.load(x + (row + u * DILATION[2])[:, None, None] * x_position, here & is_channel, 0.0)
            total += tl.where(here, kernels[:, :, None], 0.0) * value.to(tl.float32)
    if scale is not None:
        factor = tl.load(scale + channel, is_channel, 0.0).to(tl.float32)
        total = total * factor + tl.load(shift + channel, is_channel, 0.0).to(tl.float32)
    if RELU:
        total = tl.where(total < 0.0, 0.0, total)  # NaN stays NaN
    y += n * y_image + channel * y_channel + o[:, None, None] * y_position
    tl.store(y, total.to(y.dtype.element_ty), is_output[:, None, None] & is_channel)
