// Random numbers, and floats of each dtype (0 float32, 1 float16, 2 bfloat16) by nothing
// but arithmetic on doubles.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

struct Random {
  uint64_t state;
  explicit Random(uint64_t seed) : state(seed * 0x9E3779B97F4A7C15ull + 1) {}
  uint32_t next() {
    state = state * 6364136223846793005ull + 1442695040888963407ull;
    return (uint32_t)(state >> 33);
  }
  int below(int end) { return (int)(next() % (uint32_t)end); }
  double uniform() { return next() / 2147483648.0; }
  double normal() {
    double sum = -6;
    for (int i = 0; i < 12; i++) sum += uniform();
    return sum;
  }
};

// To the nearest number with so many bits and none finer than 2^least, ties to even.
static double rounded_to(double v, int bits, int least) {
  if (v == 0 || !std::isfinite(v)) return v;
  int exponent;
  frexp(v, &exponent);
  const int finest = exponent - bits > least ? exponent - bits : least;
  return ldexp(nearbyint(ldexp(v, -finest)), finest);
}

static double rounded(double v, int type) {
  if (type == 0) return (float)v;
  return type == 1 ? rounded_to(v, 11, -24) : rounded_to(v, 8, -133);
}

static double number(const void* p, int64_t at, int type) {
  if (type == 0) {
    float v;
    memcpy(&v, (const char*)p + at * 4, 4);
    return v;
  }
  uint16_t bits;
  memcpy(&bits, (const char*)p + at * 2, 2);
  const int fraction_bits = type == 1 ? 10 : 7, bias = type == 1 ? 15 : 127;
  const int most = 2 * bias + 1, exponent = bits >> fraction_bits & most;
  const int fraction = bits & ((1 << fraction_bits) - 1);
  const double sign = bits >> 15 ? -1 : 1;
  if (exponent == most) return fraction ? NAN : sign * INFINITY;
  if (exponent == 0) return sign * ldexp(fraction, 1 - bias - fraction_bits);
  return sign * ldexp(fraction + (1 << fraction_bits), exponent - bias - fraction_bits);
}

static void set_number(void* p, int64_t at, int type, double v) {
  if (type == 0) {
    const float f = (float)v;
    memcpy((char*)p + at * 4, &f, 4);
    return;
  }
  const int fraction_bits = type == 1 ? 10 : 7, bias = type == 1 ? 15 : 127;
  const int most = 2 * bias + 1;
  v = rounded(v, type);
  uint32_t bits = 0;
  if (std::isnan(v)) {
    bits = (uint32_t)most << fraction_bits | 1;
  } else if (std::isinf(v)) {
    bits = (uint32_t)most << fraction_bits;
  } else if (v != 0) {
    int exponent;
    frexp(v, &exponent);
    exponent = exponent + bias - 1 > 0 ? exponent + bias - 1 : 0;
    const double unit = ldexp(1, (exponent > 0 ? exponent : 1) - bias - fraction_bits);
    // The leading one of a normal number adds 1 to the exponent before it.
    const uint32_t whole = (uint32_t)(fabs(v) / unit);
    bits = exponent > 0 ? ((uint32_t)(exponent - 1) << fraction_bits) + whole : whole;
  }
  bits |= std::signbit(v) ? 0x8000u : 0;
  const uint16_t half = (uint16_t)bits;
  memcpy((char*)p + at * 2, &half, 2);
}
