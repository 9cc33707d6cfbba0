// Runs a kernel of shaders/cuda/weights.cu, in blocks of two dimensions.

#include "emulator.h"
#include "values.h"
#include "weights.cu"

// What kernels are given, in the order of their pointers; those that one has no use for are
// null.
struct Arguments {
  const void *ids, *packed, *scales, *biases, *permutation;
  void* y;  // of quantize: words
  const void* w;
  i64 packed_stride, scale_stride, permuted_rows, rows, weight_rows, groups;
  int ids_are_64_bits, scale_type, group_shift, columns;
};

static void dequantize_all(void* pointer) {
  const Arguments& a = *(Arguments*)pointer;
  affine_dequantize((const u32*)a.packed, a.packed_stride, a.scales, a.biases, a.scale_stride,
                    a.scale_type, a.group_shift, (const int*)a.permutation, a.permuted_rows, a.y,
                    a.rows, a.columns);
}

static void embed_all(void* pointer) {
  const Arguments& a = *(Arguments*)pointer;
  affine_embedding(a.ids, a.ids_are_64_bits, a.weight_rows, (const u32*)a.packed,
                   a.packed_stride, a.scales, a.biases, a.scale_stride, a.scale_type,
                   a.group_shift, a.y, a.rows, a.columns);
}

#if X != FLOAT64
static void quantize_all(void* pointer) {
  const Arguments& a = *(Arguments*)pointer;
  affine_quantize(a.w, (u8*)a.y, (void*)a.scales, (void*)a.biases, a.groups, a.group_shift);
}
#endif

// sizes: of the first seven, in bytes. entry: 0 dequantize, 1 embedding, 2 quantize.
extern "C" const char* run(int entry, const emulator::Launch* how, int threads_wide,
                           Arguments* a, const i64* sizes) {
  const void** fields[7] = {&a->ids,         &a->packed,          &a->scales, &a->biases,
                            &a->permutation, (const void**)&a->y, &a->w};
  std::vector<emulator::Guarded> buffers;
  buffers.reserve(7);
  for (int i = 0; i < 7; ++i) {
    const size_t alignment = i == 5 ? 16 : 4;  // of y, as vectors need it
    buffers.emplace_back((void*)*fields[i], (size_t)sizes[i], alignment);
    *fields[i] = buffers[i].data;
  }
  wide = threads_wide;
  void (*bodies[3])(void*) = {dequantize_all, embed_all, nullptr};
#if X != FLOAT64
  bodies[2] = quantize_all;
#endif
  const char* fault = emulator::run(*how, bodies[entry], a);
  for (int i : {2, 3, 5}) buffers[i].give_back();
  return fault;
}
