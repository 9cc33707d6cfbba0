// Instructions that C++ has no words for, and types. Needs no header of the toolkit.
//
// The emulator of tests/cuda_emulator puts functions of its own in their place.

#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

// How a definition names a dtype.
#define FLOAT32 0
#define FLOAT16 1
#define BFLOAT16 2

#ifndef AFFINE_EMULATOR
#define DEVICE __device__ __forceinline__
#define KERNEL extern "C" __global__ void
#define DYNAMIC_SHARED(name) extern __shared__ __align__(128) u32 name[]

// ---- bits -----------------------------------------------------------------------

// A constant that the compiler does not see through: two immediate operands in
// (w & mask) | magic cost two instructions.
DEVICE u32 opaque(u32 value) {
  u32 out;
  asm volatile("mov.u32 %0, %1;" : "=r"(out) : "r"(value));
  return out;
}

DEVICE u32 and_or(u32 a, u32 mask, u32 magic) {
  u32 out;
  asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(out) : "r"(a), "r"(mask), "r"(magic));
  return out;
}

DEVICE u32 select_bytes(u32 a, u32 b, u32 selector) { return __byte_perm(a, b, selector); }
DEVICE u32 funnel(u32 low, u32 high, u32 shift) { return __funnelshift_r(low, high, shift); }
DEVICE float as_float(u32 bits) { return __uint_as_float(bits); }
DEVICE u32 as_bits(float value) { return __float_as_uint(value); }
DEVICE int to_int(float value) { return __float2int_rn(value); }
DEVICE float to_float(int value) { return __int2float_rn(value); }
DEVICE float fused(float a, float b, float c) { return __fmaf_rn(a, b, c); }

// ---- 16-bit floats --------------------------------------------------------------

DEVICE float half_to_float(u16 bits) {
  float out;
  asm("cvt.f32.f16 %0, %1;" : "=f"(out) : "h"(bits));
  return out;
}

DEVICE u16 float_to_half(float value) {
  u16 out;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(out) : "f"(value));
  return out;
}

DEVICE u16 float_to_bfloat(float value) {
  u16 out;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(out) : "f"(value));
  return out;
}

DEVICE u32 two_bfloats(float low, float high) {
  u32 out;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(high), "f"(low));
  return out;
}

DEVICE u32 two_halves(float low, float high) {
  u32 out;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(high), "f"(low));
  return out;
}

DEVICE u32 fma_halves(u32 a, u32 b, u32 c) {
  u32 out;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(out) : "r"(a), "r"(b), "r"(c));
  return out;
}

DEVICE u32 fma_bfloats(u32 a, u32 b, u32 c) {
  u32 out;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(out) : "r"(a), "r"(b), "r"(c));
  return out;
}

// ---- lanes ----------------------------------------------------------------------

DEVICE float shuffle_xor(float value, int mask) { return __shfl_xor_sync(~0u, value, mask); }
DEVICE u32 warp_max(u32 value) { return __reduce_max_sync(~0u, value); }
DEVICE u32 shuffle_from(u32 value, int lane) { return __shfl_sync(~0u, value, lane & 31); }
DEVICE void sync_warp() { __syncwarp(); }
DEVICE void sync_block() { __syncthreads(); }

// ---- matrices -------------------------------------------------------------------

