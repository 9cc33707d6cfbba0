// x @ W.T for some rows of x, on tensor cores: y[M, N], x[M, K], packed W[N, K].
//
// W is the left operand, 16 of its rows at a time, and 8 rows of x ("tokens") the right one.
// Words and inputs come into shared memory in stages of KS places along K, some stages ahead.
// A lane (g, t) of a warp brings codes of rows g and g + 8 out of the words, those of places
// 16 t to 16 t + 15 of each 64: in the order in which they come out they are multiplied, and
// inputs are put into the same order.
//
// With SUMS, what is multiplied are the codes, and a group's scale and its bias (times the
// sum of its inputs) come in after that, in float32. Otherwise weights are made first, each
// rounded once to the dtype of the inputs.
//
// Definitions: BITS, GROUP; X, S (dtypes of inputs and results, of scales and biases);
//   NT        tokens of a block, divided by 8
//   MT        16 rows of W each, of a warp
//   WN, WK    warps of a block, along rows and along K
//   CK        blocks of a cluster, along K
//   KS, STAGES
//   SUMS
//   BLOCKS    that a multiprocessor should have room for
//   ALIGNED   1 if every packed row begins at a multiple of 16 bytes, X_ALIGNED: of x
//   TAIL      1 if K is not a multiple of KS, EDGE: N of the rows of a block
//   GROUPED   2 if rows of x are sorted by expert, those of expert e end at experts[e]
//   PDL       1 if the launch overlaps the kernel before, TRIGGER where the next one may start:
//             0 at once, 1 after the products
// Grid: rows of W, CK, tokens.

#include "machine.cuh"

constexpr int ROWS = 16 * MT * WN;
constexpr int TOKENS = 8 * NT;
constexpr int THREADS = 32 * WN * WK;

#include "tiles.cuh"

constexpr int BLOCKS_OF_64 = KS / 64 / WK;  // of a stage, that a warp takes
constexpr int TOKEN_BYTES = KS * 2 + 16;
constexpr int STAGE_BYTES = ROWS * ROW_BYTES + TOKENS * TOKEN_BYTES;
constexpr int LINE = ROWS + 1;    // of sums
constexpr int PARTS = KS / 8;     // copies of a token in a stage
constexpr int TOKENS_AT_ONCE = THREADS / PARTS;

static_assert(THREADS % PARTS == 0 && KS % (64 * WK) == 0, "threads");

// ---- inputs ---------------------------------------------------------------------

// Where a thread's part begins.
struct Inputs {
  const Input* x;
  i64 stride;
  int tokens, k;  // tokens that there are
};

DEVICE void copy_inputs(const Inputs& in, u32* to, int stage) {
  const int token = threadIdx.x / PARTS, part = threadIdx.x % PARTS;
  const Input* from = in.x + (i64)stage * KS;
  const bool within = !TAIL || stage * KS + part * 8 < in.k;
  to += token * (TOKEN_BYTES / 4) + part * 4;
  const u32 address = shared_address(to);
#pragma unroll
  for (int round = 0; round < (TOKENS + TOKENS_AT_ONCE - 1) / TOKENS_AT_ONCE; ++round) {
    const int own = token + round * TOKENS_AT_ONCE;
    if (TOKENS % TOKENS_AT_ONCE && own >= TOKENS) break;
    const bool there = within && own < in.tokens;
#if X_ALIGNED
    copy_16(address + round * TOKENS_AT_ONCE * TOKEN_BYTES, from, there ? 16 : 0);
#else
#pragma unroll
    for (int i = 0; i < 4; ++i)
      to[round * TOKENS_AT_ONCE * (TOKEN_BYTES / 4) + i] =
          there ? (u32)from[2 * i] | (u32)from[2 * i + 1] << 16 : 0;
#endif
    from += TOKENS_AT_ONCE * in.stride;
  }
}

// ---- products -------------------------------------------------------------------

DEVICE void multiply(float* sums, const u32* upper, const u32* lower, const u32* x, int q) {
  if constexpr (X == FLOAT16)
    multiply_halves(sums, upper[2 * q], lower[2 * q], upper[2 * q + 1], lower[2 * q + 1],
                    x[2 * q], x[2 * q + 1]);
  else
    multiply_bfloats(sums, upper[2 * q], lower[2 * q], upper[2 * q + 1], lower[2 * q + 1],
                     x[2 * q], x[2 * q + 1]);
}

