#include "gqa/attention/layer.h"

#include <cmath>

#include "gqa/attention/long_launch.h"

#include "gqa/core/error.h"

namespace gqa {

namespace {

// Those of version 1, then those of version 2.
constexpr std::size_t kFieldsOfFirst = 10;
constexpr std::array<CreationField, 19> kCreation{{
    {"num_heads", &Layer::num_heads, nullptr},
    {"kv_num_heads", &Layer::kv_num_heads, nullptr},
    {"scale", nullptr, &Layer::scale},
    {"softcap", nullptr, &Layer::softcap},
    {"window", &Layer::window, nullptr},
    {"rotary_interleaved", &Layer::rotary_interleaved, nullptr},
    {"growing", &Layer::growing, nullptr},
    {"has_rotary", &Layer::has_rotary, nullptr},
    {"has_sinks", &Layer::has_sinks, nullptr},
    {"has_new", &Layer::has_new, nullptr},
    {"method", &Layer::method, nullptr},
    {"leaf", &Layer::leaf, nullptr},
    {"heavy_keys", &Layer::heavy_keys, nullptr},
    {"samples", &Layer::samples, nullptr},
    {"anchors", &Layer::anchors, nullptr},
    {"tile", &Layer::tile, nullptr},
    {"block", &Layer::block, nullptr},
    {"score_rows", &Layer::score_rows, nullptr},
    {"exact_steps", &Layer::exact_steps, nullptr},
}};

// Those of version 1, then those of version 3.
constexpr std::array<CreationField, 3> kCodes{{
    {"cache_codes", &Layer::cache_codes, nullptr},
    {"key_scale", nullptr, &Layer::key_scale},
    {"value_scale", nullptr, &Layer::value_scale},
}};

constexpr std::array<CreationField, kFieldsOfFirst + kCodes.size()> with_codes() {
    std::array<CreationField, kFieldsOfFirst + kCodes.size()> all{};
    for (std::size_t i = 0; i < all.size(); ++i) all[i] = i < kFieldsOfFirst ? kCreation[i] : kCodes[i - kFieldsOfFirst];
    return all;
}
constexpr auto kCreationWithCodes = with_codes();

std::string codes_problem(Layer const& layer) {
    if (layer.version != kCodesVersion) return {};
    if (layer.cache_codes != kInt8Codes && layer.cache_codes != kFp8Codes) {
        return "cache_codes is " + std::to_string(layer.cache_codes) + ", expected one of 1, 2";
    }
    for (float scale : {layer.key_scale, layer.value_scale}) {
        if (std::isfinite(scale) && scale > 0) continue;
        return "the scale of codes is " + std::to_string(scale) + ", expected a positive number";
    }
    return {};
}

}  // namespace

CreationFields creation_of(std::int32_t version) {
    if (version == kCodesVersion) return {kCreationWithCodes.data(), kCreationWithCodes.size()};
    return {kCreation.data(), version == 1 ? kFieldsOfFirst : kCreation.size()};
}

void check_layer(Layer const& layer) {
    std::string wrong;
    if (layer.kv_num_heads < 1 || layer.num_heads < 1 || layer.num_heads % layer.kv_num_heads) {
        wrong = std::to_string(layer.num_heads) + " query heads cannot be grouped over " +
                std::to_string(layer.kv_num_heads) + " key/value heads";
    } else if (layer.growing && !layer.ring()) {
        wrong = "the plugin writes into a static cache or a ring, and growing is " + std::to_string(layer.growing);
    } else if (layer.ring() && layer.window < 1) {
        wrong = "a ring holds what a window sees, and this layer has none";
    } else if (layer.window < 0 || layer.softcap < 0) {
        wrong = "window and softcap are 0 or more";
    } else {
        wrong = long_problem(layer);
        if (wrong.empty()) wrong = codes_problem(layer);
    }
    if (!wrong.empty()) {
        throw Error(wrong, "plugin fields", "export the bundle again: `gqa-export onnx --target trt-plugin`");
    }
}

void check_contract_version(std::int32_t contract, std::int32_t version) {
    if (contract == contract_of(version)) return;
    throw Error("the engine's attention layers follow version " + std::to_string(contract) +
                    " of the op, this plugin follows " + std::to_string(contract_of(version)),
                "plugin field contract_version",
                "build the engine again with `gqa-export trt` of this version, or load it with the plugin it was "
                "built with");
}

char const* name_of(Input input) {
    static constexpr std::array<char const*, kInputCount> names{"query",      "key",          "value",       "past_key",
                                                                "past_value", "past_lengths", "new_lengths", "cos",
                                                                "sin",        "sinks",        "fractions",
                                                                "projections", "code_order"};
    return names[static_cast<std::size_t>(input)];
}

int rank_of(Input input) {
    switch (input) {
        case Input::query: case Input::key: case Input::value: return 3;
        case Input::past_key: case Input::past_value: return 4;
        case Input::cos: case Input::sin: case Input::fractions: case Input::projections: return 2;
        default: return 1;
    }
}

void check_limits(Layer const& layer, Sizes const& sizes) {
    std::string wrong;
    for (std::int64_t size : {sizes.head, sizes.value_head}) {
        if (size < 1 || size > kMaxHead) {
            wrong = "head size " + std::to_string(size) + " is outside 1 .. " + std::to_string(kMaxHead);
        } else if (sizes.capacity > kMaxHeadElements / size) {
            wrong = "capacity " + std::to_string(sizes.capacity) + " times head size " + std::to_string(size) +
                    " exceeds " + std::to_string(kMaxHeadElements) + " elements";
        }
    }
    if (sizes.batch > kMaxGridYz || layer.kv_num_heads > kMaxGridYz) {
        wrong = "B = " + std::to_string(sizes.batch) + ", K = " + std::to_string(layer.kv_num_heads) +
                ": CUDA grids end at " + std::to_string(kMaxGridYz);
    }
    if (wrong.empty()) wrong = long_excess(layer, sizes);
    if (!wrong.empty()) {
        throw Error(wrong, "attention layer", "build the engine with a smaller --capacity or --max-batch");
    }
}

std::vector<Input> node_inputs(Layer const& layer) {
    auto present = [&layer](Input input) {
        switch (input) {
            case Input::key: case Input::value: return layer.has_new != 0;
            case Input::cos: case Input::sin: return layer.has_rotary != 0;
            case Input::sinks: return layer.has_sinks != 0;
            case Input::fractions: case Input::projections: case Input::code_order: return layer.method != 0;
            default: return true;
        }
    };
    std::vector<Input> inputs;
    for (std::size_t i = 0; i < kInputCount; ++i) {
        if (present(static_cast<Input>(i))) inputs.push_back(static_cast<Input>(i));
    }
    return inputs;
}

}  // namespace gqa
