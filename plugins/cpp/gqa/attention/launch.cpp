#include "gqa/attention/launch.h"

#include <algorithm>
#include <cstring>
#include <string_view>
#include <utility>

#include "gqa/attention/long_launch.h"
#include "gqa/core/error.h"

namespace gqa {
namespace {

constexpr std::int64_t kSmBound = 256;  // more SMs than this are not filled by decode: the workspace is sized first
constexpr std::int64_t kAlignment = 256;
constexpr char kRebuild[] = "build the engine again with `gqa-export trt`";

constexpr std::array<std::string_view, kSlotCount> kSlotNames{
    "query_ptr", "key_ptr", "value_ptr", "past_key_ptr", "past_value_ptr", "past_lengths_ptr", "new_lengths_ptr",
    "cos_ptr", "sin_ptr", "rotated_ptr", "sinks_ptr", "output_ptr", "partial_ptr", "logsum_ptr",
    "ranges_ptr", "fractions_ptr", "projections_ptr", "code_order_ptr", "selection_ptr", "masses_ptr", "order_ptr",
    "faults_ptr", "sequences", "kv_heads", "steps", "capacity", "least_keys", "window", "max_position", "scale",
    "softcap", "key_scale", "value_scale"};

std::int64_t aligned(std::int64_t size) { return ceil_div(size, kAlignment) * kAlignment; }

std::int64_t rotated_bytes(Layer const& layer, Sizes const& s) {
    return layer.has_rotary ? aligned(s.batch * s.steps * layer.num_heads * s.head * bytes_of(s.kind)) : 0;
}

// Of the faults that append finds where it writes codes.
std::int64_t faults_bytes(Layer const& layer, Sizes const& s) {
    if (!layer.writes_codes()) return 0;
    return aligned(4 * s.batch * layer.kv_num_heads * ceil_div(s.steps, kAppendSteps));
}

std::int64_t visible(Layer const& layer, std::int64_t capacity, std::int64_t steps) {
    return layer.window ? std::min(capacity, layer.window + steps - 1) : capacity;
}

bool is_prefill(std::int64_t steps, std::int64_t rows) { return steps > 1 && rows > kLongRows; }

template <typename Value>
std::uint64_t word(Value value) {
    std::uint64_t bits = 0;
    std::memcpy(&bits, &value, sizeof value);
    return bits;
}

}  // namespace

void Arguments::set(Slot slot, std::uint64_t address) { words_[static_cast<std::size_t>(slot)] = address; }
void Arguments::set(Slot slot, std::int32_t value) { words_[static_cast<std::size_t>(slot)] = word(value); }
void Arguments::set(Slot slot, float value) { words_[static_cast<std::size_t>(slot)] = word(value); }

Kernel resolve(std::shared_ptr<Cubin const> cubin) {
    std::vector<Slot> slots;
    std::string unknown;
    for (auto const& [name, kind] : cubin->arguments) {
        auto const found = std::find(kSlotNames.begin(), kSlotNames.end(), name);
        if (found == kSlotNames.end()) unknown += (unknown.empty() ? "" : ", ") + name;
        slots.push_back(static_cast<Slot>(found - kSlotNames.begin()));
    }
    if (!unknown.empty()) {
        throw Error("kernel " + cubin->kernel + " takes arguments that this plugin does not know: " + unknown,
                    "the engine's attention layers", kRebuild);
    }
    return {std::move(cubin), std::move(slots), nullptr};
}

Choice choose(Layer const& layer, Sizes const& sizes, std::int64_t decode_rows, std::int64_t sm_count) {
    std::int64_t const rows = sizes.steps * layer.group();
    if (is_prefill(sizes.steps, rows)) return {false, 1};
    return {true, choose_programs(sizes.batch, layer.kv_num_heads, ceil_div(rows, decode_rows),
                                  visible(layer, sizes.capacity, sizes.steps), std::min(sm_count, kSmBound))};
}

std::int64_t workspace_bytes(Layer const& layer, Sizes const& largest) {
    std::int64_t most = 0;
    for (std::int64_t steps = 1; steps <= largest.steps; ++steps) {
        std::int64_t const rows = steps * layer.group();
        if (is_prefill(steps, rows)) break;
        std::int64_t const works = largest.batch * layer.kv_num_heads * ceil_div(rows, kLeastRows);
        std::int64_t const programs =
            choose_programs(1, 1, works, visible(layer, largest.capacity, steps), kSmBound);
        std::int64_t const longest_tile = std::min(kLongRows, block(layer.group()));
        auto const e = workspace_elements(largest.batch, steps, layer.num_heads, layer.kv_num_heads,
                                          largest.value_head, longest_tile, programs);
        most = std::max(most, aligned(4 * e.partial) + aligned(4 * e.logsum) + aligned(8 * e.ranges));
    }
    auto const e = long_elements(layer, largest);
    return rotated_bytes(layer, largest) + faults_bytes(layer, largest) +
           std::max(most, aligned(4 * e.selection) + aligned(4 * e.scratch));
}

void Launches::add(Kernel const& kernel, std::int64_t x, std::int64_t y, std::int64_t z, Arguments const& arguments) {
    list_[count_++] = {&kernel,
                       {static_cast<std::uint32_t>(x), static_cast<std::uint32_t>(y), static_cast<std::uint32_t>(z)},
                       &arguments};
}

Launches::Launches(Layer const& layer, Sizes const& sizes, Kernels const& kernels,
                   std::array<std::uint64_t, kInputCount> const& pointers, std::uint64_t output,
                   std::uint64_t workspace, std::int64_t sm_count) {
    std::int64_t const decode_rows = kernels.decode.cubin->tile_rows;
    auto const [decode, programs] = choose(layer, sizes, decode_rows, sm_count);
    auto const elements = workspace_elements(sizes.batch, sizes.steps, layer.num_heads, layer.kv_num_heads,
                                             sizes.value_head, decode_rows, programs);
    std::uint64_t const faults = workspace + static_cast<std::uint64_t>(rotated_bytes(layer, sizes));
    std::uint64_t const partial = faults + static_cast<std::uint64_t>(faults_bytes(layer, sizes));
    auto input = [&pointers](Input which) {
        std::uint64_t const address = pointers[static_cast<std::size_t>(which)];
        return address ? address : pointers[0];  // the query's: a valid address that the kernel never reads
    };
    std::uint64_t const rotated = layer.has_rotary ? workspace : input(Input::query);

    Arguments common;
    common.set(Slot::past_lengths_ptr, input(Input::past_lengths));
    common.set(Slot::new_lengths_ptr, input(Input::new_lengths));
    common.set(Slot::output_ptr, output);
    common.set(Slot::partial_ptr, partial);
    std::uint64_t const logsum = partial + static_cast<std::uint64_t>(aligned(4 * elements.partial));
    common.set(Slot::logsum_ptr, logsum);
    common.set(Slot::ranges_ptr, logsum + static_cast<std::uint64_t>(aligned(4 * elements.logsum)));
    common.set(Slot::sequences, static_cast<std::int32_t>(sizes.batch));
    common.set(Slot::kv_heads, layer.kv_num_heads);
    common.set(Slot::steps, static_cast<std::int32_t>(sizes.steps));
    common.set(Slot::capacity, static_cast<std::int32_t>(sizes.capacity));
    common.set(Slot::least_keys, static_cast<std::int32_t>(kLeastKeys));
    common.set(Slot::window, layer.window);
    common.set(Slot::scale, layer.scale);
    common.set(Slot::softcap, layer.softcap);
    common.set(Slot::faults_ptr, faults);
    common.set(Slot::key_scale, layer.key_scale);
    common.set(Slot::value_scale, layer.value_scale);

    appending_ = attending_ = common;
    appending_.set(Slot::query_ptr, input(Input::query));
    appending_.set(Slot::key_ptr, input(Input::key));
    appending_.set(Slot::value_ptr, input(Input::value));
    appending_.set(Slot::past_key_ptr, input(Input::past_key));
    appending_.set(Slot::past_value_ptr, input(Input::past_value));
    appending_.set(Slot::cos_ptr, input(Input::cos));
    appending_.set(Slot::sin_ptr, input(Input::sin));
    appending_.set(Slot::rotated_ptr, rotated);
    appending_.set(Slot::max_position, static_cast<std::int32_t>(sizes.max_position));
    attending_.set(Slot::query_ptr, rotated);
    attending_.set(Slot::sinks_ptr, layer.has_sinks ? input(Input::sinks) : rotated);
    attending_.set(Slot::key_ptr, input(Input::past_key));
    attending_.set(Slot::value_ptr, input(Input::past_value));
    if (layer.cache_codes) attending_.set(Slot::scale, layer.scale * layer.key_scale);  // registers only convert codes
    joining_ = attending_;  // combine asks only how many new tokens there may be
    if (layer.ring()) joining_.set(Slot::capacity, static_cast<std::int32_t>(sizes.capacity - layer.window + 1));

    std::int64_t const rows = sizes.steps * layer.group();
    if (layer.appends()) {
        std::int64_t const heads = (layer.has_new ? layer.kv_num_heads : 0) + (layer.has_rotary ? layer.num_heads : 0);
        add(kernels.append, ceil_div(sizes.steps, kAppendSteps), heads, sizes.batch, appending_);
    }
    if (approximates(layer, sizes)) {
        std::uint64_t const scratch =
            partial + static_cast<std::uint64_t>(aligned(4 * long_elements(layer, sizes).selection));
        attending_.set(Slot::fractions_ptr, input(Input::fractions));
        attending_.set(Slot::projections_ptr, input(Input::projections));
        attending_.set(Slot::code_order_ptr, input(Input::code_order));
        attending_.set(Slot::selection_ptr, partial);
        attending_.set(Slot::masses_ptr, scratch);
        attending_.set(Slot::order_ptr, scratch);
        auto const grids = long_grids(layer, sizes, kernels.score.cubin->tile_rows,
                                      kernels.long_prefill.cubin->tile_rows);
        add(kernels.score, grids.score, layer.kv_num_heads, sizes.batch, attending_);
        add(kernels.select, grids.select, layer.kv_num_heads, sizes.batch, attending_);
        add(kernels.long_prefill, grids.long_prefill, layer.kv_num_heads, sizes.batch, attending_);
    } else if (decode) {
        add(kernels.decode, programs, 1, 1, attending_);
        add(kernels.combine, sizes.batch * sizes.steps * layer.num_heads, 1, 1, joining_);
    } else {
        add(kernels.prefill, ceil_div(rows, kernels.prefill.cubin->tile_rows), layer.kv_num_heads, sizes.batch,
            attending_);
    }
}

}  // namespace gqa
