// What makes or reads weights: dequantize, embedding, quantize, and x @ W for few rows of x.
//
// The first three give the bits that `layout.py` gives. Results do not depend on the number
// of threads.

#include <atomic>
#include <new>
#include <vector>

#define X 1
#include "natural.h"
#include "matrix.h"
#include "threads.h"

// Items 0 to `count` on several threads, each taken by whoever is free.
template <class Work> static void share(i64 count, int threads, const Work& work) {
  struct Shared { const Work& work; i64 count; std::atomic<i64> next; } shared = {work, count, {0}};
  auto body = [](void* data) {
    Shared& shared = *(Shared*)data;
    for (i64 i; (i = shared.next.fetch_add(1)) < shared.count;) shared.work(i);
  };
  parallel(body, &shared, count < threads ? (int)count : threads);
}

constexpr i64 ITEM = 1 << 15;   // weights that a thread takes at a time
constexpr i64 ALONE = 1 << 15;  // weights for which other threads are not woken

// ---- dequantize -----------------------------------------------------------------

constexpr int F64 = 3;  // a type of outputs, beside those of values.h

// From this many bytes on, float32 results go past the caches, which saves reading what they
// replace. (With 16-bit results it made no difference.)
constexpr i64 STREAM_BYTES = 1 << 25;

// Whether each code * scale + bias needs at most `room` bits, so that it is exact in a float
// of so many: it is a multiple of the last place of the smaller of both, which have `own`
// bits, and below 2 ** (top + 2).
INLINE bool is_exact(float scale, float bias, int own, int room) {
  int32_t s, b;
  memcpy(&s, &scale, 4);
  memcpy(&b, &bias, 4);
  int top = s >> 23 & 255, low = b >> 23 & 255;
  if (bias == 0) low = top;
  if (scale == 0) top = low;
  const int bottom = top < low ? top : low;
  top = top + BITS > low ? top + BITS : low;
  return top - bottom <= room - own - 1;
}

// Rounds twice unless `exact`: then through float64, as if once.
template <int TYPE> INLINE F weights_of(V codes, float scale, float bias, bool exact) {
  if (exact) return fma(to_f(codes), set_f(scale), set_f(bias));
  return fma_f64<TYPE != 0>(codes, scale, bias);
}

template <int TYPE, bool STREAM> INLINE void put(void* out, i64 at, V bits) {
  if constexpr (TYPE == 0) (STREAM ? stream : store)((float*)out + at, bits);
  else store_16((uint16_t*)out + at, bits);
}

template <int TYPE, bool STREAM> INLINE void put_f(void* out, i64 at, F v) {
  if constexpr (TYPE == 1) store_half((uint16_t*)out + at, v);
  else put<TYPE, STREAM>(out, at, TYPE == 2 ? to_bf16(v) : as_v(v));
}

// Where a register has room for all weights that a group can have, codes only choose.
constexpr bool TABLE = 1 << BITS <= L && GROUP >= 2 * L;

struct AllCodes {
  alignas(64) int32_t at[L];
  constexpr AllCodes() : at() { for (int i = 0; i < L; i++) at[i] = i & LEVELS; }
};
static constexpr AllCodes all_codes;

template <int TYPE> INLINE V table_of(float scale, float bias, bool exact) {
  const F v = weights_of<TYPE>(load(all_codes.at), scale, bias, exact);
  if constexpr (TYPE != 1) return TYPE == 2 ? to_bf16(v) : as_v(v);
  uint16_t halves[L];
  store_half(halves, v);
  return load_16(halves);
}

template <int TYPE, bool STREAM>
INLINE void bring_group(const uint8_t* p, float scale, float bias, bool exact, void* out) {
  V table;
  if constexpr (TABLE && TYPE != F64) table = table_of<TYPE>(scale, bias, exact);
  auto all = [&](auto write) __attribute__((always_inline)) {
#pragma GCC unroll 16
    for (int i = 0; i < GROUP; i += 16) {
      V codes[HERE];
      codes_16(p + i / 16 * BYTES_16, codes);
#pragma GCC unroll 4
      for (int h = 0; h < HERE; h++) write(i + h * L, codes[h]);
    }
  };
  if constexpr (TYPE == F64)
    all([&](int at, V codes) { fma_f64((double*)out + at, codes, scale, bias); });
  else if constexpr (TABLE)
    all([&](int at, V codes) { put<TYPE, STREAM>(out, at, as_v(choose(as_f(table), codes))); });
  else if (exact)
    all([&](int at, V codes) { put_f<TYPE, STREAM>(out, at, weights_of<TYPE>(codes, scale, bias, true)); });
  else
    all([&](int at, V codes) { put_f<TYPE, STREAM>(out, at, weights_of<TYPE>(codes, scale, bias, false)); });
}

