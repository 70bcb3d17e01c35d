// correlate: dk[n, g, u, o] = sum over the channels c of group g of
//                             dy[n, c, o] * x[n, c, o*stride + u*dilation - padding]
//
// Per output position, this is a matrix-vector product: [taps x channels] of x times [channels] of dy. It is vectorised
// over output positions and reduced over the group's channels, without im2col. A patch of output positions of one group
// is packed (pack.h), so that one vector holds W neighbouring positions of a channel and a tap is an offset into the
// packed x, xp:
//
//     for c:                      channels of the group
//         for u:                  taps
//             sums[u][p : p+W] += dy[c][p : p+W] * xp[c][offset(u)+p : offset(u)+p+W]
//
// dy is packed as [output row][channel][position], x as [packed input row][channel][phase][index]. Output rows that
// read the same packed input row, each through another tap row, are processed together to reuse its loads. The sums are
// written to the kernel map by the reverse of the packing.
//
// A phase is a residue class of input positions modulo the stride (polyphase decomposition). Where neighbouring kernel
// windows overlap, every input row is stored phase by phase, so that the positions that one tap reads are contiguous at
// every stride. With stride 2 and K = 5:
//
//     input row       0  1  2  3  4  5  6  7  8 ...
//     phase 0         0  2  4  6  8 ...        tap 0 reads it from 0 on, tap 2 from 2 on, tap 4 from 4 on
//     phase 1         1  3  5  7 ...           tap 1 reads it from 1 on, tap 3 from 3 on
//
// Where kernel windows do not overlap much (large dilations), the positions of every tap are stored separately, as if
// they were a phase of its own.
#include "pack.h"
#include "parallel.h"

namespace involution {
namespace INVOLUTION_ISA {
namespace {

constexpr Index kMaxChannels = INVOLUTION_MAX_16_BIT_WIDTH;  // block size of the group's channels that are packed
constexpr Index kMaxRows = 7;                                // output rows of a patch
constexpr Index kMaxColumns = 64;                            // output positions of a patch's output row
constexpr Index kMaxTaps = 8;                                // tap rows, and tap columns, of a block of taps
constexpr Index kRowBlock = 4;                               // output rows whose sums are computed together

// How one axis of the input is packed for some output positions and taps.
struct PackedAxis {
  Index origin;  // input position of the first tap at the first output position
  Index stride, dilation, count, taps;
  bool shared;  // phases are residue classes modulo the stride and serve several taps; otherwise each serves one tap

