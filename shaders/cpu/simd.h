// One vector of 32-bit lanes on each instruction set, and what the kernels do with it.
//
// L lanes; V holds integers, F floats. A lane also counts as two 16-bit halves: `dot` adds
// both products of halves to the lane. ROWS x COLUMNS is the block of results that a
// product keeps in registers: rows of x, vectors of outputs.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

typedef int64_t i64;

#define INLINE static inline __attribute__((always_inline))

// In a register from here on: compilers else read it from memory for each use.
#if defined(__AVX512F__)
template <class T> INLINE void keep(T& v) { asm("" : "+v"(v)); }
#else
template <class T> INLINE void keep(T&) {}
#endif

// To the second-level cache. May point anywhere.
INLINE void fetch(const void* p) { __builtin_prefetch(p, 0, 2); }

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#define VECTORS_AVX512 1

constexpr int L = 16;
constexpr int COLUMNS = 2;
typedef __m512i V;
typedef __m512 F;
typedef V I;  // sums of products of halves, to which `dot_i` adds; `value_i` is one a lane

INLINE V load(const void* p) { return _mm512_loadu_si512(p); }
INLINE void store(void* p, V v) { _mm512_storeu_si512(p, v); }
INLINE F load_f(const float* p) { return _mm512_loadu_ps(p); }
INLINE void store_f(float* p, F v) { _mm512_storeu_ps(p, v); }
INLINE V set(int32_t v) { return _mm512_set1_epi32(v); }
INLINE F set_f(float v) { return _mm512_set1_ps(v); }
INLINE V zero() { return _mm512_setzero_si512(); }
INLINE F zero_f() { return _mm512_setzero_ps(); }
INLINE F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
INLINE F mul(F a, F b) { return _mm512_mul_ps(a, b); }
INLINE F add(F a, F b) { return _mm512_add_ps(a, b); }
INLINE F sub(F a, F b) { return _mm512_sub_ps(a, b); }
INLINE F to_f(V v) { return _mm512_cvtepi32_ps(v); }
INLINE F as_f(V v) { return _mm512_castsi512_ps(v); }
INLINE V as_v(F v) { return _mm512_castps_si512(v); }
template <int S> INLINE V right(V v) { return _mm512_srli_epi32(v, S); }
template <int S> INLINE V left(V v) { return _mm512_slli_epi32(v, S); }
INLINE V both(V a, V b) { return _mm512_and_si512(a, b); }
// (v & mask) | high
INLINE V masked(V v, V mask, V high) { return _mm512_ternarylogic_epi32(v, mask, high, 0xEA); }
// 16-bit floats in the low half of each lane.
INLINE F from_half(V v) { return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(v)); }
INLINE F load_half(const uint16_t* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
INLINE void store_half(uint16_t* p, F v) {
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}
INLINE V load_16(const uint16_t* p) { return _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)); }
INLINE V load_8(const uint8_t* p) { return _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p)); }
INLINE void store_16(uint16_t* p, V v) { _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16(v)); }
INLINE V plus(V a, V b) { return _mm512_add_epi32(a, b); }
INLINE F div(F a, F b) { return _mm512_div_ps(a, b); }
INLINE F min_f(F a, F b) { return _mm512_min_ps(a, b); }
INLINE F max_f(F a, F b) { return _mm512_max_ps(a, b); }
INLINE F nearest(F v) { return _mm512_roundscale_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
// `then` where a > b, else `other`.
INLINE F choose_greater(F a, F b, F then, F other) {
  return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_GT_OQ), other, then);
}
INLINE void store_8(uint8_t* p, V v) { _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8(v)); }
// Past the caches, to aligned memory; `streamed` ends a run of these.
INLINE void stream(void* p, V v) { _mm512_stream_si512((__m512i*)p, v); }
INLINE void streamed() { _mm_sfence(); }

