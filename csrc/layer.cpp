// The fused layer: a kernel map is generated and applied for one patch of output positions at a time, so that it never
// leaves the cache, together with the pointwise steps before and after it (involution.h lists them).
//
//     input --- pool --- reduce (GEMM) --- hidden --- span (GEMM) --- kernel map of some groups
//       |                                                                |
//       +------------------------------------------------------------- apply --- y --- scale, shift, ReLU --- output
//                                                                                          |
//              next_reduce_output --- next_reduce (GEMM) --- output --- + shortcut --- expand (GEMM)
#include "gemm.h"
#include "parallel.h"
#include "tiles.h"

namespace involution {
namespace INVOLUTION_ISA {
namespace {

// How the output is cut into patches, and the workspace of one patch.
//
//     down = 3, across = 1: whole rows             down = rows, across = 2: parts of long rows
//     +-----------------+                          +--------+--------+
//     | 0   0   0   0   |                          | 0      | 1      |
//     | 0   0   0   0   |                          +--------+--------+
//     +-----------------+                          | 2      | 3      |
//     | 1   1   1   1   |                          +--------+--------+
//     ...                                          ...
struct PatchPlan {
  // A patch's positions; the elements of the kernel map generated at once, which stay in a core's cache; and the
  // elements of an output that stays in no cache.
  static constexpr Index kPositions = 56, kMapElements = 48 * 1024, kStreamedElements = 4 << 20;

  Index down, across;                    // parts of an image's rows, and of one row
  Index groups_at_once;                  // whose kernels are generated together
  Index hidden, pooled, map, y, output;  // elements of workspace
  Index output_step;                     // from one position's output to the next one's in workspace
  bool pools;                            // the hidden features are made from averages
  bool streams;                          // the output is written past the cache

  PatchPlan(const Geometry& g, const involution_fused_layer& layer) {
    const Index rows = g.output[0] * g.output[1], taps = volume(g.kernel);
    across = ceil_divide(g.output[2], kPositions);
    down = across > 1 ? rows : ceil_divide(rows, max(1, kPositions / g.output[2]));
    if (g.batch * down * across < 4 * g.threads) down = min(rows, ceil_divide(down, g.threads) * g.threads);
    const Index positions = ceil_divide(rows, down) * ceil_divide(g.output[2], across);
    groups_at_once = 1;
    while (2 * groups_at_once <= g.groups && positions * 2 * groups_at_once * taps <= kMapElements) groups_at_once *= 2;
    hidden = layer.hidden ? 0 : in_lines(positions * layer.hidden_channels);
    pools = !layer.hidden && max(g.stride[0], max(g.stride[1], g.stride[2])) > 1;
    pooled = pools ? in_lines(positions * g.channels) : 0;
    map = in_lines(positions * (ceil_divide(groups_at_once * taps, kPanel) + 1) * kPanel);
    y = in_lines(positions * g.channels);
    output_step = layer.expand_channels + 16;  // at a power of two all positions would share few sets of the cache
    output = layer.next_reduce_weight ? in_lines(positions * output_step) : 0;
    const Index channels = layer.expand_weight ? layer.expand_channels : g.channels;
    streams = channels % 16 == 0 && reinterpret_cast<uintptr_t>(layer.output) % 64 == 0 &&
              g.batch * volume(g.output) * channels >= kStreamedElements;
  }
  Index count(const Geometry& g) const { return g.batch * down * across; }
  Index workspace() const { return hidden + pooled + map + y + output; }
  static Index in_lines(Index elements) { return ceil_divide(elements, 16) * 16; }
};

// One patch: `count` output positions, contiguous in memory, from `position` of the batch on.
struct Patch {
  Index n;
  Range rows, columns;  // of the output; rows count through the two slow axes
  Index position, count;

