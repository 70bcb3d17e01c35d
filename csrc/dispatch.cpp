// The C ABI: sends every call to the copy of the kernels that was compiled for this CPU.
#include <atomic>
#include <cstring>

#include "involution.h"

#define INVOLUTION_DECLARE(isa)                                               \
  namespace involution {                                                      \
  namespace isa {                                                             \
  template <class T>                                                          \
  void apply(const involution_geometry&, const T*, const T*, T*);             \
  template <class T>                                                          \
  void adjoint(const involution_geometry&, const T*, const T*, T*);           \
  template <class T>                                                          \
  void correlate(const involution_geometry&, const T*, const T*, T*);         \
  template <class T>                                                          \
  void layer(const involution_geometry&, const involution_layer&);            \
  int64_t layer_scratch(const involution_geometry&, const involution_layer&); \
  double multiply_add_rounds(int64_t threads, int64_t rounds);                \
  }                                                                           \
  }
INVOLUTION_DECLARE(baseline)
#ifdef INVOLUTION_X86
INVOLUTION_DECLARE(avx2)
INVOLUTION_DECLARE(avx512)
#endif

namespace {

template <class T>
using Kernel = void (*)(const involution_geometry&, const T*, const T*, T*);
using LayerKernel = void (*)(const involution_geometry&, const involution_layer&);

struct InstructionSet {
  const char* name;
  bool (*runs_here)();
  Kernel<float> apply_f32, adjoint_f32, correlate_f32;
  Kernel<double> apply_f64, adjoint_f64, correlate_f64;
  LayerKernel layer_f32, layer_f64;
  int64_t (*layer_scratch)(const involution_geometry&, const involution_layer&);
  double (*multiply_add_rounds)(int64_t, int64_t);
};

#define INVOLUTION_KERNELS(isa)                                                                              \
  involution::isa::apply<float>, involution::isa::adjoint<float>, involution::isa::correlate<float>,         \
      involution::isa::apply<double>, involution::isa::adjoint<double>, involution::isa::correlate<double>,      \
      involution::isa::layer<float>, involution::isa::layer<double>, involution::isa::layer_scratch,          \
      involution::isa::multiply_add_rounds

const InstructionSet kInstructionSets[] = {  // the best first
#ifdef INVOLUTION_X86
    {"avx512",
     [] {
       return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
              __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") != 0;
     },
     INVOLUTION_KERNELS(avx512)},
    {"avx2", [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") != 0; },
     INVOLUTION_KERNELS(avx2)},
#endif
    {"baseline", [] { return true; }, INVOLUTION_KERNELS(baseline)},
};

const InstructionSet* best() {
#ifdef INVOLUTION_X86
  __builtin_cpu_init();
#endif
  for (const auto& set : kInstructionSets) {
    if (set.runs_here()) return &set;
  }
  return nullptr;  // not reached: the baseline runs everywhere
}

std::atomic<const InstructionSet*> in_use{best()};

}  // namespace

extern "C" {

#define INVOLUTION_ENTRY(map, suffix, T)                                                                  \
  void involution_##map##_##suffix(const involution_geometry* g, const T* first, const T* second, T* out) { \
    in_use.load(std::memory_order_relaxed)->map##_##suffix(*g, first, second, out);                       \
  }
INVOLUTION_ENTRY(apply, f32, float)
INVOLUTION_ENTRY(apply, f64, double)
INVOLUTION_ENTRY(adjoint, f32, float)
INVOLUTION_ENTRY(adjoint, f64, double)
INVOLUTION_ENTRY(correlate, f32, float)
INVOLUTION_ENTRY(correlate, f64, double)

void involution_layer_f32(const involution_geometry* g, const involution_layer* layer) {
  in_use.load(std::memory_order_relaxed)->layer_f32(*g, *layer);
}
void involution_layer_f64(const involution_geometry* g, const involution_layer* layer) {
  in_use.load(std::memory_order_relaxed)->layer_f64(*g, *layer);
}
int64_t involution_layer_scratch(const involution_geometry* g, const involution_layer* layer) {
  return in_use.load(std::memory_order_relaxed)->layer_scratch(*g, *layer);
}

double involution_multiply_adds(int64_t threads, int64_t rounds) {
  return in_use.load(std::memory_order_relaxed)->multiply_add_rounds(threads, rounds);
}

const char* involution_instruction_set(void) { return in_use.load(std::memory_order_relaxed)->name; }

int involution_use(const char* name) {
  for (const auto& set : kInstructionSets) {
    if (std::strcmp(set.name, name) == 0 && set.runs_here()) {
      in_use.store(&set);
      return 1;
    }
  }
  return 0;
}

}  // extern "C"
