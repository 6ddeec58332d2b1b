// How far each piece of a sequence has come through stages that follow one another, for threads that take (stage, piece) in
// this order and wait for what others have taken before. Nobody waits for what no thread has taken, so with any number of
// threads, one that the system does not run for a while too, there is an end.
#pragma once

#include <atomic>
#include <cstddef>
#include <thread>
#include <vector>

#include "../common/cpu_loops.h"

namespace btp {

class Progress {
public:
    explicit Progress(size_t pieces) : behind_(pieces) {}

    // The next of all (stage, piece), counted on.
    size_t take() { return next_.fetch_add(1, std::memory_order_relaxed); }

    // A piece has one stage more behind it.
    void finish(size_t piece) { behind_[piece].fetch_add(1, std::memory_order_release); }

    // Until the first `pieces` have so many stages behind them; false where one of them may never.
    bool wait(size_t pieces, size_t stages) const
    {
        for (size_t piece = 0; piece < pieces; ++piece) {
            for (int turn = 0; behind_[piece].load(std::memory_order_acquire) < stages; ++turn) {
                if (failed_.load(std::memory_order_relaxed)) {
                    return false;
                }
                pause(turn);
            }
        }
        return true;
    }

    // A thread that has taken something will not finish it.
    void fail() { failed_.store(true, std::memory_order_relaxed); }

private:
    // Some microseconds of waiting for a thread that runs, then the core goes to whoever wants it.
    static void pause(int turn)
    {
#ifdef BTP_X86
        if (turn < kSpins) {
            return _mm_pause();
        }
#endif
        std::this_thread::yield();
    }

    static constexpr int kSpins = 200;

    std::atomic<size_t> next_{0};
    std::atomic<bool> failed_{false};
    std::vector<std::atomic<size_t>> behind_;
};

}  // namespace btp
