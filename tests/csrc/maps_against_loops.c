/* Checks a libinvolution.so against plain loops in double, without Python: for machines that are only emulated.
 *
 *     cc -std=gnu11 -O2 -I csrc tests/csrc/maps_against_loops.c -o check libinvolution.so -lm && LD_LIBRARY_PATH=. ./check
 *
 * An argument is the instruction set.
 * Prints the number of comparisons and exits with 0, or prints every call whose results differ and exits with 1.
 */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "involution.h"

typedef involution_geometry Geometry;
typedef void (*Map)(const Geometry*, const void*, const void*, void*);

/* A type in memory. `epsilon` is half the distance of 1 to the next number of it, with a margin for sums. */
typedef struct {
  const char* name;
  size_t bytes;
  double epsilon;
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
  ((uint16_t*)p)[i] = (uint16_t)(bits >> 16);
}

static const Type kF32 = {"f32", 4, 2e-6, read_f32, write_f32};
static const Type kF64 = {"f64", 8, 4e-15, read_f64, write_f64};
static const Type kF16 = {"f16", 2, 6e-4, read_f16, write_f16};
static const Type kBF16 = {"bf16", 2, 5e-3, read_bf16, write_bf16};

static int comparisons, failures;

static int64_t volume(const int64_t* sizes) { return sizes[0] * sizes[1] * sizes[2]; }

static double uniform(void) { /* -1 to 1, the same on every machine */
  static uint64_t state = 1;
  state = state * 6364136223846793005u + 1442695040888963407u;
  return (double)(state >> 33) / 1073741824.0 - 1;
}

static void* filled(const Type* type, int64_t count) {
  void* p = malloc((size_t)count * type->bytes);
  for (int64_t i = 0; i < count; ++i) type->write(p, i, uniform());
  return p;
}

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

static void compare(const char* what, const Type* type, const Geometry* g, const void* found, const double* wanted,
                    const double* magnitude, int64_t count) {
  double worst = 0;
  for (int64_t i = 0; i < count; ++i) {
    const double off = fabs(type->read(found, i) - wanted[i]) / (magnitude[i] + 1e-3);
    if (!(off <= worst)) worst = off; /* also NaN */
  }
  ++comparisons;
  if (worst <= type->epsilon) return;
  ++failures;
  printf("%s %s: off by %g (channels %d, groups %d, kernel %dx%dx%d, stride %d, channels_last %d, threads %d)\n", what,
         type->name, worst, (int)g->channels, (int)g->groups, (int)g->kernel[0], (int)g->kernel[1], (int)g->kernel[2],
         (int)g->stride[2], (int)g->channels_last, (int)g->threads);
}

/* One map: `which` is 0 apply(x, k), 1 adjoint(dy, k), 2 correlate(dy, x). */
static void check_map(int which, Map map, const Type* type, const Type* result_type, const Geometry* g) {
  static const char* const names[] = {"apply", "adjoint", "correlate"};
  const int64_t xs = g->batch * g->channels * volume(g->input), ys = g->batch * g->channels * volume(g->output);
  const int64_t ks = g->batch * g->groups * volume(g->kernel) * volume(g->output);
  const int64_t counts[3][3] = {{xs, ks, ys}, {ys, ks, xs}, {ys, xs, ks}};
  const int64_t count = counts[which][2], width = g->channels / g->groups;
  void *first = filled(type, counts[which][0]), *second = filled(type, counts[which][1]);
  void* found = filled(result_type, count); /* must be overwritten */
  double* wanted = calloc((size_t)count, sizeof(double));
  double* magnitude = calloc((size_t)count, sizeof(double));
  for (int64_t n = 0; n < g->batch; ++n)
    for (int64_t c = 0; c < g->channels; ++c)
      for (int64_t o = 0; o < volume(g->output); ++o)
        for (int64_t u = 0; u < volume(g->kernel); ++u) {
          const int64_t position = seen(g, o, u);
          if (position < 0) continue;
          const int64_t x = image_at(g, g->input, n, c, position), y = image_at(g, g->output, n, c, o);
          const int64_t k = kernel_at(g, n, c / width, u, o);
          const int64_t at[3][3] = {{x, k, y}, {y, k, x}, {y, x, k}};
          const double product = type->read(first, at[which][0]) * type->read(second, at[which][1]);
          wanted[at[which][2]] += product;
          magnitude[at[which][2]] += fabs(product);
        }
  map(g, first, second, found);
  compare(names[which], result_type, g, found, wanted, magnitude, count);
  free(first), free(second), free(found), free(wanted), free(magnitude);
}

