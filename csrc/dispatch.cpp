// The C ABI: sends every call to the copy of the kernels that was compiled for this CPU.
#include <atomic>
#include <cstring>

#ifdef INVOLUTION_X86
#include <cpuid.h>
#endif

#include "involution.h"

#define INVOLUTION_DECLARE(isa)                                               \
  namespace involution {                                                      \
  namespace isa {                                                             \
  struct Half;                                                                \
  struct BFloat16;                                                            \
  template <class S>                                                          \
  void apply(const involution_geometry&, const S*, const S*, S*);             \
  template <class S, class T>                                                 \
  void adjoint(const involution_geometry&, const S*, const S*, T*);           \
  template <class S>                                                          \
  void correlate(const involution_geometry&, const S*, const S*, S*);         \
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

using Map = void (*)(const involution_geometry&, const void*, const void*, void*);
using Layer = void (*)(const involution_geometry&, const involution_layer&);

// The three maps for numbers that are stored in one way.
struct Maps {
  Map apply, adjoint, correlate;
};

struct InstructionSet {
  const char* name;
  bool (*runs_here)();
  Maps f32, f64, f16, bf16;
  Layer layer_f32, layer_f64;
  int64_t (*layer_scratch)(const involution_geometry&, const involution_layer&);
  double (*multiply_add_rounds)(int64_t, int64_t);
};

// One map of an instruction set, from numbers stored as S to numbers stored as T.
#define INVOLUTION_MAP(isa, map, S, T)                                                               \
  [](const involution_geometry& g, const void* first, const void* second, void* out) {               \
    using namespace involution::isa;                                                                 \
    map(g, static_cast<const S*>(first), static_cast<const S*>(second), static_cast<T*>(out));       \
  }
#define INVOLUTION_MAPS(isa, S, T) \
  { INVOLUTION_MAP(isa, apply, S, S), INVOLUTION_MAP(isa, adjoint, S, T), INVOLUTION_MAP(isa, correlate, S, S) }
#define INVOLUTION_KERNELS(isa)                                                                      \
  INVOLUTION_MAPS(isa, float, float), INVOLUTION_MAPS(isa, double, double),                          \
      INVOLUTION_MAPS(isa, Half, float), INVOLUTION_MAPS(isa, BFloat16, float),                      \
      involution::isa::layer<float>, involution::isa::layer<double>, involution::isa::layer_scratch, \
      involution::isa::multiply_add_rounds

#ifdef INVOLUTION_X86
// F16C, which Clang's __builtin_cpu_supports knows from version 18 on.
bool converts_halves() {
  unsigned a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C) != 0;
}
#endif

const InstructionSet kInstructionSets[] = {  // the best first
#ifdef INVOLUTION_X86
    {"avx512",
     [] {
       return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
              __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") != 0;
     },
     INVOLUTION_KERNELS(avx512)},
    {"avx2", [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && converts_halves(); },
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

#define INVOLUTION_ENTRY(map, suffix, S, T)                                                                 \
  void involution_##map##_##suffix(const involution_geometry* g, const S* first, const S* second, T* out) { \
    in_use.load(std::memory_order_relaxed)->suffix.map(*g, first, second, out);                             \
  }
#define INVOLUTION_ENTRIES(suffix, S, T)    \
  INVOLUTION_ENTRY(apply, suffix, S, S)     \
  INVOLUTION_ENTRY(adjoint, suffix, S, T)   \
  INVOLUTION_ENTRY(correlate, suffix, S, S)
INVOLUTION_ENTRIES(f32, float, float)
INVOLUTION_ENTRIES(f64, double, double)
INVOLUTION_ENTRIES(f16, void, float)
INVOLUTION_ENTRIES(bf16, void, float)

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
