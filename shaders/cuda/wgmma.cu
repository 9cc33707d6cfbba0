// y[M, N] = x[M, K] W[N, K]^T for some tens to hundreds of rows, on Hopper's matrix unit.
//
// Weights are the operand that comes from registers: each lane turns its 16 codes of two
// rows into floats, as in mma.cu. Inputs come from shared memory, where the unit wants them
// in an order of its own; so `affine_order` first puts them into that order, and into tiles
// that one copy brings in. One warp brings inputs, each of the others its own weights.
//
// Definitions: BITS, GROUP, X (of x and y), S (of scales), TOKENS of a tile, WARPGROUPS of
// 64 rows, TURNS that warpgroups of the same rows take at stages, BLOCKS of 64 columns in a
// stage (even), STAGES of inputs (more than TURNS), DEPTH in stages of weights, SPLIT of the
// columns over the blocks of a cluster, PDL if launches overlap the kernel before. Rows of
// words begin at multiples of 16 bytes.

#include "codes.cuh"
#include "machine.cuh"

typedef Pairs<BITS, X, false> Codes;
typedef typename Stored<S>::type Scale;

constexpr int ROWS = 64 * WARPGROUPS;
constexpr int COLUMNS = 64 * BLOCKS;           // of a stage
constexpr int ROW_BYTES = 8 * BITS * BLOCKS;   // of its words
constexpr int TILE_BYTES = 128 * TOKENS;       // of inputs, 64 columns
// Odd multiples of what eight rows hold in a block, so that they lie in different banks.
constexpr int UNIT = BITS == 8 ? 64 : BITS == 4 || BITS == 3 ? 32 : 16;
constexpr int STRIDE = ((ROW_BYTES + UNIT - 1) / UNIT | 1) * UNIT;
constexpr int INPUTS = STAGES * BLOCKS * TILE_BYTES;
constexpr int SLOT = 16 * STRIDE;  // a warp's words of a stage
constexpr int WORDS = DEPTH * TURNS * ROWS * STRIDE;
constexpr int MULTIPLIERS = 128 * WARPGROUPS * TURNS;  // threads
// Registers move between groups of four warps: many tokens need more than an equal share.
constexpr bool MOVES = TOKENS >= 192 || MULTIPLIERS == 512;
constexpr int THREADS = MULTIPLIERS + (MOVES ? 128 : 32);
constexpr int SUMS = ROWS + 4;  // floats from one token's sums to the next one's

// ---- inputs, once ---------------------------------------------------------------

// x[M, K] becomes [K / 64, tokens, 64] in the order of codes, 16 bytes at a time exchanged
// as the matrix unit expects. `tokens` is a multiple of TOKENS, K is filled up with zeros
// to whole stages. A thread takes 16 columns of one token.
KERNEL affine_order(const u16* x, i64 stride, u32* ordered, int m, int k, int tokens) {
  if constexpr (PDL) wait_for_kernel_before();
  if constexpr (PDL) let_next_kernel_start();
  x = now(x);
  const int place = blockIdx.x * blockDim.x + threadIdx.x;
  const int t = place & 3, token = (place >> 2) % tokens, block = (place >> 2) / tokens;
  const int filled = (k + COLUMNS - 1) / COLUMNS * BLOCKS;
  if (block >= filled) return;
  u32 own[8], out[8];
  const int first = 64 * block + 16 * t;
  const u16* from = x + token * stride + first;
  if (token < m && first + 16 <= k && ((u64)from & 15) == 0) {
    load_four<0, true>((const u32*)from, own);
    load_four<4, true>((const u32*)from, own + 4);
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const bool low = token < m && first + 2 * i < k, high = token < m && first + 2 * i + 1 < k;
      own[i] = (low ? (u32)from[2 * i] : 0) | (high ? (u32)from[2 * i + 1] << 16 : 0);
    }
  }
  Codes::order(own, out);
  u32* to = ordered + ((i64)block * tokens + token) * 32 + t;
#pragma unroll
  for (int i = 0; i < 8; ++i) to[(i ^ (token & 7)) * 4] = out[i];
}

// ---- the matrix unit ------------------------------------------------------------

DEVICE void init_barrier(u32 barrier, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}