static void check_maps(const Geometry* g) {
  const Map f32[] = {(Map)involution_apply_f32, (Map)involution_adjoint_f32, (Map)involution_correlate_f32};
  const Map f64[] = {(Map)involution_apply_f64, (Map)involution_adjoint_f64, (Map)involution_correlate_f64};
  const Map f16[] = {(Map)involution_apply_f16, (Map)involution_adjoint_f16, (Map)involution_correlate_f16};
  const Map bf16[] = {(Map)involution_apply_bf16, (Map)involution_adjoint_bf16, (Map)involution_correlate_bf16};
  for (int which = 0; which < 3; ++which) {
    check_map(which, f32[which], &kF32, &kF32, g);
    check_map(which, f64[which], &kF64, &kF64, g);
    const int too_wide = which == 2 && g->channels / g->groups > INVOLUTION_MAX_16_BIT_WIDTH;
    if (!g->channels_last || too_wide || volume(g->kernel) > INVOLUTION_MAX_16_BIT_TAPS) continue;
    check_map(which, f16[which], &kF16, which == 1 ? &kF32 : &kF16, g);
    check_map(which, bf16[which], &kBF16, which == 1 ? &kF32 : &kBF16, g);
  }
}

/* A matrix [in, out] in panels of 32 columns. */
static void* packed(const Type* type, const void* matrix, int64_t in, int64_t out) {
  void* result = filled(type, (out + 31) / 32 * in * 32);
  for (int64_t r = 0; r < in; ++r)
    for (int64_t c = 0; c < out; ++c)
      type->write(result, (c / 32 * in + r) * 32 + c % 32, type->read(matrix, r * out + c));
  return result;
}

/* rows [count, in] times a matrix plus a bias. */
static double* product(const double* rows, int64_t count, const Type* type, const void* matrix, const void* bias,
                       int64_t in, int64_t out) {
  double* result = malloc((size_t)(count * out) * sizeof(double));
  for (int64_t i = 0; i < count; ++i)
    for (int64_t c = 0; c < out; ++c) {
      double sum = type->read(bias, c);
      for (int64_t r = 0; r < in; ++r) sum += rows[i * in + r] * type->read(matrix, r * out + c);
      result[i * out + c] = sum;
    }
  return result;
}

static double* doubles(const Type* type, const void* p, int64_t count) {
  double* result = malloc((size_t)count * sizeof(double));
  for (int64_t i = 0; i < count; ++i) result[i] = type->read(p, i);
  return result;
}

static double* filled_doubles(int64_t count, double value) {
  double* result = calloc((size_t)count, sizeof(double));
  for (int64_t i = 0; i < count; ++i) result[i] = value;
  return result;
}

static void relu(double* p, int64_t count) {
  for (int64_t i = 0; i < count; ++i) p[i] = p[i] > 0 ? p[i] : 0;
}