template <int TYPE> struct Stored { typedef uint16_t type; };
template <> struct Stored<0> { typedef float type; };
template <> struct Stored<F64> { typedef double type; };

template <int TYPE, bool STREAM>
static void bring_row(const Matrix& w, i64 n, void* row, const int32_t* permutation) {
  typedef typename Stored<TYPE>::type T;
  T* out = (T*)row;
  const i64 columns = w.k;
  const int own = w.part_type == 0 ? 24 : w.part_type == 1 ? 11 : 8;
  const uint8_t* p = w.row(n);
  float scales[L], biases[L];
  for (i64 g = 0; g < w.groups(); g++, p += GROUP / 16 * BYTES_16) {
    if (g % L == 0) {
      store_f(scales, parts_at(w.scales, n * w.scale_stride, g, w.groups(), w.part_type));
      store_f(biases, parts_at(w.biases, n * w.bias_stride, g, w.groups(), w.part_type));
    }
    const float scale = scales[g % L], bias = biases[g % L];
    const bool exact = is_exact(scale, bias, own, TYPE == 0 ? 53 : 24);
    T values[GROUP], *to = permutation ? values : out + g * GROUP;
    bring_group<TYPE, STREAM>(p, scale, bias, exact, to);
    if (!permutation) continue;
    const int32_t* column = permutation + g * GROUP;
    for (int i = 0; i < GROUP; i++)  // what is no permutation must not lead out of the row
      if ((uint32_t)column[i] < columns) out[column[i]] = values[i];
  }
}

typedef void (*BringRow)(const Matrix&, i64, void*, const int32_t*);

static BringRow bring_row_of(int type) {
  static constexpr BringRow all[] = {
      bring_row<0, false>, bring_row<1, false>, bring_row<2, false>, bring_row<F64, false>};
  return all[type];
}

static i64 out_size(int type) { return type == F64 ? 8 : size_of(type); }

// out [rows, k] = code * scale + bias, rounded once; out_type 3 is float64. Column i comes to
// permutation[i], if there is one. word_stride in words, others in elements.
extern "C" int affine_dequantize(
    const void* words, i64 word_stride, const void* scales, i64 scale_stride,
    const void* biases, i64 bias_stride, int part_type, const int32_t* permutation, void* out,
    i64 out_stride, int out_type, i64 rows, i64 k, int threads) {
  const Matrix w = {(const uint8_t*)words, word_stride * 4, scales, scale_stride,
                    biases, bias_stride, part_type, rows, k};
  const i64 size = out_size(out_type);
  const bool streams = out_type == 0 && !permutation && rows * k * size >= STREAM_BYTES &&
      ((i64)out | out_stride * size) % (L * size) == 0;
  const BringRow bring = streams ? bring_row<0, true> : bring_row_of(out_type);
  const i64 step = k < ITEM ? ITEM / (k ? k : 1) : 1;
  share((rows + step - 1) / step, rows * k < ALONE ? 1 : threads, [&](i64 item) {
    const i64 end = (item + 1) * step < rows ? (item + 1) * step : rows;
    for (i64 n = item * step; n < end; n++) bring(w, n, (char*)out + n * out_stride * size, permutation);
    if (streams) streamed();
  });
  return 0;
}

