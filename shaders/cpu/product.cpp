// x @ W.T for packed W, of one matrix or of each row's expert.
//
// Few rows of x: "dots". Lanes are places along K, rows of W are read from front to back,
// which is what memory is fastest at, and their words go straight into products.
// More rows: "tiles". Lanes are rows of W; a part of 32 of them is brought out of the words
// once, into the first-level cache, and multiplied with 8 rows of x at a time.
//
// Codes are multiplied as they are, exactly; the scale of a group and its bias (times the
// sum of the group's inputs) come in afterwards, in float32. Sums do not depend on the
// number of threads.

#include "codes.h"
#include "matrix.h"
#include "threads.h"

// ---- what is to be multiplied ---------------------------------------------------

struct Output {
  void* y;
  i64 stride;
  int type;
  const void* bias;
  const i64* order;  // row of y (and of x) for each row here, or null: from `first` on
  i64 first = 0;

  i64 row(i64 m) const { return order ? order[m] : first + m; }
};

// Rows of x that dots take at most: for more, sums do not fit in registers, or tiles are as
// fast (measured).
constexpr int FEWEST = L == 16 && BITS < 8 && X != 2 ? 3 : 2;
constexpr int MOST = 8;            // rows of x in a tile
constexpr int AHEAD = 4096;        // bytes of a row's words that are fetched before their turn
constexpr int EXTRA = L * (X == 0 ? 1 : PLANES + 1);  // what goes with a chunk, see Packed
constexpr int OF_ROW = PLANES * S * L + EXTRA;         // and all that a row of x has of one
constexpr int TILE_CODES = 256;    // of K, brought out at a time
constexpr int TILE_PAIRS = TILE_CODES / 2;
constexpr int TILE_ROWS = COLUMNS * L;
constexpr int TILE_PLANE = TILE_PAIRS * MOST;
static_assert(TILE_CODES % CHUNK == 0 && TILE_CODES % GROUP == 0, "tiles");

// ---- inputs, in the order of the products ---------------------------------------

// For dots: [chunk][row][plane][step][lane] pairs of 16 bits, then for each chunk and row
// L numbers for each plane, where its sums begin, and L inputs' scales (X > 0). For tiles, each
// part of K of all of them in turn: [part][tile][plane][pair][row]; where sums begin and the
// scales are there one for each row and group.
struct Packed {
  uint32_t* pairs;
  float* sums;    // of a group's inputs: dots [batch][row][L], tiles [tile][group][row]
  float* scales;  // tiles: as sums
  int32_t* starts;  // tiles: [plane] as sums; the bits of floats for X == 0
  int m, rows;    // rows of x, and those that there is room for
  int k, chunks;
  bool tiles;

  i64 per_chunk() const { return (i64)rows * OF_ROW; }
  i64 tile_part(i64 tile, i64 part) const { return (part * (rows / MOST) + tile) * PLANES * TILE_PLANE; }
  i64 size() const {
    return tiles ? tile_part(0, (k + TILE_CODES - 1) / TILE_CODES) : per_chunk() * chunks;
  }
  int batches() const { return (k / GROUP + L - 1) / L; }
  i64 sums_size() const { return (i64)rows * (tiles ? k / GROUP : batches() * L); }
  i64 all() const { return size() + 15 + (tiles ? 2 + PLANES : 1) * sums_size(); }
};

INLINE int32_t most_of(V v) {
  int32_t lanes[L], most = 0;
  store(lanes, v);
  for (int i = 0; i < L; i++) most = lanes[i] > most ? lanes[i] : most;
  return most;
}

INLINE double sum_of(F v) {
  float lanes[L];
  double sum = 0;
  store_f(lanes, v);
  for (int i = 0; i < L; i++) sum += lanes[i];
  return sum;
}

INLINE double sum_of(V v) {
  int32_t lanes[L];
  double sum = 0;
  store(lanes, v);
  for (int i = 0; i < L; i++) sum += lanes[i];
  return sum;
}

