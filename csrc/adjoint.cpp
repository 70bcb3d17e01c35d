// adjoint: dx[n, c, i] = sum over every (u, o) with o*stride + u*dilation - padding = i of k[n, g(c), u, o] * g[n, c, o]
#include "geometry.h"

namespace involution {
namespace INVOLUTION_ISA {
namespace {

// ------------------------------------------------------------------------------------------------ channels last
// apply, run backwards: a tile is T output positions in a row, and for every kernel row the input positions that it
// reaches are loaded, added to, and stored again. The kernel map streams by once, as it lies in memory. One thread has
// all positions of an image's groups, so every dx has one writer.

template <class S>
using AdjointRun = Run<Number<S>, const Number<S>, const S>;

// K and Stride are the fast axis' kernel size and stride where they are known (dilation 1); 0, 0 reads the geometry.
// With them known, every dx is loaded and stored once for all the products that it gets from a row of the kernel.
template <class S, int W, int Positions, int K, int Stride, bool Inside>
INVOLUTION_INLINE void adjoint_tile(const Geometry& g, const AdjointRun<S>& tile) {
  using T = Number<S>;
  using V = Vector<T, W>;
  const Index width = g.input[2];
  for (Index a = tile.taps[0].first; a < tile.taps[0].end; ++a) {
    for (Index b = tile.taps[1].first; b < tile.taps[1].end; ++b) {
      const Index depth = tile.start[0] + a * g.dilation[0], height = tile.start[1] + b * g.dilation[1];
      T* dx = tile.image + ((depth * g.input[1] + height) * width + tile.start[2]) * tile.step;
      const T* k = tile.k + (a * g.kernel[1] + b) * g.kernel[2];
      if constexpr (K > 0) {
        // A window of K sums slides along: as many new ones as the stride come in, K products are added, as many finished ones go out.
        V sum[(Positions - 1) * Stride + K] = {};
        const S* grad = tile.y;
        T* in = dx;
        const auto come_in = [&](auto q) INVOLUTION_BODY {
          if (Inside || within(tile.start[2] + q, width)) sum[q] = load<V>(in);
          in += tile.step;
          hide(in);
        };
        const auto go_out = [&](auto q) INVOLUTION_BODY {
          if (Inside || within(tile.start[2] + q, width)) store(dx, sum[q]);
          dx += tile.step;
          hide(dx);
        };
        unroll<K - Stride>(come_in);
        unroll<Positions>([&](auto t) INVOLUTION_BODY {
          constexpr int q = t.value * Stride;
          unroll<Stride>([&](auto i) INVOLUTION_BODY { come_in(Constant<q + K - Stride + i.value>{}); });
          V here = load<V>(grad);
          keep(here);
          unroll<K>([&](auto v) INVOLUTION_BODY { sum[q + v] += here * k[v]; });
          unroll<Stride>([&](auto i) INVOLUTION_BODY { go_out(Constant<q + i.value>{}); });
          grad += tile.step;
          k += tile.k_step;
          hide(grad);
          hide(k);
        });
        unroll<K - Stride>([&](auto i) INVOLUTION_BODY { go_out(Constant<Positions * Stride + i.value>{}); });
      } else {
        for (Index v = 0; v < g.kernel[2]; ++v) {
          unroll<Positions>([&](auto t) INVOLUTION_BODY {
            const Index q = t * g.stride[2] + v * g.dilation[2];
            if (!Inside && !within(tile.start[2] + q, width)) return;
            T* at = dx + q * tile.step;
            store(at, load<V>(at) + load<V>(tile.y + t * tile.step) * k[t * tile.k_step + v]);
          });
        }
      }
    }
  }
}

template <class S, int W, int Positions, int K, int Stride>
__attribute__((noinline)) void adjoint_positions(const Geometry& g, const AdjointRun<S>& tile) {
  const Index end = tile.start[2] + (Positions - 1) * g.stride[2] + (g.kernel[2] - 1) * g.dilation[2];
  if (tile.start[2] >= 0 && end < g.input[2]) {
    adjoint_tile<S, W, Positions, K, Stride, true>(g, tile);
  } else {
    adjoint_tile<S, W, Positions, K, Stride, false>(g, tile);
  }
}

// All channels of a group, W at a time, the rest with vectors of half that width, and so on.
template <class S, int W, int Positions, int K, int Stride>
INVOLUTION_INLINE void adjoint_group(const Geometry& g, AdjointRun<S> tile, Index channels) {
  for (; channels >= W; channels -= W, tile.image += W, tile.y += W) {
    adjoint_positions<S, W, Positions, K, Stride>(g, tile);
  }
  if constexpr (W > 1) {
    if (channels > 0) adjoint_group<S, W / 2, Positions, 0, 0>(g, tile, channels);
  }
}

// One row of output positions from `first` on, in tiles; the rest in tiles of half the size, and so on. The groups of a
// tile come before the next tile, as the kernel map lies in memory.
template <class S, int Positions, int K, int Stride>
void adjoint_row(const Geometry& g, const S* grad, const S* k, Number<S>* dx, Index row, Index first, Range groups,
                 AdjointRun<S> tile) {
  const Index width = g.channels / g.groups, taps = volume(g.kernel), row_length = g.output[2];
  const Index k_step = g.groups * taps;
  Weights<S, Positions> weights;
  for (; first + Positions <= row_length; first += Positions) {
    const Index position = row * row_length + first;
    tile.start[2] = first * g.stride[2] - g.padding[2];
    for (Index group = groups.first; group < groups.end; ++group) {
      fetch_ahead(k + position * k_step, Positions * k_step, group, g.groups);
      tile.image = dx + group * width;
      tile.k = weights.take(k + position * k_step + group * taps, k_step, taps);
      tile.y = grad + position * g.channels + group * width;
      adjoint_group<S, kLanes<Number<S>>, Positions, K, Stride>(g, tile, width);
    }
  }
  if constexpr (Positions > 1) {
    if (first < row_length) adjoint_row<S, Positions / 2, K, Stride>(g, grad, k, dx, row, first, groups, tile);
  }
}

template <class S, int K, int Stride>
void adjoint_channels_last(const Geometry& g, const S* grad, const S* k, Number<S>* dx) {
  using T = Number<S>;
  constexpr int most = kRegisters == 32 ? 14 : 7;        // positions whose reach fits the registers at stride 1
  constexpr int positions = Stride > 1 ? (most + 1) / 2 : most;
  const Index width = g.channels / g.groups, rows = g.output[0] * g.output[1], taps = volume(g.kernel);
  const Items items(g, 1);
  in_parallel(g, items.count(), [&](Index i) {
    const Index n = items.row(i);
    const Range groups = items.groups(i, g);
    T* image = dx + n * volume(g.input) * g.channels;
    for (Index position = 0; !g.adds && position < volume(g.input); ++position) {
      T* here = image + position * g.channels;
      for (Index c = groups.first * width; c < groups.end * width; ++c) here[c] = 0;
    }
    for (Index row = 0; row < rows; ++row) {
      const AdjointRun<S> run(g, row, 0, Weights<S, 1>::step(g.groups * taps, taps));
      adjoint_row<S, positions, K, Stride>(g, grad, k, image, n * rows + row, 0, groups, run);
    }
  });
}

// -------------------------------------------------------------------------------------------------- contiguous
// A block of input rows of every channel of a group at a time: the kernel map's rows of each tap meet them all.
template <class T>
void adjoint_contiguous(const Geometry& g, const T* grad, const T* k, T* dx) {
  const Index width = g.channels / g.groups, row_length = g.input[2], inputs = volume(g.input);
  const Index positions = volume(g.output), taps = volume(g.kernel);
  const Blocks blocks(g, g.input);
  in_parallel(g, blocks.count(), [&](Index i) {
    const Index group = blocks.group(i), depth = blocks.depth(i);  // group of all images
    const Range rows = blocks.rows(i);
    T* out = dx + group * width * inputs + depth * g.input[1] * row_length;
    for (Index c = 0; !g.adds && c < width; ++c) {
      for (Index j = rows.first * row_length; j < rows.end * row_length; ++j) out[c * inputs + j] = 0;
    }
    for (Index a = 0; a < g.kernel[0]; ++a) {
      const Index od = output_at(g, 0, depth, a);
      if (od < 0) continue;
      for (Index b = 0; b < g.kernel[1]; ++b) {
        for (Index v = 0; v < g.kernel[2]; ++v) {
          const Range js = outputs_of_tap(g, 2, v);
          const T* map = k + (group * taps + (a * g.kernel[1] + b) * g.kernel[2] + v) * positions;
          for (Index height = rows.first; height < rows.end; ++height) {
            const Index oh = output_at(g, 1, height, b);
            if (oh < 0) continue;
            const Index at = (od * g.output[1] + oh) * g.output[2];
            for (Index c = 0; c < width; ++c) {
              const T *in = grad + (group * width + c) * positions + at, *weights = map + at;
              T* row = out + c * inputs + height * row_length + v * g.dilation[2] - g.padding[2];
              if (g.stride[2] == 1) {
#pragma omp simd
                for (Index j = js.first; j < js.end; ++j) row[j] += weights[j] * in[j];
              } else {
                for (Index j = js.first; j < js.end; ++j) row[j * g.stride[2]] += weights[j] * in[j];
              }
            }
          }
        }
      }
    }
  });
}

}  // namespace

template <class S, class T>
void adjoint(const Geometry& g, const S* grad, const S* k, T* dx) {
  if constexpr (!kIs16Bit<S>) {
    if (!g.channels_last) return adjoint_contiguous(g, grad, k, dx);
  }
  with_kernel_size_and_stride(g, [&](auto kernel_size, auto stride) {
    adjoint_channels_last<S, decltype(kernel_size)::value, decltype(stride)::value>(g, grad, k, dx);
  });
}

template void adjoint(const Geometry&, const float*, const float*, float*);
template void adjoint(const Geometry&, const double*, const double*, double*);
template void adjoint(const Geometry&, const Half*, const Half*, float*);
template void adjoint(const Geometry&, const BFloat16*, const BFloat16*, float*);

}  // namespace INVOLUTION_ISA
}  // namespace involution