// out [count, k]: rows `ids` (int32, or int64 if `wide`) of a weight of `rows` rows. 1 if an
// id is none of them: then nothing is written.
extern "C" int affine_embedding(
    const void* ids, int wide, i64 count, const void* words, i64 word_stride,
    const void* scales, i64 scale_stride, const void* biases, i64 bias_stride, int part_type,
    void* out, i64 out_stride, int out_type, i64 rows, i64 k, int threads) {
  auto id = [&](i64 i) { return wide ? ((const i64*)ids)[i] : ((const int32_t*)ids)[i]; };
  for (i64 i = 0; i < count; i++)
    if (id(i) < 0 || id(i) >= rows) return 1;
  const Matrix w = {(const uint8_t*)words, word_stride * 4, scales, scale_stride,
                    biases, bias_stride, part_type, rows, k};
  const BringRow bring = bring_row_of(out_type);
  const i64 step = k < ITEM ? ITEM / (k ? k : 1) : 1, size = out_stride * out_size(out_type);
  share((count + step - 1) / step, count * k < ALONE ? 1 : threads, [&](i64 item) {
    const i64 end = (item + 1) * step < count ? (item + 1) * step : count;
    for (i64 i = item * step; i < end; i++) bring(w, id(i), (char*)out + i * size, nullptr);
  });
  return 0;
}

// ---- quantize -------------------------------------------------------------------

// Of L groups, whose L lanes each are in `lanes`: the result of all lanes of a group.
template <class Op> INLINE F of_groups(const float* lanes, Op op) {
  V r[L];
#pragma GCC unroll 16
  for (int i = 0; i < L; i++) r[i] = as_v(load_f(lanes + i * L));
  transpose(r);
  F result = as_f(r[0]);
#pragma GCC unroll 16
  for (int i = 1; i < L; i++) result = op(result, as_f(r[i]));
  return result;
}

// The end of the range that is further from zero is met exactly, and zero too, if within
// reach. At one bit the codes are the smallest and the largest weight.
INLINE void scale_and_bias(F low, F high, F& scale, F& bias) {
  scale = max_f(div(sub(high, low), set_f(LEVELS)), set_f(1e-7f));
  bias = low;
  if constexpr (BITS == 1) return;
  auto size = [](F v) { return as_f(both(as_v(v), set(0x7fffffff))); };
  scale = choose_greater(size(low), size(high), scale, sub(zero_f(), scale));
  const F edge = choose_greater(size(low), size(high), low, high);
  const F steps = nearest(div(edge, scale));
  scale = choose_greater(size(steps), zero_f(), div(edge, steps), scale);
  bias = choose_greater(size(steps), zero_f(), edge, zero_f());
}

// Of zeros with both signs, the first counts as the smallest.
static F with_sign(F low, const void* w, i64 at, int count, int type) {
  float lows[L];
  store_f(lows, low);
  for (int g = 0; g < count; g++)
    for (int i = 0; lows[g] == 0 && i < GROUP; i++) {
      const float v = value_at(w, at + g * GROUP + i, type);
      if (v != 0) continue;
      lows[g] = v;
      break;
    }
  return load_f(lows);
}

// Up to L groups of a row from element `at` on. `zeros` is NaN from the first value on that
// is not finite.
template <int TYPE>
static void quantize_groups(const void* w, i64 at, int count, uint8_t* words, void* scales,
                            void* biases, i64 group, F& zeros) {
  alignas(64) float lows[L * L] = {}, highs[L * L] = {};
  alignas(64) float scale[L], bias[L];
  for (int g = 0; g < count; g++) {
    F least = load_values(w, at + g * GROUP, TYPE), most = least;
    F own = mul(least, zero_f());
#pragma GCC unroll 4
    for (int i = L; i < GROUP; i += L) {
      const F v = load_values(w, at + g * GROUP + i, TYPE);
      least = min_f(least, v);
      most = max_f(most, v);
      own = fma(v, zero_f(), own);
    }
    zeros = add(zeros, own);
    store_f(lows + g * L, least);
    store_f(highs + g * L, most);
  }
  F low = of_groups(lows, min_f);
  if constexpr (BITS == 1) low = with_sign(low, w, at, count, TYPE);
  F both_of[2];
  scale_and_bias(low, of_groups(highs, max_f), both_of[0], both_of[1]);
  store_f(scale, both_of[0]);
  store_f(bias, both_of[1]);
  uint16_t some[2 * L];
  for (int part = 0; part < 2; part++) {
    write_values(part ? biases : scales, group, both_of[part], TYPE, count, nullptr, 0);
    store_values(some, 0, both_of[part], TYPE);
    zeros = fma(load_values(some, 0, TYPE), zero_f(), zeros);
  }
  alignas(64) uint8_t codes[L * GROUP + 48];
  for (int g = 0; g < count; g++) {
    const F s = set_f(scale[g]), b = set_f(bias[g]);
#pragma GCC unroll 4
    for (int i = 0; i < GROUP; i += L) {
      F v = div(sub(load_values(w, at + g * GROUP + i, TYPE), b), s);
      v = min_f(max_f(v, zero_f()), set_f(LEVELS));
      store_8(codes + g * GROUP + i, to_nearest(v));
    }
  }
  fold(words, codes, count * GROUP);
}

