// Norms of [rows, channels] with the ReLU (and the sum with a shortcut) behind them, forward and backward: each tensor
// is read once per pass, and nothing but inputs and outputs is kept for the backward pass.
//
// Batch norm has two passes each way. The first sums over rows: a chunk of rows at a time in T for kBlock rows, these
// sums in double, the chunks' sums in their order. The number of chunks depends on the shape alone, so results are the
// same for every number of threads.
#include "parallel.h"
#include "vector.h"

namespace involution {
namespace INVOLUTION_ISA {
namespace {

constexpr Index kBlock = 64;             // rows whose sums are in T; a multiple of kTogether
constexpr int kTogether = 4;             // rows that are added to the sums of a channel between its load and its store
constexpr Index kLeastElements = 32768;  // below, starting threads costs more than it saves

// Calls body(vector type's zero, channel) for whole vectors of channels and body(T(0), channel) for the rest.
template <class T, class F>
INVOLUTION_INLINE void for_each_vector(Index channels, F&& body) {
  constexpr int W = kLanes<T>;
  Index c = 0;
  for (; c + W <= channels; c += W) body(Vector<T, W>{}, c);
  for (; c < channels; ++c) body(T{}, c);
}

INVOLUTION_INLINE Index row_chunks(Index rows) { return max(1, min(64, rows / (2 * kBlock))); }
INVOLUTION_INLINE Index norm_threads(Index rows, Index channels, Index threads) {
  return rows * channels < kLeastElements ? 1 : threads;
}

// Two sums over the rows for every channel, into totals[0..C) and totals[C..2C). add(zero, row, channel, first, second)
// adds one row's terms of a vector of channels. A chunk's workspace: two totals in double, two sums in T.
template <class T, class F>
void sum_rows(Index rows, Index channels, Index threads, double* workspace, F&& add) {
  const Index chunks = row_chunks(rows);
  parallel_for(norm_threads(rows, channels, threads), chunks, [&](Index i) {
    const Range chunk = part(i, chunks, rows);
    double* total = workspace + 4 * i * channels;
    T* sums = reinterpret_cast<T*>(total + 2 * channels);
    for (Index c = 0; c < 2 * channels; ++c) total[c] = 0;
    for (Index begin = chunk.first; begin < chunk.end; begin += kBlock) {
      const Index end = min(chunk.end, begin + kBlock);
      for (Index c = 0; c < 2 * channels; ++c) sums[c] = 0;
      const auto add_rows = [&](Index row, auto count) INVOLUTION_BODY {
        for_each_vector<T>(channels, [&](auto zero, Index c) INVOLUTION_BODY {
          auto first = load<decltype(zero)>(sums + c), second = load<decltype(zero)>(sums + channels + c);
          INVOLUTION_UNROLL
          for (int t = 0; t < decltype(count)::value; ++t) add(zero, row + t, c, first, second);
          store(sums + c, first);
          store(sums + channels + c, second);
        });
      };
      Index row = begin;
      for (; row + kTogether <= end; row += kTogether) add_rows(row, std::integral_constant<int, kTogether>{});
      for (; row < end; ++row) add_rows(row, std::integral_constant<int, 1>{});
      for (Index c = 0; c < 2 * channels; ++c) total[c] += double(sums[c]);
    }
  });
  for (Index i = 1; i < chunks; ++i) {
    for (Index c = 0; c < 2 * channels; ++c) workspace[c] += workspace[4 * i * channels + c];
  }
}

// Calls body(index of the row's first element) for all rows, each thread for a share of them.
template <class F>
INVOLUTION_INLINE void for_each_row(Index rows, Index channels, Index threads, F&& body) {
  const Index used = norm_threads(rows, channels, threads);
  parallel_for(used, used, [&](Index i) {
    const Range share = part(i, used, rows);
    for (Index row = share.first; row < share.end; ++row) body(row * channels);
    stream_fence();
  });
}

// Batch norm as z = x * scale + offset, from the rows' statistics.
template <class T>
void fold_statistics(const BatchNorm& norm, T* scale, T* offset) {
  const T *weight = static_cast<const T*>(norm.weight), *bias = static_cast<const T*>(norm.bias);
  const T *mean = static_cast<const T*>(norm.mean), *variance = static_cast<const T*>(norm.variance);
  for (Index c = 0; c < norm.channels; ++c) {
    scale[c] = T(double(weight[c]) / __builtin_sqrt(double(variance[c]) + norm.eps));
    offset[c] = bias == nullptr ? 0 : bias[c] - mean[c] * scale[c];
  }
}

// Writes an output vector by vector. One that is larger than the caches goes past them, so that its lines are not read
// before they are written.
template <class T>
class Output {
 public:
  Output(void* to, Index rows, Index channels)
      : to(static_cast<T*>(to)),
        streamed(rows * channels * Index(sizeof(T)) >= kLargerThanCaches && channels % kLanes<T> == 0 &&
                 reinterpret_cast<uintptr_t>(to) % kVectorBytes == 0) {}
  template <class V>
  INVOLUTION_INLINE void write(Index at, V v) const {
    if (sizeof(V) == kVectorBytes && streamed) stream(to + at, v);
    else store(to + at, v);
  }

