/* Random calls of every map and of the fused layer, against plain loops, on memory that ends at protected pages.
 *
 *     cc -std=gnu11 -O2 -I csrc tests/csrc/random_calls.c -o random_calls libinvolution.so -lm
 *     ./random_calls [--isa NAME] [--heap] [--first I] COUNT      cases I, I + 1, ...; a case depends on its number alone
 *     ./random_calls [--isa NAME] [--heap] --replay FILE          the cases of a file, one a line, as failures print them
 *
 * Checks of a case: every result is within its rounding bound of a loop in higher precision (one rounding for 16-bit
 * results); NaN and infinity are where the loop has them; results are the same bits for other numbers of threads; no
 * byte beside an operand is read or written, and no input is written. --heap takes memory from malloc instead, for
 * AddressSanitizer and valgrind. Exits with 1 after the first failure, whose line it prints.
 */
#include <inttypes.h>
#include <signal.h>
#include <stdio.h>

#include "fused_loops.h"
#include "guarded.h"

enum { kApply, kAdjoint, kCorrelate, kFused };
static const char* const kNames[] = {"apply", "adjoint", "correlate", "fused"};
enum { kUniform, kNotFinite, kDenormal, kHuge };
enum { /* parts of a fused layer */
  kHidden = 1, kReduceBias = 2, kSpanBias = 4, kScale = 8, kExpand = 16, kExpandBias = 32, kShortcut = 64,
  kNext = 128, kNextBias = 256, kRelu = 512, kExpandRelu = 1024, kRms = 2048
};

typedef struct {
  int64_t which, type, values, at_end; /* at_end: a bit per operand, whether it ends at the protected page */
  Geometry g;
  int64_t hidden, expand, next, parts; /* of a fused layer */
  int64_t seed;                        /* of the values */
} Case;

enum { kFields = sizeof(Case) / sizeof(int64_t) };

static uint64_t state;

static uint64_t next_random(void) { /* splitmix64: the same on every machine */
  uint64_t z = state += 0x9E3779B97F4A7C15u;
  z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
  z = (z ^ z >> 27) * 0x94D049BB133111EBu;
  return z ^ z >> 31;
}

static int64_t below(int64_t n) { return (int64_t)(next_random() % (uint64_t)n); }
static int64_t between(int64_t low, int64_t high) { return low + below(high - low + 1); }
static int one_in(int64_t n) { return below(n) == 0; }
static double uniform(void) { return (double)(next_random() >> 11) * 0x1p-52 - 1; }

/* ------------------------------------------------------------------------------------------------------- a case */

static void choose_axis(Geometry* g, int axis, int fused) {
  static const int64_t kernels[] = {1, 2, 3, 3, 3, 4, 5, 5, 7, 7, 7, 9, 11};
  static const int64_t steps[] = {1, 1, 1, 1, 2, 2, 3, 5};
  const int64_t largest = INT64_C(0x7fffffff);
  g->kernel[axis] = axis == 2 ? kernels[below(13)] : between(1, one_in(4) ? 7 : 3);
  g->stride[axis] = steps[below(8)], g->dilation[axis] = steps[below(8)];
  g->input[axis] = axis == 2 ? between(1, one_in(4) ? 90 : 20) : between(1, 6);
  if (one_in(60)) g->dilation[axis] = between(1, largest);
  if (one_in(60)) g->stride[axis] = between(1, largest);
  g->padding[axis] = g->dilation[axis] * (g->kernel[axis] - 1) / 2;
  g->output[axis] = (g->input[axis] - 1) / g->stride[axis] + 1;
  if (fused || one_in(2)) return;
  g->padding[axis] = between(-4, g->dilation[axis] > 99 ? 9 : g->dilation[axis] * (g->kernel[axis] - 1) + 3);
  if (one_in(60)) g->padding[axis] = largest;
  g->output[axis] = between(1, axis == 2 ? 40 : 6);
}

