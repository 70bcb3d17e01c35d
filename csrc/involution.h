/* The C ABI of the CPU kernels: the geometry of an involution, its three maps, and the fused layer.
 *
 *     y[n, c, o] = sum over u of k[n, g(c), u, o] * x[n, c, o*stride + u*dilation - padding]
 *
 * Taps outside the input are skipped. Outputs are overwritten, and are the same for every number of threads.
 * No function allocates memory, throws, or keeps state other than the chosen instruction set. A thread that calls
 * correlate needs 320 KiB of stack; the other functions need 64 KiB.
 *
 * f32 and f64 compute in the type they store. f16 and bf16 store 16 bits and compute in float. They require
 * channels_last and at most INVOLUTION_MAX_16_BIT_TAPS taps; correlate also requires at most
 * INVOLUTION_MAX_16_BIT_WIDTH channels per group (more would round partial sums to 16 bits).
 */
#pragma once
#include <stdint.h>

#define INVOLUTION_MAX_16_BIT_TAPS 512
#define INVOLUTION_MAX_16_BIT_WIDTH 16
#ifdef _WIN32
#define INVOLUTION_PUBLIC __declspec(dllexport)
#else
#define INVOLUTION_PUBLIC __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

typedef struct {
  int64_t batch, channels, groups;
  /* Per axis, the slowest first. A 1d or 2d call has size 1 (padding 0) on its missing leading axes. A negative padding
   * skips positions, so that some rows of an output can be computed by a call of their own. */
  int64_t input[3], kernel[3], output[3], stride[3], padding[3], dilation[3];
  /* 0: images are [N, C, *S], kernel maps [N, G, *K, *O].  1: images are [N, *S, C], kernel maps [N, *O, G, *K]. */
  int64_t channels_last;
  int64_t threads;
  int64_t accumulate; /* adjoint adds to dx instead of overwriting it */
} involution_geometry;

INVOLUTION_PUBLIC void involution_apply_f32(const involution_geometry*, const float* x, const float* k, float* y);
INVOLUTION_PUBLIC void involution_apply_f64(const involution_geometry*, const double* x, const double* k, double* y);
INVOLUTION_PUBLIC void involution_apply_f16(const involution_geometry*, const void* x, const void* k, void* y);
INVOLUTION_PUBLIC void involution_apply_bf16(const involution_geometry*, const void* x, const void* k, void* y);

/* dx from the output's gradient dy. dx accumulates in memory and is therefore never 16 bits. */
INVOLUTION_PUBLIC void involution_adjoint_f32(const involution_geometry*, const float* dy, const float* k, float* dx);
INVOLUTION_PUBLIC void involution_adjoint_f64(const involution_geometry*, const double* dy, const double* k,
                                              double* dx);
INVOLUTION_PUBLIC void involution_adjoint_f16(const involution_geometry*, const void* dy, const void* k, float* dx);
INVOLUTION_PUBLIC void involution_adjoint_bf16(const involution_geometry*, const void* dy, const void* k, float* dx);

/* dk from the output's gradient dy. */
INVOLUTION_PUBLIC void involution_correlate_f32(const involution_geometry*, const float* dy, const float* x, float* dk);
INVOLUTION_PUBLIC void involution_correlate_f64(const involution_geometry*, const double* dy, const double* x,
                                                double* dk);
INVOLUTION_PUBLIC void involution_correlate_f16(const involution_geometry*, const void* dy, const void* x, void* dk);
INVOLUTION_PUBLIC void involution_correlate_bf16(const involution_geometry*, const void* dy, const void* x, void* dk);

/* The fused layer, channels last: a kernel map is generated for one patch of output positions at a time, stays in cache
 * and is applied there. With the expand convolution after it, it is the fused bottleneck.
 *
 *     h = hidden, or relu(z) of z = pool(input) reduce_weight + reduce_bias, where pool averages windows of the
 *         stride's size; with rms_eps > 0, z is first divided by sqrt(mean square of the position's z + rms_eps)
 *     y = scale * apply(input, h span_weight + span_bias) + shift,  then ReLU if `relu`
 *     output = y, or y expand_weight + expand_bias + shortcut,  then ReLU if `expand_relu`
 *     next_reduce_output = relu(output next_reduce_weight + next_reduce_bias):  the next block's first convolution
 *
 * Matrices [in, out] are packed in panels of 32 columns, [ceil(out / 32), in, 32]; the padding columns of the last
 * panel may hold anything. A null pointer omits its part.
 */
