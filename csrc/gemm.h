// GEMM with packed weights, for the fused layer's 1x1 convolutions: all operands are in cache.
//
//     out [rows, columns] = a [rows, depth] * b [depth, columns] + bias [columns],  then an epilogue
//
//                    b, packed: one panel of kPanel columns after another, each [depth][kPanel]
//
//                     panel 0             panel 1             panel 2 (columns beyond b's: anything)
//                    +-------------------+-------------------+------------------+
//            depth   | row r: 32 columns | row r: 32 columns | row r: 7 .......  |
//                    +-------------------+-------------------+------------------+
//              depth        NR vectors
//            +-------+      +-------+
//     rows   |       |   MR | tile  |     a micro-kernel holds the sums of MR rows and NR vectors of columns in registers
//            |   a   |      +-------+     while r runs over the depth: one load of b per vector and one broadcast of a per
//            |       |                    row give MR * NR multiply-adds
//            +-------+
#pragma once
#include "geometry.h"

namespace involution {
namespace INVOLUTION_ISA {

constexpr Index kPanel = 32;

template <class T>
struct Gemm {
  const T* a;
  Index lda, rows, depth;  // lda: elements from one row of a to the next
  const T* b;              // packed
  const T* bias;           // or null
  Index columns;
};

constexpr int kMR = kRegisters == 32 ? 14 : 6;
constexpr int kNR = 2;

// What is done with finished sums: out = relu(sum + shortcut), each part where it is wanted.
template <class T>
struct Epilogue {
  T* out;
  Index ldc;                    // elements from one row of out, and of the shortcut, to the next
  bool relu = false;
  const T* shortcut = nullptr;
  T* copy = nullptr;            // a second place for the result
  Index copy_ldc = 0;
  bool prefetch = false;        // out and shortcut, which are in memory, while the sums are computed
  bool stream = false;          // out is written past the cache

  INVOLUTION_INLINE void prefetch_rows(Index row, Index rows, Index column, Index columns) const {
    if (!prefetch) return;
    for (Index t = row; t < row + rows; ++t) {
      for (Index c = column; c < min(column + kPanel, columns); c += 64 / Index(sizeof(T))) {
        if (shortcut) __builtin_prefetch(shortcut + t * ldc + c);
        if (!stream) __builtin_prefetch(out + t * ldc + c, 1);
      }
    }
  }
  template <class V>
  INVOLUTION_INLINE void write(Index row, Index column, V sum) const {
    const Index at = row * ldc + column;
    if (shortcut) sum += load<V>(shortcut + at);
    if (relu) sum = rectified(sum);
    if (stream) INVOLUTION_ISA::stream(out + at, sum);
    else store(out + at, sum);
    if (copy) store(copy + row * copy_ldc + column, sum);
  }
  template <int MR, int NR, class V>
  INVOLUTION_INLINE void write_tile(Index row, Index column, const V (&sum)[MR][NR]) const {
    constexpr Index W = kLanes<T>;
    const bool plain = !relu && !shortcut && !copy && !stream;
    INVOLUTION_UNROLL
    for (int i = 0; i < MR * NR; ++i) {
      const Index t = row + i / NR, c = column + i % NR * W;
      if (plain) store(out + t * ldc + c, sum[i / NR][i % NR]);
      else write(t, c, sum[i / NR][i % NR]);
    }
  }
  // The first `count` columns of rows whose sums are `pitch` elements apart, W at a time, then W / 2, and so on.
  template <int W>
  __attribute__((noinline)) void write_columns(Index row, Index rows, Index column, Index count, const T* sums,
                                               Index pitch) const {
    Index done = 0;
    for (; done + W <= count; done += W) {
      for (Index t = 0; t < rows; ++t) write(row + t, column + done, load<Vector<T, W>>(sums + t * pitch + done));
    }
    if constexpr (W > 1) {
      if (done < count) write_columns<W / 2>(row, rows, column + done, count - done, sums + done, pitch);
    }
  }
};

// One column of a: an element of each of MR rows (at most 14), all in reach of few registers.
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

// The first lanes of a vector; the others are zero.
template <class V, class T>
__attribute__((noinline)) V load_lanes(const T* from, Index lanes) {
  V v{};
  for (Index i = 0; i < lanes; ++i) v[i] = from[i];
  return v;
}

// The micro-kernel: outer products of a column of a and a row of b, accumulated in MR x NR vectors. The last vector may
// reach beyond the columns; what it has there is not written.
template <class T, int MR, int NR>
INVOLUTION_INLINE void micro_kernel(const Gemm<T>& gemm, Index row, Index column, const Epilogue<T>& epilogue) {
  constexpr Index W = kLanes<T>;
  using V = Vector<T, W>;
  const Index columns = min(NR * W, gemm.columns - column);
  V sum[MR][NR];
  INVOLUTION_UNROLL
  for (int j = 0; j < NR; ++j) {
    V start{};
    if (gemm.bias) {
      const T* bias = gemm.bias + column + j * W;
      if (j * W + W <= columns) start = load<V>(bias);
      else start = load_lanes<V>(bias, columns - j * W);
    }
    INVOLUTION_UNROLL
    for (int i = 0; i < MR; ++i) sum[i][j] = start;
  }
  epilogue.prefetch_rows(row, MR, column, gemm.columns);
  RowsOfA<T> a(gemm.a + row * gemm.lda, gemm.lda);
  const T* b = gemm.b + column / kPanel * kPanel * gemm.depth + column % kPanel;
  for (Index r = 0; r < gemm.depth; ++r, b += kPanel, a.next()) {
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
  if (columns == NR * W) return epilogue.write_tile(row, column, sum);
  T sums[MR * NR * W];
  INVOLUTION_UNROLL
  for (int i = 0; i < MR * NR; ++i) store(sums + i * W, sum[i / NR][i % NR]);
  epilogue.template write_columns<int(W)>(row, MR, column, columns, sums, NR * W);
}

// NR vectors of columns for all rows; where fewer than MR rows are left, tiles of half the size, and so on.
template <class T, int MR, int NR>
__attribute__((noinline)) void gemm_rows(const Gemm<T>& gemm, Index row, Index column, const Epilogue<T>& epilogue) {
  for (; row + MR <= gemm.rows; row += MR) micro_kernel<T, MR, NR>(gemm, row, column, epilogue);
  if constexpr (MR > 1) {
    if (row < gemm.rows) gemm_rows<T, MR / 2, NR>(gemm, row, column, epilogue);
  }
}

template <class T>
void run_gemm(const Gemm<T>& gemm, const Epilogue<T>& epilogue) {
  constexpr Index W = kLanes<T>;
  for (Index column = 0; column < gemm.columns; column += kNR * W) {
    if (gemm.columns - column > W) gemm_rows<T, kMR, kNR>(gemm, 0, column, epilogue);
    else gemm_rows<T, kMR, 1>(gemm, 0, column, epilogue);
  }
}

}  // namespace INVOLUTION_ISA
}  // namespace involution
