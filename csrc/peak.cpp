// The multiply-adds that a core can do at best: what benchmarks hold the kernels against.
#include "geometry.h"

namespace involution {
namespace INVOLUTION_ISA {

// Runs `rounds` rounds of independent multiply-adds on every thread; returns how many operations those were, a
// multiply-add being two.
double multiply_add_rounds(int64_t threads, int64_t rounds) {
  constexpr int kChains = kRegisters - 4;
  using V = Vector<float, kLanes<float>>;
  Geometry g{};
  g.threads = threads;
  g.batch = rounds + 100000;  // worth the threads
  g.channels = 1;
  for (int axis = 0; axis < 3; ++axis) g.output[axis] = g.kernel[axis] = 1;
  in_parallel(g, threads, [&](Index) {
    V sum[kChains];
    unroll<kChains>([&](auto i) INVOLUTION_BODY { sum[i] = V{} + float(i.value); });
    V scale = V{} + 0.999f, shift = V{} + 0.001f;
    for (Index round = 0; round < rounds; ++round) {
      keep(scale);
      unroll<kChains>([&](auto i) INVOLUTION_BODY {
        sum[i] = sum[i] * scale + shift;
        keep(sum[i]);
      });
    }
    V total{};
    unroll<kChains>([&](auto i) INVOLUTION_BODY { total += sum[i]; });
    asm volatile("" : : "m"(total));  // somebody wants it, or all of it is dead
  });
  return 2.0 * kChains * kLanes<float> * double(rounds) * double(threads);
}

}  // namespace INVOLUTION_ISA
}  // namespace involution
