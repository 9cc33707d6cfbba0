// Products of random packed weights by shaders/cpu, each beside float64. No torch here:
// sanitizers, other instruction sets and emulators all run this as it is.
//
// Compile with -I shaders/cpu and the kernels' own definitions (BITS, GROUP, X). Arguments:
// "quick" or "full", and "threads" for products of two callers at once.

#include "product.cpp"

#include <pthread.h>

#include <cstdio>

#include "memory.h"
#include "numbers.h"

constexpr int THREADS = 3;

// ---- threads --------------------------------------------------------------------

// What libgomp does, in a way that ThreadSanitizer understands.
static void* run_body(void* task) {
  ((Task*)task)->body(((Task*)task)->data);
  return nullptr;
}

static void run_on_threads(Body body, void* data, unsigned threads, unsigned) {
  Task task = {body, data};
  std::vector<pthread_t> others(threads - 1);
  for (pthread_t& other : others) pthread_create(&other, nullptr, run_body, &task);
  body(data);
  for (pthread_t& other : others) pthread_join(other, nullptr);
}

// ---- cases ----------------------------------------------------------------------

enum Experts { ONE, ENDS, OWNERS };
static const char* const TYPES[] = {"float32", "float16", "bfloat16"};
static const char* const EXPERTS[] = {"one matrix", "ends", "owners"};

struct Case {
  int m, n, k, type, part_type, invariant, permuted, biased, apart;
  Experts experts;
};

// All that a call is given. Rows are `apart` elements further apart than they are long.
struct Operands {
  const Case& of;
  int count, words_stride, parts_stride, x_stride, y_stride;
  Buffer x, words, scales, biases, bias, y, permutation, ends, owners;

  Operands(const Case& c, Random& random)
      : of(c), count(c.experts == ONE ? 1 : 4), words_stride(c.k * BITS / 32 + c.apart),
        parts_stride(c.k / GROUP + c.apart), x_stride(c.k + c.apart), y_stride(c.n + c.apart) {
    x.make(span(c.m, x_stride, c.k) * size_of(c.type), random);
    y.make(span(c.m, y_stride, c.n) * size_of(c.type), random);
    words.make(span(count * c.n, words_stride, c.k * BITS / 32) * 4, random);
    scales.make(span(count * c.n, parts_stride, c.k / GROUP) * size_of(c.part_type), random);
    biases.make(span(count * c.n, parts_stride, c.k / GROUP) * size_of(c.part_type), random);
    bias.make(c.n * size_of(c.type), random);
    permutation.make(count * c.k * sizeof(int32_t), random);
    ends.make(count * sizeof(i64), random);
    owners.make(c.m * sizeof(i64), random);

    words.fill(random);
    for (int i = 0; i < c.m; i++)
      for (int j = 0; j < c.k; j++) set_number(x.data, i * x_stride + j, c.type, random.normal());
    for (int i = 0; i < count * c.n; i++)
      for (int g = 0; g < c.k / GROUP; g++) {
        const i64 at = (i64)i * parts_stride + g;
        set_number(scales.data, at, c.part_type, random.normal() / (1 << BITS));
        set_number(biases.data, at, c.part_type, random.normal());
      }
    for (int i = 0; i < c.n; i++) set_number(bias.data, i, c.type, random.normal());
    for (int e = 0; e < count; e++) {
      int32_t* at = (int32_t*)permutation.data + e * c.k;
      for (int i = 0; i < c.k; i++) at[i] = i;
      for (int i = c.k - 1; i > 0; i--) std::swap(at[i], at[random.below(i + 1)]);
    }
    // An expert without rows, and rows behind the last one's.
    const int last = c.m - c.m / 5;
    i64* end = (i64*)ends.data;
    for (int e = 0; e < count; e++) end[e] = e == 0 ? last / 3 : e == 1 ? last / 3 : last * e / (count - 1);
    for (int i = 0; i < c.m; i++) ((i64*)owners.data)[i] = random.below(3) * 3 % count;
  }

  static i64 span(i64 rows, i64 stride, i64 length) { return (rows - 1) * stride + length; }

  int call(void* out, int first, int rows, int threads) const {
    return affine_linear(
        x.data + (i64)first * x_stride * size_of(of.type), x_stride, of.type, rows,
        of.permuted ? (const int32_t*)permutation.data : nullptr, of.k, words.data,
        (i64)of.n * words_stride, words_stride, scales.data, (i64)of.n * parts_stride, parts_stride,
        biases.data, (i64)of.n * parts_stride, parts_stride, of.part_type,
        of.biased ? bias.data : nullptr, out, y_stride, of.n, of.k, count,
        of.experts == ENDS ? (const i64*)ends.data : nullptr,
        of.experts == OWNERS ? (const i64*)owners.data + first : nullptr, threads, of.invariant);
  }