DEVICE void arrive(u32 barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

DEVICE void expect_bytes(u32 barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;"
               ::"r"(barrier), "r"(bytes) : "memory");
}

DEVICE void wait_for(u32 barrier, int parity) {
  asm volatile(
      "{\n.reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n}" ::"r"(barrier), "r"(parity) : "memory");
}

DEVICE void copy_tile(u32 to, const void* from, int bytes, u32 barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
      ::"r"(to), "l"(from), "r"(bytes), "r"(barrier) : "memory");
}

DEVICE void matrix_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEVICE void matrix_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int LEFT>
DEVICE void matrix_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(LEFT) : "memory"); }

DEVICE void sync_multipliers() {
  asm volatile("bar.sync 1, %0;" ::"n"(MULTIPLIERS) : "memory");
}

// No more than the last warps give: a block's registers are those it began with.
DEVICE void take_registers() {
  if constexpr (MOVES) asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(MULTIPLIERS == 512 ? 112 : 240));
}

DEVICE void give_registers() {
  if constexpr (MOVES) asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");
}

// Rows of 128 bytes, eight rows after another, 16 bytes exchanged within.
DEVICE u64 describe(u32 address) {
  return (u64)(address >> 4 & 0x3fff) | 1ull << 16 | 64ull << 32 | 1ull << 62;
}

#if X == BFLOAT16
#define TYPES "f32.bf16.bf16"
#else
#define TYPES "f32.f16.f16"
#endif

#define S8(a, b, c, d, e, f, g, h) \
  "%" #a ",%" #b ",%" #c ",%" #d ",%" #e ",%" #f ",%" #g ",%" #h
#define L0 S8(0, 1, 2, 3, 4, 5, 6, 7)
#define L1 S8(8, 9, 10, 11, 12, 13, 14, 15)
#define L2 S8(16, 17, 18, 19, 20, 21, 22, 23)
#define L3 S8(24, 25, 26, 27, 28, 29, 30, 31)
#define L4 S8(32, 33, 34, 35, 36, 37, 38, 39)
#define L5 S8(40, 41, 42, 43, 44, 45, 46, 47)
#define L6 S8(48, 49, 50, 51, 52, 53, 54, 55)
#define L7 S8(56, 57, 58, 59, 60, 61, 62, 63)
#define L8 S8(64, 65, 66, 67, 68, 69, 70, 71)
#define L9 S8(72, 73, 74, 75, 76, 77, 78, 79)
#define L10 S8(80, 81, 82, 83, 84, 85, 86, 87)
#define L11 S8(88, 89, 90, 91, 92, 93, 94, 95)
#define L12 S8(96, 97, 98, 99, 100, 101, 102, 103)
#define L13 S8(104, 105, 106, 107, 108, 109, 110, 111)
#define L14 S8(112, 113, 114, 115, 116, 117, 118, 119)
#define L15 S8(120, 121, 122, 123, 124, 125, 126, 127)
#define R8(i)                                                                              \
  "+f"(c[i]), "+f"(c[i + 1]), "+f"(c[i + 2]), "+f"(c[i + 3]), "+f"(c[i + 4]), "+f"(c[i + 5]), \
      "+f"(c[i + 6]), "+f"(c[i + 7])
#define R32(i) R8(i), R8(i + 8), R8(i + 16), R8(i + 24)

#if TOKENS == 32
#define LISTED L0 "," L1
#define OUTPUTS R8(0), R8(8)
#define OPERANDS "{%16,%17,%18,%19}, %20"
#elif TOKENS == 64
#define LISTED L0 "," L1 "," L2 "," L3
#define OUTPUTS R32(0)
#define OPERANDS "{%32,%33,%34,%35}, %36"
#elif TOKENS == 128
#define LISTED L0 "," L1 "," L2 "," L3 "," L4 "," L5 "," L6 "," L7
#define OUTPUTS R32(0), R32(32)
#define OPERANDS "{%64,%65,%66,%67}, %68"
#elif TOKENS == 192
#define LISTED L0 "," L1 "," L2 "," L3 "," L4 "," L5 "," L6 "," L7 "," L8 "," L9 "," L10 "," L11
#define OUTPUTS R32(0), R32(32), R32(64)
#define OPERANDS "{%96,%97,%98,%99}, %100"
#elif TOKENS == 256
#define LISTED \
  L0 "," L1 "," L2 "," L3 "," L4 "," L5 "," L6 "," L7 "," L8 "," L9 "," L10 "," L11 "," L12 "," L13 "," L14 "," L15
