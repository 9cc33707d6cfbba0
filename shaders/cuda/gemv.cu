// x @ W.T for one to four rows of x: y[M, N], x[M, K], packed W[N, K].
//
// Reading the words is what takes time, so bringing them into products must cost few
// instructions. Codes are multiplied as bytes by the tensor cores, which a mask and a shift
// make of them. To that end inputs become 32-bit integers, relative to the largest of a
// chunk of them, and these four signed bytes each, "planes". A bfloat16 is exact unless it is
// 2^22 times smaller than its largest neighbour; products and their sums over a group are
// integers, and exact. Scales and biases come in after that, in float32.
//
// A matrix product has 16 rows of W, 32 places along K and 8 columns: columns are the planes
// of one group, then those of the next. The input of a column that belongs to another group
// is zero. A lane (g, t) of a warp holds 32 consecutive codes of rows g and g + 8: the run t
// of a "unit", 128 places along K.
//
// A block makes 16 rows of y at a time, and the ones GRID_X blocks further on. Its warps
// share K: a "chunk" of UNITS units each, in turn. Each warp turns the inputs of its own
// chunks into planes once, while its first words are on their way.
//
// Definitions: BITS, GROUP; X, S (dtypes of inputs and results, of scales and biases);
//   TOKENS    rows of x that a block takes
//   UNITS     in a chunk: words are requested that far ahead
//   WARPS     of a block
//   BLOCKS    that a multiprocessor should have room for
//   ALIGNED   1 if every packed row begins at a multiple of 16 bytes
//   SCALE_BYTES  what the address of every row of scales is a multiple of, 16 at most
//   TAIL      1 if K is not a multiple of a chunk
//   GROUPED   1 if experts[m] is the expert of row m of x
//   PDL       1 if the launch overlaps the kernel before, TRIGGER where the next one may start:
//             0 at once, 1 after the products

#include "codes.cuh"

typedef Stored<X>::type Input;
typedef Stored<S>::type Scale;

constexpr int SPAN = GROUP < 64 ? GROUP : 64;       // of K that has columns of its own
constexpr int SETS = 64 / SPAN;                     // of sums for a unit, two spans each
constexpr int SHARES = SPAN == 64 ? 1 : 2;          // of columns
constexpr int CHUNK = 128 * UNITS;                  // places along K
constexpr int GROUPS = CHUNK < GROUP ? 1 : CHUNK / GROUP;  // of a chunk
constexpr int UNIT_WORDS = 4 * BITS;
constexpr int PLANE_WORDS = 128;                    // of a unit of x: half, plane, run, quad
constexpr int PADDED = 20;                          // rows of scales, without bank conflicts
constexpr int PAIR_WORDS = S == FLOAT32 ? 2 : 1;    // a scale and its bias
constexpr int SCALE_WORDS = GROUPS * PADDED * PAIR_WORDS;
constexpr int OWN_GROUPS = GROUPS > 1 ? GROUPS / 2 : 1;  // that a lane loads, of one row

typedef Quads<BITS, GROUP == 16> Codes;

struct Operands {
  const u32* packed;
  i64 packed_stride;
  const Scale* scales;
  const Scale* biases;
  i64 scale_stride;
  int n, k, chunks;
};

// ---- words ----------------------------------------------------------------------

// Those of a run that begins OFFSET words further on.
template <int OFFSET, int I = 0>
DEVICE void load_words(const u32* from, u32* to) {
  constexpr int WIDE = !ALIGNED ? 1 : BITS % 4 == 0 ? 4 : BITS % 2 == 0 ? 2 : 1;
  if constexpr (I < BITS) {
    if constexpr (WIDE == 4) load_four<OFFSET + I, true>(from, to + I);
    else if constexpr (WIDE == 2) load_two<OFFSET + I>(from, to + I);
    else load_one<OFFSET + I>(from, to + I);
    load_words<OFFSET, I + WIDE>(from, to);
  }
}

// Of the lane's runs of two rows in unit U of a chunk; `left` words follow in the rows. Inputs
// beyond K are zero, so that codes may be anything there; but they must not be read.
template <int U>
DEVICE void load_runs(const u32* const (&rows)[2], int left, u32 (*to)[BITS]) {
  constexpr int OFFSET = U * UNIT_WORDS;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
#if TAIL
    if (left < OFFSET + BITS) {
#pragma unroll
      for (int i = 0; i < BITS; ++i) to[r][i] = OFFSET + i < left ? rows[r][OFFSET + i] : 0;
      continue;
    }
#endif
    load_words<OFFSET>(rows[r], to[r]);
  }
}

