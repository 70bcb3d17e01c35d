// The machine: vectors of W lanes, their loads and stores, and unrolled loops.
//
// Every kernel file is compiled once per instruction set, in a namespace that INVOLUTION_ISA names. No template of the
// standard library is instantiated here: of an inline function compiled for several instruction sets the linker keeps
// one copy, which could be the one that the oldest CPU cannot run.
#pragma once
#include <cstdint>
#include <type_traits>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "kernels.h"

namespace involution {
namespace INVOLUTION_ISA {

#define INVOLUTION_INLINE inline __attribute__((always_inline))
#define INVOLUTION_BODY __attribute__((always_inline))  // of a lambda

// Unrolls the loop that follows, whose trip count (up to 64) is a constant, before arrays of vectors are assigned to
// registers. In a nest, every trip count must be constant by itself, not through an outer loop's index; a condition
// that depends on an outer index folds away.
#define INVOLUTION_UNROLL _Pragma("GCC unroll 64")

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

// Lanes of a whole vector.
template <class T>
constexpr int kLanes = kVectorBytes / int(sizeof(T));

template <class T, int W>
struct VectorOf {
  typedef T type __attribute__((vector_size(sizeof(T) * W)));
};
template <class T, int W>
using Vector = typename VectorOf<T, W>::type;

// Elements of 16 bits in memory; half.h converts them from and to float.
struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};
template <class S>
constexpr bool kIs16Bit = sizeof(S) == 2;

template <class V, class S>
V load_widened(const S* from);
template <class V, class S>
void store_narrowed(S* to, V v);

// Loads a vector; 16-bit elements are widened to float.
template <class V, class S>
INVOLUTION_INLINE V load(const S* from) {
  if constexpr (kIs16Bit<S>) {
    return load_widened<V>(from);
  } else {
    V v;
    __builtin_memcpy(&v, from, sizeof v);
    return v;
  }
}

// Stores a vector; into 16-bit elements it is rounded.
template <class V, class S>
INVOLUTION_INLINE void store(S* to, V v) {
  if constexpr (kIs16Bit<S>) store_narrowed(to, v);
  else __builtin_memcpy(to, &v, sizeof v);
}

// Stores a vector at an aligned address with a non-temporal store where the machine has one.
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

// Orders streamed stores before all later stores.
INVOLUTION_INLINE void stream_fence() {
#if defined(__AVX__)
  _mm_sfence();
#endif
}

// ReLU, lane by lane; NaN stays NaN.
template <class V>
INVOLUTION_INLINE V rectified(V v) {
  return v < 0 ? V{} : v;
}

// Two barriers to GCC's optimisers. Both emit no instruction.
//
// pin_in_register: a vector that several multiply-adds share stays in a register. Without it GCC makes its load a
// memory operand of each of them and loads it that many times.
template <class V>
INVOLUTION_INLINE void pin_in_register(V& v) {
  if constexpr (sizeof(V) == kVectorBytes) {
#if defined(__x86_64__)
    asm("" : "+v"(v));
#elif defined(__aarch64__)
    asm("" : "+w"(v));
#endif
  }
}

// opaque: hides a value's origin from the optimiser so that it does not keep a separate address per unrolled access.
// GCC would carry these through the loops, many more than there are registers.
template <class P>
INVOLUTION_INLINE void opaque(P& p) {
  asm("" : "+r"(p));
}

// Elements at equal distances, base[0], base[distance], ..., base[6 * distance], each in reach of one x86 address
// (base + index * 1, 2, 4 or 8) with three index registers in all.
template <class T>
struct Strided {
  Index one, three, five;  // multiples of the distance, in bytes

  INVOLUTION_INLINE explicit Strided(Index distance) : one(distance * Index(sizeof(T))), three(3 * one), five(5 * one) {
    opaque(one);
    opaque(three);
    opaque(five);
  }
  // base[i * distance]; i, below 7, is the index of an unrolled loop.
  INVOLUTION_INLINE T at(const T* base, int i) const {
    const Index index = i == 3 || i == 6 ? three : i == 5 ? five : one;
    const int scale = i == 4 ? 4 : i == 2 || i == 6 ? 2 : i == 0 ? 0 : 1;
    return *reinterpret_cast<const T*>(reinterpret_cast<const char*>(base) + index * scale);
  }
};

}  // namespace INVOLUTION_ISA
}  // namespace involution