#define OUTPUTS R32(0), R32(32), R32(64), R32(96)
#define OPERANDS "{%128,%129,%130,%131}, %132"
#else
#error "TOKENS is 32, 64, 128, 192 or 256"
#endif

#define TEXT(value) TEXT_OF(value)
#define TEXT_OF(value) #value

// c[64, TOKENS] += a[64, 16] b[TOKENS, 16]^T
DEVICE void multiply(float (&c)[TOKENS / 2], u32 a0, u32 a1, u32 a2, u32 a3, u64 b) {
  asm volatile("wgmma.mma_async.sync.aligned.m64n" TEXT(TOKENS) "k16." TYPES
               " {" LISTED "}, " OPERANDS ", 1, 1, 1, 0;"
               : OUTPUTS
               : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(b));
}

// ---- weights --------------------------------------------------------------------

constexpr int PIECES = ROW_BYTES / 16;               // of a row of words, in a stage
constexpr int COPIES = (16 * PIECES + 31) / 32;      // that a lane makes of them
constexpr bool TWO = BLOCKS == 2 && GROUP == 64 && S != FLOAT32;

// A warp's 16 rows, and how far it has read them. Rows that are not there are read as the
// last one that is; what becomes of them is not written.
struct Weights {
  const char* words[COPIES];
  const Scale *scales[2], *biases[2];  // of rows lane / 4 and that + 8
  int column;                          // of the next stage to be copied
  int k;
  bool even;                           // two scales may be read at once

  DEVICE void begin(
      const u32* packed, i64 packed_stride, const Scale* scale, const Scale* bias, i64 scale_stride,
      int first, int n, int columns, int stage, int lane) {
    k = columns, column = stage * COLUMNS;
#pragma unroll
    for (int i = 0; i < COPIES; ++i) {
      const int piece = least(lane + 32 * i, 16 * PIECES - 1);
      const i64 row = least(first + piece / PIECES, n - 1);
      words[i] = (const char*)(packed + row * packed_stride) + (i64)stage * ROW_BYTES + piece % PIECES * 16;
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const i64 at = least(first + (lane >> 2) + 8 * h, n - 1) * scale_stride;
      scales[h] = scale + at, biases[h] = bias + at;
    }
    even = ((scale_stride | (i64)((u64)scale >> 1) | (i64)((u64)bias >> 1)) & 1) == 0;
  }
};

// This warp's words of the next stage, as far as there are any.
DEVICE void bring_words(u32 to, Weights& w, int step, int lane) {
  const bool whole = w.column + COLUMNS <= w.k;
#pragma unroll
  for (int i = 0; i < COPIES; ++i) {
    const int piece = lane + 32 * i;
    if (16 * PIECES % 32 == 0 || piece < 16 * PIECES) {
      int valid = 16;
      if (!whole) {
        const int left = (w.k - w.column) * BITS / 8 - piece % PIECES * 16;
        valid = most(0, least(16, left));
      }
      copy_16(to + piece / PIECES * STRIDE + piece % PIECES * 16, valid ? w.words[i] : w.words[0], valid);
      w.words[i] += step * ROW_BYTES;
    }
  }
  w.column += step * COLUMNS;
}

// Of a lane's codes in a stage, as they were read: nothing is done with them before the
// stage has come, since that would be to wait for memory.
struct Scales {
  static constexpr int READS = TWO ? 1 : BLOCKS;
  u32 scale[READS][2], bias[READS][2];
  u32 there[READS];  // all bits, or none

  DEVICE u32 bits(const u32 (&of)[READS][2], int b, int h) const {
    if constexpr (TWO) return b ? of[0][h] >> 16 : of[0][h] & 0xffff;
    else return of[b][h] & there[b];
  }
};

DEVICE u32 read_scale(const Scale* from) {
#if S == FLOAT32
  u32 out;
  asm volatile("ld.global.nc.u32 %0, [%1];" : "=r"(out) : "l"(from));
#else
  u16 out;
  asm volatile("ld.global.nc.u16 %0, [%1];" : "=h"(out) : "l"(from));
#endif
  return out;
}

