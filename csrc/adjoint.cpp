// adjoint: dx[n, c, i] = sum over every (u, o) with o*stride + u*dilation - padding = i of k[n, g(c), u, o] * g[n, c, o]
#include "geometry.h"

namespace involution {
namespace INVOLUTION_ISA {
namespace {

// ------------------------------------------------------------------------------------------------ channels last
// apply, run backwards: a tile is T output positions in a row, and for every kernel row the input positions that it
// reaches are loaded, added to, and stored again. The kernel map streams by once, as it lies in memory. One thread has
// all positions of an image's groups, so every dx has one writer.

template <class T>
using AdjointRun = Run<T, const T, const T>;

// K and S are the fast axis' kernel size and stride where they are known (dilation 1); 0, 0 reads the geometry. With
// them known, every dx is loaded and stored once for all the products that it gets from a row of the kernel.
template <class T, int W, int Positions, int K, int S, bool Inside>
INVOLUTION_INLINE void adjoint_tile(const Geometry& g, const AdjointRun<T>& tile) {
  using V = Vector<T, W>;
  const Index width = g.input[2];
  for (Index a = tile.taps[0].first; a < tile.taps[0].end; ++a) {
    for (Index b = tile.taps[1].first; b < tile.taps[1].end; ++b) {
      const Index depth = tile.start[0] + a * g.dilation[0], height = tile.start[1] + b * g.dilation[1];
      T* dx = tile.image + ((depth * g.input[1] + height) * width + tile.start[2]) * tile.step;
      const T* k = tile.k + (a * g.kernel[1] + b) * g.kernel[2];
      if constexpr (K > 0) {
        // A window of K sums slides along: S new ones come in, K products are added, S finished ones go out.
        V sum[(Positions - 1) * S + K] = {};
        const T* grad = tile.y;
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
        unroll<K - S>(come_in);
        unroll<Positions>([&](auto t) INVOLUTION_BODY {
          constexpr int q = t.value * S;
          unroll<S>([&](auto i) INVOLUTION_BODY { come_in(Constant<q + K - S + i.value>{}); });
          V here = load<V>(grad);
          keep(here);
          unroll<K>([&](auto v) INVOLUTION_BODY { sum[q + v] += here * k[v]; });
          unroll<S>([&](auto i) INVOLUTION_BODY { go_out(Constant<q + i.value>{}); });
          grad += tile.step;
          k += tile.k_step;
          hide(grad);
          hide(k);
        });
        unroll<K - S>([&](auto i) INVOLUTION_BODY { go_out(Constant<Positions * S + i.value>{}); });
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

template <class T, int W, int Positions, int K, int S>
__attribute__((noinline)) void adjoint_positions(const Geometry& g, const AdjointRun<T>& tile) {
  const Index end = tile.start[2] + (Positions - 1) * g.stride[2] + (g.kernel[2] - 1) * g.dilation[2];
  if (tile.start[2] >= 0 && end < g.input[2]) {
    adjoint_tile<T, W, Positions, K, S, true>(g, tile);
  } else {
    adjoint_tile<T, W, Positions, K, S, false>(g, tile);
  }
}

// All channels of a group, W at a time, the rest with vectors of half that width, and so on.
template <class T, int W, int Positions, int K, int S>
INVOLUTION_INLINE void adjoint_group(const Geometry& g, AdjointRun<T> tile, Index channels) {
  for (; channels >= W; channels -= W, tile.image += W, tile.y += W) {
    adjoint_positions<T, W, Positions, K, S>(g, tile);
  }
  if constexpr (W > 1) {
    if (channels > 0) adjoint_group<T, W / 2, Positions, 0, 0>(g, tile, channels);
  }
}

// One row of output positions from `first` on, in tiles; the rest in tiles of half the size, and so on. The groups of a
// tile come before the next tile, as the kernel map lies in memory.
template <class T, int Positions, int K, int S>
void adjoint_row(const Geometry& g, const T* grad, const T* k, T* dx, Index row, Index first, Range groups, AdjointRun<T> tile) {
  const Index width = g.channels / g.groups, taps = volume(g.kernel), row_length = g.output[2];
  for (; first + Positions <= row_length; first += Positions) {
    const Index position = row * row_length + first;
    tile.start[2] = first * g.stride[2] - g.padding[2];
    for (Index group = groups.first; group < groups.end; ++group) {
      fetch_ahead(k + position * tile.k_step, Positions * tile.k_step, group, g.groups);
      tile.image = dx + group * width;
      tile.k = k + position * tile.k_step + group * taps;
      tile.y = grad + position * g.channels + group * width;
      adjoint_group<T, kLanes<T>, Positions, K, S>(g, tile, width);
    }
  }
  if constexpr (Positions > 1) {
    if (first < row_length) adjoint_row<T, Positions / 2, K, S>(g, grad, k, dx, row, first, groups, tile);
  }
}

template <class T, int K, int S>
void adjoint_channels_last(const Geometry& g, const T* grad, const T* k, T* dx) {
  constexpr int most = kRegisters == 32 ? 14 : 7;        // positions whose reach fits the registers at stride 1
  constexpr int positions = S > 1 ? (most + 1) / 2 : most;
  const Index width = g.channels / g.groups, rows = g.output[0] * g.output[1];
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
      const AdjointRun<T> run(g, row, 0, g.groups * volume(g.kernel));
      adjoint_row<T, positions, K, S>(g, grad, k, image, n * rows + row, 0, groups, run);
    }
  });
}

// -------------------------------------------------------------------------------------------------- contiguous
// One input row of every channel of a group at a time: the kernel map's row of each tap meets them all.
template <class T>
void adjoint_contiguous(const Geometry& g, const T* grad, const T* k, T* dx) {
  const Index width = g.channels / g.groups, rows = g.input[0] * g.input[1], row_length = g.input[2];
  const Index positions = volume(g.output), taps = volume(g.kernel);
  in_parallel(g, g.batch * g.groups * rows, [&](Index i) {
    const Index group = i / rows, depth = i % rows / g.input[1], height = i % g.input[1];  // group of all images
    T* out = dx + group * width * rows * row_length + i % rows * row_length;
    for (Index c = 0; !g.adds && c < width; ++c) {
      for (Index j = 0; j < row_length; ++j) out[c * rows * row_length + j] = 0;
    }
    for (Index a = 0; a < g.kernel[0]; ++a) {
      const Index od = output_at(g, 0, depth, a);
      if (od < 0) continue;
      for (Index b = 0; b < g.kernel[1]; ++b) {
        const Index oh = output_at(g, 1, height, b);
        if (oh < 0) continue;
        const Index at = (od * g.output[1] + oh) * g.output[2];
        for (Index v = 0; v < g.kernel[2]; ++v) {
          const Range js = outputs_of_tap(g, 2, v);
          const T* map = k + (group * taps + (a * g.kernel[1] + b) * g.kernel[2] + v) * positions + at;
          for (Index c = 0; c < width; ++c) {
            const T* in = grad + (group * width + c) * positions + at;
            T* row = out + c * rows * row_length + v * g.dilation[2] - g.padding[2];
            if (g.stride[2] == 1) {
#pragma omp simd
              for (Index j = js.first; j < js.end; ++j) row[j] += map[j] * in[j];
            } else {
              for (Index j = js.first; j < js.end; ++j) row[j * g.stride[2]] += map[j] * in[j];
            }
          }
        }
      }
    }
  });
}

}  // namespace

template <class T>
void adjoint(const Geometry& g, const T* grad, const T* k, T* dx) {
  if (!g.channels_last) return adjoint_contiguous(g, grad, k, dx);
  with_kernel_size_and_stride(g, [&](auto kernel_size, auto stride) {
    adjoint_channels_last<T, decltype(kernel_size)::value, decltype(stride)::value>(g, grad, k, dx);
  });
}

template void adjoint(const Geometry&, const float*, const float*, float*);
template void adjoint(const Geometry&, const double*, const double*, double*);

}  // namespace INVOLUTION_ISA
}  // namespace involution
