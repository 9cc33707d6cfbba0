// What the compiler's checks of undefined behaviour call. Only the calls are compiled
// into a kernel; these functions stand in for the sanitizer's own library.
#include <stdint.h>

#include "runtime.hpp"

using namespace msl;

namespace {

struct Location {
    char const* file;
    uint32_t line, column;
};
struct Mismatch {
    Location location;
    void const* type;
    uint8_t log_alignment;
    uint8_t access;  // 0 load, 1 store, 2 reference, 3 member access, 4 member call, ...
};

[[noreturn]] void refuse(int failure, void const* program_counter, char const* what) {
    fail(failure, program_counter, "%s", what);
    abandon();
    __builtin_unreachable();
}

void mismatch(Mismatch const* data, uintptr_t pointer, void const* program_counter) {
    uintptr_t const alignment = uintptr_t(1) << data->log_alignment;
    if (!pointer || pointer % alignment == 0)
        return;
    fail(ALIGNMENT, program_counter,
         "misaligned %s: the type asks for %lu bytes, the address is %lu past such a place",
         data->access == 1 ? "store" : "access", (unsigned long)alignment,
         (unsigned long)(pointer % alignment));
    abandon();
}

}  // namespace

// The call itself, not the instruction that it returns to.
#define HERE ((char const*)__builtin_return_address(0) - 1)

extern "C" {

void __ubsan_handle_type_mismatch_v1(Mismatch const* data, uintptr_t pointer) {
    mismatch(data, pointer, HERE);
}
void __ubsan_handle_type_mismatch_v1_abort(Mismatch const* data, uintptr_t pointer) {
    mismatch(data, pointer, HERE);
}

#define MSL_CHECK(name, failure, text)                                              \
    void __ubsan_handle_##name() { refuse(failure, HERE, text); }                   \
    void __ubsan_handle_##name##_abort() { refuse(failure, HERE, text); }
MSL_CHECK(out_of_bounds, OUT_OF_BOUNDS, "an array's index is out of bounds")
// clang 22 calls this one for arrays whose bounds it finds by itself.
MSL_CHECK(local_out_of_bounds, OUT_OF_BOUNDS, "an array's index is out of bounds")
MSL_CHECK(shift_out_of_bounds, ARITHMETIC, "a shift by its type's width or more")
MSL_CHECK(add_overflow, ARITHMETIC, "a sum overflows its signed type")
MSL_CHECK(sub_overflow, ARITHMETIC, "a difference overflows its signed type")
MSL_CHECK(mul_overflow, ARITHMETIC, "a product overflows its signed type")
MSL_CHECK(negate_overflow, ARITHMETIC, "a negation overflows its signed type")
MSL_CHECK(divrem_overflow, ARITHMETIC,
          "a division by zero, or of the least number of a signed type by -1")
MSL_CHECK(float_cast_overflow, ARITHMETIC, "a float is out of range of its integer type")
MSL_CHECK(missing_return, OTHER, "a function that has a result ends without `return`")

}  // extern "C"