INLINE float float_of(int32_t bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

constexpr int32_t bits_of_power(int exponent) { return (exponent + 127) << 23; }

// One row of x as numbers, [K]; false where they are too large, too small or not finite,
// or where the order names no column.
static bool read_row(float* out, const void* x, i64 at, int type, const int32_t* order, int k) {
  if (order) {
    for (int i = 0; i < k; i++) {
      if (order[i] < 0 || order[i] >= k) return false;
      out[i] = value_at(x, at + order[i], type);
    }
  } else {
    values_at(out, x, at, k, type);
  }
  V most = zero();
  for (int i = 0; i < k; i += L) most = ::most(most, both(load(out + i), set(0x7fffffff)));
  const int32_t largest = most_of(most);
  return largest < bits_of_power(100) && (largest == 0 || largest >= bits_of_power(-60));
}

// 16-bit numbers [k] for each plane, and for each group the scale and the sum of its inputs,
// and where sums of its products begin, [group][plane].
static void make_halves(uint16_t* out, i64 plane, float* scales, float* sums, int32_t* starts, const float* x, int k) {
  for (int g = 0; g < k / GROUP; g++, x += GROUP, out += GROUP) {
    if constexpr (X == 0) {
      F sum = zero_f();
      for (int i = 0; i < GROUP; i += L) {
        const F v = load_f(x + i);
        sum = add(sum, v);
        store_16(out + i, right<16>(as_v(v)));
      }
      sums[g] = (float)sum_of(sum);
      scales[g] = 1;
      const float start = -SHIFT * sums[g];
      memcpy(&starts[g], &start, 4);
      continue;
    }
    V most = zero(), total = zero(), low = zero();
    for (int i = 0; i < GROUP; i += L) most = ::most(most, both(load(x + i), set(0x7fffffff)));
    const int32_t largest = most_of(most);
    // One plane: the largest becomes 32767. Two: times a power of two, so that all 24 bits
    // of x stay. A group that is that small has 2 ** 30 times larger ones beside it (`read_row`),
    // and counts as nothing.
    const int exponent = (largest >> 23) - 126;
    float factor = X == 1 ? 32767 / float_of(largest) : float_of(bits_of_power(30 - exponent));
    scales[g] = X == 1 ? float_of(largest) / 32767 : float_of(bits_of_power(exponent - 30));
    if (largest < bits_of_power(-90)) factor = scales[g] = 0;
    for (int i = 0; i < GROUP; i += L) {
      V q = to_nearest(mul(load_f(x + i), set_f(factor)));
      if constexpr (X == 2) {
        const V rest = both(q, set(0x7fff));
        low = plus(low, rest);
        store_16(out + plane + i, rest);
        q = right_signed<15>(q);
      }
      total = plus(total, q);
      store_16(out + i, q);
    }
    // Exactly what is multiplied, summed up: errors of rounding x meet whole weights.
    const double high_sum = sum_of(total), low_sum = sum_of(low);
    sums[g] = (float)(scales[g] * (X == 2 ? 32768 * high_sum + low_sum : high_sum));
    starts[g * PLANES] = -SHIFT * (int32_t)high_sum;
    if (X == 2) starts[g * PLANES + PLANES - 1] = -SHIFT * (int32_t)low_sum;
  }
}

// Where, in 16-bit halves from the first of a chunk, dots have each column.
struct Places {
  uint16_t at[CHUNK];
  constexpr Places() : at() {
    for (int c = 0; c < CHUNK; c += 16)
      for (int p = 0; p < 8; p++) {
        const int pair = c / 2 + p, place = 2 * (pair % S * L + pair / S);
        at[c + pair_of(p).low] = (uint16_t)place;
        at[c + pair_of(p).high] = (uint16_t)(place + 1);
      }
  }
};

static void place_for_dots(const Packed& to, int m, const uint16_t* in, i64 plane, const float* scales, const float* sums) {
  static constexpr Places places;
  const int groups = to.k / GROUP;
  for (int c = 0; c < to.chunks; c++, in += CHUNK) {
    uint32_t* out = to.pairs + c * to.per_chunk() + (i64)m * OF_ROW;
    for (int p = 0; p < PLANES; p++) {
      uint16_t* halves = (uint16_t*)(out + p * S * L);
      for (int i = 0; i < CHUNK; i++) halves[places.at[i]] = in[p * plane + i];
    }
    uint32_t* extra = out + PLANES * S * L;
    if constexpr (X == 0) {
      F sum = zero_f();
      for (int i = 0; i < S; i++) {
        const V v = load(out + i * L);
        sum = add(sum, add(as_f(left<16>(v)), as_f(both(v, set((int32_t)0xffff0000)))));
      }
      store_f((float*)extra, mul(sum, set_f(-SHIFT)));
    } else {
      const V shift = set((int32_t)((uint32_t)-SHIFT << 16 | (-SHIFT & 0xffff)));
      for (int p = 0; p < PLANES; p++) {
        auto sum = I(zero());
        for (int i = 0; i < S; i++) sum = dot_i(sum, load(out + (p * S + i) * L), shift);
        store(extra + p * L, value_i(sum));
      }
      for (int j = 0; j < L; j++) {
        const int g = (c * L + j) / LANES;
        ((float*)extra)[PLANES * L + j] = g < groups ? scales[g] : 0;
      }
    }
  }
  for (int g = 0; g < to.batches() * L; g++)
    to.sums[((i64)(g / L) * to.rows + m) * L + g % L] = g < groups ? sums[g] : 0;
}

static void place_for_tiles(const Packed& to, int m, const uint16_t* in, i64 plane, const float* scales, const float* sums, const int32_t* starts) {
  const int tile = m / MOST, row = m % MOST, groups = to.k / GROUP;
  for (int p = 0; p < PLANES; p++, in += plane) {
    for (int i = 0; i < to.k; i += 16) {
      uint32_t* out = to.pairs + to.tile_part(tile, i / TILE_CODES) + p * TILE_PLANE +
                      (i % TILE_CODES / 2) * MOST + row;
#pragma GCC unroll 8
      for (int j = 0; j < 8; j++)
        out[j * MOST] = in[i + pair_of(j).low] | ((uint32_t)in[i + pair_of(j).high] << 16);
    }
  }
  for (int g = 0; g < groups; g++) {
    const i64 at = ((i64)tile * groups + g) * MOST + row;
    to.sums[at] = sums[g];
    to.scales[at] = scales[g];
    for (int p = 0; p < PLANES; p++)
      to.starts[(((i64)tile * groups + g) * PLANES + p) * MOST + row] = starts[g * PLANES + p];
  }
}

// ---- few rows -------------------------------------------------------------------

template <int I, int M, int R>
INLINE void dots_step(const V (&w)[R], Sum (&sum)[R][M][PLANES], const uint32_t* x, const Masks& masks) {
  if constexpr (I < S) {
    V v[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) v[r] = masks.take(right_in_lanes<I * BITS>(w[r]));
#pragma GCC unroll 8
    for (int m = 0; m < M; m++)
#pragma GCC unroll 2
      for (int p = 0; p < PLANES; p++) {
        V xv = load(x + m * OF_ROW + (p * S + I) * L);
        keep(xv);
#pragma GCC unroll 4
        for (int r = 0; r < R; r++) sum[r][m][p] = dot(sum[r][m][p], v[r], xv);
      }
    dots_step<I + 1, M, R>(w, sum, x, masks);
  }
}

template <int M, int R>
INLINE void dots_chunk(const V (&w)[R], const F (&scale)[R], F (&total)[R][M], const uint32_t* x, const Masks& masks) {
  Sum sum[R][M][PLANES];
#pragma GCC unroll 8
  for (int m = 0; m < M; m++)
#pragma GCC unroll 2
    for (int p = 0; p < PLANES; p++) {
      V start = load(x + m * OF_ROW + (PLANES * S + p) * L);
      keep(start);
#pragma GCC unroll 4
      for (int r = 0; r < R; r++) sum[r][m][p] = begin(start);
    }
  dots_step<0, M, R>(w, sum, x, masks);
#pragma GCC unroll 8
  for (int m = 0; m < M; m++) {
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) {
#if X == 0
      total[r][m] = fma(scale[r], sum[r][m][0], total[r][m]);
#else
      F value = value_of(sum[r][m][0]);
      if constexpr (X == 2) value = fma(value, set_f(32768), value_of(sum[r][m][PLANES - 1]));
      const F own = load_f((const float*)x + m * OF_ROW + PLANES * (S + 1) * L);
      total[r][m] = fma(scale[r], mul(value, own), total[r][m]);
#endif
    }
  }
}

