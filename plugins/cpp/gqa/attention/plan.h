// What is launched: tile sizes and the number of programs, from numbers the host knows.
//
// The same arithmetic as plugins/grouped_attention/plan.py, from which the engine's kernels were compiled: a test
// compares the two on random shapes. Change both or neither.
#pragma once

#include <cstdint>
#include <string>

namespace gqa {

enum class Kind { fp16, bf16, fp32 };

std::int64_t bytes_of(Kind kind);
char const* name_of(Kind kind);
Kind kind_from(std::string const& name);  // throws Error

constexpr std::int64_t kLeastKeys = 256;  // of a decode program's share: fewer, and partial results cost more
constexpr std::int64_t kAppendSteps = 16;
constexpr std::int64_t kLeastRows = 16;
constexpr std::int64_t kLongRows = 128;
constexpr std::int64_t kBlocksPerSm = 2;

// Shared memory that one block may use, KiB; 0 for a capability that no kernel is compiled for.
std::int64_t shared_kib_or_zero(int capability);

// One program's work: query rows (tokens times group) against keys, and how it is compiled.
struct Tiles {
    std::int64_t rows, keys;
    int warps, stages;
};

struct Plan {
    bool decode;  // else prefill
    Tiles tiles;
    std::int64_t programs;
};

// The launch for a batch of `sequences` with `steps` new tokens each and at most `bound` positions in sight.
struct PlanRequest {
    std::int64_t sequences, steps, heads, kv_heads, head, value_head;
    Kind kind;
    std::int64_t window, bound, sm_count;
    int capability;
};

constexpr std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

std::int64_t block(std::int64_t size);
Tiles choose_tiles(std::int64_t rows, std::int64_t head, std::int64_t value_head, Kind kind, int capability);
std::int64_t choose_programs(std::int64_t sequences, std::int64_t kv_heads, std::int64_t row_tiles, std::int64_t keys,
                             std::int64_t sm_count);
Plan plan(PlanRequest const& request);

// Elements that decode writes and combine reads: fp32, fp32, 64-bit integers.
struct WorkspaceElements {
    std::int64_t partial, logsum, ranges;
};
WorkspaceElements workspace_elements(std::int64_t sequences, std::int64_t steps, std::int64_t heads,
                                     std::int64_t kv_heads, std::int64_t value_head, std::int64_t tile_rows,
                                     std::int64_t programs);

}  // namespace gqa
