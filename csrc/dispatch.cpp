// The C ABI: chooses an instruction set's table of functions when the library is loaded, and calls through it.
#include <atomic>
#include <cstring>

#ifdef INVOLUTION_X86
#include <cpuid.h>
#endif

#include "kernels.h"

namespace involution {
namespace {

struct InstructionSet {
  const Kernels& kernels;
  bool (*runs_here)();
};

#ifdef INVOLUTION_X86
// The bits of XCR0: the operating system saves the registers of AVX, and those of AVX-512 too.
constexpr unsigned kSavesAvx = 0x06, kSavesAvx512 = 0xe6;

// Whether the CPU has all features of cpuid's leaf 1 (ecx) and leaf 7 (ebx), and the system saves their registers.
// Not __builtin_cpu_supports, whose table is in a runtime library that clang-cl does not link.
bool has(unsigned leaf1, unsigned leaf7, unsigned saved) {
  unsigned a, b, c, d;
  leaf1 |= bit_OSXSAVE;
  if (!__get_cpuid(1, &a, &b, &c, &d) || (c & leaf1) != leaf1) return false;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (b & leaf7) != leaf7) return false;
  asm volatile("xgetbv" : "=a"(a), "=d"(d) : "c"(0));
  return (a & saved) == saved;
}

bool has_avx2() { return has(bit_AVX | bit_FMA | bit_F16C, bit_AVX2, kSavesAvx); }

bool has_avx512() {
  return has(bit_AVX | bit_FMA | bit_F16C, bit_AVX2 | bit_AVX512F | bit_AVX512VL | bit_AVX512BW | bit_AVX512DQ,
             kSavesAvx512);
}
#endif

const InstructionSet kInstructionSets[] = {
// the best first
#ifdef INVOLUTION_X86
    {avx512::kernels, has_avx512},
    {avx2::kernels, has_avx2},
#endif
    {baseline::kernels, [] { return true; }},
};

const Kernels* best() {
  for (const auto& set : kInstructionSets) {
    if (set.runs_here()) return &set.kernels;
  }
  return nullptr;  // not reached: the baseline runs everywhere
}

std::atomic<const Kernels*> in_use{best()};

const Kernels& kernels() { return *in_use.load(std::memory_order_relaxed); }

}  // namespace
}  // namespace involution

using involution::in_use;
using involution::kernels;

extern "C" {

void involution_apply_f32(const involution_geometry* g, const float* x, const float* k, float* y) {
  kernels().f32.apply(*g, x, k, y);
}
void involution_apply_f64(const involution_geometry* g, const double* x, const double* k, double* y) {
  kernels().f64.apply(*g, x, k, y);
}
void involution_apply_f16(const involution_geometry* g, const void* x, const void* k, void* y) {
  kernels().f16.apply(*g, x, k, y);
}
void involution_apply_bf16(const involution_geometry* g, const void* x, const void* k, void* y) {
  kernels().bf16.apply(*g, x, k, y);
}

void involution_adjoint_f32(const involution_geometry* g, const float* dy, const float* k, float* dx) {
  kernels().f32.adjoint(*g, dy, k, dx);
}
void involution_adjoint_f64(const involution_geometry* g, const double* dy, const double* k, double* dx) {
  kernels().f64.adjoint(*g, dy, k, dx);
}
void involution_adjoint_f16(const involution_geometry* g, const void* dy, const void* k, float* dx) {
  kernels().f16.adjoint(*g, dy, k, dx);
}
void involution_adjoint_bf16(const involution_geometry* g, const void* dy, const void* k, float* dx) {
  kernels().bf16.adjoint(*g, dy, k, dx);
}

void involution_correlate_f32(const involution_geometry* g, const float* dy, const float* x, float* dk) {
  kernels().f32.correlate(*g, dy, x, dk);
}
void involution_correlate_f64(const involution_geometry* g, const double* dy, const double* x, double* dk) {
  kernels().f64.correlate(*g, dy, x, dk);
}
void involution_correlate_f16(const involution_geometry* g, const void* dy, const void* x, void* dk) {
  kernels().f16.correlate(*g, dy, x, dk);
}
void involution_correlate_bf16(const involution_geometry* g, const void* dy, const void* x, void* dk) {
  kernels().bf16.correlate(*g, dy, x, dk);
}

void involution_fused_layer_f32(const involution_geometry* g, const involution_fused_layer* layer) {
  kernels().fused_layer_f32(*g, *layer);
}
void involution_fused_layer_f64(const involution_geometry* g, const involution_fused_layer* layer) {
  kernels().fused_layer_f64(*g, *layer);
}
int64_t involution_fused_layer_workspace(const involution_geometry* g, const involution_fused_layer* layer) {
  return kernels().fused_layer_workspace(*g, *layer);
}

void involution_batch_norm_f32(const involution_batch_norm* norm) { kernels().norms_f32.batch_norm(*norm); }
void involution_batch_norm_f64(const involution_batch_norm* norm) { kernels().norms_f64.batch_norm(*norm); }
void involution_batch_norm_backward_f32(const involution_batch_norm* norm) { kernels().norms_f32.batch_norm_backward(*norm); }
void involution_batch_norm_backward_f64(const involution_batch_norm* norm) { kernels().norms_f64.batch_norm_backward(*norm); }
void involution_channel_norm_f32(const involution_channel_norm* norm) { kernels().norms_f32.channel_norm(*norm); }
void involution_channel_norm_f64(const involution_channel_norm* norm) { kernels().norms_f64.channel_norm(*norm); }
void involution_channel_norm_backward_f32(const involution_channel_norm* norm) { kernels().norms_f32.channel_norm_backward(*norm); }
void involution_channel_norm_backward_f64(const involution_channel_norm* norm) { kernels().norms_f64.channel_norm_backward(*norm); }
int64_t involution_batch_norm_workspace(const involution_batch_norm* norm) {
  return kernels().batch_norm_workspace(*norm);
}

double involution_multiply_adds(int64_t threads, int64_t rounds) { return kernels().multiply_adds(threads, rounds); }

const char* involution_instruction_set(void) { return kernels().name; }

int involution_use(const char* name) {
  for (const auto& set : involution::kInstructionSets) {
    if (std::strcmp(set.kernels.name, name) == 0 && set.runs_here()) {
      in_use.store(&set.kernels);
      return 1;
    }
  }
  return 0;
}

}  // extern "C"