// 64 places along K of 8 tokens, in the order of the codes.
DEVICE void load_inputs(const char* token, u32* x) {
  const uint4 low = *(const uint4*)token, high = *(const uint4*)(token + 16);
  const u32 natural[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
  Codes::order(natural, x);
}

typedef float Sums[MT][NT][4];

// Sums of codes times inputs for each group of the 64 places; then scales and biases.
DEVICE void multiply_codes(Sums& sums, const u32 (&pairs)[MT][2][8], const char* tokens,
                           const u32* scales, int block, int t) {
  constexpr int SETS = GROUP < 64 ? 64 / GROUP : 1;
  const u32 one = X == FLOAT16 ? 0x3c003c00u : 0x3f803f80u;
  const u32 ones[8] = {one, one, one, one, one, one, one, one};
#pragma unroll
  for (int set = 0; set < SETS; ++set) {
    const u32* staged = scales + (block * 64 / GROUP + set) * GROUP_WORDS;
    float scale[MT][2], bias[MT][2];
#pragma unroll
    for (int i = 0; i < MT; ++i)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        scale_pair(staged + (i * 16 + r * 8) * PAIR_WORDS, scale[i][r], bias[i][r]);
        bias[i][r] = fused(-Codes::OFFSET, scale[i][r], bias[i][r]);
      }
#pragma unroll
    for (int j = 0; j < NT; ++j) {
      u32 x[8];
      load_inputs(tokens + j * 8 * TOKEN_BYTES, x);
      if (SETS > 1 && 16 * t / GROUP != set)
#pragma unroll
        for (int i = 0; i < 8; ++i) x[i] = 0;
      float total[4] = {0, 0, 0, 0}, part[MT][4];
#pragma unroll
      for (int i = 0; i < MT; ++i) part[i][0] = part[i][1] = part[i][2] = part[i][3] = 0;
#pragma unroll
      for (int q = 0; q < 4; ++q) {
        multiply(total, ones, ones, x, q);
#pragma unroll
        for (int i = 0; i < MT; ++i) multiply(part[i], pairs[i][0], pairs[i][1], x, q);
      }
#pragma unroll
      for (int i = 0; i < MT; ++i)
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          const float sum = fused(scale[i][c >> 1], part[i][c], sums[i][j][c]);
          sums[i][j][c] = fused(bias[i][c >> 1], total[c & 1], sum);
        }
    }
  }
}

DEVICE void multiply_weights(Sums& sums, u32 (&pairs)[MT][2][8], const char* tokens,
                             const u32* scales, int block, int t) {
  const int group = GROUP < 64 ? block * (64 / GROUP) + 16 * t / GROUP : block * 64 / GROUP;
#pragma unroll
  for (int i = 0; i < MT; ++i)
#pragma unroll
    for (int r = 0; r < 2; ++r)
      make_weights<Codes>(scales + group * GROUP_WORDS + (i * 16 + r * 8) * PAIR_WORDS, pairs[i][r]);
#pragma unroll
  for (int j = 0; j < NT; ++j) {
    u32 x[8];
    load_inputs(tokens + j * 8 * TOKEN_BYTES, x);
#pragma unroll
    for (int q = 0; q < 4; ++q)
#pragma unroll
      for (int i = 0; i < MT; ++i) multiply(sums[i][j], pairs[i][0], pairs[i][1], x, q);
  }
}

// ---- the product ----------------------------------------------------------------

