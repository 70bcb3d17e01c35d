// correlate: dk[n, g, u, o] = sum over the channels c of group g of g[n, c, o] * x[n, c, o*stride + u*dilation - padding]
//
// A patch of output positions of one group at a time. The patch's gradients and the inputs that it reads are packed as
// [channel][position], so that one vector holds W positions of a channel, whatever the layout (channels last only, for
// 16-bit numbers), the stride and the dilation: for a tap, all of them multiply inputs that lie in a row. The sums come out as [tap][position] and go to the
// kernel map through a transposition.
#include "geometry.h"

namespace involution {
namespace INVOLUTION_ISA {
namespace {

// The distances of a tensor: from one position to the next in a row, and from one channel (or tap) to the next.
struct Steps {
  Index position, channel;
};

// One axis of the input as a patch reads it: output positions [first, first + count), taps [tap, tap + taps). Where they
// lie dense, neighbouring windows share what is packed, position by position; else every tap has positions of its own.
struct Reads {
  Index origin;  // input position of the first tap at the first output position
  Index stride, dilation, count, taps;
  bool dense;

  INVOLUTION_INLINE Reads(const Geometry& g, int axis, Range outputs, Range of_taps)
      : origin(outputs.first * g.stride[axis] + of_taps.first * g.dilation[axis] - g.padding[axis]),
        stride(g.stride[axis]), dilation(g.dilation[axis]), count(outputs.end - outputs.first),
        taps(of_taps.end - of_taps.first) {
    dense = true;
    dense = phases() * phase_length() <= count * taps;
  }
  // How many phases there are (dense inputs are packed by their remainder modulo the stride), and how long one is.
  INVOLUTION_INLINE Index phases() const { return dense ? stride : taps; }
  INVOLUTION_INLINE Index phase_length() const {
    return dense ? count + ((taps - 1) * dilation + stride - 1) / stride : count;
  }
  // Where output o of the patch finds the input of tap u; from o to o + 1 it is one further.
  INVOLUTION_INLINE Index packed(Index o, Index u, Index pitch) const {
    if (!dense) return u * pitch + o;
    return stride == 1 ? u * dilation + o : u * dilation % stride * pitch + u * dilation / stride + o;
  }
  // The input position that lies at `index` of a phase.
  INVOLUTION_INLINE Index position(Index phase, Index index) const {
    return dense ? origin + phase + index * stride : origin + phase * dilation + index * stride;
  }
};

template <class V, int W, int Block, int... Lane>
INVOLUTION_INLINE void exchange(V& a, V& b, std::integer_sequence<int, Lane...>) {
  const V low = __builtin_shufflevector(a, b, (Lane & Block ? W + Lane - Block : Lane)...);
  b = __builtin_shufflevector(a, b, (Lane & Block ? W + Lane : Lane + Block)...);
  a = low;
}

// Rows become columns: v[i][j] = v[j][i].
template <class T, int W, int Block = 1>
INVOLUTION_INLINE void transpose(Vector<T, W>* v) {
  if constexpr (Block < W) {
    unroll<W>([&](auto i) INVOLUTION_BODY {
      if constexpr (!(i.value & Block)) {
        exchange<Vector<T, W>, W, Block>(v[i], v[i + Block], std::make_integer_sequence<int, W>{});
      }
    });
    transpose<T, W, 2 * Block>(v);
  }
}

// Packs `count` positions, every `stride`-th from `first` on, of one row of `width` positions: to[channel * pitch + i].
// Positions outside the row are zeros.
template <class S, int W>
__attribute__((noinline)) void pack_row(const S* row, Steps steps, Index first, Index stride, Index width, Index count,
                                        Index channels, Number<S>* to, Index pitch) {
  using T = Number<S>;
  if constexpr (!kIs16Bit<S>) {
    if (steps.channel != 1) {  // [channel][position] already
      for (Index c = 0; c < channels; ++c) {
        for (Index i = 0; i < count; ++i) {
          const Index at = first + i * stride;
          to[c * pitch + i] = within(at, width) ? row[c * steps.channel + at * steps.position] : T(0);
        }
      }
      return;
    }
  }
  Index c = 0;
  for (; c + W <= channels; c += W) {
    for (Index block = 0; block < count; block += W) {
      Vector<T, W> v[W];
      const Index start = first + block * stride;
      const S* from = row + start * steps.position + c;
      const bool inside = start >= 0 && start + (W - 1) * stride < width;
      unroll<W>([&](auto i) INVOLUTION_BODY {
        const bool there = inside || within(start + i * stride, width);
        v[i] = there ? load<Vector<T, W>>(from) : Vector<T, W>{};
        __builtin_prefetch(from + channels);  // the next group is next
        from += stride * steps.position;
        hide(from);
      });
      transpose<T, W>(v);
      T* channel = to + c * pitch + block;
      unroll<W>([&](auto i) INVOLUTION_BODY {
        store(channel, v[i]);
        channel += pitch;
        hide(channel);
      });
    }
  }
  if constexpr (W > 1) {
    if (c < channels) {
      pack_row<S, W / 2>(row + c, steps, first, stride, width, count, channels - c, to + c * pitch, pitch);
    }
  }
}

// What lies at a patch's place, for one group: pointers at the group's first channel or tap, and at the image's (or the
// patch's) first position.
template <class S>
struct Patch {
  const S *grad, *x;
  S* dk;
  Steps grad_steps, x_steps, dk_steps;
  Index dk_row;         // numbers from one output row to the next in dk
  Index depth;          // output position on the slowest axis
  Range rows, columns;  // output positions on the others
};

constexpr Index kChannels = INVOLUTION_MOST_16_BIT_WIDTH;  // packed at a time
constexpr Index kRows = 7;        // most output rows of a patch
constexpr Index kColumns = 64;    // most output positions of its rows
constexpr Index kTaps = 8;        // most rows and columns of taps at a time

// Sums for Rows output rows and V taps in a row that read the same input row, at W output positions.
template <class T, int W, int Rows, int V>
INVOLUTION_INLINE void correlate_taps(const T* const* grad, Index grad_pitch, const T* x, const Index* offset,
                                      Index x_pitch, Index channels, T* const* sums) {
  using Vec = Vector<T, W>;
  Vec sum[Rows][V] = {};
  const T* from[V];
  const T* g[Rows];
  unroll<V>([&](auto v) INVOLUTION_BODY { from[v] = x + offset[v]; });
  unroll<Rows>([&](auto i) INVOLUTION_BODY { g[i] = grad[i]; });
  for (Index c = 0; c < channels; ++c) {
    Vec here[Rows];
    unroll<Rows>([&](auto i) INVOLUTION_BODY {
      here[i] = load<Vec>(g[i] + c * grad_pitch);
      keep(here[i]);
    });
    unroll<V>([&](auto v) INVOLUTION_BODY {
      Vec there = load<Vec>(from[v] + c * x_pitch);
      keep(there);
      unroll<Rows>([&](auto i) INVOLUTION_BODY { sum[i][v] += here[i] * there; });
    });
  }
  unroll<Rows>([&](auto i) INVOLUTION_BODY {
    unroll<V>([&](auto v) INVOLUTION_BODY { store(sums[i] + v * W, sum[i][v]); });
  });
}

// The same for any number of rows and taps, as many at a time as registers hold.
template <class T, int W, int V>
INVOLUTION_INLINE void correlate_rows(const T* const* grad, Index rows, Index grad_pitch, const T* x,
                                      const Index* offset, Index x_pitch, Index channels, T* const* sums) {
  constexpr Index most_rows = least(4, (kRegisters - 4) / V);
  for (; rows > 0; rows -= most_rows, grad += most_rows, sums += most_rows) {
    const auto run = [&](auto n) INVOLUTION_BODY {
      correlate_taps<T, W, decltype(n)::value, V>(grad, grad_pitch, x, offset, x_pitch, channels, sums);
    };
    if (rows >= 4 && most_rows == 4) run(Constant<most_rows == 4 ? 4 : 1>{});
    else if (rows >= 3 && most_rows >= 3) run(Constant<most_rows >= 3 ? 3 : 1>{});
    else if (rows >= 2 && most_rows >= 2) run(Constant<most_rows >= 2 ? 2 : 1>{});
    else run(Constant<1>{});
  }
}

template <class T, int W>
void correlate_row(const T* const* grad, Index rows, Index grad_pitch, const T* x, const Index* offset, Index taps,
                   Index x_pitch, Index channels, T** sums) {
  const auto run = [&](auto v) INVOLUTION_BODY {
    constexpr int count = decltype(v)::value;
    for (; taps >= count; taps -= count, offset += count) {
      correlate_rows<T, W, count>(grad, rows, grad_pitch, x, offset, x_pitch, channels, sums);
      for (Index i = 0; i < rows; ++i) sums[i] += count * W;
    }
  };
  run(Constant<7>{});
  run(Constant<5>{});
  run(Constant<3>{});
  run(Constant<1>{});
}

// Writes [tap][position] sums to `count` positions of the kernel map, or adds them to what is there.
template <class S, int W, int Lanes>
void put(const Number<S>* sums, Index taps, Index count, bool add, S* dk, Steps steps) {
  using T = Number<S>;
  if constexpr (!kIs16Bit<S>) {
    if (steps.channel != 1) {
      for (Index u = 0; u < taps; ++u) {
        T* to = dk + u * steps.channel;
        for (Index t = 0; t < count; ++t) to[t] = add ? to[t] + sums[u * W + t] : sums[u * W + t];
      }
      return;
    }
  }
  Index u = 0;
  for (; u + Lanes <= taps; u += Lanes) {
    for (Index lane = 0; lane < count; lane += Lanes) {
      Vector<T, Lanes> v[Lanes];
      const T* from = sums + u * W + lane;
      hide(from);
      unroll<Lanes>([&](auto i) INVOLUTION_BODY { v[i] = load<Vector<T, Lanes>>(from + i * W); });
      transpose<T, Lanes>(v);
      S* to = dk + lane * steps.position + u;
      unroll<Lanes>([&](auto i) INVOLUTION_BODY {
        __builtin_prefetch(to + taps, 1);
        if (lane + i < count) store(to, add ? load<Vector<T, Lanes>>(to) + v[i] : v[i]);
        to += steps.position;
        hide(to);
      });
    }
  }
  if constexpr (Lanes > 1) {
    if (u < taps) put<S, W, Lanes / 2>(sums + u * W, taps - u, count, add, dk + u, steps);
  }
}

// Room for one patch's packed tensors and for the sums of some of its positions; a thread's stack holds it.
template <class T>
struct Room {
  static constexpr Index kNumbers = 256 * 1024 / Index(sizeof(T));
  alignas(64) T packed[kNumbers];
  alignas(64) T sums[4 * kTaps * kTaps * kLanes<T>];
};

// A block of a patch's taps: rows [b.first, b.end) and columns [v.first, v.end) of the kernel, at its slowest tap a.
template <class S>
struct Block {
  using T = Number<S>;
  static constexpr int W = kLanes<T>;
  const Geometry& g;
  const Patch<S>& patch;
  Index a;
  Range b, v;
  Reads down, across;
  Index length, x_pitch, grad_pitch;  // numbers of a packed phase, of all phases, and of a row of gradients
  Index packed_rows;
  Index heights[kRows * kTaps];                        // the input row in each packed row, or -1: outside
  Range rows_of_tap[kTaps], columns_of_tap[kTaps];     // output positions whose tap is inside
  Range columns_of_all;                                // ... and whose taps all are

