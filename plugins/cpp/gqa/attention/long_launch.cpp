#include "gqa/attention/long_launch.h"

#include <algorithm>
#include <utility>

#include "gqa/attention/plan.h"

namespace gqa {
namespace {

constexpr std::int64_t kVoteRows = 64;
constexpr std::int64_t kMostSortKeys = std::int64_t{1} << 31;  // a place and a position are compared as one number

bool is_power_of_two(std::int64_t number) { return number > 0 && (number & (number - 1)) == 0; }

std::int64_t leaves_of(Layer const& layer, std::int64_t steps) { return (steps + layer.leaf - 2) / layer.leaf + 1; }

std::int64_t segments_of(Layer const& layer, std::int64_t capacity) {
    return std::max<std::int64_t>(0, ceil_div(capacity, layer.leaf) - 1);
}

std::int64_t unit_of(Layer const& layer) { return layer.method == kTiles ? layer.tile : layer.leaf; }

std::int64_t units_of(Layer const& layer, std::int64_t steps) {
    return leaves_of(layer, steps) * (layer.leaf / unit_of(layer));
}

std::int64_t vote_parts(Layer const& layer) {
    std::int64_t const rows = layer.group() * layer.score_rows;
    return ceil_div(rows, std::min(kVoteRows, block(rows)));
}

std::string text(char const* name, std::int64_t value) { return std::string(name) + " is " + std::to_string(value); }

}  // namespace

std::string long_problem(Layer const& layer) {
    if (!layer.method) return "";
    if (layer.method != kHyper && layer.method != kTiles) return text("method", layer.method) + ", expected 0, 1 or 2";
    if (layer.window) return "a layer with a window is not approximated";
    std::pair<char const*, std::int32_t> const positive[] = {
        {"leaf", layer.leaf}, {"heavy_keys", layer.heavy_keys}, {"samples", layer.samples}, {"tile", layer.tile},
        {"block", layer.block}, {"score_rows", layer.score_rows}};
    for (auto const& [name, value] : positive) {
        if (value < 1) return text(name, value) + ", expected at least 1";
    }
    if (layer.anchors < 0 || layer.exact_steps < 0) return "anchors and exact_steps are 0 or more";
    if (layer.method == kHyper) {
        if (!is_power_of_two(layer.leaf)) return text("leaf", layer.leaf) + ", expected a power of two";
        if (!is_power_of_two(layer.heavy_keys)) return text("heavy_keys", layer.heavy_keys) + ", expected a power of two";
    } else {
        if (layer.leaf % layer.tile || layer.leaf % layer.block || layer.heavy_keys % layer.block) {
            return "leaf is not a multiple of tile and block, or heavy_keys not one of block";
        }
        if (layer.score_rows > layer.tile) return text("score_rows", layer.score_rows) + ", more than the rows of a tile";
        if (layer.anchors > layer.heavy_keys) return text("anchors", layer.anchors) + ", more than heavy_keys";
    }
    if (layer.anchors > layer.leaf) return text("anchors", layer.anchors) + ", more than the keys of a leaf";
    return "";
}

std::string long_excess(Layer const& layer, Sizes const& sizes) {
    if (layer.method != kHyper) return "";
    if (sizes.capacity > std::int64_t{layer.leaf} * layer.heavy_keys) {
        return text("the capacity", sizes.capacity) + ", and leaf times heavy_keys reaches " +
               std::to_string(std::int64_t{layer.leaf} * layer.heavy_keys);
    }
    if (sizes.projections < 0 || sizes.projections > 30 || sizes.capacity >= kMostSortKeys >> sizes.projections) {
        return text("the capacity", sizes.capacity) + ", too many for codes of " + std::to_string(sizes.projections) +
               " bits";
    }
    return "";
}

LongGrids long_grids(Layer const& layer, Sizes const& sizes, std::int64_t score_rows, std::int64_t prefill_rows) {
    std::int64_t const group = layer.group(), units = units_of(layer, sizes.steps);
    LongGrids grids{};
    if (layer.method == kTiles) {
        grids.score = units * ceil_div(group * layer.score_rows, score_rows);
        grids.select = units;
    } else {
        grids.score = ceil_div(sizes.capacity, score_rows) + ceil_div(sizes.steps * group, score_rows);
        grids.select = segments_of(layer, sizes.capacity) + leaves_of(layer, sizes.steps) * group;
    }
    grids.long_prefill = units * ceil_div(unit_of(layer) * group, prefill_rows);
    return grids;
}

LongElements long_elements(Layer const& layer, Sizes const& sizes) {
    if (!layer.method) return {0, 0};
    std::int64_t const heads = sizes.batch * layer.kv_num_heads, group = layer.group();
    std::int64_t const units = units_of(layer, sizes.steps);
    if (layer.method == kTiles) {
        return {heads * units * (layer.heavy_keys / layer.block),
                heads * units * vote_parts(layer) * (sizes.capacity / layer.block)};
    }
    std::int64_t levels = 0;
    for (std::int64_t left = segments_of(layer, sizes.capacity); left; left /= 2) ++levels;
    return {heads * (sizes.capacity + sizes.steps * group),
            heads * (levels * sizes.capacity + leaves_of(layer, sizes.steps) * group * layer.leaf)};
}

std::map<std::string, std::int64_t> long_constants(Layer const& layer, Sizes const& sizes) {
    std::map<std::string, std::int64_t> expected;
    if (!layer.method) return expected;
    expected = {{"LEAF", layer.leaf}, {"SAMPLES", layer.samples}, {"ANCHORS", layer.anchors}};
    if (layer.method == kTiles) {
        expected["TILE"] = layer.tile;
        expected["BLOCK"] = layer.block;
        expected["CHOSEN"] = layer.heavy_keys / layer.block;
        expected["SCORE_ROWS"] = layer.score_rows;
        expected["PARTS"] = vote_parts(layer);
    } else {
        expected["HEAVY"] = layer.heavy_keys;
        expected["PROJECTIONS"] = sizes.projections;
        expected["BINS"] = std::int64_t{1} << sizes.projections;
    }
    return expected;
}

}  // namespace gqa
