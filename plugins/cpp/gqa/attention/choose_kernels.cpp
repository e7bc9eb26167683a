// Which of the kernels that an engine carries run on this GPU and belong to this layer.
#include <algorithm>
#include <set>

#include "gqa/attention/launch.h"
#include "gqa/attention/long_launch.h"
#include "gqa/core/error.h"
#include "gqa/core/text.h"

namespace gqa {
namespace {

constexpr int kArchitectureOnly = 90;  // from this capability on, a cubin runs on its own capability alone
constexpr char kWhere[] = "the engine's attention layers";
constexpr char kRebuild[] = "build the engine again with `gqa-export trt`";

std::string dotted(int capability) {
    return std::to_string(capability / 10) + "." + std::to_string(capability % 10);
}

// A lower capability of the same generation will do, if it asks for no more shared memory than this one has.
bool runs_on(int compiled, int gpu) {
    if (compiled == gpu) return true;
    return compiled / 10 == gpu / 10 && compiled <= gpu && gpu < kArchitectureOnly &&
           shared_kib_or_zero(compiled) <= shared_kib_or_zero(gpu);
}

// The argument in which a kernel gets the cache's keys; "" for one that does not read the cache.
std::string cache_argument(std::string const& kernel) {
    if (kernel == "append") return "past_key_ptr";
    return kernel == "prefill" || kernel == "decode" ? "key_ptr" : "";
}

// Throws Error for a kernel of a cache of another type, or one that does not look for what codes cannot say.
void check_cache(Cubin const& cubin, Layer const& layer, Sizes const& sizes) {
    static constexpr char const* codes[] = {"", "i8", "fp8e4nv"};
    std::string const held = layer.cache_codes ? codes[layer.cache_codes] : name_of(sizes.kind);
    std::string const name = cache_argument(cubin.kernel);
    std::string found;
    bool looks = false;
    for (auto const& [argument, kind] : cubin.arguments) {
        if (argument == name) found = kind.substr(1);
        looks = looks || argument == "faults_ptr";
    }
    bool const may_look = cubin.kernel == "append" || cubin.kernel == "prefill" || cubin.kernel == "combine";
    if ((found.empty() || found == held) && (!may_look || looks == layer.writes_codes())) return;
    throw Error("kernel " + cubin.kernel + " was compiled for a cache of " + (found.empty() ? "another type" : found) +
                    ", the layer has one of " + held, kWhere, kRebuild);
}

}  // namespace

std::map<std::string, Key> pick(std::vector<Key> keys, int capability) {
    std::stable_sort(keys.begin(), keys.end(),
                     [](Key const& a, Key const& b) { return a.capability < b.capability; });
    std::map<std::string, Key> chosen;
    std::set<std::string> named, there;
    for (Key const& key : keys) {
        named.insert(key.kernel);
        there.insert(dotted(key.capability));
        if (runs_on(key.capability, capability)) chosen[key.kernel] = key;
    }
    if (!chosen.empty() && chosen.size() == named.size()) return chosen;
    std::string list;
    for (std::string const& one : there) list += (list.empty() ? "" : ", ") + one;
    throw Error("this GPU has compute capability " + dotted(capability) + ", the engine carries kernels for " +
                    (list.empty() ? "none" : list), kWhere,
                "build it with `gqa-export trt BUNDLE -o DIR --compute-capability " + dotted(capability) + "`");
}

void check_cubin(Cubin const& cubin, Layer const& layer, Sizes const& sizes) {
    std::map<std::string, std::int64_t> expected = long_constants(layer, sizes);
    std::pair<char const*, std::int64_t> const of_all[] = {
        {"GROUP", layer.group()},
        {"HEAD", sizes.head},
        {"VALUE_HEAD", sizes.value_head},
        {"HALF", sizes.rotary_half},
        {"HAS_WINDOW", layer.window > 0},
        {"HAS_SOFTCAP", layer.softcap > 0},
        {"HAS_SINKS", layer.has_sinks},
        {"HAS_NEW", layer.has_new},
        {"INTERLEAVED", layer.interleaved()},
        {"RING", layer.ring()},
    };
    for (auto const& [name, value] : of_all) expected.emplace(name, value);
    std::map<std::string, std::string> constants = cubin.constants;
    constants.emplace("RING", "0");  // files of before there were rings do not name it
    for (auto const& [name, value] : expected) {
        auto const found = constants.find(name);
        if (found == constants.end() || number(found->second) == value) continue;
        throw Error("kernel " + cubin.kernel + " was compiled for " + name + " = " + found->second +
                        ", the layer has " + std::to_string(value), kWhere, kRebuild);
    }
    if (layer.method && (cubin.kernel == "score" || cubin.kernel == "select")) {
        bool masses = false;
        for (auto const& argument : cubin.arguments) masses = masses || argument.first == "masses_ptr";
        if (masses != (layer.method == kTiles)) {
            throw Error("kernel " + cubin.kernel + " was compiled for another method than the layer's", kWhere, kRebuild);
        }
    }
    std::string const wanted = std::string("*") + name_of(sizes.kind);
    for (auto const& [name, kind] : cubin.arguments) {
        if ((name != "query_ptr" && name != "output_ptr") || kind == wanted) continue;
        throw Error("kernel " + cubin.kernel + " was compiled for " + kind.substr(1) + ", the layer has " +
                        name_of(sizes.kind), kWhere, kRebuild);
    }
    check_cache(cubin, layer, sizes);
}

}  // namespace gqa
