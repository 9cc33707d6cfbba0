// How codes come out of packed words, for one width and one group size.
//
// A "lane" of 32 bits holds U codes, half of them in each of its 16-bit halves; S steps
// of a shift and a mask bring out two codes at a time, one a half. A "chunk" is what one
// vector holds. Which two codes appear at which step is `pair_of`; the inputs are packed
// in that order, so that a product needs nothing but shifts and masks.
//
// Definitions before this text: BITS, GROUP, and X, the kind of the inputs:
//   0  bfloat16, multiplied by the machine's own bfloat16 dot products
//   1  one plane of 16-bit integers (float16, bfloat16 elsewhere, 8-bit codes)
//   2  two planes of 15 bits and a sign (float32)
#pragma once

#include "simd.h"

constexpr int U = BITS <= 2 ? 16 : BITS <= 4 ? 8 : 4;
constexpr int S = U / 2;
constexpr int CHUNK = L * U;                      // codes
constexpr int CHUNK_BYTES = CHUNK * BITS / 8;
constexpr int LANES = GROUP / U;                  // of a group
constexpr int PLANES = X == 2 ? 2 : 1;

// Columns, within 16 neighbours, of the two codes at pair `p` of 8.
struct Pair { int low, high; };
constexpr Pair pair_of(int p) {
  const int u = p / S, i = p % S;
  switch (BITS) {
    case 3: return {4 * u + i, 8 + 4 * u + i};
    case 4: return {8 * u + i, 8 * u + 4 + i};
    case 5: return {2 * u + i, 8 + 2 * u + i};
    case 6: return {8 * (u / 2) + 2 * (u % 2) + i, 8 * (u / 2) + 4 + 2 * (u % 2) + i};
    case 8: return {4 * u + i, 4 * u + 2 + i};
    default: return {i, 8 + i};
  }
}

// Bits below the first code in the halves of lane `j`.
constexpr int offset_of(int j) {
  return BITS == 3 || BITS == 6 ? 4 * (j % 2) : BITS == 5 ? 2 * (j % 4) : 0;
}

// The first byte of half `h` of lane `j`, where codes must be spread.
constexpr int byte_of(int j, int h) {
  return BITS == 5 ? 10 * (j / 4) + 5 * h + j % 4 : 6 * (j / 2) + 3 * h + j % 2;
}

constexpr uint32_t MASK = ((1u << BITS) - 1) * 0x10001u;
// bfloat16 has 8 bits, so that 128 | code is the number 128 + code. Sums begin such that the
// 128 is gone and codes count from the middle of their range: there, the groups' biases are
// small, and little is lost when the two parts of a weight cancel out.
constexpr int MIDDLE = BITS == 1 ? 0 : 1 << (BITS - 1);
constexpr int SHIFT = (X == 0 ? 128 : 0) + MIDDLE;
constexpr uint32_t HIGH = X == 0 ? 0x43004300u : 0;

#if X == 0
typedef F Sum;
INLINE Sum dot(Sum sum, V w, V x) { return dot_b(sum, w, x); }
INLINE F value_of(Sum sum) { return sum; }
INLINE Sum begin(V bits) { return as_f(bits); }
#else
typedef I Sum;
INLINE Sum dot(Sum sum, V w, V x) { return dot_i(sum, w, x); }
INLINE F value_of(Sum sum) { return to_f(value_i(sum)); }
INLINE Sum begin(V bits) { return I(bits); }
#endif

struct Masks {
  V mask = set(MASK), high = set(HIGH);
  V take(V w) const { return X == 0 ? masked(w, mask, high) : both(w, mask); }
};

// Where the bytes of each half of a lane are, for a shuffle within 16 bytes (`pieces`: each
// 16 begin with their first byte) or of a whole chunk.
struct Bytes {
  alignas(64) uint8_t at[4 * L];
  constexpr Bytes(bool pieces, int second = 0) : at() {
    for (int j = 0; j < L; j++)
      for (int h = 0; h < 2; h++)
        for (int b = 0; b < 2; b++) {
          const int first = pieces ? byte_of(j % 4, h) + (j < 4 ? 0 : second) : byte_of(j, h);
          at[4 * j + 2 * h + b] = (uint8_t)(first + b);
        }
  }
};

