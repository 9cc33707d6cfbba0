// Runs a product kernel: SOURCE and ENTRY are definitions, as are those of the kernel.

#include "emulator.h"
#include SOURCE

struct Arguments {
  const void* x;
  i64 x_stride;
  const unsigned* packed;
  i64 packed_stride;
  const void *scales, *biases;
  i64 scale_stride;
  const void* bias;
  void* y;
  int m, n, k;
  i64 packed_expert, scale_expert;
  const void* experts;
  int e;
};

static void call(void* pointer) {
  const Arguments& a = *(Arguments*)pointer;
  ENTRY(a.x, a.x_stride, a.packed, a.packed_stride, a.scales, a.biases, a.scale_stride,
        a.bias, a.y, a.m, a.n, a.k, a.packed_expert, a.scale_expert, a.experts, a.e);
}

// sizes, alignments: of x, packed, scales, biases, bias, y, experts, in bytes.
extern "C" const char* run(const emulator::Launch* how, Arguments* a, const i64* sizes,
                           const i64* alignments) {
  const void** fields[7] = {&a->x, (const void**)&a->packed, &a->scales, &a->biases, &a->bias,
                            (const void**)&a->y, &a->experts};
  std::vector<emulator::Guarded> buffers;
  buffers.reserve(7);
  for (int i = 0; i < 7; ++i) {
    buffers.emplace_back((void*)*fields[i], (size_t)sizes[i], (size_t)alignments[i]);
    *fields[i] = buffers[i].data;
  }
  const char* fault = emulator::run(*how, call, a);
  buffers[5].give_back();
  return fault;
}
