// Test only: what TensorRT relies on in the plugin of BtpLinear, for contract.cpp.
#pragma once

#include "contract_tools.h"

namespace {

const Given kLinear{{"bits", 4}, {"group", 16}};

// Shapes of a product of K 48 and N 5: three groups, so two bytes of zeros a row, which are three words in all.
const std::vector<std::vector<int64_t>> kLinearInputs{{2, 48}, {5, 6}, {5, 3}, {3}, {5}};

void check_linear_formats(IPluginV3& plugin)
{
    using D = DataType;
    for (const D type : {D::kFLOAT, D::kHALF, D::kBF16}) {
        const std::vector<D> all{type, D::kINT32, type, D::kINT32, type, type};
        for (int32_t position = 0; position < 6; ++position) {
            check(takes(plugin, position, all), "types of a product with zeros and bias");
        }
        check(takes(plugin, 3, {type, D::kINT32, type, type, type}), "a fourth input may be the bias");
        check(takes(plugin, 3, {type, D::kINT32, type, D::kINT32, type}), "a fourth input may be the zeros");
        D out = D::kINT32;
        check(build(plugin).getOutputDataTypes(&out, 1, &type, 3) == 0 && out == type, "y has the type of x");
    }
    check(!takes(plugin, 0, {D::kINT32, D::kINT32, D::kINT32, D::kINT32}), "no integer x");
    check(!takes(plugin, 1, {D::kHALF, D::kUINT8, D::kHALF, D::kHALF}), "packed weights are int32 words");
    check(!takes(plugin, 2, {D::kHALF, D::kINT32, D::kFLOAT, D::kHALF}), "scales have the type of x");
    check(!takes(plugin, 3, {D::kHALF, D::kINT32, D::kHALF, D::kFLOAT, D::kHALF}), "no bias of another type");
    check(!takes(plugin, 0, {D::kHALF, D::kINT32, D::kHALF, D::kHALF}, TensorFormat::kCHW32), "linear tensors only");
}

void check_linear_sizes(IPluginV3& plugin)
{
    using D = DataType;
    const auto tried = [&](const std::vector<PluginTensorDesc>& in) {
        const PluginTensorDesc out = desc(D::kHALF, {2, 5});
        messages.forget();
        return runtime(plugin).onShapeChange(in.data(), static_cast<int32_t>(in.size()), &out, 1) == 0;
    };
    const auto x = desc(D::kHALF, {2, 48}), qweight = desc(D::kINT32, {5, 6}), scales = desc(D::kHALF, {5, 3});
    check(tried({x, qweight, scales}), "sizes that fit are taken");
    check(tried({x, qweight, scales, desc(D::kINT32, {3})}), "zeros alone: " + messages.text());
    check(tried({x, qweight, scales, desc(D::kHALF, {5})}), "bias alone: " + messages.text());
    check(!tried({x, qweight, scales, desc(D::kINT32, {5})}), "another number of zeros");
    check(messages.text().find("the number of words of zeros is 5, wanted 3") != std::string::npos, messages.text());
    check(!tried({x, qweight, scales, desc(D::kINT32, {3}), desc(D::kHALF, {4})}), "another number of biases");
    check(messages.text().find("dimension 0 of bias is 4, wanted 5") != std::string::npos, messages.text());
}

void check_linear(IPluginCreatorV3One& creator)
{
    const std::unique_ptr<IPluginV3> plugin(create(creator, Attributes(kLinear)));
    check(plugin != nullptr, "BtpLinear can be made: " + messages.text());
    if (plugin == nullptr) {
        return;
    }
    const auto inputs = [](std::vector<std::vector<int64_t>> changed, size_t count) {
        return changed.resize(count), changed;
    };
    for (size_t count = 3; count <= 5; ++count) {
        check(shape(*plugin, inputs(kLinearInputs, count)) == std::vector<int64_t>{2, 5}, "y is [M,N]");
    }
    check(shape(*plugin, {{-1, -1}, {-1, -1}, {-1, -1}}) == std::vector<int64_t>{-1, -1}, "open dimensions stay open");
    no_shape(*plugin, {{2, 40}, {5, 5}, {5, 3}}, "K) is 40, wanted a multiple of group 16");
    no_shape(*plugin, {{2, 48}, {5, 7}, {5, 3}}, "dimension 1 of qweight is 7, wanted 6");
    no_shape(*plugin, {{2, 48}, {5, 6}, {4, 3}}, "dimension 0 of scales is 4, wanted 5");
    no_shape(*plugin, {{2, 48}, {5, 6}, {5, 2}}, "dimension 1 of scales is 2, wanted 3");
    no_shape(*plugin, {{2, 48}, {5, 6}}, "got 2 inputs, wanted x, qweight, scales, zeros (optional), bias (optional)");
    no_shape(*plugin, {{2, 1, 48}, {5, 6}, {5, 3}}, "x has 3 dimensions, wanted 2");
    no_shape(*plugin, {{2, 48}, {5, 3, 2}, {5, 3}}, "qweight has 3 dimensions, wanted 2");
    no_shape(*plugin, {{2, 48}, {5, 6}, {5, 3}, {5, 2}}, "zeros or bias has 2 dimensions, wanted 1");
    refused(creator, Attributes(Given{{"bits", 4}}), "BtpLinear: attribute group is missing");
    refused(creator, Attributes(Given{{"bits", 8}, {"group", 16}}), "bits is 8, wanted 4");
    refused(creator, Attributes(Given{{"bits", 4}, {"group", 48}}), "group is 48, wanted 16, 32, 64, 128 or 256");
    refused(creator, Attributes(Given{{"bits", 4}, {"group", 0}}), "group is 0");
    check_linear_formats(*plugin);
    check_linear_sizes(*plugin);
    Given serialized = kLinear;
    serialized["inputs"] = 5;  // onShapeChange() was told
    round_trip(creator, *plugin, serialized, kLinearInputs);
}

// w is 1 at k = n and 0 elsewhere (code 3, zero 2, scale 1), so y is the first columns of x, + bias.
void run_linear(IPluginCreatorV3One& creator)
{
    const std::unique_ptr<IPluginV3> plugin(create(creator, Attributes(kLinear)));
    alignas(16) float x[2 * 48], scales[5 * 3], y[2 * 5] = {};
    alignas(16) uint32_t qweight[5 * 6], zeros[3];
    const float bias[5] = {0.5f, 1.5f, 2.5f, 3.5f, 4.5f};
    for (int i = 0; i < 2 * 48; ++i) {
        x[i] = static_cast<float>(i);
    }
    std::fill_n(scales, 15, 1.0f);
    std::fill_n(qweight, 30, 0x22222222u);
    std::fill_n(zeros, 3, 0x22222222u);
    for (int n = 0; n < 5; ++n) {
        qweight[6 * n] += 1u << (4 * n);
    }
    const std::vector<PluginTensorDesc> in{desc(DataType::kFLOAT, {2, 48}), desc(DataType::kINT32, {5, 6}),
                                           desc(DataType::kFLOAT, {5, 3}), desc(DataType::kINT32, {3}),
                                           desc(DataType::kFLOAT, {5})};
    const PluginTensorDesc out = desc(DataType::kFLOAT, {2, 5});
    check(runtime(*plugin).onShapeChange(in.data(), 5, &out, 1) == 0, "shapes are taken: " + messages.text());
    const std::unique_ptr<IPluginV3> loaded(
        creator.createPlugin("node", runtime(*plugin).getFieldsToSerialize(), TensorRTPhase::kRUNTIME));
    const void* const inputs[] = {x, qweight, scales, zeros, bias};
    void* const outputs[] = {y};
    check(runtime(*loaded).enqueue(in.data(), &out, inputs, outputs, nullptr, nullptr) == 0,
          "enqueue of a plugin from an engine: " + messages.text());
    for (int i = 0; i < 10; ++i) {
        check(y[i] == x[i / 5 * 48 + i % 5] + bias[i % 5], "y at " + std::to_string(i));
    }
}

}  // namespace
