// Prints what the runtime reads and refuses, for comparison with Python. The first word says what; see below.
#include <cstring>
#include <fstream>
#include <iomanip>
#include <iostream>
#include <iterator>
#include <vector>

#include "gqa/core/error.h"
#include "gqa/runtime/json.h"
#include "gqa/runtime/manifest.h"

namespace {

using namespace gqa;

std::string read(std::string const& path) {
    std::ifstream file(path, std::ios::binary);
    return {std::istreambuf_iterator<char>(file), {}};
}

// The value in one line: strings as their bytes in hexadecimal, keys sorted.
void print_json(Json const& value) {
    auto hex = [](std::string const& text) {
        std::cout << "s";
        for (unsigned char byte : text) std::cout << std::hex << std::setw(2) << std::setfill('0') << int{byte};
        std::cout << std::dec;
    };
    auto is = [&value](auto read_as) {
        try {
            (value.*read_as)();
            return true;
        } catch (Error const&) {
            return false;
        }
    };
    if (value.is_null()) {
        std::cout << "null";
    } else if (is(&Json::boolean)) {
        std::cout << (value.boolean() ? "true" : "false");
    } else if (is(&Json::integer)) {
        std::cout << value.integer();
    } else if (is(&Json::real)) {
        std::cout << std::hexfloat << value.real() << std::defaultfloat;
    } else if (is(&Json::string)) {
        hex(value.string());
    } else if (is(&Json::array)) {
        std::cout << "[";
        for (Json const& item : value.array()) print_json(item), std::cout << ",";
        std::cout << "]";
    } else {
        std::cout << "{";
        for (auto const& [key, item] : value.object()) hex(key), std::cout << ":", print_json(item), std::cout << ",";
        std::cout << "}";
    }
}

void print_manifest(Manifest const& m) {
    std::cout << m.flavor << " " << m.version << " file " << m.engine_file << " " << m.engine_sha256 << " capacity "
              << m.capacity << " batch " << m.max_batch << " prompt " << m.max_prompt << " vocabulary " << m.vocabulary
              << " profiles " << m.decode_profile << " " << m.prefill_profile << " capabilities";
    for (int one : m.capabilities) std::cout << " " << one;
    std::cout << " ends";
    for (auto one : m.end_tokens) std::cout << " " << one;
    std::cout << " aliases";
    for (auto const& [present, past] : m.aliases) std::cout << " " << present << "=" << past;
    std::cout << " plugin " << (m.plugin ? m.plugin->name : "none") << "\n";
}

}  // namespace

// json: files on standard input. fp16, bf16: every number of that format, as fp32 bytes.
// manifest FOLDER FLAVOR VERSION CAPABILITY PLUGIN: what is read, or the first refusal in the order of Session::load.
// rank FOLDER RANK SIZE DEVICE: what is read of a rank, with a communicator of so many ranks on that GPU, or the refusal.
int main(int, char** words) {
    std::string const what = words[1];
    try {
        if (what == "json") {
            for (std::string path; std::getline(std::cin, path);) {
                try {
                    print_json(Json::parse(read(path), "text"));
                } catch (Error const& error) {
                    std::cout << "error|" << error.cause() << "|" << error.where();
                }
                std::cout << "\n";
            }
        } else if (what == "manifest") {
            Manifest const manifest = read_manifest(words[2]);
            check_flavor_and_version(manifest, words[3], words[4], words[2]);
            check_plugin(manifest, std::strcmp(words[6], "-") == 0 ? "" : words[6], words[2]);
            check_capability(manifest, std::stoi(words[5]), words[2]);
            check_engine_file(manifest, words[2]);
            print_manifest(manifest);
        } else if (what == "rank") {
            Manifest const manifest = read_manifest(words[2], std::stoi(words[3]));
            check_ranks(manifest, std::stoi(words[4]), std::stoi(words[5]), 0, words[2]);
            check_engine_file(manifest, words[2]);
            std::cout << manifest.rank << " of " << manifest.ranks << " " << manifest.engine_file << " "
                      << manifest.collectives_sha256.substr(0, 4);
            for (auto const* list : {&manifest.inputs, &manifest.outputs}) {
                for (TensorFact const& tensor : *list) {
                    if (tensor.row.size() == 3) std::cout << " " << tensor.name << ":" << tensor.row[0];
                }
            }
            std::cout << "\n";
        } else {
            std::vector<std::uint16_t> every(1 << 16);
            for (std::size_t i = 0; i < every.size(); ++i) every[i] = static_cast<std::uint16_t>(i);
            std::vector<float> wide(every.size());
            to_fp32(number_from(what, "argument"), every.data(), every.size(), wide.data());
            std::cout.write(reinterpret_cast<char const*>(wide.data()),
                            static_cast<std::streamsize>(wide.size() * sizeof(float)));
        }
    } catch (Error const& error) {
        std::cout << "error|" << error.cause() << "|" << error.where() << "|" << error.fix() << "\n";
    }
    return 0;
}
