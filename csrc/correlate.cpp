// correlate: dk[n, g, u, o] = sum over the channels c of group g of g[n, c, o] * x[n, c, o*stride + u*dilation - padding]
#include "geometry.h"

namespace involution {
namespace INVOLUTION_ISA {
namespace {

// ------------------------------------------------------------------------------------------------ channels last
// Every tap is a dot product over the group's channels. B taps are multiplied at a time, B vectors of W lanes, and the
// lanes of all of them are added up together by a tree of shuffles that ends with one vector of B dot products.

// The B sums over lanes of B vectors, B and W powers of two, B <= W. Each step joins two vectors that hold sums for
// `Block` taps each, repeated along the lanes, into one that holds twice as many.
template <class V, int W, int Block, int... Lane>
INVOLUTION_INLINE V join(V a, V b, std::integer_sequence<int, Lane...>) {
  return __builtin_shufflevector(a, b, (Lane / Block % 2 ? W + Lane - Block : Lane)...) +
         __builtin_shufflevector(a, b, (Lane / Block % 2 ? W + Lane : Lane + Block)...);
}

template <class T, int W, int B, int Block = 1>
INVOLUTION_INLINE Vector<T, W> join_all(const Vector<T, W>* v) {
  using V = Vector<T, W>;
  if constexpr (B == 1) {
    return v[0];
  } else {
    V half[B / 2];
    unroll<B / 2>([&](auto i) INVOLUTION_BODY {
      half[i] = join<V, W, Block>(v[2 * i], v[2 * i + 1], std::make_integer_sequence<int, W>{});
    });
    return join_all<T, W, B / 2, 2 * Block>(half);
  }
}

// Adds the upper half of the lanes to the lower until B are left.
template <class T, int W, int B>
INVOLUTION_INLINE Vector<T, B> fold(Vector<T, W> v) {
  if constexpr (W == B) {
    return v;
  } else {
    Vector<T, W / 2> halves[2];
    __builtin_memcpy(halves, &v, sizeof v);
    return fold<T, W / 2, B>(halves[0] + halves[1]);
  }
}

// A run of taps at one position: where their x lie, counted from the image's first number, and which are outside.
struct Taps {
  static constexpr Index kMost = 64;
  Index count, outside;         // how many, and how many of them are outside
  Index offset[kMost];          // 0 for a tap outside: its product is formed, then replaced by 0
  Index outside_index[kMost];
};

inline void find_taps(const Geometry& g, Index first, Index depth, Index height, Index position, Taps& taps) {
  taps.count = least(Taps::kMost, volume(g.kernel) - first);
  taps.outside = 0;
  for (Index i = 0; i < taps.count; ++i) {
    const Index u = first + i;
    const Index d = depth * g.stride[0] - g.padding[0] + u / (g.kernel[1] * g.kernel[2]) * g.dilation[0];
    const Index h = height * g.stride[1] - g.padding[1] + u / g.kernel[2] % g.kernel[1] * g.dilation[1];
    const Index w = position * g.stride[2] - g.padding[2] + u % g.kernel[2] * g.dilation[2];
    const bool inside = within(d, g.input[0]) && within(h, g.input[1]) && within(w, g.input[2]);
    taps.offset[i] = inside ? ((d * g.input[1] + h) * g.input[2] + w) * g.channels : 0;
    if (!inside) taps.outside_index[taps.outside++] = i;
  }
}

// The dot products of one position's gradient with the x of B taps, W channels at a time.
template <class T, int W, int B>
INVOLUTION_INLINE void correlate_block(const T* grad, const T* x, const Index* offset, Index channels, T* dk) {
  using V = Vector<T, W>;
  V product[B] = {};
  Index c = 0;
  for (; c + W <= channels; c += W) {
    V here = load<V>(grad + c);
    keep(here);
    unroll<B>([&](auto i) INVOLUTION_BODY { product[i] += here * load<V>(x + offset[i] + c); });
  }
  store(dk, fold<T, W, B>(join_all<T, W, B>(product)));
  for (; c < channels; ++c) {
    for (Index i = 0; i < B; ++i) dk[i] += grad[c] * x[offset[i] + c];
  }
}

// `count` taps, B at a time, the rest in blocks of half that size, and so on.
template <class T, int W, int B>
INVOLUTION_INLINE void correlate_blocks(const T* grad, const T* x, const Index* offset, Index count, Index channels, T* dk) {
  for (; count >= B; count -= B, offset += B, dk += B) correlate_block<T, W, B>(grad, x, offset, channels, dk);
  if constexpr (B > 1) {
    if (count > 0) correlate_blocks<T, W, B / 2>(grad, x, offset, count, channels, dk);
  }
}

// One row of output positions.
template <class T, int W>
void correlate_row(const Geometry& g, const T* grad, const T* x, T* dk, Index row, Range groups) {
  const Index width = g.channels / g.groups, taps_in_all = volume(g.kernel), row_length = g.output[2];
  const Index n = row / (g.output[0] * g.output[1]);
  const Index depth = row / g.output[1] % g.output[0], height = row % g.output[1];
  const T* image = x + n * volume(g.input) * g.channels;
  // Between these positions the same taps are outside, and x moves on by the stride.
  const Index first_whole = least(row_length, ceil_divide(g.padding[2], g.stride[2]));
  const Index reach = (g.kernel[2] - 1) * g.dilation[2] - g.padding[2];
  const Index end_whole = ceil_divide(g.input[2] - reach, g.stride[2]);
  for (Index first = 0; first < taps_in_all; first += Taps::kMost) {
    Taps taps;
    for (Index position = 0; position < row_length; ++position) {
      const bool whole = position >= first_whole && position < end_whole;
      if (!whole || position == first_whole) find_taps(g, first, depth, height, position, taps);
      const T* from = image + (whole ? (position - first_whole) * g.stride[2] * g.channels : 0);
      const Index at = row * row_length + position;
      for (Index group = groups.first; group < groups.end; ++group) {
        T* out = dk + (at * g.groups + group) * taps_in_all + first;
        const T* gradient = grad + at * g.channels + group * width;
        correlate_blocks<T, W, W>(gradient, from + group * width, taps.offset, taps.count, width, out);
        for (Index i = 0; i < taps.outside; ++i) out[taps.outside_index[i]] = 0;
      }
    }
  }
}

// The widest vector that a group fills.
template <class T, int W>
void correlate_channels_last(const Geometry& g, const T* grad, const T* x, T* dk) {
  if constexpr (W > 1) {
    if (g.channels / g.groups < W) return correlate_channels_last<T, W / 2>(g, grad, x, dk);
  }
  const Items items(g, g.output[0] * g.output[1]);
  in_parallel(g, items.count(), [&](Index i) {
    correlate_row<T, W>(g, grad, x, dk, items.row(i), items.groups(i, g));
  });
}

// -------------------------------------------------------------------------------------------------- contiguous
// One output row of one tap at a time: every channel of the group adds its products.
template <class T>
void correlate_contiguous(const Geometry& g, const T* grad, const T* x, T* dk) {
  const Index width = g.channels / g.groups, rows = g.output[0] * g.output[1], row_length = g.output[2];
  const Index positions = volume(g.output), taps = volume(g.kernel);
  in_parallel(g, g.batch * g.groups * rows, [&](Index i) {
    const Index group = i / rows, depth = i % rows / g.output[1], height = i % g.output[1];  // group of all images
    const T* gradients = grad + group * width * positions + i % rows * row_length;
    for (Index u = 0; u < taps; ++u) {
      const Index v = u % g.kernel[2];
      const Index d = depth * g.stride[0] - g.padding[0] + u / (g.kernel[1] * g.kernel[2]) * g.dilation[0];
      const Index h = height * g.stride[1] - g.padding[1] + u / g.kernel[2] % g.kernel[1] * g.dilation[1];
      T* row = dk + (group * taps + u) * positions + i % rows * row_length;
      for (Index j = 0; j < row_length; ++j) row[j] = 0;
      if (!within(d, g.input[0]) || !within(h, g.input[1])) continue;
      const Range js = outputs_of_tap(g, 2, v);
      for (Index c = 0; c < width; ++c) {
        const T* in = x + (group * width + c) * volume(g.input) + (d * g.input[1] + h) * g.input[2] +
                      v * g.dilation[2] - g.padding[2];
        const T* gradient = gradients + c * positions;
        if (g.stride[2] == 1) {
#pragma omp simd
          for (Index j = js.first; j < js.end; ++j) row[j] += gradient[j] * in[j];
        } else {
          for (Index j = js.first; j < js.end; ++j) row[j] += gradient[j] * in[j * g.stride[2]];
        }
      }
    }
  });
}

}  // namespace

template <class T>
void correlate(const Geometry& g, const T* grad, const T* x, T* dk) {
  if (!g.channels_last) return correlate_contiguous(g, grad, x, dk);
  correlate_channels_last<T, kLanes<T>>(g, grad, x, dk);
}

template void correlate(const Geometry&, const float*, const float*, float*);
template void correlate(const Geometry&, const double*, const double*, double*);

}  // namespace INVOLUTION_ISA
}  // namespace involution