template <int U = 0>
DEVICE void load_chunk(const u32* const (&rows)[2], int left, u32 (*to)[2][BITS]) {
  if constexpr (U < UNITS) {
    load_runs<U>(rows, left, to[U]);
    load_chunk<U + 1>(rows, left, to);
  }
}

// ---- scales ---------------------------------------------------------------------
//
// A warp loads those of its next chunk ahead: a lane half of the groups of one row. They go
// through shared memory, which turns them: [group][row] pairs.

struct alignas(16) OwnScales {
  Scale scales[OWN_GROUPS], biases[OWN_GROUPS];
};

template <int I = 0>
DEVICE void load_some(const Scale* from, Scale* to) {
  constexpr int BYTES = OWN_GROUPS * (int)sizeof(Scale);
  constexpr int WIDE = BYTES < SCALE_BYTES ? BYTES : SCALE_BYTES;
  const u32* words = (const u32*)from;
  u32* out = (u32*)to + I;
  if constexpr (WIDE < 4) {
#pragma unroll
    for (int i = 0; i < OWN_GROUPS; ++i) to[i] = from[i];
  } else if constexpr (I < BYTES / 4) {
    if constexpr (WIDE == 16) load_four<I, false>(words, out);
    else if constexpr (WIDE == 8) load_two<I>(words, out);
    else load_one<I>(words, out);
    load_some<I + WIDE / 4>(from, to);
  }
}

DEVICE void load_scales(const Operands& w, int tile, int chunk, int lane, OwnScales& own) {
  const i64 row = least(tile * 16 + (lane & 15), w.n - 1) * w.scale_stride;
  const int half = (lane >> 4) * (GROUPS > 1 ? OWN_GROUPS : 0);
  const int first = chunk * UNITS * 128 / GROUP + half;
#if TAIL
  const int last = w.k / GROUP - 1;
  if (first + OWN_GROUPS - 1 > last) {
#pragma unroll
    for (int i = 0; i < OWN_GROUPS; ++i) {
      own.scales[i] = w.scales[row + least(first + i, last)];
      own.biases[i] = w.biases[row + least(first + i, last)];
    }
    return;
  }
#endif
  load_some(w.scales + row + first, own.scales);
  load_some(w.biases + row + first, own.biases);
}

DEVICE void store_scales(const OwnScales& own, int lane, u32* staged) {
  if (GROUPS == 1 && lane >= 16) return;
  const int first = (lane >> 4) * OWN_GROUPS;
#pragma unroll
  for (int i = 0; i < OWN_GROUPS; ++i) {
    u32* at = staged + ((first + i) * PADDED + (lane & 15)) * PAIR_WORDS;
    if constexpr (S == FLOAT32) {
      *(float2*)at = make_float2(own.scales[i], own.biases[i]);
    } else {
      *at = (u32)own.scales[i] | (u32)own.biases[i] << 16;
    }
  }
}

DEVICE void scale_pair(const u32* at, float& scale, float& bias) {
  if constexpr (S == FLOAT32) {
    const float2 pair = *(const float2*)at;
    scale = pair.x, bias = pair.y;
  } else {
    scale = low_of<S>(*at), bias = high_of<S>(*at);
  }
}

// ---- inputs ---------------------------------------------------------------------

// Where a lane finds its column of a unit's planes: in share s of the columns, if it is one
// of a span that its run belongs to; zeros otherwise.
DEVICE bool has_column(int lane, int share) {
  const int run = lane & 3, column = lane >> 2;
  return SPAN == 64 ? run >> 1 == column >> 2 : run == 2 * share + (column >> 2);
}

DEVICE void load_planes(const u32* at, u32* planes) {
  const uint4 low = *(const uint4*)at;
  const uint4 high = *(const uint4*)(at + 64);
  planes[0] = low.x, planes[1] = low.y, planes[2] = low.z, planes[3] = low.w;
  planes[4] = high.x, planes[5] = high.y, planes[6] = high.z, planes[7] = high.w;
}

// Sums of a unit for the spans of one share; of `half` of each run if spans are that short.
DEVICE void multiply(const u32* upper, const u32* lower, const u32* planes, int half, int* sums) {
  constexpr int COUNT = SPAN == 16 ? 2 : 4;
  sums[0] = sums[1] = sums[2] = sums[3] = 0;
#pragma unroll
  for (int i = 0; i < COUNT; ++i) {
    const int q = 4 * half + 2 * i;
    multiply_bytes(sums, upper[q], lower[q], upper[q + 1], lower[q + 1], planes[q],
                   planes[q + 1]);
  }
}

