// What shaders/cpu/weights.cpp makes of random weights: dequantize, embedding and quantize bit
// for bit beside plain arithmetic, x @ W beside float64. Compile and run as driver.cpp, without X.

#include "weights.cpp"

#include "operands.h"

static thread_local int cases, failed;

static void check(bool passes, const char* what, int rows, int k, int type, int part_type) {
  cases++;
  if (passes) return;
  failed++;
  printf("FAILED: %s: rows %d k %d, %s, parts %s\n", what, rows, k, TYPES[type], TYPES[part_type]);
}

// Zeros, and groups whose scale and bias are of very different sizes: there code * scale +
// bias is not exact in float32.
static void make_uneven(Weights& w, Random& random) {
  for (int n = 0; n < w.rows; n++)
    for (int g = 0; g < w.k / GROUP; g++) {
      const i64 at = (i64)n * w.stride + g;
      const double far = ldexp(random.normal(), random.below(30) - 18);
      const int kind = random.below(8);
      if (kind == 0) set_number(w.scales.data, at, w.type, 0);
      if (kind == 1) set_number(w.biases.data, at, w.type, 0);
      if (kind == 2) set_number(w.scales.data, at, w.type, far);
      if (kind == 3) set_number(w.biases.data, at, w.type, far);
    }
}

// ---- dequantize and embedding ---------------------------------------------------

static bool same_row(const Weights& w, int n, const Buffer& out, i64 at, int type, const int32_t* order) {
  for (int i = 0; i < w.k; i++) {
    const double right = w.value(n, i), seen = number(out.data, at + (order ? order[i] : i), type);
    uint64_t expected[1] = {}, bits[1] = {};
    set_number(expected, 0, type, right);
    set_number(bits, 0, type, seen);
    if (memcmp(bits, expected, bytes_of(type)) && !(right == 0 && seen == 0)) return false;
  }
  return true;
}

static void run_dequantize(int rows, int k, int type, int apart, Random& random) {
  const int part_type = random.below(3);
  Weights w(rows, k, part_type, apart, random);
  make_uneven(w, random);
  Buffer out, order, ids, some;
  out.make(span(rows, k + apart, k) * bytes_of(type), random);
  order.make(k * 4, random);
  shuffle(order.as<int32_t>(), k, random);
  const int32_t* permutation = random.below(2) ? order.as<int32_t>() : nullptr;
  affine_dequantize(w.words.data, w.word_stride, w.scales.data, w.stride, w.biases.data, w.stride,
                    part_type, permutation, out.data, k + apart, type, rows, k, THREADS);
  bool same = true;
  for (int n = 0; n < rows; n++) same &= same_row(w, n, out, (i64)n * (k + apart), type, permutation);
  check(same, "dequantize", rows, k, type, part_type);

  const int count = 2 * rows + 1, wide = random.below(2);
  ids.make(count * (wide ? 8 : 4), random);
  some.make(span(count, k + apart, k) * bytes_of(type), random);
  auto set_id = [&](int i, i64 id) { wide ? ids.as<i64>()[i] = id : ids.as<int32_t>()[i] = (int32_t)id; };
  auto embed = [&] {
    return affine_embedding(ids.data, wide, count, w.words.data, w.word_stride, w.scales.data, w.stride,
                            w.biases.data, w.stride, part_type, some.data, k + apart, type, rows, k, THREADS);
  };
  for (int i = 0; i < count; i++) set_id(i, i % rows);
  same = embed() == 0;
  for (int i = 0; i < count; i++) same &= same_row(w, i % rows, some, (i64)i * (k + apart), type, nullptr);
  check(same, "embedding", rows, k, type, part_type);
  for (int id : {-1, rows}) {
    set_id(count - 1, id);
    check(embed() == 1, "an id that is no row", rows, k, type, part_type);
  }
}

// ---- quantize -------------------------------------------------------------------

// One group as layout.py has it, in float32.
static void quantize_group(const float* w, float* scale, float* bias, int* codes) {
  float low = w[0], high = w[0];
  for (int i = 1; i < GROUP; i++) {
    low = w[i] < low ? w[i] : low;
    high = w[i] > high ? w[i] : high;
  }
  *scale = (high - low) / (float)LEVELS;
  if (*scale < 1e-7f) *scale = 1e-7f;
  *bias = low;
  if (BITS > 1) {
    const bool from_low = fabsf(low) > fabsf(high);
    const float edge = from_low ? low : high;
    if (!from_low) *scale = -*scale;
    const float steps = nearbyintf(edge / *scale);
    if (steps != 0) *scale = edge / steps;
    *bias = steps == 0 ? 0 : edge;
  }
  for (int i = 0; i < GROUP; i++) {
    const float code = nearbyintf((w[i] - *bias) / *scale);
    codes[i] = code < 0 ? 0 : code > LEVELS ? LEVELS : (int)code;
  }
}