  INVOLUTION_INLINE PackedAxis(const Geometry& g, int axis, Range outputs, Range of_taps)
      : origin(input_at(g, axis, outputs.first, of_taps.first)),
        stride(g.stride[axis]),
        dilation(g.dilation[axis]),
        count(length(outputs)),
        taps(length(of_taps)) {
    shared = true;
    shared = phases() * phase_length() <= count * taps;
  }
  INVOLUTION_INLINE Index phases() const { return shared ? stride : taps; }
  INVOLUTION_INLINE Index phase_length() const {
    return shared ? count + ((taps - 1) * dilation + stride - 1) / stride : count;
  }
  // Where output o of the patch finds the input of tap u, with phases `pitch` apart; output o + 1 finds it at the next
  // index.
  INVOLUTION_INLINE Index packed_at(Index o, Index u, Index pitch) const {
    if (!shared) return u * pitch + o;
    return stride == 1 ? u * dilation + o : u * dilation % stride * pitch + u * dilation / stride + o;
  }
  // The input position at an index of a phase.
  INVOLUTION_INLINE Index position(Index phase, Index index) const {
    return origin + (shared ? phase : phase * dilation) + index * stride;
  }
};

// A patch of output positions of one group. Pointers are at the group's first channel or tap; dy and x at the image's
// first position, dk at the patch's.
template <class S>
struct Patch {
  const S *dy, *x;
  S* dk;
  Steps dy_steps, x_steps, dk_steps;
  Index dk_row;         // elements from one output row to the next in dk
  Index depth;          // output position on the slowest spatial axis
  Range rows, columns;  // output positions on the other two axes
};

// Packed tensors of a patch, and sums of some of its positions: 256 KiB and a little, on a thread's stack.
template <class T>
struct Workspace {
  static constexpr Index kPackedElements = 256 * 1024 / Index(sizeof(T));
  alignas(64) T packed[kPackedElements];
  alignas(64) T sums[kRowBlock * kMaxTaps * kMaxTaps * kLanes<T>];
};

// Operands of the micro-kernels for one packed input row: the output rows that read it, each through another tap row.
template <class T>
struct RowProduct {
  Index rows;
  const T* dy[kRowBlock];  // at their first position
  T* sums[kRowBlock];      // at their tap row
};

// The packed layout that all products of a block of taps share.
struct PackedLayout {
  Index dy_pitch, x_pitch;  // elements from one channel to the next
  Index offset[kMaxTaps];   // of a tap column, in a packed input row
};

// The micro-kernel: sums of Rows output rows times Taps tap columns at W output positions, in registers, over the
// channels. Every packed vector is loaded once per channel, for Rows * Taps multiply-adds. The largest blocks (4 x 7 of
// 32 registers, 4 x 3 of 16) need Rows * Taps + Rows + 1 vectors, one more than there are: GCC keeps one sum on the
// stack, a load and a store per channel.
template <class T, int W, int Rows, int Taps>
INVOLUTION_INLINE void micro_kernel(const T* const* dy, const T* x, const PackedLayout& packed, const Index* offset,
                                    Index channels, T* const* sums) {
  using V = Vector<T, W>;
  V sum[Rows][Taps] = {};
  const T *inputs[Taps], *grads[Rows];
  INVOLUTION_UNROLL
  for (int v = 0; v < Taps; ++v) inputs[v] = x + offset[v];
  INVOLUTION_UNROLL
  for (int i = 0; i < Rows; ++i) grads[i] = dy[i];
  for (Index c = 0; c < channels; ++c) {
    V grad[Rows];
    INVOLUTION_UNROLL
    for (int i = 0; i < Rows; ++i) {
      grad[i] = load<V>(grads[i] + c * packed.dy_pitch);
      pin_in_register(grad[i]);
    }
    INVOLUTION_UNROLL
    for (int v = 0; v < Taps; ++v) {
      V in = load<V>(inputs[v] + c * packed.x_pitch);
      pin_in_register(in);
      INVOLUTION_UNROLL
      for (int i = 0; i < Rows; ++i) sum[i][v] += grad[i] * in;
    }
  }
  INVOLUTION_UNROLL
  for (int i = 0; i < Rows; ++i) {
    INVOLUTION_UNROLL
    for (int v = 0; v < Taps; ++v) store(sums[i] + v * W, sum[i][v]);
  }
}

// Taps tap columns, for any number of output rows, in blocks of as many rows as registers hold sums of.
template <class T, int W, int Taps>
INVOLUTION_INLINE void multiply_rows(const RowProduct<T>& product, const T* x, const PackedLayout& packed,
                                     const Index* offset, Index channels) {
  constexpr Index row_block = min(kRowBlock, (kRegisters - 4) / Taps);
  const T* const* dy = product.dy;
  T* const* sums = product.sums;
  for (Index rows = product.rows; rows > 0; rows -= row_block, dy += row_block, sums += row_block) {
    const auto multiply = [&](auto count) INVOLUTION_BODY {
      micro_kernel<T, W, int(min(decltype(count)::value, row_block)), Taps>(dy, x, packed, offset, channels, sums);
    };
    if (rows >= 4 && row_block >= 4) multiply(std::integral_constant<Index, 4>{});
    else if (rows >= 3 && row_block >= 3) multiply(std::integral_constant<Index, 3>{});
    else if (rows >= 2 && row_block >= 2) multiply(std::integral_constant<Index, 2>{});
    else multiply(std::integral_constant<Index, 1>{});
  }
}

// All tap columns, at W output positions from x's on. Moves the product's sums to the end of their tap row.
template <class T, int W>
void multiply_row(RowProduct<T>& product, const T* x, const PackedLayout& packed, Index taps, Index channels) {
  const Index* offset = packed.offset;
  const auto multiply = [&](auto count) INVOLUTION_BODY {
    constexpr int tap_block = decltype(count)::value;
    for (; taps >= tap_block; taps -= tap_block, offset += tap_block) {
      multiply_rows<T, W, tap_block>(product, x, packed, offset, channels);
      for (Index i = 0; i < product.rows; ++i) product.sums[i] += tap_block * W;
    }
  };
  multiply(std::integral_constant<int, 7>{});
  multiply(std::integral_constant<int, 5>{});
  multiply(std::integral_constant<int, 3>{});
  multiply(std::integral_constant<int, 1>{});
}

// 0, 1, 2 ... in the lanes of a vector.
template <class V, int... Lane>
INVOLUTION_INLINE V lane_indices(std::integer_sequence<int, Lane...>) {
  return V{Lane...};
}

// A block of a patch's taps: tap rows [b.first, b.end) and tap columns [v.first, v.end), at tap a of the slowest axis.
template <class S>
struct TapBlock {
  using T = Compute<S>;
  static constexpr int W = kLanes<T>;
  const Geometry& g;
  const Patch<S>& patch;
  Index a;
  Range b, v;
  PackedAxis vertical, horizontal;
  PackedLayout packed;
  Index phase_length;                       // of the fast axis, padded
  Index packed_rows;                        // packed input rows
  Index heights[kMaxRows * kMaxTaps];       // the input row in each packed input row, or -1: outside the input
  Index packed_row_of[kMaxRows][kMaxTaps];  // that output row i reads through tap row u
  Range rows_of_tap[kMaxTaps], columns_of_tap[kMaxTaps];  // output positions whose tap is inside the input
  Range columns_of_all;                                   // ... and at which all tap columns are

