#include "gqa/plugin/attention_plugin.h"

#include <algorithm>
#include <utility>

#include "gqa/attention/launch.h"
#include "gqa/core/error.h"
#include "gqa/plugin/log.h"

namespace gqa::plugin {
namespace {

using nvinfer1::DataType;
using nvinfer1::Dims;

constexpr int32_t kFailed = 1;
constexpr char kExportAgain[] = "export the bundle again: `gqa-export onnx --target trt-plugin`";

bool is_supported(DataType type) {
    return type == DataType::kHALF || type == DataType::kBF16 || type == DataType::kFLOAT;
}

Kind kind_of(DataType type) {
    switch (type) {
        case DataType::kHALF: return Kind::fp16;
        case DataType::kBF16: return Kind::bf16;
        case DataType::kFLOAT: return Kind::fp32;
        default: throw Error("the attention layer's number format is not supported", "attention layer", kExportAgain);
    }
}

DataType type_of_codes(Layer const& layer) {
    return layer.cache_codes == kInt8Codes ? DataType::kINT8 : DataType::kFP8;
}

bool holds_whole_numbers(Input input) {
    return input == Input::past_lengths || input == Input::new_lengths || input == Input::fractions ||
           input == Input::code_order;
}

void check_shapes(Layer const& layer, std::vector<Input> const& inputs, Dims const* dims) {
    auto find = [&](Input which) {
        auto const at = std::find(inputs.begin(), inputs.end(), which);
        return at == inputs.end() ? nullptr : dims + (at - inputs.begin());
    };
    for (Input input : inputs) {
        if (find(input)->nbDims == rank_of(input)) continue;
        throw Error(std::string(name_of(input)) + " has " + std::to_string(find(input)->nbDims) +
                        " dimensions, expected " + std::to_string(rank_of(input)), "attention layer", kExportAgain);
    }
    std::int64_t const head = find(Input::past_key)->d[3], value_head = find(Input::past_value)->d[3];
    std::pair<Input, std::int64_t> const wanted[] = {{Input::query, layer.num_heads * head},
                                                     {Input::key, layer.kv_num_heads * head},
                                                     {Input::value, layer.kv_num_heads * value_head}};
    for (auto const& [input, features] : wanted) {
        Dims const* const found = find(input);
        if (!found || found->d[2] == features) continue;
        throw Error(std::string(name_of(input)) + " has " + std::to_string(found->d[2]) + " features, expected " +
                        std::to_string(features), "attention layer", kExportAgain);
    }
    if (find(Input::past_key)->d[1] != layer.kv_num_heads) {
        throw Error("past_key has " + std::to_string(find(Input::past_key)->d[1]) + " heads, expected " +
                        std::to_string(layer.kv_num_heads), "attention layer", kExportAgain);
    }
    std::int64_t const slots = find(Input::past_key)->d[2];
    if (layer.ring() && slots < layer.window) {
        throw Error("a ring of " + std::to_string(slots) + " slots cannot hold a window of " +
                        std::to_string(layer.window), "attention layer", kExportAgain);
    }
    if (!layer.method) return;
    Dims const &fractions = *find(Input::fractions), &projections = *find(Input::projections);
    std::int64_t const bits = projections.d[1];
    if (fractions.d[0] != layer.kv_num_heads || fractions.d[1] != layer.samples || projections.d[0] != head ||
        bits < 0 || bits > 30 || find(Input::code_order)->d[0] != std::int64_t{1} << bits) {
        throw Error("fractions, projections or code_order have another shape than the layer's attributes say",
                    "attention layer", kExportAgain);
    }
}

}  // namespace

AttentionPlugin::AttentionPlugin(State state) : state_(std::move(state)), inputs_(node_inputs(state_.layer)) {}

nvinfer1::IPluginCapability* AttentionPlugin::getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept {
    switch (type) {
        case nvinfer1::PluginCapabilityType::kCORE: return static_cast<nvinfer1::IPluginV3OneCore*>(this);
        case nvinfer1::PluginCapabilityType::kBUILD: return static_cast<nvinfer1::IPluginV3OneBuildV2*>(this);
        case nvinfer1::PluginCapabilityType::kRUNTIME: return static_cast<nvinfer1::IPluginV3OneRuntime*>(this);
    }
    return nullptr;
}

nvinfer1::IPluginV3* AttentionPlugin::clone() noexcept {
    return guarded<nvinfer1::IPluginV3*>("clone", nullptr, [this] { return new AttentionPlugin(state_); });
}

int32_t AttentionPlugin::getAliasedInput(int32_t output) noexcept {
    if (output == 0) return -1;
    Input const past = output == 1 ? Input::past_key : Input::past_value;
    return static_cast<int32_t>(std::find(inputs_.begin(), inputs_.end(), past) - inputs_.begin());
}

int32_t AttentionPlugin::getOutputDataTypes(DataType* outputs, int32_t output_count, DataType const* inputs,
                                            int32_t) const noexcept {
    std::fill_n(outputs, output_count, inputs[0]);
    if (state_.layer.cache_codes) std::fill_n(outputs + 1, output_count - 1, type_of_codes(state_.layer));
    return 0;
}

int32_t AttentionPlugin::getOutputShapes(nvinfer1::DimsExprs const* inputs, int32_t input_count,
                                         nvinfer1::DimsExprs const*, int32_t, nvinfer1::DimsExprs* outputs,
                                         int32_t output_count, nvinfer1::IExprBuilder& build) noexcept {
    return guarded("output shapes", kFailed, [&] {
        if (input_count != static_cast<int32_t>(inputs_.size())) {
            throw Error("the node has " + std::to_string(input_count) + " inputs, its attributes say " +
                            std::to_string(inputs_.size()), "attention layer", kExportAgain);
        }
        auto const key = static_cast<std::size_t>(state_.layer.has_new ? 3 : 1);  // past_key; past_value follows it
        if (inputs[0].nbDims != rank_of(Input::query) || inputs[key + 1].nbDims != rank_of(Input::past_value)) {
            throw Error("query or past_value has another number of dimensions than expected", "attention layer",
                        kExportAgain);
        }
        outputs[0].nbDims = 3;
        outputs[0].d[0] = inputs[0].d[0];
        outputs[0].d[1] = inputs[0].d[1];
        outputs[0].d[2] = build.operation(nvinfer1::DimensionOperation::kPROD, *inputs[key + 1].d[3],
                                          *build.constant(state_.layer.num_heads));
        for (int32_t i = 1; i < output_count; ++i) outputs[i] = inputs[key + static_cast<std::size_t>(i) - 1];
        return 0;
    });
}

bool AttentionPlugin::supportsFormatCombination(int32_t position, nvinfer1::DynamicPluginTensorDesc const* tensors,
                                                int32_t, int32_t) noexcept {
    auto const& tensor = tensors[position].desc;
    if (tensor.format != nvinfer1::TensorFormat::kLINEAR) return false;
    auto const index = static_cast<std::size_t>(position);
    if (index < inputs_.size() && holds_whole_numbers(inputs_[index])) return tensor.type == DataType::kINT32;
    bool const cached = index < inputs_.size() ? inputs_[index] == Input::past_key || inputs_[index] == Input::past_value
                                               : index > inputs_.size();
    if (cached && state_.layer.cache_codes) return tensor.type == type_of_codes(state_.layer);
    if (index < inputs_.size() && inputs_[index] == Input::projections) return tensor.type == DataType::kFLOAT;
    return is_supported(tensor.type) && tensor.type == tensors[0].desc.type;
}

int32_t AttentionPlugin::configurePlugin(nvinfer1::DynamicPluginTensorDesc const* inputs, int32_t input_count,
                                         nvinfer1::DynamicPluginTensorDesc const*, int32_t) noexcept {
    return guarded("configuring", kFailed, [&] {
        std::vector<Dims> dims;
        for (int32_t i = 0; i < input_count; ++i) dims.push_back(inputs[i].max);
        check_shapes(state_.layer, inputs_, dims.data());
        if (!state_.kernels) {
            throw Error("there are no kernels to build the engine with", "environment variable GQA_KERNELS",
                        "build with `gqa-export trt`, or compile the kernels and set it to their folder: "
                        "python -m gqa_plugins.grouped_attention.cubin --help");
        }
        Sizes const most = largest(inputs, input_count);
        check_limits(state_.layer, most);
        state_.carriers->configure();
        carries_.reset();
        state_.keys = state_.kernels->keys_of(state_.layer, most);
        return 0;
    });
}

size_t AttentionPlugin::getWorkspaceSize(nvinfer1::DynamicPluginTensorDesc const* inputs, int32_t input_count,
                                         nvinfer1::DynamicPluginTensorDesc const*, int32_t) const noexcept {
    return guarded<size_t>("sizing the workspace", 0, [&] {
        return static_cast<size_t>(workspace_bytes(state_.layer, largest(inputs, input_count)));
    });
}

int32_t AttentionPlugin::onShapeChange(nvinfer1::PluginTensorDesc const* inputs, int32_t,
                                       nvinfer1::PluginTensorDesc const*, int32_t) noexcept {
    if (state_.building) return 0;  // there may be no GPU
    return guarded("loading kernels", kFailed, [&] {
        load(current(inputs));  // here, because a stream may be under capture later
        return 0;
    });
}

int32_t AttentionPlugin::enqueue(nvinfer1::PluginTensorDesc const* input_descs, nvinfer1::PluginTensorDesc const*,
                                 void const* const* inputs, void* const* outputs, void* workspace,
                                 cudaStream_t stream) noexcept {
    return guarded("running", kFailed, [&] {
        Sizes const sizes = current(input_descs);
        load(sizes);
        std::array<std::uint64_t, kInputCount> pointers{};
        auto const address = [](void const* pointer) { return reinterpret_cast<std::uint64_t>(pointer); };
        for (std::size_t i = 0; i < inputs_.size(); ++i) {
            pointers[static_cast<std::size_t>(inputs_[i])] = address(inputs[i]);
        }
        // While it builds, TensorRT may time the layer on buffers of its own: there is no cache to keep yet.
        for (int32_t i = 1; i < getNbOutputs() && !state_.building; ++i) {
            if (outputs[i] == inputs[getAliasedInput(i)]) continue;
            throw Error("TensorRT gave present_key or present_value other memory than the past: the cache would not be "
                        "written in place", "attention layer", "report it with the engine's manifest");
        }
        loaded_->enqueue(state_.layer, sizes, pointers, address(outputs[0]), address(workspace), stream);
        return 0;
    });
}

nvinfer1::PluginFieldCollection const* AttentionPlugin::getFieldsToSerialize() noexcept {
    return guarded<nvinfer1::PluginFieldCollection const*>("serializing", nullptr, [&] {
        return fields_.describe(state_.layer, state_.keys, carried());
    });
}

std::string AttentionPlugin::carried() {
    if (state_.container) return *state_.container;
    if (!state_.building || !state_.kernels) return {};
    if (!carries_) carries_ = state_.carriers->choose();
    return *carries_ ? state_.kernels->container() : std::string();
}

Sizes AttentionPlugin::sizes_of(Dims const* dims, DataType type) const {
    Sizes sizes;
    sizes.kind = kind_of(type);
    for (std::size_t i = 0; i < inputs_.size(); ++i) {
        auto const* const d = dims[i].d;
        switch (inputs_[i]) {
            case Input::query: sizes.steps = d[1]; break;
            case Input::past_key: sizes.batch = d[0], sizes.capacity = d[2], sizes.head = d[3]; break;
            case Input::past_value: sizes.value_head = d[3]; break;
            case Input::cos: sizes.max_position = d[0], sizes.rotary_half = d[1]; break;
            case Input::projections: sizes.projections = d[1]; break;
            default: break;
        }
    }
    return sizes;
}

Sizes AttentionPlugin::largest(nvinfer1::DynamicPluginTensorDesc const* inputs, int32_t input_count) const {
    std::vector<Dims> dims;
    for (int32_t i = 0; i < input_count; ++i) dims.push_back(inputs[i].max);
    return sizes_of(dims.data(), inputs[0].desc.type);
}

Sizes AttentionPlugin::current(nvinfer1::PluginTensorDesc const* inputs) const {
    std::array<Dims, kInputCount> dims;
    for (std::size_t i = 0; i < inputs_.size(); ++i) dims[i] = inputs[i].dims;
    return sizes_of(dims.data(), inputs[0].type);
}

void AttentionPlugin::load(Sizes const& sizes) {
    check_limits(state_.layer, sizes);
    if (loaded_ && loaded_->is_for(current_context(), sizes.kind)) return;
    loaded_ = std::make_unique<LoadedLayer>(state_.layer, sizes, state_.keys, CubinStore::of_process());
}

}  // namespace gqa::plugin