  // The expert of a row, or -1.
  int expert_of(int m) const {
    if (of.experts == OWNERS) return (int)((const i64*)owners.data)[m];
    if (of.experts == ONE) return 0;
    for (int e = 0; e < count; e++)
      if (m < ((const i64*)ends.data)[e]) return e;
    return -1;
  }

  double weight(int expert, int n, int k) const {
    const i64 row = (i64)expert * of.n + n, at = row * parts_stride + k / GROUP;
    const double code = code_at(words.data + row * words_stride * 4, k);
    return code * number(scales.data, at, of.part_type) + number(biases.data, at, of.part_type);
  }

  static int code_at(const uint8_t* row, int k) {
    int code = 0;
    for (int b = 0; b < BITS; b++) {
      const int bit = k * BITS + b;
      code |= (row[bit / 8] >> (bit % 8) & 1) << b;
    }
    return code;
  }
};

// ---- comparisons ----------------------------------------------------------------

struct Failures {
  Failures(const Case& c) : of(c) {}
  const Case& of;
  int count = 0;
  void say(const char* what, double seen = 0, double allowed = 0) {
    count++;
    printf("FAILED: %s (%.3g, allowed %.3g): m %d n %d k %d, %s, parts %s, %s%s%s%s%s\n", what, seen,
           allowed, of.m, of.n, of.k, TYPES[of.type], TYPES[of.part_type], EXPERTS[of.experts],
           of.invariant ? ", invariant" : "", of.permuted ? ", permuted" : "",
           of.biased ? ", bias" : "", of.apart ? ", rows apart" : "");
  }
};

// Relative L2 against float64: 1.5 times one rounding, 1e-6 for float32. Where there are
// too few results for that to mean much, they count as large as their terms.
static void compare(const Operands& o, Failures& failures) {
  const Case& c = o.of;
  double error = 0, rounding = 0, size = 0, terms = 0;
  std::vector<std::vector<double>> weights(o.count);
  for (int i = 0; i < c.m; i++) {
    const int e = o.expert_of(i);
    const int32_t* order = (const int32_t*)o.permutation.data + (e < 0 ? 0 : e) * c.k;
    if (e >= 0 && weights[e].empty())
      for (int n = 0; n < c.n; n++)
        for (int k = 0; k < c.k; k++) weights[e].push_back(o.weight(e, n, k));
    for (int n = 0; n < c.n; n++) {
      const double bias = c.biased ? number(o.bias.data, n, c.type) : 0;
      double sum = e < 0 ? 0 : bias, squares = sum * sum;
      for (int k = 0; k < c.k && e >= 0; k++) {
        const int column = c.permuted ? order[k] : k;
        const double term = number(o.x.data, (i64)i * o.x_stride + column, c.type) * weights[e][(i64)n * c.k + k];
        sum += term;
        squares += term * term;
      }
      const double seen = number(o.y.data, (i64)i * o.y_stride + n, c.type);
      if (e < 0 && seen != 0) failures.say("not zero where there is no expert", seen);
      error += (seen - sum) * (seen - sum);
      rounding += (rounded(sum, c.type) - sum) * (rounded(sum, c.type) - sum);
      size += sum * sum;
      terms += squares > sum * sum ? squares : sum * sum;
    }
  }
  const double unit = c.type == 2 ? 0x1p-8 : 0x1p-11;
  double allowed = c.type == 0 ? 1e-6 * sqrt(size) : 1.5 * sqrt(rounding);
  if (c.m * c.n < 64) allowed = (c.type == 0 ? 1e-6 : 1.5 * unit) * sqrt(terms);
  if (!(sqrt(error) <= allowed)) failures.say("wrong", sqrt(error), allowed);
}

