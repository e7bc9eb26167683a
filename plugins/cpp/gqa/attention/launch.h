// What one plugin layer launches, as numbers: kernels, grids, arguments, workspace. No GPU is touched here.
//
// The same arithmetic as plugins/grouped_attention/launch.py, where the order of launches, the choice between decode and
// prefill and the layout of the workspace are written down; a test compares the two on random shapes.
#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "gqa/attention/container.h"
#include "gqa/attention/layer.h"
#include "gqa/attention/plan.h"

namespace gqa {

// Every argument that a kernel may take, by name: a kernel's file lists its own, in order.
enum class Slot {
    query_ptr, key_ptr, value_ptr, past_key_ptr, past_value_ptr, past_lengths_ptr, new_lengths_ptr, cos_ptr, sin_ptr,
    rotated_ptr, sinks_ptr, output_ptr, partial_ptr, logsum_ptr, ranges_ptr,
    fractions_ptr, projections_ptr, code_order_ptr, selection_ptr, masses_ptr, order_ptr, faults_ptr,
    sequences, kv_heads, steps, capacity, least_keys, window, max_position, scale, softcap, key_scale, value_scale
};
constexpr std::size_t kSlotCount = 33;

// The arguments' values, each in the first bytes of a word, as the driver wants to read them.
class Arguments {
public:
    void set(Slot slot, std::uint64_t address);
    void set(Slot slot, std::int32_t value);
    void set(Slot slot, float value);
    std::uint64_t const& operator[](Slot slot) const { return words_[static_cast<std::size_t>(slot)]; }

private:
    std::array<std::uint64_t, kSlotCount> words_{};
};

class LoadedKernel;  // loaded_kernels.h

// A kernel's facts with its arguments' names resolved; made once, when the engine is loaded.
struct Kernel {
    std::shared_ptr<Cubin const> cubin;
    std::vector<Slot> slots;
    std::shared_ptr<LoadedKernel const> loaded;  // on the GPU; empty where launches are only worked out
};
Kernel resolve(std::shared_ptr<Cubin const> cubin);  // throws Error for an argument that is not known here

// The kernels of a layer for one GPU. append is empty where the layer neither appends nor rotates, the last three where it
// approximates nothing.
struct Kernels {
    Kernel append, prefill, decode, combine, score, select, long_prefill;
};

struct Launch {
    Kernel const* kernel;
    std::array<std::uint32_t, 3> grid;
    Arguments const* arguments;
};

// At most four launches, in order, and the arguments they point to: made on the stack, once per call.
class Launches {
public:
    // pointers: device addresses of the node's inputs, 0 for an absent one. workspace: of workspace_bytes().
    Launches(Layer const& layer, Sizes const& sizes, Kernels const& kernels,
             std::array<std::uint64_t, kInputCount> const& pointers, std::uint64_t output, std::uint64_t workspace,
             std::int64_t sm_count);
    Launches(Launches const&) = delete;
    Launches& operator=(Launches const&) = delete;

    Launch const* begin() const { return list_.data(); }
    Launch const* end() const { return list_.data() + count_; }

private:
    void add(Kernel const& kernel, std::int64_t x, std::int64_t y, std::int64_t z, Arguments const& arguments);

    Arguments appending_, attending_, joining_;
    std::array<Launch, 4> list_{};
    std::size_t count_ = 0;
};

struct Choice {
    bool decode;  // else prefill
    std::int64_t programs;
};
Choice choose(Layer const& layer, Sizes const& sizes, std::int64_t decode_rows, std::int64_t sm_count);

// Enough for every batch up to B and every S up to S of `largest`, on every GPU.
std::int64_t workspace_bytes(Layer const& layer, Sizes const& largest);

// kernel -> the key whose cubin runs on a GPU of this capability. Throws Error that names what the engine carries.
std::map<std::string, Key> pick(std::vector<Key> keys, int capability);

// Throws Error for a kernel that was compiled for another layer.
void check_cubin(Cubin const& cubin, Layer const& layer, Sizes const& sizes);

}  // namespace gqa