// R rows of W at once, times M rows of x: lanes whose sums are the products.
template <int M, int R>
INLINE void dots_rows(const Matrix& w, const i64 (&row)[R], const Packed& x, F (&total)[R][M]) {
  const Masks masks;
  const int groups = w.groups();
  const i64 bytes = (i64)w.k * BITS / 8;
  const uint8_t* at[R];
#pragma GCC unroll 4
  for (int r = 0; r < R; r++) at[r] = w.row(row[r]);
  const uint32_t* xc = x.pairs;
  const float* sums = x.sums;
  int c = 0;
  for (int batch = 0; batch < x.batches(); batch++, sums += M * L) {
    F scale[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) {
      scale[r] = parts_at(w.scales, row[r] * w.scale_stride, batch * L, groups, w.part_type);
      const F bias = fma(scale[r], set_f(MIDDLE), parts_at(w.biases, row[r] * w.bias_stride, batch * L, groups, w.part_type));
#pragma GCC unroll 8
      for (int m = 0; m < M; m++) total[r][m] = fma(bias, load_f(sums + m * L), total[r][m]);
    }
    auto chunk = [&](int in_batch, auto load_words) __attribute__((always_inline)) {
      V v[R];
      F own[R];
#pragma GCC unroll 4
      for (int r = 0; r < R; r++) {
        v[r] = load_words(at[r]);
        fetch(at[r] + AHEAD);
        at[r] += CHUNK_BYTES;
        own[r] = spread_scale(scale[r], in_batch);
      }
      dots_chunk<M, R>(v, own, total, xc, masks);
      xc += M * OF_ROW;
      c++;
    };
    const int whole = w.k / CHUNK - c < LANES ? w.k / CHUNK - c : LANES;
    for (int i = 0; i < whole; i++) chunk(i, [](const uint8_t* p) { return spread(p); });
    if (whole < LANES && c < x.chunks) {
      const i64 rest = bytes - (i64)c * CHUNK_BYTES;
      chunk(whole, [rest](const uint8_t* p) { return spread_some(p, rest); });
    }
  }
}

