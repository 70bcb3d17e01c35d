// Work partitioning of the operators: contiguous segments of output positions, tiles of them, items for the threads.
#pragma once
#include "geometry.h"
#include "half.h"

namespace involution {
namespace INVOLUTION_ISA {

// A contiguous segment of one output row, for one group, channels last. Pointers are at the group's first channel
// (image, y) or tap (k); k and y are at the segment's first output position.
template <class X, class K, class Y>
struct Segment {
  X* image;  // x or dx at input position (0, 0, 0) of the segment's image
  K* k;
  Y* y;                  // y or dy
  Index step;            // elements from one position to the next in x and y: the channels
  Index k_step;          // the same in k
  Index group_channels;  // channels of the group
  Range taps[2];         // the taps of the two slow axes that meet the input
  Index start[3];        // input position of tap (0, 0, 0) at the first output position

  // From position `first` of output row `row` on; output rows are counted through both slow axes.
  INVOLUTION_INLINE Segment(const Geometry& g, Index row, Index first, Index k_step)
      : step(g.channels), k_step(k_step), group_channels(g.channels / g.groups) {
    const Index at[3] = {row / g.output[1], row % g.output[1], first};
    for (int axis = 0; axis < 2; ++axis) taps[axis] = taps_of_output(g, axis, at[axis]);
    for (int axis = 0; axis < 3; ++axis) start[axis] = input_at(g, axis, at[axis], 0);
  }

  // Whether every tap of the fast axis is inside the input at the first `positions` output positions.
  INVOLUTION_INLINE bool inside(const Geometry& g, Index positions) const {
    const Index last = start[2] + (positions - 1) * g.stride[2] + (g.kernel[2] - 1) * g.dilation[2];
    return start[2] >= 0 && last < g.input[2];
  }

  // Calls body(input row, tap row) for every tap row that meets the input: pointers at tap 0 of the fast axis, at the
  // segment's first position.
  template <class F>
  INVOLUTION_INLINE void for_each_kernel_row(const Geometry& g, F&& body) const {
    for (Index a = taps[0].first; a < taps[0].end; ++a) {
      for (Index b = taps[1].first; b < taps[1].end; ++b) {
        const Index depth = start[0] + a * g.dilation[0], height = start[1] + b * g.dilation[1];
        body(image + ((depth * g.input[1] + height) * g.input[2] + start[2]) * step,
             k + (a * g.kernel[1] + b) * g.kernel[2]);
      }
    }
  }
};

template <class S>
using ApplySegment = Segment<const S, const Compute<S>, S>;

// apply on the first `count` positions of a segment; apply.cpp defines it, the fused layer calls it. k and y are moved.
template <class T>
void apply_segment(const Geometry&, ApplySegment<T>&, Index count);

// Prefetches a share of the next tile's kernel map while one group of this tile is computed. A tile's map has
// `elements` elements, and the next tile's follows it.
template <class S>
INVOLUTION_INLINE void prefetch_next_tile(const S* map, Index elements, Index group, Index groups) {
  const char* next = reinterpret_cast<const char*>(map + elements + elements / groups * group);
  for (Index byte = 0; byte < elements / groups * Index(sizeof(S)); byte += 64) __builtin_prefetch(next + byte);
}

// Channels last: items of work, each an output row of the batch; where these are few, some groups of an output row.
struct RowItems {
  Index rows, blocks, groups_per_block;

  INVOLUTION_INLINE RowItems(const Geometry& g, Index image_rows) : rows(g.batch * image_rows) {
    const Index wanted = rows >= 4 * g.threads ? 1 : min(g.groups, ceil_divide(4 * g.threads, rows));
    groups_per_block = ceil_divide(g.groups, wanted);
    blocks = ceil_divide(g.groups, groups_per_block);
  }
  INVOLUTION_INLINE Index count() const { return rows * blocks; }
  INVOLUTION_INLINE Index row(Index item) const { return item / blocks; }
  INVOLUTION_INLINE Range groups(Index item, const Geometry& g) const {
    const Index first = item % blocks * groups_per_block;
    return {first, min(g.groups, first + groups_per_block)};
  }
};

// Contiguous layout: items of work, each a block of image rows of one group's channels that fits the first-level cache.
struct RowBlocks {
  Index groups, depths, heights, row_tiles;  // groups of all images; `row_tiles` blocks to an image's `heights` rows

  INVOLUTION_INLINE RowBlocks(const Geometry& g, const int64_t (&sizes)[3])
      : groups(g.batch * g.groups), depths(sizes[0]), heights(sizes[1]) {
    const Index row = g.channels / g.groups * sizes[2], rows_in_cache = max(1, 4096 / row);
    const Index wanted = ceil_divide(4 * g.threads, groups * depths);  // for the threads
    row_tiles = min(heights, max(wanted, ceil_divide(heights, rows_in_cache)));
  }
  INVOLUTION_INLINE Index count() const { return groups * depths * row_tiles; }
  INVOLUTION_INLINE Index group(Index item) const { return item / row_tiles / depths; }
  INVOLUTION_INLINE Index depth(Index item) const { return item / row_tiles % depths; }
  INVOLUTION_INLINE Range rows(Index item) const { return part(item % row_tiles, row_tiles, heights); }
};

}  // namespace INVOLUTION_ISA
}  // namespace involution
