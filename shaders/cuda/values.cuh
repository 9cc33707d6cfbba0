// Floats of any dtype in memory, and arithmetic that rounds as it says.
#pragma once

#include "machine.cuh"

#define FLOAT64 3

DEVICE constexpr int size_of(int type) { return type == FLOAT64 ? 8 : type == FLOAT32 ? 4 : 2; }

// The emulator of tests/cuda_emulator puts functions of its own in their place.
#ifndef AFFINE_EMULATOR
DEVICE float sum_nearest(float a, float b, float c) { return __fmaf_rn(a, b, c); }
DEVICE float sum_down(float a, float b, float c) { return __fmaf_rd(a, b, c); }
DEVICE float sum_up(float a, float b, float c) { return __fmaf_ru(a, b, c); }
DEVICE double sum_double(double a, double b, double c) { return __fma_rn(a, b, c); }
DEVICE float minus(float a, float b) { return __fsub_rn(a, b); }
DEVICE float over(float a, float b) { return __fdiv_rn(a, b); }
DEVICE u64 as_long(double value) { return (u64)__double_as_longlong(value); }
DEVICE u32 shuffle_bits(u32 value, int mask) { return __shfl_xor_sync(~0u, value, mask); }
#endif