// Two rows at once share the loads of x. They are far apart, so that each is the next part
// of a stream to the memory's prefetchers.
template <int M>
static void dots(const Matrix& w, const Packed& x, const Output& out, int first, int end) {
  constexpr int R = L == 16 || (L == 8 && M * PLANES <= 2) ? 2 : 1;
  const int blocks = (end - first + L - 1) / L, apart = (blocks + R - 1) / R * L;
  alignas(64) float lanes[R][M][L * L];
  for (int n = first; n < first + apart; n += L) {
    for (int i = 0; i < L; i++) {
      i64 row[R];
      F total[R][M];
      for (int r = 0; r < R; r++) {
        row[r] = n + i + r * apart < w.n ? n + i + r * apart : w.n - 1;
        for (int m = 0; m < M; m++) total[r][m] = zero_f();
      }
      if (n + i < w.n) dots_rows<M, R>(w, row, x, total);
      for (int r = 0; r < R; r++)
        for (int m = 0; m < M; m++) store_f(&lanes[r][m][i * L], total[r][m]);
    }
    for (int r = 0; r < R; r++) {
      const int at = n + r * apart;
      for (int m = 0; m < x.m && at < end; m++) {
        V v[L];
        for (int i = 0; i < L; i++) v[i] = as_v(load_f(&lanes[r][m][i * L]));
        transpose(v);
        F y = as_f(v[0]);
        for (int i = 1; i < L; i++) y = add(y, as_f(v[i]));
        write_values(out.y, out.row(m) * out.stride + at, y, out.type, w.n - at, out.bias, at);
      }
    }
  }
}

template <int M>
static void dots_of(const Matrix& w, const Packed& x, const Output& out, int first, int end) {
  if constexpr (M > 0) {
    if (x.rows == M) dots<M>(w, x, out, first, end);
    else dots_of<M - 1>(w, x, out, first, end);
  }
}

// ---- many rows ------------------------------------------------------------------

template <int J, int I>
INLINE void bring_step(const V (&w)[L], uint32_t* out, const Masks& masks) {
  if constexpr (I < S) {
    store(out + (J * S + I) * TILE_ROWS, masks.take(right<offset_of(J) + I * BITS>(w[J])));
    bring_step<J, I + 1>(w, out, masks);
  }
}

template <int J>
INLINE void bring_lane(const V (&w)[L], uint32_t* out, const Masks& masks) {
  if constexpr (J < L) {
    bring_step<J, 0>(w, out, masks);
    bring_lane<J + 1>(w, out, masks);
  }
}

