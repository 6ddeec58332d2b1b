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

// One attribute of an operator; its value is an integer, in all that follows.
struct Attribute {
    const char* name;
    const char* const* choices = nullptr;  // of a STRING: what it may be (null behind the last), by place; else it is an INT
    bool optional = false;                 // where it is missing it is 0
    bool serialized_only = false;          // the plugin's own note to itself: engines carry it, graphs do not
};

// The values of the attributes of operator `op`, from what the parser or an engine file hands over: one integer or one text
// each. Throws std::invalid_argument naming op, attribute, got and wanted.
std::vector<int32_t> read_attributes(const std::string& op, const std::vector<Attribute>& attributes,
                                     const nvinfer1::PluginFieldCollection* fields);

// The field for an attribute, with its value at `value` or, null, without one (as creators list them).
nvinfer1::PluginField field_of(const Attribute& attribute, const int32_t* value);

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
// order of Derived::attributes_of(), with Derived::kName.
template <typename Derived>
class Plugin : public nvinfer1::IPluginV3,
               public nvinfer1::IPluginV3OneCore,
               public nvinfer1::IPluginV3OneBuild,
               public nvinfer1::IPluginV3OneRuntime {
public:
    explicit Plugin(std::vector<int32_t> values) : values_(std::move(values))
    {
        for (size_t i = 0; i < values_.size(); ++i) {
            fields_.push_back(field_of(Derived::attributes_of()[i], &values_[i]));
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
        static_cast<Derived*>(this)->note_inputs(inputs);
        return accept(largest.data(), inputs);
    }

    int32_t onShapeChange(const nvinfer1::PluginTensorDesc* in, int32_t inputs, const nvinfer1::PluginTensorDesc*,
                          int32_t) noexcept override
    {
        static_cast<Derived*>(this)->note_inputs(inputs);
        return accept(in, inputs);
    }

    // How many inputs the node has; a plugin whose enqueue() wants to know writes it to one of its values.
    void note_inputs(int32_t) noexcept {}

protected:
    const std::vector<int32_t>& values() const { return values_; }
    void set_value(size_t place, int32_t value) { values_[place] = value; }

private:
    int32_t accept(const nvinfer1::PluginTensorDesc* in, int32_t inputs) noexcept
    {
        return guarded<int32_t>(-1, [&] {
            static_cast<const Derived*>(this)->sizes(in, inputs);
            return 0;
        });
    }

    std::vector<int32_t> values_;
    std::vector<nvinfer1::PluginField> fields_;
    nvinfer1::PluginFieldCollection collection_{};
};

template <typename Derived>
class Creator : public nvinfer1::IPluginCreatorV3One {
public:
    Creator()
    {
        for (const Attribute& attribute : Derived::attributes_of()) {
            if (!attribute.serialized_only) {
                fields_.push_back(field_of(attribute, nullptr));
            }
        }
        collection_.nbFields = static_cast<int32_t>(fields_.size());
        collection_.fields = fields_.data();
    }

    nvinfer1::IPluginV3* createPlugin(const char*, const nvinfer1::PluginFieldCollection* fields,
                                      nvinfer1::TensorRTPhase) noexcept override
    {
        return guarded<nvinfer1::IPluginV3*>(
            nullptr, [&] { return new Derived(read_attributes(Derived::kName, Derived::attributes_of(), fields)); });
    }

    const nvinfer1::PluginFieldCollection* getFieldNames() noexcept override { return &collection_; }
    const char* getPluginName() const noexcept override { return Derived::kName; }
    const char* getPluginVersion() const noexcept override { return "1"; }
    const char* getPluginNamespace() const noexcept override { return ""; }

private:
    std::vector<nvinfer1::PluginField> fields_;
    nvinfer1::PluginFieldCollection collection_{};
};

// The creators of a library: the trt_plugin.cpp of each operator's folder adds its own with BTP_REGISTER_PLUGIN. So a
// library holds the operators whose sources it is linked from, and no list names them.
inline std::vector<nvinfer1::IPluginCreatorV3One*>& creators()
{
    static std::vector<nvinfer1::IPluginCreatorV3One*> all;
    return all;
}

template <typename Derived>
struct PluginRegistration {
    PluginRegistration() { creators().push_back(&creator); }
    Creator<Derived> creator;
};

// The priority puts it before trt_static.cpp's initialiser, which hands the creators to TensorRT.
#define BTP_REGISTER_PLUGIN(Derived) \
    PluginRegistration<Derived> registration __attribute__((init_priority(2000)))

}  // namespace btp