#define HAS_F64 1
// v * scale + bias in float64.
INLINE void fma_f64(double* p, V v, double scale, double bias) {
  const __m512d s = _mm512_set1_pd(scale), b = _mm512_set1_pd(bias);
  _mm512_storeu_pd(p, _mm512_fmadd_pd(_mm512_cvtepi32_pd(_mm512_castsi512_si256(v)), s, b));
  _mm512_storeu_pd(p + 8, _mm512_fmadd_pd(_mm512_cvtepi32_pd(_mm512_extracti64x4_epi64(v, 1)), s, b));
}
// The same, rounded to float32; with `odd`, cut to 13 bits, the last one set where any was.
template <bool odd> INLINE F fma_f64(V v, double scale, double bias) {
  const __m512d s = _mm512_set1_pd(scale), b = _mm512_set1_pd(bias);
  __m512d half[2] = {_mm512_cvtepi32_pd(_mm512_castsi512_si256(v)),
                     _mm512_cvtepi32_pd(_mm512_extracti64x4_epi64(v, 1))};
  __m256 out[2];
#pragma GCC unroll 2
  for (int i = 0; i < 2; i++) {
    half[i] = _mm512_fmadd_pd(half[i], s, b);
    if constexpr (odd) {
      const V words = _mm512_castpd_si512(half[i]), cut = _mm512_set1_epi64((1ll << 40) - 1);
      const V sticky = _mm512_add_epi64(_mm512_and_si512(words, cut), cut);
      const V last = _mm512_and_si512(sticky, _mm512_set1_epi64(1ll << 40));
      half[i] = _mm512_castsi512_pd(_mm512_or_si512(_mm512_andnot_si512(cut, words), last));
    }
    out[i] = _mm512_cvtpd_ps(half[i]);
  }
  const __m512d low = _mm512_castps_pd(_mm512_castps256_ps512(out[0]));
  return _mm512_castpd_ps(_mm512_insertf64x4(low, _mm256_castps_pd(out[1]), 1));
}

// `then` where v is NaN, else `other`.
INLINE V choose_nan(F v, V then, V other) {
  return _mm512_mask_blend_epi32(_mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), other, then);
}
INLINE V most(V a, V b) { return _mm512_max_epi32(a, b); }
INLINE V to_nearest(F v) { return _mm512_cvtps_epi32(v); }  // ties to even
template <int S> INLINE V right_signed(V v) { return _mm512_srai_epi32(v, S); }
INLINE V right_by(V v, V by) { return _mm512_srlv_epi32(v, by); }
// Lane j of the result is lane at[j] of v.
INLINE F choose(F v, V at) { return _mm512_permutexvar_ps(at, v); }

INLINE I dot_i(I sum, V w, V x) {
#if defined(__AVX512VNNI__)
  return _mm512_dpwssd_epi32(sum, w, x);
#else
  return _mm512_add_epi32(sum, _mm512_madd_epi16(w, x));
#endif
}
INLINE V value_i(I sum) { return sum; }
#if defined(__AVX512BF16__)
#define HAS_BF16 1
INLINE F dot_b(F sum, V w, V x) { return _mm512_dpbf16_ps(sum, (__m512bh)w, (__m512bh)x); }
#endif

// r[i] lane j becomes r[j] lane i.
INLINE void transpose(V (&r)[L]) {
  V t[16];
#pragma GCC unroll 8
  for (int i = 0; i < 8; i++) {
    t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
    r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0x88);
    t[4 + i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0xDD);
    t[8 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0x88);
    t[12 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0xDD);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0x88);
    r[4 + i] = _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0x88);
    r[8 + i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0xDD);
    r[12 + i] = _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0xDD);
  }
}

#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define VECTORS_AVX2 1

constexpr int L = 8;
constexpr int COLUMNS = 2;
typedef __m256i V;
typedef __m256 F;
typedef V I;

