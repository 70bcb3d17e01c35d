// What the kernels need of a geometry: which taps and positions meet, tiles of positions, and work for the threads.
#pragma once
#ifdef _OPENMP
#include <omp.h>
#endif

#include "half.h"

namespace involution {
namespace INVOLUTION_ISA {

// S is how numbers are stored: float, double, Half or BFloat16.
template <class S>
void apply(const Geometry&, const S* x, const S* k, S* y);
template <class S, class T>
void adjoint(const Geometry&, const S* g, const S* k, T* dx);
template <class S>
void correlate(const Geometry&, const S* g, const S* x, S* dk);
template <class T>
void layer(const Geometry&, const involution_layer&);

INVOLUTION_INLINE constexpr Index least(Index a, Index b) { return a < b ? a : b; }
INVOLUTION_INLINE constexpr Index most(Index a, Index b) { return a > b ? a : b; }
INVOLUTION_INLINE Index floor_divide(Index a, Index b) { return a / b - (a % b < 0); }
INVOLUTION_INLINE Index ceil_divide(Index a, Index b) { return -floor_divide(-a, b); }
INVOLUTION_INLINE bool within(Index i, Index size) { return uint64_t(i) < uint64_t(size); }
INVOLUTION_INLINE Index volume(const int64_t (&sizes)[3]) { return sizes[0] * sizes[1] * sizes[2]; }

// A half-open range of indices.
struct Range {
  Index first, end;
};

// Part i of `parts` nearly equal parts of a range [0, size).
INVOLUTION_INLINE Range part(Index i, Index parts, Index size) { return {i * size / parts, (i + 1) * size / parts}; }

// What two ranges share; empty (and perhaps with its end before its first) where they share nothing.
INVOLUTION_INLINE Range both(Range a, Range b) { return {most(a.first, b.first), least(a.end, b.end)}; }

// The taps u of one axis that meet the input from output position o.
INVOLUTION_INLINE Range taps_of_output(const Geometry& g, int axis, Index o) {
  const Index start = o * g.stride[axis] - g.padding[axis], step = g.dilation[axis];
  return {most(0, ceil_divide(-start, step)), least(g.kernel[axis], ceil_divide(g.input[axis] - start, step))};
}

// The output positions o of one axis whose tap u meets the input.
INVOLUTION_INLINE Range outputs_of_tap(const Geometry& g, int axis, Index u) {
  const Index shift = u * g.dilation[axis] - g.padding[axis], step = g.stride[axis];
  return {most(0, ceil_divide(-shift, step)), least(g.output[axis], ceil_divide(g.input[axis] - shift, step))};
}

// One group's output positions in a row, channels last, with whatever lies under them. Pointers are at the group's first
// channel (x, y) or tap (k) of the first position.
template <class X, class K, class Y>
struct Run {
  X* image;  // the group's x (or dx) at position (0, 0, 0)
  K* k;
  Y* y;           // y or its gradient
  Index step;     // numbers from one position to the next in x and y: the channels
  Index k_step;   // the same in k
  Index width;    // channels of the group
  Range taps[2];  // the taps of the two slow axes that meet the input
  Index start[3]; // input position of tap (0, 0, 0) at the first output position