  Patch(const Geometry& g, const PatchPlan& plan, Index item) {
    const Index image_rows = g.output[0] * g.output[1];
    n = item / plan.across / plan.down;
    rows = part(item / plan.across % plan.down, plan.down, image_rows);
    columns = part(item % plan.across, plan.across, g.output[2]);
    position = (n * image_rows + rows.first) * g.output[2] + columns.first;
    count = length(rows) * length(columns);
  }
};

// Average pooling with windows of the stride's size, cut off at the image's end, for `count` positions of an output
// row.
template <class T>
void pool(const Geometry& g, const T* image, Index row, Index first, Index count, T* pooled) {
  Range window[3];
  const Index at[3] = {row / g.output[1], row % g.output[1], first};
  const auto set_window = [&](int axis, Index o) {
    window[axis] = {o * g.stride[axis], min(g.input[axis], (o + 1) * g.stride[axis])};
  };
  set_window(0, at[0]);
  set_window(1, at[1]);
  for (Index o = first; o < first + count; ++o, pooled += g.channels) {
    set_window(2, o);
    for (Index c = 0; c < g.channels; ++c) pooled[c] = 0;
    for (Index d = window[0].first; d < window[0].end; ++d) {
      for (Index h = window[1].first; h < window[1].end; ++h) {
        for (Index w = window[2].first; w < window[2].end; ++w) {
          const T* x = image + ((d * g.input[1] + h) * g.input[2] + w) * g.channels;
#pragma omp simd
          for (Index c = 0; c < g.channels; ++c) pooled[c] += x[c];
        }
      }
    }
    const T factor = T(1) / T(length(window[0]) * length(window[1]) * length(window[2]));
#pragma omp simd
    for (Index c = 0; c < g.channels; ++c) pooled[c] *= factor;
  }
}

// relu(x / sqrt(mean square of x + eps)), in place.
template <class T>
void rms_norm_relu(T* x, Index channels, double eps) {
  constexpr int W = kLanes<T>;
  Vector<T, W> sums{};
  Index c = 0;
  for (; c + W <= channels; c += W) {
    const auto v = load<Vector<T, W>>(x + c);
    sums += v * v;
  }
  T sum = 0;
  for (int i = 0; i < W; ++i) sum += sums[i];
  for (; c < channels; ++c) sum += x[c] * x[c];
  const T factor = T(1) / T(__builtin_sqrt(double(sum / T(channels)) + eps));
#pragma omp simd
  for (Index i = 0; i < channels; ++i) {
    const T v = x[i] * factor;
    x[i] = v < 0 ? T(0) : v;  // NaN stays NaN
  }
}

// Of the expand convolution: adds the shortcut, applies ReLU, writes the output, past the cache if it is large, and
// copies it to where the next block's convolution reads it.
template <class T, bool Streams>
struct ExpandEpilogue {
  T* output;
  const T* shortcut;  // or null
  Index channels;
  bool relu;
  T* copy;  // or null
  Index copy_step;

  INVOLUTION_INLINE void prefetch(Index t, Index column, Index columns) const {
    for (Index c = column; c < min(column + kPanel, columns); c += 64 / Index(sizeof(T))) {
      if (shortcut) __builtin_prefetch(shortcut + t * channels + c);
      if (!Streams) __builtin_prefetch(output + t * channels + c, 1);
    }
  }
  template <class V>
  INVOLUTION_INLINE void write(Index t, Index c, V sum) const {
    if (shortcut) sum += load<V>(shortcut + t * channels + c);
    if (relu) sum = rectified(sum);
    if (Streams) stream(output + t * channels + c, sum);
    else store(output + t * channels + c, sum);
    if (copy) store(copy + t * copy_step + c, sum);
  }
};

template <class T>
struct FusedLayer {
  const Geometry& g;
  const involution_fused_layer& layer;
  const PatchPlan plan;

  static const T* elements(const void* tensor) { return static_cast<const T*>(tensor); }