  TapBlock(const Geometry& g, const Patch<S>& patch, Index a, Range b, Range v)
      : g(g), patch(patch), a(a), b(b), v(v), vertical(g, 1, patch.rows, b), horizontal(g, 2, patch.columns, v) {
    phase_length = ceil_divide(horizontal.phase_length(), W) * W + W;  // a load may start at any index: one vector more
    packed.x_pitch = phase_length * horizontal.phases();
    packed.dy_pitch = ceil_divide(horizontal.count, W) * W + W;
    for (Index u = 0; u < horizontal.taps; ++u) packed.offset[u] = horizontal.packed_at(0, u, phase_length);
    packed_rows = 0;
    for (Index phase = 0; phase < vertical.phases(); ++phase) {
      for (Index i = 0; i < vertical.phase_length(); ++i) {
        const Index height = vertical.position(phase, i);
        heights[packed_rows++] = within(height, g.input[1]) ? height : -1;
      }
    }
    for (Index i = 0; i < vertical.count; ++i) {
      for (Index u = 0; u < vertical.taps; ++u) packed_row_of[i][u] = vertical.packed_at(i, u, vertical.phase_length());
    }
    for (Index u = 0; u < vertical.taps; ++u) rows_of_tap[u] = outputs_of_tap(g, 1, b.first + u);
    columns_of_all = {0, g.output[2]};
    for (Index u = 0; u < horizontal.taps; ++u) {
      columns_of_tap[u] = outputs_of_tap(g, 2, v.first + u);
      columns_of_all = intersection(columns_of_all, columns_of_tap[u]);
    }
  }

  // The packed elements of this many channels.
  Index elements(Index channels) const {
    return channels * (packed_rows * packed.x_pitch + vertical.count * packed.dy_pitch);
  }