// TILE_CODES columns from `k` of TILE_ROWS rows from `first`: their codes [pair][row], or
// the words that hold them [lane][row].
template <bool CODES>
static void bring(const Matrix& w, int first, int k, uint32_t* out) {
  const Masks masks;
  const i64 bytes = (i64)w.k * BITS / 8;
  for (int column = 0; column < COLUMNS; column++)
    for (int c = 0; c < TILE_CODES / CHUNK && k + c * CHUNK < w.k; c++) {
      const i64 at = (i64)(k + c * CHUNK) * BITS / 8;
      const bool whole = at + CHUNK_BYTES <= bytes;
      V r[L];
#pragma GCC unroll 16
      for (int i = 0; i < L; i++) {
        const int n = first + column * L + i;
        const uint8_t* p = w.row(n < w.n ? n : w.n - 1) + at;
        r[i] = whole ? spread(p) : spread_some(p, bytes - at);
      }
      transpose(r);
      if constexpr (CODES) {
        bring_lane<0>(r, out + c * (CHUNK / 2) * TILE_ROWS + column * L, masks);
      } else {
#pragma GCC unroll 16
        for (int j = 0; j < L; j++) store(out + (c * L + j) * TILE_ROWS + column * L, r[j]);
      }
    }
}

// Scales or biases of TILE_ROWS rows: [group][row].
static void turn_parts(const Matrix& w, const void* p, i64 stride, int first, float* out) {
  const int groups = w.groups();
  for (int column = 0; column < COLUMNS; column++)
    for (int g = 0; g < groups; g += L) {
      V r[L];
      for (int i = 0; i < L; i++) {
        const i64 n = first + column * L + i < w.n ? first + column * L + i : w.n - 1;
        r[i] = as_v(parts_at(p, n * stride, g, groups, w.part_type));
      }
      transpose(r);
      for (int i = 0; i < L && g + i < groups; i++) store(out + (i64)(g + i) * TILE_ROWS + column * L, r[i]);
    }
}

// One pair of codes of each row of W times ROWS rows of x.
template <int ROWS>
INLINE void tile_pair(const V (&w)[COLUMNS], const uint32_t* x, Sum (&sum)[PLANES][ROWS][COLUMNS]) {
#pragma GCC unroll 2
  for (int p = 0; p < PLANES; p++)
#pragma GCC unroll 8
    for (int m = 0; m < ROWS; m++) {
      const V xv = set((int32_t)x[p * TILE_PLANE + m]);
#pragma GCC unroll 4
      for (int c = 0; c < COLUMNS; c++) sum[p][m][c] = dot(sum[p][m][c], w[c], xv);
    }
}

// Lanes of words whose offsets differ.
constexpr int OFFSETS = BITS == 5 ? 4 : BITS == 3 || BITS == 6 ? 2 : 1;

// The codes of OFFSETS lanes, from lane J and step I on.
template <int J, int I, int ROWS>
INLINE void tile_words(const uint32_t* words, const uint32_t* x, Sum (&sum)[PLANES][ROWS][COLUMNS], const Masks& masks) {
  if constexpr (J < OFFSETS) {
    V w[COLUMNS];
#pragma GCC unroll 4
    for (int c = 0; c < COLUMNS; c++)
      w[c] = masks.take(right<offset_of(J) + I * BITS>(load(words + J * TILE_ROWS + c * L)));
    tile_pair<ROWS>(w, x + (J * S + I) * MOST, sum);
    tile_words<I + 1 < S ? J : J + 1, I + 1 < S ? I + 1 : 0, ROWS>(words, x, sum, masks);
  }
}

// What is brought next, a group's share of it: all at once, fetches would wait for each
// other.
INLINE void fetch_rows(const Matrix& w, int first, int k, int g) {
  constexpr int BYTES = TILE_CODES * BITS / 8;
  constexpr int SHARE = TILE_ROWS * GROUP / TILE_CODES > 0 ? TILE_ROWS * GROUP / TILE_CODES : 1;
  for (int r = g * SHARE; r < g * SHARE + SHARE; r++) {
    const int n = first + r < w.n ? first + r : w.n - 1;
    const uint8_t* p = w.row(n) + (i64)k * BITS / 8 + BYTES;
    for (int i = 0; i < BYTES; i += 64) fetch(p + i);
  }
}

