// Products of random packed weights by shaders/cpu/product.cpp, each beside float64. No torch
// here, and no C++ library: sanitizers, other instruction sets and emulators run this as it is.
//
// Compile with -I shaders/cpu and the kernels' own definitions (BITS, GROUP, X). Arguments:
// "full" for more cases, "threads" for two callers at once; "wrong", "short" and "race" do
// what must be seen: a result that is wrong, a read past an end, two writers of one place.

#include "product.cpp"


#include "operands.h"

enum Experts { ONE, ENDS, OWNERS };
static const char* const EXPERTS[] = {"one matrix", "ends", "owners"};

struct Case {
  int m, n, k, type, invariant;
  Experts experts;
  int part_type = 0, permuted = 0, biased = 0, apart = 0;
};

// All that a call is given.
struct Operands {
  const Case& of;
  const int count, x_stride, y_stride;
  Weights w;
  Buffer x, bias, y, permutation, ends, owners;

  Operands(const Case& c, Random& random)
      : of(c), count(c.experts == ONE ? 1 : 4), x_stride(c.k + c.apart), y_stride(c.n + c.apart),
        w(count * c.n, c.k, c.part_type, c.apart, random) {
    x.make(span(c.m, x_stride, c.k) * bytes_of(c.type), random);
    y.make(span(c.m, y_stride, c.n) * bytes_of(c.type), random);
    bias.make(c.n * bytes_of(c.type), random);
    permutation.make(count * c.k * sizeof(int32_t), random);
    ends.make(count * sizeof(i64), random);
    owners.make(c.m * sizeof(i64), random);
    fill_normal(x, c.m, x_stride, c.k, c.type, random);
    fill_normal(bias, 1, c.n, c.n, c.type, random);
    for (int e = 0; e < count; e++) shuffle(permutation.as<int32_t>() + e * c.k, c.k, random);
    // An expert without rows, and rows behind the last one's.
    const int last = c.m - c.m / 5;
    for (int e = 0; e < count; e++)
      ends.as<i64>()[e] = e < 2 ? last / 3 : last * e / (count - 1);
    for (int i = 0; i < c.m; i++) owners.as<i64>()[i] = random.below(3) * 3 % count;
  }

  int call(uint8_t* out, int first, int rows, int threads) const {
    const i64 n = of.n;
    return affine_linear(
        x.data + (i64)first * x_stride * bytes_of(of.type), x_stride, of.type, rows,
        of.permuted ? permutation.as<int32_t>() : nullptr, of.k, w.words.data,
        n * w.word_stride, w.word_stride, w.scales.data, n * w.stride, w.stride, w.biases.data,
        n * w.stride, w.stride, of.part_type, of.biased ? bias.data : nullptr, out, y_stride, n,
        of.k, count, of.experts == ENDS ? ends.as<i64>() : nullptr,
        of.experts == OWNERS ? owners.as<i64>() + first : nullptr, threads, of.invariant);
  }

  // The expert of a row, or -1.
  int expert_of(int m) const {
    if (of.experts == OWNERS) return (int)owners.as<i64>()[m];
    if (of.experts == ONE) return 0;
    for (int e = 0; e < count; e++)
      if (m < ends.as<i64>()[e]) return e;
    return -1;
  }
};

struct Failures {
  const Case& of;
  int count = 0;
  void say(const char* what, double seen = 0, double allowed = 0) {
    count++;
    printf("FAILED: %s (%.3g, allowed %.3g): m %d n %d k %d, %s, parts %s, %s%s%s%s%s\n", what,
           seen, allowed, of.m, of.n, of.k, TYPES[of.type], TYPES[of.part_type],
           EXPERTS[of.experts], of.invariant ? ", invariant" : "", of.permuted ? ", permuted" : "",
           of.biased ? ", bias" : "", of.apart ? ", rows apart" : "");
  }
};

// The right result of row m, output n, and the sum of the squares of its terms.
static double right(const Operands& o, const double* weights, int m, int n, double* squares) {
  const Case& c = o.of;
  const int e = o.expert_of(m);
  *squares = 0;
  if (e < 0) return 0;
  const int32_t* order = o.permutation.as<int32_t>() + e * c.k;
  double sum = c.biased ? number(o.bias.data, n, c.type) : 0;
  *squares = sum * sum;
  for (int k = 0; k < c.k; k++) {
    const i64 at = (i64)m * o.x_stride + (c.permuted ? order[k] : k);
    const double term = number(o.x.data, at, c.type) * weights[((i64)e * c.n + n) * c.k + k];
    sum += term;
    *squares += term * term;
  }
  return sum;
}

static void compare(const Operands& o, Failures& failures) {
  const Case& c = o.of;
  double* weights = o.w.dense();
  Error error;
  for (int m = 0; m < c.m; m++)
    for (int n = 0; n < c.n; n++) {
      double squares;
      const double sum = right(o, weights, m, n, &squares);
      const double seen = number(o.y.data, (i64)m * o.y_stride + n, c.type);
      if (o.expert_of(m) < 0 && seen != 0) failures.say("not zero without an expert", seen);
      error.add(seen, sum, squares, c.type);
    }
  if (!error.passes(c.type)) failures.say("wrong", sqrt(error.error), error.allowed(c.type));
  free(weights);
}

