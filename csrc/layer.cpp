// The fused layer: computes the kernels of one block of output positions, applies them and discards them, so they stay
// in cache; pooling, 1x1 convolutions and elementwise steps around the involution run on the same block.
//
//     input --> pool --> reduce (GEMM) --> hidden --> span (GEMM) --> kernel map of some groups
//       |                                                                   |
//       +----------------------------------------------------------------> apply --> y --> scale, shift, ReLU
//                                                                                                  |
//     next_reduce_output <-- next_reduce (GEMM) <-- output <-- ReLU <-- + shortcut <-- expand (GEMM)
//
// The 1x1 convolutions: reduce computes the generator's hidden features; span produces the kernels from them; expand
// ends the bottleneck; next_reduce begins the next one. Every part but span and apply is optional (see involution.h).
#include "gemm.h"
#include "parallel.h"
#include "tiles.h"

namespace involution {
namespace INVOLUTION_ISA {
namespace {

// How the output is cut into patches, and the workspace of one patch.
//
//     row_tiles = 3, column_tiles = 1: whole rows      row_tiles = rows, column_tiles = 2: parts of long rows
//     +-----------------+                              +--------+--------+
//     | 0   0   0   0   |                              | 0      | 1      |
//     | 0   0   0   0   |                              +--------+--------+
//     +-----------------+                              | 2      | 3      |
//     | 1   1   1   1   |                              +--------+--------+
//     ...                                              ...
struct PatchPlan {
  // Output positions of a patch.
  static constexpr Index kPositions = 56;
  // Elements of a patch's kernels that are generated before they are applied: they stay in a core's cache.
  static constexpr Index kKernelElements = 48 * 1024;
  // Elements of an output that is too large for any cache: 16 MiB of float, 32 MiB of double.
  static constexpr Index kStreamedElements = 4 << 20;

  Index row_tiles, column_tiles;  // parts of an image's output rows, and of one output row
  Index groups_per_block;         // whose kernels are generated together
  bool pools;                     // the hidden features are computed from averages
  bool streams;                   // the output is written with non-temporal stores
  Index output_step;              // from one position's output to the next one's in workspace
  // Elements of workspace for each buffer.
  Index hidden_elements, pooled_elements, kernel_elements, y_elements, output_elements;

  PatchPlan(const Geometry& g, const involution_fused_layer& layer) {
    const Index rows = g.output[0] * g.output[1], taps = volume(g.kernel);
    column_tiles = ceil_divide(g.output[2], kPositions);
    row_tiles = column_tiles > 1 ? rows : ceil_divide(rows, max(1, kPositions / g.output[2]));
    if (g.batch * row_tiles * column_tiles < 4 * g.threads)
      row_tiles = min(rows, ceil_divide(row_tiles, g.threads) * g.threads);
    const Index positions = ceil_divide(rows, row_tiles) * ceil_divide(g.output[2], column_tiles);
    groups_per_block = 1;
    while (2 * groups_per_block <= g.groups && positions * 2 * groups_per_block * taps <= kKernelElements)
      groups_per_block *= 2;
    hidden_elements = layer.hidden ? 0 : in_lines(positions * layer.hidden_channels);
    pools = !layer.hidden && max(g.stride[0], max(g.stride[1], g.stride[2])) > 1;
    pooled_elements = pools ? in_lines(positions * g.channels) : 0;
    // One panel more, because a block of groups may begin in the middle of one.
    kernel_elements = in_lines(positions * (ceil_divide(groups_per_block * taps, kPanel) + 1) * kPanel);
    y_elements = in_lines(positions * g.channels);
    output_step = layer.expand_channels + 16;  // padded: a power of two maps all rows to few cache sets
    output_elements = layer.next_reduce_weight ? in_lines(positions * output_step) : 0;
    const Index channels = layer.expand_weight ? layer.expand_channels : g.channels;
    streams = channels % 16 == 0 && reinterpret_cast<uintptr_t>(layer.output) % 64 == 0 &&
              g.batch * volume(g.output) * channels >= kStreamedElements;
  }
  Index count(const Geometry& g) const { return g.batch * row_tiles * column_tiles; }
  Index workspace() const { return hidden_elements + pooled_elements + kernel_elements + y_elements + output_elements; }
  static Index in_lines(Index elements) { return ceil_divide(elements, 16) * 16; }
};

// One patch: `count` output positions, contiguous in memory, from `position` of the batch on.
struct Patch {
  Index n;
  Range rows, columns;  // output rows, counted through both slow axes, and positions in each
  Index position, count;

