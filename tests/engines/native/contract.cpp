// Test only: what TensorRT relies on in a plugin library, checked with the headers alone.
//
//   contract LIBRARY [run]     `run`: LIBRARY holds the emulated kernels, so enqueue() is called too
//
// Loads the library as IPluginRegistry::loadLibrary does, then plays the parser and the builder: creators, fields, output
// shapes, formats, wrong attributes, clone, serialise and recreate. Prints one line for every check that fails.
#include "contract_linear.h"

#include <dlfcn.h>

namespace {

const Given kSelect{{"keep", 3}, {"attention_quota", 1}, {"diversity_quota", 1}, {"pool", 2}, {"boundary", 3}};
const Given kGather{{"start", 1}, {"count", 4}};

// The attributes that may be missing.
void check_rule(IPluginCreatorV3One& creator, const std::vector<std::vector<int64_t>>& full)
{
    Given given = kSelect;
    given["weighted"] = 1;
    const auto with = [&given](const char* text, int32_t length) {
        Attributes attributes(given);
        attributes.fields.emplace_back("diversity_rule", text, PluginFieldType::kCHAR, length);
        return attributes;
    };
    const std::unique_ptr<IPluginV3> plugin(create(creator, with("coverage", 8)));
    check(plugin != nullptr, "a plugin with coverage: " + messages.text());
    Given serialized = given;
    serialized["inputs"] = 0;
    round_trip(creator, *plugin, serialized, full, "coverage");
    const std::unique_ptr<IPluginV3> ended(create(creator, with("farthest", 9)));
    check(ended != nullptr, "a zero at the end of a text is none of it: " + messages.text());
    refused(creator, with("cover", 5), "diversity_rule is \"cover\", wanted \"farthest\" or \"coverage\"");
    given["weighted"] = 2;
    refused(creator, with("coverage", 8), "weighted is 2, wanted 0 or 1");
    given["weighted"] = 1;
    given["diversity_rule"] = 1;
    refused(creator, Attributes(given), "attribute diversity_rule is INT32, wanted one STRING");
}

void check_select(IPluginCreatorV3One& creator)
{
    const std::unique_ptr<IPluginV3> plugin(create(creator, Attributes(kSelect)));
    check(plugin != nullptr, "BtpSelectTokens can be made: " + messages.text());
    if (plugin == nullptr) {
        return;
    }
    const std::vector<std::vector<int64_t>> full{{2, 5}, {2, 5, 5}, {2}};
    check(shape(*plugin, {{2, 5}, {2, 5, 5}}) == std::vector<int64_t>{2, 3}, "indices are [B,keep]");
    check(shape(*plugin, full) == std::vector<int64_t>{2, 3}, "seeds change no shape");
    check(shape(*plugin, {{-1, -1}, {-1, -1, -1}}) == std::vector<int64_t>{-1, 3}, "open dimensions stay open");
    no_shape(*plugin, {{2, 2}, {2, 2, 2}}, "keep is 3, wanted 1 to 2");
    no_shape(*plugin, {{2, 5}}, "diversity_quota is 1, wanted 0, because there is no similarity");
    no_shape(*plugin, {{2, 5}, {2, 5, 4}}, "a dimension of similarity is 4, wanted 5");
    no_shape(*plugin, {{5}, {2, 5, 5}}, "scores has 1 dimensions, wanted 2");
    no_shape(*plugin, {{2, 5}, {5, 5}}, "similarity has 2 dimensions, wanted 3");
    no_shape(*plugin, {{2, 5}, {2, 5, 5}, {1, 2}}, "seeds has 2 dimensions, wanted 1");
    for (const char* name : {"keep", "attention_quota", "diversity_quota", "pool", "boundary"}) {
        Given without = kSelect;
        without.erase(name);
        refused(creator, Attributes(without), std::string("BtpSelectTokens: attribute ") + name + " is missing");
        Attributes wrong(kSelect);
        static const float number = 2.0f;
        wrong.field(name) = PluginField(name, &number, PluginFieldType::kFLOAT32, 1);
        refused(creator, std::move(wrong), std::string("attribute ") + name + " is FLOAT32, wanted one INT");
        Attributes many(kSelect);
        many.field(name).length = 2;
        refused(creator, std::move(many), std::string("attribute ") + name + " is 2 values, wanted one INT");
    }
    const auto with = [](const char* name, int32_t value) {
        Given changed = kSelect;
        changed[name] = value;
        return Attributes(changed);
    };
    refused(creator, with("keep", 0), "keep is 0, wanted at least 1");
    refused(creator, with("attention_quota", -1), "attention_quota is -1");
    refused(creator, with("pool", 0), "pool is 0, wanted at least attention_quota = 1");
    refused(creator, with("boundary", -3), "boundary is -3");
    using D = DataType;
    check(takes(*plugin, 0, {D::kFLOAT, D::kFLOAT, D::kINT32, D::kINT32}), "float32 scores");
    check(!takes(*plugin, 0, {D::kHALF, D::kFLOAT, D::kINT32, D::kINT32}), "no float16 scores");
    check(takes(*plugin, 1, {D::kFLOAT, D::kHALF, D::kINT32, D::kINT32}), "float16 similarity");
    check(!takes(*plugin, 1, {D::kFLOAT, D::kINT32, D::kINT32, D::kINT32}), "no integer similarity");
    check(takes(*plugin, 2, {D::kFLOAT, D::kFLOAT, D::kINT32, D::kINT32}), "int32 seeds");
    check(takes(*plugin, 1, {D::kFLOAT, D::kINT32}), "int32 indices right after the scores");
    check(!takes(*plugin, 1, {D::kFLOAT, D::kFLOAT}), "no float32 indices");
    check(!takes(*plugin, 0, {D::kFLOAT, D::kINT32}, TensorFormat::kCHW32), "linear tensors only");
    const std::vector<PluginTensorDesc> in{desc(D::kFLOAT, {2, 5}), desc(D::kFLOAT, {2, 5, 5})};
    const PluginTensorDesc out = desc(D::kINT32, {2, 3});
    check(runtime(*plugin).onShapeChange(in.data(), 2, &out, 1) == 0, "sizes that fit are taken");
    const std::vector<PluginTensorDesc> narrow{desc(D::kFLOAT, {2, 2}), desc(D::kFLOAT, {2, 2, 2})};
    check(runtime(*plugin).onShapeChange(narrow.data(), 2, &out, 1) != 0, "keep above V is refused at run time too");
    DataType type = D::kFLOAT;
    check(build(*plugin).getOutputDataTypes(&type, 1, nullptr, 2) == 0 && type == D::kINT32, "indices are int32");
    Given serialized = kSelect;
    serialized["weighted"] = 0;
    serialized["inputs"] = 2;  // onShapeChange() was told
    round_trip(creator, *plugin, serialized, full, "farthest");
    check_rule(creator, full);
}

void check_gather(IPluginCreatorV3One& creator)
{
    const std::unique_ptr<IPluginV3> plugin(create(creator, Attributes(kGather)));
    check(plugin != nullptr, "BtpGatherTokens can be made: " + messages.text());
    if (plugin == nullptr) {
        return;
    }
    const std::vector<std::vector<int64_t>> full{{2, 7, 8}, {2, 3}};
    check(shape(*plugin, full) == std::vector<int64_t>{2, 6, 8}, "output is [B,S-count+k,...]");
    check(shape(*plugin, {{2, 7}, {2, 3}}) == std::vector<int64_t>{2, 6}, "tokens may be [B,S]");
    check(shape(*plugin, {{-1, -1, 8}, {-1, -1}}) == std::vector<int64_t>{-1, -1, 8}, "open dimensions stay open");
    no_shape(*plugin, {{2, 4, 8}, {2, 3}}, "count is 4, wanted 0 to 3");
    no_shape(*plugin, {{2, 7, 8}, {1, 3}}, "dimension 0 of indices is 1, wanted 2");
    no_shape(*plugin, {{2, 7, 8}, {3}}, "indices has 1 dimensions, wanted 2");
    no_shape(*plugin, {{7}, {1, 3}}, "tokens has 1 dimensions, wanted 2 or more");
    no_shape(*plugin, {{2, 7, 8}}, "got 1 inputs, wanted tokens and indices");
    refused(creator, Attributes(Given{{"start", 1}}), "BtpGatherTokens: attribute count is missing");
    refused(creator, Attributes(Given{{"start", -1}, {"count", 4}}), "start is -1");
    refused(creator, Attributes(Given{{"start", 1}, {"count", -4}}), "count is -4");
    using D = DataType;
    for (const D type : {D::kFLOAT, D::kHALF, D::kBF16}) {
        check(takes(*plugin, 0, {type, D::kINT32, type}) && takes(*plugin, 2, {type, D::kINT32, type}), "token types");
        D out = D::kINT32;
        check(build(*plugin).getOutputDataTypes(&out, 1, &type, 2) == 0 && out == type, "output has the tokens' type");
    }
    check(!takes(*plugin, 2, {D::kFLOAT, D::kINT32, D::kHALF}), "no change of type");
    check(!takes(*plugin, 1, {D::kFLOAT, D::kFLOAT, D::kFLOAT}), "int32 indices");
    round_trip(creator, *plugin, kGather, full);
}

// --- enqueue(), where the library's kernels run on the CPU -------------------------------------------------------------

// A plugin made from what an engine holds knows how many inputs it has before anybody tells it.
void run_from_engine(IPluginCreatorV3One& creator, const std::vector<PluginTensorDesc>& in, const PluginTensorDesc& out,
                     const void* const* inputs, void* const* outputs, int32_t* indices)
{
    std::vector<DynamicPluginTensorDesc> built(3);
    for (size_t i = 0; i < 2; ++i) {
        built[i].desc = in[i];
        built[i].min = built[i].opt = built[i].max = in[i].dims;
    }
    built[2].desc = out;
    built[2].max = out.dims;
    const std::unique_ptr<IPluginV3> plugin(create(creator, Attributes(kSelect)));
    check(build(*plugin).configurePlugin(built.data(), 2, &built[2], 1) == 0, "the plugin is configured");
    const std::unique_ptr<IPluginV3> clone(plugin->clone());
    const std::unique_ptr<IPluginV3> loaded(
        creator.createPlugin("node", runtime(*clone).getFieldsToSerialize(), TensorRTPhase::kRUNTIME));
    alignas(16) uint32_t workspace[64];
    indices[0] = -1;
    messages.forget();
    check(runtime(*loaded).enqueue(in.data(), &out, inputs, outputs, workspace, nullptr) == 0,
          "enqueue of a plugin from an engine: " + messages.text());
    check(indices[0] == 1 && indices[1] == 2 && indices[2] == 4, "it selects the same");
}

void run_select(IPluginCreatorV3One& creator)
{
    const std::unique_ptr<IPluginV3> plugin(create(creator, Attributes(kSelect)));
    // Token 1 has the best score; tokens 2 and 3 are alike, so are 0 and 1; 4 is unlike all and the diverse pick.
    const float scores[5] = {0.0f, 9.0f, 3.0f, 2.0f, 1.0f};
    float similarity[25] = {};
    const auto alike = [&similarity](int a, int b, float value) { similarity[a * 5 + b] = similarity[b * 5 + a] = value; };
    for (int token = 0; token < 5; ++token) {
        alike(token, token, 1.0f);
    }
    alike(0, 1, 0.9f);
    alike(2, 3, 0.9f);
    alike(0, 4, -0.5f);
    alike(1, 4, -0.5f);
    alike(2, 4, -0.25f);
    alike(3, 4, -0.25f);
    const std::vector<PluginTensorDesc> in{desc(DataType::kFLOAT, {1, 5}), desc(DataType::kFLOAT, {1, 5, 5})};
    const PluginTensorDesc out = desc(DataType::kINT32, {1, 3});
    int32_t indices[3] = {-1, -1, -1};
    alignas(16) uint32_t workspace[64];
    const void* const inputs[] = {scores, similarity};
    void* const outputs[] = {indices};
    check(runtime(*plugin).onShapeChange(in.data(), 2, &out, 1) == 0, "shapes are taken");
    check(runtime(*plugin).enqueue(in.data(), &out, inputs, outputs, workspace, nullptr) == 0, "enqueue runs");
    check(indices[0] == 1 && indices[1] == 2 && indices[2] == 4, "the selection is 1 (score), 4 (diverse), 2 (fill)");
    run_from_engine(creator, in, out, inputs, outputs, indices);
}

void run_gather(IPluginCreatorV3One& creator)
{
    const std::unique_ptr<IPluginV3> plugin(create(creator, Attributes(kGather)));
    uint16_t tokens[6 * 3];
    for (uint16_t i = 0; i < 18; ++i) {
        tokens[i] = i;
    }
    const int32_t indices[2] = {1, 3};
    uint16_t output[4 * 3] = {};
    const uint16_t rows[4] = {0, 2, 4, 5};
    const std::vector<PluginTensorDesc> in{desc(DataType::kHALF, {1, 6, 3}), desc(DataType::kINT32, {1, 2})};
    const PluginTensorDesc out = desc(DataType::kHALF, {1, 4, 3});
    const void* const inputs[] = {tokens, indices};
    void* const outputs[] = {output};
    check(runtime(*plugin).enqueue(in.data(), &out, inputs, outputs, nullptr, nullptr) == 0, "enqueue runs");
    for (int i = 0; i < 12; ++i) {
        check(output[i] == rows[i / 3] * 3 + i % 3, "gathered row " + std::to_string(i / 3));
    }
}

}  // namespace

