// Peak arithmetic rate: independent chains of multiply-adds in registers, with which benchmarks compare the kernels.
#include "parallel.h"
#include "vector.h"

namespace involution {
namespace INVOLUTION_ISA {

double multiply_adds(Index threads, Index rounds) {
  constexpr int kChains = kRegisters - 4;
  using V = Vector<float, kLanes<float>>;
  parallel_for(threads, threads, [&](Index) {
    V sum[kChains];
    INVOLUTION_UNROLL
    for (int i = 0; i < kChains; ++i) sum[i] = V{} + float(i);
    V scale = V{} + 0.999f, shift = V{} + 0.001f;
    for (Index round = 0; round < rounds; ++round) {
      pin_in_register(scale);
      INVOLUTION_UNROLL
      for (int i = 0; i < kChains; ++i) {
        sum[i] = sum[i] * scale + shift;
        pin_in_register(sum[i]);
      }
    }
    V total{};
    INVOLUTION_UNROLL
    for (int i = 0; i < kChains; ++i) total += sum[i];
    asm volatile("" : : "m"(total));  // a use of the result, without which all of it would be removed
  });
  return 2.0 * kChains * kLanes<float> * double(rounds) * double(threads);
}

}  // namespace INVOLUTION_ISA
}  // namespace involution