  Patch(const Geometry& g, const PatchPlan& plan, Index item) {
    const Index image_rows = g.output[0] * g.output[1];
    n = item / plan.column_tiles / plan.row_tiles;
    rows = part(item / plan.column_tiles % plan.row_tiles, plan.row_tiles, image_rows);
    columns = part(item % plan.column_tiles, plan.column_tiles, g.output[2]);
    position = (n * image_rows + rows.first) * g.output[2] + columns.first;
    count = length(rows) * length(columns);
  }
};

// Average pooling over windows of the stride's size, clipped at the image's end, for `count` positions of an output
// row.
template <class T>
void pool(const Geometry& g, const T* image, Index row, Index first, Index count, T* pooled) {
  Range pooling_window[3];
  const Index at[3] = {row / g.output[1], row % g.output[1], first};
  const auto set_pooling_window = [&](int axis, Index o) {
    pooling_window[axis] = {o * g.stride[axis], min(g.input[axis], (o + 1) * g.stride[axis])};
  };
  set_pooling_window(0, at[0]);
  set_pooling_window(1, at[1]);
  for (Index o = first; o < first + count; ++o, pooled += g.channels) {
    set_pooling_window(2, o);
    for (Index c = 0; c < g.channels; ++c) pooled[c] = 0;
    for (Index d = pooling_window[0].first; d < pooling_window[0].end; ++d) {
      for (Index h = pooling_window[1].first; h < pooling_window[1].end; ++h) {
        for (Index w = pooling_window[2].first; w < pooling_window[2].end; ++w) {
          const T* x = image + ((d * g.input[1] + h) * g.input[2] + w) * g.channels;
#pragma omp simd
          for (Index c = 0; c < g.channels; ++c) pooled[c] += x[c];
        }
      }
    }
    const T factor = T(1) / T(length(pooling_window[0]) * length(pooling_window[1]) * length(pooling_window[2]));
#pragma omp simd
    for (Index c = 0; c < g.channels; ++c) pooled[c] *= factor;
  }
}

// relu(x / sqrt(mean(x^2) + eps)), in place.
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

// GEMM epilogue of the expand convolution: adds the shortcut, applies ReLU, and stores the output, with non-temporal
// stores if it is large; a copy goes to workspace, where the next_reduce convolution reads it.
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
    const T* hidden = layer.hidden ? elements(layer.hidden) + patch.position * layer.hidden_channels
                                   : reduce(image, patch, workspace);
    T* map = workspace + plan.hidden_elements + plan.pooled_elements;
    T* y = map + plan.kernel_elements;
    prefetch_rows_below(image, patch);
    for (Index group = 0; group < g.groups; group += plan.groups_per_block) {
      const Range groups = {group, min(g.groups, group + plan.groups_per_block)};
      const Range generated = span(hidden, patch.count, groups, map);
      apply_kernels(image, map, generated, patch, groups, y);
    }
    if (layer.expand_weight) {
      if (layer.scale || layer.relu) scale_shift_relu(y, y, patch.count, false);
      expand(y, patch);
    } else {
      scale_shift_relu(y, static_cast<T*>(layer.output) + patch.position * g.channels, patch.count, plan.streams);
    }
    if (plan.streams) stream_fence();
  }

