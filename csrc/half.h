// float16 and bfloat16 in memory, float in registers. F16C and AVX-512 convert float16 where a vector has their width;
// everything else is integer arithmetic on vectors.
#pragma once
#include "vector.h"

namespace involution {
namespace INVOLUTION_ISA {

template <class V>
constexpr int kFloats = int(sizeof(V) / sizeof(float));

template <class V>
using Bits = Vector<uint32_t, kFloats<V>>;

template <class V>
INVOLUTION_INLINE Bits<V> bits_of(V v) {
  return reinterpret_cast<Bits<V>>(v);
}
template <class V>
INVOLUTION_INLINE V from_bits(Bits<V> bits) {
  return reinterpret_cast<V>(bits);
}

// A bfloat16 is the upper half of a float.
template <class V>
INVOLUTION_INLINE V widen(const BFloat16*, Bits<V> bits) {
  return from_bits<V>(bits << 16);
}

// Rounds to nearest, ties to even: adding to the bits carries into the exponent where it must. NaN stays NaN.
template <class V>
INVOLUTION_INLINE Bits<V> narrow(const BFloat16*, V v) {
  const Bits<V> bits = bits_of(v);
  return (v == v ? bits + 0x7fff + (bits >> 16 & 1) : bits | 0x400000) >> 16;
}

// The exponent's bias is 15 in a float16 and 127 in a float; infinities and NaN have the highest exponent. A subnormal
// float16 is converted as an integer times 2^-24: as a subnormal float it could be flushed to zero.
template <class V>
INVOLUTION_INLINE V widen(const Half*, Bits<V> bits) {
  const Bits<V> magnitude = bits & 0x7fff;
  const V small = __builtin_convertvector(reinterpret_cast<Vector<int32_t, kFloats<V>>>(magnitude), V) * 0x1p-24f;
  const Bits<V> normal = (magnitude << 13) + (magnitude < 0x7c00 ? Bits<V>{} + (112 << 23) : Bits<V>{} + (224u << 23));
  return from_bits<V>((magnitude < 0x400 ? bits_of(small) : normal) | (bits & 0x8000) << 16);
}

// Rounds to nearest, ties to even. Values below 2^-14 become subnormal: after adding 1/2, the last bits of the float
// are those of the float16.
template <class V>
INVOLUTION_INLINE Bits<V> narrow(const Half*, V v) {
  const Bits<V> sign = bits_of(v) & 0x80000000, bits = bits_of(v) ^ sign;
  const V magnitude = from_bits<V>(bits);
  const Bits<V> normal = (bits - (112 << 23) + 0xfff + (bits >> 13 & 1)) >> 13;
  const Bits<V> small = bits_of(magnitude + 0.5f) - 0x3f000000;
  const Bits<V> large = magnitude == magnitude ? Bits<V>{} + 0x7c00 : Bits<V>{} + 0x7e00;
  return (magnitude < 0x1p-14f ? small : magnitude < 65536.f ? normal : large) | sign >> 16;
}

template <class V, class S>
INVOLUTION_INLINE V load_widened(const S* from) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<S, Half> && sizeof(V) == 64) {
    return reinterpret_cast<V>(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))));
  }
#endif
#if defined(__F16C__)
  if constexpr (std::is_same_v<S, Half> && sizeof(V) == 32) {
    return reinterpret_cast<V>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
  }
#endif
  Vector<uint16_t, kFloats<V>> stored;
  __builtin_memcpy(&stored, from, sizeof stored);
  return widen<V>(from, __builtin_convertvector(stored, Bits<V>));
}

template <class V, class S>
INVOLUTION_INLINE void store_narrowed(S* to, V v) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<S, Half> && sizeof(V) == 64) {
    return _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtps_ph(reinterpret_cast<__m512>(v), 0));
  }
#endif
#if defined(__F16C__)
  if constexpr (std::is_same_v<S, Half> && sizeof(V) == 32) {
    return _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_cvtps_ph(reinterpret_cast<__m256>(v), 0));
  }
#endif
  const auto narrowed = __builtin_convertvector(narrow(to, v), Vector<uint16_t, kFloats<V>>);
  __builtin_memcpy(to, &narrowed, sizeof narrowed);
}

// The weights of one group at the output positions of a tile, for kernels that read them one by one: f32 and f64 are
// read where they are, 16-bit weights are widened into a buffer first.
template <class S>
struct TileWeights {
  static constexpr Index kMaxPositions = 14;
  Compute<S> buffer[kIs16Bit<S> ? kMaxPositions * INVOLUTION_MAX_16_BIT_TAPS : 1];

  // The elements from one position's weights to the next one's, as `read` returns them.
  INVOLUTION_INLINE static Index step(Index stored, Index taps) { return kIs16Bit<S> ? taps : stored; }

  // `taps` weights at each of the positions, which are `stored` elements apart in memory.
  INVOLUTION_INLINE const Compute<S>* read(const S* from, Index stored, Index taps, Index positions) {
    if constexpr (kIs16Bit<S>) {
      for (Index t = 0; t < positions; ++t) widen<kLanes<float>>(from + t * stored, taps, buffer + t * taps);
      return buffer;
    } else {
      return from;
    }
  }

 private:
  // The last vector overlaps the one before it.
  template <int W>
  INVOLUTION_INLINE static void widen(const S* from, Index count, float* to) {
    if constexpr (W > 1) {
      if (count < W) return widen<W / 2>(from, count, to);
    }
    for (Index i = 0; i < count; i += W) {
      const Index at = i + W <= count ? i : count - W;
      store(to + at, load<Vector<float, W>>(from + at));
    }
  }
};

}  // namespace INVOLUTION_ISA
}  // namespace involution
