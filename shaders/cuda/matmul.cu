// x @ W for rows of x: y[M, K], x[M, N], packed W[N, K], the gradient of x @ W.T.
//
// A block makes 128 columns of some rows of x ("tokens"), in stages of rows of W. A lane
// (g, t) brings 16 codes of each of 4 rows of W, 4 t to 4 t + 3 of 16: columns
// 16 g to 16 g + 15. They become weights, each rounded once to the dtype of the inputs;
// those of two rows side by side are what tensor cores take, with columns in the order in
// which codes come out. float32 is multiplied without tensor cores.
//
// Definitions: BITS, GROUP; X, S (dtypes of inputs and results, of scales and biases);
//   NT       tokens of a warp, divided by 8 (float32: of a thread)
//   WT, WN   warps of a block, along tokens and along N (float32: WN alone)
//   STEPS    times 16 rows of a stage, of a warp
//   SPLIT    blocks of a cluster, along N
//   STAGES   (float32: 1)
//   BLOCKS   that a multiprocessor should have room for
//   ALIGNED  1 if every packed row begins at a multiple of 16 bytes, X_ALIGNED: of x
//   GROUPED  2 if rows of x are sorted by expert, those of expert e end at experts[e]
// Grid: columns, SPLIT, tokens.

#include "operands.cuh"

constexpr bool SINGLE = X == FLOAT32;
constexpr int COLUMNS = 128;
constexpr int ROWS = 16 * WN * STEPS;  // of W in a stage
constexpr int TOKENS = SINGLE ? 8 * NT : 8 * NT * WT;
constexpr int THREADS = 32 * WN * WT;

typedef Pairs<BITS, SINGLE ? BFLOAT16 : X, false> Codes;

constexpr int padded(int bytes, int past) { return bytes + ((past - bytes) % 128 + 128) % 128; }
constexpr int SEGMENT = COLUMNS * BITS / 8;  // bytes of a row's words
constexpr int ROW_BYTES = SEGMENT + 16;
constexpr int TOKEN_BYTES = padded(ROWS * 2, 32);
constexpr int STAGE_BYTES = ROWS * ROW_BYTES + TOKENS * TOKEN_BYTES;
constexpr int GROUPS = COLUMNS < GROUP ? 1 : COLUMNS / GROUP;
constexpr int GROUP_WORDS = (ROWS + 4) * PAIR_WORDS;
constexpr int SCALE_WORDS = GROUPS * GROUP_WORDS;
constexpr int LINE = COLUMNS + 4;  // of sums, so that lanes meet different banks

// What a block multiplies: rows of W from the first one of a stage on, and tokens.
struct Operands {
  const char* words;
  i64 row_bytes;
  const Scale* scales;
  const Scale* biases;
  i64 scale_stride;
  const Input* x;
  i64 x_stride;
  int first_column, rows, columns, tokens;  // rows, columns and tokens that there are
};

// ---- from global to shared memory -----------------------------------------------

DEVICE void copy_words(const Operands& in, u32 to, int stage) {
  constexpr int BYTES = ALIGNED ? 16 : 4, COPIES = SEGMENT / BYTES;
  const int end = (int)((i64)(in.columns - in.first_column) * BITS / 8);
#pragma unroll 4
  for (int i = threadIdx.x; i < ROWS * COPIES; i += THREADS) {
    const int row = i / COPIES, at = i % COPIES * BYTES, own = stage * ROWS + row;
    const int valid = own < in.rows ? least(most(end - at, 0), BYTES) : 0;
    const char* from = in.words + (i64)(valid ? own : 0) * in.row_bytes + (valid ? at : 0);
    if constexpr (ALIGNED) copy_16(to + row * ROW_BYTES + at, from, valid);
    else copy_4(to + row * ROW_BYTES + at, from, valid);
  }
}

DEVICE void copy_inputs(const Operands& in, u32* to, int stage) {
  constexpr int PARTS = ROWS / 8;  // of a token
#pragma unroll 4
  for (int i = threadIdx.x; i < TOKENS * PARTS; i += THREADS) {
    const int token = i / PARTS, row = stage * ROWS + i % PARTS * 8;
    const int valid = token < in.tokens ? least(most(in.rows - row, 0), 8) : 0;
    const Input* from = in.x + (valid ? token * in.x_stride + row : 0);
    u32* own = to + (token * TOKEN_BYTES + i % PARTS * 16) / 4;
#if X_ALIGNED
    copy_16(shared_address(own), from, 2 * valid);
#else
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const u32 low = 2 * j < valid ? (u32)from[2 * j] : 0;
      own[j] = low | (2 * j + 1 < valid ? (u32)from[2 * j + 1] << 16 : 0);
    }
#endif
  }
}

