// Prints what the C++ side of the plugin works out, for comparison with Python. The first word says what; see below.
#include <fstream>
#include <iostream>
#include <iterator>
#include <sstream>
#include <string>

#include "gqa/attention/loaded_kernels.h"
#include "gqa/core/error.h"
#include "gqa/core/sha256.h"

namespace {

using namespace gqa;

std::string read(std::string const& path) {
    std::ifstream file(path, std::ios::binary);
    return {std::istreambuf_iterator<char>(file), {}};
}

void print_identity() {
    for (std::int32_t version : {1, 2, 3}) {
        std::cout << kPluginName << " " << version_text(version) << " " << kPluginNamespace << " "
                  << contract_of(version) << "\n";
        for (auto const& field : creation_of(version)) {
            std::cout << field.name << " " << (field.integer ? "int32" : "float32") << "\n";
        }
    }
    std::cout << kContractVersionField << " int32\n" << kKeysField << " char\n" << kCubinsField << " char\n";
    for (int flags = 0; flags < 16; ++flags) {
        Layer layer;
        layer.has_rotary = flags & 1, layer.has_sinks = flags >> 1 & 1, layer.has_new = flags >> 2 & 1;
        layer.method = flags >> 3 & 1;
        std::cout << "node " << layer.method << layer.has_rotary << layer.has_sinks << layer.has_new << " " << node_outputs(layer);
        for (Input input : node_inputs(layer)) std::cout << " " << name_of(input);
        std::cout << "\n";
    }
}

Layer read_layer(std::istream& words) {
    Layer layer;
    words >> layer.version;
    for (auto const& field : creation_of(layer.version)) {
        if (field.integer) {
            words >> layer.*field.integer;
        } else {
            words >> layer.*field.real;
        }
    }
    return layer;
}

// plan: sequences steps heads kv_heads head value_head dtype window bound sms capability, a line each.
void print_plans() {
    for (std::string line; std::getline(std::cin, line);) {
        std::istringstream words(line);
        PlanRequest r{};
        std::string dtype;
        words >> r.sequences >> r.steps >> r.heads >> r.kv_heads >> r.head >> r.value_head >> dtype >> r.window >>
            r.bound >> r.sm_count >> r.capability;
        r.kind = kind_from(dtype);
        Plan const p = plan(r);
        auto const w = workspace_elements(r.sequences, r.steps, r.heads, r.kv_heads, r.value_head, p.tiles.rows,
                                          p.programs);
        std::cout << (p.decode ? "decode" : "prefill") << " " << p.tiles.rows << " " << p.tiles.keys << " "
                  << p.tiles.warps << " " << p.tiles.stages << " " << p.programs << " " << w.partial << " " << w.logsum
                  << " " << w.ranges << "\n";
    }
}

// enqueue: CONTAINER KEYS VERSION, the layer's fields, B S C D E dtype R/2 M r, a line each. Launches go to the stand-in's log.
void enqueue_all() {
    cuda::Context context = nullptr;
    cuda::driver().primary_context_retain(&context, 0);
    cuda::driver().context_set_current(context);
    for (std::string line; std::getline(std::cin, line);) {
        std::istringstream words(line);
        std::string container, keys, dtype;
        words >> container >> keys;
        Layer const layer = read_layer(words);
        Sizes s;
        words >> s.batch >> s.steps >> s.capacity >> s.head >> s.value_head >> dtype >> s.rotary_half >>
            s.max_position >> s.projections;
        s.kind = kind_from(dtype);
        try {
            check_layer(layer);
            CubinStore store;
            store.add(read(container));
            LoadedLayer const loaded(layer, s, parse_keys(read(keys)), store);
            std::array<std::uint64_t, kInputCount> pointers{};
            for (Input input : node_inputs(layer)) {
                auto const index = static_cast<std::size_t>(input);
                pointers[index] = 4096 * (index + 1);
            }
            loaded.enqueue(layer, s, pointers, 1 << 20, 1 << 24, nullptr);
            std::cout << workspace_bytes(layer, s) << "\n";
        } catch (Error const& error) {
            std::cout << error.cause() << "\n";
        }
    }
}

void print_file(std::string const& what, std::string const& data) {
    if (what == "sha256") {
        std::cout << sha256_hex(data) << "\n";
    } else if (what == "cubin") {
        Cubin const c = parse_cubin(data);
        std::cout << c.kernel << " " << c.name << " " << c.capability << " " << c.shared_bytes << " " << c.threads
                  << " " << c.tile_rows << " " << c.scratch_pointers << " " << c.code.size() << "\n";
        for (auto const& [name, kind] : c.arguments) std::cout << name << " " << kind << "\n";
        for (auto const& [name, value] : c.constants) std::cout << name << " " << value << "\n";
    } else if (what == "container") {
        for (auto const& [sha256, file] : unpack(data)) std::cout << sha256 << " " << file.size() << "\n";
    } else {
        std::cout << keys_text(parse_keys(data));
    }
}

}  // namespace

int main(int, char** words) {
    std::string const what = words[1];
    if (what == "identity") {
        print_identity();
    } else if (what == "plan") {
        print_plans();
    } else if (what == "enqueue") {
        enqueue_all();
    } else {  // sha256, cubin, container, keys: the files named on standard input, one after another
        for (std::string path; std::getline(std::cin, path);) {
            try {
                print_file(what, read(path));
            } catch (Error const& error) {
                std::cout << "error " << error.what() << "\n";
            }
            std::cout << "--\n";
        }
    }
    return 0;
}