 private:
  static constexpr Index kLargerThanCaches = 16 << 20;
  T* to;
  bool streamed;
};

}  // namespace

Index batch_norm_workspace(const BatchNorm& norm) { return 4 * (row_chunks(norm.rows) + 1) * norm.channels; }

template <class T>
void batch_norm(const BatchNorm& norm) {
  const Index channels = norm.channels;
  const T *x = static_cast<const T*>(norm.x), *shortcut = static_cast<const T*>(norm.shortcut);
  T *mean = static_cast<T*>(norm.mean), *variance = static_cast<T*>(norm.variance);
  const Output<T> y(norm.y, norm.rows, channels);
  double* totals = norm.workspace;
  // Distances from the mean of some rows instead of x itself, whose mean may be large against its deviation.
  const Index samples = min(norm.rows, 16);
  for (Index c = 0; c < channels; ++c) {
    double sum = 0;
    for (Index i = 0; i < samples; ++i) sum += double(x[part(i, samples, norm.rows).first * channels + c]);
    mean[c] = T(sum / double(samples));
  }
  sum_rows<T>(norm.rows, channels, norm.threads, totals,
              [&](auto zero, Index row, Index c, auto& sum, auto& squares) INVOLUTION_BODY {
                using V = decltype(zero);
                const V v = load<V>(x + row * channels + c) - load<V>(mean + c);
                sum += v;
                squares += v * v;
              });
  T* scale = reinterpret_cast<T*>(totals + 4 * row_chunks(norm.rows) * channels);
  T* offset = scale + channels;
  for (Index c = 0; c < channels; ++c) {
    const double distance = totals[c] / double(norm.rows);
    const double spread = totals[channels + c] / double(norm.rows) - distance * distance;
    mean[c] = T(double(mean[c]) + distance);
    variance[c] = T(spread < 0 ? 0 : spread);
  }
  fold_statistics(norm, scale, offset);
  for_each_row(norm.rows, channels, norm.threads, [&](Index row) INVOLUTION_BODY {
    for_each_vector<T>(channels, [&](auto zero, Index c) INVOLUTION_BODY {
      using V = decltype(zero);
      V z = load<V>(x + row + c) * load<V>(scale + c) + load<V>(offset + c);
      if (shortcut != nullptr) z += load<V>(shortcut + row + c);
      y.write(row + c, norm.relu ? rectified(z) : z);
    });
  });
}

template <class T>
void batch_norm_backward(const BatchNorm& norm) {
  const Index channels = norm.channels;
  const T *x = static_cast<const T*>(norm.x), *dy = static_cast<const T*>(norm.dy);
  const T *mean = static_cast<const T*>(norm.mean), *variance = static_cast<const T*>(norm.variance);
  const T* y = static_cast<const T*>(norm.y);
  const Output<T> dx(norm.dx, norm.rows, channels), dshortcut(norm.dshortcut, norm.rows, channels);
  T *dweight = static_cast<T*>(norm.dweight), *dbias = static_cast<T*>(norm.dbias);
  double* totals = norm.workspace;
  T* scale = reinterpret_cast<T*>(totals + 4 * row_chunks(norm.rows) * channels);
  T *offset = scale + channels, *slope = offset + channels, *constant = slope + channels;
  fold_statistics(norm, scale, offset);
  // The gradient before the ReLU, whose sign is that of y; without a shortcut y is computed again, not read.
  const auto before_relu = [&](auto zero, Index at, Index c, auto in) INVOLUTION_BODY {
    using V = decltype(zero);
    const V grad = load<V>(dy + at);
    if (!norm.relu) return grad;
    const V out = y != nullptr ? load<V>(y + at) : V(in * load<V>(scale + c) + load<V>(offset + c));
    return V(out <= 0 ? V{} : grad);
  };
  sum_rows<T>(norm.rows, channels, norm.threads, totals,
              [&](auto zero, Index row, Index c, auto& sum, auto& products) INVOLUTION_BODY {
                using V = decltype(zero);
                const Index at = row * channels + c;
                const V in = load<V>(x + at), grad = before_relu(zero, at, c, in);
                sum += grad;
                products += grad * (in - load<V>(mean + c));
              });
  for (Index c = 0; c < channels; ++c) {
    const double inverse = 1 / (double(variance[c]) + norm.eps);
    dbias[c] = T(totals[c]);
    dweight[c] = T(totals[channels + c] * __builtin_sqrt(inverse));
    slope[c] = T(totals[channels + c] * inverse / double(norm.rows));
    constant[c] = T(totals[c] / double(norm.rows));
  }
  for_each_row(norm.rows, channels, norm.threads, [&](Index row) INVOLUTION_BODY {
    for_each_vector<T>(channels, [&](auto zero, Index c) INVOLUTION_BODY {
      using V = decltype(zero);
      const V in = load<V>(x + row + c), grad = before_relu(zero, row + c, c, in);
      const V centred = grad - load<V>(constant + c) - (in - load<V>(mean + c)) * load<V>(slope + c);
      dx.write(row + c, V(centred * load<V>(scale + c)));
      if (norm.dshortcut != nullptr) dshortcut.write(row + c, grad);
    });
  });
}

namespace {

// The sum of a vector's lanes; T is the lanes' type.
template <class T, class V>
INVOLUTION_INLINE T lane_sum(V v) {
  if constexpr (sizeof(V) == sizeof(T)) {
    return v;
  } else {
    T lanes[sizeof(V) / sizeof(T)], sum = 0;
    store(lanes, v);
    for (T lane : lanes) sum += lane;
    return sum;
  }
}

// The sum over a row's channels of term(zero, channel).
template <class T, class F>
INVOLUTION_INLINE T sum_channels(Index channels, F&& term) {
  Vector<T, kLanes<T>> sums{};
  T rest = 0;
  for_each_vector<T>(channels, [&](auto zero, Index c) INVOLUTION_BODY {
    if constexpr (sizeof(zero) == sizeof(T)) rest += term(zero, c);
    else sums += term(zero, c);
  });
  return lane_sum<T>(sums) + rest;
}

}  // namespace

template <class T>
void channel_norm(const ChannelNorm& norm) {
  const T* x = static_cast<const T*>(norm.x);
  T* y = static_cast<T*>(norm.y);
  const Index channels = norm.channels;
  for_each_row(norm.rows, channels, norm.threads, [&](Index row) INVOLUTION_BODY {
    const T squares = sum_channels<T>(channels, [&](auto zero, Index c) INVOLUTION_BODY {
      const auto v = load<decltype(zero)>(x + row + c);
      return v * v;
    });
    const T factor = T(norm.scale / __builtin_sqrt(double(squares) / double(channels) + norm.eps));
    for_each_vector<T>(channels, [&](auto zero, Index c) INVOLUTION_BODY {
      using V = decltype(zero);
      const V z = load<V>(x + row + c) * factor;
      store(y + row + c, norm.relu ? rectified(z) : z);
    });
  });
}

template <class T>
void channel_norm_backward(const ChannelNorm& norm) {
  const T *x = static_cast<const T*>(norm.x), *dy = static_cast<const T*>(norm.dy);
  T* dx = static_cast<T*>(norm.dx);
  const Index channels = norm.channels;
  for_each_row(norm.rows, channels, norm.threads, [&](Index row) INVOLUTION_BODY {
    const auto before_relu = [&](auto zero, Index c) INVOLUTION_BODY {
      using V = decltype(zero);
      const V grad = load<V>(dy + row + c);
      return norm.relu ? V(load<V>(x + row + c) <= 0 ? V{} : grad) : grad;
    };
    const T squares = sum_channels<T>(channels, [&](auto zero, Index c) INVOLUTION_BODY {
      const auto v = load<decltype(zero)>(x + row + c);
      return v * v;
    });
    const T products = sum_channels<T>(channels, [&](auto zero, Index c) INVOLUTION_BODY {
      return load<decltype(zero)>(x + row + c) * before_relu(zero, c);
    });
    const double inverse = 1 / (double(squares) / double(channels) + norm.eps);
    const T factor = T(norm.scale * __builtin_sqrt(inverse)), slope = T(double(products) * inverse / double(channels));
    for_each_vector<T>(channels, [&](auto zero, Index c) INVOLUTION_BODY {
      using V = decltype(zero);
      store(dx + row + c, V((before_relu(zero, c) - load<V>(x + row + c) * slope) * factor));
    });
  });
}

template void batch_norm<float>(const BatchNorm&);
template void batch_norm<double>(const BatchNorm&);
template void batch_norm_backward<float>(const BatchNorm&);
template void batch_norm_backward<double>(const BatchNorm&);
template void channel_norm<float>(const ChannelNorm&);
template void channel_norm<double>(const ChannelNorm&);
template void channel_norm_backward<float>(const ChannelNorm&);
template void channel_norm_backward<double>(const ChannelNorm&);

}  // namespace INVOLUTION_ISA
}  // namespace involution
