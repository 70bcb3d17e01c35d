// adjoint: dx[n, c, i] = sum over every (u, o) with o*stride + u*dilation - padding = i of k[n, g(c), u, o] * g[n, c, o]
//
// Gathered, so that every dx has one writer: for each input position, the output positions that read it.
#include "geometry.h"

namespace involution {
namespace INVOLUTION_ISA {
namespace {

// ------------------------------------------------------------------------------------------------ channels last
// One vector holds W channels of a group at one position. A tile is T input positions in a row: T sums in registers.

template <class T>
struct Tile {
  const T* image;  // g of this image and group, position (0, 0, 0)
  const T* k;      // the same of the kernel map
  T* dx;           // of this image, group and row, position 0
  Index step;      // numbers from one position to the next in g and dx: the channels
  Index k_step;    // the same in k: groups * taps
  Index depth, height, first;  // input position where the tile starts; `first` may be outside
};

// K and S are the fast axis' kernel size and stride where they are known (dilation 1, and first + padding a multiple of
// S); 0, 0 reads the geometry. With them known, every g is loaded once for all the sums it belongs to.
template <class T, int W, int Positions, int K, int S, bool Inside>
INVOLUTION_INLINE void adjoint_tile(const Geometry& g, const Tile<T>& tile) {
  using V = Vector<T, W>;
  V sum[Positions] = {};
  for (Index a = 0; a < g.kernel[0]; ++a) {
    const Index od = output_at(g, 0, tile.depth, a);
    if (od < 0) continue;
    for (Index b = 0; b < g.kernel[1]; ++b) {
      const Index oh = output_at(g, 1, tile.height, b);
      if (oh < 0) continue;
      const Index row = (od * g.output[1] + oh) * g.output[2];
      const T* grad = tile.image + row * tile.step;
      const T* k = tile.k + row * tile.k_step + (a * g.kernel[1] + b) * g.kernel[2];
      if constexpr (K > 0) {
        constexpr int before = (K - 1) / S, after = (Positions - 1) / S;  // outputs that reach the tile, around `o`
        const Index o = (tile.first + g.padding[2]) / S;
        unroll<before + after + 1>([&](auto q) INVOLUTION_BODY {
          constexpr int j = decltype(q)::value - before;
          if (!Inside && !within(o + j, g.output[2])) return;
          V here = load<V>(grad + (o + j) * tile.step);
          keep(here);
          unroll<Positions>([&](auto t) INVOLUTION_BODY {
            constexpr int v = decltype(t)::value - S * j;
            if constexpr (v >= 0 && v < K) sum[t] += here * k[(o + j) * tile.k_step + v];
          });
        });
      } else {
        for (Index v = 0; v < g.kernel[2]; ++v) {
          unroll<Positions>([&](auto t) INVOLUTION_BODY {
            const Index o = output_at(g, 2, tile.first + t, v);
            if (o >= 0) sum[t] += load<V>(grad + o * tile.step) * k[o * tile.k_step + v];
          });
        }
      }
    }
  }
  unroll<Positions>([&](auto t) INVOLUTION_BODY {
    if (Inside || within(tile.first + t, g.input[2])) store(tile.dx + (tile.first + t) * tile.step, sum[t]);
  });
}

template <class T, int W, int Positions, int K, int S>
void adjoint_positions(const Geometry& g, const Tile<T>& tile) {
  if constexpr (K > 0) {
    const Index o = (tile.first + g.padding[2]) / S;
    if (tile.first >= 0 && tile.first + Positions <= g.input[2] && o - (K - 1) / S >= 0 &&
        o + (Positions - 1) / S < g.output[2]) {
      return adjoint_tile<T, W, Positions, K, S, true>(g, tile);
    }
  }
  adjoint_tile<T, W, Positions, K, S, false>(g, tile);
}

// All channels of a group, W at a time, the rest with vectors of half that width, and so on.
template <class T, int W, int Positions, int K, int S>
INVOLUTION_INLINE void adjoint_group(const Geometry& g, Tile<T> tile, Index channels) {
  for (; channels >= W; channels -= W, tile.image += W, tile.dx += W) {
    adjoint_positions<T, W, Positions, K, S>(g, tile);
  }
  if constexpr (W > 1) {
    if (channels > 0) adjoint_group<T, W / 2, Positions, 0, 0>(g, tile, channels);
  }
}

// One row of input positions in tiles.
template <class T, int Positions, int K, int S>
void adjoint_row(const Geometry& g, const T* grad, const T* k, T* dx, Index row, Range groups) {
  const Index width = g.channels / g.groups, taps = volume(g.kernel), row_length = g.input[2];
  const Index n = row / (g.input[0] * g.input[1]);
  Tile<T> tile;
  tile.step = g.channels;
  tile.k_step = g.groups * taps;
  tile.depth = row / g.input[1] % g.input[0];
  tile.height = row % g.input[1];
  tile.first = K > 0 ? -(g.padding[2] % S) : 0;
  for (; tile.first < row_length; tile.first += Positions) {
    for (Index group = groups.first; group < groups.end; ++group) {
      tile.image = grad + n * volume(g.output) * g.channels + group * width;
      tile.k = k + n * volume(g.output) * tile.k_step + group * taps;
      tile.dx = dx + row * row_length * g.channels + group * width;
      adjoint_group<T, kLanes<T>, Positions, K, S>(g, tile, width);
    }
  }
}

template <class T, int K, int S>
void adjoint_channels_last(const Geometry& g, const T* grad, const T* k, T* dx) {
  const Items items(g, g.input[0] * g.input[1]);
  with_tile_size(g.input[2], [&](auto positions) {
    constexpr int size = decltype(positions)::value;
    constexpr int positions_in_phase = S > 1 ? (size + S - 1) / S * S : size;  // every tile starts at the same phase
    in_parallel(g, items.count(), [&](Index i) {
      adjoint_row<T, positions_in_phase, K, S>(g, grad, k, dx, items.row(i), items.groups(i, g));
    });
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
    for (Index c = 0; c < width; ++c) {
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