// One lane has the two upper planes of a span's sums, its neighbour the two lower ones.
DEVICE float joined(int high, int low) { return to_float(high * 256 + low); }

// Four inputs of a lane become a word of each plane, the upper one first.
DEVICE void store_planes(const float* x, float factor, u32* at) {
  u32 digits[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) digits[i] = ((u32)to_int(x[i] * factor) + 0x00808080u) ^ 0x00808080u;
  const u32 a = select_bytes(digits[0], digits[1], 0x5140), b = select_bytes(digits[2], digits[3], 0x5140);
  const u32 c = select_bytes(digits[0], digits[1], 0x7362), d = select_bytes(digits[2], digits[3], 0x7362);
  at[0] = select_bytes(c, d, 0x7632);
  at[16] = select_bytes(c, d, 0x5410);
  at[32] = select_bytes(a, b, 0x7632);
  at[48] = select_bytes(a, b, 0x5410);
}

// Inputs of a chunk of one row of x. In each unit a lane has a quad of a run.
struct OwnInputs {
  Input values[UNITS][4];
};

DEVICE void load_inputs(const Input* row, int chunk, int k, int lane, OwnInputs& own) {
  const int first = chunk * CHUNK + (lane >> 3) * 32 + Codes::first(lane & 7);
#pragma unroll
  for (int u = 0; u < UNITS; ++u)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int at = u * 128 + Codes::offset(i);
      own.values[u][i] = !TAIL || first + at < k ? row[first + at] : (Input)0;
    }
}

// They become planes. For each span and each pair of planes: what sums are worth, and the
// sum of the inputs.
DEVICE void prepare(const OwnInputs& own, int lane, u32* planes, float2* worth,
                    const u32* zeros) {
  float values[UNITS][4];
  u32 largest = 0;
#pragma unroll
  for (int u = 0; u < UNITS; ++u)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      values[u][i] = widen<X>(own.values[u][i]);
      const u32 size = as_bits(values[u][i]) & 0x7fffffffu;
      largest = size > largest ? size : largest;
    }
  const int exponent = most((int)(warp_max(largest) >> 23), 30);
  const float factor = as_float((u32)(283 - exponent) << 23);  // up to 2^30
  float of_one = as_float((u32)(exponent - 29) << 23);
  if (exponent == 255) of_one = as_float(0x7fc00000u);  // an infinity or a NaN
  if ((lane & 1) == 0) of_one *= 65536.0f;
  const int place = (lane >> 2 & 1) * 64 + (lane >> 3) * 4 + (lane & 3);
#pragma unroll
  for (int u = 0; u < UNITS; ++u) store_planes(values[u], factor, planes + u * PLANE_WORDS + place);
  sync_warp();
  const u32 ones[8] = {0x01010101u, 0x01010101u, 0x01010101u, 0x01010101u,
                       0x01010101u, 0x01010101u, 0x01010101u, 0x01010101u};
#pragma unroll
  for (int share = 0; share < SHARES; ++share) {
    const bool has = has_column(lane, share);
    const u32* column = has ? planes + (lane >> 2 & 3) * 16 + (lane & 3) * 4 : zeros;
#pragma unroll
    for (int u = 0; u < UNITS; ++u) {
      u32 inputs[8];
      load_planes(column + (has ? u * PLANE_WORDS : 0), inputs);
#pragma unroll
      for (int half = 0; half < SETS / SHARES; ++half) {
        int sums[4];
        multiply(ones, ones, inputs, half, sums);
        const int set = u * SETS + share * (SETS / SHARES) + half;
        if (lane < 4) worth[set * 4 + lane] = make_float2(of_one, joined(sums[0], sums[1]) * of_one);
      }
    }
  }
}

// ---- the product ----------------------------------------------------------------

template <int VALUE> struct Number { static constexpr int value = VALUE; };

template <int U = 0, typename Work>
DEVICE void each_unit(const Work& work) {
  if constexpr (U < UNITS) {
    work(Number<U>());
    each_unit<U + 1>(work);
  }
}

struct Shared {
  u32* scales;     // of a warp
  float* partial;  // [2][WARPS][TOKENS][16]
  u32* zeros;      // as long as the planes of a unit
  float2* worth;   // [TOKENS][units][SETS][4]
  u32* planes;     // [TOKENS][units][PLANE_WORDS]
};

DEVICE Shared divide(u32* memory, int units, int warp) {
  Shared s;
  s.scales = memory + warp * SCALE_WORDS;
  s.partial = (float*)(memory + WARPS * SCALE_WORDS);
  s.zeros = (u32*)(s.partial + 2 * WARPS * TOKENS * 16);
  s.worth = (float2*)(s.zeros + PLANE_WORDS);
  s.planes = (u32*)(s.worth + TOKENS * units * SETS * 4);
  return s;
}

