// Products with small weights on the CPU (AVX-512): weights that stay in a core's cache while all rows pass through several
// products one after another. They are laid out once, when a session is prepared: 32 outputs side by side for each input.
//
// An element of a product is one chain of joined products and sums along the inputs, so a row's result depends neither on
// the rows beside it nor on how they are shared out.
#pragma once

#include "../common/cpu_loops.h"
#include "../common/half.h"

#ifdef BTP_X86
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <mutex>
#include <new>

#ifdef __linux__
#include <sys/mman.h>
#endif

BTP_QUIET_INTRINSICS

namespace btp {

constexpr size_t kPanel = 32;  // outputs side by side: two registers
constexpr size_t kTile = 8;    // rows that are multiplied with them at once

struct alignas(64) Line {
    char bytes[64];
};

// Memory of one piece of work, 64 bytes aligned, in parts that are not cleared.
class Scratch {
public:
    explicit Scratch(void* memory) : free_(static_cast<float*>(memory)) {}
    // A multiple of 16 floats.
    float* take(size_t floats)
    {
        float* const part = free_;
        free_ += floats;
        return part;
    }

private:
    float* free_;
};

// 2 MiB or a multiple, which the system may hold as large pages (Linux). A prefill reads all weights once: with small pages
// it would wait for each one's address.
class LargePages {
public:
    explicit LargePages(size_t bytes)
        : left_((bytes + kSize - 1) / kSize * kSize), memory_(static_cast<char*>(::operator new(left_, std::align_val_t(kSize)))),
          free_(memory_)
    {
#ifdef __linux__
        (void)madvise(memory_, left_, MADV_HUGEPAGE);
#endif
    }
    ~LargePages() { ::operator delete(memory_, std::align_val_t(kSize)); }
    LargePages(const LargePages&) = delete;
    LargePages& operator=(const LargePages&) = delete;

    size_t left() const { return left_; }
    char* take(size_t bytes)
    {
        char* const part = free_;
        free_ += bytes;
        left_ -= bytes;
        return part;
    }

private:
    static constexpr size_t kSize = size_t{2} << 20;
    size_t left_;
    char *const memory_, *free_;
};

// So many bytes behind those that were asked for before, of all sessions; freed with the last of their pages. Weights that
// are laid out one after another follow one another, so whoever asks for what is behind a matrix gets the next one.
inline std::shared_ptr<char> weights_memory(size_t bytes)
{
    static auto* const lock = new std::mutex;  // never destroyed, like ort_operators()
    static auto* const last = new std::weak_ptr<LargePages>;
    const std::lock_guard<std::mutex> held(*lock);
    std::shared_ptr<LargePages> pages = last->lock();
    if (pages == nullptr || pages->left() < bytes) {
        pages = std::make_shared<LargePages>(bytes);
        *last = pages;
    }
    char* const part = pages->take(bytes);
    return {std::move(pages), part};
}

inline size_t whole_panels(size_t outputs) { return (outputs + kPanel - 1) / kPanel * kPanel; }

// Weights [N,K] as [N/kPanel, K, kPanel], with zeros behind the last output; in 16 bits if `halves`.
class Panels {
public:
    Panels() = default;
    // rows: [N,K], float16 if `stored_halves`; then they may stay so.
    Panels(const void* rows, size_t outputs, size_t inputs, bool stored_halves, bool halves)
        : inputs_(inputs), outputs_(outputs), halves_(stored_halves && halves)
    {
        const size_t bytes = whole_panels(outputs) * inputs * (halves_ ? 2 : 4);
        memory_ = weights_memory(bytes);
        char* const to = memory_.get();
        std::memset(to, 0, bytes);
        for (size_t output = 0; output < outputs; ++output) {
            for (size_t place = 0; place < inputs; ++place) {
                const size_t from = output * inputs + place;
                const size_t at = (output / kPanel * inputs + place) * kPanel + output % kPanel;
                if (halves_) {
                    std::memcpy(to + at * 2, static_cast<const char*>(rows) + from * 2, 2);
                } else {
                    const float value = stored_halves ? half_to_float(static_cast<const uint16_t*>(rows)[from])
                                                      : static_cast<const float*>(rows)[from];
                    std::memcpy(to + at * 4, &value, 4);
                }
            }
        }
    }

