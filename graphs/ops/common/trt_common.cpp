// Attribute checks of the TensorRT plugins.
#include "trt_common.h"

#include <cstring>

namespace btp {
namespace {

const char* type_name(nvinfer1::PluginFieldType type)
{
    using Type = nvinfer1::PluginFieldType;
    switch (type) {
    case Type::kFLOAT16: return "FLOAT16";
    case Type::kFLOAT32: return "FLOAT32";
    case Type::kFLOAT64: return "FLOAT64";
    case Type::kINT8: return "INT8";
    case Type::kINT16: return "INT16";
    case Type::kINT32: return "INT32";
    case Type::kINT64: return "INT64";
    case Type::kCHAR: return "STRING";
    default: return "another type";
    }
}

int32_t value_of(const std::string& op, const nvinfer1::PluginField& field)
{
    const auto wrong = [&](const std::string& got) {
        return std::invalid_argument(op + ": attribute " + field.name + " is " + got + ", wanted one INT");
    };
    const bool wide = field.type == nvinfer1::PluginFieldType::kINT64;
    if (!wide && field.type != nvinfer1::PluginFieldType::kINT32) {
        throw wrong(type_name(field.type));
    }
    if (field.length != 1 || field.data == nullptr) {
        throw wrong(std::to_string(field.length) + " values");
    }
    int64_t value = 0;
    if (wide) {
        std::memcpy(&value, field.data, sizeof value);
    } else {
        int32_t narrow = 0;
        std::memcpy(&narrow, field.data, sizeof narrow);
        value = narrow;
    }
    if (value < INT32_MIN || value > INT32_MAX) {
        throw wrong(std::to_string(value) + " (not a 32-bit value)");
    }
    return static_cast<int32_t>(value);
}

// The place among `choices` of a text of field.length characters, of which a zero at the end may be one.
int32_t choice_of(const std::string& op, const nvinfer1::PluginField& field, const char* const* choices)
{
    if (field.type != nvinfer1::PluginFieldType::kCHAR || field.data == nullptr) {
        throw std::invalid_argument(op + ": attribute " + field.name + " is " + type_name(field.type)
                                    + ", wanted one STRING");
    }
    const auto* const data = static_cast<const char*>(field.data);
    const std::string text(data, strnlen(data, static_cast<size_t>(field.length)));
    std::string wanted;
    for (int32_t place = 0; choices[place] != nullptr; ++place) {
        if (text == choices[place]) {
            return place;
        }
        wanted += (place > 0 ? " or \"" : "\"") + std::string(choices[place]) + "\"";
    }
    throw std::invalid_argument(op + ": " + field.name + " is \"" + text + "\", wanted " + wanted);
}

const nvinfer1::PluginField* find(const nvinfer1::PluginFieldCollection* fields, const char* name)
{
    const nvinfer1::PluginField* found = nullptr;
    for (int32_t i = 0; fields != nullptr && i < fields->nbFields; ++i) {
        if (fields->fields[i].name != nullptr && std::strcmp(fields->fields[i].name, name) == 0) {
            found = &fields->fields[i];
        }
    }
    return found;
}

}  // namespace

std::vector<int32_t> read_attributes(const std::string& op, const std::vector<Attribute>& attributes,
                                     const nvinfer1::PluginFieldCollection* fields)
{
    std::vector<int32_t> values;
    for (const Attribute& attribute : attributes) {
        const nvinfer1::PluginField* const found = find(fields, attribute.name);
        if (found == nullptr && !attribute.optional) {
            throw std::invalid_argument(op + ": attribute " + attribute.name + " is missing, wanted one INT");
        }
        values.push_back(found == nullptr               ? 0
                         : attribute.choices != nullptr ? choice_of(op, *found, attribute.choices)
                                                        : value_of(op, *found));
    }
    return values;
}

nvinfer1::PluginField field_of(const Attribute& attribute, const int32_t* value)
{
    if (attribute.choices == nullptr) {
        return {attribute.name, value, nvinfer1::PluginFieldType::kINT32, 1};
    }
    const char* const text = attribute.choices[value == nullptr ? 0 : *value];
    return {attribute.name, value == nullptr ? nullptr : text, nvinfer1::PluginFieldType::kCHAR,
            static_cast<int32_t>(std::strlen(text))};
}

void require_rank(const std::string& op, const char* input, int32_t got, int32_t wanted, bool exact)
{
    if (got < wanted || (exact && got > wanted)) {
        throw std::invalid_argument(op + ": " + input + " has " + std::to_string(got) + " dimensions, wanted "
                                    + std::to_string(wanted) + (exact ? "" : " or more"));
    }
}

void require_same(const std::string& op, const char* what, int64_t got, int64_t wanted)
{
    if (got != wanted) {
        throw std::invalid_argument(op + ": " + what + " is " + std::to_string(got) + ", wanted "
                                    + std::to_string(wanted));
    }
}

}  // namespace btp