  // The run that starts at position `first` of output row `row`, of all the image's rows.
  INVOLUTION_INLINE Run(const Geometry& g, Index row, Index first, Index k_step)
      : step(g.channels), k_step(k_step), width(g.channels / g.groups) {
    const Index depth = row / g.output[1], height = row % g.output[1];
    taps[0] = taps_of_output(g, 0, depth);
    taps[1] = taps_of_output(g, 1, height);
    start[0] = depth * g.stride[0] - g.padding[0];
    start[1] = height * g.stride[1] - g.padding[1];
    start[2] = first * g.stride[2] - g.padding[2];
  }
};

// `count` output positions of one group, from the run's first on. Leaves `k` and `y` anywhere.
template <class T>
void apply_run(const Geometry&, Run<const T, const T, T>&, Index count);

// The output position that reads input position i through tap u, or -1.
INVOLUTION_INLINE Index output_at(const Geometry& g, int axis, Index i, Index u) {
  const Index reach = i + g.padding[axis] - u * g.dilation[axis];
  if (reach < 0 || reach % g.stride[axis] != 0) return -1;
  const Index o = reach / g.stride[axis];
  return o < g.output[axis] ? o : -1;
}

// Which of a parallel region's threads runs, from 0.
INVOLUTION_INLINE Index this_thread() {
#ifdef _OPENMP
  return omp_get_thread_num();
#else
  return 0;
#endif
}

// Calls body(0), ..., body(count - 1), each once, on the geometry's threads if they are worth waking.
template <class F>
INVOLUTION_INLINE void in_parallel(const Geometry& g, Index count, F&& body) {
  const Index multiply_adds = g.batch * g.channels * volume(g.output) * volume(g.kernel);
  const int threads = multiply_adds < 100000 ? 1 : int(g.threads);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (Index i = 0; i < count; ++i) body(i);
}

// Calls body(Constant<K>, Constant<S>) with the fast axis' kernel size and stride where there is a kernel specialised to
// them, and with 0, 0 elsewhere.
template <class F>
INVOLUTION_INLINE void with_kernel_size_and_stride(const Geometry& g, F&& body) {
  const Index k = g.kernel[2], s = g.stride[2];
  if (g.dilation[2] != 1 || s > 2) return body(Constant<0>{}, Constant<0>{});
  if (k == 7) return s == 1 ? body(Constant<7>{}, Constant<1>{}) : body(Constant<7>{}, Constant<2>{});
  if (k == 5) return s == 1 ? body(Constant<5>{}, Constant<1>{}) : body(Constant<5>{}, Constant<2>{});
  if (k == 3) return s == 1 ? body(Constant<3>{}, Constant<1>{}) : body(Constant<3>{}, Constant<2>{});
  return body(Constant<0>{}, Constant<0>{});
}

// Calls body(Constant<T>), T being the number of positions that one tile of such a row should have: as many sums as
// registers hold, no more than the row has, and little left over. Small kernels wait for memory and not for loads that
// more sums would share: for them the smaller tile measured a quarter faster.
template <class F>
INVOLUTION_INLINE void with_tile_size(Index row_length, Index kernel_size, F&& body) {
  if constexpr (kRegisters == 32) {
    const bool fits = ceil_divide(row_length, 14) * 14 <= ceil_divide(row_length, 7) * 7;
    if (kernel_size > 3 && row_length >= 14 && fits) return body(Constant<14>{});
  }
  if (row_length >= 7) return body(Constant<7>{});
  if (row_length >= 4) return body(Constant<4>{});
  if (row_length >= 2) return body(Constant<2>{});
  return body(Constant<1>{});
}

// Fetches into cache, while one group of a tile is at work, the same share of the kernel map of the next tile, which
// starts `numbers` further on.
template <class T>
INVOLUTION_INLINE void fetch_ahead(const T* tile, Index numbers, Index group, Index groups) {
  const char* next = reinterpret_cast<const char*>(tile + numbers + numbers / groups * group);
  for (Index byte = 0; byte < numbers / groups * Index(sizeof(T)); byte += 64) __builtin_prefetch(next + byte);
}

// Rows of one image that the threads share; where there are few, each row's groups are split into several items.
struct Items {
  Index rows, blocks, groups_per_block;

  INVOLUTION_INLINE Items(const Geometry& g, Index image_rows) : rows(g.batch * image_rows) {
    const Index wanted = rows >= 4 * g.threads ? 1 : least(g.groups, ceil_divide(4 * g.threads, rows));
    groups_per_block = ceil_divide(g.groups, wanted);
    blocks = ceil_divide(g.groups, groups_per_block);
  }
  INVOLUTION_INLINE Index count() const { return rows * blocks; }
  INVOLUTION_INLINE Index row(Index item) const { return item / blocks; }
  INVOLUTION_INLINE Range groups(Index item, const Geometry& g) const {
    const Index first = item % blocks * groups_per_block;
    return {first, least(g.groups, first + groups_per_block)};
  }
};

// Contiguous images in blocks of rows: one group's rows of all its channels, so many that the first cache holds them.
struct Blocks {
  Index groups, depths, heights, down;

  INVOLUTION_INLINE Blocks(const Geometry& g, const int64_t (&sizes)[3])
      : groups(g.batch * g.groups), depths(sizes[0]), heights(sizes[1]) {
    const Index row = g.channels / g.groups * sizes[2], kept = most(1, 4096 / row);
    const Index wanted = ceil_divide(4 * g.threads, groups * depths);  // for the threads
    down = least(heights, most(wanted, ceil_divide(heights, kept)));
  }
  INVOLUTION_INLINE Index count() const { return groups * depths * down; }
  INVOLUTION_INLINE Index group(Index item) const { return item / down / depths; }
  INVOLUTION_INLINE Index depth(Index item) const { return item / down % depths; }
  INVOLUTION_INLINE Range rows(Index item) const { return part(item % down, down, heights); }
};

}  // namespace INVOLUTION_ISA
}  // namespace involution