template <int TYPE>
static bool quantize_row(const void* w, i64 at, uint8_t* words, void* scales, void* biases,
                         i64 group, i64 groups) {
  F zeros = zero_f();
  for (i64 g = 0; g < groups; g += L) {
    const int count = groups - g < L ? (int)(groups - g) : L;
    quantize_groups<TYPE>(w, at + g * GROUP, count, words + g * (GROUP / 16) * BYTES_16, scales,
                          biases, group + g, zeros);
  }
  float lanes[L];
  store_f(lanes, zeros);
  bool finite = true;
  for (int i = 0; i < L; i++) finite &= lanes[i] == 0;
  return finite;
}

// w [rows, k] to words, scales and biases (of w's type), all without gaps. 1 if a weight, a
// scale or a bias is not finite.
extern "C" int affine_quantize(
    const void* w, int type, i64 row_stride, void* words, void* scales, void* biases,
    i64 rows, i64 k, int threads) {
  const auto quantize = type == 0 ? quantize_row<0> : type == 1 ? quantize_row<1> : quantize_row<2>;
  const i64 step = k < ITEM ? ITEM / (k ? k : 1) : 1, groups = k / GROUP;
  std::atomic<int> bad{0};
  share((rows + step - 1) / step, rows * k < ALONE ? 1 : threads, [&](i64 item) {
    const i64 end = (item + 1) * step < rows ? (item + 1) * step : rows;
    for (i64 n = item * step; n < end && !bad; n++)
      if (!quantize(w, n * row_stride, (uint8_t*)words + n * k / 16 * BYTES_16, scales, biases,
                    n * groups, groups))
        bad = 1;
  });
  return bad;
}

// ---- x @ W ----------------------------------------------------------------------

// 4 rows of W at a time, times up to 4 rows of x, are added to sums in the caches. Sums begin
// anew every RUN rows: so their errors stay small. What a thread does is a part of W's rows and
// a block of its columns; how W is cut depends on its shape alone.
constexpr int MOST = 4;     // rows of x at a time
constexpr int ROWS = 4;     // rows of W at a time
constexpr int RUN = 256;    // rows of W
constexpr int PARTS = 16;   // of W's rows, at most
constexpr i64 BATCH = (i64)L * GROUP;
constexpr i64 BLOCK = BATCH < 1024 ? 1024 / BATCH * BATCH : BATCH;
constexpr i64 SUMS_BYTES = 1 << 24;

struct Chunk {  // up to MOST rows of x, and their matrix
  Matrix w;
  const i64* order;  // rows of x and y, or null: from `first` on
  i64 first;
  int m;

  int room() const { return m > 2 ? 4 : m; }
  i64 row(int i) const { return order ? order[i] : first + i; }
};

struct Product {
  const void* x;
  i64 x_stride;
  void* y;
  i64 y_stride;
  int type;
};

static thread_local Scratch call_scratch, list_scratch;

// The column of lane `j`, half `h` and step `i` within a chunk.
constexpr int column_of(int j, int h, int i) {
  const Pair pair = pair_of(j % (16 / U) * S + i);
  return j * U / 16 * 16 + (h ? pair.high : pair.low);
}

template <int H, int I, int M>
INLINE void add_step(const V (&words)[ROWS], const F (&scale)[ROWS], const F (&bias)[ROWS],
                     const float* x, float* sums) {
  if constexpr (I < S) {
    F w[ROWS];
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; r++)
      w[r] = fma(to_f(both(right<16 * H + I * BITS>(words[r]), set(LEVELS))), scale[r], bias[r]);
#pragma GCC unroll 8
    for (int m = 0; m < M; m++) {
      float* to = sums + ((H * S + I) * M + m) * L;
      F sum = load_f(to);
#pragma GCC unroll 4
      for (int r = 0; r < ROWS; r++) sum = fma(set_f(x[m * RUN + r]), w[r], sum);
      store_f(to, sum);
    }
    add_step<H, I + 1, M>(words, scale, bias, x, sums);
  }
}