typedef struct {
  const void *input, *hidden;                         /* [N, *S, C], [N, *O, R] */
  const void *reduce_weight, *reduce_bias;            /* [C, R], [R] */
  const void *span_weight, *span_bias;                /* [R, G * K], [G * K] */
  const void *scale, *shift;                          /* [C]: both or neither */
  const void *expand_weight, *expand_bias, *shortcut; /* [C, E], [E], [N, *O, E] */
  const void *next_reduce_weight, *next_reduce_bias;  /* [E, F], [F]; only with an expand_weight */
  void *output, *next_reduce_output;                  /* [N, *O, C] or [N, *O, E]; [N, *O, F] */
  void* workspace;                                    /* threads * involution_fused_layer_workspace elements */
  int64_t hidden_channels, expand_channels, next_reduce_channels; /* R, E, F */
  int64_t relu, expand_relu;
  double rms_eps;
} involution_fused_layer;

INVOLUTION_PUBLIC void involution_fused_layer_f32(const involution_geometry*, const involution_fused_layer*);
INVOLUTION_PUBLIC void involution_fused_layer_f64(const involution_geometry*, const involution_fused_layer*);
/* The elements of workspace that one thread needs. */
INVOLUTION_PUBLIC int64_t involution_fused_layer_workspace(const involution_geometry*, const involution_fused_layer*);

/* Batch norm in training over [rows, channels], with what follows it in a residual network.
 *
 *     z = (x - mean) / sqrt(variance + eps) * weight + bias + shortcut,  y = relu(z) or z
 *
 * mean and variance (biased, of the rows) are outputs of the forward pass and inputs of the backward pass, which makes
 * dx, dweight, dbias and, unless it is null, dshortcut from dy. With relu it needs y if there was a shortcut, else
 * bias; what it does not need may be null. */
typedef struct {
  int64_t rows, channels, threads, relu;
  double eps;
  const void *x, *weight, *bias, *shortcut, *dy; /* [rows, channels], [channels], [channels]; shortcut may be null */
  void *y, *mean, *variance, *dx, *dweight, *dbias, *dshortcut;
  double* workspace; /* involution_batch_norm_workspace elements */
} involution_batch_norm;

INVOLUTION_PUBLIC void involution_batch_norm_f32(const involution_batch_norm*);
INVOLUTION_PUBLIC void involution_batch_norm_f64(const involution_batch_norm*);
INVOLUTION_PUBLIC void involution_batch_norm_backward_f32(const involution_batch_norm*);
INVOLUTION_PUBLIC void involution_batch_norm_backward_f64(const involution_batch_norm*);
INVOLUTION_PUBLIC int64_t involution_batch_norm_workspace(const involution_batch_norm*);

/* A norm over the channels of every row: z = scale * x / sqrt(mean square of the row + eps), y = relu(z) or z; and dx
 * from dy and x. */
typedef struct {
  int64_t rows, channels, threads, relu;
  double eps, scale;
  const void *x, *dy; /* [rows, channels] */
  void *y, *dx;
} involution_channel_norm;

INVOLUTION_PUBLIC void involution_channel_norm_f32(const involution_channel_norm*);
INVOLUTION_PUBLIC void involution_channel_norm_f64(const involution_channel_norm*);
INVOLUTION_PUBLIC void involution_channel_norm_backward_f32(const involution_channel_norm*);
INVOLUTION_PUBLIC void involution_channel_norm_backward_f64(const involution_channel_norm*);

/* Runs `rounds` rounds of independent multiply-adds in registers on every thread and returns the number of operations,
 * a multiply-add counting as two. Divided by the elapsed time, this is the peak of the chosen instruction set. */
INVOLUTION_PUBLIC double involution_multiply_adds(int64_t threads, int64_t rounds);

/* The instruction set in use. At load it is the best one that this CPU runs. involution_use selects another ("avx512",
 * "avx2" or "baseline") and returns 1; it returns 0 and changes nothing if this library or CPU does not have it. */
INVOLUTION_PUBLIC const char* involution_instruction_set(void);
INVOLUTION_PUBLIC int involution_use(const char* name);

#ifdef __cplusplus
}
#endif