// A part of K, as `bring` brought it, times ROWS rows of x: adds to y [row][column].
template <bool CODES, int ROWS>
INLINE void tile_part(const uint32_t* w, const float* scales, const float* biases, const uint32_t* x, const float* x_scales, const float* sums, const int32_t* starts, int groups, float* y, const Matrix* ahead, int first, int k) {
  const Masks masks;
  for (int g = 0; g < groups; g++) {
    if (ahead) fetch_rows(*ahead, first, k, g);
    Sum sum[PLANES][ROWS][COLUMNS];
#pragma GCC unroll 8
    for (int m = 0; m < ROWS; m++)
#pragma GCC unroll 4
      for (int c = 0; c < COLUMNS; c++)
#pragma GCC unroll 2
        for (int p = 0; p < PLANES; p++)
          sum[p][m][c] = begin(set(starts[(g * PLANES + p) * MOST + m]));
    if constexpr (CODES) {
      for (int i = 0; i < GROUP / 2; i++, w += TILE_ROWS, x += MOST) {
        V codes[COLUMNS];
#pragma GCC unroll 4
        for (int c = 0; c < COLUMNS; c++) codes[c] = load(w + c * L);
        tile_pair<ROWS>(codes, x, sum);
      }
    } else {
      for (int j = 0; j < LANES; j += OFFSETS, w += OFFSETS * TILE_ROWS, x += OFFSETS * S * MOST)
        tile_words<0, 0, ROWS>(w, x, sum, masks);
    }
#pragma GCC unroll 4
    for (int c = 0; c < COLUMNS; c++) {
      const F scale = load_f(scales + g * TILE_ROWS + c * L);
      const F bias = load_f(biases + g * TILE_ROWS + c * L);
#pragma GCC unroll 8
      for (int m = 0; m < ROWS; m++) {
        float* to = y + m * TILE_ROWS + c * L;
        F value = value_of(sum[0][m][c]);
        if constexpr (X == 2) value = fma(value, set_f(32768), value_of(sum[PLANES - 1][m][c]));
        if constexpr (X != 0) value = mul(value, set_f(x_scales[g * MOST + m]));
        store_f(to, fma(scale, value, fma(bias, set_f(sums[g * MOST + m]), load_f(to))));
      }
    }
  }
}

// As many rows of x at a time as registers hold.
constexpr int REGISTER_ROWS = (L == 16 ? 8 : 4) / PLANES;

constexpr int FEW = REGISTER_ROWS < 4 ? REGISTER_ROWS : 4;

static thread_local Scratch own_scratch, call_scratch, list_scratch, job_scratch;

// False where there is no memory. CODES where several tiles of x share the work.
template <bool CODES, int ROWS>
static bool tiles(const Matrix& w, const Packed& x, const Output& out, int first) {
  const int groups = w.groups();
  const i64 parts = (i64)groups * TILE_ROWS;
  uint32_t* part = (uint32_t*)own_scratch.get(
      sizeof(float) * (TILE_PAIRS * TILE_ROWS + 2 * parts + (i64)x.rows * TILE_ROWS));
  if (!part) return false;
  float* scales = (float*)part + TILE_PAIRS * TILE_ROWS;
  float* biases = scales + parts;
  float* y = biases + parts;
  turn_parts(w, w.scales, w.scale_stride, first, scales);
  turn_parts(w, w.biases, w.bias_stride, first, biases);
  for (i64 i = 0; i < parts; i += L)
    store_f(biases + i, fma(load_f(scales + i), set_f(MIDDLE), load_f(biases + i)));
  memset(y, 0, sizeof(float) * x.rows * TILE_ROWS);
  for (int k = 0; k < w.k; k += TILE_CODES) {
    bring<CODES>(w, first, k, part);
    const int g = k / GROUP;
    const int now = groups - g < TILE_CODES / GROUP ? groups - g : TILE_CODES / GROUP;
    for (int m = 0; m < x.m; m += ROWS) {
      const i64 tile = m / MOST, row = m % MOST, at = (tile * groups + g) * MOST + row;
      tile_part<CODES, ROWS>(
          part, scales + (i64)g * TILE_ROWS, biases + (i64)g * TILE_ROWS,
          x.pairs + x.tile_part(tile, k / TILE_CODES) + row, x.scales + at,
          x.sums + at, x.starts + ((tile * groups + g) * PLANES) * MOST + row, now, y + (i64)m * TILE_ROWS, m ? nullptr : &w, first, k);
    }
  }
  for (int m = 0; m < x.m; m++)
    for (int c = 0; c < COLUMNS && first + c * L < w.n; c++)
      write_values(out.y, out.row(m) * out.stride + first + c * L, load_f(y + (i64)m * TILE_ROWS + c * L),
                   out.type, w.n - first - c * L, out.bias, first + c * L);
  return true;
}

