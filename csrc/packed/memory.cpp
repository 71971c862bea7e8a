// Memory: pages that are worth having, and how fast it can be read at all.

#include <string.h>

#include <atomic>

#include "plan.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

#define PUBLIC extern "C" __attribute__((visibility("default")))

// Asks for huge pages behind `bytes` bytes that are written already or will be. Returns how many bytes it may have got them for: 0
// where the system has none, or where it is left as it is.
PUBLIC int64_t bitfloor_packed_huge(void* at, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    static const uintptr_t HUGE = 2 << 20;
    const uintptr_t first = ((uintptr_t)at + HUGE - 1) / HUGE * HUGE, last = ((uintptr_t)at + (uintptr_t)bytes) / HUGE * HUGE;
    if (bytes <= 0 || last <= first) return 0;
    if (madvise((void*)first, last - first, MADV_HUGEPAGE)) return 0;
#if !defined(MADV_COLLAPSE)
#define MADV_COLLAPSE 25
#endif
    (void)madvise((void*)first, last - first, MADV_COLLAPSE);  // at once, from Linux 6.1 on
    return (int64_t)(last - first);
#else
    (void)at, (void)bytes;
    return 0;
#endif
}

struct Reading {
    const char* at;
    std::atomic<uint64_t> sum;
};

// A plain loop over everything, as fast as the compiler makes it.
VERSIONS static void read_task(void* context, int64_t first, int64_t last) {
    Reading* reading = static_cast<Reading*>(context);
    uint64_t lanes[64] = {0};
    for (int64_t at = first; at + 512 <= last; at += 512) {
        uint64_t own[64];
        memcpy(own, reading->at + at, sizeof own);
        for (int i = 0; i < 64; i += 8) __builtin_prefetch(reading->at + at + 8192 + 8 * i);
        for (int i = 0; i < 64; ++i) lanes[i] ^= own[i];
    }
    uint64_t all = 0;
    for (int i = 0; i < 64; ++i) all ^= lanes[i];
    reading->sum ^= all;
}

// Reads `bytes` bytes, and returns something that depends on all whole 512 of them.
PUBLIC int64_t bitfloor_packed_read(const void* at, int64_t bytes, int64_t threads) {
    Reading reading = {static_cast<const char*>(at), {0}};
    bitfloor::each_range(read_task, &reading, bytes, 32768, threads);
    return (int64_t)reading.sum.load();
}