/* Makes the work at most `limit` multiply-adds. */
static void shrink(Case* c, int64_t limit) {
  Geometry* g = &c->g;
  for (;;) {
    int64_t work = g->channels * volume(g->kernel);
    if (c->which == kFused)
      work += g->channels * (c->hidden + c->expand) + c->hidden * g->groups * volume(g->kernel) + c->expand * c->next;
    if (work * g->batch * volume(g->output) <= limit) return;
    int axis = g->output[0] > 1 ? 0 : g->output[1] > 1 ? 1 : 2;
    if (g->batch > 1) {
      g->batch = 1;
    } else if (g->output[axis] > 3) {
      g->output[axis] /= 2;
    } else if (g->groups > 1) {
      g->channels = g->channels / g->groups * (g->groups / 2), g->groups /= 2;
    } else if (g->channels > 20) {
      g->channels /= 2;
    } else if (g->output[0] * g->output[1] > 1) {
      g->output[axis] = 1;
    } else {
      return;
    }
  }
}

static Case choose_case(uint64_t number) {
  state = number * 0xD1342543DE82EF95u + 1;
  static const int64_t widths[] = {1, 2, 3, 4, 5, 8, 13, 16, 16, 16, 16, 17, 19, 32, 40};
  Case c = {.which = below(4), .type = below(4), .values = one_in(2) ? 0 : below(4), .at_end = below(1 << 16)};
  Geometry* g = &c.g;
  g->groups = one_in(8) ? between(4, 9) : between(1, 4);
  g->channels = g->groups * widths[below(15)];
  g->batch = between(1, 3), g->threads = between(1, 4);
  g->channels_last = below(2);
  const int dims = (int)between(1, 3);
  for (int axis = 0; axis < 3; ++axis) {
    g->input[axis] = g->kernel[axis] = g->output[axis] = g->stride[axis] = g->dilation[axis] = 1;
    if (axis >= 3 - dims) choose_axis(g, axis, c.which == kFused);
  }
  if (c.which == kAdjoint) g->accumulate = one_in(4);
  if (c.which == kFused) {
    c.type &= 1, c.values = kUniform, g->channels_last = 1;
    c.hidden = between(1, 24), c.expand = between(1, 70), c.next = between(1, 40), c.parts = below(4096);
    if (!(c.parts & kExpand)) c.parts &= ~(kExpandBias | kShortcut | kNext | kNextBias | kExpandRelu), c.expand = 0;
    if (!(c.parts & kNext)) c.parts &= ~kNextBias, c.next = 0;
    if (c.parts & kHidden) c.parts &= ~(kReduceBias | kRms);
  } else if (c.type > 1) {
    g->channels_last = 1;
    if (c.which == kCorrelate && g->channels / g->groups > INVOLUTION_MAX_16_BIT_WIDTH) g->channels = 16 * g->groups;
    if (volume(g->kernel) > INVOLUTION_MAX_16_BIT_TAPS) g->kernel[0] = 1;
  }
  shrink(&c, one_in(24) ? 400000 : 12000);
  if (c.which == kFused) /* whose output size is that of the stride */
    for (int axis = 0; axis < 3; ++axis)
      if (g->output[axis] < (g->input[axis] - 1) / g->stride[axis] + 1)
        g->input[axis] = (g->output[axis] - 1) * g->stride[axis] + 1;
  c.seed = below(1 << 30);
  return c;
}

static char line[1024]; /* the case that runs, for the handler of signals */

static void describe(const Case* c) {
  const int64_t* fields = (const int64_t*)c;
  int length = snprintf(line, sizeof line, "%s %s", kNames[c->which], kTypes[c->type].name);
  for (int i = 2; i < kFields; ++i) length += snprintf(line + length, sizeof line - (size_t)length, " %" PRId64, fields[i]);
  snprintf(line + length, sizeof line - (size_t)length, "\n");
}