static void run_quantize(int rows, int k, int type, Random& random) {
  const int apart = random.below(2) * 3;
  Buffer dense;
  dense.make(span(rows, k + apart, k) * bytes_of(type), random);
  fill_normal(dense, rows, k + apart, k, type, random);
  for (int g = 0; g < k / GROUP; g++)  // all equal, all of one sign, nothing but zeros
    for (int i = 0; i < GROUP && g < 3; i++) {
      const i64 at = (i64)(rows - 1) * (k + apart) + g * GROUP + i;
      set_number(dense.data, at, type, g == 0 ? 0.3 : g == 1 ? fabs(random.normal()) : 0);
    }
  Weights w(rows, k, type, 0, random);
  auto quantize = [&] {
    return affine_quantize(dense.data, type, k + apart, w.words.data, w.scales.data, w.biases.data, rows, k, THREADS);
  };
  bool same = quantize() == 0;
  for (int n = 0; n < rows; n++)
    for (int g = 0; g < k / GROUP; g++) {
      float group[GROUP], scale, bias;
      int codes[GROUP];
      for (int i = 0; i < GROUP; i++)
        group[i] = (float)number(dense.data, (i64)n * (k + apart) + g * GROUP + i, type);
      quantize_group(group, &scale, &bias, codes);
      const i64 at = (i64)n * w.stride + g;
      same &= number(w.scales.data, at, type) == rounded(scale, type);
      same &= number(w.biases.data, at, type) == rounded(bias, type);
      for (int i = 0; i < GROUP; i++) same &= w.code(n, g * GROUP + i) == codes[i];
    }
  check(same, "quantize", rows, k, type, type);
  for (double bad : {(double)INFINITY, (double)NAN}) {
    set_number(dense.data, span(rows, k + apart, k) - 1, type, bad);
    check(quantize() == 1, "a weight that is not finite", rows, k, type, type);
  }
}

// ---- x @ W ----------------------------------------------------------------------

enum Experts { ONE, ENDS, OWNERS };

static void run_matmul(int m, int n, int k, int type, Experts experts, Random& random) {
  const int part_type = random.below(3), apart = random.below(2) * 3, count = experts == ONE ? 1 : 4;
  Weights w(count * n, k, part_type, apart, random);
  Buffer x, y, ends, owners;
  x.make(span(m, n + apart, n) * bytes_of(type), random);
  y.make(span(m, k + apart, k) * bytes_of(type), random);
  ends.make(count * 8, random);
  owners.make(m * 8, random);
  fill_normal(x, m, n + apart, n, type, random);
  const int last = m - m / 5;
  for (int e = 0; e < count; e++) ends.as<i64>()[e] = e < 2 ? last / 3 : last * e / (count - 1);
  for (int i = 0; i < m; i++) owners.as<i64>()[i] = random.below(3) * 3 % count;
  auto multiply = [&](Buffer& y, int threads) {
    if (experts == ONE)
      return affine_matmul(x.data, n + apart, type, m, w.words.data, w.word_stride, w.scales.data, w.stride,
                           w.biases.data, w.stride, part_type, y.data, k + apart, n, k, threads);
    return affine_grouped_matmul(
        x.data, n + apart, type, m, w.words.data, (i64)n * w.word_stride, w.word_stride, w.scales.data,
        (i64)n * w.stride, w.stride, w.biases.data, (i64)n * w.stride, w.stride, part_type, y.data, k + apart,
        n, k, count, experts == ENDS ? ends.as<i64>() : nullptr, experts == OWNERS ? owners.as<i64>() : nullptr, threads);
  };
  Buffer again;
  again.make(y.size, random);
  again.copy(y);
  bool done = multiply(y, THREADS) == 0;
  Error error;
  double* weights = w.dense();
  for (int i = 0; i < m; i++) {
    int e = experts == OWNERS ? (int)owners.as<i64>()[i] : experts == ONE ? 0 : -1;
    for (int j = count - 1; experts == ENDS && j >= 0; j--) e = i < ends.as<i64>()[j] ? j : e;
    double row[300];
    for (int j = 0; j < n; j++) row[j] = number(x.data, (i64)i * (n + apart) + j, type);
    for (int c = 0; c < k; c++) {
      double sum = 0, squares = 0;
      for (int j = 0; j < n && e >= 0; j++) {
        const double term = row[j] * weights[((i64)e * n + j) * k + c];
        sum += term;
        squares += term * term;
      }
      error.add(number(y.data, (i64)i * (k + apart) + c, type), sum, squares, type);
    }
  }
  free(weights);
  check(done && error.passes(type), "x @ W", n, k, type, part_type);
  multiply(again, 1);
  check(!memcmp(again.data, y.data, y.size), "x @ W on one thread", n, k, type, part_type);
  if (experts != OWNERS) return;
  owners.as<i64>()[m - 1] = count;
  check(multiply(y, THREADS) == 2, "an owner that is no expert", n, k, type, part_type);
}

static int run(bool full, uint64_t seed) {
  Random random(seed);
  const int widths[] = {at_least(1), at_least(300), at_least((L + 1) * GROUP)};
  for (int k : widths)
    for (int type = 0; type < 4; type++) {
      const int rows = k == widths[1] ? 34000 / k : random.below(9) + 1;  // on several threads
      run_dequantize(rows, k, type, random.below(2) * 3, random);
      if (type == F64) continue;
      run_quantize(rows, k, type, random);
      for (int m : {1, 2, 3, 5, 8, 9, 17})
        if (full || m % 3 == type)
          for (Experts experts : {ONE, ENDS, OWNERS})
            run_matmul(m, m % 2 ? 37 : 300, k > 600 ? at_least(300) : k, type, experts, random);
    }
  // Large enough to go past the caches.
  if (full) run_dequantize((int)(STREAM_BYTES / 4 / at_least(1024)), at_least(1024), 0, 0, random);
  printf("%d lanes, bits %d, group %d: %d cases, %d failures\n", L, BITS, GROUP, cases, failed);
  return failed;
}

int main(int count, char** arguments) { return run_all(run, count, arguments) ? 1 : 0; }
