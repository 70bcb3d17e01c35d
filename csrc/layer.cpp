// layer: generates kernels and applies them, patch by patch of output positions, so that the kernel map never leaves the
// cache; with the pointwise steps before and after it (involution.h says which).
#include "geometry.h"
#include "multiply.h"

namespace involution {
namespace INVOLUTION_ISA {
namespace {

// How the output is cut into patches, runs of positions that lie in a row in memory: `down` parts of an image's rows, and
// `across` parts of a row where that is long; and how many groups' kernels of a patch are made at a time.
struct Patches {
  static constexpr Index kPositions = 56;      // of a patch: weights are seldom fetched from far away
  static constexpr Index kMapNumbers = 49152;  // of the kernel map at a time: inside a core's cache
  static constexpr Index kStreamed = 4 << 20;  // numbers of output that no cache would keep
  Index down, across, groups_at_once;
  Index hidden, pooled, map, y, output;  // elements of scratch
  Index output_step;                     // from one position's output to the next one's in scratch
  bool pools;                            // whether the hidden features are made from averages
  bool streams;                          // whether the output is written past the cache

  Patches(const Geometry& g, const involution_layer& layer) {
    const Index rows = g.output[0] * g.output[1];
    across = ceil_divide(g.output[2], kPositions);
    down = across > 1 ? rows : ceil_divide(rows, most(1, kPositions / g.output[2]));
    if (g.batch * down * across < 4 * g.threads) down = least(rows, ceil_divide(down, g.threads) * g.threads);
    const Index positions = ceil_divide(rows, down) * ceil_divide(g.output[2], across), taps = volume(g.kernel);
    groups_at_once = 1;
    while (2 * groups_at_once <= g.groups && positions * 2 * groups_at_once * taps <= kMapNumbers) groups_at_once *= 2;
    hidden = layer.hidden ? 0 : in_lines(positions * layer.hidden_channels);
    pools = !layer.hidden && most(g.stride[0], most(g.stride[1], g.stride[2])) > 1;
    pooled = pools ? in_lines(positions * g.channels) : 0;
    map = in_lines(positions * (ceil_divide(groups_at_once * taps, kPanel) + 1) * kPanel);
    y = in_lines(positions * g.channels);
    output_step = layer.next_channels + 16;  // a power of two would have all positions share few lines of the cache
    output = layer.following_weight ? in_lines(positions * output_step) : 0;
    const Index channels = layer.next_weight ? layer.next_channels : g.channels;
    streams = channels % 16 == 0 && reinterpret_cast<uintptr_t>(layer.output) % 64 == 0 &&
              g.batch * volume(g.output) * channels >= kStreamed;
  }
  Index count(const Geometry& g) const { return g.batch * down * across; }
  Index scratch() const { return hidden + pooled + map + y + output; }
  static Index in_lines(Index numbers) { return ceil_divide(numbers, 16) * 16; }
};

// The averages of the windows of the stride's size that begin at `count` output positions; the image's end cuts them.
template <class T>
void pool(const Geometry& g, const T* image, Index row, Index first, Index count, T* pooled) {
  Range window[3];
  const Index at[3] = {row / g.output[1], row % g.output[1], first};
  const auto cut = [&](int axis, Index o) {
    window[axis] = {o * g.stride[axis], least(g.input[axis], (o + 1) * g.stride[axis])};
  };
  cut(0, at[0]);
  cut(1, at[1]);
  for (Index o = first; o < first + count; ++o, pooled += g.channels) {
    cut(2, o);
    for (Index c = 0; c < g.channels; ++c) pooled[c] = 0;
    Index members = 0;
    for (Index d = window[0].first; d < window[0].end; ++d) {
      for (Index h = window[1].first; h < window[1].end; ++h) {
        for (Index w = window[2].first; w < window[2].end; ++w, ++members) {
          const T* x = image + ((d * g.input[1] + h) * g.input[2] + w) * g.channels;
#pragma omp simd
          for (Index c = 0; c < g.channels; ++c) pooled[c] += x[c];
        }
      }
    }
    const T share = T(1) / T(members);
#pragma omp simd
    for (Index c = 0; c < g.channels; ++c) pooled[c] *= share;
  }
}

// Adds the shortcut to the convolution after the layer and writes the output, past the cache if it is large.
template <class T, bool Streams>
struct NextTaker {
  T* output;
  const T* shortcut;  // or null
  Index channels;
  bool rectified;
  T* kept;  // where the output is needed once more, or null
  Index kept_step;