static int parse(const char* text, Case* c) {
  char which[16], type[16];
  int used = 0;
  if (sscanf(text, "%15s %15s%n", which, type, &used) != 2) return 0;
  int64_t* fields = (int64_t*)c;
  for (int i = 0; i < 4; ++i) {
    if (strcmp(which, kNames[i]) == 0) c->which = i;
    if (strcmp(type, kTypes[i].name) == 0) c->type = i;
  }
  for (int i = 2; i < kFields; ++i) {
    int more = 0;
    if (sscanf(text + used, "%" SCNd64 "%n", &fields[i], &more) != 1) return 0;
    used += more;
  }
  return 1;
}

static void on_signal(int number) {
  const char message[] = "crashed in this case:\n";
  if (write(2, message, sizeof message - 1) < 0 || write(2, line, strlen(line)) < 0) _exit(3);
  _exit(128 + number);
}

static int fail(const char* what, double by) {
  printf("%s: %g times its bound, in this case:\n%s", what, by, line);
  return 0;
}

/* --------------------------------------------------------------------------------------------------- its memory */

enum { kSlots = 16 };
static Guarded slots[kSlots], results[4];
static int used_slots;

static void* operand(const Case* c, const Type* type, int64_t count, double factor) {
  if (used_slots == kSlots) abort();
  Guarded* slot = &slots[used_slots];
  void* p = begin_buffer(slot, (size_t)count * type->bytes, (int)(c->at_end >> used_slots & 1));
  ++used_slots;
  for (int64_t i = 0; i < count; ++i) {
    double v = uniform() * factor;
    if (c->values == kNotFinite && one_in(40)) v = one_in(3) ? NAN : one_in(2) ? INFINITY : -INFINITY;
    type->write(p, i, v);
  }
  return p;
}

static void* result(const Case* c, int slot, size_t bytes) {
  void* p = begin_buffer(&results[slot], bytes, (int)(c->at_end >> (12 + slot) & 1));
  memset(p, 0xFF, bytes); /* NaN in every type: a result must be overwritten */
  return p;
}

static void protect_operands(int on) {
  for (int i = 0; i < used_slots; ++i) allow_writes(&slots[i], !on);
}

static int release(void) {
  int untouched = 1;
  for (int i = 0; i < used_slots; ++i) untouched &= end_buffer(&slots[i]);
  used_slots = 0;
  return untouched;
}

/* ----------------------------------------------------------------------------------------------------- its checks */

static int check_map(const Case* c) {
  static const Map maps[4][3] = {
      {(Map)involution_apply_f32, (Map)involution_adjoint_f32, (Map)involution_correlate_f32},
      {(Map)involution_apply_f64, (Map)involution_adjoint_f64, (Map)involution_correlate_f64},
      {(Map)involution_apply_f16, (Map)involution_adjoint_f16, (Map)involution_correlate_f16},
      {(Map)involution_apply_bf16, (Map)involution_adjoint_bf16, (Map)involution_correlate_bf16}};
  const Type *type = &kTypes[c->type], *out_type = c->which == kAdjoint && c->type > 1 ? &kTypes[0] : type;
  const int* roles = kRoles[c->which];
  int64_t counts[3];
  elements_of(&c->g, counts);
  const double first_factor = c->values == kDenormal ? type->tiny : c->values == kHuge ? type->huge : 1;
  const double second_factor = c->values == kHuge ? type->huge : 1;
  const int64_t count = counts[roles[2]];
  const void* first = operand(c, type, counts[roles[0]], first_factor);
  const void* second = operand(c, type, counts[roles[1]], second_factor);
  const Sums sums = new_sums(count);
  char* before = malloc((size_t)count * out_type->bytes);
  for (int64_t i = 0; i < count; ++i) {
    out_type->write(before, i, uniform());
    if (c->g.accumulate) add(sums, i, (long double)out_type->read(before, i));
  }
  map_loop(c->which, type, &c->g, first, second, sums);
  protect_operands(1);
  Geometry g = c->g;
  int good = 1;
  const int64_t work = g.batch * g.channels * volume(g.output) * volume(g.kernel);
  for (int run = 0; run < (work >= 100000 ? 3 : 1); ++run) { /* smaller ones always use one thread */
    g.threads = c->g.threads + run;
    void* found = result(c, run, (size_t)count * out_type->bytes);
    if (g.accumulate) memcpy(found, before, (size_t)count * out_type->bytes);
    maps[c->type][c->which](&g, first, second, found);
    for (int64_t i = 0; good && run == 0 && i < count; ++i) {
      const double by = excess_of_sum(out_type, out_type->read(found, i), sums, i);
      if (!(by <= 1)) good = fail(kNames[c->which], by);
    }
    if (good && run && memcmp(found, results[0].data, (size_t)count * out_type->bytes)) good = fail("other threads", 0);
  }
  protect_operands(0);
  for (int run = 0; run < (work >= 100000 ? 3 : 1); ++run) good = (end_buffer(&results[run]) || fail("wrote beside", 0)) && good;
  good = (release() || fail("wrote beside an operand", 0)) && good;
  free_sums(sums), free(before);
  return good;
}

