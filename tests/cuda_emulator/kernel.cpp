// The kernels of one source, for driver.cpp: launched with parameters as the driver has them.
// SOURCE is a definition, and ENTRY unless the source is weights.cu; so are those of the kernel.

#include <utility>

#include "emulator.h"
#include "values.h"
#include SOURCE

struct Sizes {
  int grid[3], block[3], shared, cluster;
};

template <typename... A, size_t... I>
static void unpack(void (*kernel)(A...), void** parameters, std::index_sequence<I...>) {
  kernel(*(std::remove_reference_t<A>*)parameters[I]...);
}

template <typename... A>
static void call(void (*kernel)(A...), void** parameters) {
  unpack(kernel, parameters, std::index_sequence_for<A...>());
}

// null, or what went wrong.
static const char* launch(const Sizes& sizes, void (*body)(void*), void** parameters) {
  emulator::Launch how = {};
  how.grid = {sizes.grid[0], sizes.grid[1], sizes.grid[2]};
  how.threads = sizes.block[0] * sizes.block[1];
  how.shared = sizes.shared;
  how.cluster = sizes.cluster;
  wide = sizes.block[0];
  return emulator::run(how, body, parameters);
}

#define EXPORT(name)                                                                     \
  extern "C" const char* launch_##name(const Sizes* sizes, void** parameters) {          \
    return launch(*sizes, [](void* p) { call(name, (void**)p); }, parameters);           \
  }
#define EXPORT_LATER(name) EXPORT(name)

#ifdef ENTRY
EXPORT_LATER(ENTRY)
#else
EXPORT(affine_dequantize)
EXPORT(affine_embedding)
#if X != FLOAT64
EXPORT(affine_quantize)
#endif
#endif