INLINE V load(const void* p) { return _mm256_loadu_si256((const __m256i*)p); }
INLINE void store(void* p, V v) { _mm256_storeu_si256((__m256i*)p, v); }
INLINE F load_f(const float* p) { return _mm256_loadu_ps(p); }
INLINE void store_f(float* p, F v) { _mm256_storeu_ps(p, v); }
INLINE V set(int32_t v) { return _mm256_set1_epi32(v); }
INLINE F set_f(float v) { return _mm256_set1_ps(v); }
INLINE V zero() { return _mm256_setzero_si256(); }
INLINE F zero_f() { return _mm256_setzero_ps(); }
INLINE F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
INLINE F mul(F a, F b) { return _mm256_mul_ps(a, b); }
INLINE F add(F a, F b) { return _mm256_add_ps(a, b); }
INLINE F sub(F a, F b) { return _mm256_sub_ps(a, b); }
INLINE F to_f(V v) { return _mm256_cvtepi32_ps(v); }
INLINE F as_f(V v) { return _mm256_castsi256_ps(v); }
INLINE V as_v(F v) { return _mm256_castps_si256(v); }
template <int S> INLINE V right(V v) { return _mm256_srli_epi32(v, S); }
template <int S> INLINE V left(V v) { return _mm256_slli_epi32(v, S); }
INLINE V both(V a, V b) { return _mm256_and_si256(a, b); }
INLINE V plus(V a, V b) { return _mm256_add_epi32(a, b); }
INLINE V most(V a, V b) { return _mm256_max_epi32(a, b); }
INLINE V to_nearest(F v) { return _mm256_cvtps_epi32(v); }
template <int S> INLINE V right_signed(V v) { return _mm256_srai_epi32(v, S); }
INLINE F div(F a, F b) { return _mm256_div_ps(a, b); }
INLINE F min_f(F a, F b) { return _mm256_min_ps(a, b); }
INLINE F max_f(F a, F b) { return _mm256_max_ps(a, b); }
INLINE F nearest(F v) { return _mm256_round_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
INLINE F choose_greater(F a, F b, F then, F other) {
  return _mm256_blendv_ps(other, then, _mm256_cmp_ps(a, b, _CMP_GT_OQ));
}
INLINE V masked(V v, V mask, V high) { return _mm256_or_si256(both(v, mask), high); }
INLINE __m128i low_halves(V v) {
  v = both(v, set(0xffff));
  return _mm_packus_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
}
INLINE F from_half(V v) { return _mm256_cvtph_ps(low_halves(v)); }
INLINE F load_half(const uint16_t* p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
INLINE void store_half(uint16_t* p, F v) {
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}
INLINE V load_16(const uint16_t* p) { return _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)); }
INLINE V load_8(const uint8_t* p) { return _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p)); }
INLINE void store_16(uint16_t* p, V v) { _mm_storeu_si128((__m128i*)p, low_halves(v)); }
INLINE void store_8(uint8_t* p, V v) {
  const __m128i halves = low_halves(both(v, set(0xff)));
  _mm_storel_epi64((__m128i*)p, _mm_packus_epi16(halves, halves));
}
INLINE void stream(void* p, V v) { _mm256_stream_si256((__m256i*)p, v); }
INLINE void streamed() { _mm_sfence(); }

#define HAS_F64 1
INLINE __m256d half_f64(V v, int i, double scale, double bias) {
  const __m128i half = i ? _mm256_extracti128_si256(v, 1) : _mm256_castsi256_si128(v);
  return _mm256_fmadd_pd(_mm256_cvtepi32_pd(half), _mm256_set1_pd(scale), _mm256_set1_pd(bias));
}
INLINE void fma_f64(double* p, V v, double scale, double bias) {
  _mm256_storeu_pd(p, half_f64(v, 0, scale, bias));
  _mm256_storeu_pd(p + 4, half_f64(v, 1, scale, bias));
}
template <bool odd> INLINE F fma_f64(V v, double scale, double bias) {
  __m128 out[2];
#pragma GCC unroll 2
  for (int i = 0; i < 2; i++) {
    __m256d half = half_f64(v, i, scale, bias);
    if constexpr (odd) {
      const V words = _mm256_castpd_si256(half), cut = _mm256_set1_epi64x((1ll << 40) - 1);
      const V sticky = _mm256_add_epi64(both(words, cut), cut);
      const V last = both(sticky, _mm256_set1_epi64x(1ll << 40));
      half = _mm256_castsi256_pd(_mm256_or_si256(_mm256_andnot_si256(cut, words), last));
    }
    out[i] = _mm256_cvtpd_ps(half);
  }
  return _mm256_set_m128(out[1], out[0]);
}

INLINE V choose_nan(F v, V then, V other) {
  return _mm256_blendv_epi8(other, then, as_v(_mm256_cmp_ps(v, v, _CMP_UNORD_Q)));
}
INLINE V right_by(V v, V by) { return _mm256_srlv_epi32(v, by); }
INLINE F choose(F v, V at) { return _mm256_permutevar8x32_ps(v, at); }