static const void* optional(const Case* c, int64_t part, int64_t count) {
  return c->parts & part ? operand(c, &kTypes[c->type], count, 1) : NULL;
}

static const void* panels(const Case* c, int64_t in, int64_t out) {
  return operand(c, &kTypes[c->type], (out + 31) / 32 * in * 32, 1);
}

static involution_fused_layer operands_of_fused(const Case* c) {
  const Geometry* g = &c->g;
  const int64_t C = g->channels, R = c->hidden, E = c->expand, F = c->next, GK = g->groups * volume(g->kernel);
  const int64_t positions = g->batch * volume(g->output);
  involution_fused_layer layer = {.hidden_channels = R, .expand_channels = E, .next_reduce_channels = F};
  layer.input = operand(c, &kTypes[c->type], g->batch * volume(g->input) * C, 1);
  layer.hidden = optional(c, kHidden, positions * R);
  if (!layer.hidden) layer.reduce_weight = panels(c, C, R);
  layer.reduce_bias = optional(c, kReduceBias, R);
  layer.span_weight = panels(c, R, GK), layer.span_bias = optional(c, kSpanBias, GK);
  layer.scale = optional(c, kScale, C), layer.shift = optional(c, kScale, C);
  if (E) layer.expand_weight = panels(c, C, E);
  layer.expand_bias = optional(c, kExpandBias, E), layer.shortcut = optional(c, kShortcut, positions * E);
  if (F) layer.next_reduce_weight = panels(c, E, F);
  layer.next_reduce_bias = optional(c, kNextBias, F);
  layer.relu = (c->parts & kRelu) != 0, layer.expand_relu = (c->parts & kExpandRelu) != 0;
  layer.rms_eps = c->parts & kRms ? 1e-5 : 0;
  return layer;
}

static int compare_rows(const char* what, const Type* type, const void* found, Rows wanted) {
  for (int64_t i = 0; i < wanted.count * wanted.channels; ++i) {
    const double by = excess(type, type->read(found, i), wanted.value[i], wanted.error[i]);
    if (!(by <= 1)) return fail(what, by);
  }
  return 1;
}

