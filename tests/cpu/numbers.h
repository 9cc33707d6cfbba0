// Random numbers, and floats of each dtype (0 float32, 1 float16, 2 bfloat16, 3 float64) by
// nothing but arithmetic on doubles.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

static const char* const TYPES[] = {"float32", "float16", "bfloat16", "float64"};

struct Random {
  uint64_t state;
  explicit Random(uint64_t seed) : state(seed * 0x9E3779B97F4A7C15ull + 1) {}
  uint32_t next() {
    state = state * 6364136223846793005ull + 1442695040888963407ull;
    return (uint32_t)(state >> 33);
  }
  int below(int end) { return (int)(next() % (uint32_t)end); }
  double normal() {
    double sum = -6;
    for (int i = 0; i < 12; i++) sum += next() / 2147483648.0;
    return sum;
  }
};

static int bytes_of(int type) { return type == 0 ? 4 : type == 3 ? 8 : 2; }

// To the nearest number with so many bits and none finer than 2^least, ties to even.
static double rounded_to(double v, int bits, int least) {
  if (v == 0 || v - v != 0) return v;
  int exponent;
  frexp(v, &exponent);
  const int finest = exponent - bits > least ? exponent - bits : least;
  return ldexp(nearbyint(ldexp(v, -finest)), finest);
}

static double rounded(double v, int type) {
  if (type == 3) return v;
  if (type == 0) return (float)v;
  return type == 1 ? rounded_to(v, 11, -24) : rounded_to(v, 8, -133);
}

static double number(const void* p, int64_t at, int type) {
  const char* from = (const char*)p + at * bytes_of(type);
  if (type == 0) {
    float v;
    memcpy(&v, from, 4);
    return v;
  }
  if (type == 3) {
    double v;
    memcpy(&v, from, 8);
    return v;
  }
  uint16_t bits;
  memcpy(&bits, from, 2);
  const int fraction_bits = type == 1 ? 10 : 7, bias = type == 1 ? 15 : 127;
  const int most = 2 * bias + 1, exponent = bits >> fraction_bits & most;
  const uint64_t fraction = bits & ((1 << fraction_bits) - 1);
  const double sign = bits >> 15 ? -1 : 1;
  if (exponent == most) return fraction ? NAN : sign * INFINITY;
  if (exponent == 0) return sign * (double)fraction * (type == 1 ? 0x1p-24 : 0x1p-133);
  const uint64_t word = (uint64_t)(exponent - bias + 1023) << 52 | fraction << (52 - fraction_bits);
  double v;
  memcpy(&v, &word, 8);
  return sign * v;
}

static uint16_t half_of(double v, int type) {
  const int fraction_bits = type == 1 ? 10 : 7, bias = type == 1 ? 15 : 127;
  const uint32_t sign = signbit(v) ? 0x8000 : 0, infinite = (2 * bias + 1) << fraction_bits;
  v = fabs(rounded(v, type));
  if (v != v) return (uint16_t)(sign | infinite | 1);
  if (v >= ldexp(1, bias + 1)) return (uint16_t)(sign | infinite);
  if (v == 0) return (uint16_t)sign;
  int exponent;
  frexp(v, &exponent);
  exponent = exponent + bias - 1 > 0 ? exponent + bias - 1 : 0;
  const double unit = ldexp(1, (exponent > 0 ? exponent : 1) - bias - fraction_bits);
  // The leading one of a normal number adds 1 to the exponent before it.
  const uint32_t before = exponent > 0 ? (uint32_t)(exponent - 1) << fraction_bits : 0;
  return (uint16_t)(sign | (before + (uint32_t)(v / unit)));
}

static void set_number(void* p, int64_t at, int type, double v) {
  char* to = (char*)p + at * bytes_of(type);
  const float single = (float)v;
  const uint16_t half = type == 1 || type == 2 ? half_of(v, type) : 0;
  if (type == 0) memcpy(to, &single, 4);
  else if (type == 3) memcpy(to, &v, 8);
  else memcpy(to, &half, 2);
}
