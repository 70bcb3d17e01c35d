/* A wrong involution_apply_f32, preloaded into random_calls, which must notice: one fault for each value of FAULT. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <string.h>

#include "involution.h"

typedef void (*Apply)(const involution_geometry*, const float*, const float*, float*);

void involution_apply_f32(const involution_geometry* g, const float* x, const float* k, float* y) {
  ((Apply)dlsym(RTLD_NEXT, "involution_apply_f32"))(g, x, k, y);
  const int64_t outputs = g->batch * g->channels * g->output[0] * g->output[1] * g->output[2];
  const int64_t inputs = g->batch * g->channels * g->input[0] * g->input[1] * g->input[2];
  const volatile float* reads = x;
  float sum = 0;
  switch (FAULT) {
    case 1: y[outputs - 1] *= 1.00001f; break;      /* 84 units in the last place */
    case 2: sum = reads[inputs]; break;             /* reads after the input */
    case 3: sum = reads[-1]; break;                 /* reads before it */
    case 4: y[outputs] = 0; break;                  /* writes after the output */
    case 5: y[-1] = 0; break;                       /* writes before it */
    case 6: ((float*)x)[inputs / 2] = 7; break;     /* writes to the input */
    case 7: y[0] = y[0] == y[0] ? y[0] : 0; break;  /* loses a NaN */
    case 8: y[0] = g->threads % 2 ? y[0] : __builtin_nextafterf(y[0], 9); break; /* depends on the threads */
  }
  if (sum == 12345.678f) memset(y, 0, 4);
}
