// Threads of this library's own: torch's are behind an OpenMP runtime, and a second one of those beside it would have
// the two wait for each other. A thread waits busily for some microseconds after its work and then sleeps.

#include <stdlib.h>

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <new>

#include "plan.h"

#if !defined(_WIN32)
#include <pthread.h>
#define BITFLOOR_THREADS 1
#endif

namespace bitfloor {

namespace {

static const int MOST_THREADS = 64;
static const int SPINS = 2000;

inline void pause_briefly() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#endif
}

struct Memory {
    void* at[3] = {};
    int64_t size[3] = {};
    ~Memory() {
        for (void* own : at) free(own);
    }
};

thread_local Memory memory;

#ifdef BITFLOOR_THREADS

struct Worker {
    std::mutex mutex;
    std::condition_variable wake;
    std::atomic<bool> go{false}, sleeping{false};
    Task task = nullptr;
    void* context = nullptr;
    int64_t first = 0, last = 0;
    std::atomic<int>* left = nullptr;

    void run() {
        for (;;) {
            for (int spin = 0; spin < SPINS && !go.load(std::memory_order_acquire); ++spin) pause_briefly();
            if (!go.load(std::memory_order_acquire)) {
                std::unique_lock<std::mutex> lock(mutex);
                sleeping.store(true);
                while (!go.load()) wake.wait(lock);
                sleeping.store(false);
            }
            go.store(false);
            task(context, first, last);
            left->fetch_sub(1, std::memory_order_release);
        }
    }
    void start() {
        go.store(true);
        if (sleeping.load()) {  // it saw `go`, or it sleeps once the lock is free
            { std::lock_guard<std::mutex> lock(mutex); }
            wake.notify_one();
        }
    }
};

struct Pool {
    std::mutex busy;
    int count = 0;
    Worker* workers[MOST_THREADS] = {};

    static void* entry(void* worker) {
        static_cast<Worker*>(worker)->run();
        return nullptr;
    }
    // As many workers as can be had, up to so many.
    int grown(int wanted) {
        while (count < wanted && count < MOST_THREADS) {
            Worker* worker = new (std::nothrow) Worker;
            pthread_t thread;
            if (!worker || pthread_create(&thread, nullptr, entry, worker)) {
                delete worker;
                break;
            }
            pthread_detach(thread);
            workers[count++] = worker;
        }
        return count < wanted ? count : wanted;
    }
};

// Never deleted: its threads sleep until the process ends. A child of fork has none of them and makes its own.
std::atomic<Pool*> current{nullptr};

void forget() { current.store(nullptr); }

Pool* pool() {
    static const int registered = pthread_atfork(nullptr, nullptr, forget);
    (void)registered;
    Pool* found = current.load();
    if (found) return found;
    Pool* made = new (std::nothrow) Pool;
    if (made && current.compare_exchange_strong(found, made)) return made;
    delete made;
    return found;
}

#endif

}  // namespace

void* scratch(int64_t bytes, int slot) {
    if (memory.size[slot] < bytes) {
        free(memory.at[slot]);
        const int64_t size = up(bytes, 4096) * 4096;
        memory.at[slot] = aligned_alloc(64, (size_t)size);
        memory.size[slot] = memory.at[slot] ? size : 0;
    }
    return memory.at[slot];
}

void each_range(Task task, void* context, int64_t count, int64_t unit, int64_t threads) {
    const int64_t units = up(count, unit);
    threads = least(threads, units);
#ifdef BITFLOOR_THREADS
    Pool* shared = threads > 1 ? pool() : nullptr;
    if (shared && shared->busy.try_lock()) {  // another thread's call has them otherwise
        const int others = shared->grown((int)least(threads, MOST_THREADS + 1) - 1);
        std::atomic<int> left{others};
        auto border = [&](int i) { return least(count, units * i / (others + 1) * unit); };
        for (int i = 0; i < others; ++i) {
            Worker& worker = *shared->workers[i];
            worker.task = task, worker.context = context, worker.left = &left;
            worker.first = border(i + 1), worker.last = border(i + 2);
            worker.start();
        }
        task(context, 0, border(1));
        for (int spin = 0; left.load(std::memory_order_acquire); ++spin) {
            if (spin < 4 * SPINS)
                pause_briefly();
            else
                sched_yield();
        }
        shared->busy.unlock();
        return;
    }
#endif
    task(context, 0, count);
}

}  // namespace bitfloor