DEVICE u32 read_two(const Scale* from) {
  u32 out;
  asm volatile("ld.global.nc.u32 %0, [%1];" : "=r"(out) : "l"(from));
  return out;
}

DEVICE void bring_scales(Scales& to, const Weights& w, int stage, int lane) {
  const int first = stage * COLUMNS + (TWO ? 0 : 16 * (lane & 3));
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    if constexpr (TWO) {
      const Scale *scale = w.scales[h] + stage * 2, *bias = w.biases[h] + stage * 2;
      if (w.even && first + COLUMNS <= w.k) {
        to.scale[0][h] = read_two(scale), to.bias[0][h] = read_two(bias);
      } else {
        const bool second = first + 64 < w.k;  // what is past the end counts as 0
        to.scale[0][h] = read_scale(scale) | (second ? read_scale(scale + 1) << 16 : 0);
        to.bias[0][h] = read_scale(bias) | (second ? read_scale(bias + 1) << 16 : 0);
      }
    } else {
#pragma unroll
      for (int b = 0; b < BLOCKS; ++b) {
        const bool there = first + 64 * b < w.k;
        const int at = there ? (first + 64 * b) / GROUP : 0;
        to.there[b] = there ? ~0u : 0u;
        to.scale[b][h] = read_scale(w.scales[h] + at), to.bias[b][h] = read_scale(w.biases[h] + at);
      }
    }
  }
}

DEVICE float widened(u32 bits) {
  if constexpr (S == FLOAT32) return as_float(bits);
  else return low_of<S>(bits);
}

// Two weights of each register: code * scale + bias.
DEVICE void finish(u32* pairs, u32 scale, u32 bias) {
  if constexpr (S == X) {
    const u32 s = scale * 0x10001u, b = bias * 0x10001u;
    constexpr u32 ONE = X == BFLOAT16 ? 0x3f803f80u : 0x3c003c00u;
    constexpr u32 LESS = X == BFLOAT16 ? 0xc300c300u : 0xe400e400u;  // -128, -1024
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if constexpr (X == BFLOAT16) {
        const u32 code = Codes::PLAIN ? pairs[i] : fma_bfloats(pairs[i], ONE, LESS);
        pairs[i] = fma_bfloats(code, s, b);
      } else {
        pairs[i] = fma_halves(fma_halves(pairs[i], ONE, LESS), s, b);
      }
    }
  } else {
    const float s = widened(scale), b = widened(bias);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float low = fused(low_of<X>(pairs[i]) - Codes::OFFSET, s, b);
      const float high = fused(high_of<X>(pairs[i]) - Codes::OFFSET, s, b);
      pairs[i] = X == BFLOAT16 ? two_bfloats(low, high)
                               : (u32)float_to_half(low) | (u32)float_to_half(high) << 16;
    }
  }
}

// ---- the product ----------------------------------------------------------------

// In shared memory: tiles of inputs (at the end, sums), words, barriers.
struct Place {
  char* start;  // at a multiple of 1024
  u32 inputs, full, empty;

  DEVICE char* words() const { return start + INPUTS; }
  DEVICE float* sums() const { return (float*)start; }
};

DEVICE Place lay_out(char* memory) {
  char* start = memory + (-shared_address(memory) & 1023);
  const u32 inputs = shared_address(start), barriers = inputs + INPUTS + WORDS;
  return {start, inputs, barriers, barriers + 8 * STAGES};
}

// One thread: inputs of this block's stages, as places become free.
DEVICE void bring_inputs(const Place& at, const char* x, i64 tokens, int first, int stages, int step) {
  for (int i = 0; i < stages; ++i) {
    const int slot = i % STAGES;
    const u32 full = at.full + 8 * slot;
    if (i >= STAGES) wait_for(at.empty + 8 * slot, (i / STAGES - 1) & 1);
    expect_bytes(full, BLOCKS * TILE_BYTES);
#pragma unroll
    for (int b = 0; b < BLOCKS; ++b) {
      const i64 block = (i64)(first + i * step) * BLOCKS + b;
      copy_tile(at.inputs + (slot * BLOCKS + b) * TILE_BYTES, x + block * tokens * 128, TILE_BYTES, full);
    }
  }
}

