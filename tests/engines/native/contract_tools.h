// Test only: the parser's and the builder's side of a plugin, for contract.cpp.
#pragma once

#include "contract.h"

namespace {

// --- the other side of the creators -------------------------------------------------------------------------------------

struct Attributes {
    std::deque<int32_t> values;
    std::vector<PluginField> fields;
    PluginFieldCollection collection{};

    explicit Attributes(const std::map<std::string, int32_t>& given)
    {
        for (const auto& item : given) {
            values.push_back(item.second);
            fields.emplace_back(item.first.c_str(), &values.back(), PluginFieldType::kINT32, 1);
        }
    }
    const PluginFieldCollection* get()
    {
        collection.nbFields = static_cast<int32_t>(fields.size());
        collection.fields = fields.data();
        return &collection;
    }
    PluginField& field(const std::string& name)
    {
        for (PluginField& f : fields) {
            if (name == f.name) {
                return f;
            }
        }
        std::abort();
    }
};

using Given = std::map<std::string, int32_t>;

IPluginV3* create(IPluginCreatorV3One& creator, Attributes attributes)
{
    messages.forget();
    return creator.createPlugin("node", attributes.get(), TensorRTPhase::kBUILD);
}

void refused(IPluginCreatorV3One& creator, Attributes attributes, const std::string& part)
{
    const std::unique_ptr<IPluginV3> plugin(create(creator, std::move(attributes)));
    check(plugin == nullptr, "a plugin was made although " + part);
    check(messages.text().find(part) != std::string::npos, "wanted '" + part + "' in: " + messages.text());
}

IPluginV3OneBuild& build(IPluginV3& plugin)
{
    return *static_cast<IPluginV3OneBuild*>(plugin.getCapabilityInterface(PluginCapabilityType::kBUILD));
}

IPluginV3OneRuntime& runtime(IPluginV3& plugin)
{
    return *static_cast<IPluginV3OneRuntime*>(plugin.getCapabilityInterface(PluginCapabilityType::kRUNTIME));
}

// Output shape, or {} if the plugin refuses the inputs.
std::vector<int64_t> shape(IPluginV3& plugin, const std::vector<std::vector<int64_t>>& inputs)
{
    Expressions builder;
    std::vector<DimsExprs> in;
    for (const auto& dims : inputs) {
        in.push_back(builder.dims(dims));
    }
    DimsExprs out{};
    messages.forget();
    const int32_t status = build(plugin).getOutputShapes(
        in.data(), static_cast<int32_t>(in.size()), nullptr, 0, &out, 1, builder);
    std::vector<int64_t> result;
    for (int32_t i = 0; status == 0 && i < out.nbDims; ++i) {
        result.push_back(out.d[i]->isConstant() ? out.d[i]->getConstantValue() : -1);
    }
    return result;
}

void no_shape(IPluginV3& plugin, const std::vector<std::vector<int64_t>>& inputs, const std::string& part)
{
    check(shape(plugin, inputs).empty(), "a shape was given although " + part);
    check(messages.text().find(part) != std::string::npos, "wanted '" + part + "' in: " + messages.text());
}

DynamicPluginTensorDesc tensor(DataType type, TensorFormat format = TensorFormat::kLINEAR)
{
    DynamicPluginTensorDesc result{};
    result.desc.type = type;
    result.desc.format = format;
    return result;
}

bool takes(IPluginV3& plugin, int32_t position, const std::vector<DataType>& types,
           TensorFormat format = TensorFormat::kLINEAR)
{
    std::vector<DynamicPluginTensorDesc> tensors;
    for (const DataType type : types) {
        tensors.push_back(tensor(type, format));
    }
    return build(plugin).supportsFormatCombination(position, tensors.data(), static_cast<int32_t>(types.size()) - 1, 1);
}

PluginTensorDesc desc(DataType type, const std::vector<int64_t>& dims)
{
    PluginTensorDesc result{};
    result.type = type;
    result.format = TensorFormat::kLINEAR;
    result.dims.nbDims = static_cast<int32_t>(dims.size());
    for (size_t i = 0; i < dims.size(); ++i) {
        result.dims.d[i] = dims[i];
    }
    return result;
}

// Serialised fields recreate the same plugin: same attributes again, same shapes. `rule`: what diversity_rule must be.
void round_trip(IPluginCreatorV3One& creator, IPluginV3& plugin, const Given& given,
                const std::vector<std::vector<int64_t>>& inputs, const std::string& rule = "")
{
    const PluginFieldCollection* const fields = runtime(plugin).getFieldsToSerialize();
    check(fields->nbFields == static_cast<int32_t>(given.size()) + (rule.empty() ? 0 : 1), "attributes are serialised once");
    for (int32_t i = 0; i < fields->nbFields; ++i) {
        const PluginField& field = fields->fields[i];
        const auto found = given.find(field.name);
        const bool text = found == given.end() && field.type == PluginFieldType::kCHAR
                          && rule == std::string(static_cast<const char*>(field.data), static_cast<size_t>(field.length));
        check(text || (found != given.end() && field.type == PluginFieldType::kINT32 && field.length == 1
                       && *static_cast<const int32_t*>(field.data) == found->second),
              std::string("serialised attribute ") + field.name);
    }
    const std::unique_ptr<IPluginV3> again(creator.createPlugin("node", fields, TensorRTPhase::kRUNTIME));
    const std::unique_ptr<IPluginV3> copy(plugin.clone());
    const std::unique_ptr<IPluginV3> attached(runtime(plugin).attachToContext(nullptr));
    for (IPluginV3* other : {again.get(), copy.get(), attached.get()}) {
        check(other != nullptr && shape(*other, inputs) == shape(plugin, inputs), "a copy gives the same shapes");
    }
    auto& core = *static_cast<IPluginV3OneCore*>(plugin.getCapabilityInterface(PluginCapabilityType::kCORE));
    check(std::string(core.getPluginName()) == creator.getPluginName() && std::string(core.getPluginVersion()) == "1"
              && std::string(core.getPluginNamespace()).empty(), "name, version and namespace");
}

}  // namespace