// `live` rows of W from row n on, columns from k to end, times x [M][RUN], added to sums
// [chunk][step][M][L].
template <int M>
static void add_rows(const Matrix& w, i64 n, int live, i64 k, i64 end, const float* x,
                     float* sums) {
  const i64 bytes = w.k / 16 * BYTES_16;
  i64 at = k / 16 * BYTES_16;
  const uint8_t* row[ROWS];
  for (int r = 0; r < ROWS; r++) row[r] = w.row(r < live ? n + r : n);
  for (; k < end; k += BATCH) {
    F scales[ROWS], biases[ROWS];
    for (int r = 0; r < ROWS; r++) {
      scales[r] = biases[r] = zero_f();
      if (r >= live) continue;
      scales[r] = parts_at(w.scales, (n + r) * w.scale_stride, k / GROUP, w.groups(), w.part_type);
      biases[r] = parts_at(w.biases, (n + r) * w.bias_stride, k / GROUP, w.groups(), w.part_type);
    }
    for (int c = 0; c < LANES && k + c * CHUNK < end; c++, at += CHUNK_BYTES, sums += M * CHUNK) {
      V words[ROWS];
      F scale[ROWS], bias[ROWS];
      const bool whole = at + CHUNK_BYTES <= bytes;
#pragma GCC unroll 4
      for (int r = 0; r < ROWS; r++) {
        words[r] = right_in_lanes<0>(whole ? spread(row[r] + at) : spread_some(row[r] + at, bytes - at));
        scale[r] = spread_scale(scales[r], c);
        bias[r] = spread_scale(biases[r], c);
      }
      add_step<0, 0, M>(words, scale, bias, x, sums);
      add_step<1, 0, M>(words, scale, bias, x, sums);
    }
  }
}

static i64 padded(i64 columns) { return (columns + CHUNK - 1) / CHUNK * CHUNK; }

// Rows n to end of W, columns k to k_end: to sums.
template <int M>
static void multiply_part(const Product& p, const Chunk& chunk, i64 n, i64 end, i64 k, i64 k_end,
                          float* sums) {
  alignas(64) float x[M * RUN], own[M * BLOCK];
  const i64 size = M * padded(k_end - k);
  for (bool first = true; n < end; n += RUN, first = false) {
    const int rows = end - n < RUN ? (int)(end - n) : RUN;
    memset(x, 0, sizeof(x));
    for (int m = 0; m < chunk.m; m++)
      values_at(x + m * RUN, p.x, chunk.row(m) * p.x_stride + n, rows, p.type);
    float* to = first ? sums : own;
    memset(to, 0, size * sizeof(float));
    for (int r = 0; r < rows; r += ROWS)
      add_rows<M>(chunk.w, n + r, rows - r < ROWS ? rows - r : ROWS, k, k_end, x + r, to);
    if (!first)
      for (i64 i = 0; i < size; i += L) store_f(sums + i, add(load_f(sums + i), load_f(own + i)));
  }
}

// The sums of all parts, added and put in order, to y.
static void write_block(const Product& p, const Chunk& chunk, const float* sums, i64 parts,
                        i64 part_size, i64 k, i64 k_end) {
  float values[CHUNK];
  for (; k < k_end; k += CHUNK, sums += chunk.room() * CHUNK)
    for (int m = 0; m < chunk.m; m++) {
      for (int step = 0; step < U; step++) {
        F sum = zero_f();
        for (i64 part = 0; part < parts; part++)
          sum = add(sum, load_f(sums + part * part_size + (step * chunk.room() + m) * L));
        float lanes[L];
        store_f(lanes, sum);
        for (int j = 0; j < L; j++) values[column_of(j, step / S, step % S)] = lanes[j];
      }
      for (i64 i = 0; i < CHUNK && k + i < k_end; i += L)
        store_values(p.y, chunk.row(m) * p.y_stride + k + i, load_f(values + i), p.type);
    }
}

