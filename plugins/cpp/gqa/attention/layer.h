// One attention layer as its plugin node describes it: identity, fields, inputs, outputs, shapes.
//
// The same definitions as plugins/grouped_attention/fields.py and gqa_export/attention_op.py; a test compares them.
// Dimensions: B batch, S new tokens, C capacity, H query heads, K key/value heads, D and E head sizes, R rotary size.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "gqa/attention/plan.h"

namespace gqa {

constexpr char kPluginName[] = "GroupedQueryAttention";
// 2: with the attributes of long prompts; 3: with those of a cache of codes.
constexpr std::array<char const*, 3> kPluginVersions{"1", "2", "3"};
constexpr std::int32_t kCodesVersion = 3;
inline char const* version_text(std::int32_t version) { return kPluginVersions[static_cast<std::size_t>(version - 1)]; }
constexpr char kPluginNamespace[] = "gqa";
// The version of the op that a version of the plugin computes.
constexpr std::int32_t contract_of(std::int32_t version) { return version == kCodesVersion ? 2 : 1; }
constexpr std::int32_t kRing = 2;  // of `growing`: a cache whose slots are used again, token t in slot t modulo C
// The number of a version of the plugin; 0 for one that is not known here.
inline std::int32_t version_number(std::string const& version) {
    for (std::size_t i = 0; i < kPluginVersions.size(); ++i) {
        if (version == kPluginVersions[i]) return static_cast<std::int32_t>(i + 1);
    }
    return 0;
}
// Type of a cache's codes, gqa_export/attention_op.py.
constexpr std::int32_t kInt8Codes = 1, kFp8Codes = 2;

struct Layer {
    std::int32_t num_heads = 0, kv_num_heads = 0;
    float scale = 0, softcap = 0;
    std::int32_t window = 0, rotary_interleaved = 0, growing = 0, has_rotary = 0, has_sinks = 0, has_new = 0;
    // Of version 2, gqa_export/long_attention_op.py; method 0 is exact.
    std::int32_t method = 0, leaf = 0, heavy_keys = 0, samples = 0, anchors = 0, tile = 0, block = 0, score_rows = 0,
                 exact_steps = 0;
    // Of version 3: a cached key is its code times key_scale; cache_codes 0 is a cache of numbers.
    std::int32_t cache_codes = 0;
    float key_scale = 1, value_scale = 1;
    std::int32_t version = 1;

    std::int64_t group() const { return num_heads / kv_num_heads; }
    bool appends() const { return has_new || has_rotary; }
    bool ring() const { return growing == kRing; }
    bool writes_codes() const { return cache_codes && has_new; }
    bool interleaved() const { return rotary_interleaved && has_rotary; }
};

void check_layer(Layer const& layer);  // throws Error for what no kernel does
// contract: that a layer of this version of the plugin was serialized with.
void check_contract_version(std::int32_t contract, std::int32_t version);

// A creation field: an integer or a float member of Layer.
struct CreationField {
    char const* name;
    std::int32_t Layer::*integer;
    float Layer::*real;
};
struct CreationFields {
    CreationField const* first;
    std::size_t count;
    CreationField const* begin() const { return first; }
    CreationField const* end() const { return first + count; }
};
CreationFields creation_of(std::int32_t version);
// The fields that only a serialized layer has; the last is absent on all layers but one.
constexpr char kContractVersionField[] = "contract_version", kKeysField[] = "keys", kCubinsField[] = "cubins";

// The op's inputs, in order. A node has those that its flags say.
enum class Input {
    query, key, value, past_key, past_value, past_lengths, new_lengths, cos, sin, sinks, fractions, projections, code_order
};
constexpr std::size_t kInputCount = 13;
char const* name_of(Input input);
std::vector<Input> node_inputs(Layer const& layer);
// Outputs: output; and, if has_new, present_key and present_value, which are the memory of past_key and past_value.
inline int node_outputs(Layer const& layer) { return layer.has_new ? 3 : 1; }

// How many dimensions an input has.
int rank_of(Input input);

// What a launch can hold; the same numbers as plugins/grouped_attention/limits.py.
constexpr std::int64_t kMaxHead = 256;
constexpr std::int64_t kMaxGridYz = 65535;  // CUDA's limit on the second and third grid dimension
constexpr std::int64_t kMaxHeadElements = (std::int64_t{1} << 31) - (1 << 16);  // counted in 32 bits by the kernels

// The shapes of one call. rotary_half is R/2, 0 without rotation; max_position the rows of the rotary table;
// projections the bits of a code.
struct Sizes {
    std::int64_t batch = 0, steps = 0, capacity = 0, head = 0, value_head = 0;
    Kind kind = Kind::fp16;
    std::int64_t rotary_half = 0, max_position = 1, projections = 0;
};

void check_limits(Layer const& layer, Sizes const& sizes);  // throws Error for sizes that no launch holds

}  // namespace gqa