constexpr int OWN = (ROWS * GROUPS + THREADS - 1) / THREADS;

struct OwnScales {
  Scale scales[OWN], biases[OWN];
};

// What is going to be loaded, into the second-level cache.
DEVICE void prefetch_scales(const Operands& in, int stage) {
  for (int i = threadIdx.x; i < 2 * ROWS; i += THREADS) {
    const int row = stage * ROWS + i / 2;
    if (row < in.rows) prefetch((i % 2 ? in.biases : in.scales) + row * in.scale_stride);
  }
}

// One stage ahead, through registers: so any dtype and any address will do. Rows that there
// are not have weights of zero.
DEVICE void load_scales(const Operands& in, int stage, OwnScales& own) {
  const int last = (in.columns - in.first_column - 1) / GROUP;
#pragma unroll
  for (int i = 0; i < OWN; ++i) {
    const int at = threadIdx.x + i * THREADS, row = stage * ROWS + at / GROUPS;
    own.scales[i] = own.biases[i] = 0;
    if ((ROWS * GROUPS % THREADS == 0 || at < ROWS * GROUPS) && row < in.rows) {
      const i64 place = row * in.scale_stride + least(at % GROUPS, last);
      own.scales[i] = in.scales[place];
      own.biases[i] = in.biases[place];
    }
  }
}

DEVICE void store_scales(const OwnScales& own, u32* staged) {
#pragma unroll
  for (int i = 0; i < OWN; ++i) {
    const int at = threadIdx.x + i * THREADS;
    if (ROWS * GROUPS % THREADS && at >= ROWS * GROUPS) break;
    u32* to = staged + at % GROUPS * GROUP_WORDS + at / GROUPS * PAIR_WORDS;
    if constexpr (S == FLOAT32) {
      *(float2*)to = make_float2(own.scales[i], own.biases[i]);
    } else {
      *to = (u32)own.scales[i] | (u32)own.biases[i] << 16;
    }
  }
}

// ---- products -------------------------------------------------------------------

#if X != FLOAT32

typedef float Sums[8][NT][4];

// 16 rows of W: `words` and `scales` from the first of them on.
DEVICE void multiply_rows(Sums& sums, const char* words, const char* x, const u32* scales,
                          u32 magic) {
  const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
  words += 4 * t * ROW_BYTES + (g >> 2) * 8 * BITS;
  scales += (GROUP < COLUMNS ? 16 * g / GROUP : 0) * GROUP_WORDS + 4 * t * PAIR_WORDS;
  u32 rows[4][8];
#pragma unroll
  for (int r = 0; r < 4; ++r) {
    u32 own[Codes::WORDS];
    Codes::load((const u32*)(words + r * ROW_BYTES), g & 3, own);
    Codes::take(own, g & 3, magic, rows[r]);
    make_weights<Codes>(scales + r * PAIR_WORDS, rows[r]);
  }
#pragma unroll
  for (int i = 0; i < 8; ++i)
#pragma unroll
    for (int r = 0; r < 4; r += 2) {
      const u32 first = rows[r][i], second = rows[r + 1][i];
      rows[r][i] = select_bytes(first, second, 0x5410);
      rows[r + 1][i] = select_bytes(first, second, 0x7632);
    }
  x += g * TOKEN_BYTES + t * 8;
#pragma unroll
  for (int j = 0; j < NT; ++j) {
    const uint2 own = *(const uint2*)(x + j * 8 * TOKEN_BYTES);
#pragma unroll
    for (int i = 0; i < 8; ++i)
      if constexpr (X == FLOAT16)
        multiply_halves(sums[i][j], rows[0][i], rows[1][i], rows[2][i], rows[3][i], own.x, own.y);
      else
        multiply_bfloats(sums[i][j], rows[0][i], rows[1][i], rows[2][i], rows[3][i], own.x,
                         own.y);
  }
}

// Which column is where in a line of sums.
DEVICE int column_of(int at) { return at % 8 * 16 + Codes::place(at >> 4, at >> 3 & 1); }

// Sums of all stages of a block, those of its warps added up, as lines [TOKENS][LINE].
DEVICE void multiply(const Operands& in, u32* memory, int rank) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int g = lane >> 2, t = lane & 3, wn = warp % WN, wt = warp / WN;
  const int stages = (in.rows + ROWS - 1) / ROWS, own_stages = (stages - rank + SPLIT - 1) / SPLIT;
  const u32 base = shared_address(memory);
  u32* staged = memory + STAGES * STAGE_BYTES / 4;
  OwnScales own;
  const auto copy_stage = [&](int slot, int stage) {
    copy_words(in, base + slot * STAGE_BYTES, stage);
    copy_inputs(in, memory + (slot * STAGE_BYTES + ROWS * ROW_BYTES) / 4, stage);
    prefetch_scales(in, stage);
  };
