// float16 and bfloat16 in memory, float at work: halves by F16C and AVX-512 where a vector has their width, everything
// else by integer arithmetic on vectors.
#pragma once
#include "vector.h"

namespace involution {
namespace INVOLUTION_ISA {

template <class V>
constexpr int kWidth = int(sizeof(V) / sizeof(float));

template <class V>
using Bits = Vector<uint32_t, kWidth<V>>;

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

// Rounds to the nearest, ties to even; the sum carries into the exponent where it has to. A NaN stays one.
template <class V>
INVOLUTION_INLINE Bits<V> narrow(const BFloat16*, V v) {
  const Bits<V> bits = bits_of(v);
  return (v == v ? bits + 0x7fff + (bits >> 16 & 1) : bits | 0x400000) >> 16;
}

// A half's exponent counts from 15 and a float's from 127; infinities and NaN have the highest. Subnormal halves are
// integers times 2^-24, converted as such: as subnormal floats they could be flushed to zero.
template <class V>
INVOLUTION_INLINE V widen(const Half*, Bits<V> bits) {
  const Bits<V> magnitude = bits & 0x7fff;
  const V small = __builtin_convertvector(reinterpret_cast<Vector<int32_t, kWidth<V>>>(magnitude), V) * 0x1p-24f;
  const Bits<V> normal = (magnitude << 13) + (magnitude < 0x7c00 ? Bits<V>{} + (112 << 23) : Bits<V>{} + (224u << 23));
  return from_bits<V>((magnitude < 0x400 ? bits_of(small) : normal) | (bits & 0x8000) << 16);
}

// Rounds to the nearest, ties to even. Numbers below 2^-14 become subnormal: added to 1/2, their last bits are the
// half's.
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
INVOLUTION_INLINE V widened(const S* from) {
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
  Vector<uint16_t, kWidth<V>> stored;
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
  const auto narrowed = __builtin_convertvector(narrow(to, v), Vector<uint16_t, kWidth<V>>);
  __builtin_memcpy(to, &narrowed, sizeof narrowed);
}

// The weights of a tile of positions as its sums read them: where they lie or, from 16 bits, widened.
template <class S, int Positions>
struct Weights {
  Number<S> numbers[kIs16Bit<S> ? Positions * INVOLUTION_MOST_16_BIT_TAPS : 1];

  // From `taps` numbers at each of the positions, `step` apart.
  INVOLUTION_INLINE const Number<S>* take(const S* from, Index step, Index taps) {
    if constexpr (kIs16Bit<S>) {
      for (Index t = 0; t < Positions; ++t) widen_row<kLanes<float>>(from + t * step, taps, numbers + t * taps);
      return numbers;
    } else {
      return from;
    }
  }
  INVOLUTION_INLINE static Index step(Index stored, Index taps) { return kIs16Bit<S> ? taps : stored; }

 private:
  template <int W>
  INVOLUTION_INLINE static void widen_row(const S* from, Index count, float* to) {
    if constexpr (W > 1) {
      if (count < W) return widen_row<W / 2>(from, count, to);
    }
    for (Index i = 0; i < count; i += W) {
      const Index at = i + W <= count ? i : count - W;
      store(to + at, load<Vector<float, W>>(from + at));
    }
  }
};

}  // namespace INVOLUTION_ISA
}  // namespace involution
