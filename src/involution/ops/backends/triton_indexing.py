"""What the GPU kernels of both layouts share: positions, windows, residue classes, and tuples of tensors in registers.

A lane computes COLUMNS neighbouring positions of a row, so that a value of the image is loaded and converted once for
every product that it takes part in. "Steps" count a lane's distinct image columns:

    columns 4, stride 1, kernel 3, dilation 1:   step  0 1 2 3 4 5
                                           column 0    u0 u1 u2
                                           column 1       u0 u1 u2
                                           column 2          u0 u1 u2
                                           column 3             u0 u1 u2
"""

import triton
import triton.language as tl

# Arguments that Triton must not specialise: every image size would compile a kernel of its own, and compilers would
# unroll the loop over rows of taps.
SIZES = ["in_depth", "in_height", "in_width", "out_depth", "out_height", "out_width", "rows"]


@triton.constexpr_function
def ceil_div(number, divisor):
    """number / divisor, rounded up."""
    return -(-number // divisor)


@triton.constexpr_function
def vector(taps):
    """The smallest power of two >= taps: the elements of a row of taps as a tensor."""
    return 1 << (taps - 1).bit_length()


@triton.constexpr_function
def steps(columns, taps, stride, dilation, unit):
    """How many image columns, `unit` apart, `taps` taps of `columns` neighbouring positions reach."""
    return ((columns - 1) * stride + (taps - 1) * dilation) // unit + 1


@triton.constexpr_function
def tap_at(step, column, taps, stride, dilation, unit):
    """The tap with which a column reads this step's image column, or -1."""
    distance = step * unit - column * stride
    tap = distance // dilation
    return tap if distance % dilation == 0 and 0 <= tap < taps else -1


@triton.constexpr_function
def tap_from_last(step, column, taps, back, unit):
    """As tap_at, for adjoint: the next tap reads `back` columns lower, so the first step is the last tap's."""
    distance = step * unit - column
    tap = taps - 1 - distance // back
    return tap if distance % back == 0 and 0 <= tap < taps else -1


@triton.jit
def in_bits(depth, height, width, WIDE: tl.constexpr):
    """Three sizes, in 64 bits if WIDE."""
    if WIDE:
        depth, height, width = depth.to(tl.int64), height.to(tl.int64), width.to(tl.int64)
    return depth, height, width


@triton.jit
def tile(count, BLOCKS: tl.constexpr, WIDE: tl.constexpr):
    """Which of an image's `count` blocks this program computes, and the rest of its number: groups, channels, image."""
    program = tl.program_id(0)
    if WIDE:
        program = program.to(tl.int64)
    tiles = tl.cdiv(count, BLOCKS)
    return program % tiles * BLOCKS + tl.arange(0, BLOCKS), program // tiles


@triton.jit
def block_start(block, height, width, COLUMNS: tl.constexpr, DIMS: tl.constexpr):
    """Depth, height and first column of blocks of COLUMNS neighbouring positions of a row."""
    across = tl.cdiv(width, COLUMNS)
    row = block // across
    if DIMS == 3:
        depth, row = row // height, row % height
    else:
        depth = row * 0
    return depth, row, block % across * COLUMNS


@triton.jit
def within(index, size):
    """Whether 0 <= index < size, in one comparison: as an unsigned number a negative index is larger than any size."""
    unsigned: tl.constexpr = tl.uint64 if index.dtype == tl.int64 else tl.uint32
    return index.to(unsigned, bitcast=True) < size.to(unsigned)


@triton.jit
def inside(depth, height, in_depth, in_height, DIMS: tl.constexpr):
    """Whether a row of an image exists; its depth is checked in 3d only."""
    exists = within(height, in_height)
    if DIMS == 3:
        exists = exists & within(depth, in_depth)
    return exists


@triton.jit
def row_of_taps(r, height_taps, CHUNKS: tl.constexpr, DIMS: tl.constexpr):
    """Depth and height of the r-th row of taps, and the part of it: a row's columns are cut into CHUNKS parts."""
    row = r // CHUNKS
    if DIMS == 3:
        return row // height_taps, row % height_taps, r % CHUNKS
    else:
        return 0, row, r % CHUNKS


@triton.jit
def classes(depth, height, width, STRIDE: tl.constexpr):
    """How many residue classes modulo the stride the positions of each axis have."""
    return tl.minimum(depth, STRIDE[0]), tl.minimum(height, STRIDE[1]), tl.minimum(width, STRIDE[2])


@triton.jit
def residue_class(
    first, KERNEL: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr, STEP: tl.constexpr, BACK: tl.constexpr,
    INVERSE: tl.constexpr,
):  # fmt: skip
    """The taps that reach input positions first, first + STRIDE, ... of one axis, which are the same for all of them.

    Position i meets tap u if i + padding - u * dilation is a multiple of the stride. With e = gcd(stride, dilation),
    those are the taps u0, u0 + STEP, ... for STEP = stride / e, if e divides i + padding; one STEP further the output
    position is BACK = dilation / e lower. INVERSE is that of BACK modulo STEP.

    Returns:
        u0, the number of taps, and the output position that u0 reads for the first input position.
    """
    if STRIDE == 1:
        return first * 0, first * 0 + KERNEL, first + PADDING
    else:
        E: tl.constexpr = STRIDE // STEP
        residue = (first + PADDING) % STRIDE
        tap = residue // E * INVERSE % STEP
        count = tl.where(residue % E == 0, tl.maximum((KERNEL - tap + STEP - 1) // STEP, 0), 0)
        # An exact division: a dividend below 0 is rounded towards 0 or down alike.
        return tap, count, (first + PADDING - tap * (BACK * E)) // STRIDE


@triton.jit
def split(t, COUNT: tl.constexpr):
    """[B, G, COUNT] -> COUNT tensors [B, G], in registers, where indexing would go through memory."""
    if COUNT == 1:
        return (t.reshape(t.shape[0], t.shape[1]),)
    else:
        even, odd = tl.split(t.reshape(t.shape[0], t.shape[1], COUNT // 2, 2))
        return _interleaved(split(even, COUNT // 2), split(odd, COUNT // 2), COUNT // 2)


@triton.jit
def _interleaved(even, odd, COUNT: tl.constexpr):
    """The members of two tuples alternately, as one tuple."""
    both = ()
    for i in tl.static_range(COUNT):
        both += (even[i], odd[i])
    return both


@triton.jit
def join(tensors, FIRST: tl.constexpr, STEP: tl.constexpr, COUNT: tl.constexpr):
    """COUNT tensors [B, G] of a tuple, from FIRST on and STEP apart, -> [B, G, COUNT]."""
    if COUNT == 1:
        t = tensors[FIRST]
        return t.reshape(t.shape[0], t.shape[1], 1)
    else:
        half: tl.constexpr = COUNT // 2
        t = tl.join(join(tensors, FIRST, 2 * STEP, half), join(tensors, FIRST + STEP, 2 * STEP, half))
        return t.reshape(t.shape[0], t.shape[1], COUNT)