// c[16, 8] += a[16, 32] of unsigned bytes times b[32, 8] of signed bytes.
DEVICE void multiply_bytes(int* c, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 "
      "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// c[16, 8] += a[16, 16] b[16, 8]
DEVICE void multiply_halves(float* c, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

DEVICE void multiply_bfloats(float* c, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// ---- memory ---------------------------------------------------------------------

// Words OFFSET further on than `from`. What is read ONCE needs no place in the first-level
// cache.
template <int OFFSET, bool ONCE>
DEVICE void load_four(const u32* from, u32* to) {
  if constexpr (ONCE)
    asm("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0,%1,%2,%3}, [%4+%5];"
        : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "l"(from), "n"(4 * OFFSET));
  else
    asm("ld.global.nc.L2::128B.v4.u32 {%0,%1,%2,%3}, [%4+%5];"
        : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "l"(from), "n"(4 * OFFSET));
}

template <int OFFSET>
DEVICE void load_two(const u32* from, u32* to) {
  asm("ld.global.nc.L2::128B.v2.u32 {%0,%1}, [%2+%3];"
      : "=r"(to[0]), "=r"(to[1]) : "l"(from), "n"(4 * OFFSET));
}

template <int OFFSET>
DEVICE void load_one(const u32* from, u32* to) {
  asm("ld.global.nc.L2::128B.u32 %0, [%1+%2];" : "=r"(to[0]) : "l"(from), "n"(4 * OFFSET));
}

// The same pointer, but what is read through it is not read before this place.
template <typename T>
DEVICE const T* now(const T* pointer) {
  asm volatile("" : "+l"(pointer)::"memory");
  return pointer;
}

DEVICE void prefetch(const void* from) { asm volatile("prefetch.global.L2 [%0];" ::"l"(from)); }

DEVICE u32 shared_address(const void* pointer) {
  return (u32)__cvta_generic_to_shared(pointer);
}

// Copies 16 (or 4) bytes, of which the last ones are zero where `valid` says fewer.
DEVICE void copy_16(u32 to, const void* from, int valid) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;"
               ::"r"(to), "l"(from), "r"(valid) : "memory");
}

DEVICE void copy_4(u32 to, const void* from, int valid) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;"
               ::"r"(to), "l"(from), "r"(valid) : "memory");
}

DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int LEFT>
DEVICE void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(LEFT) : "memory");
}

// ---- what Hopper added ----------------------------------------------------------

#if PDL && defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
#error "only sm_90 and later wait for the kernel before; another launch must not overlap it"
#endif

#if __CUDA_ARCH__ >= 900
// Until the kernel before has ended. What it wrote may be read from here on, not earlier.
DEVICE void wait_for_kernel_before() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
DEVICE void let_next_kernel_start() {
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}
DEVICE void sync_cluster() {
  asm volatile("barrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");
}
// A number in the shared memory of a block of this cluster.
DEVICE float load_from_block(u32 address, int block) {
  u32 there;
  float out;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(block));
  asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(out) : "r"(there));
  return out;
}
#else
DEVICE void wait_for_kernel_before() {}
DEVICE void let_next_kernel_start() {}
#endif

#endif  // AFFINE_EMULATOR

// ---- dtypes ---------------------------------------------------------------------

template <int TYPE> struct Stored { typedef u16 type; };
template <> struct Stored<FLOAT32> { typedef float type; };

template <int TYPE>
DEVICE float widen(typename Stored<TYPE>::type value) {
  if constexpr (TYPE == FLOAT32) return value;
  else if constexpr (TYPE == FLOAT16) return half_to_float(value);
  else return as_float((u32)value << 16);
}

template <int TYPE>
DEVICE typename Stored<TYPE>::type narrow(float value) {
  if constexpr (TYPE == FLOAT32) return value;
  else if constexpr (TYPE == FLOAT16) return float_to_half(value);
  else return float_to_bfloat(value);
}

template <int TYPE>
DEVICE u32 two_values(float low, float high) {
  if constexpr (TYPE == FLOAT16) return two_halves(low, high);
  else return two_bfloats(low, high);
}

// Of a word that holds two 16-bit floats.
template <int TYPE>
DEVICE float low_of(u32 pair) {
  if constexpr (TYPE == FLOAT16) return half_to_float((u16)pair);
  else return as_float(pair << 16);
}

template <int TYPE>
DEVICE float high_of(u32 pair) {
  if constexpr (TYPE == FLOAT16) return half_to_float((u16)(pair >> 16));
  else return as_float(pair & 0xffff0000u);
}

DEVICE int least(int a, int b) { return a < b ? a : b; }
DEVICE int most(int a, int b) { return a > b ? a : b; }
