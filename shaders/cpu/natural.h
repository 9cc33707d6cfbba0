// Codes in the order of their columns: out of packed words, and into them.
#pragma once

#include "codes.h"

constexpr int HERE = 16 / L;              // vectors of 16 codes
constexpr int BYTES_16 = 2 * BITS;        // of 16 codes
constexpr int LEVELS = (1 << BITS) - 1;

// Where the codes of a vector begin: bytes for a shuffle, and bits within them.
struct Places {
  alignas(64) uint8_t bytes[4 * L];
  alignas(64) int32_t bits[L];
  constexpr Places() : bytes(), bits() {
    for (int j = 0; j < L; j++) {
      for (int b = 0; b < 4; b++) bytes[4 * j + b] = b < 2 ? j * BITS / 8 + b : 0x80;
      bits[j] = j * BITS % 8;
    }
  }
};
static constexpr Places places;

// 16 codes from BYTES_16 bytes, and no byte more.
INLINE void codes_16(const uint8_t* p, V (&v)[HERE]) {
#if defined(VECTORS_AVX512)
  if constexpr (BITS == 8) {
    v[0] = load_8(p);
  } else {
    const __m128i some = _mm_maskz_loadu_epi8((1 << BYTES_16) - 1, p);
#if defined(__AVX512VBMI__)
    const V spread = _mm512_permutexvar_epi8(load(places.bytes), _mm512_castsi128_si512(some));
#else
    const V spread = _mm512_shuffle_epi8(_mm512_broadcast_i32x4(some), load(places.bytes));
#endif
    v[0] = both(right_by(spread, load(places.bits)), set(LEVELS));
  }
#elif defined(VECTORS_AVX2)
  for (int h = 0; h < HERE; h++, p += BITS) {
    uint64_t some = 0;
    memcpy(&some, p, BITS);
    const V spread = _mm256_shuffle_epi8(_mm256_set1_epi64x((long long)some), load(places.bytes));
    v[h] = both(right_by(spread, load(places.bits)), set(LEVELS));
  }
#else
  struct All {  // as Places, of 16 codes, whose second half begins at byte 8
    uint8_t bytes[64];
    int32_t bits[16];
    constexpr All() : bytes(), bits() {
      for (int i = 0; i < 16; i++) {
        for (int b = 0; b < 4; b++)
          bytes[4 * i + b] = b < 2 ? i / 8 * 8 + i % 8 * BITS / 8 + b : 0x80;
        bits[i] = i % 8 * BITS % 8;
      }
    }
  };
  static constexpr All all;
  uint64_t low = 0, high = 0;
  memcpy(&low, p, BITS);
  memcpy(&high, p + BITS, BITS);
  const uint8x16_t some = vcombine_u8(vcreate_u8(low), vcreate_u8(high));
#pragma GCC unroll 4
  for (int h = 0; h < HERE; h++) {
    const uint8x16_t spread = vqtbl1q_u8(some, vld1q_u8(all.bytes + 16 * h));
    v[h] = both(right_by(vreinterpretq_s32_u8(spread), load(all.bits + L * h)), set(LEVELS));
  }
#endif
}

// Codes, one a byte, into `count` * BITS / 8 bytes: `count` is a multiple of 16, and up to
// 48 more codes may be read.
static void fold(uint8_t* out, const uint8_t* codes, i64 count) {
  // Neighbours join until 8 of them stand at the low end of 64 bits.
#if BITS == 8
  memcpy(out, codes, count);
#elif defined(VECTORS_AVX512)
  alignas(64) static constexpr struct Dense {
    uint8_t at[64];
    constexpr Dense() : at() {
      for (int i = 0; i < 64; i++) {
#if defined(__AVX512VBMI__)
        at[i] = i < 8 * BITS ? i / BITS * 8 + i % BITS : 0;
#else
        at[i] = i % 16 < BYTES_16 ? i % 16 / BITS * 8 + i % 16 % BITS : 0x80;
#endif
      }
    }
  } dense;
  for (; count > 0; count -= 64, codes += 64, out += 4 * BYTES_16) {
    V v = _mm512_maddubs_epi16(load(codes), _mm512_set1_epi16(1 | 1 << (BITS + 8)));
    v = _mm512_madd_epi16(v, set(1 | 1 << (2 * BITS + 16)));
    const V low = _mm512_set1_epi64((1ll << 4 * BITS) - 1);
    v = _mm512_ternarylogic_epi64(low, v, _mm512_srli_epi64(v, 32 - 4 * BITS), 0xCA);
#if defined(__AVX512VBMI__)
    const i64 bytes = count < 64 ? count / 16 * BYTES_16 : 4 * BYTES_16;
    _mm512_mask_storeu_epi8(out, ~0ull >> (64 - bytes), _mm512_permutexvar_epi8(load(dense.at), v));
#else
    v = _mm512_shuffle_epi8(v, load(dense.at));
    const __mmask16 some = (1 << BYTES_16) - 1;
    _mm_mask_storeu_epi8(out, some, _mm512_castsi512_si128(v));
    if (count > 16) _mm_mask_storeu_epi8(out + BYTES_16, some, _mm512_extracti32x4_epi32(v, 1));
    if (count > 32) _mm_mask_storeu_epi8(out + 2 * BYTES_16, some, _mm512_extracti32x4_epi32(v, 2));
    if (count > 48) _mm_mask_storeu_epi8(out + 3 * BYTES_16, some, _mm512_extracti32x4_epi32(v, 3));
#endif
  }
#else
  constexpr auto lanes = [](int lane, int width) constexpr {
    uint64_t mask = 0;
    for (int at = 0; at < 64; at += lane) mask |= ((1ull << width) - 1) << at;
    return mask;
  };
  for (; count > 0; count -= 8, codes += 8, out += BITS) {
    uint64_t v;
    memcpy(&v, codes, 8);
    v = (v & lanes(16, BITS)) | (v >> (8 - BITS) & lanes(16, BITS) << BITS);
    v = (v & lanes(32, 2 * BITS)) | (v >> (16 - 2 * BITS) & lanes(32, 2 * BITS) << 2 * BITS);
    v = (v & lanes(64, 4 * BITS)) | (v >> (32 - 4 * BITS) & lanes(64, 4 * BITS) << 4 * BITS);
    memcpy(out, &v, BITS);
  }
#endif
}

#if !defined(HAS_F64)
INLINE void fma_f64(double* p, V v, double scale, double bias) {
  int32_t codes[L];
  store(codes, v);
  for (int i = 0; i < L; i++) p[i] = codes[i] * scale + bias;
}

template <bool odd> INLINE F fma_f64(V v, double scale, double bias) {
  double values[L];
  float out[L];
  fma_f64(values, v, scale, bias);
  for (int i = 0; i < L; i++) {
    if constexpr (odd) {
      const uint64_t cut = (1ull << 40) - 1;
      uint64_t word;
      memcpy(&word, &values[i], 8);
      word = (word & ~cut) | (((word & cut) + cut) & (cut + 1));
      memcpy(&values[i], &word, 8);
    }
    out[i] = (float)values[i];
  }
  return load_f(out);
}
#endif