  // Packs `channels` channels from c on, and writes their sums to the kernel map; from the second call on, adds them.
  void run(Index c, Index channels, Workspace<T>& workspace) const {
    T* x = workspace.packed;
    T* dy = x + packed_rows * channels * packed.x_pitch;
    pack(c, channels, x, dy);
    for (Index i = 0; i < vertical.count; i += kRowBlock) {
      const Range rows = {i, min(vertical.count, i + kRowBlock)};
      for (Index first = 0; first < horizontal.count;) {
        const bool few = W > 4 && horizontal.count - first <= W / 2;
        if (few) sum_positions<W / 2>(rows, first, x, dy, channels, c > 0, workspace.sums);
        else sum_positions<W>(rows, first, x, dy, channels, c > 0, workspace.sums);
        first += few ? W / 2 : W;
      }
    }
  }

  void pack(Index c, Index channels, T* x, T* dy) const {
    const Index depth = input_at(g, 0, patch.depth, a);
    for (Index r = 0; r < packed_rows; ++r, x += channels * packed.x_pitch) {
      if (heights[r] < 0) continue;
      const Index position = (depth * g.input[1] + heights[r]) * g.input[2];
      const S* row = patch.x + position * patch.x_steps.position + c * patch.x_steps.channel;
      for (Index phase = 0; phase < horizontal.phases(); ++phase) {
        pack_row<S, W>(row, patch.x_steps, horizontal.position(phase, 0), horizontal.stride, g.input[2],
                       horizontal.phase_length(), channels, x + phase * phase_length, packed.x_pitch);
      }
    }
    for (Index i = 0; i < vertical.count; ++i, dy += channels * packed.dy_pitch) {
      const Index position = (patch.depth * g.output[1] + patch.rows.first + i) * g.output[2];
      const S* row = patch.dy + position * patch.dy_steps.position + c * patch.dy_steps.channel;
      pack_row<S, W>(row, patch.dy_steps, patch.columns.first, 1, g.output[2], horizontal.count, channels, dy,
                     packed.dy_pitch);
    }
  }

  // All taps of the block for at most kRowBlock output rows at positions [first, first + L). The output rows that
  // read the same packed input row, each through another tap row, are multiplied with it together.
  template <int L>
  void sum_positions(Range rows, Index first, const T* x, const T* dy, Index channels, bool add, T* sums) const {
    const Index taps = horizontal.taps, sums_of_row = vertical.taps * taps * L;
    RowProduct<T> products[kMaxRows * kMaxTaps];  // one for each packed input row
    for (Index r = 0; r < packed_rows; ++r) products[r].rows = 0;
    for (Index i = rows.first; i < rows.end; ++i) {
      for (Index u = 0; u < vertical.taps; ++u) {
        RowProduct<T>& product = products[packed_row_of[i][u]];
        product.dy[product.rows] = dy + i * channels * packed.dy_pitch + first;
        product.sums[product.rows++] = sums + (i - rows.first) * sums_of_row + u * taps * L;
      }
    }
    for (Index r = 0; r < packed_rows; ++r) {
      // Rows outside the input are not packed and their sums not computed: clear_outside sets those to zero.
      if (products[r].rows == 0 || heights[r] < 0) continue;
      multiply_row<T, L>(products[r], x + r * channels * packed.x_pitch + first, packed, taps, channels);
    }
    const Index count = min(L, horizontal.count - first);
    for (Index i = rows.first; i < rows.end; ++i, sums += sums_of_row) {
      clear_outside<L>(patch.rows.first + i, patch.columns.first + first, sums);
      write_row<L>(i, first, count, add, sums);
    }
  }

  // Writes the sums of one output row to the kernel map, where tap rows are contiguous if the block has all tap
  // columns.
  template <int L>
  void write_row(Index i, Index first, Index count, bool add, const T* sums) const {
    S* dk = patch.dk + i * patch.dk_row + first * patch.dk_steps.position;
    const bool contiguous = horizontal.taps == g.kernel[2];
    const Index parts = contiguous ? 1 : vertical.taps, taps = (contiguous ? vertical.taps : 1) * horizontal.taps;
    for (Index u = 0; u < parts; ++u) {
      const Index tap = (a * g.kernel[1] + b.first + u) * g.kernel[2] + v.first;
      unpack_sums<S, L>(sums + u * taps * L, taps, count, add, dk + tap * patch.dk_steps.channel, patch.dk_steps);
    }
  }