  Block(const Geometry& g, const Patch<S>& patch, Index a, Range b, Range v)
      : g(g), patch(patch), a(a), b(b), v(v), down(g, 1, patch.rows, b), across(g, 2, patch.columns, v) {
    length = ceil_divide(across.phase_length(), W) * W + W;  // the last vector may start anywhere
    x_pitch = length * across.phases();
    grad_pitch = ceil_divide(across.count, W) * W + W;
    packed_rows = 0;
    for (Index phase = 0; phase < down.phases(); ++phase) {
      for (Index i = 0; i < down.phase_length(); ++i) {
        const Index height = down.position(phase, i);
        heights[packed_rows++] = within(height, g.input[1]) ? height : -1;
      }
    }
    for (Index u = 0; u < down.taps; ++u) rows_of_tap[u] = outputs_of_tap(g, 1, b.first + u);
    columns_of_all = {0, g.output[2]};
    for (Index u = 0; u < across.taps; ++u) {
      const Range columns = columns_of_tap[u] = outputs_of_tap(g, 2, v.first + u);
      columns_of_all = {most(columns_of_all.first, columns.first), least(columns_of_all.end, columns.end)};
    }
  }

  Index numbers(Index channels) const { return channels * (packed_rows * x_pitch + down.count * grad_pitch); }

