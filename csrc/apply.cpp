// apply: y[n, c, o] = sum over u of k[n, g(c), u, o] * x[n, c, o*stride + u*dilation - padding]
#include "parallel.h"
#include "tiles.h"

namespace involution {
namespace INVOLUTION_ISA {
namespace {

// ------------------------------------------------------------------------------------------------ channels last
// A tile is `Positions` output positions in a row times W channels of one group: one vector of sums per position, all
// of them in registers until every tap has been added.

// Direct convolution of one tile, register-blocked over output positions; K taps of a row and their stride are known at
// compile time, dilation is 1. Every input vector is loaded once and multiplied into all sums that it belongs to.
//
//     K = 3, Stride = 1, Positions = 4                      input position q meets output position t through tap q - t
//
//         q      0    1    2    3    4    5                 q = 2:  sum[0] += x[2] * k[0][2]
//         t = 0  k0   k1   k2                                       sum[1] += x[2] * k[1][1]
//         t = 1       k0   k1   k2                                  sum[2] += x[2] * k[2][0]
//         t = 2            k0   k1   k2
//         t = 3                 k0   k1   k2                The weights of one column are k_step - Stride apart.
template <class S, int W, int Positions, int K, int Stride, bool Inside>
__attribute__((noinline)) void apply_tile(const Geometry& g, const ApplySegment<S>& segment, Index channel) {
  using T = Compute<S>;
  using V = Vector<T, W>;
  V sum[Positions] = {};
  const Index step = segment.step, start = segment.start[2], width = g.input[2];
  const Index next_position = segment.k_step - Stride;
  const Strided<T> column(next_position);
  segment.for_each_kernel_row(g, [&](const S* x, const T* k) INVOLUTION_BODY {
    x += channel;
    const auto first_position = [](int q) INVOLUTION_BODY { return q < K ? 0 : (q - K) / Stride + 1; };
    INVOLUTION_UNROLL
    for (int q = 0; q < (Positions - 1) * Stride + K; ++q) {
      const int first = first_position(q);  // of the output positions that read q; k is at its weight
      if (Inside || within(start + q, width)) {
        V in = load<V>(x);
        pin_in_register(in);
        INVOLUTION_UNROLL
        for (int i = 0; i < (K + Stride - 1) / Stride; ++i) {
          const int t = first + i;
          if (t < Positions && t * Stride <= q) sum[t] += in * column.at(k, i);
        }
      }
      x += step;
      k += 1 + (first_position(q + 1) - first) * next_position;
      opaque(x);
      opaque(k);
    }
  });
  INVOLUTION_UNROLL
  for (int t = 0; t < Positions; ++t) store(segment.y + channel + t * step, sum[t]);
}

// The same for any kernel size, stride and dilation: tap by tap, with a load for every sum. The tile begins at position
// `first` of the segment.
template <class S, int W, int Positions>
__attribute__((noinline)) void apply_tile_of_any_kernel(const Geometry& g, const ApplySegment<S>& segment, Index first,
                                                        Index channel, bool inside) {
  using T = Compute<S>;
  using V = Vector<T, W>;
  V sum[Positions] = {};
  const Index step = segment.step, x_step = g.stride[2] * step, width = g.input[2];
  const Index start = segment.start[2] + first * g.stride[2];
  segment.for_each_kernel_row(g, [&](const S* x, const T* k) INVOLUTION_BODY {
    x += first * x_step + channel;
    k += first * segment.k_step;
    for (Index v = 0; v < g.kernel[2]; ++v, ++k, x += g.dilation[2] * step) {
      INVOLUTION_UNROLL
      for (int t = 0; t < Positions; ++t) {
        if (!inside && !within(start + t * g.stride[2] + v * g.dilation[2], width)) continue;
        sum[t] += load<V>(x + t * x_step) * k[t * segment.k_step];
      }
    }
  });
  S* y = segment.y + first * step + channel;
  INVOLUTION_UNROLL
  for (int t = 0; t < Positions; ++t) store(y + t * step, sum[t]);
}

// The channels of a group from `channel` on, W at a time, the rest with vectors of half that width, and so on.
template <class S, int W>
void apply_any_kernel(const Geometry& g, const ApplySegment<S>& segment, Index positions, Index channel) {
  const bool inside = segment.inside(g, positions);
  for (; channel + W <= segment.group_channels; channel += W) {
    Index first = 0;
    for (; first + 7 <= positions; first += 7) apply_tile_of_any_kernel<S, W, 7>(g, segment, first, channel, inside);
    for (; first + 4 <= positions; first += 4) apply_tile_of_any_kernel<S, W, 4>(g, segment, first, channel, inside);
    for (; first < positions; ++first) apply_tile_of_any_kernel<S, W, 1>(g, segment, first, channel, inside);
  }
  if constexpr (W > 1) {
    if (channel < segment.group_channels) apply_any_kernel<S, W / 2>(g, segment, positions, channel);
  }
}

// Sums of a large tile: as many as the registers hold beside an input vector. Rows of fewer than kTile positions, and
// whatever channels are left over, go to the functions for any kernel.
constexpr int kTile = 7, kLargeTile = kRegisters == 32 ? 14 : kTile;

template <class S, int Positions, int K, int Stride>
INVOLUTION_INLINE Index apply_tiles(const Geometry& g, const ApplySegment<S>& segment) {
  constexpr int W = kLanes<Compute<S>>;
  const bool inside = segment.inside(g, Positions);
  Index channel = 0;
  for (; channel + W <= segment.group_channels; channel += W) {
    if (inside) apply_tile<S, W, Positions, K, Stride, true>(g, segment, channel);
    else apply_tile<S, W, Positions, K, Stride, false>(g, segment, channel);
  }
  return channel;
}

// All channels of a group at the segment's first `positions` output positions.
template <class S, int K, int Stride>
void apply_group(const Geometry& g, const ApplySegment<S>& segment, Index positions) {
  Index channel = 0;
  if constexpr (K > 0) {
    if (positions == kTile) channel = apply_tiles<S, kTile, K, Stride>(g, segment);
    if constexpr (K > 3 && kLargeTile > kTile) {
      if (positions == kLargeTile) channel = apply_tiles<S, kLargeTile, K, Stride>(g, segment);
    }
  }
  if (channel < segment.group_channels) apply_any_kernel<S, kLanes<Compute<S>>>(g, segment, positions, channel);
}

template <class S>
using ApplyGroup = void (*)(const Geometry&, const ApplySegment<S>&, Index positions);

// The function for this kernel size and stride on the fast axis.
template <class S>
ApplyGroup<S> choose_apply_group(const Geometry& g) {
  const Index k = g.kernel[2], stride = g.stride[2];
  if (g.dilation[2] != 1 || stride > 2) return apply_group<S, 0, 0>;
  if (k == 7) return stride == 1 ? apply_group<S, 7, 1> : apply_group<S, 7, 2>;
  if (k == 5) return stride == 1 ? apply_group<S, 5, 1> : apply_group<S, 5, 2>;
  if (k == 3) return stride == 1 ? apply_group<S, 3, 1> : apply_group<S, 3, 2>;
  return apply_group<S, 0, 0>;
}

// The output positions of one tile in rows of this length: as many sums as registers hold, and few positions left over.
// Small kernels wait for memory, not for the loads that more sums would share: for them kTile measured a quarter
// faster.
INVOLUTION_INLINE Index tile_positions(Index row_length, Index kernel_size) {
  const bool fits = ceil_divide(row_length, kLargeTile) * kLargeTile <= ceil_divide(row_length, kTile) * kTile;
  if (kernel_size > 3 && row_length >= kLargeTile && fits) return kLargeTile;
  return row_length >= kTile ? kTile : row_length >= 4 ? 4 : 1;
}

// One row of output positions in tiles; all groups of a tile before the next tile, in the order of the kernel map.
template <class S>
void apply_row(const Geometry& g, ApplyGroup<S> apply_group, Index positions, const S* x, const S* k, S* y, Index row,
               Range groups) {
  const Index width = g.channels / g.groups, taps = volume(g.kernel), row_length = g.output[2];
  const Index rows = g.output[0] * g.output[1], n = row / rows, k_step = g.groups * taps;
  TileWeights<S> weights;
  ApplySegment<S> segment(g, row % rows, 0, weights.step(k_step, taps));
  for (Index next = 0; next < row_length; next += positions) {
    const Index first = min(next, row_length - positions);  // the last tile may overlap its neighbour
    const Index position = row * row_length + first;
    segment.start[2] = input_at(g, 2, first, 0);
    for (Index group = groups.first; group < groups.end; ++group) {
      prefetch_next_tile(k + position * k_step, positions * k_step, group, g.groups);
      segment.image = x + n * volume(g.input) * g.channels + group * width;
      segment.k = weights.read(k + position * k_step + group * taps, k_step, taps, positions);
      segment.y = y + position * g.channels + group * width;
      apply_group(g, segment, positions);
    }
  }
}

template <class S>
void apply_channels_last(const Geometry& g, const S* x, const S* k, S* y) {
  const RowItems items(g, g.output[0] * g.output[1]);
  const ApplyGroup<S> apply_group = choose_apply_group<S>(g);
  const Index positions = tile_positions(g.output[2], g.kernel[2]);
  parallel_for(worthwhile_threads(g), items.count(),
               [&](Index i) { apply_row(g, apply_group, positions, x, k, y, items.row(i), items.groups(i, g)); });
}

// -------------------------------------------------------------------------------------------------- contiguous
// Direct convolution as shifted rows: for every tap, a row of weights times a shifted row of the input is added to a
// row of the output (y[c, o, :] += k[u, o, :] * x[c, h, shift:]). An item is a block of output rows of all channels of
// one group, so that a row of weights meets every channel while it is in cache.
template <class T>
void apply_contiguous(const Geometry& g, const T* x, const T* k, T* y) {
  const Index width = g.channels / g.groups, row_length = g.output[2], positions = volume(g.output);
  const RowBlocks blocks(g, g.output);
  parallel_for(worthwhile_threads(g), blocks.count(), [&](Index i) {
    const Index group = blocks.group(i), depth = blocks.depth(i);  // the group counts through all images
    const Range rows = blocks.rows(i);
    const T* images = x + group * width * volume(g.input);
    const T* maps = k + group * volume(g.kernel) * positions + depth * g.output[1] * row_length;
    T* out = y + group * width * positions + depth * g.output[1] * row_length;
    for (Index c = 0; c < width; ++c) {
      for (Index j = rows.first * row_length; j < rows.end * row_length; ++j) out[c * positions + j] = 0;
    }
    const Range as = taps_of_output(g, 0, depth);
    for (Index a = as.first; a < as.end; ++a) {
      const Index d = input_at(g, 0, depth, a);
      for (Index b = 0; b < g.kernel[1]; ++b) {
        const Range os = intersection(rows, outputs_of_tap(g, 1, b));
        for (Index v = 0; v < g.kernel[2]; ++v) {
          const Range js = outputs_of_tap(g, 2, v);
          const T* map = maps + ((a * g.kernel[1] + b) * g.kernel[2] + v) * positions;
          const Index shift = input_at(g, 2, 0, v);
          for (Index o = os.first; o < os.end; ++o) {
            const Index h = input_at(g, 1, o, b);
            for (Index c = 0; c < width; ++c) {
              const T* in = images + c * volume(g.input) + (d * g.input[1] + h) * g.input[2] + shift;
              T* row = out + c * positions + o * row_length;
              const T* weights = map + o * row_length;
              if (g.stride[2] == 1) {
#pragma omp simd
                for (Index j = js.first; j < js.end; ++j) row[j] += weights[j] * in[j];
              } else {
                for (Index j = js.first; j < js.end; ++j) row[j] += weights[j] * in[j * g.stride[2]];
              }
            }
          }
        }
      }
    }
  });
}

}  // namespace

template <class S>
void apply(const Geometry& g, const S* x, const S* k, S* y) {
  if constexpr (!kIs16Bit<S>) {
    if (!g.channels_last) return apply_contiguous(g, x, k, y);
  }
  apply_channels_last(g, x, k, y);
}

template <class T>
void apply_segment(const Geometry& g, ApplySegment<T>& segment, Index count) {
  const ApplyGroup<T> apply_group = choose_apply_group<T>(g);
  const Index positions = tile_positions(count, g.kernel[2]);
  const Index start = segment.start[2];
  const T* k = segment.k;
  T* y = segment.y;
  for (Index next = 0; next < count; next += positions) {
    const Index first = min(next, count - positions);  // the last tile may overlap its neighbour
    segment.start[2] = start + first * g.stride[2];
    segment.k = k + first * segment.k_step;
    segment.y = y + first * segment.step;
    apply_group(g, segment, positions);
  }
  segment.start[2] = start;
}

template void apply(const Geometry&, const float*, const float*, float*);
template void apply(const Geometry&, const double*, const double*, double*);
template void apply(const Geometry&, const Half*, const Half*, Half*);
template void apply(const Geometry&, const BFloat16*, const BFloat16*, BFloat16*);
template void apply_segment(const Geometry&, ApplySegment<float>&, Index);
template void apply_segment(const Geometry&, ApplySegment<double>&, Index);

}  // namespace INVOLUTION_ISA
}  // namespace involution