int main(int count, char** arguments)
{
    if (count < 2) {
        return 2;
    }
    void* const library = dlopen(arguments[1], RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr) {
        std::printf("FAILED: %s\n", dlerror());
        return 1;
    }
    using GetCreators = IPluginCreatorInterface* const* (*)(int32_t&);
    const auto get_creators = reinterpret_cast<GetCreators>(dlsym(library, "getCreators"));
    if (get_creators == nullptr || dlsym(library, "setLoggerFinder") == nullptr) {  // RTX 1.7.1 wants both
        std::printf("FAILED: the library lacks getCreators or setLoggerFinder\n");
        return 1;
    }
    int32_t number = 0;
    IPluginCreatorInterface* const* const creators = get_creators(number);
    std::map<std::string, IPluginCreatorV3One*> named;
    for (int32_t i = 0; i < number; ++i) {
        check(std::string(creators[i]->getInterfaceInfo().kind) == "PLUGIN CREATOR_V3ONE", "creators are of IPluginV3");
        auto* const creator = static_cast<IPluginCreatorV3One*>(creators[i]);
        check(std::string(creator->getPluginVersion()) == "1", "plugin version 1");
        check(std::string(creator->getPluginNamespace()).empty(), "no plugin namespace");
        named[creator->getPluginName()] = creator;
    }
    check(number == 3 && named.size() == 3, "three creators");
    check(named["BtpSelectTokens"]->getFieldNames()->nbFields == 7, "fields of BtpSelectTokens");
    check(named["BtpGatherTokens"]->getFieldNames()->nbFields == 2, "fields of BtpGatherTokens");
    check(named["BtpLinear"]->getFieldNames()->nbFields == 2, "fields of BtpLinear");
    check_select(*named["BtpSelectTokens"]);
    check_gather(*named["BtpGatherTokens"]);
    check_linear(*named["BtpLinear"]);
    if (count > 2) {
        run_select(*named["BtpSelectTokens"]);
        run_gather(*named["BtpGatherTokens"]);
        run_linear(*named["BtpLinear"]);
    }
    std::printf("%d failed\n", failures);
    return failures == 0 ? 0 : 1;
}
