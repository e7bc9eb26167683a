// What a layer launches for a long prompt, as numbers: grids, workspace, and which settings there are.
//
// The same arithmetic as plugins/grouped_attention/long_launch.py and gqa_export/long_attention_op.py; a test compares
// them on random shapes.
#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <string>

#include "gqa/attention/layer.h"

namespace gqa {

constexpr std::int32_t kHyper = 1, kTiles = 2;  // Layer::method
constexpr std::array<char const*, 3> kLongKernels{"score", "select", "long_prefill"};  // in the order of their launch

inline bool approximates(Layer const& layer, Sizes const& sizes) {
    return layer.method != 0 && sizes.steps > layer.exact_steps;
}

// Why there is no such approximation; "" if there is one, or the layer is exact.
std::string long_problem(Layer const& layer);
// Why no launch holds these sizes; "" if one does.
std::string long_excess(Layer const& layer, Sizes const& sizes);

struct LongGrids {
    std::int64_t score, select, long_prefill;  // the first axis; the others are K and B
};
// score_rows, prefill_rows: tile_rows of the compiled files.
LongGrids long_grids(Layer const& layer, Sizes const& sizes, std::int64_t score_rows, std::int64_t prefill_rows);

// Numbers of four bytes: the selection, and masses or orders. None of an exact layer.
struct LongElements {
    std::int64_t selection, scratch;
};
LongElements long_elements(Layer const& layer, Sizes const& sizes);

// What the kernels' constants must be.
std::map<std::string, std::int64_t> long_constants(Layer const& layer, Sizes const& sizes);

}  // namespace gqa
