// A libcuda whose kernels are libraries made of kernel.cpp: an image is the path of one.
// Pointers are the host's. What the last launch was given is kept for tests to ask.

#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>

#include <map>
#include <mutex>

namespace {

struct Attribute {  // CUlaunchAttribute
  unsigned id, pad;
  union {
    char bytes[64];
    unsigned cluster[3];
    int overlap;
  };
};

struct Config {  // CUlaunchConfig
  unsigned grid[3], block[3], shared;
  void* stream;
  const Attribute* attributes;
  unsigned count;
};

struct Sizes {
  int grid[3], block[3], shared, cluster;
};

typedef const char* (*Function)(const Sizes*, void**);

constexpr int INVALID_VALUE = 1, INVALID_IMAGE = 200, INVALID_CONTEXT = 201,
              NOT_FOUND = 500, LAUNCH_FAILED = 719, PLAIN_SHARED = 48 << 10;

thread_local void* context;  // a new thread has none
thread_local int mode;       // of captures
std::map<void*, int> allowed;
const char* fault = "";
std::mutex emulator;  // which has one device

}  // namespace

struct Seen {
  long launches;
  int grid[3], block[3], shared, cluster[3], overlaps;
  void* stream;
};

extern "C" {

Seen seen;

int cuInit(unsigned) { return 0; }

int cuDeviceGet(int* device, int number) {
  *device = number;
  return 0;
}

int cuDeviceGetAttribute(int* value, int, int) {
  *value = 232448;
  return 0;
}

int cuDevicePrimaryCtxRetain(void** made, int device) {
  *made = (void*)(intptr_t)(device + 100);
  return 0;
}

int cuCtxSetCurrent(void* own) {
  context = own;
  return 0;
}

int cuCtxPushCurrent_v2(void*) { return 0; }
int cuCtxPopCurrent_v2(void** own) {
  *own = context;
  return 0;
}

int cuThreadExchangeStreamCaptureMode(int* other) {
  const int before = mode;
  mode = *other;
  *other = before;
  return 0;
}

int capture_mode() { return mode; }

int cuModuleLoadData(void** module, const char* image) {
  if (mode != 2) return INVALID_VALUE;  // as during a capture
  *module = dlopen(image, RTLD_NOW | RTLD_LOCAL);
  if (!*module) fprintf(stderr, "%s\n", dlerror());
  return *module ? 0 : INVALID_IMAGE;
}

int cuModuleGetFunction(void** function, void* module, const char* name) {
  char own[200];
  snprintf(own, sizeof own, "launch_%s", name);
  *function = dlsym(module, own);
  return *function ? 0 : NOT_FOUND;
}

int cuFuncSetAttribute(void* function, int attribute, int value) {
  if (attribute != 8) return INVALID_VALUE;
  allowed[function] = value;
  return 0;
}

int cuFuncLoad(void*) { return 0; }

int cuLaunchKernelEx(const Config* config, void* function, void** parameters, void** extra) {
  if (!context) return INVALID_CONTEXT;
  const std::lock_guard<std::mutex> guard(emulator);
  const int most = allowed.count(function) ? allowed[function] : PLAIN_SHARED;
  if (extra || (int)config->shared > most) return INVALID_VALUE;
  Sizes sizes = {};
  Seen own = {seen.launches + 1};
  for (int i = 0; i < 3; ++i) {
    own.grid[i] = sizes.grid[i] = (int)config->grid[i];
    own.block[i] = sizes.block[i] = (int)config->block[i];
    own.cluster[i] = 1;
    if (!config->grid[i] || !config->block[i]) return INVALID_VALUE;
  }
  if (config->grid[1] > 65535 || config->grid[2] > 65535) return INVALID_VALUE;
  for (unsigned i = 0; i < config->count; ++i) {
    const Attribute& attribute = config->attributes[i];
    if (attribute.id == 4) {
      for (int j = 0; j < 3; ++j) own.cluster[j] = (int)attribute.cluster[j];
    } else if (attribute.id == 6) {
      own.overlaps = attribute.overlap;
    } else {
      return INVALID_VALUE;
    }
  }
  if (own.cluster[0] != 1 || own.cluster[2] != 1) return INVALID_VALUE;
  own.shared = sizes.shared = (int)config->shared;
  own.stream = config->stream;
  sizes.cluster = own.cluster[1];
  seen = own;
  const char* wrong = ((Function)function)(&sizes, parameters);
  if (wrong) fprintf(stderr, "%s\n", fault = wrong);
  return wrong ? LAUNCH_FAILED : 0;
}

int cuGetErrorName(int code, const char** text) {
  static char own[20];
  snprintf(own, sizeof own, "error %d", code);
  *text = own;
  return 0;
}

int cuGetErrorString(int code, const char** text) {
  *text = code == LAUNCH_FAILED ? fault : "see cuda.h";
  return 0;
}
}