// Some chunks at a time, so that the sums of their parts have room. All have the same shape.
static void multiply(const Product& p, const Chunk* chunks, i64 count, int threads) {
  if (!count) return;
  const i64 n = chunks[0].w.n, k = chunks[0].w.k, all = padded(k);
  const i64 runs = (n + RUN - 1) / RUN, rows = RUN * ((runs + PARTS - 1) / PARTS);
  const i64 parts = n ? (n + rows - 1) / rows : 0, blocks = (k + BLOCK - 1) / BLOCK;
  const i64 own = parts * MOST * all;
  i64 most = own ? SUMS_BYTES / 4 / own : count;
  most = most < 1 ? 1 : most < count ? most : count;
  float* sums = (float*)call_scratch.get(own * most * sizeof(float));
  if (own && !sums) throw std::bad_alloc();
  for (; count > 0; count -= most, chunks += most) {
    const i64 now = count < most ? count : most;
    const int some = now * MOST * n * k < ALONE ? 1 : threads;
    share(now * parts * blocks, some, [&](i64 item) {
      const i64 block = item % blocks, part = item / blocks % parts, c = item / blocks / parts;
      const i64 end = (part + 1) * rows < n ? (part + 1) * rows : n, first = block * BLOCK;
      const int room = chunks[c].room();
      const auto multiply = room == 1 ? multiply_part<1> : room == 2 ? multiply_part<2> : multiply_part<4>;
      multiply(p, chunks[c], part * rows, end, first, first + BLOCK < k ? first + BLOCK : k,
               sums + c * own + room * (part * all + first));
    });
    share(now * blocks, some, [&](i64 item) {
      const i64 c = item / blocks, first = item % blocks * BLOCK;
      const int room = chunks[c].room();
      write_block(p, chunks[c], sums + c * own + room * first, parts, room * all, first,
                  first + BLOCK < k ? first + BLOCK : k);
    });
  }
}

// y [m, k] = x [m, n] times W [n, k]. y has the type of x. word_stride in words, others in
// elements.
extern "C" int affine_matmul(
    const void* x, i64 x_stride, int x_type, i64 m, const void* words, i64 word_stride,
    const void* scales, i64 scale_stride, const void* biases, i64 bias_stride, int part_type,
    void* y, i64 y_stride, i64 n, i64 k, int threads) try {
  const Matrix w = {(const uint8_t*)words, word_stride * 4, scales, scale_stride,
                    biases, bias_stride, part_type, n, k};
  std::vector<Chunk> chunks;
  for (i64 i = 0; i < m; i += MOST)
    chunks.push_back({w, nullptr, i, m - i < MOST ? (int)(m - i) : MOST});
  multiply({x, x_stride, y, y_stride, x_type}, chunks.data(), (i64)chunks.size(), threads);
  return 0;
} catch (const std::bad_alloc&) {
  return NO_MEMORY;
}

// The same with the matrix of each row's expert: `ends` [experts]: rows of expert e end there,
// those after the last give zeros; or `owners` [m]: the expert of each row.
extern "C" int affine_grouped_matmul(
    const void* x, i64 x_stride, int x_type, i64 m, const void* words, i64 expert_words,
    i64 word_stride, const void* scales, i64 expert_scales, i64 scale_stride,
    const void* biases, i64 expert_biases, i64 bias_stride, int part_type, void* y,
    i64 y_stride, i64 n, i64 k, i64 experts, const i64* ends, const i64* owners, int threads) try {
  ByExpert by;
  const int how = rows_by_expert(m, experts, ends, owners, y, y_stride, k, x_type, list_scratch, by);
  if (how != DONE) return how;
  const Matrix first = {(const uint8_t*)words, word_stride * 4, scales, scale_stride,
                        biases, bias_stride, part_type, n, k};
  std::vector<Chunk> chunks;
  for (i64 e = 0; e < experts; e++) {
    const Matrix w = first.of_expert(e, expert_words, expert_scales, expert_biases);
    for (i64 i = by.from[e]; i < by.from[e + 1]; i += MOST) {
      const int rows = by.from[e + 1] - i < MOST ? (int)(by.from[e + 1] - i) : MOST;
      chunks.push_back({w, by.order ? by.order + i : nullptr, i, rows});
    }
  }
  multiply({x, x_stride, y, y_stride, x_type}, chunks.data(), (i64)chunks.size(), threads);
  return 0;
} catch (const std::bad_alloc&) {
  return NO_MEMORY;
}