  // Packs `channels` channels from c on, and puts or adds their sums.
  void run(Index c, Index channels, Room<T>& room) const {
    T* x = room.packed;
    T* grad = x + packed_rows * channels * x_pitch;
    pack(c, channels, x, grad);
    Index offset[kTaps], at[kRows][kTaps];
    for (Index u = 0; u < across.taps; ++u) offset[u] = across.packed(0, u, length);
    for (Index i = 0; i < down.count; ++i) {
      for (Index u = 0; u < down.taps; ++u) at[i][u] = down.packed(i, u, down.phase_length());
    }
    for (Index i = 0; i < down.count; i += 4) {
      const Range rows = {i, least(down.count, i + 4)};
      for (Index first = 0; first < across.count;) {
        const bool few = W > 4 && across.count - first <= W / 2;
        if (few) positions<W / 2>(rows, first, at, offset, x, grad, channels, c > 0, room.sums);
        else positions<W>(rows, first, at, offset, x, grad, channels, c > 0, room.sums);
        first += few ? W / 2 : W;
      }
    }
  }

  void pack(Index c, Index channels, T* x, T* grad) const {
    const Index depth = patch.depth * g.stride[0] + a * g.dilation[0] - g.padding[0];
    for (Index r = 0; r < packed_rows; ++r, x += channels * x_pitch) {
      if (heights[r] < 0) continue;
      const Index position = (depth * g.input[1] + heights[r]) * g.input[2];
      const S* row = patch.x + position * patch.x_steps.position + c * patch.x_steps.channel;
      for (Index phase = 0; phase < across.phases(); ++phase) {
        pack_row<S, W>(row, patch.x_steps, across.position(phase, 0), across.stride, g.input[2], across.phase_length(),
                       channels, x + phase * length, x_pitch);
      }
    }
    for (Index i = 0; i < down.count; ++i, grad += channels * grad_pitch) {
      const Index position = (patch.depth * g.output[1] + patch.rows.first + i) * g.output[2];
      const S* row = patch.grad + position * patch.grad_steps.position + c * patch.grad_steps.channel;
      pack_row<S, W>(row, patch.grad_steps, patch.columns.first, 1, g.output[2], across.count, channels, grad,
                     grad_pitch);
    }
  }

