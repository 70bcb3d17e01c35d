// What the kernels need of the machine: vectors of W numbers, and loops unrolled at compile time.
//
// Each kernel file is compiled once per instruction set, with INVOLUTION_ISA naming a namespace of its own. Nothing of
// the standard library is instantiated here: a shared inline function compiled for the newest CPU could be the copy
// that the linker keeps for the oldest.
#pragma once
#include <cstdint>
#include <type_traits>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "involution.h"

namespace involution {
namespace INVOLUTION_ISA {

using Geometry = involution_geometry;
using Index = int64_t;

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
constexpr int kRegisters = 32;
#elif defined(__AVX__)
constexpr int kVectorBytes = 32;
constexpr int kRegisters = 16;
#elif defined(__aarch64__)
constexpr int kVectorBytes = 16;
constexpr int kRegisters = 32;
#else
constexpr int kVectorBytes = 16;
constexpr int kRegisters = 16;
#endif

template <class T>
constexpr int kLanes = kVectorBytes / int(sizeof(T));

#define INVOLUTION_INLINE inline __attribute__((always_inline))

template <class T, int W>
struct VectorOf {
  typedef T type __attribute__((vector_size(sizeof(T) * W)));
};
template <class T, int W>
using Vector = typename VectorOf<T, W>::type;

// 16-bit numbers as memory holds them; at work they are float. half.h converts them.
struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

template <class S>
constexpr bool kIs16Bit = std::is_same_v<S, Half> || std::is_same_v<S, BFloat16>;
template <class S>
using Number = std::conditional_t<kIs16Bit<S>, float, S>;

template <class V, class S>
V widened(const S* from);
template <class V, class S>
void store_narrowed(S* to, V v);

// A vector of numbers from memory that holds them as they are, or in 16 bits each.
template <class V, class S>
INVOLUTION_INLINE V load(const S* from) {
  if constexpr (kIs16Bit<S>) {
    return widened<V>(from);
  } else {
    V v;
    __builtin_memcpy(&v, from, sizeof v);
    return v;
  }
}

template <class V, class S>
INVOLUTION_INLINE void store(S* to, V v) {
  if constexpr (kIs16Bit<S>) store_narrowed(to, v);
  else __builtin_memcpy(to, &v, sizeof v);
}

// Stores a vector at an aligned address past the cache, where the machine can: memory that is not read again soon.
template <class V, class T>
INVOLUTION_INLINE void stream(T* to, V v) {
#if defined(__AVX512F__)
  if constexpr (sizeof(V) == 64) return _mm512_stream_ps(reinterpret_cast<float*>(to), reinterpret_cast<__m512>(v));
#endif
#if defined(__AVX__)
  if constexpr (sizeof(V) == 32) return _mm256_stream_ps(reinterpret_cast<float*>(to), reinterpret_cast<__m256>(v));
#endif
  store(to, v);
}

// Orders streamed stores before whatever follows.
INVOLUTION_INLINE void streams_end() {
#if defined(__AVX__)
  _mm_sfence();
#endif
}

// Keeps a vector that several multiply-adds share in a register: GCC would load it again for each of them.
template <class V>
INVOLUTION_INLINE void keep(V& v) {
  if constexpr (sizeof(V) == kVectorBytes) {
#if defined(__x86_64__)
    asm("" : "+v"(v));
#elif defined(__aarch64__)
    asm("" : "+w"(v));
#endif
  }
}

// Hides where a pointer or number comes from. Without it GCC carries an address of its own through the loops for every
// unrolled access, far more than there are registers.
template <class P>
INVOLUTION_INLINE void hide(P& p) {
  asm("" : "+r"(p));
}

// Numbers at equal distances, base[0], base[distance], ..., base[6 * distance], each within reach of one x86 address
// (base + index * 1, 2, 4 or 8) from three index registers.
template <class T>
struct Strided {
  Index one, three, five;  // multiples of the distance, in bytes

  INVOLUTION_INLINE explicit Strided(Index distance)
      : one(distance * Index(sizeof(T))), three(3 * one), five(5 * one) {
    hide(one);
    hide(three);
    hide(five);
  }
  template <int I>
  INVOLUTION_INLINE T at(const T* base) const {
    static_assert(I >= 0 && I < 7);
    constexpr int times[] = {0, 1, 2, 1, 4, 1, 2};
    const Index index = I == 3 || I == 6 ? three : I == 5 ? five : one;
    return *reinterpret_cast<const T*>(reinterpret_cast<const char*>(base) + index * times[I]);
  }
};

template <int I>
using Constant = std::integral_constant<int, I>;

template <int... I, class F>
INVOLUTION_INLINE void unroll_sequence(std::integer_sequence<int, I...>, F&& body) {
  (body(Constant<I>{}), ...);
}

// Calls body(0), ..., body(N - 1) with constants. (A pragma would leave arrays of vectors in memory.)
template <int N, class F>
INVOLUTION_INLINE void unroll(F&& body) {
  unroll_sequence(std::make_integer_sequence<int, N>{}, body);
}
#define INVOLUTION_BODY __attribute__((always_inline))

}  // namespace INVOLUTION_ISA
}  // namespace involution
