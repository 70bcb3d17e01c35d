// GEMM with packed weights, for the fused layer's 1x1 convolutions. Operands are assumed to be in cache; no cache
// blocking.
//
//     out [rows, columns] = a [rows, K] * b [K, columns] + bias [columns],  then an epilogue;  K: reduction dimension
//
//                          b, packed in panels of kPanel columns, each stored as [K][kPanel]
//
//                          panel 0        panel 1        panel 2 (padding columns may hold anything)
//                         +--------------+--------------+--------------+
//                         |              |              |       padding|
//                     K   |    |NR|      |              |       padding|
//                         |    |  |      |              |       padding|
//               K         +--------------+--------------+--------------+
//            +-------+         |  |
//            |       |
//     rows   |-------|         +--+
//            |   a   |  MR     |  |      the tile of a micro-kernel: the sums of MR rows and NR vectors of columns
//            |-------|         +--+
//            +-------+
//
// The sums of a tile stay in registers over the whole reduction. Each step loads NR vectors of b and broadcasts MR
// elements of a, for MR * NR multiply-adds.
#pragma once
#include "geometry.h"

namespace involution {
namespace INVOLUTION_ISA {

constexpr Index kPanel = 32;

template <class T>
struct Gemm {
  const T* a;
  Index lda, rows, reduction;  // lda: elements from one row of a to the next
  const T* b;                  // packed
  const T* bias;               // or null
  Index columns;
};

constexpr int kMR = kRegisters == 32 ? 14 : 6;
constexpr int kNR = 2;

// A GEMM epilogue says what is done with a tile's sums: `write` gets each vector of them after the whole reduction,
// `prefetch` is called before it. This one stores them, with or without ReLU.
template <class T, bool Relu>
struct StoreEpilogue {
  T* out;
  Index ldc;  // elements from one row of out to the next

  INVOLUTION_INLINE void prefetch(Index, Index, Index) const {}
  template <class V>
  INVOLUTION_INLINE void write(Index row, Index column, V sum) const {
    store(out + row * ldc + column, Relu ? rectified(sum) : sum);
  }
};

// One column of a: an element of each of MR matrix rows (at most 14), all in reach of few registers.
template <class T>
struct RowsOfA {
  const T *low, *high;
  Strided<T> distance;

  INVOLUTION_INLINE RowsOfA(const T* a, Index lda) : low(a), high(a + 7 * lda), distance(lda) {}
  INVOLUTION_INLINE T at(int i) const { return i < 7 ? distance.at(low, i) : distance.at(high, i - 7); }
  INVOLUTION_INLINE void next() {
    ++low;
    ++high;
    opaque(low);
    opaque(high);
  }
};

// The micro-kernel: outer products of a column of a and a matrix row of b, accumulated in MR x NR vectors of W lanes.
template <class T, int W, int MR, int NR, class Epilogue>
INVOLUTION_INLINE void micro_kernel(const Gemm<T>& gemm, Index row, Index column, const Epilogue& epilogue) {
  using V = Vector<T, W>;
  V sum[MR][NR];
  INVOLUTION_UNROLL
  for (int j = 0; j < NR; ++j) {
    const V start = gemm.bias ? load<V>(gemm.bias + column + j * W) : V{};
    INVOLUTION_UNROLL
    for (int i = 0; i < MR; ++i) sum[i][j] = start;
  }
  INVOLUTION_UNROLL
  for (int i = 0; i < MR; ++i) epilogue.prefetch(row + i, column, gemm.columns);
  RowsOfA<T> a(gemm.a + row * gemm.lda, gemm.lda);
  const T* b = gemm.b + column / kPanel * kPanel * gemm.reduction + column % kPanel;
  for (Index r = 0; r < gemm.reduction; ++r, b += kPanel, a.next()) {
    V weight[NR];
    INVOLUTION_UNROLL
    for (int j = 0; j < NR; ++j) {
      weight[j] = load<V>(b + j * W);
      pin_in_register(weight[j]);
    }
    INVOLUTION_UNROLL
    for (int i = 0; i < MR; ++i) {
      V broadcast = a.at(i) - V{};  // x - 0 is x, also for x = -0
      pin_in_register(broadcast);
      INVOLUTION_UNROLL
      for (int j = 0; j < NR; ++j) sum[i][j] += broadcast * weight[j];
    }
  }
  INVOLUTION_UNROLL
  for (int i = 0; i < MR; ++i) {
    INVOLUTION_UNROLL
    for (int j = 0; j < NR; ++j) epilogue.write(row + i, column + j * W, sum[i][j]);
  }
}

// NR vectors of columns for all matrix rows; where fewer than MR rows are left, tiles of half the size, and so on.
template <class T, int W, int MR, int NR, class Epilogue>
__attribute__((noinline)) void gemm_rows(const Gemm<T>& gemm, Index row, Index column, Epilogue epilogue) {
  for (; row + MR <= gemm.rows; row += MR) micro_kernel<T, W, MR, NR>(gemm, row, column, epilogue);
  if constexpr (MR > 1) {
    if (row < gemm.rows) gemm_rows<T, W, MR / 2, NR>(gemm, row, column, epilogue);
  }
}

// The columns from `column` on; what is left of them, with one vector, and then with vectors of half as many lanes, and
// so on.
template <class T, int W, int NR, class Epilogue>
INVOLUTION_INLINE void gemm_columns(const Gemm<T>& gemm, Index column, const Epilogue& epilogue) {
  constexpr int MR = W == kLanes<T> ? kMR : kMR / 2;  // the narrow ones are seldom used: less to compile
  for (; column + NR * W <= gemm.columns; column += NR * W) gemm_rows<T, W, MR, NR>(gemm, 0, column, epilogue);
  if constexpr (NR > 1) {
    gemm_columns<T, W, 1>(gemm, column, epilogue);
  } else if constexpr (W > 1) {
    if (column < gemm.columns) gemm_columns<T, W / 2, 1>(gemm, column, epilogue);
  }
}

template <class T, class Epilogue>
void run_gemm(const Gemm<T>& gemm, const Epilogue& epilogue) {
  gemm_columns<T, kLanes<T>, kNR>(gemm, 0, epilogue);
}

}  // namespace INVOLUTION_ISA
}  // namespace involution