  // Sets the sums of taps outside the input to zero: there, the product of a zero and an infinite gradient is NaN.
  template <int L>
  void clear_outside(Index row, Index column, T* sums) const {
    using Integer = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
    const auto lane = lane_indices<Vector<Integer, L>>(std::make_integer_sequence<int, L>{});
    const bool all_columns = columns_of_all.first <= column && column + L <= columns_of_all.end;
    for (Index u = 0; u < vertical.taps; ++u, sums += horizontal.taps * L) {
      const bool inside = row >= rows_of_tap[u].first && row < rows_of_tap[u].end;
      if (inside && all_columns) continue;
      for (Index w = 0; w < horizontal.taps; ++w) {
        const Range columns = inside ? columns_of_tap[w] : Range{0, 0};
        const Integer first(min(L, max(0, columns.first - column))), end(min(L, max(0, columns.end - column)));
        const Vector<T, L> all = load<Vector<T, L>>(sums + w * L);
        store(sums + w * L, ((lane >= first) & (lane < end)) ? all : Vector<T, L>{});
      }
    }
  }

  // Zeros for a block whose taps are all outside the input.
  void clear(Workspace<T>& workspace) const {
    for (T& sum : workspace.sums) sum = 0;
    for (Index i = 0; i < vertical.count; ++i) {
      for (Index first = 0; first < horizontal.count; first += W) {
        write_row<W>(i, first, min(W, horizontal.count - first), false, workspace.sums);
      }
    }
  }
};

// All taps of a patch, in blocks.
template <class S>
void correlate_patch(const Geometry& g, const Patch<S>& patch) {
  Workspace<Compute<S>> workspace;
  const Index group_channels = g.channels / g.groups;
  for (Index a = 0; a < g.kernel[0]; ++a) {
    const bool inside = within(input_at(g, 0, patch.depth, a), g.input[0]);
    for (Index b = 0; b < g.kernel[1]; b += kMaxTaps) {
      for (Index v = 0; v < g.kernel[2]; v += kMaxTaps) {
        const TapBlock<S> block(g, patch, a, {b, min(g.kernel[1], b + kMaxTaps)}, {v, min(g.kernel[2], v + kMaxTaps)});
        if (!inside) block.clear(workspace);
        for (Index c = 0; inside && c < group_channels; c += kMaxChannels) {
          block.run(c, min(kMaxChannels, group_channels - c), workspace);
        }
      }
    }
  }
}

// How many parts an output's rows and columns are cut into, so that what a patch packs fits the workspace.
template <class S>
struct PatchGrid {
  // The loop below ends: the smallest patch that it comes to, one output row of at most W + 1 positions, fits. Per
  // channel that packs at most kMaxTaps input rows, each of at most kMaxTaps phases (PackedAxis), and one row of dy;
  // W + 1 positions are padded to 3 W.
  static constexpr Index kSmallestPatch = (kMaxTaps * kMaxTaps + 1) * 3 * kLanes<Compute<S>> * kMaxChannels;
  static_assert(kSmallestPatch <= Workspace<Compute<S>>::kPackedElements, "the smallest patch must fit the workspace");

  Index row_tiles, column_tiles;

  explicit PatchGrid(const Geometry& g) {
    row_tiles = ceil_divide(g.output[1], kMaxRows);
    column_tiles = ceil_divide(g.output[2], kMaxColumns);
    while (!fits(g)) {
      const bool many_rows = ceil_divide(g.output[1], row_tiles) > kRowBlock;
      const bool one_vector = g.output[2] / column_tiles <= kLanes<Compute<S>>;
      if (many_rows || one_vector) row_tiles = min(g.output[1], 2 * row_tiles);
      else column_tiles *= 2;
    }
  }