static int run_case(const Case& c, Random& random) {
  Failures failures(c);
  Operands o(c, random);
  const i64 bytes = o.y.size, length = c.n * size_of(c.type), stride = o.y_stride * size_of(c.type);
  const std::vector<uint8_t> before(o.y.data, o.y.data + bytes);
  if (int code = o.call(o.y.data, 0, c.m, THREADS)) failures.say("returned", code);
  for (int i = 0; i + 1 < c.m; i++)
    if (memcmp(o.y.data + i * stride + length, &before[i * stride + length], stride - length))
      failures.say("written between the rows of y");
  compare(o, failures);

  std::vector<uint8_t> again(before);
  o.call(again.data(), 0, c.m, 1);
  if (memcmp(again.data(), o.y.data, bytes)) failures.say("other bits on another number of threads");
  for (int i = 0; i < c.m && c.invariant && c.experts == ONE; i++) {
    o.call(again.data(), i, 1, THREADS);
    if (memcmp(again.data(), o.y.data + i * stride, length)) failures.say("other bits in another batch");
  }
  return failures.count;
}

// What is no number, or too large, is handed back; an owner that is no expert is named.
static int run_refusals(Random& random) {
  const Case c = {3, L + 1, GROUP * 2, X == 0 ? 2 : X == 1 ? 1 : 0, 0, 0, 0, 0, 0, OWNERS};
  Failures failures(c);
  Operands o(c, random);
  ((i64*)o.owners.data)[1] = o.count;
  if (o.call(o.y.data, 0, c.m, THREADS) != 2) failures.say("an owner that is no expert");
  ((i64*)o.owners.data)[1] = 0;
  for (double bad : {(double)INFINITY, (double)NAN, c.type == 1 ? (double)-INFINITY : -0x1p120}) {
    set_number(o.x.data, c.k + 3, c.type, bad);
    if (o.call(o.y.data, 0, c.m, THREADS) != 1) failures.say("a number not taken", bad);
  }
  return failures.count;
}

static int lcm_of_words() {
  int k = GROUP;
  while (k * BITS % 32) k += GROUP;
  return k;
}

static int at_least(int k) { return (k + lcm_of_words() - 1) / lcm_of_words() * lcm_of_words(); }

struct Run {
  bool full;
  uint64_t seed;
  int cases = 0, failed = 0;

  void one(Case c, Random& random) {
    c.part_type = random.below(3);
    c.permuted = random.below(2);
    c.biased = random.below(2);
    c.apart = random.below(2) * 3;
    cases++;
    failed += run_case(c, random);
  }

  void all() {
    Random random(seed);
    const int widths[][2] = {
        {1, at_least(1)},                     // less than a vector
        {2 * TILE_ROWS + 5, at_least(300)},   // more than a tile, and no multiple of a chunk
        {L + 3, at_least((L + 1) * GROUP)},   // more groups than lanes
        {TILE_ROWS, at_least(TILE_CODES)},    // all whole
    };
    const int rows[] = {1, 2, 3, 5, 8, 9, 17, 130};
    for (auto& width : widths)
      for (int m : rows)
        for (int type = 0; type < 3; type++) {
          if (X == 0 ? type != 2 : X == 1 ? type == 0 : type != 0 && !full) continue;
          // Enough for inputs to be packed on several threads, once.
          if (m > 17 && (width[1] != widths[1][1] || type != (X == 0 ? 2 : X == 1 ? 1 : 0))) continue;
          for (int invariant = 0; invariant < (m > 17 ? 1 : 2); invariant++) {
            one({m, width[0], width[1], type, 0, invariant, 0, 0, 0, ONE}, random);
            if (!full && (m + invariant) % 3) continue;
            one({m, width[0], width[1], type, 0, invariant, 0, 0, 0, ENDS}, random);
            one({m, width[0], width[1], type, 0, invariant, 0, 0, 0, OWNERS}, random);
          }
        }
    failed += run_refusals(random);
  }
};

static void* run_all(void* run) {
  ((Run*)run)->all();
  return nullptr;
}

int main(int count, char** arguments) {
  affine_runtime((void*)run_on_threads, nullptr, nullptr, nullptr);
  bool full = false, threads = false;
  for (int i = 1; i < count; i++) {
    full |= !strcmp(arguments[i], "full");
    threads |= !strcmp(arguments[i], "threads");
  }
  Run runs[2] = {{full, 1}, {full, 2}};
  pthread_t other;
  if (threads) pthread_create(&other, nullptr, run_all, &runs[1]);
  runs[0].all();
  if (threads) pthread_join(other, nullptr);
  const int failed = runs[0].failed + runs[1].failed;
  printf("%d lanes, bits %d, group %d, x %d: %d cases, %d failures\n", L, BITS, GROUP, X,
         runs[0].cases + runs[1].cases, failed);
  return failed ? 1 : 0;
}