INLINE I dot_i(I sum, V w, V x) {
  sum = _mm256_add_epi32(sum, _mm256_madd_epi16(w, x));
  // Else compilers add products in pairs first, for which there are too few registers.
  asm("" : "+x"(sum));
  return sum;
}
INLINE V value_i(I sum) { return sum; }

INLINE void transpose(V (&r)[L]) {
  V t[8];
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    t[2 * i] = _mm256_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm256_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 2; i++) {
    r[4 * i] = _mm256_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 1] = _mm256_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 2] = _mm256_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
    r[4 * i + 3] = _mm256_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    const V first = r[i], second = r[4 + i];
    r[i] = _mm256_permute2x128_si256(first, second, 0x20);
    r[4 + i] = _mm256_permute2x128_si256(first, second, 0x31);
  }
}

#elif defined(__aarch64__)
#define VECTORS_NEON 1

constexpr int L = 4;
constexpr int COLUMNS = 2;
typedef int32x4_t V;
typedef float32x4_t F;
// Products of halves come in two vectors: those of lanes 0 and 1, and of 2 and 3.
struct I {
  int32x4_t first, second;
  I() = default;
  I(V v) : first(vzip1q_s32(v, vdupq_n_s32(0))), second(vzip2q_s32(v, vdupq_n_s32(0))) {}
};

INLINE V load(const void* p) { return vreinterpretq_s32_u8(vld1q_u8((const uint8_t*)p)); }
INLINE void store(void* p, V v) { vst1q_u8((uint8_t*)p, vreinterpretq_u8_s32(v)); }
INLINE F load_f(const float* p) { return vld1q_f32(p); }
INLINE void store_f(float* p, F v) { vst1q_f32(p, v); }
INLINE V set(int32_t v) { return vdupq_n_s32(v); }
INLINE F set_f(float v) { return vdupq_n_f32(v); }
INLINE V zero() { return vdupq_n_s32(0); }
INLINE F zero_f() { return vdupq_n_f32(0); }
INLINE F fma(F a, F b, F c) { return vfmaq_f32(c, a, b); }
INLINE F mul(F a, F b) { return vmulq_f32(a, b); }
INLINE F add(F a, F b) { return vaddq_f32(a, b); }
INLINE F sub(F a, F b) { return vsubq_f32(a, b); }
INLINE F to_f(V v) { return vcvtq_f32_s32(v); }
INLINE F as_f(V v) { return vreinterpretq_f32_s32(v); }
INLINE V as_v(F v) { return vreinterpretq_s32_f32(v); }
INLINE uint32x4_t bits_of(V v) { return vreinterpretq_u32_s32(v); }
INLINE V from_bits(uint32x4_t v) { return vreinterpretq_s32_u32(v); }
template <int S> INLINE V right(V v) {
  if constexpr (S == 0) return v;
  else return from_bits(vshrq_n_u32(bits_of(v), S));
}
template <int S> INLINE V left(V v) { return vshlq_n_s32(v, S); }
INLINE V both(V a, V b) { return vandq_s32(a, b); }
INLINE V plus(V a, V b) { return vaddq_s32(a, b); }
INLINE V most(V a, V b) { return vmaxq_s32(a, b); }
INLINE V to_nearest(F v) { return vcvtnq_s32_f32(v); }
template <int S> INLINE V right_signed(V v) { return vshrq_n_s32(v, S); }
INLINE F div(F a, F b) { return vdivq_f32(a, b); }
INLINE F min_f(F a, F b) { return vminq_f32(a, b); }
INLINE F max_f(F a, F b) { return vmaxq_f32(a, b); }
INLINE F nearest(F v) { return vrndnq_f32(v); }
INLINE F choose_greater(F a, F b, F then, F other) { return vbslq_f32(vcgtq_f32(a, b), then, other); }
INLINE V masked(V v, V mask, V high) { return vorrq_s32(vandq_s32(v, mask), high); }
INLINE uint16x4_t low_halves(V v) { return vmovn_u32(bits_of(v)); }
INLINE F from_half(V v) { return vcvt_f32_f16(vreinterpret_f16_u16(low_halves(v))); }
INLINE F load_half(const uint16_t* p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))); }
INLINE void store_half(uint16_t* p, F v) { vst1_u16(p, vreinterpret_u16_f16(vcvt_f16_f32(v))); }
INLINE V load_16(const uint16_t* p) { return from_bits(vmovl_u16(vld1_u16(p))); }
INLINE V load_8(const uint8_t* p) {
  uint32_t bytes;
  memcpy(&bytes, p, 4);
  const uint16x8_t halves = vmovl_u8(vcreate_u8(bytes));
  return from_bits(vmovl_u16(vget_low_u16(halves)));
}
INLINE void store_16(uint16_t* p, V v) { vst1_u16(p, low_halves(v)); }
INLINE void store_8(uint8_t* p, V v) {
  const uint8x8_t bytes = vmovn_u16(vcombine_u16(low_halves(v), low_halves(v)));
  const uint32_t four = vget_lane_u32(vreinterpret_u32_u8(bytes), 0);
  memcpy(p, &four, 4);
}
// There is no way past the caches that intrinsics name.
INLINE void stream(void* p, V v) { store(p, v); }
INLINE void streamed() {}