static int check_fused(const Case* c) {
  const Type* type = &kTypes[c->type];
  involution_fused_layer layer = operands_of_fused(c);
  Rows wanted[2];
  fused_layer_loop(type, &c->g, &layer, wanted);
  protect_operands(1);
  const size_t bytes = (size_t)(wanted[0].count * wanted[0].channels) * type->bytes;
  const size_t next_bytes = (size_t)(wanted[1].count * wanted[1].channels) * type->bytes;
  Geometry g = c->g;
  void* first = NULL;
  int good = 1;
  for (int run = 0; good && run < 2; ++run, ++g.threads) {
    layer.output = result(c, 0, bytes);
    if (next_bytes) layer.next_reduce_output = result(c, 1, next_bytes);
    layer.workspace = result(c, 2, (size_t)(g.threads * involution_fused_layer_workspace(&g, &layer)) * type->bytes);
    (c->type ? involution_fused_layer_f64 : involution_fused_layer_f32)(&g, &layer);
    if (run == 0) {
      good = compare_rows("the fused layer's output", type, layer.output, wanted[0]) &&
             compare_rows("the next reduction", type, layer.next_reduce_output, wanted[1]);
      first = malloc(bytes);
      memcpy(first, layer.output, bytes);
    } else if (memcmp(first, layer.output, bytes)) {
      good = fail("other threads", 0);
    }
    good = ((end_buffer(&results[0]) & (next_bytes ? end_buffer(&results[1]) : 1) & end_buffer(&results[2])) ||
            fail("wrote beside a result", 0)) && good;
  }
  free(first), free_rows(wanted[0]), free_rows(wanted[1]);
  protect_operands(0);
  return (release() || fail("wrote beside an operand", 0)) && good;
}

static int check(const Case* c) {
  describe(c);
  state = (uint64_t)c->seed;
  return c->which == kFused ? check_fused(c) : check_map(c);
}

/* ------------------------------------------------------------------------------------------------------------ main */

static int64_t replay(const char* file) {
  FILE* lines = fopen(file, "r");
  char text[1024];
  int64_t count = 0;
  if (!lines) {
    printf("the corpus must be a file, got %s\n", file);
    return -1;
  }
  while (fgets(text, sizeof text, lines)) {
    Case c = {0};
    if (text[0] == '#' || text[0] == '\n') continue;
    if (!parse(text, &c)) {
      printf("a line of %s must be a case, got %s", file, text);
      return -1;
    }
    if (!check(&c)) return -1;
    ++count;
  }
  fclose(lines);
  return count;
}

static int64_t run(uint64_t first, uint64_t cases) {
  for (uint64_t i = first; i < first + cases; ++i) {
    const Case c = choose_case(i);
    if (check(&c)) continue;
    printf("number %" PRIu64 "\n", i);
    return -1;
  }
  return (int64_t)cases;
}

int main(int count, char** arguments) {
  const char *file = NULL, *isa = NULL;
  uint64_t first = 0, cases = 0;
  for (int i = 1; i < count; ++i) {
    if (strcmp(arguments[i], "--heap") == 0) heap = 1;
    else if (strcmp(arguments[i], "--isa") == 0 && i + 1 < count) isa = arguments[++i];
    else if (strcmp(arguments[i], "--first") == 0 && i + 1 < count) first = strtoull(arguments[++i], NULL, 10);
    else if (strcmp(arguments[i], "--replay") == 0 && i + 1 < count) file = arguments[++i];
    else cases = strtoull(arguments[i], NULL, 10);
  }
  static const char* const known[] = {"avx512", "avx2", "baseline"};
  if (isa && !involution_use(isa)) {
    printf("instruction set must be one of this library and machine, got %s\n", isa);
    return 2;
  }
  const int signals[] = {
      SIGSEGV, SIGILL, SIGFPE, SIGABRT,
#ifdef SIGBUS
      SIGBUS,
#endif
  };
  for (size_t i = 0; i < sizeof signals / sizeof *signals; ++i)
    if (!heap || signals[i] == SIGABRT) signal(signals[i], on_signal);
  for (int i = 0; i < 3; ++i) { /* without --isa every set that there is */
    if (isa ? strcmp(isa, known[i]) : !involution_use(known[i])) continue;
    const int64_t done = file ? replay(file) : run(first, cases);
    if (done < 0) return 1;
    printf("%s: %" PRId64 " cases agree\n", involution_instruction_set(), done);
    fflush(stdout);
  }
  return 0;
}
