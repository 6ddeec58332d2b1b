// All layers of a decoder with small weights, piece by piece (AVX-512).
//
// A piece is kQueries tokens. In a layer it attends to itself and to the pieces before it, never to those behind. So pieces
// follow one another through the stages (attention, MLP, the next layer's query, key and value), and a thread that has finished
// one takes the next, of the next stage where there is none left in this: nobody waits at the end of a layer, and threads are
// woken once for all of them.
#pragma once

#include "../causal_attention/cpu_attention.h"
#include "../decoder_rows/ort_layer.h"
#include "cpu_progress.h"

#ifdef BTP_X86
namespace btp {

struct Layer {
    Project project;
    Feed feed;
};

// One sample's tensors, [S,C] and [S,D/2].
struct Sample {
    const float *given, *cos, *sin;
    float* rows;                // of a piece: its own after each layer
    std::vector<Projected> to;  // of each layer; queries by token too
};

// Throws unless all layers have the same sizes, and heads that can attend.
inline void require_fitting(const std::vector<Layer>& layers, size_t head, const char* op)
{
    const size_t width = layers.empty() ? 0 : layers[0].project.width();
    const size_t queries = layers.empty() ? 0 : layers[0].project.outputs(0), keys = layers.empty() ? 0 : layers[0].project.outputs(1);
    bool fitting = keys > 0 && queries % keys == 0 && head % kVector == 0;
    for (const Layer& layer : layers) {
        const Project& project = layer.project;
        fitting = fitting && project.width() == width && project.outputs(0) == queries && project.outputs(1) == keys
                  && project.outputs(2) == keys && layer.feed.width() == width && layer.feed.context() == queries;
    }
    if (!fitting) {
        throw std::invalid_argument(std::string(op) + ": there are " + std::to_string(layers.size()) + " layers with heads of "
                                    + std::to_string(head) + ", wanted layers of the same sizes, heads of a multiple of 16, "
                                    + "and as many for each key");
    }
}

class LayersOnThreads {
public:
    LayersOnThreads(const std::vector<Layer>& layers, size_t head, const std::vector<Sample>& samples, size_t tokens)
        : layers_(layers), samples_(samples), head_(head), heads_(layers[0].project.outputs(0) / head),
          key_heads_(layers[0].project.outputs(1) / head), width_(layers[0].project.width()), tokens_(tokens),
          pieces_((tokens + kQueries - 1) / kQueries), progress_(pieces_)
    {
    }

    void run(const OrtKernelContext* context, const OrtValue* beside)
    {
        const size_t panels = LaidOut::floats(tokens_, head_), both = 2 * key_heads_;
        const StreamBuffer memory(context, beside, both * panels * sizeof(float));
        for (size_t place = 0; place < both; ++place) {
            seen_.emplace_back(static_cast<float*>(memory.data()) + place * panels, tokens_, head_);
        }
        const auto work = [&](int) {
            const size_t piece = std::max(layers_[0].feed.floats(kQueries), layers_[0].project.floats(kQueries));
            const size_t contexts = kQueries * heads_ * head_, attention = Attention::floats(tokens_, head_);
            const StreamBuffer memory(context, beside, (attention + contexts + piece) * sizeof(float));
            Scratch scratch(memory.data());
            Attention queries(scratch.take(attention), tokens_, head_);
            float* const contexts_of_piece = scratch.take(contexts);
            take_pieces(queries, contexts_of_piece, scratch);
        };
        if (tokens_ * (layers_[0].project.weights() + layers_[0].feed.weights()) < kWorthThreads) {
            return work(0);
        }
        parallel_for(context, static_cast<int>(pieces_), work);
    }

private:
    // context, scratch: memory of this thread for one piece's context, and for what is made on the way.
    void take_pieces(Attention& attention, float* context, Scratch scratch)
    {
        const size_t stages = layers_.size() + 1, all = samples_.size() * stages * pieces_;
        for (size_t taken = progress_.take(); taken < all; taken = progress_.take()) {
            const size_t stage = taken / pieces_;
            try {
                if (!pass(samples_[stage / stages], stage, stage % stages, taken % pieces_, attention, context, scratch)) {
                    return;
                }
            } catch (...) {
                progress_.fail();
                throw;
            }
        }
    }

    // A piece through attention and MLP of the layer before, and the products of `layer`: the first has none before it, and
    // behind the last are no products. stage: of all samples. false where another thread has failed.
    bool pass(const Sample& sample, size_t stage, size_t layer, size_t piece, Attention& attention, float* context, Scratch scratch)
    {
        const size_t first = piece * kQueries, count = std::min(kQueries, tokens_ - first);
        float* const rows = sample.rows + first * width_;
        const float* now = layer > 1 ? rows : sample.given + first * width_;
        if (!progress_.wait(piece + 1, stage)) {
            return false;
        }
        if (layer > 0) {
            const size_t apart = heads_ * head_;
            const float* const queries = sample.to[layer - 1].by_token[0] + first * apart;
            for (size_t head = 0; head < heads_; ++head) {
                const LaidOut& seen = laid_out(stage - 1, head / (heads_ / key_heads_));
                attention.run(seen, first, queries + head * head_, apart, context + head * head_);
            }
            layers_[layer - 1].feed.run(context, now, count, rows, scratch);
            now = rows;
        }
        if (layer < layers_.size()) {
            if (!progress_.wait(pieces_, stage)) {  // with what is laid out where this stage's keys go
                return false;
            }
            project(sample, stage, layer, first, count, now, scratch);
        }
        progress_.finish(piece);
        return true;
    }

    void project(const Sample& sample, size_t stage, size_t layer, size_t first, size_t count, const float* rows, Scratch scratch)
    {
        const Projected& to = sample.to[layer];
        layers_[layer].project.run(rows, first, count, sample.cos, sample.sin, to, scratch);
        for (size_t head = 0; head < key_heads_; ++head) {
            const float* const keys = to.by_head[1] + (head * to.room[1] + first) * head_;
            const float* const values = to.by_head[2] + (head * to.room[2] + first) * head_;
            laid_out(stage, head).block(first, keys, values, head_);
        }
    }

    // What a stage lays out is read in the next one, while that lays out its own.
    LaidOut& laid_out(size_t stage, size_t head) { return seen_[stage % 2 * key_heads_ + head]; }

    const std::vector<Layer>& layers_;
    const std::vector<Sample>& samples_;
    const size_t head_, heads_, key_heads_, width_, tokens_, pieces_;
    Progress progress_;
    std::vector<LaidOut> seen_;
};

}  // namespace btp
#endif