#define HAS_F64 1
INLINE float64x2_t half_f64(V v, int i, double scale, double bias) {
  const int64x2_t half = vmovl_s32(i ? vget_high_s32(v) : vget_low_s32(v));
  return vfmaq_f64(vdupq_n_f64(bias), vcvtq_f64_s64(half), vdupq_n_f64(scale));
}
INLINE void fma_f64(double* p, V v, double scale, double bias) {
  vst1q_f64(p, half_f64(v, 0, scale, bias));
  vst1q_f64(p + 2, half_f64(v, 1, scale, bias));
}
template <bool odd> INLINE F fma_f64(V v, double scale, double bias) {
  float32x2_t out[2];
#pragma GCC unroll 2
  for (int i = 0; i < 2; i++) {
    float64x2_t half = half_f64(v, i, scale, bias);
    if constexpr (odd) {
      const uint64x2_t words = vreinterpretq_u64_f64(half), cut = vdupq_n_u64((1ull << 40) - 1);
      const uint64x2_t sticky = vaddq_u64(vandq_u64(words, cut), cut);
      const uint64x2_t last = vandq_u64(sticky, vdupq_n_u64(1ull << 40));
      half = vreinterpretq_f64_u64(vorrq_u64(vbicq_u64(words, cut), last));
    }
    out[i] = vcvt_f32_f64(half);
  }
  return vcombine_f32(out[0], out[1]);
}

INLINE V choose_nan(F v, V then, V other) { return vbslq_s32(vceqq_f32(v, v), other, then); }
INLINE V right_by(V v, V by) { return from_bits(vshlq_u32(bits_of(v), vnegq_s32(by))); }
INLINE F choose(F v, V at) {
  const V bytes = vmlaq_s32(set(0x03020100), at, set(0x04040404));
  const uint8x16_t chosen = vqtbl1q_u8(vreinterpretq_u8_f32(v), vreinterpretq_u8_s32(bytes));
  return vreinterpretq_f32_u8(chosen);
}

INLINE I dot_i(I sum, V w, V x) {
  const int16x8_t a = vreinterpretq_s16_s32(w), b = vreinterpretq_s16_s32(x);
  sum.first = vmlal_s16(sum.first, vget_low_s16(a), vget_low_s16(b));
  sum.second = vmlal_high_s16(sum.second, a, b);
  return sum;
}
INLINE V value_i(I sum) { return vpaddq_s32(sum.first, sum.second); }
#if defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
#define HAS_BF16 1
INLINE F dot_b(F sum, V w, V x) {
  return vbfdotq_f32(sum, vreinterpretq_bf16_s32(w), vreinterpretq_bf16_s32(x));
}
#endif

INLINE void transpose(V (&r)[L]) {
  const V a = vtrn1q_s32(r[0], r[1]), b = vtrn2q_s32(r[0], r[1]);
  const V c = vtrn1q_s32(r[2], r[3]), d = vtrn2q_s32(r[2], r[3]);
  const auto low = [](V u, V v) { return vcombine_s32(vget_low_s32(u), vget_low_s32(v)); };
  const auto high = [](V u, V v) { return vcombine_s32(vget_high_s32(u), vget_high_s32(v)); };
  r[0] = low(a, c), r[1] = low(b, d), r[2] = high(a, c), r[3] = high(b, d);
}

#else
#error "no vectors: these kernels need AVX2 with FMA and F16C, AVX-512 (F, BW, VL) or NEON"
#endif