// One warp's part in the stages of its turn.
DEVICE void multiply_stages(
    float (&c)[TOKENS / 2], const Place& at, Weights& w, int warp, int lane, int turn, int rank, int stages) {
  const char* words = at.words() + warp * DEPTH * SLOT;
  const u32 to = shared_address(words);
  const char* own_rows = words + (lane >> 2) * STRIDE;
  const u32 magic = opaque(Codes::MAGIC);
  const int t = lane & 3;
  constexpr int STEP = TURNS * SPLIT;
#pragma unroll
  for (int i = 0; i < DEPTH - 1; ++i) {
    if (turn + i * TURNS < stages) bring_words(to + i * SLOT, w, STEP, lane);
    commit_copies();
  }
  Scales now, next;
  if (turn < stages) bring_scales(now, w, rank + turn * SPLIT, lane);
  int slot = turn, parity = 0, before = -1, own = 0;
  for (int i = turn; i < stages; i += TURNS) {
    wait_copies<DEPTH - 2>();
    sync_warp();
    const int free = own == 0 ? DEPTH - 1 : own - 1;
    if (i + (DEPTH - 1) * TURNS < stages) bring_words(to + free * SLOT, w, STEP, lane);
    commit_copies();
    if (i + TURNS < stages) bring_scales(next, w, rank + (i + TURNS) * SPLIT, lane);
    wait_for(at.full + 8 * slot, parity);
#pragma unroll
    for (int b = 0; b < BLOCKS; ++b) {
      u32 a[2][8];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        u32 codes[Codes::WORDS];
        Codes::load((const u32*)(own_rows + own * SLOT + h * 8 * STRIDE + b * 8 * BITS), t, codes);
        Codes::take(codes, t, magic, a[h]);
        finish(a[h], now.bits(now.scale, b, h), now.bits(now.bias, b, h));
      }
      matrix_fence();
      const u64 tile = describe(at.inputs + (slot * BLOCKS + b) * TILE_BYTES);
#pragma unroll
      for (int q = 0; q < 4; ++q)
        multiply(c, a[0][2 * q], a[1][2 * q], a[0][2 * q + 1], a[1][2 * q + 1], tile + 2 * q);
      matrix_commit();
      // What was issued before is done: its registers may be written, its inputs replaced.
      matrix_wait<1>();
      if (b == 0 && before >= 0 && lane == 0) arrive(at.empty + 8 * before);
    }
    before = slot, slot += TURNS;
    if (slot >= STAGES) slot -= STAGES, parity ^= 1;
    own = own == DEPTH - 1 ? 0 : own + 1;
    now = next;
  }
  matrix_wait<0>();
}

// Sums of a warp's 16 rows, by token.
DEVICE void put_sums(float* sums, const float (&c)[TOKENS / 2], int warp, int lane) {
  sums += warp / (4 * WARPGROUPS) * (TOKENS * SUMS);
  const int row = 16 * (warp % (4 * WARPGROUPS)) + (lane >> 2);
#pragma unroll
  for (int j = 0; j < TOKENS / 8; ++j)
#pragma unroll
    for (int i = 0; i < 4; ++i)
      sums[(8 * j + 2 * (lane & 3) + (i & 1)) * SUMS + row + 8 * (i >> 1)] = c[4 * j + i];
}

// Of all turns and all blocks of the cluster.
DEVICE float sum_at(const float* sums, int index) {
  float sum = 0;
#pragma unroll
  for (int turn = 0; turn < TURNS; ++turn) {
    const float* own = sums + turn * (TOKENS * SUMS) + index;
    if constexpr (SPLIT == 1) {
      sum += *own;
    } else {
#pragma unroll
      for (int block = 0; block < SPLIT; ++block) sum += load_from_block(shared_address(own), block);
    }
  }
  return sum;
}