#pragma unroll
  for (int i = 0; i < STAGES - 1; ++i) {
    if (i < own_stages) copy_stage(i, rank + i * SPLIT);
    commit_copies();
  }
  if (own_stages > 0) {
    load_scales(in, rank, own);
    store_scales(own, staged);
  }
  const u32 magic = opaque(Codes::MAGIC);
  Sums sums;
#pragma unroll
  for (int i = 0; i < 8; ++i)
#pragma unroll
    for (int j = 0; j < NT; ++j)
#pragma unroll
      for (int c = 0; c < 4; ++c) sums[i][j][c] = 0.0f;

  int slot = 0;
  for (int i = 0; i < own_stages; ++i) {
    wait_copies<STAGES - 2>();
    sync_block();
    const int stage = rank + i * SPLIT;
    if (i + STAGES - 1 < own_stages)
      copy_stage(slot == 0 ? STAGES - 1 : slot - 1, stage + (STAGES - 1) * SPLIT);
    commit_copies();
    if (i + 1 < own_stages) load_scales(in, stage + SPLIT, own);
    const char* words = (const char*)memory + slot * STAGE_BYTES;
    const char* x = words + ROWS * ROW_BYTES + wt * NT * 8 * TOKEN_BYTES;
    const u32* scales = staged + (i & 1) * SCALE_WORDS;
#pragma unroll
    for (int step = 0; step < STEPS; ++step) {
      const int row = (wn * STEPS + step) * 16;
      multiply_rows(sums, words + row * ROW_BYTES, x + row * 2, scales + row * PAIR_WORDS, magic);
    }
    if (i + 1 < own_stages) store_scales(own, staged + (i + 1 & 1) * SCALE_WORDS);
    slot = slot + 1 == STAGES ? 0 : slot + 1;
  }
  wait_copies<0>();
  float* lines = (float*)memory;
  for (int turn = 0; turn < WN; ++turn) {  // always in the same order
    sync_block();
    if (wn != turn) continue;
#pragma unroll
    for (int i = 0; i < 8; ++i)
#pragma unroll
      for (int j = 0; j < NT; ++j)
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          const int token = (wt * NT + j) * 8 + 2 * t + (c & 1);
          float* to = lines + token * LINE + 16 * i + (c >> 1) * 8 + g;
          *to = turn ? *to + sums[i][j][c] : sums[i][j][c];
        }
  }
}

#else

DEVICE int column_of(int at) { return at; }

