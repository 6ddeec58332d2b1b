// Test only: what contract.cpp needs of TensorRT's side: a builder of dimension expressions, and the plugin's messages.
#pragma once

#include <NvInferRuntime.h>

#include <dlfcn.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <string>
#include <vector>

using namespace nvinfer1;

namespace {

int failures = 0;

void check(bool holds, const std::string& what)
{
    if (!holds) {
        ++failures;
        std::printf("FAILED: %s\n", what.c_str());
    }
}

// --- a builder of dimension expressions -------------------------------------------------------------------------------

class Dimension : public IDimensionExpr, private apiv::VDimensionExpr {
public:
    Dimension(bool known, int64_t value) : known_(known), value_(value) { mImpl = this; }

private:
    bool isConstant() const override { return known_; }
    int64_t getConstantValue() const override { return value_; }
    bool isSizeTensor() const override { return false; }
    bool known_;
    int64_t value_;
};

class Expressions : public IExprBuilder, private apiv::VExprBuilder {
public:
    Expressions() { mImpl = this; }

    const IDimensionExpr* make(int64_t value)  // negative: not known
    {
        all_.push_back(std::make_unique<Dimension>(value >= 0, value));
        return all_.back().get();
    }

    DimsExprs dims(const std::vector<int64_t>& values)
    {
        DimsExprs result{};
        result.nbDims = static_cast<int32_t>(values.size());
        for (size_t i = 0; i < values.size(); ++i) {
            result.d[i] = make(values[i]);
        }
        return result;
    }

private:
    const IDimensionExpr* constant(int64_t value) override { return make(value); }
    const IDimensionExpr* declareSizeTensor(int32_t, const IDimensionExpr&, const IDimensionExpr&) override
    {
        return make(-1);
    }
    const IDimensionExpr* operation(DimensionOperation op, const IDimensionExpr& a, const IDimensionExpr& b) override
    {
        if (!a.isConstant() || !b.isConstant()) {
            return make(-1);
        }
        const int64_t x = a.getConstantValue();
        const int64_t y = b.getConstantValue();
        check(op == DimensionOperation::kSUM || op == DimensionOperation::kSUB, "only sums and differences are used");
        return make(op == DimensionOperation::kSUM ? x + y : x - y);
    }
    std::deque<std::unique_ptr<Dimension>> all_;
};

// --- the plugin's messages, which go to standard error -------------------------------------------------------------------

struct Messages {
    std::FILE* const file = std::tmpfile();

    Messages() { dup2(fileno(file), 2); }
    void forget()
    {
        std::fflush(stderr);
        std::rewind(file);
        if (ftruncate(fileno(file), 0) != 0) {
            std::abort();
        }
    }
    std::string text()
    {
        std::fflush(stderr);
        std::rewind(file);
        std::string all;
        for (int c = std::fgetc(file); c != EOF; c = std::fgetc(file)) {
            all += static_cast<char>(c);
        }
        return all;
    }
} messages;

}  // namespace
