// Threads: OpenMP, on as many threads as the caller names.
#pragma once
#ifdef _OPENMP
#include <omp.h>
#endif

#include "geometry.h"

namespace involution {
namespace INVOLUTION_ISA {

// The index of the calling thread in its parallel region.
INVOLUTION_INLINE Index thread_index() {
#ifdef _OPENMP
  return omp_get_thread_num();
#else
  return 0;
#endif
}

// Calls body(0), ..., body(count - 1), each once, in equal contiguous shares of the threads.
template <class F>
INVOLUTION_INLINE void parallel_for([[maybe_unused]] Index threads, Index count, F&& body) {
#pragma omp parallel for schedule(static) num_threads(int(threads)) if (threads > 1)
  for (Index i = 0; i < count; ++i) body(i);
}

// Number of threads to use: below 100,000 multiply-adds, starting threads costs more than it saves. Counts those of one
// of the maps (apply, adjoint, correlate), and `others`.
INVOLUTION_INLINE Index worthwhile_threads(const Geometry& g, Index others = 0) {
  const Index multiply_adds = g.batch * g.channels * volume(g.output) * volume(g.kernel) + others;
  return multiply_adds < 100000 ? 1 : g.threads;
}

}  // namespace INVOLUTION_ISA
}  // namespace involution
