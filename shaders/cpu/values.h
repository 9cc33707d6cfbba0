// Floats of any dtype in memory, to and from float32. Types: 0 float32, 1 float16,
// 2 bfloat16.
#pragma once

#include "simd.h"

INLINE i64 size_of(int type) { return type == 0 ? 4 : 2; }

INLINE float bf16_value(uint32_t bits) {
  const uint32_t word = bits << 16;
  float value;
  memcpy(&value, &word, 4);
  return value;
}

INLINE F load_values(const void* p, i64 at, int type) {
  if (type == 2) return as_f(left<16>(load_16((const uint16_t*)p + at)));
  if (type == 1) return load_half((const uint16_t*)p + at);
  return load_f((const float*)p + at);
}

// To the nearest, ties to even; NaN stays one.
INLINE V to_bf16(F v) {
  const V bits = as_v(v), odd = both(right<16>(bits), set(1));
  const V rounded = right<16>(plus(bits, plus(odd, set(0x7fff))));
  return choose_nan(v, set(0x7fc0), rounded);
}

INLINE void store_values(void* p, i64 at, F v, int type) {
  if (type == 2) store_16((uint16_t*)p + at, to_bf16(v));
  else if (type == 1) store_half((uint16_t*)p + at, v);
  else store_f((float*)p + at, v);
}

INLINE float value_at(const void* p, i64 at, int type) {
  if (type == 0) return ((const float*)p)[at];
  if (type == 2) return bf16_value(((const uint16_t*)p)[at]);
  uint16_t some[L] = {((const uint16_t*)p)[at]};
  float values[L];
  store_f(values, load_half(some));
  return values[0];
}

static void values_at(float* out, const void* p, i64 at, i64 count, int type) {
  i64 i = 0;
  for (; i + L <= count; i += L) store_f(out + i, load_values(p, at + i, type));
  for (; i < count; i++) out[i] = value_at(p, at + i, type);
}

// The first `left` of L values, after `bias` (of the same type, from n on) is added.
INLINE void write_values(void* p, i64 at, F v, int type, i64 left, const void* bias, i64 n) {
  if (left >= L) {
    if (bias) v = add(v, load_values(bias, n, type));
    store_values(p, at, v, type);
    return;
  }
  float some[L] = {};
  if (bias) {
    for (i64 i = 0; i < left; i++) some[i] = value_at(bias, n + i, type);
    v = add(v, load_f(some));
  }
  store_values(some, 0, v, type);
  memcpy((char*)p + at * size_of(type), some, left * size_of(type));
}
