// apply: y[n, c, o] = sum over u of k[n, g(c), u, o] * x[n, c, o*stride + u*dilation - padding]
#include "geometry.h"

namespace involution {
namespace INVOLUTION_ISA {
namespace {

// ------------------------------------------------------------------------------------------------ channels last
// One vector holds W channels of a group at one position. A tile is T output positions in a row: T sums that stay in
// registers while the taps go by.

template <class S>
using ApplyRun = Run<const S, const Number<S>, S>;

// K and Stride are the fast axis' kernel size and stride where they are known (dilation 1); 0, 0 reads the geometry.
// With them known, every x is loaded once for all the sums it belongs to.
template <class S, int W, int Positions, int K, int Stride, bool Inside>
INVOLUTION_INLINE void apply_tile(const Geometry& g, const ApplyRun<S>& tile) {
  using T = Number<S>;
  using V = Vector<T, W>;
  V sum[Positions] = {};
  const Index width = g.input[2], step = tile.step;
  const Strided<T> next_position(tile.k_step - Stride);
  for (Index a = tile.taps[0].first; a < tile.taps[0].end; ++a) {
    for (Index b = tile.taps[1].first; b < tile.taps[1].end; ++b) {
      const Index depth = tile.start[0] + a * g.dilation[0], height = tile.start[1] + b * g.dilation[1];
      const S* x = tile.image + ((depth * g.input[1] + height) * width + tile.start[2]) * step;
      const T* k = tile.k + (a * g.kernel[1] + b) * g.kernel[2];
      if constexpr (K > 0) {
        // Input position q of the tile meets output position t through tap q - t*Stride, for t from `first` to `last`. The
        // weights that it needs are k_step - Stride numbers apart.
        unroll<(Positions - 1) * Stride + K>([&](auto q) INVOLUTION_BODY {
          constexpr int first = q.value < K ? 0 : (q.value - K) / Stride + 1;
          constexpr int last = q.value / Stride < Positions ? q.value / Stride : Positions - 1;
          if (Inside || within(tile.start[2] + q, width)) {
            V here = load<V>(x);
            keep(here);
            unroll<last - first + 1>([&](auto i) INVOLUTION_BODY {
              sum[first + i] += here * next_position.template at<i.value>(k);
            });
          }
          constexpr int next_first = q.value + 1 < K ? 0 : (q.value + 1 - K) / Stride + 1;
          x += step;
          k += 1 + (next_first - first) * (tile.k_step - Stride);
          hide(x);
          hide(k);
        });
      } else {
        for (Index v = 0; v < g.kernel[2]; ++v) {
          unroll<Positions>([&](auto t) INVOLUTION_BODY {
            const Index q = t * g.stride[2] + v * g.dilation[2];
            if (!Inside && !within(tile.start[2] + q, width)) return;
            sum[t] += load<V>(x + q * step) * k[t * tile.k_step + v];
          });
        }
      }
    }
  }
  unroll<Positions>([&](auto t) INVOLUTION_BODY { store(tile.y + t * tile.step, sum[t]); });
}

template <class S, int W, int Positions, int K, int Stride>
__attribute__((noinline)) void apply_positions(const Geometry& g, const ApplyRun<S>& tile) {
  const Index end = tile.start[2] + (Positions - 1) * g.stride[2] + (g.kernel[2] - 1) * g.dilation[2];
  if (tile.start[2] >= 0 && end < g.input[2]) {
    apply_tile<S, W, Positions, K, Stride, true>(g, tile);
  } else {
    apply_tile<S, W, Positions, K, Stride, false>(g, tile);
  }
}

// All channels of a group, W at a time, the rest with vectors of half that width, and so on.
template <class S, int W, int Positions, int K, int Stride>
INVOLUTION_INLINE void apply_group(const Geometry& g, const ApplyRun<S>& whole, Index channels) {
  if (channels == W) return apply_positions<S, W, Positions, K, Stride>(g, whole);
  ApplyRun<S> tile = whole;
  for (; channels >= W; channels -= W, tile.image += W, tile.y += W) {
    apply_positions<S, W, Positions, K, Stride>(g, tile);
  }
  if constexpr (W > 1) {
    if (channels > 0) apply_group<S, W / 2, Positions, 0, 0>(g, tile, channels);
  }
}

// One row of output positions in tiles; the groups of a tile before the next tile, as the kernel map lies in memory.
template <class S, int Positions, int K, int Stride>
void apply_row(const Geometry& g, const S* x, const S* k, S* y, Index row, Range groups) {
  const Index width = g.channels / g.groups, taps = volume(g.kernel), row_length = g.output[2];
  const Index rows = g.output[0] * g.output[1], n = row / rows;
  const Index k_step = g.groups * taps;
  Weights<S, Positions> weights;
  ApplyRun<S> tile(g, row % rows, 0, weights.step(k_step, taps));
  for (Index next = 0; next < row_length; next += Positions) {
    const Index first = least(next, row_length - Positions);  // the last tile may overlap its neighbour
    const Index position = row * row_length + first;
    tile.start[2] = first * g.stride[2] - g.padding[2];
    for (Index group = groups.first; group < groups.end; ++group) {
      fetch_ahead(k + position * k_step, Positions * k_step, group, g.groups);
      tile.image = x + n * volume(g.input) * g.channels + group * width;
      tile.k = weights.take(k + position * k_step + group * taps, k_step, taps);
      tile.y = y + position * g.channels + group * width;
      apply_group<S, kLanes<Number<S>>, Positions, K, Stride>(g, tile, width);
    }
  }
}

template <class S, int K, int Stride>
void apply_channels_last(const Geometry& g, const S* x, const S* k, S* y) {
  const Items items(g, g.output[0] * g.output[1]);
  with_tile_size(g.output[2], g.kernel[2], [&](auto positions) {
    in_parallel(g, items.count(), [&](Index i) {
      apply_row<S, decltype(positions)::value, K, Stride>(g, x, k, y, items.row(i), items.groups(i, g));
    });
  });
}

// -------------------------------------------------------------------------------------------------- contiguous
// A block of output rows of every channel of a group at a time: the kernel map's rows of each tap meet them all.
template <class T>
void apply_contiguous(const Geometry& g, const T* x, const T* k, T* y) {
  const Index width = g.channels / g.groups, row_length = g.output[2], positions = volume(g.output);
  const Blocks blocks(g, g.output);
  in_parallel(g, blocks.count(), [&](Index i) {
    const Index group = blocks.group(i), depth = blocks.depth(i);  // group of all images
    const Range rows = blocks.rows(i);
    const T* images = x + group * width * volume(g.input);
    const T* maps = k + group * volume(g.kernel) * positions + depth * g.output[1] * row_length;
    T* out = y + group * width * positions + depth * g.output[1] * row_length;
    for (Index c = 0; c < width; ++c) {
      for (Index j = rows.first * row_length; j < rows.end * row_length; ++j) out[c * positions + j] = 0;
    }
    const Range a_range = taps_of_output(g, 0, depth);
    for (Index a = a_range.first; a < a_range.end; ++a) {
      const Index d = depth * g.stride[0] + a * g.dilation[0] - g.padding[0];
      for (Index b = 0; b < g.kernel[1]; ++b) {
        const Range hs = both(rows, outputs_of_tap(g, 1, b));
        for (Index v = 0; v < g.kernel[2]; ++v) {
          const Range js = outputs_of_tap(g, 2, v);
          const T* map = maps + ((a * g.kernel[1] + b) * g.kernel[2] + v) * positions;
          const Index shift = v * g.dilation[2] - g.padding[2];
          for (Index o = hs.first; o < hs.end; ++o) {
            const Index h = o * g.stride[1] + b * g.dilation[1] - g.padding[1];
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
  with_kernel_size_and_stride(g, [&](auto kernel_size, auto stride) {
    apply_channels_last<S, decltype(kernel_size)::value, decltype(stride)::value>(g, x, k, y);
  });
}

template <class T>
void apply_run(const Geometry& g, Run<const T, const T, T>& run, Index count) {
  const Index start = run.start[2];
  const T* k = run.k;
  T* y = run.y;
  with_kernel_size_and_stride(g, [&](auto kernel_size, auto stride) {
    with_tile_size(count, g.kernel[2], [&](auto positions) {
      constexpr int at_once = decltype(positions)::value;
      for (Index next = 0; next < count; next += at_once) {
        const Index first = least(next, count - at_once);
        run.start[2] = start + first * g.stride[2];
        run.k = k + first * run.k_step;
        run.y = y + first * run.step;
        apply_group<T, kLanes<T>, at_once, decltype(kernel_size)::value, decltype(stride)::value>(g, run, run.width);
      }
    });
  });
  run.start[2] = start;
}

template void apply(const Geometry&, const float*, const float*, float*);
template void apply(const Geometry&, const double*, const double*, double*);
template void apply(const Geometry&, const Half*, const Half*, Half*);
template void apply(const Geometry&, const BFloat16*, const BFloat16*, BFloat16*);
template void apply_run(const Geometry&, Run<const float, const float, float>&, Index);
template void apply_run(const Geometry&, Run<const double, const double, double>&, Index);

}  // namespace INVOLUTION_ISA
}  // namespace involution
