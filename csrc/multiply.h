// A matrix product for the layer's pointwise parts: many positions times one weight matrix, all in cache.
#pragma once
#include "vector.h"

namespace involution {
namespace INVOLUTION_ISA {

// Positions x depth numbers times a depth x columns matrix, plus a bias. The matrix is packed: panels of kPanel columns,
// one after the other, each [depth][kPanel], the last one filled up with anything. So the weights are read as they lie.
constexpr Index kPanel = 32;

template <class T>
struct Product {
  const T* in;
  Index in_step, positions;  // from one position's numbers to the next one's; how many
  Index depth;
  const T* weight;           // packed
  const T* bias;             // [columns], or null
};

// How many positions and vectors of columns have their sums in registers at once.
constexpr int kPositionsAtOnce = kRegisters == 32 ? 14 : 6;
constexpr int kVectorsAtOnce = 2;

// Numbers at `Count` equal distances, at most 14 of them, in reach of few registers.
template <class T, int Count>
struct Column {
  const T *low, *high;
  Strided<T> distance;

  INVOLUTION_INLINE Column(const T* base, Index step) : low(base), high(base + 7 * step), distance(step) {}
  template <int I>
  INVOLUTION_INLINE T at() const {
    static_assert(I < Count && Count <= 14);
    if constexpr (I < 7) return distance.template at<I>(low);
    else return distance.template at<I - 7>(high);
  }
  INVOLUTION_INLINE void next() {
    ++low;
    ++high;
    hide(low);
    hide(high);
  }
};

// What a product is for: `take` gets every finished vector, and `expect` hears of it when its sum begins, so that memory
// that it will meet can be fetched meanwhile.
template <class F>
struct Taker {
  F take;
  INVOLUTION_INLINE void expect(Index, Index) const {}
};
template <class F>
Taker(F) -> Taker<F>;

// The sums of Positions positions and V vectors of W columns.
template <class T, int W, int V, int Positions, class F>
INVOLUTION_INLINE void multiply_tile(const Product<T>& p, Index position, Index column, const F& taker) {
  using Vec = Vector<T, W>;
  Vec sum[Positions][V];
  unroll<V>([&](auto v) INVOLUTION_BODY {
    const Vec start = p.bias ? load<Vec>(p.bias + column + v * W) : Vec{};
    unroll<Positions>([&](auto t) INVOLUTION_BODY { sum[t][v] = start; });
  });
  unroll<Positions>([&](auto t) INVOLUTION_BODY { taker.expect(position + t, column); });
  Column<T, Positions> in(p.in + position * p.in_step, p.in_step);
  const T* weight = p.weight + column / kPanel * kPanel * p.depth + column % kPanel;
  for (Index r = 0; r < p.depth; ++r, weight += kPanel, in.next()) {
    Vec w[V];
    unroll<V>([&](auto v) INVOLUTION_BODY {
      w[v] = load<Vec>(weight + v * W);
      keep(w[v]);
    });
    unroll<Positions>([&](auto t) INVOLUTION_BODY {
      Vec here = in.template at<t.value>() - Vec{};  // x - 0 is x, even for x = -0
      keep(here);
      unroll<V>([&](auto v) INVOLUTION_BODY { sum[t][v] += here * w[v]; });
    });
  }
  unroll<Positions>([&](auto t) INVOLUTION_BODY {
    unroll<V>([&](auto v) INVOLUTION_BODY { taker.take(position + t, column + v * W, sum[t][v]); });
  });
}

// All positions of V vectors of columns; where fewer than Positions are left, tiles of half the size, and so on.
template <class T, int W, int V, int Positions, class F>
__attribute__((noinline)) void multiply_positions(const Product<T>& p, Index position, Index column, F taker) {
  for (; position + Positions <= p.positions; position += Positions) {
    multiply_tile<T, W, V, Positions>(p, position, column, taker);
  }
  if constexpr (Positions > 1) {
    if (position < p.positions) multiply_positions<T, W, V, Positions / 2>(p, position, column, taker);
  }
}

// Columns [column, end) of one panel. The vectors get narrower at the end.
template <class T, int W, int V, class F>
INVOLUTION_INLINE void multiply_panel(const Product<T>& p, Index column, Index end, const F& taker) {
  for (; column + V * W <= end; column += V * W) {
    multiply_positions<T, W, V, kPositionsAtOnce>(p, 0, column, taker);
  }
  if constexpr (V > 1) {
    if (column < end) multiply_panel<T, W, 1>(p, column, end, taker);
  } else if constexpr (W > 1) {
    if (column < end) multiply_panel<T, W / 2, 1>(p, column, end, taker);
  }
}

// taker.take(position, column, vector) for all positions and the columns [first, end); first begins a panel.
template <class T, class F>
void multiply(const Product<T>& p, Index first, Index end, const F& taker) {
  for (; first < end; first += kPanel) {
    multiply_panel<T, kLanes<T>, kVectorsAtOnce>(p, first, end < first + kPanel ? end : first + kPanel, taker);
  }
}

}  // namespace INVOLUTION_ISA
}  // namespace involution
