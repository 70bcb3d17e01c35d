/* The fused layer as plain loops, with a bound of the rounding error at every element. */
#pragma once
#include "loops.h"

/* Values and bounds of their errors: [count, channels]. */
typedef struct {
  Wide *value, *error;
  int64_t count, channels;
} Rows;

static Rows new_rows(int64_t count, int64_t channels) {
  const size_t elements = (size_t)(count * channels);
  const Rows rows = {calloc(elements, sizeof(Wide)), calloc(elements, sizeof(Wide)), count, channels};
  return rows;
}

static void free_rows(Rows rows) { free(rows.value), free(rows.error); }

static void relu(Rows rows) {
  for (int64_t i = 0; i < rows.count * rows.channels; ++i) rows.value[i] = fmax(rows.value[i], 0);
}

/* rows [count, in] times a matrix [in, out] in panels of 32 columns, plus a bias, which may be null. */
static Rows product(const Type* type, Rows rows, const void* panels, const void* bias, int64_t out) {
  const int64_t in = rows.channels;
  const Rows result = new_rows(rows.count, out);
  for (int64_t i = 0; i < rows.count; ++i)
    for (int64_t c = 0; c < out; ++c) {
      Wide sum = bias ? type->read(bias, c) : 0, magnitude = fabs(sum), error = 0;
      for (int64_t r = 0; r < in; ++r) {
        const Wide weight = type->read(panels, (c / 32 * in + r) * 32 + c % 32), v = rows.value[i * in + r];
        sum += v * weight, magnitude += fabs(v * weight), error += rows.error[i * in + r] * fabs(weight);
      }
      result.value[i * out + c] = sum;
      result.error[i * out + c] = error + ((Wide)in + 3) * type->compute * (magnitude + error);
    }
  return result;
}

/* Averages of windows of the stride's size, clipped at the image's end. */
static Rows averages(const Type* type, const Geometry* g, const void* input) {
  const Rows result = new_rows(g->batch * volume(g->output), g->channels);
  for (int64_t i = 0; i < result.count; ++i)
    for (int64_t c = 0; c < g->channels; ++c) {
      const int64_t n = i / volume(g->output), o = i % volume(g->output);
      const int64_t at[3] = {o / (g->output[1] * g->output[2]), o / g->output[2] % g->output[1], o % g->output[2]};
      Wide sum = 0, magnitude = 0, count = 0;
      for (int64_t p = 0; p < volume(g->input); ++p) {
        const int64_t q[3] = {p / (g->input[1] * g->input[2]), p / g->input[2] % g->input[1], p % g->input[2]};
        int inside = 1;
        for (int axis = 0; axis < 3; ++axis) inside &= q[axis] / g->stride[axis] == at[axis];
        if (!inside) continue;
        const Wide v = type->read(input, image_at(g, g->input, n, c, p));
        sum += v, magnitude += fabs(v), ++count;
      }
      result.value[i * g->channels + c] = sum / count;
      result.error[i * g->channels + c] = (count + 3) * type->compute * magnitude / count;
    }
  return result;
}

static void rms_norm(const Type* type, Rows rows, Wide eps) {
  const Wide channels = (Wide)rows.channels;
  for (int64_t i = 0; i < rows.count; ++i) {
    Wide *v = rows.value + i * rows.channels, *e = rows.error + i * rows.channels, squares = 0, error = 0;
    for (int64_t r = 0; r < rows.channels; ++r)
      squares += v[r] * v[r], error += 2 * fabs(v[r]) * e[r] + e[r] * e[r];
    error += (channels + 4) * type->compute * squares;
    const Wide factor = 1 / sqrt(squares / channels + eps);
    /* The largest factor that such a sum allows; below eps, the root is at least that of half of it. */
    const Wide largest = 1 / sqrt(fmax(squares - error, 0) / channels + eps);
    const Wide smallest = 1 / sqrt((squares + error) / channels + eps);
    const Wide spread = fmax(largest - factor, factor - smallest) + 4 * type->compute * largest;
    for (int64_t r = 0; r < rows.channels; ++r) {
      e[r] = e[r] * largest + fabs(v[r]) * spread + 2 * type->compute * fabs(v[r]) * factor;
      v[r] *= factor;
    }
  }
}

/* scale * apply(input, kernels) + shift; kernels are [positions, G * prod(K)]. */
static Rows applied(const Type* type, const Geometry* g, const involution_fused_layer* layer, Rows kernels) {
  const int64_t positions = volume(g->output), width = g->channels / g->groups, taps = volume(g->kernel);
  const Rows result = new_rows(g->batch * positions, g->channels);
  for (int64_t i = 0; i < result.count; ++i)
    for (int64_t c = 0; c < g->channels; ++c) {
      Wide sum = 0, magnitude = 0, error = 0;
      for (int64_t u = 0; u < taps; ++u) {
        const int64_t position = seen(g, i % positions, u), at = i * kernels.channels + c / width * taps + u;
        if (position < 0) continue;
        const Wide x = type->read(layer->input, image_at(g, g->input, i / positions, c, position));
        sum += kernels.value[at] * x, magnitude += fabs(kernels.value[at] * x), error += kernels.error[at] * fabs(x);
      }
      error += ((Wide)taps + 2) * type->compute * (magnitude + error);
      if (layer->scale) {
        const Wide scale = type->read(layer->scale, c), shift = type->read(layer->shift, c);
        sum = sum * scale + shift;
        error = error * fabs(scale) + 3 * type->compute * (fabs(sum) + fabs(shift) + error * fabs(scale));
      }
      result.value[i * g->channels + c] = sum, result.error[i * g->channels + c] = error;
    }
  return result;
}

static Rows as_rows(const Type* type, const void* image, int64_t count, int64_t channels) {
  const Rows rows = new_rows(count, channels);
  for (int64_t i = 0; i < count * channels; ++i) rows.value[i] = type->read(image, i);
  return rows;
}

/* The whole layer: the output and, with a next reduction, its output (else null pointers). Channels last. */
static void fused_layer_loop(const Type* type, const Geometry* g, const involution_fused_layer* layer, Rows results[2]) {
  const int64_t count = g->batch * volume(g->output);
  Rows hidden;
  if (layer->hidden) {
    hidden = as_rows(type, layer->hidden, count, layer->hidden_channels);
  } else {
    const Rows pooled = averages(type, g, layer->input);
    hidden = product(type, pooled, layer->reduce_weight, layer->reduce_bias, layer->hidden_channels);
    free_rows(pooled);
    if (layer->rms_eps > 0) rms_norm(type, hidden, layer->rms_eps);
    relu(hidden);
  }
  const Rows kernels = product(type, hidden, layer->span_weight, layer->span_bias, g->groups * volume(g->kernel));
  Rows y = applied(type, g, layer, kernels);
  free_rows(hidden), free_rows(kernels);
  if (layer->relu) relu(y);
  results[0] = y, results[1] = new_rows(0, 0);
  if (!layer->expand_weight) return;
  const Rows output = product(type, y, layer->expand_weight, layer->expand_bias, layer->expand_channels);
  free_rows(y);
  for (int64_t i = 0; layer->shortcut && i < count * output.channels; ++i) {
    output.value[i] += type->read(layer->shortcut, i);
    output.error[i] += type->compute * (fabs(output.value[i]) + output.error[i]);
  }
  if (layer->expand_relu) relu(output);
  results[0] = output;
  if (!layer->next_reduce_weight) return;
  free_rows(results[1]);
  results[1] = product(type, output, layer->next_reduce_weight, layer->next_reduce_bias, layer->next_reduce_channels);
  relu(results[1]);
}