// A stage becomes weights in shared memory, lines [ROWS][COLUMNS]; inputs lie there as lines
// [ROWS][TOKENS]. Each thread makes 4 columns of NT tokens, in sums of a stage's terms each.
DEVICE void multiply(const Operands& in, u32* memory, int rank) {
  static_assert(WT == 1 && THREADS == 256 && TOKENS == THREADS / 32 * NT, "threads");
  float* weights = (float*)memory;
  float* inputs = weights + ROWS * COLUMNS;
  const int column = threadIdx.x % 32 * 4, token = threadIdx.x / 32 * NT;
  const int stages = (in.rows + ROWS - 1) / ROWS;
  float sums[NT][4];
#pragma unroll
  for (int j = 0; j < NT; ++j) sums[j][0] = sums[j][1] = sums[j][2] = sums[j][3] = 0.0f;
  for (int stage = rank; stage < stages; stage += SPLIT) {
    sync_block();
    for (int i = threadIdx.x; i < ROWS * 8; i += THREADS) {
      const int row = stage * ROWS + i / 8, first = in.first_column + i % 8 * 16;
      float* to = weights + i / 8 * COLUMNS + i % 8 * 16;
      if (row >= in.rows || first >= in.columns) {
#pragma unroll
        for (int c = 0; c < 16; ++c) to[c] = 0.0f;
        continue;
      }
      const u32* words = (const u32*)(in.words + row * in.row_bytes + i % 8 / 4 * 8 * BITS);
      u32 own[Codes::WORDS], pairs[8];
      const int t = i % 4;  // of 64 codes
#pragma unroll
      for (int w = 0; w < Codes::WORDS; ++w) own[w] = words[(t * BITS >> 1) + w];
      Codes::take(own, t, Codes::MAGIC, pairs);
      const i64 place = row * in.scale_stride + i % 8 * 16 / GROUP;
      const float scale = widen<S>(in.scales[place]);
      const float bias = widen<S>(in.biases[place]);
#pragma unroll
      for (int p = 0; p < 8; ++p) {
        to[Codes::place(p, 0)] = fused(low_of<BFLOAT16>(pairs[p]) - Codes::OFFSET, scale, bias);
        to[Codes::place(p, 1)] = fused(high_of<BFLOAT16>(pairs[p]) - Codes::OFFSET, scale, bias);
      }
    }
    for (int i = threadIdx.x; i < ROWS * TOKENS; i += THREADS) {
      const int row = stage * ROWS + i % ROWS, own = i / ROWS;
      const bool there = row < in.rows && own < in.tokens;
      inputs[i % ROWS * (TOKENS + 1) + own] = there ? in.x[own * in.x_stride + row] : 0.0f;
    }
    sync_block();
    float part[NT][4];
#pragma unroll
    for (int j = 0; j < NT; ++j) part[j][0] = part[j][1] = part[j][2] = part[j][3] = 0.0f;
#pragma unroll 4
    for (int row = 0; row < ROWS; ++row) {
      const float* w = weights + row * COLUMNS + column;
#pragma unroll
      for (int j = 0; j < NT; ++j) {
        const float x = inputs[row * (TOKENS + 1) + token + j];
#pragma unroll
        for (int c = 0; c < 4; ++c) part[j][c] = fused(x, w[c], part[j][c]);
      }
    }
#pragma unroll
    for (int j = 0; j < NT; ++j)
#pragma unroll
      for (int c = 0; c < 4; ++c) sums[j][c] += part[j][c];
  }
  sync_block();
  float* lines = (float*)memory;
#pragma unroll
  for (int j = 0; j < NT; ++j)
#pragma unroll
    for (int c = 0; c < 4; ++c) lines[(token + j) * LINE + column + c] = sums[j][c];
}

#endif

// ---- the product ----------------------------------------------------------------

KERNEL __launch_bounds__(THREADS, BLOCKS)
    affine_matmul(const void* x, i64 x_stride, const u32* packed, i64 packed_stride,
                  const void* scales_, const void* biases_, i64 scale_stride, const void*,
                  void* y_, int M, int N, int K, i64 packed_expert, i64 scale_expert,
                  const void* experts, int E) {
  DYNAMIC_SHARED(memory);
  const int rank = SPLIT > 1 ? blockIdx.y : 0, first_column = blockIdx.x * COLUMNS;
  int first_token = blockIdx.z * TOKENS, tokens = least(M - first_token, TOKENS);
  Input* y = (Input*)y_ + first_column;
  const Scale* scales = (const Scale*)scales_ + first_column / GROUP;
  const Scale* biases = (const Scale*)biases_ + first_column / GROUP;
#if GROUPED
  const Rows found = find_rows<TOKENS>((const i64*)experts, E, M, blockIdx.z);
  if (found.count <= 0) return;
  first_token = found.first, tokens = found.count;
  if (found.expert == E) {
    if (rank == 0)
      for (int i = threadIdx.x; i < COLUMNS * tokens; i += THREADS)
        if (first_column + i % COLUMNS < K)
          y[(i64)(first_token + i / COLUMNS) * K + i % COLUMNS] = 0;
    return;
  }
  packed += found.expert * packed_expert;
  scales += found.expert * scale_expert;
  biases += found.expert * scale_expert;
#endif
  const char* words = (const char*)packed + (i64)first_column * BITS / 8;
  multiply({words, packed_stride * 4, scales, biases, scale_stride,
            (const Input*)x + first_token * x_stride, x_stride, first_column, N, K, tokens},
           memory, rank);
#if SPLIT > 1
  const u32 base = shared_address(memory);
  sync_cluster();
#else
  sync_block();
#endif
  y += (i64)first_token * K;
  for (int i = threadIdx.x + rank * THREADS; i < COLUMNS * tokens; i += THREADS * SPLIT) {
    const int token = i / COLUMNS, column = column_of(i % COLUMNS);
    const int at = token * LINE + i % COLUMNS;
#if SPLIT > 1
    float sum = 0.0f;
#pragma unroll
    for (int other = 0; other < SPLIT; ++other) sum += load_from_block(base + 4 * at, other);
#else
    const float sum = ((const float*)memory)[at];
#endif
    if (first_column + column < K) y[(i64)token * K + column] = narrow<X>(sum);
  }
#if SPLIT > 1
  sync_cluster();  // no block may end while others read its sums
#endif
}
