/* The types in memory, the positions of a geometry, and the three maps as plain loops with bounds of their rounding. */
#pragma once
#include <float.h>
#include <stdlib.h>
#include <string.h>
#include <tgmath.h>

#include "involution.h"

#ifndef WIDE /* the type of the loops; valgrind knows double alone */
#define WIDE long double
#endif
typedef WIDE Wide;
typedef involution_geometry Geometry;
typedef void (*Map)(const Geometry*, const void*, const void*, void*);

/* A type in memory. A result of n terms is within (n + 2) * `compute` of the sum of their absolute values, and a stored
 * one within `store` of itself and `smallest` besides; values from `overflow` on are stored as infinity. */
typedef struct {
  const char* name;
  size_t bytes;
  double compute, store, smallest, overflow;
  double tiny, huge; /* factors of operands for denormal and for large products */
  double (*read)(const void*, int64_t);
  void (*write)(void*, int64_t, double);
} Type;

static double read_f32(const void* p, int64_t i) { return ((const float*)p)[i]; }
static void write_f32(void* p, int64_t i, double v) { ((float*)p)[i] = (float)v; }
static double read_f64(const void* p, int64_t i) { return ((const double*)p)[i]; }
static void write_f64(void* p, int64_t i, double v) { ((double*)p)[i] = v; }
static double read_f16(const void* p, int64_t i) { return (double)((const _Float16*)p)[i]; }
static void write_f16(void* p, int64_t i, double v) { ((_Float16*)p)[i] = (_Float16)v; }

static double read_bf16(const void* p, int64_t i) {
  const uint32_t bits = (uint32_t)((const uint16_t*)p)[i] << 16;
  float v;
  memcpy(&v, &bits, 4);
  return v;
}

static void write_bf16(void* p, int64_t i, double v) { /* cuts: good enough for operands */
  const float f = (float)v;
  uint32_t bits;
  memcpy(&bits, &f, 4);
  ((uint16_t*)p)[i] = (uint16_t)(bits >> 16 | (isnan(v) ? 64 : 0));
}

static const Type kTypes[] = {
    {"f32", 4, 0x1p-24, 0, 0x1p-149, 0x1.ffffffp127, 1e-41, 1e17, read_f32, write_f32},
    {"f64", 8, 0x1p-53, 0, 0x1p-1074, INFINITY, 1e-312, 1e150, read_f64, write_f64},
    {"f16", 2, 0x1p-24, 0x1p-11, 0x1p-25, 65520, 1e-6, 200, read_f16, write_f16},
    {"bf16", 2, 0x1p-24, 0x1p-8, 0x1p-134, 0x1.ffp127, 1e-40, 1e17, read_bf16, write_bf16},
};

static int64_t volume(const int64_t* sizes) { return sizes[0] * sizes[1] * sizes[2]; }

static int64_t image_at(const Geometry* g, const int64_t* sizes, int64_t n, int64_t c, int64_t position) {
  const int64_t count = volume(sizes);
  return g->channels_last ? (n * count + position) * g->channels + c : (n * g->channels + c) * count + position;
}

static int64_t kernel_at(const Geometry* g, int64_t n, int64_t group, int64_t tap, int64_t output) {
  const int64_t taps = volume(g->kernel), outputs = volume(g->output);
  return g->channels_last ? ((n * outputs + output) * g->groups + group) * taps + tap
                          : ((n * g->groups + group) * taps + tap) * outputs + output;
}

/* The input position that a tap sees at an output position, -1 outside. */
static int64_t seen(const Geometry* g, int64_t output, int64_t tap) {
  int64_t result = 0, outputs = volume(g->output), taps = volume(g->kernel);
  for (int axis = 0; axis < 3; ++axis) {
    outputs /= g->output[axis];
    taps /= g->kernel[axis];
    const int64_t o = output / outputs % g->output[axis], u = tap / taps % g->kernel[axis];
    const int64_t i = o * g->stride[axis] + u * g->dilation[axis] - g->padding[axis];
    if (i < 0 || i >= g->input[axis]) return -1;
    result = result * g->input[axis] + i;
  }
  return result;
}

/* Sums, the sums of absolute values, and the numbers of terms. */
typedef struct {
  Wide *value, *magnitude;
  int64_t *terms, count;
} Sums;

static Sums new_sums(int64_t count) {
  const Sums sums = {calloc((size_t)count, sizeof(Wide)), calloc((size_t)count, sizeof(Wide)),
                     calloc((size_t)count, sizeof(int64_t)), count};
  return sums;
}

static void free_sums(Sums sums) { free(sums.value), free(sums.magnitude), free(sums.terms); }

static void add(Sums sums, int64_t at, Wide term) {
  sums.value[at] += term;
  sums.magnitude[at] += fabs(term);
  ++sums.terms[at];
}

/* The elements of the three roles of a geometry: images x, kernel maps k, outputs y. */
static void elements_of(const Geometry* g, int64_t counts[3]) {
  counts[0] = g->batch * g->channels * volume(g->input);
  counts[1] = g->batch * g->groups * volume(g->kernel) * volume(g->output);
  counts[2] = g->batch * g->channels * volume(g->output);
}

/* The roles (0 x, 1 k, 2 y) of each map's operands and result: apply(x, k) -> y, adjoint(y, k) -> x, correlate(y, x) -> k. */
static const int kRoles[3][3] = {{0, 1, 2}, {2, 1, 0}, {2, 0, 1}};

/* One map as a loop over output positions and taps; `sums` may hold values to add to. */
static void map_loop(int which, const Type* type, const Geometry* g, const void* first, const void* second, Sums sums) {
  const int64_t width = g->channels / g->groups;
  const int* roles = kRoles[which];
  for (int64_t o = 0; o < volume(g->output); ++o)
    for (int64_t u = 0; u < volume(g->kernel); ++u) {
      const int64_t position = seen(g, o, u);
      if (position < 0) continue;
      for (int64_t n = 0; n < g->batch; ++n)
        for (int64_t c = 0; c < g->channels; ++c) {
          const int64_t at[3] = {image_at(g, g->input, n, c, position), kernel_at(g, n, c / width, u, o),
                                 image_at(g, g->output, n, c, o)};
          add(sums, at[roles[2]],
              (Wide)type->read(first, at[roles[0]]) * (Wide)type->read(second, at[roles[1]]));
        }
    }
}

/* How far a stored result is from a sum, in units of the bound for its rounding; NaN and infinity must agree. */
static double excess(const Type* type, double found, Wide wanted, Wide bound) {
  if (isnan(wanted) || isinf(wanted)) return isnan(wanted) ? (isnan(found) ? 0 : INFINITY) : (found == wanted ? 0 : INFINITY);
  bound += fabs(wanted) * type->store + type->smallest;
  if (isnan(found)) return INFINITY;
  if (isinf(found)) return (found > 0) == (wanted > 0) && fabs(wanted) + bound >= type->overflow ? 0 : INFINITY;
  return (double)(fabs(found - wanted) / bound);
}

static double excess_of_sum(const Type* type, double found, Sums sums, int64_t i) {
  const Wide terms = (Wide)sums.terms[i];
  const Wide bound = (terms + 2) * type->compute * sums.magnitude[i] + terms * (type->bytes == 8 ? 0x1p-1074 : 0x1p-149);
  return excess(type, found, sums.value[i], isnan(bound) || isinf(bound) ? 0 : bound);
}
