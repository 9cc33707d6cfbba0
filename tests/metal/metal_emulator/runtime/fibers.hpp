// One stack a lane, and the switch between two of them.
#pragma once
#include <stddef.h>
#include <stdint.h>
#include <sys/mman.h>
#include <unistd.h>

// Saves the callee's registers on the present stack, and goes on with another one.
extern "C" void msl_switch(void** save, void* next) asm("msl_switch");

namespace msl {

constexpr size_t STACK_BYTES = 256 << 10;

inline size_t page_bytes() {
    static size_t const bytes = size_t(sysconf(_SC_PAGESIZE));
    return bytes;
}

inline size_t whole_pages(size_t bytes) {
    return (bytes + page_bytes() - 1) / page_bytes() * page_bytes();
}

inline uint8_t* map_memory(size_t bytes) {
    void* found = mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    return found == MAP_FAILED ? nullptr : (uint8_t*)found;
}

// A stack pointer that msl_switch can go to; it arrives in `start`.
inline void* fresh_stack(uint8_t* stack, unsigned lane, void (*start)()) {
    // Tops at the same place of every stack would share few sets of the cache.
    uintptr_t const top = uintptr_t(stack) + STACK_BYTES - lane * 1088 % 32768 / 64 * 64;
#if defined(__x86_64__)
    // After `ret`, the stack must be 8 below a multiple of 16, as after a call.
    void** place = (void**)(top - 64);
    *--place = nullptr;
    *--place = (void*)start;
    for (int i = 0; i < 6; ++i)
        *--place = nullptr;
#else
    void** place = (void**)(top - 64 - 160);
    for (int i = 0; i < 20; ++i)
        place[i] = nullptr;
    place[11] = (void*)start;  // x30, the address to return to
#endif
    return place;
}

}  // namespace msl
