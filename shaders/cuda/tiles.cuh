// Words and scales of a tile of x @ W.T on their way into shared memory, in stages of KS
// places along K.
//
// Whoever includes this has ROWS of W and TOKENS (rows of x) of a tile, THREADS, and whether
// codes are multiplied as they are (SUMS). Definitions are those of mma.cu.

#pragma once

#include "operands.cuh"

typedef Pairs<BITS, X, SUMS> Codes;

static_assert(S == X || X == BFLOAT16 || SUMS, "float16 may have no room for such weights");

constexpr int SEGMENT = KS * BITS / 8;  // bytes of a row's words in a stage
constexpr int GROUPS = KS < GROUP ? 1 : KS / GROUP;

// Rows lie in shared memory so that the lanes of a warp meet different banks.
constexpr int padded(int bytes, int past) { return bytes + ((past - bytes) % 128 + 128) % 128; }
constexpr int ROW_BYTES =
    padded(SEGMENT, BITS == 8 ? 64 : BITS == 2 || BITS == 1 ? 16 : BITS == 4 ? 32 : 48);
constexpr int GROUP_WORDS = (ROWS + 4) * PAIR_WORDS;  // of all rows
constexpr int SCALE_WORDS = GROUPS * GROUP_WORDS;     // of a stage

constexpr int power_of_two(int number, int most) {
  int power = 1;
  while (number % (2 * power) == 0 && 2 * power <= most) power *= 2;
  return power;
}

constexpr int BYTES = ALIGNED ? 16 : 4;                  // of a copy
constexpr int COPIES = SEGMENT / BYTES;                  // of a row in a stage:
constexpr int BESIDE = power_of_two(COPIES, 32);         // made by so many threads,
constexpr int EACH = COPIES / BESIDE;                    // so many by each
constexpr int ROWS_AT_ONCE = THREADS / BESIDE;
constexpr int PAIRS_AT_ONCE = THREADS / GROUPS;          // rows whose scales are loaded at once
constexpr int OWN = (ROWS + PAIRS_AT_ONCE - 1) / PAIRS_AT_ONCE;

static_assert(THREADS % BESIDE == 0 && THREADS % GROUPS == 0, "threads");

// ---- from global to shared memory -----------------------------------------------

// Where a thread's part of each begins.
struct Weights {
  const char* words;
  i64 row_bytes;
  const Scale* scales;
  const Scale* biases;
  i64 scale_stride;
  int rows, k;  // rows from the first one of the tile
};

DEVICE void copy_words(const Weights& w, u32 to, int stage) {
  const int row = threadIdx.x / BESIDE, at = threadIdx.x % BESIDE * BYTES;
  const char* from = w.words + (i64)stage * SEGMENT;
  to += row * ROW_BYTES + at;
#pragma unroll
  for (int round = 0; round < (ROWS + ROWS_AT_ONCE - 1) / ROWS_AT_ONCE; ++round) {
    const int own = row + round * ROWS_AT_ONCE;
    if (ROWS % ROWS_AT_ONCE && own >= ROWS) break;
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
      int valid = BYTES;
      if (TAIL) {
        const int left = (int)((i64)w.k * BITS / 8 - (i64)stage * SEGMENT) - at - i * BESIDE * BYTES;
        valid = least(most(left, 0), BYTES);
      }
      if (EDGE && own >= w.rows) valid = 0;
      const u32 place = to + round * ROWS_AT_ONCE * ROW_BYTES + i * BESIDE * BYTES;
      if constexpr (ALIGNED) copy_16(place, from + i * BESIDE * BYTES, valid);
      else copy_4(place, from + i * BESIDE * BYTES, valid);
    }
    from += ROWS_AT_ONCE * w.row_bytes;
  }
}

struct OwnScales {
  Scale scales[OWN], biases[OWN];
};

// One stage ahead, through registers: so any dtype and any address will do.
DEVICE void load_scales(const Weights& w, int stage, OwnScales& own) {
  const int row = threadIdx.x / GROUPS;
  int group = (int)((i64)stage * KS / GROUP);
  if (TAIL) group = least(group, w.k / GROUP - 1 - (int)threadIdx.x % GROUPS);
  const Scale* scales = w.scales + group;
  const Scale* biases = w.biases + group;
#pragma unroll
  for (int i = 0; i < OWN; ++i) {
    if ((ROWS % PAIRS_AT_ONCE == 0 || row + i * PAIRS_AT_ONCE < ROWS) &&
        (!EDGE || row + i * PAIRS_AT_ONCE < w.rows)) {
      own.scales[i] = *scales;
      own.biases[i] = *biases;
    }
    scales += PAIRS_AT_ONCE * w.scale_stride;
    biases += PAIRS_AT_ONCE * w.scale_stride;
  }
}

DEVICE void store_scales(const OwnScales& own, u32* staged) {
  const int row = threadIdx.x / GROUPS;
  staged += threadIdx.x % GROUPS * GROUP_WORDS + row * PAIR_WORDS;
#pragma unroll
  for (int i = 0; i < OWN; ++i) {
    if (ROWS % PAIRS_AT_ONCE && row + i * PAIRS_AT_ONCE >= ROWS) break;
    u32* to = staged + i * PAIRS_AT_ONCE * PAIR_WORDS;
    if constexpr (S == FLOAT32) {
      *(float2*)to = make_float2(own.scales[i], own.biases[i]);
    } else {
      *to = (u32)own.scales[i] | (u32)own.biases[i] << 16;
    }
  }
}

// What is going to be read, into the second-level cache only: words before the kernel before
// has ended, as it may be writing them still, and scales before it is their turn.
DEVICE void prefetch_rows(const char* first, i64 stride, int rows, int begin, int end) {
  const int lines = (end - begin + 127) / 128;
#pragma unroll 1
  for (int i = threadIdx.x; i < ROWS * lines; i += THREADS)
    if (i % ROWS < rows) prefetch(first + i % ROWS * stride + begin + i / ROWS * 128);
}

// Rows from the first one of a tile on, of one matrix.
DEVICE Weights weights_of(const u32* packed, i64 packed_stride, const Scale* scales,
                          const Scale* biases, i64 scale_stride, int first_row, int rows, int k) {
  const int bytes = k / GROUP * (int)sizeof(Scale);
  scales += first_row * scale_stride;
  biases += first_row * scale_stride;
  prefetch_rows((const char*)scales, scale_stride * sizeof(Scale), rows, 0, bytes);
  prefetch_rows((const char*)biases, scale_stride * sizeof(Scale), rows, 0, bytes);
  const i64 own_words = (first_row + threadIdx.x / BESIDE) * packed_stride;
  const i64 own_scale = threadIdx.x / GROUPS * scale_stride + threadIdx.x % GROUPS;
  return {(const char*)(packed + own_words) + threadIdx.x % BESIDE * BYTES,
          packed_stride * 4,
          scales + own_scale,
          biases + own_scale,
          scale_stride,
          rows,
          k};
}
