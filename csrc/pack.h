// Packing: copies between tensors and the kernels' order [channel][position] (or [tap][position]), in which one vector
// holds consecutive positions. Channels-last tensors are transposed in registers, block by block.
#pragma once
#include "geometry.h"
#include "half.h"

namespace involution {
namespace INVOLUTION_ISA {

// Elements from one position to the next in an image row of a tensor, and from one channel (or tap) to the next.
struct Steps {
  Index position, channel;
};

template <class V, int W, int Block, int... Lane>
INVOLUTION_INLINE void exchange_blocks(V& a, V& b, std::integer_sequence<int, Lane...>) {
  const V low = __builtin_shufflevector(a, b, (Lane & Block ? W + Lane - Block : Lane)...);
  b = __builtin_shufflevector(a, b, (Lane & Block ? W + Lane : Lane + Block)...);
  a = low;
}

// Transposes W x W elements in registers: log2(W) rounds exchange the off-diagonal blocks of 1, 2, 4 ... lanes between
// pairs of rows.
template <class T, int W, int Block = 1>
INVOLUTION_INLINE void transpose(Vector<T, W>* rows) {
  if constexpr (Block < W) {
    INVOLUTION_UNROLL
    for (int i = 0; i < W; ++i) {
      if (i & Block) continue;
      exchange_blocks<Vector<T, W>, W, Block>(rows[i], rows[i + Block], std::make_integer_sequence<int, W>{});
    }
    transpose<T, W, 2 * Block>(rows);
  }
}

// Packs `count` positions, every `stride`-th from `first` on, of one image row: to[channel * pitch + i]. Positions
// outside the row are zeros. For tensors that are [channel][position] already, a strided copy.
template <class T>
void pack_contiguous_row(const T* row, Steps steps, Index first, Index stride, Index row_length, Index count,
                         Index channels, T* to, Index pitch) {
  const Index begin = min(count, max(0, ceil_divide(-first, stride)));
  const Index end = max(begin, min(count, ceil_divide(row_length - first, stride)));
  row += first * steps.position;
  for (Index c = 0; c < channels; ++c, row += steps.channel, to += pitch) {
    for (Index i = 0; i < begin; ++i) to[i] = 0;
    if (stride == 1 && steps.position == 1) {
#pragma omp simd
      for (Index i = begin; i < end; ++i) to[i] = row[i];
    } else {
      for (Index i = begin; i < end; ++i) to[i] = row[i * stride * steps.position];
    }
    for (Index i = end; i < count; ++i) to[i] = 0;
  }
}

// Packs the same from either layout; 16-bit tensors must be channels last. There, blocks of W x W elements are
// transposed in registers; what is left of the channels, with half of W, and so on. A last block may write up to W - 1
// positions beyond `count`.
template <class S, int W>
__attribute__((noinline)) void pack_row(const S* row, Steps steps, Index first, Index stride, Index row_length,
                                        Index count, Index channels, Compute<S>* to, Index pitch) {
  using T = Compute<S>;
  if constexpr (!kIs16Bit<S>) {
    if (steps.channel != 1)
      return pack_contiguous_row(row, steps, first, stride, row_length, count, channels, to, pitch);
  }
  Index c = 0;
  for (; c + W <= channels; c += W) {
    for (Index block = 0; block < count; block += W) {
      Vector<T, W> v[W];
      const Index start = first + block * stride;
      const S* from = row + start * steps.position + c;
      const bool inside = start >= 0 && start + (W - 1) * stride < row_length;
      INVOLUTION_UNROLL
      for (int i = 0; i < W; ++i) {
        const bool exists = inside || within(start + i * stride, row_length);
        v[i] = exists ? load<Vector<T, W>>(from) : Vector<T, W>{};
        __builtin_prefetch(from + channels);  // the next group is packed next
        from += stride * steps.position;
        opaque(from);
      }
      transpose<T, W>(v);
      T* channel = to + c * pitch + block;
      INVOLUTION_UNROLL
      for (int i = 0; i < W; ++i) {
        store(channel, v[i]);
        channel += pitch;
        opaque(channel);
      }
    }
  }
  if constexpr (W > 1) {
    if (c < channels) {
      pack_row<S, W / 2>(row + c, steps, first, stride, row_length, count, channels - c, to + c * pitch, pitch);
    }
  }
}

// The reverse: writes sums [tap][position] of pitch W to `count` positions of the kernel map, or adds them to it.
// Channels last, blocks of Lanes x Lanes elements are transposed in registers; what is left of the taps, with half of
// Lanes, and so on.
template <class S, int W, int Lanes>
INVOLUTION_INLINE void unpack_blocks(const Compute<S>* sums, Index taps, Index count, bool add, S* dk, Steps steps) {
  using V = Vector<Compute<S>, Lanes>;
  Index u = 0;
  for (; u + Lanes <= taps; u += Lanes) {
    for (Index lane = 0; lane < count; lane += Lanes) {
      V v[Lanes];
      const Compute<S>* from = sums + u * W + lane;
      opaque(from);
      INVOLUTION_UNROLL
      for (int i = 0; i < Lanes; ++i) v[i] = load<V>(from + i * W);
      transpose<Compute<S>, Lanes>(v);
      S* to = dk + lane * steps.position + u;
      INVOLUTION_UNROLL
      for (int i = 0; i < Lanes; ++i) {
        __builtin_prefetch(to + taps, 1);  // the next group's taps
        if (lane + i < count) store(to, add ? load<V>(to) + v[i] : v[i]);
        to += steps.position;
        opaque(to);
      }
    }
  }
  if constexpr (Lanes > 1) {
    if (u < taps) unpack_blocks<S, W, Lanes / 2>(sums + u * W, taps - u, count, add, dk + u, steps);
  }
}

template <class S, int W>
__attribute__((noinline)) void unpack_sums(const Compute<S>* sums, Index taps, Index count, bool add, S* dk,
                                           Steps steps) {
  if constexpr (!kIs16Bit<S>) {
    if (steps.channel != 1) {
      for (Index u = 0; u < taps; ++u, sums += W, dk += steps.channel) {
        for (Index t = 0; t < count; ++t) dk[t] = add ? dk[t] + sums[t] : sums[t];
      }
      return;
    }
  }
  unpack_blocks<S, W, W>(sums, taps, count, add, dk, steps);
}

}  // namespace INVOLUTION_ISA
}  // namespace involution
