// An engine bundle's manifest, gqa_export.json, and whether this machine can run what it describes.
//
// Written by `gqa-export trt`; its entries are those of gqa_export/bundle/manifest.py and gqa_export/bundle/engine_facts.py.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "gqa/runtime/numbers.h"

namespace gqa {

struct TensorFact {
    std::string name;
    Number number;
    std::vector<std::int64_t> row;  // the axes after the batch; 0 for the new tokens' axis of input_ids
};

struct PluginFact {
    std::string name, version, space;
    std::int64_t contract_version;
};

struct Manifest {
    std::string flavor;             // "tensorrt" or "rtx"
    std::string version;            // of the library that built the engine: "11.1.0.106"
    std::vector<int> capabilities;  // 89 is 8.9; empty: only those of the GPU it was built on
    std::string engine_file, engine_sha256;
    bool stripped = false;  // the weights are not inside
    std::int64_t capacity = 0, max_batch = 0, max_prompt = 0, vocabulary = 0;
    std::int64_t rope_switch = 0;  // a row of more tokens is rotated by another table (longrope); 0: one table for all
    // Where windowed layers keep rings: new tokens that a run may bring to a row, and the slots of the smallest ring.
    std::int64_t prompt_chunk = 0, least_slots = 0;  // 0: every layer keeps the whole capacity
    int decode_profile = 0, prefill_profile = 0;
    std::vector<TensorFact> inputs, outputs;
    std::map<std::string, std::string> aliases;  // present tensor -> the past tensor whose memory it is
    std::optional<PluginFact> plugin;            // none: the engine needs no library of ours
    std::vector<std::int32_t> end_tokens;
    int rank = 0, ranks = 1;       // whose engine, cache and file these are, of a bundle that is cut over ranks
    std::string collectives_sha256;  // over the engine's collectives in order, the same on every rank; "" without ranks
};

// Reads and understands folder/gqa_export.json. Throws Error, with the fix, for anything else than an engine bundle.
// rank: of a bundle that is cut over ranks, whose engine; the cache then has that rank's heads.
Manifest read_manifest(std::string const& folder, int rank = 0);
Manifest parse_manifest(std::string const& text, std::string const& where, int rank = 0);

// What can be wrong between an engine bundle and the machine it is loaded on; each throws Error with the fix.
// flavor, version: of the library that is loaded.
void check_flavor_and_version(Manifest const& manifest, std::string const& flavor, std::string const& version,
                              std::string const& folder);
void check_capability(Manifest const& manifest, int capability, std::string const& folder);
void check_plugin(Manifest const& manifest, std::string const& library, std::string const& folder);
// size, device: of the communicator; size 0 without one. own_device: where the session is to run.
void check_ranks(Manifest const& manifest, int size, int device, int own_device, std::string const& where);

// Throws Error unless the engine's file is there and has the manifest's sha256.
void check_engine_file(Manifest const& manifest, std::string const& folder);

}  // namespace gqa
