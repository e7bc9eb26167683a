#include "gqa/runtime/manifest.h"

#include <algorithm>
#include <fstream>
#include <iterator>

#include "gqa/core/error.h"
#include "gqa/runtime/json.h"

namespace gqa {
namespace {

constexpr std::int64_t kFormat = 1;
constexpr char kRebuild[] = "build the engine again with `gqa-export trt`";

// [batch, ...]: the batch is a named axis, all others are literal, but for the new tokens' axis of input_ids and of
// hidden_states.
TensorFact read_tensor(Json const& fact) {
    TensorFact tensor{fact.at("name").string(), Number::int32, {}};
    tensor.number = number_from(fact.at("dtype").string(), "gqa_export.json: " + tensor.name);
    Json::Array const& shape = fact.at("shape").array();
    for (std::size_t axis = 1; axis < shape.size(); ++axis) {
        bool const tokens = (tensor.name == "input_ids" || tensor.name == "hidden_states") && axis == 1;
        tensor.row.push_back(tokens ? 0 : shape[axis].integer());
    }
    return tensor;
}

std::vector<TensorFact> read_tensors(Json const& facts) {
    std::vector<TensorFact> tensors;
    for (Json const& fact : facts.array()) tensors.push_back(read_tensor(fact));
    return tensors;
}

void read_profiles(Json const& profiles, Manifest& manifest, std::string const& where) {
    int found = 0;
    for (std::size_t i = 0; i < profiles.array().size(); ++i) {
        Json const& profile = profiles.item(i);
        Json const& most = profile.at("shapes").at("input_ids").item(2);
        std::int64_t const batch = most.item(0).integer(), steps = most.item(1).integer();
        manifest.max_batch = i == 0 ? batch : std::min(manifest.max_batch, batch);
        if (profile.at("name").string() == "decode") {
            manifest.decode_profile = static_cast<int>(i), found |= 1;
        } else if (profile.at("name").string() == "prefill") {
            manifest.prefill_profile = static_cast<int>(i), manifest.max_prompt = steps, found |= 2;
        }
    }
    if (found != 3) throw Error("the engine lacks a decode or a prefill profile", where, kRebuild);
}

void read_engine(Json const& engine, Manifest& manifest, std::string const& where) {
    manifest.flavor = engine.at("flavor").string();
    manifest.version = engine.at("version").string();
    manifest.engine_file = engine.at("file").string();
    manifest.stripped = engine.at("stripped").boolean();
    for (Json const& one : engine.at("compute_capabilities").array()) {
        manifest.capabilities.push_back(static_cast<int>(one.integer()));
    }
    for (auto const& [present, past] : engine.at("aliases").object()) manifest.aliases[present] = past.string();
    read_profiles(engine.at("profiles"), manifest, where);
    Json const& plugin = engine.at("plugin");
    if (plugin.is_null()) return;
    manifest.plugin = PluginFact{plugin.at("name").string(), plugin.at("version").string(),
                                 plugin.at("namespace").string(), plugin.at("contract_version").integer()};
}

TensorFact const* find(std::vector<TensorFact> const& tensors, std::string const& name) {
    auto const found = std::find_if(tensors.begin(), tensors.end(), [&](auto const& one) { return one.name == name; });
    return found == tensors.end() ? nullptr : &*found;
}

bool leaves_folder(std::string const& file) {
    return file.empty() || file.find('/') != std::string::npos || file.find('\\') != std::string::npos || file == "..";
}

// The number of a cache tensor's layer, past_key_values.LAYER.key or present.LAYER.value; -1 for any other tensor.
std::int64_t layer_of_cache(std::string const& name) {
    std::size_t const begin = name.find('.'), end = name.rfind('.');
    if (begin == end) return -1;
    std::string const number = name.substr(begin + 1, end - begin - 1);
    bool const digits = !number.empty() && number.size() < 10 && number.find_first_not_of("0123456789") == number.npos;
    return digits ? std::stoll(number) : -1;
}

// A rank's own folder, heads and hash in place of those of the whole model.
void read_rank(Json const& parallel, Manifest& manifest, int rank, std::string const& where) {
    Json::Array const& ranks = parallel.at("ranks").array();
    manifest.rank = rank, manifest.ranks = static_cast<int>(ranks.size());
    if (rank < 0 || rank >= manifest.ranks) {
        throw Error("the bundle has no rank " + std::to_string(rank), where,
                    "it is cut over " + std::to_string(manifest.ranks) + " ranks, counted from 0");
    }
    auto const number = static_cast<std::size_t>(rank);
    Json const& own = parallel.at("ranks").item(number);
    std::string const& folder = own.at("folder").string();
    if (leaves_folder(folder)) throw Error("the rank's folder lies outside the bundle", where, kRebuild);
    manifest.engine_file = folder + "/" + manifest.engine_file;
    manifest.collectives_sha256 = own.at("collectives_sha256").string();
    std::map<std::int64_t, std::int64_t> heads;
    for (Json const& layer : own.at("heads").array()) {
        heads[layer.at("layer").integer()] = static_cast<std::int64_t>(layer.at("kv").array().size());
    }
    for (auto* const tensors : {&manifest.inputs, &manifest.outputs}) {
        for (TensorFact& tensor : *tensors) {
            std::int64_t const layer = layer_of_cache(tensor.name);
            if (layer < 0) continue;
            auto const held = heads.find(layer);
            if (held == heads.end() || tensor.row.empty()) {
                throw Error("the rank holds no heads of " + tensor.name, where, kRebuild);
            }
            tensor.row[0] = held->second;
        }
    }
}

// What the runtime relies on: named tensors, and every cache output in the memory of a cache input.
void check_tensors(Manifest& manifest, std::string const& where) {
    for (char const* name : {"input_ids", "past_lengths", "new_lengths"}) {
        if (!find(manifest.inputs, name)) throw Error(std::string("the engine has no input ") + name, where, kRebuild);
    }
    TensorFact const* const logits = find(manifest.outputs, "logits");
    if (!logits || logits->row.size() != 2) throw Error("the engine has no output logits [batch, 1, V]", where, kRebuild);
    manifest.vocabulary = logits->row[1];
    for (TensorFact const& output : manifest.outputs) {
        if (output.name == "logits" || output.name == "hidden_states") continue;
        auto const alias = manifest.aliases.find(output.name);
        if (alias == manifest.aliases.end() || !find(manifest.inputs, alias->second)) {
            throw Error("the engine's output " + output.name + " is not in the memory of an input", where, kRebuild);
        }
    }
}

// The rings of windowed layers, where the manifest has some: token t of a row lies in slot t modulo a ring's slots.
void read_rings(Json const& root, Manifest& manifest, std::string const& where) {
    if (!root.has("window_cache") || root.at("window_cache").is_null()) return;
    manifest.prompt_chunk = root.at("window_cache").at("chunk").integer();
    manifest.least_slots = manifest.capacity;
    for (TensorFact const& input : manifest.inputs) {
        if (input.row.size() == 3) manifest.least_slots = std::min(manifest.least_slots, input.row[1]);
    }
    if (manifest.max_prompt > manifest.prompt_chunk) {
        throw Error("the engine takes " + std::to_string(manifest.max_prompt) +
                        " new tokens at once, and its windowed layers keep room for " +
                        std::to_string(manifest.prompt_chunk), where, kRebuild);
    }
}

}  // namespace

Manifest parse_manifest(std::string const& text, std::string const& where, int rank) {
    Json const root = Json::parse(text, where);
    if (!root.has("format") || !root.has("target")) {
        throw Error("not the manifest of a bundle", where, "give a folder that `gqa-export trt BUNDLE -o DIR` wrote");
    }
    if (root.at("format").integer() != kFormat) {
        throw Error("manifest format " + std::to_string(root.at("format").integer()) + " is not " +
                        std::to_string(kFormat), where, "build the engine with the version of gqa-export that this "
                                                        "program was built from");
    }
    if (!root.has("engine") || root.at("engine").is_null()) {
        throw Error("the bundle holds a graph for '" + root.at("target").string() + "', not an engine", where,
                    "make one of it: `gqa-export trt BUNDLE -o DIR`");
    }
    Manifest manifest;
    manifest.capacity = root.at("capacity").integer();
    manifest.rope_switch = root.at("spec").at("rope_switch").integer();
    manifest.inputs = read_tensors(root.at("inputs"));
    manifest.outputs = read_tensors(root.at("outputs"));
    read_engine(root.at("engine"), manifest, where);
    check_tensors(manifest, where);
    read_rings(root, manifest, where);
    if (leaves_folder(manifest.engine_file)) throw Error("the engine's file lies outside the bundle", where, kRebuild);
    if (root.has("parallel") && !root.at("parallel").is_null()) {
        read_rank(root.at("parallel"), manifest, rank, where);
    }
    manifest.engine_sha256 = root.at("files").at(manifest.engine_file).at("sha256").string();
    if (root.at("tokens").has("eos")) {
        for (Json const& token : root.at("tokens").at("eos").array()) {
            manifest.end_tokens.push_back(static_cast<std::int32_t>(token.integer()));
        }
    }
    return manifest;
}

Manifest read_manifest(std::string const& folder, int rank) {
    std::string const path = folder + "/gqa_export.json";
    std::ifstream file(path, std::ios::binary);
    if (!file) {
        throw Error("the folder has no gqa_export.json, so it is not a bundle", folder,
                    "make one with `gqa-export trt BUNDLE -o DIR`");
    }
    return parse_manifest({std::istreambuf_iterator<char>(file), {}}, path, rank);
}

}  // namespace gqa