// Lines of the first words of a warp, into the second-level cache only: the kernel before
// may be writing them still.
DEVICE void prefetch_chunk(const Operands& w, int tile, int chunk, int lane) {
  const u32* row = w.packed + least(tile * 16 + (lane & 15), w.n - 1) * w.packed_stride;
  const int end = (int)((i64)w.k * BITS / 32);
  const int first = chunk * UNITS * UNIT_WORDS;
  for (int i = (lane >> 4) * 32; i < UNITS * UNIT_WORDS; i += 64)
    if (first + i < end) prefetch(row + first + i);
}

DEVICE void store_row(float sum, const Input* bias, Input* y, int m, int row, int count, int n) {
  if (row >= n || m >= count) return;
  if (bias) sum += widen<X>(bias[row]);
  y[(i64)m * n + row] = narrow<X>(sum);
}

KERNEL __launch_bounds__(32 * WARPS, BLOCKS)
    affine_gemv(const void* x_, i64 x_stride, const u32* packed, i64 packed_stride,
                const void* scales, const void* biases, i64 scale_stride, const void* bias_,
                void* y_, int M, int N, int K, i64 packed_expert, i64 scale_expert,
                const void* experts, int E) {
  DYNAMIC_SHARED(memory);
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int g = lane >> 2, t = lane & 3;
  const int tiles = (N + 15) / 16, first_row = blockIdx.y * TOKENS;
  Operands w = {packed, packed_stride, (const Scale*)scales, (const Scale*)biases,
                scale_stride, N, K, (K + CHUNK - 1) / CHUNK};
  const int units = w.chunks * UNITS;
  const Shared shared = divide(memory, units, warp);
  const Input* bias = (const Input*)bias_;
  Input* y = (Input*)y_;
  int tile = blockIdx.x;

#if PDL
#if !GROUPED
  if (warp < w.chunks) prefetch_chunk(w, tile, warp, lane);
#endif
#if TRIGGER == 0
  let_next_kernel_start();
#endif
  wait_for_kernel_before();
  w.packed = now(w.packed), w.scales = now(w.scales), w.biases = now(w.biases);
#endif
#if GROUPED
  const i64 expert = ((const i64*)experts)[first_row];
  if (expert < 0 || expert >= E) {
    for (; tile < tiles; tile += gridDim.x)
      if (threadIdx.x < 16)
        store_row(as_float(0x7fc00000u), nullptr, y, first_row, tile * 16 + threadIdx.x, M, N);
    return;
  }
  w.packed += expert * packed_expert;
  w.scales += expert * scale_expert;
  w.biases += expert * scale_expert;
#endif

  // Inputs before words: they are few, wanted first, and would queue behind them.
  OwnInputs inputs[TOKENS] = {};
  const Input* x_rows[TOKENS];
#pragma unroll
  for (int m = 0; m < TOKENS; ++m) {
    x_rows[m] = (const Input*)x_ + least(first_row + m, M - 1) * x_stride;
    if (warp < w.chunks) load_inputs(x_rows[m], warp, K, lane, inputs[m]);
  }
  u32 words[UNITS][2][BITS] = {};
  OwnScales own = {};
  const int row_words = (int)((i64)K * BITS / 32);
  const u32* rows[2];
  int at = warp * UNITS * UNIT_WORDS + t * BITS;
  rows[0] = w.packed + least(tile * 16 + g, N - 1) * packed_stride + at;
  rows[1] = w.packed + least(tile * 16 + g + 8, N - 1) * packed_stride + at;
  if (warp < w.chunks) {
    load_chunk(rows, row_words - at, words);
    load_scales(w, tile, warp, lane, own);
  }

  for (int i = threadIdx.x; i < PLANE_WORDS; i += 32 * WARPS) shared.zeros[i] = 0;
  sync_block();
  const u32* column[SHARES];
  int step[SHARES];
#pragma unroll
  for (int s = 0; s < SHARES; ++s) {
    const bool own_column = has_column(lane, s);
    column[s] = own_column ? shared.planes + (g & 3) * 16 + t * 4 : shared.zeros;
    step[s] = own_column ? PLANE_WORDS : 0;
  }
  constexpr int RUN_GROUPS = GROUP >= 128 ? 0 : GROUP == 16 ? 2 : 1;
  const u32* own_scales = shared.scales + ((t >> 1) * RUN_GROUPS * PADDED + g) * PAIR_WORDS;

  int parity = 0, turn = 0;
  for (; tile < tiles; tile += gridDim.x) {
    float sums[TOKENS][2];
#pragma unroll
    for (int m = 0; m < TOKENS; ++m) sums[m][0] = sums[m][1] = 0.0f;

    for (int chunk = warp; chunk < w.chunks; chunk += WARPS) {
      if (opaque(tile) == blockIdx.x) {  // opaque, or all of the loop is made twice
#pragma unroll
        for (int m = 0; m < TOKENS; ++m) {
          const int unit = m * units + chunk * UNITS;
          prepare(inputs[m], lane, shared.planes + unit * PLANE_WORDS,
                  shared.worth + unit * SETS * 4, shared.zeros);
          if (chunk + WARPS < w.chunks) load_inputs(x_rows[m], chunk + WARPS, K, lane, inputs[m]);
        }
      }
      sync_warp();
      store_scales(own, lane, shared.scales);
      sync_warp();

      int next_tile = tile, next_chunk = chunk + WARPS;
      if (next_chunk >= w.chunks) next_tile = tile + gridDim.x, next_chunk = warp;
      const bool more = next_tile < tiles;
      // After the last one all lanes load the same words, which costs less than to ask.
      at = more ? next_chunk * UNITS * UNIT_WORDS + t * BITS : 0;
      rows[0] = w.packed + at + (more ? least(next_tile * 16 + g, N - 1) * packed_stride : 0);
      rows[1] = w.packed + at + (more ? least(next_tile * 16 + g + 8, N - 1) * packed_stride : 0);
      if (more) load_scales(w, next_tile, next_chunk, lane, own);
      each_unit([&](auto number) {
        constexpr int u = decltype(number)::value;
        u32 above[8], below[8];
        Codes::take(words[u][0], above);
        Codes::take(words[u][1], below);
        load_runs<u>(rows, row_words - at, words[u]);
#pragma unroll
        for (int share = 0; share < SHARES; ++share) {
          float scale[SETS / SHARES][2], offset[SETS / SHARES][2];
#pragma unroll
          for (int half = 0; half < SETS / SHARES; ++half)
#pragma unroll
            for (int r = 0; r < 2; ++r) {
              const int group = (u * 128 + share * 64 + half * 16) / GROUP;
              scale_pair(own_scales + (group * PADDED + r * 8) * PAIR_WORDS, scale[half][r],
                         offset[half][r]);
            }
#pragma unroll
          for (int m = 0; m < TOKENS; ++m) {
            const int unit = m * units + chunk * UNITS + u;
            u32 planes[8];
            load_planes(column[share] + unit * step[share], planes);
#pragma unroll
            for (int half = 0; half < SETS / SHARES; ++half) {
              int whole[4];
              multiply(above, below, planes, half, whole);
              const int set = share * (SETS / SHARES) + half;
              const float2 worth = shared.worth[(unit * SETS + set) * 4 + t];
#pragma unroll
              for (int r = 0; r < 2; ++r) {
                const float product = joined(whole[2 * r], whole[2 * r + 1]) * worth.x;
                sums[m][r] = fused(scale[half][r], product, sums[m][r]);
                sums[m][r] = fused(offset[half][r], worth.y, sums[m][r]);
              }
            }
          }
        }
      });
    }
#if PDL && TRIGGER == 1
    if (tile + (int)gridDim.x >= tiles) let_next_kernel_start();
#endif

#pragma unroll
    for (int m = 0; m < TOKENS; ++m)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        sums[m][r] += shuffle_xor(sums[m][r], 1);
        sums[m][r] += shuffle_xor(sums[m][r], 2);
      }
    float* partial = shared.partial + parity * (WARPS * TOKENS * 16);
    if (t == 0)
#pragma unroll
      for (int m = 0; m < TOKENS; ++m) {
        partial[(warp * TOKENS + m) * 16 + g] = sums[m][0];
        partial[(warp * TOKENS + m) * 16 + g + 8] = sums[m][1];
      }
    // Two sets of sums: no warp is a whole tile ahead of the one that adds them up.
    sync_block();
    if (warp == turn)
      for (int i = lane; i < TOKENS * 16; i += 32) {
        float sum = 0.0f;
#pragma unroll
        for (int other = 0; other < WARPS; ++other) sum += partial[other * TOKENS * 16 + i];
        store_row(sum, bias, y, first_row + (i >> 4), tile * 16 + (i & 15), M, N);
      }
    parity ^= 1;
    turn = turn + 1 == WARPS ? 0 : turn + 1;
  }
}
