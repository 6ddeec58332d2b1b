// What the TensorRT plugins share: attribute checks, the creator, serialisation, error reports. IPluginV3 only; one source
// for the headers of TensorRT 10.0.1 to 11.x. Needs no libnvinfer to link.
#pragma once

#include <NvInferRuntime.h>

#include <cstdint>
#include <exception>
#include <stdexcept>
#include <string>
#include <vector>

namespace btp {

// Prints a message through TensorRT's logger where one is known, on standard error otherwise. Never throws.
void report(const std::string& message) noexcept;

// Plugin entry points must not throw: an exception is reported and becomes `failed`.
template <typename Result, typename Body>
Result guarded(Result failed, Body body) noexcept
{
    try {
        return body();
    } catch (const std::exception& error) {
        report(error.what());
        return failed;
    }
}

inline void require_ok(const std::string& problem)
{
    if (!problem.empty()) {
        throw std::invalid_argument(problem);
    }
}

// The INT attributes `names` of operator `op`, from what the parser or an engine file hands over: every one must be there
// once, as one integer. Throws std::invalid_argument naming op, attribute, got and wanted.
std::vector<int32_t> read_attributes(const std::string& op, const std::vector<const char*>& names,
                                     const nvinfer1::PluginFieldCollection* fields);

// A dimension that must be known or is still open: its value, or `unknown`.
inline int32_t constant_or(const nvinfer1::IDimensionExpr* dimension, int32_t unknown)
{
    return dimension->isConstant() ? static_cast<int32_t>(dimension->getConstantValue()) : unknown;
}

void require_rank(const std::string& op, const char* input, int32_t got, int32_t wanted, bool exact = true);
void require_same(const std::string& op, const char* what, int64_t got, int64_t wanted);

inline bool is_linear(const nvinfer1::PluginTensorDesc& tensor)
{
    return tensor.format == nvinfer1::TensorFormat::kLINEAR;
}

// The half of a plugin that does not depend on the operator. Derived: constructed from the attributes' values in the
// order of Derived::names(), with Derived::kName.
template <typename Derived>
class Plugin : public nvinfer1::IPluginV3,
               public nvinfer1::IPluginV3OneCore,
               public nvinfer1::IPluginV3OneBuild,
               public nvinfer1::IPluginV3OneRuntime {
public:
    explicit Plugin(std::vector<int32_t> values) : values_(std::move(values))
    {
        for (size_t i = 0; i < values_.size(); ++i) {
            fields_.emplace_back(Derived::names()[i], &values_[i], nvinfer1::PluginFieldType::kINT32, 1);
        }
        collection_.nbFields = static_cast<int32_t>(fields_.size());
        collection_.fields = fields_.data();
    }

    Plugin(const Plugin&) = delete;
    Plugin& operator=(const Plugin&) = delete;

    nvinfer1::IPluginCapability* getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept override
    {
        switch (type) {
        case nvinfer1::PluginCapabilityType::kCORE: return static_cast<nvinfer1::IPluginV3OneCore*>(this);
        case nvinfer1::PluginCapabilityType::kBUILD: return static_cast<nvinfer1::IPluginV3OneBuild*>(this);
        case nvinfer1::PluginCapabilityType::kRUNTIME: return static_cast<nvinfer1::IPluginV3OneRuntime*>(this);
        }
        return nullptr;
    }

    nvinfer1::IPluginV3* clone() noexcept override
    {
        return guarded<nvinfer1::IPluginV3*>(nullptr, [this] { return new Derived(values_); });
    }

    const char* getPluginName() const noexcept override { return Derived::kName; }
    const char* getPluginVersion() const noexcept override { return "1"; }
    const char* getPluginNamespace() const noexcept override { return ""; }
    int32_t getNbOutputs() const noexcept override { return 1; }
    nvinfer1::IPluginV3* attachToContext(nvinfer1::IPluginResourceContext*) noexcept override { return clone(); }
    const nvinfer1::PluginFieldCollection* getFieldsToSerialize() noexcept override { return &collection_; }

    int32_t configurePlugin(const nvinfer1::DynamicPluginTensorDesc* in, int32_t inputs,
                            const nvinfer1::DynamicPluginTensorDesc*, int32_t) noexcept override
    {
        std::vector<nvinfer1::PluginTensorDesc> largest;
        for (int32_t i = 0; i < inputs; ++i) {
            largest.push_back(in[i].desc);
            largest.back().dims = in[i].max;
        }
        return accept(largest.data(), inputs);
    }

    int32_t onShapeChange(const nvinfer1::PluginTensorDesc* in, int32_t inputs, const nvinfer1::PluginTensorDesc*,
                          int32_t) noexcept override
    {
        return accept(in, inputs);
    }

protected:
    const std::vector<int32_t>& values() const { return values_; }

private:
    int32_t accept(const nvinfer1::PluginTensorDesc* in, int32_t inputs) noexcept
    {
        return guarded<int32_t>(-1, [&] {
            static_cast<const Derived*>(this)->sizes(in, inputs);
            return 0;
        });
    }

    const std::vector<int32_t> values_;
    std::vector<nvinfer1::PluginField> fields_;
    nvinfer1::PluginFieldCollection collection_{};
};

template <typename Derived>
class Creator : public nvinfer1::IPluginCreatorV3One {
public:
    Creator()
    {
        for (const char* name : Derived::names()) {
            fields_.emplace_back(name, nullptr, nvinfer1::PluginFieldType::kINT32, 1);
        }
        collection_.nbFields = static_cast<int32_t>(fields_.size());
        collection_.fields = fields_.data();
    }

    nvinfer1::IPluginV3* createPlugin(const char*, const nvinfer1::PluginFieldCollection* fields,
                                      nvinfer1::TensorRTPhase) noexcept override
    {
        return guarded<nvinfer1::IPluginV3*>(
            nullptr, [&] { return new Derived(read_attributes(Derived::kName, Derived::names(), fields)); });
    }

    const nvinfer1::PluginFieldCollection* getFieldNames() noexcept override { return &collection_; }
    const char* getPluginName() const noexcept override { return Derived::kName; }
    const char* getPluginVersion() const noexcept override { return "1"; }
    const char* getPluginNamespace() const noexcept override { return ""; }

private:
    std::vector<nvinfer1::PluginField> fields_;
    nvinfer1::PluginFieldCollection collection_{};
};

// The creators of this library, one function in each operator's folder.
nvinfer1::IPluginCreatorV3One& select_tokens_creator();
nvinfer1::IPluginCreatorV3One& gather_tokens_creator();

}  // namespace btp