    size_t inputs() const { return inputs_; }
    size_t outputs() const { return outputs_; }
    size_t panels() const { return whole_panels(outputs_) / kPanel; }
    bool halves() const { return halves_; }
    const char* data() const { return memory_.get(); }

private:
    size_t inputs_ = 0, outputs_ = 0;
    bool halves_ = false;
    std::shared_ptr<char> memory_;
};

// y [R, P panels] from x [R,K], both with rows so far apart. Halves: panels in 16 bits. ahead: what is asked for meanwhile, K / Asks
// lines of 64 bytes.
template <size_t R, size_t P, bool Halves, size_t Asks = 0>
BTP_AVX512 BTP_INLINE void multiply_panels(const float* x, size_t next_x, const char* panels, size_t inputs, float* y, size_t next_y,
                                           const char* ahead = nullptr)
{
    constexpr size_t kBytes = kPanel * (Halves ? 2 : 4);
    __m512 sums[R][P][2];
    for (size_t row = 0; row < R; ++row) {
        for (size_t panel = 0; panel < P; ++panel) {
            sums[row][panel][0] = sums[row][panel][1] = _mm512_setzero_ps();
        }
    }
    for (size_t place = 0; place < inputs; ++place) {
        __m512 w[P][2];
        if constexpr (Asks > 0) {
            if (place % Asks == 0) {
                _mm_prefetch(ahead + place / Asks * sizeof(Line), _MM_HINT_T1);
            }
        }
        for (size_t panel = 0; panel < P; ++panel) {
            const char* const at = panels + (panel * inputs + place) * kBytes;
            if (Halves) {
                w[panel][0] = _mm512_cvtph_ps(_mm256_load_si256(reinterpret_cast<const __m256i*>(at)));
                w[panel][1] = _mm512_cvtph_ps(_mm256_load_si256(reinterpret_cast<const __m256i*>(at + 32)));
            } else {
                w[panel][0] = _mm512_load_ps(at);
                w[panel][1] = _mm512_load_ps(at + 64);
            }
        }
        for (size_t row = 0; row < R; ++row) {
            const __m512 given = _mm512_set1_ps(x[row * next_x + place]);
            for (size_t panel = 0; panel < P; ++panel) {
                sums[row][panel][0] = _mm512_fmadd_ps(given, w[panel][0], sums[row][panel][0]);
                sums[row][panel][1] = _mm512_fmadd_ps(given, w[panel][1], sums[row][panel][1]);
            }
        }
    }
    for (size_t row = 0; row < R; ++row) {
        for (size_t panel = 0; panel < P; ++panel) {
            _mm512_storeu_ps(y + row * next_y + panel * kPanel, sums[row][panel][0]);
            _mm512_storeu_ps(y + row * next_y + panel * kPanel + 16, sums[row][panel][1]);
        }
    }
}

// All panels of few rows, P at a time: enough sums side by side to hide what one of them waits for.
template <size_t R, size_t P, bool Halves>
BTP_AVX512 inline void multiply_few_rows(const float* x, size_t next_x, const Panels& w, float* y, size_t next_y)
{
    const size_t bytes = w.inputs() * kPanel * (Halves ? 2 : 4);
    size_t panel = 0;
    for (; panel + P <= w.panels(); panel += P) {
        multiply_panels<R, P, Halves>(x, next_x, w.data() + panel * bytes, w.inputs(), y + panel * kPanel, next_y);
    }
    for (; panel < w.panels(); ++panel) {
        multiply_panels<R, 1, Halves>(x, next_x, w.data() + panel * bytes, w.inputs(), y + panel * kPanel, next_y);
    }
}

// One panel of R rows or fewer.
template <size_t R, bool Halves>
BTP_AVX512 BTP_INLINE void multiply_last_rows(const float* x, size_t next_x, size_t rows, const char* panel, size_t inputs, float* y,
                                              size_t next_y)
{
    if constexpr (R > 0) {
        if (rows == R) {
            multiply_panels<R, 1, Halves>(x, next_x, panel, inputs, y, next_y);
        } else {
            multiply_last_rows<R - 1, Halves>(x, next_x, rows, panel, inputs, y, next_y);
        }
    }
}

// y [rows, kPanel] = x times one panel of w, `next_y` apart. The first rows ask for the next panel, which may come from beyond
// the second cache, while this one is in the first.
template <bool Halves>
BTP_AVX512 inline void multiply_panel(const float* x, size_t next_x, size_t rows, const Panels& w, size_t panel, float* y,
                                      size_t next_y)
{
    const size_t lines = w.inputs() * sizeof(Line), parts = kPanel * (Halves ? 2 : 4) / sizeof(Line);
    const char* const weights = w.data() + panel * parts * lines;
    size_t row = 0;
    if (rows >= 2 * parts * kTile && w.inputs() % 2 == 0) {  // so many that each needs to ask for half as much
        for (; row < 2 * parts * kTile; row += kTile) {
            multiply_panels<kTile, 1, Halves, 2>(x + row * next_x, next_x, weights, w.inputs(), y + row * next_y, next_y,
                                                 weights + parts * lines + row / kTile * lines / 2);
        }
    }
    for (; row + kTile <= rows && row < parts * kTile; row += kTile) {
        multiply_panels<kTile, 1, Halves, 1>(x + row * next_x, next_x, weights, w.inputs(), y + row * next_y, next_y,
                                             weights + (parts + row / kTile) * lines);
    }
    for (; row + kTile <= rows; row += kTile) {
        multiply_panels<kTile, 1, Halves>(x + row * next_x, next_x, weights, w.inputs(), y + row * next_y, next_y);
    }
    multiply_last_rows<kTile - 1, Halves>(x + row * next_x, next_x, rows - row, weights, w.inputs(), y + row * next_y, next_y);
}

// A panel passes all rows before the next one is read: it comes from the second cache or beyond, and once.
template <bool Halves>
BTP_AVX512 inline void multiply_rows(const float* x, size_t next_x, size_t rows, const Panels& w, float* y, size_t next_y)
{
    switch (rows) {
    case 1: return multiply_few_rows<1, 4, Halves>(x, next_x, w, y, next_y);
    case 2: return multiply_few_rows<2, 4, Halves>(x, next_x, w, y, next_y);
    case 3: return multiply_few_rows<3, 2, Halves>(x, next_x, w, y, next_y);
    case 4: return multiply_few_rows<4, 2, Halves>(x, next_x, w, y, next_y);
    default: break;
    }
    for (size_t panel = 0; panel < w.panels(); ++panel) {
        multiply_panel<Halves>(x, next_x, rows, w, panel, y + panel * kPanel, next_y);
    }
}

// y [rows, whole_panels(N)] = x [rows,K] w^T; rows of x and of y lie next_x and next_y numbers apart.
inline void multiply(const float* x, size_t next_x, size_t rows, const Panels& w, float* y, size_t next_y)
{
    w.halves() ? multiply_rows<true>(x, next_x, rows, w, y, next_y) : multiply_rows<false>(x, next_x, rows, w, y, next_y);
}

// The same for one panel: y [rows,kPanel].
inline void multiply(const float* x, size_t next_x, size_t rows, const Panels& w, size_t panel, float* y, size_t next_y)
{
    w.halves() ? multiply_panel<true>(x, next_x, rows, w, panel, y, next_y)
               : multiply_panel<false>(x, next_x, rows, w, panel, y, next_y);
}

}  // namespace btp

BTP_QUIET_END
#endif