  INVOLUTION_INLINE void expect(Index t, Index c) const {
    for (Index i = c; i < least(c + kPanel, channels); i += 64 / Index(sizeof(T))) {
      if (shortcut) __builtin_prefetch(shortcut + t * channels + i);
      if (!Streams) __builtin_prefetch(output + t * channels + i, 1);
    }
  }
  template <class V>
  INVOLUTION_INLINE void take(Index t, Index c, V v) const {
    if (shortcut) v += load<V>(shortcut + t * channels + c);
    if (rectified) v = v < 0 ? V{} : v;
    if (Streams) stream(output + t * channels + c, v);
    else store(output + t * channels + c, v);
    if (kept) store(kept + t * kept_step + c, v);
  }
};

template <class T>
struct Work {
  const Geometry& g;
  const involution_layer& layer;
  const Patches& patches;

  // One patch of output positions, from the input to the output.
  void run(Index item, T* scratch) const {
    const Index n = item / patches.across / patches.down, image_rows = g.output[0] * g.output[1];
    const Range rows = part(item / patches.across % patches.down, patches.down, image_rows);
    const Range columns = part(item % patches.across, patches.across, g.output[2]);
    const Index position = (n * image_rows + rows.first) * g.output[2] + columns.first;
    const Index count = (rows.end - rows.first) * (columns.end - columns.first);
    const T* image = static_cast<const T*>(layer.x) + n * volume(g.input) * g.channels;

    const T* hidden = static_cast<const T*>(layer.hidden) + position * layer.hidden_channels;
    if (!layer.hidden) hidden = reduce(image, rows, columns, position, count, scratch);
    T* map = scratch + patches.hidden + patches.pooled;
    T* y = map + patches.map;
    fetch_rows_after(image, rows, columns);
    for (Index group = 0; group < g.groups; group += patches.groups_at_once) {
      const Range groups = {group, least(g.groups, group + patches.groups_at_once)};
      const Range made = generate(hidden, count, groups, map);
      aggregate(image, map, made, rows, columns, groups, y);
    }
    const auto keep = [](T* to, auto v) INVOLUTION_BODY { store(to, v); };
    const auto past_cache = [](T* to, auto v) INVOLUTION_BODY { stream(to, v); };
    if (layer.next_weight) {
      if (layer.scale || layer.relu) finish(y, y, count, keep);
      next(y, position, count);
    } else {
      T* output = static_cast<T*>(layer.output) + position * g.channels;
      patches.streams ? finish(y, output, count, past_cache) : finish(y, output, count, keep);
    }
    if (patches.streams) streams_end();
  }

  // Fetches the input rows that the patch below this one reads and this one does not.
  void fetch_rows_after(const T* image, Range rows, Range columns) const {
    const Index reach = (g.kernel[1] - 1) * g.dilation[1] - g.padding[1], row = (rows.end - 1) % g.output[1];
    const Index depth = (rows.end - 1) / g.output[1], length = (columns.end - columns.first) * g.stride[2] * g.channels;
    for (Index h = row * g.stride[1] + reach + 1; h <= (row + rows.end - rows.first) * g.stride[1] + reach; ++h) {
      if (h >= g.input[1]) return;
      const T* x = image + ((depth * g.stride[0] * g.input[1] + h) * g.input[2] + columns.first * g.stride[2]) * g.channels;
      for (Index i = 0; i < length; i += 64 / Index(sizeof(T))) __builtin_prefetch(x + i, 0, 2);
    }
  }

  // [count, R]: the generator's hidden features.
  const T* reduce(const T* image, Range rows, Range columns, Index position, Index count, T* scratch) const {
    T *hidden = scratch, *pooled = scratch + patches.hidden;
    const T* in = static_cast<const T*>(layer.x) + position * g.channels;
    if (patches.pools) {
      const Index length = columns.end - columns.first;
      for (Index row = rows.first; row < rows.end; ++row) {
        pool(g, image, row, columns.first, length, pooled + (row - rows.first) * length * g.channels);
      }
      in = pooled;
    }
    const Index channels = layer.hidden_channels;
    const Product<T> product{in, g.channels, count, g.channels, static_cast<const T*>(layer.reduce_weight),
                             static_cast<const T*>(layer.reduce_bias)};
    if (layer.rms_eps <= 0) {
      rectified_product(product, channels, hidden);
      return hidden;
    }
    multiply(product, 0, channels, Taker{[=](Index t, Index c, auto v) INVOLUTION_BODY {
      store(hidden + t * channels + c, v);
    }});
    for (Index t = 0; t < count; ++t) rms_norm_relu(hidden + t * channels, channels);
    return hidden;
  }

  // relu(x / sqrt(mean of x * x + eps)), in place.
  void rms_norm_relu(T* x, Index channels) const {
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
    const T factor = T(1) / T(__builtin_sqrt(double(sum / T(channels)) + layer.rms_eps));
#pragma omp simd
    for (Index i = 0; i < channels; ++i) {
      const T v = x[i] * factor;
      x[i] = v < 0 ? T(0) : v;  // NaN stays NaN
    }
  }

