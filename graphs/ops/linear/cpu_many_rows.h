// Products of many float32 rows with float32 weights as they are stored (AVX-512).
//
// Weights are laid out for the tiles while they are multiplied, 32 columns and 256 places at a time, and forgotten: a
// session packs nothing when it opens, holds no copy, and all sessions share the file's pages. That costs 64 reads and 32
// shuffles for 256 weights, which many rows outweigh.
#pragma once

#include "../common/cpu_tiles.h"

#ifdef BTP_X86
BTP_QUIET_INTRINSICS

namespace btp {

constexpr size_t kDepth = 256;      // places of K: 32 columns of them fill two thirds of the first cache
constexpr size_t kTogether = 768;   // rows at most: with kDepth places, and with their sums, they stay in the second cache
constexpr size_t kWidest = 256;     // columns whose sums stay there

// Rows [first, last) of x [M,K], laid out: for each kDepth places the panels of RowPanels(last - first).
struct Rows {
    const float* laid_out;
    size_t count;
};

// One panel of rows for all of K.
BTP_AVX512 inline void lay_out_panel(const float* x, size_t inputs, const RowPanels& panels, size_t rows, size_t panel, float* to)
{
    const size_t first = panels.first(panel), height = panels.height(panel);
    for (size_t place = 0; place < inputs; place += kDepth) {
        const size_t depth = std::min(kDepth, inputs - place);
        lay_out_rows(x + first * inputs + place, inputs, height, depth, to + place * rows + first * depth);
    }
}

// Floats of scratch that multiply_block needs.
inline size_t block_scratch(size_t rows, size_t columns) { return kTileColumns * kDepth + rows * columns; }

// y [rows, columns], rows `next` apart, of weights [columns,K]. columns: a multiple of 32, K one of 16. scratch: 64 bytes aligned.
BTP_AVX512 inline void multiply_block(const Rows& x, size_t inputs, const float* weights, size_t columns, float* y,
                                      size_t next, float* scratch)
{
    const RowPanels panels(x.count);
    float* const sums = scratch + kTileColumns * kDepth;  // tile after tile
    for (size_t place = 0; place < inputs; place += kDepth) {
        const size_t depth = std::min(kDepth, inputs - place);
        const bool last = place + depth == inputs;
        for (size_t column = 0; column < columns; column += kTileColumns) {
            for (size_t half = 0; half < kTileColumns; half += kVector) {
                const float* const stored = weights + (column + half) * inputs + place;
                for (size_t step = 0; step < depth; step += kVector) {
                    turn(stored + step, inputs, scratch + step * kTileColumns + half, kTileColumns);
                }
            }
            // Meanwhile the next 32 columns, or places, come nearer, some of them with each panel.
            const bool end = column + kTileColumns == columns;
            const float* const coming = weights + (end ? 0 : (column + kTileColumns) * inputs) + place + (end ? depth : 0);
            const size_t wanted = end && last ? 0 : kTileColumns, share = (wanted + panels.count - 1) / panels.count;
            for (size_t panel = 0; panel < panels.count; ++panel) {
                const size_t asked = std::min(panel * share, wanted), some = std::min(share, wanted - asked);
                const size_t first = panels.first(panel), height = panels.height(panel);
                float* const own = sums + first * columns + column * height;
                multiply_tile(height, {x.laid_out + place * x.count + first * depth, scratch, depth,
                                       place == 0 ? nullptr : own, last ? y + first * next + column : own,
                                       last ? next : kTileColumns,
                                       {coming + asked * inputs, inputs, some}});
            }
        }
    }
}

}  // namespace btp

BTP_QUIET_END
#endif
