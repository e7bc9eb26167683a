#include "gqa/attention/container.h"

#include <algorithm>
#include <array>
#include <utility>

#include "gqa/core/error.h"
#include "gqa/core/sha256.h"
#include "gqa/core/text.h"

namespace gqa {
namespace {

constexpr std::string_view kMagic = "gqa-cubins 1";
constexpr std::array<std::string_view, 7> kKernels{"append", "prefill", "decode",      "combine",
                                                   "score",  "select",  "long_prefill"};
constexpr char kRebuild[] = "build the engine again with `gqa-export trt`";

bool known(std::string_view kernel) { return std::find(kKernels.begin(), kKernels.end(), kernel) != kKernels.end(); }

}  // namespace

std::vector<Key> parse_keys(std::string_view data, std::string const& where) {
    std::vector<Key> keys;
    while (!data.empty()) {
        if (data.find('\n') == std::string_view::npos) {
            throw Error("the engine's list of kernels is cut short", where, kRebuild);
        }
        std::string_view const line = next_line(data);
        auto const [kernel, rest] = cut(line, " ");
        auto const [digits, sha256] = cut(rest, " ");
        auto const capability = number(digits);
        if (!known(kernel) || !capability || *capability > 1'000'000 || !is_sha256(sha256)) {
            throw Error("the engine names a kernel in a way that is not understood: '" +
                        std::string(line.substr(0, 80)) + "'", where, kRebuild);
        }
        keys.push_back({std::string(kernel), static_cast<int>(*capability), std::string(sha256)});
    }
    return keys;
}

std::string keys_text(std::vector<Key> const& keys) {
    std::string text;
    for (Key const& key : keys) text += key.kernel + " " + std::to_string(key.capability) + " " + key.sha256 + "\n";
    return text;
}

std::map<std::string, std::string_view> unpack(std::string_view container, std::string const& where) {
    auto [header, files] = cut(container, "\n\n");
    bool const separated = header.size() != container.size();
    if (next_line(header) != kMagic || !separated) {
        throw Error("the engine's kernels are not in a container of this version: it does not begin with '" +
                    std::string(kMagic) + "'", where, kRebuild);
    }
    std::map<std::string, std::string_view> found;
    while (!header.empty()) {
        auto const [sha256, digits] = cut(next_line(header), " ");
        auto const size = number(digits);
        if (!is_sha256(sha256) || !size) {
            throw Error("the header of the engine's kernels is damaged", where, kRebuild);
        }
        std::string_view const file = files.substr(0, static_cast<std::size_t>(*size));
        if (sha256_hex(file) != sha256) {
            throw Error("the engine's kernel " + std::string(sha256.substr(0, 12)) + " is cut short or altered", where,
                        kRebuild);
        }
        files.remove_prefix(file.size());
        found[std::string(sha256)] = file;
    }
    if (!files.empty()) {
        throw Error(std::to_string(files.size()) + " bytes follow the engine's kernels", where, kRebuild);
    }
    return found;
}

void CubinStore::add(std::string_view container) {
    std::map<std::string, std::shared_ptr<Cubin const>> fresh;
    for (auto const& [sha256, file] : unpack(container)) {
        fresh[sha256] = std::make_shared<Cubin const>(parse_cubin(file, "kernel " + sha256.substr(0, 12)));
    }
    std::lock_guard const guard(lock_);
    cubins_.merge(fresh);  // equal names are equal files: the first is kept, and with it what is already loaded
}

std::shared_ptr<Cubin const> CubinStore::get(std::string const& sha256) const {
    std::lock_guard const guard(lock_);
    auto const found = cubins_.find(sha256);
    if (found != cubins_.end()) return found->second;
    throw Error("kernel " + sha256.substr(0, 12) + " is in no layer that was loaded: the engine's carrying layer is "
                "missing or was not restored", "plugin field cubins", kRebuild);
}

CubinStore& CubinStore::of_process() {
    static CubinStore* const store = new CubinStore;  // engines may be torn down after static objects are
    return *store;
}

}  // namespace gqa
