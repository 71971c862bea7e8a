// The kernels for ARM processors with SDOT (from ARMv8.4 on, and many of 8.2), which the system is asked for.

#include "plan.h"

#if defined(__aarch64__) && defined(__ARM_NEON) && (defined(__GNUC__) || defined(__clang__)) && !defined(__AARCH64EB__)

#if defined(__linux__)
#include <sys/auxv.h>
#elif defined(__APPLE__)
#include <sys/sysctl.h>
#endif

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("dotprod"))), apply_to = function)
#else
#pragma GCC target("arch=armv8.2-a+dotprod")
#endif

#include "neon.h"

namespace bitfloor {
namespace {

bool has_dot() {
#if defined(__linux__)
    return getauxval(AT_HWCAP) >> 20 & 1;  // HWCAP_ASIMDDP
#elif defined(__APPLE__)
    int found = 0;
    size_t size = sizeof found;
    return !sysctlbyname("hw.optional.arm.FEAT_DotProd", &found, &size, nullptr, 0) && found;
#else
    return false;
#endif
}

}  // namespace

const Kernels* neon_dot_kernels() {
    static const Kernels found = {Product<Neon<true>>::all, unpack_rows, Rows<Neon<true>>::dense,
                                  Rows<Neon<true>>::attend, norm_row, gate_row};
    static const bool here = has_dot();
    return here ? &found : nullptr;
}

}  // namespace bitfloor

#if defined(__clang__)
#pragma clang attribute pop
#endif

#else
namespace bitfloor {
const Kernels* neon_dot_kernels() { return nullptr; }
}  // namespace bitfloor
#endif