  // One patch, from the input to the output.
  void run(const Patch& patch, T* workspace) const {
    const T* image = elements(layer.input) + patch.n * volume(g.input) * g.channels;
    const T* hidden = elements(layer.hidden) + patch.position * layer.hidden_channels;
    if (!layer.hidden) hidden = reduce(image, patch, workspace);
    T* map = workspace + plan.hidden + plan.pooled;
    T* y = map + plan.map;
    prefetch_rows_below(image, patch);
    for (Index group = 0; group < g.groups; group += plan.groups_at_once) {
      const Range groups = {group, min(g.groups, group + plan.groups_at_once)};
      const Range generated = span(hidden, patch.count, groups, map);
      aggregate(image, map, generated, patch, groups, y);
    }
    if (layer.expand_weight) {
      if (layer.scale || layer.relu) finish(y, y, patch.count, false);
      expand(y, patch);
    } else {
      finish(y, static_cast<T*>(layer.output) + patch.position * g.channels, patch.count, plan.streams);
    }
    if (plan.streams) stream_fence();
  }

  // [count, R]: the generator's hidden features.
  const T* reduce(const T* image, const Patch& patch, T* workspace) const {
    T *hidden = workspace, *pooled = workspace + plan.hidden;
    const T* in = elements(layer.input) + patch.position * g.channels;
    if (plan.pools) {
      const Index columns = length(patch.columns);
      for (Index row = patch.rows.first; row < patch.rows.end; ++row) {
        pool(g, image, row, patch.columns.first, columns, pooled + (row - patch.rows.first) * columns * g.channels);
      }
      in = pooled;
    }
    const Index channels = layer.hidden_channels;
    const Gemm<T> gemm{
        in, g.channels, patch.count, g.channels, elements(layer.reduce_weight), elements(layer.reduce_bias), channels};
    if (layer.rms_eps > 0) {
      run_gemm(gemm, StoreEpilogue<T, false>{hidden, channels});
      for (Index t = 0; t < patch.count; ++t) rms_norm_relu(hidden + t * channels, channels, layer.rms_eps);
    } else {
      run_gemm(gemm, StoreEpilogue<T, true>{hidden, channels});
    }
    return hidden;
  }

  // The kernels of some groups at `count` positions, as [count, columns]: whole panels of the span's columns, which are
  // returned.
  Range span(const T* hidden, Index count, Range groups, T* map) const {
    const Index taps = volume(g.kernel), depth = layer.hidden_channels;
    const Range columns = {groups.first * taps / kPanel * kPanel,
                           min(ceil_divide(groups.end * taps, kPanel) * kPanel, g.groups * taps)};
    const T* bias = layer.span_bias ? elements(layer.span_bias) + columns.first : nullptr;
    const Gemm<T> gemm{hidden, depth,          count, depth, elements(layer.span_weight) + columns.first * depth,
                       bias,   length(columns)};
    run_gemm(gemm, StoreEpilogue<T, false>{map, length(columns)});
    return columns;
  }

  // Applies the kernels of some groups; `generated` are the span's columns that the map holds.
  void aggregate(const T* image, const T* map, Range generated, const Patch& patch, Range groups, T* y) const {
    const Index taps = volume(g.kernel), columns = length(patch.columns);
    for (Index row = patch.rows.first; row < patch.rows.end; ++row) {
      ApplySegment<T> segment(g, row, patch.columns.first, length(generated));
      const Index position = (row - patch.rows.first) * columns;
      for (Index group = groups.first; group < groups.end; ++group) {
        segment.image = image + group * segment.width;
        segment.k = map + position * segment.k_step + group * taps - generated.first;
        segment.y = y + position * g.channels + group * segment.width;
        apply_segment<T>(g, segment, columns);
      }
    }
  }

