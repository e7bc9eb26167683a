#include "gqa/attention/plan.h"

#include <algorithm>
#include <array>
#include <vector>

#include "gqa/core/error.h"

namespace gqa {
namespace {

struct Shape {
    std::int64_t keys;
    int stages;
};
constexpr std::array<Shape, 8> kShapes{{{128, 3}, {64, 4}, {64, 3}, {32, 4}, {32, 3}, {32, 2}, {16, 3}, {16, 2}}};

}  // namespace

std::int64_t shared_kib_or_zero(int capability) {
    switch (capability) {
        case 80: case 87: return 163;
        case 86: case 89: case 120: case 121: return 99;
        case 90: case 100: case 103: case 110: return 227;
        default: return 0;
    }
}

std::int64_t bytes_of(Kind kind) { return kind == Kind::fp32 ? 4 : 2; }

char const* name_of(Kind kind) { return kind == Kind::fp16 ? "fp16" : kind == Kind::bf16 ? "bf16" : "fp32"; }

Kind kind_from(std::string const& name) {
    for (Kind kind : {Kind::fp16, Kind::bf16, Kind::fp32}) {
        if (name == name_of(kind)) return kind;
    }
    throw Error("dtype '" + name + "' is unknown", "dtype", "use one of fp16, bf16, fp32");
}

std::int64_t block(std::int64_t size) {
    std::int64_t power = 16;
    while (power < size) power *= 2;
    return power;
}

Tiles choose_tiles(std::int64_t rows, std::int64_t head, std::int64_t value_head, Kind kind, int capability) {
    std::int64_t const known_kib = shared_kib_or_zero(capability);
    std::int64_t const shared_bytes = (known_kib ? known_kib : 99) * 1024;
    std::int64_t const size = bytes_of(kind), width = block(head) + block(value_head);
    std::int64_t tile_rows = std::min(kLongRows, block(rows));
    if (size == 4) {
        // With wider heads, 32 keys do not fit in registers and spill.
        return {std::min<std::int64_t>(tile_rows, 32), width <= 128 ? 32 : 16, 4, width <= 256 ? 2 : 1};
    }
    bool const wide = width > 256;
    if (wide && shared_bytes < 128 * 1024) tile_rows = std::min<std::int64_t>(tile_rows, 64);
    bool const longest = tile_rows == kLongRows;
    std::int64_t const budget = shared_bytes / (longest ? 1 : kBlocksPerSm) - 2048 - tile_rows * block(head) * size;
    bool const in_registers = capability < 90 || 120 <= capability;
    std::int64_t const held = tile_rows >= 64 && !in_registers ? 0 : 1;
    for (auto [keys, stages] : kShapes) {
        bool const spills = (keys == 128 && (width > 128 || (longest && (capability != 90 || width < 128)))) ||
                            (keys == 64 && longest && (wide || (in_registers && width > 128)));
        if (spills) continue;
        std::int64_t const weights_bytes = wide ? tile_rows * keys * size : 0;
        if (keys * width * size * (stages - held) + weights_bytes <= budget) {
            return {tile_rows, keys, longest ? 8 : 4, stages};
        }
    }
    return {tile_rows, 16, 4, 1};
}

std::int64_t choose_programs(std::int64_t sequences, std::int64_t kv_heads, std::int64_t row_tiles, std::int64_t keys,
                             std::int64_t sm_count) {
    std::int64_t const works = sequences * kv_heads * row_tiles;
    std::int64_t const most = works * std::max<std::int64_t>(1, keys / kLeastKeys);
    return std::max<std::int64_t>(1, std::min(sm_count * kBlocksPerSm, most));
}

Plan plan(PlanRequest const& r) {
    std::int64_t const rows = r.steps * (r.heads / r.kv_heads);
    Tiles const tiles = choose_tiles(rows, r.head, r.value_head, r.kind, r.capability);
    std::int64_t const row_tiles = ceil_div(rows, tiles.rows);
    std::int64_t const keys = r.window ? std::min(r.bound, r.window + r.steps - 1) : r.bound;
    bool const few = row_tiles == 1 || 2 * r.sequences * r.kv_heads * row_tiles <= r.sm_count * kBlocksPerSm;
    if (keys < 2 * kLeastKeys || !few) return {false, tiles, 1};
    return {true, tiles, choose_programs(r.sequences, r.kv_heads, row_tiles, keys, r.sm_count)};
}

WorkspaceElements workspace_elements(std::int64_t sequences, std::int64_t steps, std::int64_t heads,
                                     std::int64_t kv_heads, std::int64_t value_head, std::int64_t tile_rows,
                                     std::int64_t programs) {
    std::int64_t const rows = steps * (heads / kv_heads);
    std::int64_t const meetings = programs + sequences * kv_heads * ceil_div(rows, tile_rows);
    std::int64_t const held = std::min(tile_rows, rows) * meetings;
    return {held * value_head, held, 2 * sequences * steps * heads};
}

}  // namespace gqa