// Two rows of one token at a time; each block of a cluster has its share of tokens.
DEVICE void write_out(const float* sums, u16* y, const u16* bias, int first_row, int n, int tokens, int rank) {
  for (int i = threadIdx.x; i < TOKENS / SPLIT * (ROWS / 2); i += MULTIPLIERS) {
    const int token = i / (ROWS / 2) * SPLIT + rank, row = i % (ROWS / 2) * 2, out = first_row + row;
    if (token >= tokens || out >= n) continue;
    float low = sum_at(sums, token * SUMS + row), high = sum_at(sums, token * SUMS + row + 1);
    const bool both = out + 1 < n;
    if (bias) {
      low += widen<X>(bias[out]);
      if (both) high += widen<X>(bias[out + 1]);
    }
    u16* to = y + (i64)token * n + out;
    const u32 pair = (u32)narrow<X>(low) | (u32)narrow<X>(high) << 16;
    if (both && ((u64)to & 3) == 0) {
      *(u32*)to = pair;
    } else {
      to[0] = (u16)pair;
      if (both) to[1] = (u16)(pair >> 16);
    }
  }
}

// What a block's multiplying warps do, and its last ones.
DEVICE void run_multipliers(
    const Place& at, Weights& w, u16* y, const u16* bias, int first_row, int n, int tokens, int rank,
    int stages) {
  take_registers();
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
  float c[TOKENS / 2];
#pragma unroll
  for (int i = 0; i < TOKENS / 2; ++i) c[i] = 0;
  multiply_stages(c, at, w, warp, lane, warp / (4 * WARPGROUPS), rank, stages);
  if constexpr (PDL) let_next_kernel_start();
  sync_multipliers();  // inputs have been read, sums take their place
  put_sums(at.sums(), c, warp, lane);
  if constexpr (SPLIT > 1) sync_cluster();
  else sync_multipliers();
  write_out(at.sums(), y, bias, first_row, n, tokens, rank);
  if constexpr (SPLIT > 1) sync_cluster();  // others read what is here
}

DEVICE void run_bringers(const Place& at, const char* x, i64 tokens, int rank, int stages) {
  give_registers();
  if (threadIdx.x == MULTIPLIERS) bring_inputs(at, x, tokens, rank, stages, SPLIT);
  sync_warp();
  if constexpr (SPLIT > 1) sync_cluster(), sync_cluster();
}

// Into the second-level cache already, while another kernel may still be writing them.
DEVICE void prefetch_weights(const Weights& w, int lane) {
#pragma unroll
  for (int i = 0; i < COPIES; ++i) prefetch(w.words[i]);
  const int bytes = w.k / GROUP * (int)sizeof(Scale);
  for (int i = (lane & 3) * 128; i < bytes; i += 512)
#pragma unroll
    for (int h = 0; h < 2; ++h)
      prefetch((const char*)w.scales[h] + i), prefetch((const char*)w.biases[h] + i);
}

// x is what `affine_order` made, of x_stride tokens. The grid: tiles of rows, SPLIT, tiles of
// tokens.
KERNEL __launch_bounds__(THREADS, 1) affine_wgmma(
    const char* x, i64 x_stride, const u32* packed, i64 packed_stride, const Scale* scales,
    const Scale* biases, i64 scale_stride, const u16* bias, u16* y, int m, int n, int k, i64, i64,
    const void*, int) {
  DYNAMIC_SHARED(memory);
  const Place at = lay_out((char*)memory);
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
  const int first_row = blockIdx.x * ROWS, rank = blockIdx.y, first_token = blockIdx.z * TOKENS;
  if (threadIdx.x == 0) {
    for (int i = 0; i < STAGES; ++i) {
      init_barrier(at.full + 8 * i, 1);
      init_barrier(at.empty + 8 * i, 4 * WARPGROUPS);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  }
  const int all = (k + COLUMNS - 1) / COLUMNS, stages = (all - rank + SPLIT - 1) / SPLIT;
  const int turn = warp / (4 * WARPGROUPS);
  Weights w;
  if (turn < TURNS) {
    w.begin(packed, packed_stride, scales, biases, scale_stride,
            first_row + 16 * (warp % (4 * WARPGROUPS)), n, k, rank + turn * SPLIT, lane);
    prefetch_weights(w, lane);
  }
  sync_block();
  if constexpr (PDL) wait_for_kernel_before();
  if (turn < TURNS) {
    run_multipliers(at, w, y + (i64)first_token * n, bias, first_row, n, m - first_token, rank, stages);
  } else {
    run_bringers(at, x + (i64)first_token * 128, x_stride, rank, stages);
  }
}