  // Prefetches the input rows that the patch below this one reads and this one does not.
  void prefetch_rows_below(const T* image, const Patch& patch) const {
    const Index last = patch.rows.end - 1, depth = last / g.output[1], height = last % g.output[1];
    const Index first_row = input_at(g, 1, height, g.kernel[1] - 1) + 1, rows = length(patch.rows) * g.stride[1];
    const Index elements = length(patch.columns) * g.stride[2] * g.channels;
    for (Index h = first_row; h < min(first_row + rows, g.input[1]); ++h) {
      const Index position = (depth * g.stride[0] * g.input[1] + h) * g.input[2] + patch.columns.first * g.stride[2];
      const T* x = image + position * g.channels;
      for (Index i = 0; i < elements; i += 64 / Index(sizeof(T))) __builtin_prefetch(x + i, 0, 2);
    }
  }

  // Scale, shift and ReLU, as asked, from y to `to`: the output, or y itself.
  void finish(const T* y, T* to, Index count, bool streams) const {
    constexpr int W = kLanes<T>;
    const T *scale = elements(layer.scale), *shift = elements(layer.shift);
    const auto finished = [&](auto v, Index c) INVOLUTION_BODY {
      using V = decltype(v);
      if (scale) v = v * load<V>(scale + c) + load<V>(shift + c);
      return layer.relu ? rectified(v) : v;
    };
    for (Index t = 0; t < count; ++t, y += g.channels, to += g.channels) {
      Index c = 0;
      for (; c + W <= g.channels; c += W) {
        const auto v = finished(load<Vector<T, W>>(y + c), c);
        if (streams) stream(to + c, v);
        else store(to + c, v);
      }
      for (; c < g.channels; ++c) store(to + c, finished(load<Vector<T, 1>>(y + c), c));
    }
  }

  // The expand convolution, its sum with the shortcut, and the next block's reduce convolution.
  void expand(T* y, const Patch& patch) const {
    const Index channels = layer.expand_channels, at = patch.position * channels;
    T* output = static_cast<T*>(layer.output) + at;
    const T* shortcut = layer.shortcut ? elements(layer.shortcut) + at : nullptr;
    T* copy = layer.next_reduce_weight ? y + plan.y : nullptr;
    const Gemm<T> gemm{
        y, g.channels, patch.count, g.channels, elements(layer.expand_weight), elements(layer.expand_bias), channels};
    const bool relu = layer.expand_relu;
    if (plan.streams) {
      run_gemm(gemm, ExpandEpilogue<T, true>{output, shortcut, channels, relu, copy, plan.output_step});
    } else {
      run_gemm(gemm, ExpandEpilogue<T, false>{output, shortcut, channels, relu, copy, plan.output_step});
    }
    if (!copy) return;
    const Index next = layer.next_reduce_channels;
    const Gemm<T> next_gemm{copy,
                            plan.output_step,
                            patch.count,
                            channels,
                            elements(layer.next_reduce_weight),
                            elements(layer.next_reduce_bias),
                            next};
    T* next_output = static_cast<T*>(layer.next_reduce_output) + patch.position * next;
    run_gemm(next_gemm, StoreEpilogue<T, true>{next_output, next});
  }
};

}  // namespace

template <class T>
void fused_layer(const Geometry& g, const involution_fused_layer& layer) {
  const FusedLayer<T> fused{g, layer, PatchPlan(g, layer)};
  parallel_for(worthwhile_threads(g), fused.plan.count(g), [&](Index item) {
    T* workspace = static_cast<T*>(layer.workspace) + thread_index() * fused.plan.workspace();
    fused.run(Patch(g, fused.plan, item), workspace);
  });
}

Index fused_layer_workspace(const Geometry& g, const involution_fused_layer& layer) {
  return PatchPlan(g, layer).workspace();
}

template void fused_layer<float>(const Geometry&, const involution_fused_layer&);
template void fused_layer<double>(const Geometry&, const involution_fused_layer&);

}  // namespace INVOLUTION_ISA
}  // namespace involution
