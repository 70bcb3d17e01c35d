// The functions that every instruction set exports, as one table, and their declarations within an instruction set.
#pragma once
#include "involution.h"

namespace involution {

using Geometry = involution_geometry;
using BatchNorm = involution_batch_norm;
using ChannelNorm = involution_channel_norm;
using Index = int64_t;

// The three maps for one storage type.
struct Maps {
  using Map = void (*)(const Geometry&, const void* first, const void* second, void* out);
  Map apply, adjoint, correlate;
};

// Norms with the ReLU behind them, for one type.
struct Norms {
  void (*batch_norm)(const BatchNorm&);
  void (*batch_norm_backward)(const BatchNorm&);
  void (*channel_norm)(const ChannelNorm&);
  void (*channel_norm_backward)(const ChannelNorm&);
};

struct Kernels {
  using FusedLayer = void (*)(const Geometry&, const involution_fused_layer&);
  const char* name;
  Maps f32, f64, f16, bf16;
  FusedLayer fused_layer_f32, fused_layer_f64;
  Index (*fused_layer_workspace)(const Geometry&, const involution_fused_layer&);
  Norms norms_f32, norms_f64;
  Index (*batch_norm_workspace)(const BatchNorm&);
  double (*multiply_adds)(Index threads, Index rounds);
};

// Defined by kernels.cpp, which is compiled once per instruction set.
namespace baseline {
extern const Kernels kernels;
}
namespace avx2 {
extern const Kernels kernels;
}
namespace avx512 {
extern const Kernels kernels;
}

#ifdef INVOLUTION_ISA
namespace INVOLUTION_ISA {

// S is the storage type: float, double, Half or BFloat16. Compute<S> is the type of the arithmetic (see vector.h).
struct Half;
struct BFloat16;
template <class S>
struct ComputeType {
  using type = S;
};
template <>
struct ComputeType<Half> {
  using type = float;
};
template <>
struct ComputeType<BFloat16> {
  using type = float;
};
template <class S>
using Compute = typename ComputeType<S>::type;

template <class S>
void apply(const Geometry&, const S* x, const S* k, S* y);
template <class S>
void adjoint(const Geometry&, const S* dy, const S* k, Compute<S>* dx);
template <class S>
void correlate(const Geometry&, const S* dy, const S* x, S* dk);
template <class T>
void fused_layer(const Geometry&, const involution_fused_layer&);
Index fused_layer_workspace(const Geometry&, const involution_fused_layer&);
template <class T>
void batch_norm(const BatchNorm&);
template <class T>
void batch_norm_backward(const BatchNorm&);
Index batch_norm_workspace(const BatchNorm&);
template <class T>
void channel_norm(const ChannelNorm&);
template <class T>
void channel_norm_backward(const ChannelNorm&);
double multiply_adds(Index threads, Index rounds);

}  // namespace INVOLUTION_ISA
#endif

}  // namespace involution