  // The kernels of some groups at `count` positions: [count, columns], whole panels of the span's columns.
  Range generate(const T* hidden, Index count, Range groups, T* map) const {
    const Index taps = volume(g.kernel);
    const Range columns = {groups.first * taps / kPanel * kPanel,
                           least(ceil_divide(groups.end * taps, kPanel) * kPanel, g.groups * taps)};
    const Index step = columns.end - columns.first;
    const Product<T> product{hidden, layer.hidden_channels, count, layer.hidden_channels,
                             static_cast<const T*>(layer.span_weight), static_cast<const T*>(layer.span_bias)};
    multiply(product, columns.first, columns.end, Taker{[=](Index t, Index c, auto v) INVOLUTION_BODY {
      store(map + t * step + c - columns.first, v);
    }});
    return columns;
  }

  // Applies them: `made` are the span's columns that the map holds.
  void aggregate(const T* image, const T* map, Range made, Range rows, Range columns, Range groups, T* y) const {
    const Index taps = volume(g.kernel), length = columns.end - columns.first;
    for (Index row = rows.first; row < rows.end; ++row) {
      Run<const T, const T, T> tiles(g, row, columns.first, made.end - made.first);
      const Index position = (row - rows.first) * length;
      for (Index group = groups.first; group < groups.end; ++group) {
        tiles.image = image + group * tiles.width;
        tiles.k = map + position * tiles.k_step + group * taps - made.first;
        tiles.y = y + position * g.channels + group * tiles.width;
        apply_run<T>(g, tiles, length);
      }
    }
  }

  // Scales, shifts and rectifies y as asked, and writes it to `to`: the output, or where it is.
  template <class Store>
  INVOLUTION_INLINE void finish(const T* y, T* to, Index count, Store&& put) const {
    constexpr int W = kLanes<T>;
    const T *scale = static_cast<const T*>(layer.scale), *shift = static_cast<const T*>(layer.shift);
    const auto one = [&](auto v, Index c) INVOLUTION_BODY {
      using V = decltype(v);
      if (scale) v = v * load<V>(scale + c) + load<V>(shift + c);
      return layer.relu ? (v < 0 ? V{} : v) : v;  // NaN stays NaN
    };
    for (Index t = 0; t < count; ++t, y += g.channels, to += g.channels) {
      Index c = 0;
      for (; c + W <= g.channels; c += W) put(to + c, one(load<Vector<T, W>>(y + c), c));
      for (; c < g.channels; ++c) store(to + c, one(load<Vector<T, 1>>(y + c), c));
    }
  }

  // The convolution after the layer, and the sum with the shortcut.
  void next(T* y, Index position, Index count) const {
    const Index channels = layer.next_channels;
    const Product<T> product{y, g.channels, count, g.channels, static_cast<const T*>(layer.next_weight),
                             static_cast<const T*>(layer.next_bias)};
    T* output = static_cast<T*>(layer.output) + position * channels;
    const T* shortcut = layer.shortcut ? static_cast<const T*>(layer.shortcut) + position * channels : nullptr;
    T* kept = layer.following_weight ? y + patches.y : nullptr;
    const auto run = [&](auto streams) INVOLUTION_BODY {
      multiply(product, 0, channels, NextTaker<T, decltype(streams)::value>{
          output, shortcut, channels, bool(layer.next_relu), kept, patches.output_step});
    };
    patches.streams ? run(std::true_type{}) : run(std::false_type{});
    if (kept) follow(kept, position, count);
  }

  // What the next bottleneck begins with.
  void follow(const T* output, Index position, Index count) const {
    const Index channels = layer.following_channels;
    const Product<T> product{output, patches.output_step, count, layer.next_channels,
                             static_cast<const T*>(layer.following_weight), static_cast<const T*>(layer.following_bias)};
    rectified_product(product, channels, static_cast<T*>(layer.following) + position * channels);
  }

  // relu(product) for all its columns.
  static void rectified_product(const Product<T>& product, Index columns, T* out) {
    multiply(product, 0, columns, Taker{[=](Index t, Index c, auto v) INVOLUTION_BODY {
      store(out + t * columns + c, v < 0 ? decltype(v){} : v);
    }});
  }
};

}  // namespace

template <class T>
void layer(const Geometry& g, const involution_layer& layer) {
  const Patches patches(g, layer);
  const Work<T> work{g, layer, patches};
  in_parallel(g, patches.count(g), [&](Index item) {
    work.run(item, static_cast<T*>(layer.scratch) + this_thread() * patches.scratch());
  });
}

int64_t layer_scratch(const Geometry& g, const involution_layer& layer) { return Patches(g, layer).scratch(); }

template void layer<float>(const Geometry&, const involution_layer&);
template void layer<double>(const Geometry&, const involution_layer&);

}  // namespace INVOLUTION_ISA
}  // namespace involution