// ---- a call ---------------------------------------------------------------------

constexpr int MOST_ROWS = 1024;  // of x in a job: their sums stay in the second-level cache
constexpr i64 ITEM_BYTES = 1 << 17;  // of words, for dots

struct Job {  // one matrix and its rows of x
  Matrix w;
  Packed x;
  Output out;
  const int32_t* permutation;
  int first_item, items, item_rows;
};

struct Call {
  const void* x;
  i64 x_stride;
  int x_type, rows;  // rows of x in all jobs
  Job* jobs;
  int count = 0, items = 0;
  int next = 0, bad = DONE;  // of all threads

  int take() { return __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED); }
  void fail(int how) { __atomic_store_n(&bad, how, __ATOMIC_RELAXED); }
};

static void pack_row(Call& call, const Job& job, int m) {
  const int k = job.w.k, padded = job.x.chunks * CHUNK, groups = k / GROUP;
  float* values = (float*)own_scratch.get(sizeof(float) * (padded + L + (2 + PLANES) * groups) + 2 * PLANES * padded);
  if (!values) {
    call.fail(NO_MEMORY);
    return;
  }
  float *scales = values + padded + L, *sums = scales + groups;
  int32_t* starts = (int32_t*)(sums + groups);
  uint16_t* halves = (uint16_t*)(starts + PLANES * groups);
  if (!read_row(values, call.x, job.out.row(m) * call.x_stride, call.x_type, job.permutation, k)) {
    call.fail(NOT_HERE);
    return;
  }
  make_halves(halves, padded, scales, sums, starts, values, k);
  for (int p = 0; p < PLANES; p++) memset(halves + p * padded + k, 0, 2 * (padded - k));
  if (job.x.tiles) place_for_tiles(job.x, m, halves, padded, scales, sums, starts);
  else place_for_dots(job.x, m, halves, padded, scales, sums);
}

static void pack_some(void* data) {
  Call& call = *(Call*)data;
  for (;;) {
    int m = call.take(), j = 0;
    if (m >= call.rows) return;
    while (m >= call.jobs[j].x.m) m -= call.jobs[j++].x.m;
    pack_row(call, call.jobs[j], m);
  }
}

static void multiply_some(void* data) {
  Call& call = *(Call*)data;
  int j = 0;
  for (;;) {
    const int item = call.take();
    if (item >= call.items) return;
    while (item >= call.jobs[j].first_item + call.jobs[j].items) j++;
    const Job& job = call.jobs[j];
    const int first = (item - job.first_item) * job.item_rows;
    const int end = first + job.item_rows < job.w.n ? first + job.item_rows : job.w.n;
    if (job.x.tiles) {
      const auto way = job.x.m > MOST ? tiles<true, REGISTER_ROWS>
                       : job.x.m > FEW ? tiles<false, REGISTER_ROWS> : tiles<false, FEW>;
      if (!way(job.w, job.x, job.out, first)) call.fail(NO_MEMORY);
    } else {
      dots_of<FEWEST>(job.w, job.x, job.out, first, end);
    }
  }
}

static void plan(Job& job, int m, bool invariant, int threads) {
  Packed& x = job.x;
  x.m = m;
  x.k = job.w.k;
  x.chunks = (x.k + CHUNK - 1) / CHUNK;
  x.tiles = invariant || m > FEWEST;
  x.rows = x.tiles ? (m + MOST - 1) / MOST * MOST : m;
  if (x.tiles) {
    job.item_rows = TILE_ROWS;
  } else {
    const i64 bytes = (i64)x.k * BITS / 8;
    i64 rows = ITEM_BYTES / (bytes ? bytes : 1), share = job.w.n / (4 * threads);
    rows = rows < share ? rows : share;
    job.item_rows = (int)((rows + 2 * L) / (2 * L) * (2 * L));
  }
  job.items = (job.w.n + job.item_rows - 1) / job.item_rows;
}

