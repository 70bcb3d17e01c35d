// adjoint: dx[n, c, i] = sum over all (u, o) with o*stride + u*dilation - padding = i of k[n, g(c), u, o] * dy[n, c, o]
#include "parallel.h"
#include "tiles.h"

namespace involution {
namespace INVOLUTION_ISA {
namespace {

// ------------------------------------------------------------------------------------------------ channels last
// A scatter: a tile is `Positions` output positions in a row times W channels of one group, and for every row of the
// kernel the input positions that the tile reaches are loaded, added to, and stored again. The kernel map is read once,
// in its order in memory. One thread has all positions of an image's groups, so that every dx has one writer.

template <class S>
using AdjointSegment = Segment<Compute<S>, const Compute<S>, const S>;

// Sliding-window accumulation in registers; K taps of a row and their stride are known at compile time, dilation is 1.
// At every output position, `Stride` new sums enter the window from dx, K products are added, and `Stride` finished
// sums leave it to dx. So every dx is loaded and stored once per row of the kernel and tile.
//
//     K = 3, Stride = 1          dx   0    1    2    3    4    5
//         t = 0                     [ +    +    + ]                    loads 0, 1, 2    stores 0
//         t = 1                          [ +    +    + ]               loads 3          stores 1
//         t = 2                               [ +    +    + ]          loads 4          stores 2
template <class S, int W, int Positions, int K, int Stride, bool Inside>
__attribute__((noinline)) void adjoint_tile(const Geometry& g, const AdjointSegment<S>& segment, Index channel) {
  using T = Compute<S>;
  using V = Vector<T, W>;
  const Index step = segment.step, k_step = segment.k_step, start = segment.start[2], width = g.input[2];
  segment.for_each_kernel_row(g, [&](T* dx, const T* k) INVOLUTION_BODY {
    V sum[(Positions - 1) * Stride + K] = {};
    const S* dy = segment.y + channel;
    T *in = dx + channel, *out = in;
    const auto enter = [&](int q) INVOLUTION_BODY {
      if (Inside || within(start + q, width)) sum[q] = load<V>(in);
      in += step;
      opaque(in);
    };
    const auto leave = [&](int q) INVOLUTION_BODY {
      if (Inside || within(start + q, width)) store(out, sum[q]);
      out += step;
      opaque(out);
    };
    INVOLUTION_UNROLL
    for (int q = 0; q < K - Stride; ++q) enter(q);
    INVOLUTION_UNROLL
    for (int t = 0; t < Positions; ++t) {
      INVOLUTION_UNROLL
      for (int i = 0; i < Stride; ++i) enter(t * Stride + K - Stride + i);
      V grad = load<V>(dy);
      pin_in_register(grad);
      INVOLUTION_UNROLL
      for (int v = 0; v < K; ++v) sum[t * Stride + v] += grad * k[v];
      INVOLUTION_UNROLL
      for (int i = 0; i < Stride; ++i) leave(t * Stride + i);
      dy += step;
      k += k_step;
      opaque(dy);
      opaque(k);
    }
    INVOLUTION_UNROLL
    for (int q = 0; q < K - Stride; ++q) leave(Positions * Stride + q);
  });
}

// The same for any kernel size, stride and dilation: tap by tap, dx loaded and stored for every product. The channels
// of a group from `channel` on, W at a time, the rest with vectors of half that width, and so on.
template <class S, int W>
__attribute__((noinline)) void adjoint_any_kernel(const Geometry& g, const AdjointSegment<S>& segment, Index positions,
                                                  Index channel) {
  using T = Compute<S>;
  using V = Vector<T, W>;
  const bool inside = segment.inside(g, positions);
  const Index step = segment.step, dx_step = g.stride[2] * step;
  for (; channel + W <= segment.group_channels; channel += W) {
    segment.for_each_kernel_row(g, [&](T* dx, const T* k) INVOLUTION_BODY {
      for (Index v = 0; v < g.kernel[2]; ++v) {
        const S* dy = segment.y + channel;
        T* out = dx + v * g.dilation[2] * step + channel;
        const T* weight = k + v;
        Index q = segment.start[2] + v * g.dilation[2];
        for (Index t = 0; t < positions; ++t) {
          if (inside || within(q, g.input[2])) store(out, load<V>(out) + load<V>(dy) * *weight);
          dy += step;
          out += dx_step;
          weight += segment.k_step;
          q += g.stride[2];
        }
      }
    });
  }
  if constexpr (W > 1) {
    if (channel < segment.group_channels) adjoint_any_kernel<S, W / 2>(g, segment, positions, channel);
  }
}

// The most output positions of a tile: as many as their window fits the registers.
template <int Stride>
constexpr int kTile = ceil_divide(kRegisters == 32 ? 14 : 7, Stride);

// A tile of exactly `positions` output positions, Positions or a half, a quarter ... of it. Returns how many channels
// of the group are done: whole vectors of them.
template <class S, int Positions, int K, int Stride>
INVOLUTION_INLINE Index adjoint_tiles(const Geometry& g, const AdjointSegment<S>& segment, Index positions) {
  constexpr int W = kLanes<Compute<S>>;
  if constexpr (Positions > 1) {
    if (positions < Positions) return adjoint_tiles<S, Positions / 2, K, Stride>(g, segment, positions);
  }
  const bool inside = segment.inside(g, Positions);
  Index channel = 0;
  for (; channel + W <= segment.group_channels; channel += W) {
    if (inside) adjoint_tile<S, W, Positions, K, Stride, true>(g, segment, channel);
    else adjoint_tile<S, W, Positions, K, Stride, false>(g, segment, channel);
  }
  return channel;
}

// All channels of a group at the segment's first `positions` output positions.
template <class S, int K, int Stride>
void adjoint_group(const Geometry& g, const AdjointSegment<S>& segment, Index positions) {
  Index channel = 0;
  if constexpr (K > 0) channel = adjoint_tiles<S, kTile<Stride>, K, Stride>(g, segment, positions);
  if (channel < segment.group_channels) adjoint_any_kernel<S, kLanes<Compute<S>>>(g, segment, positions, channel);
}

template <class S>
struct AdjointKernel {
  void (*group)(const Geometry&, const AdjointSegment<S>&, Index positions);
  Index tile;  // the most positions of a call; the others are a half, a quarter ... of it
};

template <class S, int K, int Stride>
constexpr AdjointKernel<S> kAdjoint{adjoint_group<S, K, Stride>, kTile<Stride>};

// The kernel for this kernel size and stride on the fast axis.
template <class S>
AdjointKernel<S> choose_adjoint(const Geometry& g) {
  const Index k = g.kernel[2], stride = g.stride[2];
  if (g.dilation[2] != 1 || stride > 2) return kAdjoint<S, 0, 1>;
  if (k == 7) return stride == 1 ? kAdjoint<S, 7, 1> : kAdjoint<S, 7, 2>;
  if (k == 5) return stride == 1 ? kAdjoint<S, 5, 1> : kAdjoint<S, 5, 2>;
  if (k == 3) return stride == 1 ? kAdjoint<S, 3, 1> : kAdjoint<S, 3, 2>;
  return kAdjoint<S, 0, 1>;
}

// One row of output positions in tiles, what is left of it in tiles of half the size, and so on; all groups of a tile
// before the next tile, in the order of the kernel map.
template <class S>
void adjoint_row(const Geometry& g, const AdjointKernel<S>& kernel, const S* dy, const S* k, Compute<S>* image, Index n,
                 Index row, Range groups) {
  const Index width = g.channels / g.groups, taps = volume(g.kernel), row_length = g.output[2];
  const Index k_step = g.groups * taps, rows = g.output[0] * g.output[1];
  TileWeights<S> weights;
  AdjointSegment<S> segment(g, row, 0, weights.step(k_step, taps));
  for (Index first = 0, positions = kernel.tile; first < row_length;) {
    if (first + positions > row_length) {
      positions /= 2;
      continue;
    }
    const Index position = (n * rows + row) * row_length + first;
    segment.start[2] = input_at(g, 2, first, 0);
    for (Index group = groups.first; group < groups.end; ++group) {
      prefetch_next_tile(k + position * k_step, positions * k_step, group, g.groups);
      segment.image = image + group * width;
      segment.k = weights.read(k + position * k_step + group * taps, k_step, taps, positions);
      segment.y = dy + position * g.channels + group * width;
      kernel.group(g, segment, positions);
    }
    first += positions;
  }
}

template <class S>
void adjoint_channels_last(const Geometry& g, const S* dy, const S* k, Compute<S>* dx) {
  const Index width = g.channels / g.groups, inputs = volume(g.input);
  const RowItems items(g, 1);  // a "row" is a whole image here
  const AdjointKernel<S> kernel = choose_adjoint<S>(g);
  parallel_for(worthwhile_threads(g), items.count(), [&](Index i) {
    const Index n = items.row(i);
    const Range groups = items.groups(i, g);
    Compute<S>* image = dx + n * inputs * g.channels;
    for (Index position = 0; !g.accumulate && position < inputs; ++position) {
      Compute<S>* here = image + position * g.channels;
      for (Index c = groups.first * width; c < groups.end * width; ++c) here[c] = 0;
    }
    for (Index row = 0; row < g.output[0] * g.output[1]; ++row) adjoint_row(g, kernel, dy, k, image, n, row, groups);
  });
}

// -------------------------------------------------------------------------------------------------- contiguous
// A gather as shifted rows: for every tap, a row of weights times a row of dy is added to a shifted row of dx. An item
// is a block of input rows of all channels of one group, so that a row of weights meets every channel while it is in
// cache.
template <class T>
void adjoint_contiguous(const Geometry& g, const T* dy, const T* k, T* dx) {
  const Index width = g.channels / g.groups, row_length = g.input[2], inputs = volume(g.input);
  const Index positions = volume(g.output), taps = volume(g.kernel);
  const RowBlocks blocks(g, g.input);
  parallel_for(worthwhile_threads(g), blocks.count(), [&](Index i) {
    const Index group = blocks.group(i), depth = blocks.depth(i);  // the group counts through all images
    const Range rows = blocks.rows(i);
    T* out = dx + group * width * inputs + depth * g.input[1] * row_length;
    for (Index c = 0; !g.accumulate && c < width; ++c) {
      for (Index j = rows.first * row_length; j < rows.end * row_length; ++j) out[c * inputs + j] = 0;
    }
    for (Index a = 0; a < g.kernel[0]; ++a) {
      const Index output_depth = output_at(g, 0, depth, a);
      if (output_depth < 0) continue;
      for (Index b = 0; b < g.kernel[1]; ++b) {
        for (Index v = 0; v < g.kernel[2]; ++v) {
          const Range js = outputs_of_tap(g, 2, v);
          const T* map = k + (group * taps + (a * g.kernel[1] + b) * g.kernel[2] + v) * positions;
          for (Index height = rows.first; height < rows.end; ++height) {
            const Index output_height = output_at(g, 1, height, b);
            if (output_height < 0) continue;
            const Index at = (output_depth * g.output[1] + output_height) * g.output[2];
            for (Index c = 0; c < width; ++c) {
              const T *in = dy + (group * width + c) * positions + at, *weights = map + at;
              T* row = out + c * inputs + height * row_length + input_at(g, 2, 0, v);
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

template <class S>
void adjoint(const Geometry& g, const S* dy, const S* k, Compute<S>* dx) {
  if constexpr (!kIs16Bit<S>) {
    if (!g.channels_last) return adjoint_contiguous(g, dy, k, dx);
  }
  adjoint_channels_last(g, dy, k, dx);
}

template void adjoint<float>(const Geometry&, const float*, const float*, float*);
template void adjoint<double>(const Geometry&, const double*, const double*, double*);
template void adjoint<Half>(const Geometry&, const Half*, const Half*, float*);
template void adjoint<BFloat16>(const Geometry&, const BFloat16*, const BFloat16*, float*);

}  // namespace INVOLUTION_ISA
}  // namespace involution
