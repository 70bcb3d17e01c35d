/* The CPU kernels' whole contract: a geometry, its three maps, and the layer made of them.
 *
 *     y[n, c, o] = sum over u of k[n, g(c), u, o] * x[n, c, o*stride + u*dilation - padding]
 *
 * Taps outside the input are skipped. Results are overwritten, and the same for every number of threads.
 * Nothing here allocates, throws or keeps state but the chosen instruction set. A thread that calls correlate needs 320
 * KiB of stack, for the others 64 KiB will do.
 *
 * f32 and f64 compute as they store. f16 and bf16 store 16 bits and compute in float; they want channels_last, at most
 * INVOLUTION_MOST_16_BIT_TAPS taps, and for correlate at most INVOLUTION_MOST_16_BIT_WIDTH channels a group (more would
 * round sums that are not finished).
 */
#pragma once
#include <stdint.h>

#define INVOLUTION_MOST_16_BIT_TAPS 512
#define INVOLUTION_MOST_16_BIT_WIDTH 16
#define INVOLUTION_PUBLIC __attribute__((visibility("default")))

#ifdef __cplusplus
extern "C" {
#endif

typedef struct {
  int64_t batch, channels, groups;
  /* Per axis, the slowest first; a 1d or 2d call has size 1 (padding 0) on its missing leading axes. A negative padding
   * skips positions: a part of the output's rows is a call of its own. */
  int64_t input[3], kernel[3], output[3], stride[3], padding[3], dilation[3];
  /* 0: images are [N, C, *S], kernel maps [N, G, *K, *O].  1: images are [N, *S, C], kernel maps [N, *O, G, *K]. */
  int64_t channels_last;
  int64_t threads;
  int64_t adds; /* adjoint adds to dx instead of overwriting it */
} involution_geometry;

INVOLUTION_PUBLIC void involution_apply_f32(const involution_geometry*, const float* x, const float* k, float* y);
INVOLUTION_PUBLIC void involution_apply_f64(const involution_geometry*, const double* x, const double* k, double* y);
INVOLUTION_PUBLIC void involution_apply_f16(const involution_geometry*, const void* x, const void* k, void* y);
INVOLUTION_PUBLIC void involution_apply_bf16(const involution_geometry*, const void* x, const void* k, void* y);

/* dx from the output's gradient g; sums in memory, and so is never 16 bits */
INVOLUTION_PUBLIC void involution_adjoint_f32(const involution_geometry*, const float* g, const float* k, float* dx);
INVOLUTION_PUBLIC void involution_adjoint_f64(const involution_geometry*, const double* g, const double* k, double* dx);
INVOLUTION_PUBLIC void involution_adjoint_f16(const involution_geometry*, const void* g, const void* k, float* dx);
INVOLUTION_PUBLIC void involution_adjoint_bf16(const involution_geometry*, const void* g, const void* k, float* dx);

/* dk from the output's gradient g */
INVOLUTION_PUBLIC void involution_correlate_f32(const involution_geometry*, const float* g, const float* x, float* dk);
INVOLUTION_PUBLIC void involution_correlate_f64(const involution_geometry*, const double* g, const double* x, double* dk);
INVOLUTION_PUBLIC void involution_correlate_f16(const involution_geometry*, const void* g, const void* x, void* dk);
INVOLUTION_PUBLIC void involution_correlate_bf16(const involution_geometry*, const void* g, const void* x, void* dk);

/* The layer in one pass, channels last: a kernel map made in cache, for a patch of positions at a time, and applied.
 * Matrices [in, out] are packed into panels of 32 columns, [ceil(out / 32), in, 32], the last filled up with anything.
 * A null pointer leaves its part out.
 *
 *     h = hidden, or relu(z) of z = pool(x) reduce_weight + reduce_bias, pool averaging windows of the stride's size; with
 *         an rms_eps above 0, z is first divided by sqrt(mean square of the position's z + rms_eps)
 *     y = scale * apply(x, h span_weight + span_bias) + shift,  relu'd if `relu`
 *     output = y, or y next_weight + next_bias + shortcut,  relu'd if `next_relu`
 *     following = relu(output following_weight + following_bias)
 */
typedef struct {
  const void *x, *hidden;                              /* [N, *S, C], [N, *O, R] */
  const void *reduce_weight, *reduce_bias;             /* [C, R], [R] */
  const void *span_weight, *span_bias;                 /* [R, G * K], [G * K] */
  const void *scale, *shift;                           /* [C], both or neither */
  const void *next_weight, *next_bias, *shortcut;      /* [C, E], [E], [N, *O, E] */
  const void *following_weight, *following_bias;       /* [E, F], [F]; only with a next_weight */
  void *output, *following;                            /* [N, *O, C] or [N, *O, E]; [N, *O, F] */
  void *scratch;                                       /* threads * involution_layer_scratch numbers */
  int64_t hidden_channels, next_channels, following_channels; /* R, E, F */
  int64_t relu, next_relu;
  double rms_eps;
} involution_layer;

INVOLUTION_PUBLIC void involution_layer_f32(const involution_geometry*, const involution_layer*);
INVOLUTION_PUBLIC void involution_layer_f64(const involution_geometry*, const involution_layer*);
INVOLUTION_PUBLIC int64_t involution_layer_scratch(const involution_geometry*, const involution_layer*);

/* Runs rounds of independent multiply-adds in registers on every thread and returns their count of operations, a
 * multiply-add being two: divided by the time it takes, the best that the chosen instruction set can do. */
INVOLUTION_PUBLIC double involution_multiply_adds(int64_t threads, int64_t rounds);

/* The instruction set in use: the best one this CPU runs, until involution_use names another ("avx512", "avx2" or
 * "baseline"), which returns 0 and changes nothing if this library or CPU does not have it. */
INVOLUTION_PUBLIC const char* involution_instruction_set(void);
INVOLUTION_PUBLIC int involution_use(const char* name);

#ifdef __cplusplus
}
#endif