// All jobs: inputs first, then products.
static int run(Call& call, int threads) {
  size_t size = 0;
  for (int j = 0; j < call.count; j++) {
    const Packed& x = call.jobs[j].x;
    size += (x.all() + 15) / 16 * 16;
  }
  uint32_t* room = (uint32_t*)call_scratch.get(size * sizeof(float));
  if (!room) return NO_MEMORY;
  double work = 0;
  call.items = call.rows = 0;
  for (int j = 0; j < call.count; j++) {
    Job& job = call.jobs[j];
    Packed& x = job.x;
    x.pairs = room;
    x.sums = (float*)room + (x.size() + 15) / 16 * 16;
    x.scales = x.sums + x.sums_size();
    x.starts = (int32_t*)x.scales + x.sums_size();
    // Rows that fill up: zeros.
    if (x.m < x.rows) memset(room, 0, sizeof(float) * x.all());
    room += (x.all() + 15) / 16 * 16;
    job.first_item = call.items;
    call.items += job.items;
    call.rows += x.m;
    work += (double)x.m * job.w.n * job.w.k;
  }
  const double inputs = (double)call.rows * call.jobs[0].w.k;
  parallel(pack_some, &call, inputs < (1 << 15) ? 1 : threads < call.rows ? threads : call.rows);
  if (call.bad) return call.bad;
  call.next = 0;
  parallel(multiply_some, &call, work < (1 << 18) ? 1 : threads < call.items ? threads : call.items);
  return call.bad;
}

// x [m, k] times each row's matrix [n, k], y [m, n]. Strides of words in words, others in
// elements. Without ends and owners there is one matrix; `ends` [experts]: rows of expert e
// end there; `owners` [m]: the expert of each row. NOT_HERE: inputs are not finite, or too
// large or small for these sums; nothing was written.
extern "C" int affine_linear(
    const void* x, i64 x_stride, int x_type, i64 m, const int32_t* permutation,
    i64 permutation_stride, const void* words, i64 expert_words, i64 word_stride,
    const void* scales, i64 expert_scales, i64 scale_stride, const void* biases,
    i64 expert_biases, i64 bias_stride, int part_type, const void* bias, void* y, i64 y_stride,
    i64 n, i64 k, i64 experts, const i64* ends, const i64* owners, int threads, int invariant) {
  const Matrix w = {(const uint8_t*)words, word_stride * 4, scales, scale_stride,
                    biases, bias_stride, part_type, n, k};
  if (m <= 0 || n <= 0) return DONE;
  Call call;
  call.x = x;
  call.x_stride = x_stride;
  call.x_type = x_type;
  if (!ends && !owners && m <= MOST_ROWS) {  // the usual case, without looking for memory
    Job job = {w, {}, {y, y_stride, x_type, bias, nullptr}, permutation, 0, 0, 0};
    plan(job, (int)m, invariant, threads);
    call.jobs = &job;
    call.count = 1;
    return run(call, threads);
  }
  ByExpert by;
  const int how = rows_by_expert(m, experts, ends, owners, y, y_stride, n, x_type, list_scratch, by);
  if (how != DONE) return how;
  Job* jobs = (Job*)job_scratch.get(sizeof(Job) * (experts + m / MOST_ROWS + 1));
  if (!jobs) return NO_MEMORY;
  for (i64 e = 0; e < experts; e++)
    for (i64 start = by.from[e]; start < by.from[e + 1]; start += MOST_ROWS) {
      const i64 left = by.from[e + 1] - start, rows = left < MOST_ROWS ? left : MOST_ROWS;
      const Matrix own = w.of_expert(e, expert_words, expert_scales, expert_biases);
      const Output out = {y, y_stride, x_type, bias, by.order ? by.order + start : nullptr, start};
      jobs[call.count] = {own, {}, out, permutation ? permutation + e * permutation_stride : nullptr, 0, 0, 0};
      plan(jobs[call.count++], (int)rows, invariant, threads);
    }
  if (!call.count) return DONE;
  call.jobs = jobs;
  return run(call, threads);
}
