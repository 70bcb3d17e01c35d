// What the kernels need of the machine: vectors of W numbers, and loops unrolled at compile time.
//
// Each kernel file is compiled once per instruction set, with INVOLUTION_ISA naming a namespace of its own. Nothing of
// the standard library is instantiated here: a shared inline function compiled for the newest CPU could be the copy
// that the linker keeps for the oldest.
#pragma once
#include <cstdint>
#include <utility>

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

template <class V, class T>
INVOLUTION_INLINE V load(const T* from) {
  V v;
  __builtin_memcpy(&v, from, sizeof v);
  return v;
}

template <class V, class T>
INVOLUTION_INLINE void store(T* to, V v) {
  __builtin_memcpy(to, &v, sizeof v);
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