  // The sums of at most 4 rows at positions [first, first + L) of the patch, for all taps of the block.
  template <int L>
  void positions(Range rows, Index first, const Index (*at)[kTaps], const Index* offset, const T* x, const T* grad,
                 Index channels, bool add, T* sums) const {
    const Index taps = across.taps, each = down.taps * taps * L;
    // Every packed input row serves the output rows and taps that meet in it, together.
    struct {
      Index count;
      const T* grad[4];
      T* sums[4];
    } meetings[kRows * kTaps];
    for (Index r = 0; r < packed_rows; ++r) meetings[r].count = 0;
    for (Index i = rows.first; i < rows.end; ++i) {
      for (Index u = 0; u < down.taps; ++u) {
        auto& meeting = meetings[at[i][u]];
        meeting.grad[meeting.count] = grad + i * channels * grad_pitch + first;
        meeting.sums[meeting.count++] = sums + (i - rows.first) * each + u * taps * L;
      }
    }
    for (Index r = 0; r < packed_rows; ++r) {
      auto& meeting = meetings[r];
      if (meeting.count == 0 || heights[r] < 0) continue;
      correlate_row<T, L>(meeting.grad, meeting.count, grad_pitch, x + r * channels * x_pitch + first, offset, taps,
                          x_pitch, channels, meeting.sums);
    }
    const Index count = least(L, across.count - first);
    for (Index i = rows.first; i < rows.end; ++i, sums += each) {
      clear_outside<L>(patch.rows.first + i, patch.columns.first + first, sums);
      put_row<L>(i, first, count, add, sums);
    }
  }

