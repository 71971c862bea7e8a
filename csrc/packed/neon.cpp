// The kernels for every 64-bit ARM processor, and whether this one has more (neon_dot.cpp).

#include "plan.h"

#if defined(__aarch64__) && defined(__ARM_NEON) && (defined(__GNUC__) || defined(__clang__)) && !defined(__AARCH64EB__)

#include "neon.h"

namespace bitfloor {

const Kernels* neon_kernels() {
    static const Kernels found = {Product<Neon<false>>::all, unpack_rows, Rows<Neon<false>>::dense,
                                  Rows<Neon<false>>::attend, norm_row, gate_row};
    return &found;
}

}  // namespace bitfloor

#else
namespace bitfloor {
const Kernels* neon_kernels() { return nullptr; }
}  // namespace bitfloor
#endif