  // [count, R]: the generator's hidden features.
  const T* reduce(const T* image, const Patch& patch, T* workspace) const {
    T *hidden = workspace, *pooled = workspace + plan.hidden_elements;
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

  // Computes the kernels of some groups at `count` positions, as [count, columns] in whole panels. Returns the range of
  // span columns computed.
  Range span(const T* hidden, Index count, Range groups, T* map) const {
    const Index taps = volume(g.kernel), channels = layer.hidden_channels;
    const Range columns = {groups.first * taps / kPanel * kPanel,
                           min(ceil_divide(groups.end * taps, kPanel) * kPanel, g.groups * taps)};
    const T* bias = layer.span_bias ? elements(layer.span_bias) + columns.first : nullptr;
    const T* weight = elements(layer.span_weight) + columns.first * channels;
    const Gemm<T> gemm{hidden, channels, count, channels, weight, bias, length(columns)};
    run_gemm(gemm, StoreEpilogue<T, false>{map, length(columns)});
    return columns;
  }

  // Applies the kernels of some groups; `generated` are the span's columns that the map holds.
  void apply_kernels(const T* image, const T* map, Range generated, const Patch& patch, Range groups, T* y) const {
    const Index taps = volume(g.kernel), columns = length(patch.columns);
    for (Index row = patch.rows.first; row < patch.rows.end; ++row) {
      ApplySegment<T> segment(g, row, patch.columns.first, length(generated));
      const Index position = (row - patch.rows.first) * columns;
      for (Index group = groups.first; group < groups.end; ++group) {
        segment.image = image + group * segment.group_channels;
        segment.k = map + position * segment.k_step + group * taps - generated.first;
        segment.y = y + position * g.channels + group * segment.group_channels;
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

  // Scale, shift and ReLU, those that the layer has, from y to `to`: the output, or y itself.
  void scale_shift_relu(const T* y, T* to, Index count, bool streams) const {
    constexpr int W = kLanes<T>;
    const T *scale = elements(layer.scale), *shift = elements(layer.shift);
    const auto result = [&](auto v, Index c) INVOLUTION_BODY {
      using V = decltype(v);
      if (scale) v = v * load<V>(scale + c) + load<V>(shift + c);
      return layer.relu ? rectified(v) : v;
    };
    for (Index t = 0; t < count; ++t, y += g.channels, to += g.channels) {
      Index c = 0;
      for (; c + W <= g.channels; c += W) {
        const auto v = result(load<Vector<T, W>>(y + c), c);
        if (streams) stream(to + c, v);
        else store(to + c, v);
      }
      for (; c < g.channels; ++c) store(to + c, result(load<Vector<T, 1>>(y + c), c));
    }
  }

  // The expand convolution, its sum with the shortcut, and the next block's reduce convolution.
  void expand(T* y, const Patch& patch) const {
    const Index channels = layer.expand_channels, at = patch.position * channels;
    T* output = static_cast<T*>(layer.output) + at;
    const T* shortcut = layer.shortcut ? elements(layer.shortcut) + at : nullptr;
    T* copy = layer.next_reduce_weight ? y + plan.y_elements : nullptr;
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

// Multiply-adds of the 1x1 convolutions.
Index pointwise_multiply_adds(const Geometry& g, const involution_fused_layer& layer) {
  Index per_position = layer.hidden_channels * g.groups * volume(g.kernel);
  if (layer.reduce_weight) per_position += g.channels * layer.hidden_channels;
  if (layer.expand_weight) per_position += g.channels * layer.expand_channels;
  if (layer.next_reduce_weight) per_position += layer.expand_channels * layer.next_reduce_channels;
  return g.batch * volume(g.output) * per_position;
}

}  // namespace

template <class T>
void fused_layer(const Geometry& g, const involution_fused_layer& layer) {
  const FusedLayer<T> fused{g, layer, PatchPlan(g, layer)};
  parallel_for(worthwhile_threads(g, pointwise_multiply_adds(g, layer)), fused.plan.count(g), [&](Index item) {
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