// CHUNK_BYTES at p (and none behind them: a page may end there), each half of a lane
// beginning with a byte that holds its first code.
#if defined(VECTORS_AVX512)
INLINE V spread(const uint8_t* p) {
  if constexpr (BITS == 1) return _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i*)p));
  if constexpr (BITS == 2 || BITS == 4 || BITS == 8) return load(p);
  static constexpr uint64_t used = CHUNK_BYTES == 64 ? ~0ull : (1ull << (CHUNK_BYTES % 64)) - 1;
  V v = _mm512_maskz_loadu_epi8(used, p);
#if defined(__AVX512VBMI__)
  static constexpr Bytes bytes(false);
  return _mm512_permutexvar_epi8(load(bytes.at), v);
#else
  // First each quarter to its 128 bits, then bytes within them.
  static constexpr Bytes bytes(true);
  constexpr int w = CHUNK_BYTES / 8;  // 16-bit words of a quarter
  const V words = _mm512_set_epi16(
      3 * w + 7, 3 * w + 6, 3 * w + 5, 3 * w + 4, 3 * w + 3, 3 * w + 2, 3 * w + 1, 3 * w,
      2 * w + 7, 2 * w + 6, 2 * w + 5, 2 * w + 4, 2 * w + 3, 2 * w + 2, 2 * w + 1, 2 * w,
      w + 7, w + 6, w + 5, w + 4, w + 3, w + 2, w + 1, w, 7, 6, 5, 4, 3, 2, 1, 0);
  return _mm512_shuffle_epi8(_mm512_permutexvar_epi16(words, v), load(bytes.at));
#endif
}
#elif defined(VECTORS_AVX2)
INLINE V spread(const uint8_t* p) {
  if constexpr (BITS == 1) return _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i*)p));
  if constexpr (BITS == 2 || BITS == 4 || BITS == 8) return load(p);
  // The second half of the bytes lies at the end of the last 16.
  constexpr int last = CHUNK_BYTES - 16;
  static constexpr Bytes bytes(true, CHUNK_BYTES / 2 - last);
  const __m128i first = _mm_loadu_si128((const __m128i*)p);
  const __m128i second = _mm_loadu_si128((const __m128i*)(p + last));
  return _mm256_shuffle_epi8(_mm256_set_m128i(second, first), load(bytes.at));
}
#elif defined(VECTORS_NEON)
INLINE V spread(const uint8_t* p) {
  if constexpr (BITS == 1) return vreinterpretq_s32_u16(vmovl_u8(vld1_u8(p)));
  if constexpr (BITS == 2 || BITS == 4 || BITS == 8) return load(p);
  static constexpr Bytes bytes(false);
  uint32_t rest = 0;
  memcpy(&rest, p + 8, CHUNK_BYTES - 8);
  const uint8x16_t v = vcombine_u8(vld1_u8(p), vcreate_u8(rest));
  return vreinterpretq_s32_u8(vqtbl1q_u8(v, vld1q_u8(bytes.at)));
}
#endif

struct Lanes {
  alignas(64) int32_t at[L];
};

constexpr Lanes offsets(int more) {
  Lanes lanes{};
  for (int j = 0; j < L; j++) lanes.at[j] = offset_of(j) + more;
  return lanes;
}

// Lane j moved right by its offset and N: what `right<offset_of(j) + N>` is for turned words.
template <int N> INLINE V right_in_lanes(V v) {
  if constexpr (BITS != 3 && BITS != 5 && BITS != 6) return right<N>(v);
  static constexpr Lanes by = offsets(N);
  return right_by(v, load(by.at));
}

constexpr Lanes groups_of_lanes() {
  Lanes lanes{};
  for (int j = 0; j < L; j++) lanes.at[j] = LANES < L ? j / LANES : 0;
  return lanes;
}

// Of the values of L groups, in each lane that of its group, for chunk c of their LANES.
INLINE F spread_scale(F values, int c) {
  if constexpr (LANES == 1) return values;
  static constexpr Lanes own = groups_of_lanes();
  constexpr int chunks = LANES > L ? LANES / L : 1, groups = LANES < L ? L / LANES : 1;
  return choose(values, plus(load(own.at), set(c / chunks * groups)));
}

// The same where fewer bytes are left: the rest counts as zeros.
INLINE V spread_some(const uint8_t* p, i64 bytes) {
  uint8_t copy[64] = {};
  if (bytes > 0) memcpy(copy, p, bytes < CHUNK_BYTES ? bytes : CHUNK_BYTES);
  return spread(copy);
}