static int run_case(const Case& c, Random& random) {
  Failures failures{c};
  Operands o(c, random);
  const i64 length = (i64)c.n * bytes_of(c.type), stride = (i64)o.y_stride * bytes_of(c.type);
  Buffer before, again;
  before.make(o.y.size, random);
  again.make(o.y.size, random);
  before.copy(o.y);
  again.copy(o.y);
  if (int code = o.call(o.y.data, 0, c.m, THREADS)) failures.say("returned", code);
  for (int i = 0; i + 1 < c.m; i++)
    if (memcmp(o.y.data + i * stride + length, before.data + i * stride + length, stride - length))
      failures.say("written between the rows of y");
  compare(o, failures);
  o.call(again.data, 0, c.m, 1);
  if (memcmp(again.data, o.y.data, o.y.size)) failures.say("other bits with one thread");
  Buffer row;
  row.make(length, random);
  for (int i = 0; i < c.m && c.invariant && c.experts == ONE; i++) {
    o.call(row.data, i, 1, THREADS);
    if (memcmp(row.data, o.y.data + i * stride, length)) failures.say("other bits in a batch");
  }
  return failures.count;
}

constexpr int OWN_TYPE = X == 0 ? 2 : X == 1 ? 1 : 0;

// What is no number, or too large, is handed back; an owner that is no expert is named.
static int run_refusals(Random& random) {
  const Case none = {0, L + 1, at_least(1 << 14), OWN_TYPE, 0, ONE};
  if (Operands(none, random).call(nullptr, 0, 0, THREADS)) Failures{none}.say("no rows");
  const Case c = {3, L + 1, at_least(1), OWN_TYPE, 0, OWNERS};
  Failures failures{c};
  Operands o(c, random);
  for (i64 bad : {(i64)-1, (i64)o.count}) {
    o.owners.as<i64>()[1] = bad;
    if (o.call(o.y.data, 0, c.m, THREADS) != NO_EXPERT) failures.say("an owner that is none", bad);
  }
  o.owners.as<i64>()[1] = 0;
  for (double bad : {(double)INFINITY, (double)NAN, OWN_TYPE == 1 ? -(double)INFINITY : -0x1p120}) {
    set_number(o.x.data, o.x_stride + c.k - 1, c.type, bad);
    if (o.call(o.y.data, 0, c.m, THREADS) != NOT_HERE) failures.say("a number not taken", bad);
  }
  return failures.count;
}

static void run_random(Case c, Random& random, int& cases, int& failed) {
  c.part_type = random.below(3);
  c.permuted = random.below(2);
  c.biased = random.below(2);
  c.apart = random.below(2) * 3;
  cases++;
  failed += run_case(c, random);
}

static int run(bool full, uint64_t seed) {
  Random random(seed);
  int cases = 0, failed = run_refusals(random);
  const int shapes[][2] = {
      {2 * TILE_ROWS + 5, at_least(300)},  // more than a tile, and no multiple of a chunk
      {1, at_least(1)},                    // less than a vector
      {L + 3, at_least((L + 1) * GROUP)},  // more groups than lanes
      {TILE_ROWS, at_least(TILE_CODES)},   // all whole
  };
  // The last is enough for inputs to be packed on several threads.
  for (int m : {1, 2, 3, 5, 8, 9, 17, 130})
    for (auto& shape : shapes)
      for (int type = 0; type < 3; type++) {
        if (X == 0 ? type != 2 : X == 1 ? type == 0 : type != 0 && !full) continue;
        if (m > 17 && (type != OWN_TYPE || &shape != &shapes[0])) continue;
        for (int invariant = 0; invariant < (m > 17 ? 1 : 2); invariant++)
          for (Experts experts : {ONE, ENDS, OWNERS})
            if (experts == ONE || full || (m + invariant) % 3 == 0)
              run_random({m, shape[0], shape[1], type, invariant, experts}, random, cases, failed);
      }
  printf("%d lanes, bits %d, group %d, x %d: %d cases, %d failures\n", L, BITS, GROUP, X, cases,
         failed);
  return failed;
}

static int run_planted(const char* what) {
  Random random(1);
  use_runtime(false);
  missing_bytes = !strcmp(what, "short");
  const Case c = {3, L + 1, at_least(300), OWN_TYPE, 0, ONE};
  Failures failures{c};
  Operands o(c, random);
  const auto call = [](void* o) -> void* {
    ((Operands*)o)->call(((Operands*)o)->y.data, 0, 3, 1);
    return nullptr;
  };
  pthread_t other;
  if (!strcmp(what, "race")) pthread_create(&other, nullptr, call, &o);
  call(&o);
  if (!strcmp(what, "race")) pthread_join(other, nullptr);
  if (!strcmp(what, "wrong")) {
    for (int i = 0; i < 4; i++) o.w.words.data[i] ^= 255;
    compare(o, failures);
  }
  return failures.count;
}

int main(int count, char** arguments) {
  for (const char* planted : {"wrong", "short", "race"})
    if (count == 2 && !strcmp(arguments[1], planted)) return run_planted(planted);
  return run_all(run, count, arguments) ? 1 : 0;
}