  // Writes a row's sums to the kernel map; rows of taps lie in a row there if the block has all columns.
  template <int L>
  void put_row(Index i, Index first, Index count, bool add, const T* sums) const {
    S* dk = patch.dk + i * patch.dk_row + first * patch.dk_steps.position;
    const bool whole = across.taps == g.kernel[2];
    const Index parts = whole ? 1 : down.taps, taps = (whole ? down.taps : 1) * across.taps;
    for (Index u = 0; u < parts; ++u) {
      const Index tap = (a * g.kernel[1] + b.first + u) * g.kernel[2] + v.first;
      put<S, L, L>(sums + u * taps * L, taps, count, add, dk + tap * patch.dk_steps.channel, patch.dk_steps);
    }
  }

  // Taps outside the input are zero, whatever the gradient is.
  template <int L>
  void clear_outside(Index row, Index column, T* sums) const {
    using Integer = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
    Vector<Integer, L> lane;
    unroll<L>([&](auto i) INVOLUTION_BODY { lane[i.value] = i.value; });
    const bool all_columns = columns_of_all.first <= column && column + L <= columns_of_all.end;
    for (Index u = 0; u < down.taps; ++u, sums += across.taps * L) {
      const bool inside = row >= rows_of_tap[u].first && row < rows_of_tap[u].end;
      if (inside && all_columns) continue;
      for (Index w = 0; w < across.taps; ++w) {
        const Range columns = inside ? columns_of_tap[w] : Range{0, 0};
        const Integer first(least(L, most(0, columns.first - column))), end(least(L, most(0, columns.end - column)));
        const Vector<T, L> all = load<Vector<T, L>>(sums + w * L);
        store(sums + w * L, (lane >= first) & (lane < end) ? all : Vector<T, L>{});
      }
    }
  }

