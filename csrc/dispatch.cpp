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
// F16C, which Clang's __builtin_cpu_supports knows from version 18 on.
bool has_f16c() {
  unsigned a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C) != 0;
}

bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c(); }

bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq");
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
#ifdef INVOLUTION_X86
  __builtin_cpu_init();
#endif
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
