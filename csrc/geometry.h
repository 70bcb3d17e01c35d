// Which taps, input positions and output positions of an involution meet, as ranges of indices.
#pragma once
#include "vector.h"

namespace involution {
namespace INVOLUTION_ISA {

INVOLUTION_INLINE constexpr Index min(Index a, Index b) { return a < b ? a : b; }
INVOLUTION_INLINE constexpr Index max(Index a, Index b) { return a > b ? a : b; }
INVOLUTION_INLINE constexpr Index floor_divide(Index a, Index b) { return a / b - (a % b < 0); }
INVOLUTION_INLINE constexpr Index ceil_divide(Index a, Index b) { return -floor_divide(-a, b); }
INVOLUTION_INLINE bool within(Index i, Index size) { return uint64_t(i) < uint64_t(size); }
INVOLUTION_INLINE Index volume(const int64_t (&sizes)[3]) { return sizes[0] * sizes[1] * sizes[2]; }

// A half-open range of indices; empty where `end` is not above `first`.
struct Range {
  Index first, end;
};

INVOLUTION_INLINE Index length(Range range) { return range.end - range.first; }
INVOLUTION_INLINE Range intersection(Range a, Range b) { return {max(a.first, b.first), min(a.end, b.end)}; }

// Part i of `parts` nearly equal parts of the range [0, size).
INVOLUTION_INLINE Range part(Index i, Index parts, Index size) { return {i * size / parts, (i + 1) * size / parts}; }

// The input position that output position o reads through tap u, on one axis; it may be outside the input.
INVOLUTION_INLINE Index input_at(const Geometry& g, int axis, Index o, Index u) {
  return o * g.stride[axis] + u * g.dilation[axis] - g.padding[axis];
}

// The output position that reads input position i through tap u, or -1.
INVOLUTION_INLINE Index output_at(const Geometry& g, int axis, Index i, Index u) {
  const Index distance = i + g.padding[axis] - u * g.dilation[axis];
  if (distance < 0 || distance % g.stride[axis] != 0) return -1;
  const Index o = distance / g.stride[axis];
  return o < g.output[axis] ? o : -1;
}

// The taps of one axis through which output position o reads the input.
INVOLUTION_INLINE Range taps_of_output(const Geometry& g, int axis, Index o) {
  const Index start = input_at(g, axis, o, 0), step = g.dilation[axis];
  return {max(0, ceil_divide(-start, step)), min(g.kernel[axis], ceil_divide(g.input[axis] - start, step))};
}

// The output positions of one axis that read the input through tap u.
INVOLUTION_INLINE Range outputs_of_tap(const Geometry& g, int axis, Index u) {
  const Index start = input_at(g, axis, 0, u), step = g.stride[axis];
  return {max(0, ceil_divide(-start, step)), min(g.output[axis], ceil_divide(g.input[axis] - start, step))};
}

}  // namespace INVOLUTION_ISA
}  // namespace involution
