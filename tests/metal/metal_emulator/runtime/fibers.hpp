// One stack a lane, and the switch between two of them.
#pragma once
#include <stddef.h>
#include <stdint.h>
#include <sys/mman.h>
#include <unistd.h>

// Saves the callee's registers on the present stack, and goes on with another one.
extern "C" void msl_switch(void** save, void* next) asm("msl_switch");

#if defined(__x86_64__)
asm(R"(
.text
.globl msl_switch
msl_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
)");
#elif defined(__aarch64__)
asm(R"(
.text
.globl msl_switch
.p2align 2
msl_switch:
    sub sp, sp, #160
    stp x19, x20, [sp, #0]
    stp x21, x22, [sp, #16]
    stp x23, x24, [sp, #32]
    stp x25, x26, [sp, #48]
    stp x27, x28, [sp, #64]
    stp x29, x30, [sp, #80]
    stp d8, d9, [sp, #96]
    stp d10, d11, [sp, #112]
    stp d12, d13, [sp, #128]
    stp d14, d15, [sp, #144]
    mov x2, sp
    str x2, [x0]
    mov sp, x1
    ldp x19, x20, [sp, #0]
    ldp x21, x22, [sp, #16]
    ldp x23, x24, [sp, #32]
    ldp x25, x26, [sp, #48]
    ldp x27, x28, [sp, #64]
    ldp x29, x30, [sp, #80]
    ldp d8, d9, [sp, #96]
    ldp d10, d11, [sp, #112]
    ldp d12, d13, [sp, #128]
    ldp d14, d15, [sp, #144]
    add sp, sp, #160
    ret
)");
#else
#error "the emulator knows x86-64 and aarch64"
#endif

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