  // Tiles of an axis have one size or one position less, and the last block of taps may be smaller than the others. The
  // packed size is not monotonic in these (the layout may change), so all combinations are tested.
  bool fits(const Geometry& g) const {
    const Index channels = min(kMaxChannels, g.channels / g.groups);
    const auto last_block = [&](int axis) { return g.kernel[axis] > kMaxTaps ? g.kernel[axis] % kMaxTaps : 0; };
    const auto taps = [&](int axis, bool last) {
      return Range{0, last ? last_block(axis) : min(g.kernel[axis], kMaxTaps)};
    };
    const bool uneven[4] = {g.output[1] % row_tiles != 0, g.output[2] % column_tiles != 0, last_block(1) > 0,
                            last_block(2) > 0};
    for (Index i = 0; i < 16; ++i) {
      const bool smaller[4] = {bool(i & 1), bool(i & 2), bool(i & 4), bool(i & 8)};
      bool exists = true;
      for (int j = 0; j < 4; ++j) exists = exists && (uneven[j] || !smaller[j]);
      if (!exists) continue;
      Patch<S> patch{};
      patch.rows = {0, ceil_divide(g.output[1], row_tiles) - smaller[0]};
      patch.columns = {0, ceil_divide(g.output[2], column_tiles) - smaller[1]};
      const TapBlock<S> block(g, patch, 0, taps(1, smaller[2]), taps(2, smaller[3]));
      if (block.elements(channels) > Workspace<Compute<S>>::kPackedElements) return false;
    }
    return true;
  }
};

// The patch of one item; an image's groups are consecutive items. 16-bit tensors must be channels last (involution.h):
// the packing functions compile no other case for them.
template <class S>
Patch<S> patch_of_item(const Geometry& g, const PatchGrid<S>& grid, Index i, const S* dy, const S* x, S* dk) {
  const Index group_channels = g.channels / g.groups, taps = volume(g.kernel);
  const Index inputs = volume(g.input), outputs = volume(g.output);
  const Index group = i % g.groups, item = i / g.groups, n = item / grid.column_tiles / grid.row_tiles / g.output[0];
  Patch<S> patch;
  patch.depth = item / grid.column_tiles / grid.row_tiles % g.output[0];
  patch.rows = part(item / grid.column_tiles % grid.row_tiles, grid.row_tiles, g.output[1]);
  patch.columns = part(item % grid.column_tiles, grid.column_tiles, g.output[2]);
  const Index position = (patch.depth * g.output[1] + patch.rows.first) * g.output[2] + patch.columns.first;
  if (g.channels_last) {
    patch.dy_steps = patch.x_steps = {g.channels, 1};
    patch.dk_steps = {g.groups * taps, 1};
    patch.dy = dy + n * outputs * g.channels + group * group_channels;
    patch.x = x + n * inputs * g.channels + group * group_channels;
    patch.dk = dk + (n * outputs + position) * g.groups * taps + group * taps;
  } else {
    patch.dy_steps = {1, outputs};
    patch.x_steps = {1, inputs};
    patch.dk_steps = {1, outputs};
    patch.dy = dy + (n * g.groups + group) * group_channels * outputs;
    patch.x = x + (n * g.groups + group) * group_channels * inputs;
    patch.dk = dk + (n * g.groups + group) * taps * outputs + position;
  }
  patch.dk_row = g.output[2] * patch.dk_steps.position;
  return patch;
}

}  // namespace

template <class S>
void correlate(const Geometry& g, const S* dy, const S* x, S* dk) {
  const PatchGrid<S> grid(g);
  parallel_for(worthwhile_threads(g), g.batch * g.output[0] * grid.row_tiles * grid.column_tiles * g.groups,
               [&](Index i) { correlate_patch(g, patch_of_item(g, grid, i, dy, x, dk)); });
}

template void correlate(const Geometry&, const float*, const float*, float*);
template void correlate(const Geometry&, const double*, const double*, double*);
template void correlate(const Geometry&, const Half*, const Half*, Half*);
template void correlate(const Geometry&, const BFloat16*, const BFloat16*, BFloat16*);

}  // namespace INVOLUTION_ISA
}  // namespace involution