KERNEL __launch_bounds__(THREADS, BLOCKS)
    affine_mma(const void* x, i64 x_stride, const u32* packed, i64 packed_stride,
               const void* scales, const void* biases, i64 scale_stride, const void* bias_,
               void* y_, int M, int N, int K, i64 packed_expert, i64 scale_expert,
               const void* experts, int E) {
  DYNAMIC_SHARED(memory);
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int g = lane >> 2, t = lane & 3;
  const int wn = warp % WN, wk = warp / WN, rank = CK > 1 ? blockIdx.y : 0;
  const Input* bias = (const Input*)bias_;
  Input* y = (Input*)y_;
  const int first_row = blockIdx.x * ROWS, rows = least(N - first_row, ROWS);
  const int stages = (K + KS - 1) / KS, own_stages = (stages - rank + CK - 1) / CK;

#if PDL
#if !GROUPED
  const char* first_word = (const char*)(packed + first_row * packed_stride);
  const int row_end = (int)((i64)K * BITS / 8);
#pragma unroll
  for (int i = 0; i < STAGES - 1; ++i) {
    const int begin = least((rank + i * CK) * SEGMENT, row_end);
    prefetch_rows(first_word, packed_stride * 4, rows, begin, least(begin + SEGMENT, row_end));
  }
#endif
#if TRIGGER == 0
  let_next_kernel_start();
#endif
  wait_for_kernel_before();
#endif

  int first_token = blockIdx.z * TOKENS, tokens = least(M - first_token, TOKENS);
#if GROUPED
  const Rows found = find_rows<TOKENS>((const i64*)experts, E, M, blockIdx.z);
  if (found.count <= 0) return;
  first_token = found.first, tokens = found.count;
  if (found.expert == E) {
    if (rank == 0)
      for (int i = threadIdx.x; i < ROWS * tokens; i += THREADS)
        if (i % ROWS < rows) y[(i64)(first_token + i / ROWS) * N + first_row + i % ROWS] = 0;
    return;
  }
  packed += found.expert * packed_expert;
  scales = (const Scale*)scales + found.expert * scale_expert;
  biases = (const Scale*)biases + found.expert * scale_expert;
#endif
  y += (i64)first_token * N;
  const Weights w = weights_of(packed, packed_stride, (const Scale*)scales, (const Scale*)biases,
                               scale_stride, first_row, rows, K);
  const Inputs in = {
      (const Input*)x + (first_token + threadIdx.x / PARTS) * x_stride + threadIdx.x % PARTS * 8,
      x_stride, tokens, K};

  const u32 base = shared_address(memory);
  u32* staged = memory + STAGES * STAGE_BYTES / 4;
  OwnScales own;
  const auto copy_stage = [&](int slot, int stage) {
    copy_words(w, base + slot * STAGE_BYTES, stage);
    copy_inputs(in, memory + (slot * STAGE_BYTES + ROWS * ROW_BYTES) / 4, stage);
  };
#pragma unroll
  for (int i = 0; i < STAGES - 1; ++i) {
    if (i < own_stages) copy_stage(i, rank + i * CK);
    commit_copies();
  }
  if (own_stages > 0) {
    load_scales(w, rank, own);
    store_scales(own, staged);
  }

  const u32 magic = opaque(Codes::MAGIC);
  Sums sums;
#pragma unroll
  for (int i = 0; i < MT; ++i)
#pragma unroll
    for (int j = 0; j < NT; ++j)
#pragma unroll
      for (int c = 0; c < 4; ++c) sums[i][j][c] = 0.0f;

  int slot = 0;
  for (int i = 0; i < own_stages; ++i) {
    wait_copies<STAGES - 2>();
    sync_block();
    const int stage = rank + i * CK;
    if (i + STAGES - 1 < own_stages)
      copy_stage(slot == 0 ? STAGES - 1 : slot - 1, stage + (STAGES - 1) * CK);
    commit_copies();
    if (i + 1 < own_stages) load_scales(w, stage + CK, own);

    const char* words = (const char*)memory + slot * STAGE_BYTES;
    const char* tokens = words + ROWS * ROW_BYTES + g * TOKEN_BYTES + t * 32;
    const u32* pairs_of_scales = staged + (i & 1) * SCALE_WORDS + (wn * MT * 16 + g) * PAIR_WORDS;
    words += (wn * MT * 16 + g) * ROW_BYTES;
#pragma unroll
    for (int u = 0; u < BLOCKS_OF_64; ++u) {
      const int block = wk * BLOCKS_OF_64 + u;
      u32 pairs[MT][2][8];
#pragma unroll
      for (int j = 0; j < MT; ++j)
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          u32 own_words[Codes::WORDS];
          Codes::load((const u32*)(words + (j * 16 + r * 8) * ROW_BYTES + block * 8 * BITS), t,
                      own_words);
          Codes::take(own_words, t, magic, pairs[j][r]);
        }
#if SUMS
      multiply_codes(sums, pairs, tokens + block * 128, pairs_of_scales, block, t);
#else
      multiply_weights(sums, pairs, tokens + block * 128, pairs_of_scales, block, t);
#endif
    }
    if (i + 1 < own_stages) store_scales(own, staged + (i + 1 & 1) * SCALE_WORDS);
    slot = slot + 1 == STAGES ? 0 : slot + 1;
  }
#if PDL && TRIGGER == 1
  let_next_kernel_start();
#endif

  wait_copies<0>();
  sync_block();
  float* lines = (float*)memory;  // [WK][TOKENS][LINE]
#pragma unroll
  for (int i = 0; i < MT; ++i)
#pragma unroll
    for (int j = 0; j < NT; ++j)
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const int token = j * 8 + 2 * t + (c & 1), row = (wn * MT + i) * 16 + g + (c >> 1) * 8;
        lines[(wk * TOKENS + token) * LINE + row] = sums[i][j][c];
      }
#if CK > 1
  sync_cluster();
#else
  sync_block();
#endif
  for (int i = threadIdx.x + rank * THREADS; i < ROWS * tokens; i += THREADS * CK) {
    const int token = i / ROWS, row = i % ROWS;
    float sum = 0.0f;
#pragma unroll
    for (int other = 0; other < CK; ++other)
#pragma unroll
      for (int k = 0; k < WK; ++k) {
        const int at = (k * TOKENS + token) * LINE + row;
#if CK > 1
        sum += load_from_block(base + 4 * at, other);
#else
        sum += lines[at];
#endif
      }
    if (row < rows) {
      if (bias) sum += widen<X>(bias[first_row + row]);
      y[(i64)token * N + first_row + row] = narrow<X>(sum);
    }
  }
#if CK > 1
  sync_cluster();  // no block may end while others read its sums
#endif
}
