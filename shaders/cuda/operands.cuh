// Operands of tiles of a result: weights out of the codes of a lane, and which rows of x
// belong to a tile. Definitions are those of mma.cu.

#pragma once

#include "codes.cuh"

typedef Stored<X>::type Input;
typedef Stored<S>::type Scale;

constexpr int PAIR_WORDS = S == FLOAT32 ? 2 : 1;  // a scale and its bias

// ---- weights --------------------------------------------------------------------

DEVICE void scale_pair(const u32* at, float& scale, float& bias) {
  if constexpr (S == FLOAT32) {
    const float2 pair = *(const float2*)at;
    scale = pair.x, bias = pair.y;
  } else {
    scale = low_of<S>(*at), bias = high_of<S>(*at);
  }
}

// Codes of a lane become weights, rounded once.
template <typename Codes>
DEVICE void make_weights(const u32* scales, u32* pairs) {
  if constexpr (S == X) {
    const u32 scale = select_bytes(*scales, 0, 0x1010), bias = select_bytes(*scales, 0, 0x3232);
    if constexpr (X == FLOAT16) {
#pragma unroll
      for (int i = 0; i < 8; ++i)
        pairs[i] = fma_halves(fma_halves(pairs[i], 0x3c003c00u, 0xe400e400u), scale, bias);
    } else {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        if (!Codes::PLAIN) pairs[i] = fma_bfloats(pairs[i], 0x3f803f80u, 0xc300c300u);
        pairs[i] = fma_bfloats(pairs[i], scale, bias);
      }
    }
  } else {
    float scale, bias;
    scale_pair(scales, scale, bias);
    bias = fused(-Codes::OFFSET, scale, bias);
#pragma unroll
    for (int i = 0; i < 8; ++i)
      pairs[i] = two_values<X>(fused(low_of<X>(pairs[i]), scale, bias),
                               fused(high_of<X>(pairs[i]), scale, bias));
  }
}

// ---- experts --------------------------------------------------------------------

struct Rows {
  int expert;  // as many as there are experts: rows past the last end
  int first, count;
};

DEVICE int end_of(const i64* ends, int expert, int experts, int rows) {
  if (expert < 0) return 0;
  if (expert >= experts) return rows;
  const i64 end = ends[expert];
  return end < 0 ? 0 : end > rows ? rows : (int)end;
}

// The rows of tile `tile`, of at most TOKENS, if each expert begins one of its own. All lanes
// of a warp search.
template <int TOKENS>
DEVICE Rows find_rows(const i64* ends, int experts, int rows, int tile) {
  const int lane = threadIdx.x & 31;
  for (int base = 0; base <= experts; base += 32) {
    const int expert = base + lane;
    const int first = end_of(ends, expert - 1, experts, rows);
    const int end = end_of(ends, expert, experts, rows);
    const int own = most((end - first + TOKENS - 1) / TOKENS, 0);
    int upto = own;  // tiles of this expert and those before it
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const int before = (int)shuffle_from((u32)upto, lane - step);
      if (lane >= step) upto += before;
    }
    const bool found = tile < upto && tile >= upto - own;
    const int at = (int)warp_max(found ? lane + 1 : 0) - 1;
    if (at >= 0) {
      const int start = first + (tile - (upto - own)) * TOKENS;
      const Rows out = {base + at, (int)shuffle_from((u32)start, at),
                        (int)shuffle_from((u32)least(end - start, TOKENS), at)};
      return out;
    }
    tile -= (int)shuffle_from((u32)upto, 31);
  }
  return {experts, 0, 0};
}
