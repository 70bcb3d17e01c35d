// The table of one instruction set's functions.
#include "kernels.h"

namespace involution {
namespace INVOLUTION_ISA {
namespace {

// A map without its types, as the table holds it.
template <class S, class Out, void (*map)(const Geometry&, const S*, const S*, Out*)>
void untyped(const Geometry& g, const void* first, const void* second, void* out) {
  map(g, static_cast<const S*>(first), static_cast<const S*>(second), static_cast<Out*>(out));
}

template <class S>
constexpr Maps kMaps{untyped<S, S, apply<S>>, untyped<S, Compute<S>, adjoint<S>>, untyped<S, S, correlate<S>>};

template <class T>
constexpr Norms kNorms{batch_norm<T>, batch_norm_backward<T>, channel_norm<T>, channel_norm_backward<T>};

#define INVOLUTION_STRING(text) #text
#define INVOLUTION_NAME(isa) INVOLUTION_STRING(isa)

}  // namespace

const Kernels kernels{
    INVOLUTION_NAME(INVOLUTION_ISA),
    kMaps<float>,
    kMaps<double>,
    kMaps<Half>,
    kMaps<BFloat16>,
    fused_layer<float>,
    fused_layer<double>,
    fused_layer_workspace,
    kNorms<float>,
    kNorms<double>,
    batch_norm_workspace,
    multiply_adds,
};

}  // namespace INVOLUTION_ISA
}  // namespace involution