/* The fused bottleneck with all its parts, stride 1: memory of the operands is left to the end of the process. */
static void check_fused_bottleneck(const Type* type, const Geometry* g) {
  const int64_t C = g->channels, R = C / 4, GK = g->groups * volume(g->kernel), E = 3 * C, F = C / 2;
  const int64_t positions = g->batch * volume(g->output), width = C / g->groups;
  void *input = filled(type, positions * C), *shortcut = filled(type, positions * E);
  void *reduce = filled(type, C * R), *reduce_bias = filled(type, R);
  void *span = filled(type, R * GK), *span_bias = filled(type, GK);
  void *scale = filled(type, C), *shift = filled(type, C);
  void *expand = filled(type, C * E), *expand_bias = filled(type, E);
  void *next = filled(type, E * F), *next_bias = filled(type, F);
  const double eps = 1e-5;

  double* hidden = product(doubles(type, input, positions * C), positions, type, reduce, reduce_bias, C, R);
  for (int64_t i = 0; i < positions; ++i) {
    double squares = 0;
    for (int64_t r = 0; r < R; ++r) squares += hidden[i * R + r] * hidden[i * R + r];
    for (int64_t r = 0; r < R; ++r) hidden[i * R + r] /= sqrt(squares / (double)R + eps);
  }
  relu(hidden, positions * R);
  const double* kernels = product(hidden, positions, type, span, span_bias, R, GK);
  double* y = calloc((size_t)(positions * C), sizeof(double));
  for (int64_t n = 0; n < g->batch; ++n)
    for (int64_t o = 0; o < volume(g->output); ++o)
      for (int64_t c = 0; c < C; ++c) {
        const int64_t at = image_at(g, g->output, n, c, o);
        for (int64_t u = 0; u < volume(g->kernel); ++u) {
          const int64_t position = seen(g, o, u);
          if (position >= 0)
            y[at] += kernels[kernel_at(g, n, c / width, u, o)] * type->read(input, image_at(g, g->input, n, c, position));
        }
        y[at] = y[at] * type->read(scale, c) + type->read(shift, c);
      }
  relu(y, positions * C);
  double* output = product(y, positions, type, expand, expand_bias, C, E);
  for (int64_t i = 0; i < positions * E; ++i) output[i] += type->read(shortcut, i);
  relu(output, positions * E);
  double* next_output = product(output, positions, type, next, next_bias, E, F);
  relu(next_output, positions * F);

  void *found = filled(type, positions * E), *next_found = filled(type, positions * F);
  involution_fused_layer layer = {0};
  layer.input = input, layer.shortcut = shortcut;
  layer.reduce_weight = packed(type, reduce, C, R), layer.reduce_bias = reduce_bias;
  layer.span_weight = packed(type, span, R, GK), layer.span_bias = span_bias;
  layer.scale = scale, layer.shift = shift;
  layer.expand_weight = packed(type, expand, C, E), layer.expand_bias = expand_bias;
  layer.next_reduce_weight = packed(type, next, E, F), layer.next_reduce_bias = next_bias;
  layer.output = found, layer.next_reduce_output = next_found;
  layer.hidden_channels = R, layer.expand_channels = E, layer.next_reduce_channels = F;
  layer.relu = 1, layer.expand_relu = 1, layer.rms_eps = eps;
  layer.workspace = filled(type, g->threads * involution_fused_layer_workspace(g, &layer));
  (type == &kF32 ? involution_fused_layer_f32 : involution_fused_layer_f64)(g, &layer);

  double largest[2] = {0, 0}; /* errors of several sums in sequence are measured against the largest output */
  for (int64_t i = 0; i < positions * E; ++i) largest[0] = fmax(largest[0], output[i]);
  for (int64_t i = 0; i < positions * F; ++i) largest[1] = fmax(largest[1], next_output[i]);
  double* magnitude = filled_doubles(positions * E, largest[0]);
  compare("fused bottleneck's output", type, g, found, output, magnitude, positions * E);
  magnitude = filled_doubles(positions * F, largest[1]);
  compare("fused bottleneck's next reduction", type, g, next_found, next_output, magnitude, positions * F);
}

static Geometry geometry(int64_t channels, int64_t groups, const int64_t* sizes, const int64_t* kernel,
                         const int64_t* stride, const int64_t* dilation) {
  Geometry g = {.batch = 2, .channels = channels, .groups = groups};
  for (int axis = 0; axis < 3; ++axis) {
    g.input[axis] = sizes[axis], g.kernel[axis] = kernel[axis];
    g.stride[axis] = stride[axis], g.dilation[axis] = dilation[axis];
    g.padding[axis] = dilation[axis] * (kernel[axis] - 1) / 2;
    g.output[axis] = (sizes[axis] + stride[axis] - 1) / stride[axis];
  }
  return g;
}

int main(int count, char** arguments) {
  if (count > 1 && !involution_use(arguments[1])) {
    printf("instruction set must be one of this library and machine, got %s\n", arguments[1]);
    return 2;
  }
  static const int64_t channels[][2] = {{16, 1}, {32, 2}, {48, 1}, {5, 5}, {6, 2}, {34, 2}};
  static const int64_t shapes[][4][3] = {
      /* sizes, kernel, stride, dilation */
      {{1, 9, 11}, {1, 7, 7}, {1, 1, 1}, {1, 1, 1}}, {{1, 8, 9}, {1, 3, 5}, {1, 2, 2}, {1, 1, 2}},
      {{1, 1, 37}, {1, 1, 9}, {1, 1, 1}, {1, 1, 3}}, {{4, 5, 6}, {3, 3, 3}, {1, 2, 1}, {1, 1, 1}},
      {{1, 6, 33}, {1, 3, 3}, {1, 1, 1}, {1, 1, 1}}, {{1, 3, 2}, {1, 7, 7}, {1, 1, 1}, {1, 1, 1}},
  };
  for (size_t c = 0; c < sizeof channels / sizeof *channels; ++c)
    for (size_t s = 0; s < sizeof shapes / sizeof *shapes; ++s)
      for (int layout = 0; layout < 2; ++layout)
        for (int64_t threads = 1; threads <= 3; threads += 2) {
          Geometry g =
              geometry(channels[c][0], channels[c][1], shapes[s][0], shapes[s][1], shapes[s][2], shapes[s][3]);
          g.channels_last = layout, g.threads = threads;
          check_maps(&g);
          const int even = volume(g.stride) == 1 && g.channels % 16 == 0;
          if (!layout || !even) continue;
          check_fused_bottleneck(&kF32, &g);
          check_fused_bottleneck(&kF64, &g);
        }
  printf("%s: %d of %d comparisons differ\n", involution_instruction_set(), failures, comparisons);
  return failures > 0;
}