  // All taps of the block are outside.
  void clear(Room<T>& room) const {
    for (T& sum : room.sums) sum = 0;
    for (Index i = 0; i < down.count; ++i) {
      for (Index first = 0; first < across.count; first += W) {
        put_row<W>(i, first, least(W, across.count - first), false, room.sums);
      }
    }
  }
};

// All taps of a patch.
template <class S>
void correlate_patch(const Geometry& g, const Patch<S>& patch) {
  Room<Number<S>> room;
  const Index width = g.channels / g.groups;
  for (Index a = 0; a < g.kernel[0]; ++a) {
    const bool inside = within(patch.depth * g.stride[0] + a * g.dilation[0] - g.padding[0], g.input[0]);
    for (Index b = 0; b < g.kernel[1]; b += kTaps) {
      for (Index v = 0; v < g.kernel[2]; v += kTaps) {
        const Block<S> block(g, patch, a, {b, least(g.kernel[1], b + kTaps)}, {v, least(g.kernel[2], v + kTaps)});
        if (!inside) block.clear(room);
        for (Index c = 0; inside && c < width; c += kChannels) block.run(c, least(kChannels, width - c), room);
      }
    }
  }
}

// How many parts an image's rows and columns are cut into, for what a patch packs to fit the room.
template <class S>
void patch_parts(const Geometry& g, Index& down, Index& across) {
  const Index channels = least(kChannels, g.channels / g.groups);
  // Parts of an axis have one size or, some of them, one position less; blocks of taps are whole but perhaps the last.
  // Any of these could pack the most.
  const auto last_block = [&](int axis) { return g.kernel[axis] > kTaps ? g.kernel[axis] % kTaps : 0; };
  const auto fits = [&] {
    const bool uneven[4] = {g.output[1] % down != 0, g.output[2] % across != 0, last_block(1) > 0, last_block(2) > 0};
    for (Index i = 0; i < 16; ++i) {
      const bool other[4] = {bool(i & 1), bool(i & 2), bool(i & 4), bool(i & 8)};
      if ((other[0] > uneven[0]) | (other[1] > uneven[1]) | (other[2] > uneven[2]) | (other[3] > uneven[3])) continue;
      const auto taps = [&](int axis, bool last) {
        return Range{0, last ? last_block(axis) : least(g.kernel[axis], kTaps)};
      };
      Patch<S> patch{};
      patch.rows = {0, ceil_divide(g.output[1], down) - other[0]};
      patch.columns = {0, ceil_divide(g.output[2], across) - other[1]};
      const Block<S> block(g, patch, 0, taps(1, other[2]), taps(2, other[3]));
      if (block.numbers(channels) > Room<Number<S>>::kNumbers) return false;
    }
    return true;
  };
  down = ceil_divide(g.output[1], kRows);
  across = ceil_divide(g.output[2], kColumns);
  while (!fits()) {
    const bool many_rows = ceil_divide(g.output[1], down) > 4, one_vector = g.output[2] / across <= kLanes<Number<S>>;
    if (many_rows || one_vector) down = least(g.output[1], 2 * down);
    else across *= 2;
  }
}

}  // namespace

template <class S>
void correlate(const Geometry& g, const S* grad, const S* x, S* dk) {
  const Index width = g.channels / g.groups, taps = volume(g.kernel);
  const Index inputs = volume(g.input), outputs = volume(g.output);
  Index down, across;
  patch_parts<S>(g, down, across);
  in_parallel(g, g.batch * g.output[0] * down * across * g.groups, [&](Index i) {
    const Index group = i % g.groups, item = i / g.groups, n = item / across / down / g.output[0];
    Patch<S> patch;
    patch.depth = item / across / down % g.output[0];
    patch.rows = part(item / across % down, down, g.output[1]);
    patch.columns = part(item % across, across, g.output[2]);
    const Index position = (patch.depth * g.output[1] + patch.rows.first) * g.output[2] + patch.columns.first;
    if (g.channels_last) {
      patch.grad_steps = patch.x_steps = {g.channels, 1};
      patch.dk_steps = {g.groups * taps, 1};
      patch.grad = grad + n * outputs * g.channels + group * width;
      patch.x = x + n * inputs * g.channels + group * width;
      patch.dk = dk + (n * outputs + position) * g.groups * taps + group * taps;
    } else {
      patch.grad_steps = {1, outputs};
      patch.x_steps = {1, inputs};
      patch.dk_steps = {1, outputs};
      patch.grad = grad + (n * g.groups + group) * width * outputs;
      patch.x = x + (n * g.groups + group) * width * inputs;
      patch.dk = dk + (n * g.groups + group) * taps * outputs + position;
    }
    patch.dk_row = g.output[2] * patch.dk_steps.position;
    correlate_patch(g, patch);
  });
}

template void correlate(const Geometry&, const float*, const float*, float*);
template void correlate(const Geometry&, const double*, const double*, double*);
template void correlate(const Geometry&, const Half*, const Half*, Half*);
template void correlate(const Geometry&, const BFloat16*, const BFloat16*, BFloat16*);

}  // namespace INVOLUTION_ISA
}  // namespace involution
